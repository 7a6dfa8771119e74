//! Whether a daemon that is there also gets on: one that hangs is killed, and started again like one that died.
//!
//! | what is seen | means |
//! |---|---|
//! | its control socket does not answer | hung |
//! | requests are due, the thread of their queue does not answer | hung |
//! | requests are due, none completes, and the daemon has none | hung |
//! | requests are due, none completes, the daemon has them and its threads answer | the storage is slow |
//!
//! How far rings are is read by `vmm-core` from guest memory, which costs the daemon nothing; it is only asked
//! now and then, and when a ring stands still.
//!
//! Others' daemons have no control socket to ask. passt, which this agent starts, is killed when it takes
//! nothing of what the guest sends. A daemon of a third party is not ours to kill, and may have slow storage:
//! since when its requests wait is told, and no more.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use api::{
    device::Device,
    vmm::{DeviceHealth, QueueProgress},
};
use nix::sys::signal::Signal;

use super::{
    error_chain,
    incarnation::Incarnation,
    machine::{Daemon, Machine},
};

/// A daemon whose rings move is only asked this often whether it is there.
const ASK_INTERVAL: Duration = Duration::from_secs(5);
/// The machine's other work must not wait longer for a daemon's answer.
const ANSWER_WITHIN: Duration = Duration::from_millis(500);
/// Rings that stand still without any other sign have this many times as long: a disk may be held for a
/// snapshot meanwhile.
const RING_PATIENCE_FACTOR: u32 = 3;

/// What was seen of a daemon so far.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    asked: Option<Instant>,
    /// It has not answered since.
    silent_since: Option<Instant>,
    /// Rings with requests that are due, by device and queue.
    due: BTreeMap<(String, u32), Due>,
    /// Devices whose requests wait for storage, and since when.
    storage_waits: BTreeMap<String, Instant>,
}

/// A ring that owes completions.
#[derive(Clone, Copy, Debug)]
struct Due {
    used_idx: u32,
    since: Instant,
}

impl Watch {
    /// How long requests of a device have waited for storage.
    pub(super) fn storage_wait(&self, device: &str) -> Option<Duration> {
        self.storage_waits.get(device).map(Instant::elapsed)
    }

    /// Takes in how far the rings of a device are.
    fn note_rings(&mut self, device: &DeviceHealth, now: Instant) {
        let completes_all = device.r#type == "blk";
        for queue in &device.queues {
            let key = (device.tag.clone(), queue.index);
            if queue.due == 0 || !(completes_all || is_for_sending(queue)) {
                self.due.remove(&key);
                continue;
            }
            let seen = self.due.entry(key).or_insert(Due {
                used_idx: queue.used_idx,
                since: now,
            });
            if seen.used_idx != queue.used_idx {
                *seen = Due {
                    used_idx: queue.used_idx,
                    since: now,
                };
            }
        }
        if self.stillness(&device.tag, now).is_zero() {
            self.storage_waits.remove(&device.tag);
        }
    }

    /// Rings that are stopped owe nothing.
    fn rest(&mut self) {
        self.due.clear();
        self.storage_waits.clear();
    }

    /// Nothing that was seen before holds for another process.
    fn forget(&mut self) {
        *self = Self::default();
    }

    /// How long the ring has stood still that has done so for longest.
    fn stillness(&self, device: &str, now: Instant) -> Duration {
        self.due
            .iter()
            .filter(|((name, _), _)| name == device)
            .map(|(_, due)| now.duration_since(due.since))
            .max()
            .unwrap_or_default()
    }

    fn must_ask(&self, now: Instant) -> bool {
        let is_time = self
            .asked
            .is_none_or(|asked| now.duration_since(asked) >= ASK_INTERVAL);
        let stands_still = self.due.values().any(|due| due.since < now);
        is_time || stands_still || self.silent_since.is_some()
    }

    /// As [`Watch::judge`], of a daemon that cannot be asked, and whose storage is never slow.
    fn judge_by_rings(&self, device: &str, patience: Duration, now: Instant) -> Result<(), String> {
        let still = self.stillness(device, now);
        match still >= patience * RING_PATIENCE_FACTOR {
            true => Err(format!(
                "requests of {device} have been due for {still:.1?}, and it does nothing about them"
            )),
            false => Ok(()),
        }
    }

    /// Of a daemon that cannot be asked: its storage may be slow.
    fn note_wait(&mut self, device: &str, patience: Duration, now: Instant) {
        let still = self.stillness(device, now);
        if still >= patience {
            self.storage_waits.insert(device.to_owned(), now - still);
        }
    }

    /// What a daemon's answer, if there was one, says: `Err` with the reason when it hangs.
    pub(crate) fn judge(
        &mut self,
        answer: Option<&[Device]>,
        patience: Duration,
        now: Instant,
    ) -> Result<(), String> {
        self.asked = Some(now);
        let Some(devices) = answer else {
            let since = *self.silent_since.get_or_insert(now);
            let silent = now.duration_since(since);
            return match silent >= patience {
                true => Err(format!(
                    "its control socket has not answered for {silent:.1?}"
                )),
                false => Ok(()),
            };
        };
        self.silent_since = None;
        self.storage_waits.clear();
        for device in devices {
            let unresponsive = |patience: Duration| {
                let queues = device.queues.iter();
                let mut stuck =
                    queues.filter(|queue| queue.unresponsive_ms >= patience.as_millis() as u64);
                stuck.next()
            };
            if let Some(queue) = unresponsive(patience) {
                return Err(format!(
                    "the thread of queue {} of {} has not answered for {} ms",
                    queue.index, device.id, queue.unresponsive_ms
                ));
            }
            let still = self.stillness(&device.id, now);
            if still.is_zero() || device.r#type != "blk" {
                continue;
            }
            if device.inflight > 0 {
                self.storage_waits.insert(device.id.clone(), now - still);
            } else if still >= patience * RING_PATIENCE_FACTOR {
                return Err(format!(
                    "requests of {} have been due for {still:.1?}, and it does nothing about them",
                    device.id
                ));
            }
        }
        Ok(())
    }
}

/// Of a NIC: what the guest sends is due at once, buffers for what it receives are not. Transmit queues have
/// odd numbers (Virtio 1.2 section 5.1.2).
fn is_for_sending(queue: &QueueProgress) -> bool {
    queue.index % 2 == 1
}

impl Machine {
    /// Looks whether the daemons get on, and kills those that do not; their ends are noticed as any are.
    /// `foreign` are the devices of third parties.
    pub(super) async fn watch_daemons(
        &mut self,
        patience: Duration,
        foreign: impl Iterator<Item = &str>,
    ) {
        for name in foreign {
            let now = Instant::now();
            match self.health.device(name) {
                Some(device) if !self.health.paused => {
                    self.foreign.note_rings(device, now);
                    self.foreign.note_wait(name, patience, now);
                }
                Some(_) => self.foreign.rest(),
                None => {}
            }
        }
        for daemon in &mut self.daemons {
            if daemon.process.is_none() || daemon.upgrade.is_some() {
                daemon.watch.forget();
                continue;
            }
            let now = Instant::now();
            for plan in &daemon.plan.devices {
                match self.health.device(&plan.name) {
                    Some(device) if !self.health.paused => daemon.watch.note_rings(device, now),
                    Some(_) => daemon.watch.rest(),
                    None => {}
                }
            }
            let judged = if daemon.plan.can_stand_by() {
                if !daemon.watch.must_ask(now) {
                    continue;
                }
                let answer = ask(daemon).await;
                daemon
                    .watch
                    .judge(answer.as_deref(), patience, Instant::now())
            } else {
                let mut devices = daemon.plan.devices.iter();
                devices
                    .try_for_each(|device| daemon.watch.judge_by_rings(&device.name, patience, now))
            };
            if let (Err(reason), Some(process)) = (judged, &daemon.process) {
                tracing::warn!(
                    dir = %self.dir.display(),
                    pid = process.pid(),
                    "{} hangs: {reason}; killing it",
                    daemon.plan.kind.program()
                );
                process.signal(Signal::SIGKILL);
                daemon.hangs += 1;
                daemon.killed = Some(format!("hung and was killed: {reason}"));
                daemon.watch.forget();
            }
        }
    }
}

async fn ask(daemon: &Daemon) -> Option<Vec<Device>> {
    let asking = async {
        let incarnation = Incarnation::usual(&daemon.plan, ANSWER_WITHIN).await?;
        incarnation.devices(ANSWER_WITHIN).await
    };
    match tokio::time::timeout(ANSWER_WITHIN, asking).await {
        Ok(Ok(devices)) => Some(devices),
        Ok(Err(error)) => {
            tracing::debug!("{}", error_chain(&error));
            None
        }
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use api::device::QueueHealth;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn disk(due: u32, used_idx: u32) -> DeviceHealth {
        rings("blk", 0, due, used_idx)
    }

    fn rings(kind: &str, index: u32, due: u32, used_idx: u32) -> DeviceHealth {
        DeviceHealth {
            tag: "root".into(),
            r#type: kind.into(),
            queues: vec![QueueProgress {
                index,
                used_idx,
                due,
                ..QueueProgress::default()
            }],
            ..DeviceHealth::default()
        }
    }

    fn says(inflight: u64, unresponsive_ms: u64) -> Vec<Device> {
        vec![Device {
            id: "root".into(),
            r#type: "blk".into(),
            inflight,
            queues: vec![QueueHealth {
                unresponsive_ms,
                ..QueueHealth::default()
            }],
            ..Device::default()
        }]
    }

    #[test]
    fn silence_is_a_hang_only_after_the_whole_patience() {
        let (mut watch, start) = (Watch::default(), Instant::now());
        assert_eq!(watch.judge(None, PATIENCE, start), Ok(()));
        let almost = start + PATIENCE - Duration::from_millis(1);
        assert_eq!(watch.judge(None, PATIENCE, almost), Ok(()));
        // An answer begins it anew.
        assert_eq!(watch.judge(Some(&[]), PATIENCE, almost), Ok(()));
        assert_eq!(watch.judge(None, PATIENCE, start + PATIENCE), Ok(()));
        let late = start + PATIENCE * 2;
        assert!(watch.judge(None, PATIENCE, late).is_err());
    }

    #[test]
    fn stuck_thread_is_a_hang_and_slow_storage_is_not() {
        let (mut watch, start) = (Watch::default(), Instant::now());
        watch.note_rings(&disk(3, 7), start);
        let hours = start + Duration::from_secs(7200);
        watch.note_rings(&disk(3, 7), hours);
        assert!(watch.must_ask(hours));
        assert_eq!(watch.judge(Some(&says(3, 0)), PATIENCE, hours), Ok(()));
        assert!(watch.storage_wait("root").is_some());
        assert!(
            watch
                .judge(Some(&says(3, 10_001)), PATIENCE, hours)
                .is_err()
        );
        watch.note_rings(&disk(3, 8), hours);
        assert_eq!(watch.storage_wait("root"), None, "it moves again");
    }

    #[test]
    fn due_requests_that_the_daemon_knows_nothing_of_are_a_hang() {
        let (mut watch, start) = (Watch::default(), Instant::now());
        watch.note_rings(&disk(1, 7), start);
        let soon = start + PATIENCE;
        assert_eq!(watch.judge(Some(&says(0, 0)), PATIENCE, soon), Ok(()));
        let late = start + PATIENCE * RING_PATIENCE_FACTOR;
        assert!(watch.judge(Some(&says(0, 0)), PATIENCE, late).is_err());
    }

    #[test]
    fn daemon_that_cannot_be_asked_is_judged_by_its_rings_alone() {
        let (mut watch, start) = (Watch::default(), Instant::now());
        watch.note_rings(&rings("net", 1, 3, 7), start);
        let soon = start + PATIENCE;
        assert_eq!(watch.judge_by_rings("root", PATIENCE, soon), Ok(()));
        watch.note_wait("root", PATIENCE, start + PATIENCE / 2);
        assert_eq!(watch.storage_wait("root"), None);
        watch.note_wait("root", PATIENCE, soon);
        assert!(watch.storage_wait("root").is_some(), "it is told");
        let late = start + PATIENCE * RING_PATIENCE_FACTOR;
        assert!(watch.judge_by_rings("root", PATIENCE, late).is_err());
        watch.rest();
        assert_eq!(watch.judge_by_rings("root", PATIENCE, late), Ok(()));
        assert_eq!(watch.storage_wait("root"), None);
    }

    #[test]
    fn receive_buffers_of_a_quiet_nic_are_not_due() {
        let (mut watch, start) = (Watch::default(), Instant::now());
        watch.judge(Some(&[]), PATIENCE, start).unwrap();
        let later = start + Duration::from_secs(2);
        for index in [0, 2] {
            watch.note_rings(&rings("net", index, 256, 5), start);
            watch.note_rings(&rings("net", index, 256, 5), later);
        }
        assert!(!watch.must_ask(later));
        watch.note_rings(&rings("net", 1, 1, 5), start);
        assert!(watch.must_ask(later));
    }
}
