//! Frames from one transmit ring to wherever they go.
//!
//! A batch at a time: what is needed of each frame is copied and looked up, then each receiver's ring
//! is locked once for all frames that it gets, and then the batch goes back to its driver. Whoever
//! has no buffers loses frames; nobody waits.

use std::sync::Arc;
use std::time::Instant;

use filter::Direction as Way;
use vhost_user::backend::{Polling, QueueHandler, Wake};
use vhost_user::ring::{Batch, Ring, RingError};

use super::deliver::{Body, Delivery};
use super::detour::{Onward, detour, whole};
use super::flow::{LOOKED_AT_BYTES, flow_hash};
use super::frame::{Destination, Frame};
use super::mac_table::{Key, PortNumber};
use super::offload;
use super::port::{Port, RingReceiver};
use super::shown::{Judged, Shown, ShownAt, append_beginning, checksum_at, judge};
use super::storm::{Storm, StormLimits};
use super::uplink::Uplink;
use super::vlan::Vlans;
use super::{Outlet, Switch, View, ViewPort};
use crate::guard;
use crate::nic::header::{Header, Offloads, header_len_bytes};
use crate::nic::state::NicState;
use crate::nic::stats::{Direction, DropReason};

/// Frames taken at once. Their beginnings and the buffers for them stay in the first-level cache.
const BATCH: usize = 64;

/// Addresses learnt of a guest's port at most: more than a bridge inside a guest has.
pub(super) const GUEST_SHARE: usize = 256;

const BROADCAST: [u8; 6] = [0xff; 6];

/// One transmit ring.
pub(super) struct TxQueue {
    nic: Arc<NicState>,
    pair: u16,
    polling: Polling,
    header_len_bytes: usize,
    offloads: Offloads,
    batch: Batch,
    sender: Sender,
}

/// A frame and its place in the batch.
struct Incoming {
    frame: Frame,
    index: usize,
    /// The copy of its beginning that the sender's guard looked at.
    shown: ShownAt,
}

/// Who sends, what it sends, and what is at hand to do so.
pub(super) struct Sender {
    switch: Arc<Switch>,
    number: PortNumber,
    pub(super) vlans: Arc<Vlans>,
    /// Addresses that may be learnt of this port.
    share: usize,
    view: Arc<View>,
    storm: Option<StormLimits>,
    /// Receivers' guards have let pass what is sent now.
    is_past_guards: bool,
    frames: Vec<Incoming>,
    /// The receivers' buffers; empty between frames of one receiver and the next.
    buffers: Batch,
    /// What the sender's guard looked at.
    shown: Shown,
    /// The beginning of a frame as it leaves, if it was shown to a guard.
    leaving: Vec<u8>,
    /// When the batch was taken, and when the last of it was delivered.
    began: Instant,
    done: Option<Instant>,
    /// Frames that are finished in software.
    scratch: Vec<u8>,
    segment: Vec<u8>,
}

/// Whole frames, without virtio-net headers, of a batch.
pub(super) trait Bodies {
    fn body(&self, index: usize) -> Body<'_>;
}

/// Frames in a transmit ring's chains.
struct Chains<'a> {
    batch: &'a Batch,
    header_len_bytes: usize,
}

impl Bodies for Chains<'_> {
    #[inline]
    fn body(&self, index: usize) -> Body<'_> {
        Body::Chain {
            chain: self.batch.chain(index),
            skip_bytes: self.header_len_bytes,
        }
    }
}

impl TxQueue {
    pub(super) fn new(port: &Port, nic: &Arc<NicState>, pair: u16, features: u64) -> Self {
        let mut sender = Sender::new(&port.switch, port.number, &port.vlans, GUEST_SHARE);
        sender.storm = Some(StormLimits::new(Instant::now()));
        Self {
            nic: Arc::clone(nic),
            pair,
            polling: port.polling,
            header_len_bytes: header_len_bytes(features),
            offloads: Offloads::to_device(features),
            batch: Batch::new(),
            sender,
        }
    }

    /// Sends the frames of the batch.
    fn send_batch(&mut self) {
        let counters = &self.nic.stats[usize::from(self.pair)].tx.0;
        let bodies = Chains {
            batch: &self.batch,
            header_len_bytes: self.header_len_bytes,
        };
        let guarded = self.nic.guard.is_active().then_some((&self.nic, self.pair));
        let is_link_up = self.nic.is_link_up();
        let (sender, offloads) = (&mut self.sender, self.offloads);
        sender.read(
            self.batch.len(),
            &bodies,
            guarded,
            counters,
            |index, vlans| {
                if !is_link_up {
                    return Err(DropReason::LinkDown);
                }
                let chain = bodies.batch.chain(index);
                Frame::of(chain, bodies.header_len_bytes, offloads, vlans)
            },
        );
        sender.send(&bodies, counters);
    }
}

impl QueueHandler for TxQueue {
    fn process(&mut self, ring: &mut Ring, _wake: Wake) -> Result<(), RingError> {
        let popped = ring.pop_batch(&mut self.batch, BATCH);
        if !self.batch.is_empty() {
            self.send_batch();
            ring.complete_all(&mut self.batch);
        }
        popped.map(|_| ())
    }

    fn polling(&self) -> Polling {
        self.polling
    }
}

impl Destination {
    #[inline]
    fn includes(self, number: PortNumber) -> bool {
        match self {
            Self::Port(port) => port == number,
            Self::Flood => true,
            Self::Nowhere => false,
        }
    }
}

impl Sender {
    pub(super) fn new(
        switch: &Arc<Switch>,
        number: PortNumber,
        vlans: &Arc<Vlans>,
        share: usize,
    ) -> Self {
        Self {
            switch: Arc::clone(switch),
            number,
            vlans: Arc::clone(vlans),
            share,
            view: switch.view(),
            storm: None,
            is_past_guards: false,
            frames: Vec::with_capacity(BATCH),
            buffers: Batch::new(),
            shown: Shown::default(),
            leaving: Vec::new(),
            began: Instant::now(),
            done: None,
            scratch: Vec::new(),
            segment: Vec::new(),
        }
    }

    /// Looks at a batch of `count` frames and finds out where they go. `guarded` is the NIC that sends them,
    /// with a pair of its queues, if its guard is to be asked.
    #[inline]
    pub(super) fn read(
        &mut self,
        count: usize,
        bodies: &impl Bodies,
        guarded: Option<(&Arc<NicState>, u16)>,
        counters: &Direction,
        frame_at: impl Fn(usize, &Vlans) -> Result<Frame, DropReason>,
    ) {
        // Ports may have come and gone.
        if self.view.generation != self.switch.generation() {
            self.view = self.switch.view();
        }
        let now = Instant::now();
        self.began = now;
        self.shown.clear();
        let guarded = guarded.map(|nic| (nic, guard::monotonic_ns()));
        let mut last = None;
        let (mut frames, mut bytes) = (0, 0);
        for index in 0..count {
            let mut shown = ShownAt::default();
            let mut detours = false;
            let checked = frame_at(index, &self.vlans).and_then(|frame| {
                if let Some(((nic, pair), now_ns)) = guarded {
                    let body = bodies.body(index);
                    shown = self.shown.add(&frame, body);
                    let head = self.shown.get(shown);
                    let rest = body.after(head.len());
                    let checksum_at = checksum_at(&frame, 0);
                    match judge(&nic.guard, Way::Egress, head, rest, checksum_at, now_ns) {
                        Judged::Passes => {}
                        Judged::Dropped => return Err(DropReason::Guarded),
                        Judged::Detours(mishap, due_ns) => {
                            detours = true;
                            let onward = Onward::From(self.number, Arc::clone(&self.vlans));
                            let bytes = whole(head, body);
                            detour(
                                &self.switch,
                                frame,
                                bytes,
                                (mishap, due_ns),
                                (nic, pair),
                                onward,
                            );
                            return Err(DropReason::Guarded);
                        }
                    }
                }
                self.route(frame, &mut last, now)
            });
            match checked {
                Ok(frame) => {
                    frames += 1;
                    bytes += u64::from(frame.len_bytes);
                    self.frames.push(Incoming {
                        frame,
                        index,
                        shown,
                    });
                }
                // Counted when it goes on.
                Err(_) if detours => {}
                Err(reason) => counters.count_drop(reason),
            }
        }
        counters.count_many(frames, bytes);
    }

    /// Delivers what was read.
    #[inline]
    pub(super) fn send(&mut self, bodies: &impl Bodies, counters: &Direction) {
        let view = Arc::clone(&self.view);
        self.done = None;
        let floods = |incoming: &Incoming| incoming.frame.destination == Destination::Flood;
        if self.frames.iter().any(floods) {
            for (number, port) in (0..).zip(&view.ports) {
                if let Some(port) = port.as_ref().filter(|_| number != self.number) {
                    self.send_to(number, port, bodies, counters);
                }
            }
        }
        // Usually one port gets all.
        while let Some(Destination::Port(number)) = self
            .frames
            .iter()
            .map(|incoming| incoming.frame.destination)
            .find(|destination| matches!(destination, Destination::Port(_)))
        {
            match view.ports.get(usize::from(number)) {
                Some(Some(port)) if !port.outlets.is_empty() => {
                    self.send_to(number, port, bodies, counters);
                }
                _ => {
                    self.settle(number, |_| counters.count_drop(DropReason::NoPort));
                }
            }
        }
        if let Some(done) = self.done {
            counters.record_latency(done - self.began, self.frames.len() as u64);
        }
        self.frames.clear();
    }

    /// Delivers a frame to a port whose guard has let it pass.
    pub(super) fn send_past_guard(
        &mut self,
        mut frame: Frame,
        number: PortNumber,
        bodies: &impl Bodies,
        counters: &Direction,
    ) {
        frame.destination = Destination::Port(number);
        let shown = ShownAt::default();
        self.frames.push(Incoming {
            frame,
            index: 0,
            shown,
        });
        self.is_past_guards = true;
        self.send(bodies, counters);
        self.is_past_guards = false;
    }

    /// Delivers what goes to one port.
    fn send_to(
        &mut self,
        number: PortNumber,
        port: &ViewPort,
        bodies: &impl Bodies,
        counters: &Direction,
    ) {
        let frames = std::mem::take(&mut self.frames);
        let meant = |incoming: &&Incoming| incoming.frame.destination.includes(number);
        match &port.outlets[..] {
            [] => {}
            [outlet] => {
                let count = frames.iter().filter(meant).count();
                if count > 0 {
                    let meant = frames.iter().filter(meant);
                    self.put_into(outlet, &port.vlans, count, meant, bodies, counters);
                }
            }
            outlets => {
                for (ring, outlet) in outlets.iter().enumerate() {
                    let mine: Vec<&Incoming> = frames
                        .iter()
                        .filter(meant)
                        .filter(|incoming| {
                            let mut start = [0; LOOKED_AT_BYTES];
                            let len = bodies.body(incoming.index).read_at(0, &mut start);
                            flow_hash(&start[..len]) as usize % outlets.len() == ring
                        })
                        .collect();
                    if !mine.is_empty() {
                        let (count, mine) = (mine.len(), mine.into_iter());
                        self.put_into(outlet, &port.vlans, count, mine, bodies, counters);
                    }
                }
            }
        }
        self.frames = frames;
        self.settle(number, |_| ());
    }

    /// What goes to this port alone is done with.
    #[inline]
    fn settle(&mut self, number: PortNumber, mut each: impl FnMut(&Incoming)) {
        for incoming in &mut self.frames {
            if incoming.frame.destination == Destination::Port(number) {
                incoming.frame.destination = Destination::Nowhere;
                each(incoming);
            }
        }
    }

    /// Finds out where a frame goes. `last` is what was found out for the previous one.
    #[inline]
    fn route(
        &mut self,
        mut frame: Frame,
        last: &mut Option<Frame>,
        now: Instant,
    ) -> Result<Frame, DropReason> {
        if let Some(last) = last
            && last.vlan == frame.vlan
            && last.source() == frame.source()
            && last.destination_mac() == frame.destination_mac()
            && matches!(last.destination, Destination::Port(_))
        {
            frame.destination = last.destination;
            return Ok(frame);
        }
        let macs = &self.switch.macs;
        let now_s = self.switch.seconds(now);
        if !macs.learn(
            Key::new(frame.source(), frame.vlan),
            self.number,
            now_s,
            self.share,
        ) {
            return Err(DropReason::TakenAddress);
        }
        let target = frame.destination_mac();
        let storm = match target {
            BROADCAST => Storm::Broadcast,
            [first, ..] if first & 1 != 0 => Storm::Multicast,
            _ => match macs.port_of(Key::new(target, frame.vlan), now_s) {
                Some(number) if number == self.number => return Err(DropReason::NoPort),
                Some(number) => {
                    frame.destination = Destination::Port(number);
                    *last = Some(frame);
                    return Ok(frame);
                }
                None => Storm::UnknownUnicast,
            },
        };
        if let Some(limits) = &mut self.storm
            && !limits.admit(storm, now)
        {
            return Err(DropReason::Storm);
        }
        frame.destination = Destination::Flood;
        Ok(frame)
    }

    /// Puts frames into one ring, or sends them out.
    #[inline]
    fn put_into<'f>(
        &mut self,
        outlet: &Outlet,
        vlans: &Vlans,
        expected: usize,
        mut frames: impl Iterator<Item = &'f Incoming>,
        bodies: &impl Bodies,
        sent: &Direction,
    ) {
        let receiver = match outlet {
            Outlet::Ring(receiver) => receiver,
            Outlet::Uplink(uplink) => {
                self.put_out(uplink, vlans, frames, bodies, sent);
                self.done = Some(Instant::now());
                return;
            }
        };
        let counters = receiver.counters();
        let drop_all = |frames: &mut dyn Iterator<Item = &'f Incoming>, reason| {
            frames.for_each(|_| counters.count_drop(reason));
        };
        if !receiver.nic.is_link_up() {
            drop_all(&mut frames, DropReason::LinkDown);
            return;
        }
        let Some(mut ring) = receiver.ring.lock() else {
            drop_all(&mut frames, DropReason::NoBuffers);
            return;
        };
        let filter = receiver.filter();
        let asks_guard = receiver.nic.guard.is_active() && !self.is_past_guards;
        let guarded_at_ns = asks_guard.then(guard::monotonic_ns);
        let mut delivery = Delivery::begin(receiver, &mut ring, &mut self.buffers, expected);
        for incoming in frames {
            let frame = &incoming.frame;
            let Some(egress) = vlans.egress(frame.vlan, frame.looks_tagged()) else {
                if frame.destination != Destination::Flood {
                    sent.count_drop(DropReason::Vlan);
                }
                continue;
            };
            let (head, head_len) = frame.head_for(egress);
            if filter.as_ref().is_some_and(|filter| !filter.accepts(&head)) {
                counters.count_drop(DropReason::Unwanted);
                continue;
            }
            let shift = head_len as isize - frame.head_len_bytes() as isize;
            let (mut head, mut body) = (
                &head[..head_len],
                bodies.body(incoming.index).after(frame.head_len_bytes()),
            );
            if guarded_at_ns.is_some() || !incoming.shown.is_empty() {
                self.leaving.clear();
                self.leaving.extend_from_slice(head);
                if incoming.shown.is_empty() {
                    append_beginning(&mut self.leaving, body);
                } else {
                    let shown = self
                        .shown
                        .after_head(incoming.shown, frame.head_len_bytes());
                    self.leaving.extend_from_slice(shown);
                }
                body = body.after(self.leaving.len() - head_len);
                head = &self.leaving;
                let guard = &receiver.nic.guard;
                let judged = guarded_at_ns.map(|now_ns| {
                    let checksum_at = checksum_at(frame, shift);
                    judge(guard, Way::Ingress, head, body, checksum_at, now_ns)
                });
                match judged {
                    None | Some(Judged::Passes) => {}
                    Some(Judged::Dropped) => {
                        counters.count_drop(DropReason::Guarded);
                        continue;
                    }
                    Some(Judged::Detours(mishap, due_ns)) => {
                        let shown = self.shown.get(incoming.shown);
                        let bytes = whole(shown, bodies.body(incoming.index));
                        let to = (&receiver.nic, receiver.pair);
                        let onward = Onward::To(receiver.number, Arc::clone(&self.vlans));
                        detour(&self.switch, *frame, bytes, (mishap, due_ns), to, onward);
                        continue;
                    }
                }
            }
            let put = match &frame.header {
                None => delivery.put(None, head, body),
                Some(header) => {
                    let (scratch, segment) = (&mut self.scratch, &mut self.segment);
                    put_unfinished(
                        &mut delivery,
                        receiver,
                        header,
                        shift,
                        head,
                        body,
                        scratch,
                        segment,
                    )
                }
            };
            if let Err(reason) = put {
                counters.count_drop(reason);
            }
        }
        let delivered = delivery.end();
        let done = Instant::now();
        // While the ring is locked nobody else does.
        counters.record_latency(done - self.began, delivered.packets);
        drop(ring);
        self.done = Some(done);
        counters.count_many(delivered.packets, delivered.bytes);
        if let Some(error) = delivered.error {
            receiver.ring.report(error);
        }
    }

    /// Sends frames out by an uplink, which finishes what is left to be.
    fn put_out<'f>(
        &self,
        uplink: &Uplink,
        vlans: &Vlans,
        frames: impl Iterator<Item = &'f Incoming>,
        bodies: &impl Bodies,
        sent: &Direction,
    ) {
        for incoming in frames {
            let frame = &incoming.frame;
            let Some(egress) = vlans.egress(frame.vlan, frame.looks_tagged()) else {
                if frame.destination != Destination::Flood {
                    sent.count_drop(DropReason::Vlan);
                }
                continue;
            };
            let (head, head_len) = frame.head_for(egress);
            let head_len_in = frame.head_len_bytes();
            let shown = self.shown.after_head(incoming.shown, head_len_in);
            let body = bodies.body(incoming.index);
            let body = body.after(head_len_in + shown.len());
            let shift = head_len as isize - head_len_in as isize;
            let len_bytes = head_len + shown.len() + body.len();
            let header = match &frame.header {
                None => Some(Header::empty()),
                Some(header) => offload::shifted(header, shift, len_bytes),
            };
            let put = header
                .ok_or(DropReason::Malformed)
                .and_then(|header| uplink.send(&header, [&head[..head_len], shown], body));
            if let Err(reason) = put {
                sent.count_drop(reason);
            }
        }
    }
}

/// A frame that leaves something to be finished: by the receiver's driver if it can, else here.
#[expect(
    clippy::too_many_arguments,
    reason = "all of a frame, and storage to finish it in"
)]
fn put_unfinished(
    delivery: &mut Delivery<'_>,
    receiver: &RingReceiver,
    header: &Header,
    shift: isize,
    head: &[u8],
    body: Body<'_>,
    scratch: &mut Vec<u8>,
    segment: &mut Vec<u8>,
) -> Result<(), DropReason> {
    let frame_len_bytes = head.len() + body.len();
    let header = offload::shifted(header, shift, frame_len_bytes).ok_or(DropReason::Malformed)?;
    if let Ok(header) = Header::checked(header.as_bytes(), frame_len_bytes, receiver.offloads) {
        return delivery.put(Some(&header), head, body);
    }
    scratch.clear();
    scratch.extend_from_slice(head);
    body.copy_into(scratch);
    offload::finish(&header, scratch, segment, |frame| {
        let (head, rest) = frame.split_at(frame.len().min(super::frame::ETHERNET_LEN_BYTES));
        delivery.put(None, head, Body::Own(rest))
    })
}
