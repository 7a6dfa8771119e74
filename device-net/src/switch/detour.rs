//! Frames that something happens to on purpose (see [`faults`]): late, spoiled, more than once, or behind
//! others. A switch lets no frame wait, so these leave the way of all others: they are copied whole and go
//! on from a thread of their own, which a switch has once it had such a frame.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::Duration;

use filter::Direction as Way;

use super::Switch;
use super::deliver::Body;
use super::forward::{Bodies, GUEST_SHARE, Sender};
use super::frame::Frame;
use super::mac_table::PortNumber;
use super::vlan::Vlans;
use crate::guard::{Mishap, monotonic_ns};
use crate::nic::state::NicState;
use crate::nic::stats::DropReason;

/// Frames of a switch that wait; any more are lost, as in any queue.
const MAX_FRAMES: usize = 4096;
/// Between two looks whether frames that wait may go, because a fault is over or others went ahead.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);
/// Addresses in front of what is spoiled.
const ADDRESSES_BYTES: usize = 12;

/// See the module's description.
#[derive(Debug, Default)]
pub(super) struct Detour {
    queue: OnceLock<Option<SyncSender<Detoured>>>,
}

/// Where a frame goes on.
#[derive(Clone, Debug)]
pub(super) enum Onward {
    /// As if this port sent it now.
    From(PortNumber, Arc<Vlans>),
    /// Into this port's rings, past its guard.
    To(PortNumber, Arc<Vlans>),
}

/// A frame that left the way.
#[derive(Debug)]
struct Detoured {
    /// As it came.
    frame: Frame,
    /// All of it.
    bytes: Vec<u8>,
    mishap: Mishap,
    /// It goes on then.
    due_ns: u64,
    /// Or once so many frames were shown to faults.
    behind: Option<u64>,
    /// Whose fault it is, and the pair of queues that it goes by.
    nic: Arc<NicState>,
    pair: u16,
    onward: Onward,
}

/// A frame that waits.
struct Waiting {
    detoured: Detoured,
    /// Those that were to go ahead came along; by the next look they have gone.
    was_overtaken: bool,
}

impl Detour {
    /// A frame is lost if too many wait already.
    fn take(&self, switch: &Arc<Switch>, mut detoured: Detoured) {
        let at = detoured
            .frame
            .head_len_bytes()
            .saturating_sub(ADDRESSES_BYTES)
            .min(detoured.bytes.len());
        detoured.mishap.spoil(&mut detoured.bytes[at..]);
        let queue = self.queue.get_or_init(|| start(switch));
        if let Some(queue) = queue {
            let _ = queue.try_send(detoured);
        }
    }
}

/// Lets a frame of a NIC, which is `bytes`, go on later.
#[cold]
pub(super) fn detour(
    switch: &Arc<Switch>,
    frame: Frame,
    bytes: Vec<u8>,
    (mishap, due_ns): (Mishap, u64),
    (nic, pair): (&Arc<NicState>, u16),
    onward: Onward,
) {
    let mut detoured = Detoured {
        frame,
        bytes,
        mishap,
        due_ns,
        behind: None,
        nic: Arc::clone(nic),
        pair,
        onward,
    };
    if let Some((ahead, until_ns)) = mishap.behind {
        detoured.due_ns = due_ns.max(until_ns);
        detoured.behind = Some(detoured.shown() + u64::from(ahead));
    }
    switch.detour.take(switch, detoured);
}

/// A copy of a frame, of whose beginning there is a copy already.
#[cold]
pub(super) fn whole(beginning: &[u8], body: Body<'_>) -> Vec<u8> {
    let mut bytes = beginning.to_vec();
    body.after(beginning.len()).copy_into(&mut bytes);
    bytes
}

/// No thread to be had: what would have to wait is lost.
fn start(switch: &Arc<Switch>) -> Option<SyncSender<Detoured>> {
    let (queue, frames) = sync_channel(MAX_FRAMES);
    let switch = Arc::downgrade(switch);
    let spawned = thread::Builder::new()
        .name("switch/detour".to_owned())
        .spawn(move || run(&switch, &frames));
    match spawned {
        Ok(_) => Some(queue),
        Err(error) => {
            tracing::error!(%error, "no thread for frames that are held up on purpose");
            None
        }
    }
}

/// For as long as there is a switch.
fn run(switch: &Weak<Switch>, frames: &Receiver<Detoured>) {
    // By when they go on, those that came first before others.
    let mut waiting: BTreeMap<(u64, u64), Waiting> = BTreeMap::new();
    let mut number = 0;
    loop {
        let next = match waiting.is_empty() {
            true => frames.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => frames.recv_timeout(LOOK_INTERVAL),
        };
        if matches!(next, Err(RecvTimeoutError::Disconnected)) {
            return;
        }
        let more = frames.try_iter().take(MAX_FRAMES);
        for detoured in next.into_iter().chain(more) {
            if waiting.len() < MAX_FRAMES {
                number += 1;
                let key = (detoured.due_ns, number);
                waiting.insert(key, Waiting::new(detoured));
            }
        }
        let now_ns = monotonic_ns();
        let ready: Vec<_> = waiting
            .iter_mut()
            .filter_map(|(&key, waits)| waits.may_go(now_ns).then_some(key))
            .collect();
        let Some(switch) = switch.upgrade() else {
            return;
        };
        for key in ready {
            if let Some(waits) = waiting.remove(&key) {
                waits.detoured.go_on(&switch);
            }
        }
    }
}

impl Waiting {
    fn new(detoured: Detoured) -> Self {
        Self {
            detoured,
            was_overtaken: false,
        }
    }

    fn may_go(&mut self, now_ns: u64) -> bool {
        let frame = &self.detoured;
        let is_overtaken = frame.behind.is_some_and(|count| frame.shown() >= count);
        let was_overtaken = std::mem::replace(&mut self.was_overtaken, is_overtaken);
        frame.due_ns <= now_ns || !frame.nic.guard.is_faulty() || (was_overtaken && is_overtaken)
    }
}

impl Detoured {
    fn way(&self) -> Way {
        match self.onward {
            Onward::From(..) => Way::Egress,
            Onward::To(..) => Way::Ingress,
        }
    }

    fn shown(&self) -> u64 {
        self.nic.guard.shown_to_faults(self.way())
    }

    fn go_on(self, switch: &Arc<Switch>) {
        let counters = &self.nic.stats[usize::from(self.pair)];
        if self.nic.guard.is_too_late(self.way()) {
            let counters = match self.way() {
                Way::Egress => &counters.tx.0,
                Way::Ingress => &counters.rx.0,
            };
            counters.count_drop(DropReason::Guarded);
            return;
        }
        let body = Single(&self.bytes);
        let (Onward::From(number, vlans) | Onward::To(number, vlans)) = &self.onward;
        let mut sender = Sender::new(switch, *number, vlans, GUEST_SHARE);
        for _ in 0..=self.mishap.copies {
            match self.onward {
                Onward::From(..) => {
                    let sent = &counters.tx.0;
                    sender.read(1, &body, None, sent, |_, _| Ok(self.frame));
                    sender.send(&body, sent);
                }
                Onward::To(number, _) => {
                    sender.send_past_guard(self.frame, number, &body, &counters.rx.0);
                }
            }
        }
    }
}

/// One frame.
struct Single<'a>(&'a [u8]);

impl Bodies for Single<'_> {
    fn body(&self, _index: usize) -> Body<'_> {
        Body::Own(self.0)
    }
}
