//! Requests that somebody else has, another host or a thread: lost, away, and left behind by their
//! queue.

use std::sync::{Condvar, Mutex};

use super::*;
use crate::image::{DirectIo, Executor, Image, PendingTask, Place, Task};

/// A disk on a host that does not answer.
#[derive(Debug, Default)]
struct Away {
    waiting: Waiting,
    /// Tasks that are handed over are lost.
    loses: bool,
    /// The host has nothing of what waits: it can be taken back.
    is_out: bool,
}

#[derive(Default)]
struct Waiting(Mutex<Vec<Box<dyn PendingTask>>>);

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Waiting")
    }
}

impl Away {
    /// The host is back.
    fn answer_all(&self) {
        for task in self.waiting.0.lock().unwrap().drain(..) {
            task.complete(Ok(()));
        }
    }

    fn num_waiting(&self) -> usize {
        self.waiting.0.lock().unwrap().len()
    }
}

impl Image for Away {
    fn name(&self) -> &str {
        "away"
    }

    fn format(&self) -> &'static str {
        "nbd"
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn capacity_sectors(&self) -> u64 {
        CAPACITY_SECTORS
    }

    fn physical_block_bytes(&self) -> u32 {
        512
    }

    fn punches_holes(&self) -> bool {
        false
    }

    fn direct(&self) -> Option<DirectIo> {
        None
    }

    fn locate(&self, _: Access, _: u64, len_bytes: u64) -> Place {
        Place::Worker { len_bytes }
    }

    fn perform(&self, _: &mut Task<'_>) -> Result<(), i32> {
        unreachable!("tasks are handed over")
    }

    fn executor(&self) -> Option<&dyn Executor> {
        Some(self)
    }
}

impl Executor for Away {
    fn begin(&self, pending: Box<dyn PendingTask>) {
        if !self.loses {
            self.waiting.0.lock().unwrap().push(pending);
        }
    }

    fn release_abandoned(&self) {
        if !self.is_out {
            return;
        }
        let mut waiting = self.waiting.0.lock().unwrap();
        for task in waiting.extract_if(.., |task| task.is_abandoned()) {
            task.complete(Err(libc::ECANCELED));
        }
    }
}

fn rig_away(away: Away) -> (Rig, Arc<Away>) {
    let away = Arc::new(away);
    let backend = Backend::new(away.clone(), ServeOptions::default());
    let file = tempfile::NamedTempFile::new().unwrap();
    (rig_of(Arc::new(backend), CacheMode::WriteBack, file), away)
}

/// Ends the queue with its requests under way, as the end of a session does.
fn leave(rig: &mut Rig) {
    let backend = Arc::clone(&rig.queue.backend);
    let stats = Arc::clone(&rig.stats);
    let fresh = BlkQueue::new(backend, CacheMode::WriteBack, stats).unwrap();
    drop(std::mem::replace(&mut rig.queue, fresh));
}

#[test]
fn task_that_is_lost_is_answered_with_an_error() {
    let (mut rig, _away) = rig_away(Away {
        loses: true,
        ..Away::default()
    });
    for slot in 0..4 {
        rig.offer_write(slot, 1);
    }
    rig.complete_all();
    for slot in 0..4 {
        assert_eq!(rig.status(slot), Status::IoErr as u8, "{slot}");
    }
}

#[test]
fn what_the_host_does_not_have_ends_with_the_queue() {
    let (mut rig, away) = rig_away(Away {
        is_out: true,
        ..Away::default()
    });
    for slot in 0..4 {
        rig.offer_write(slot, 1);
    }
    rig.queue.process(&mut rig.ring, Wake::Kick).unwrap();
    assert_eq!(away.num_waiting(), 4);
    leave(&mut rig);
    assert_eq!(away.num_waiting(), 0, "it would be carried out later");
    assert!(!rig.queue.backend.has_ghosts());
    assert_eq!(rig.status(0), NO_STATUS, "the next session does it again");
}

#[test]
fn disk_is_used_again_when_what_the_host_has_has_ended() {
    let (mut rig, away) = rig_away(Away::default());
    for slot in 0..4 {
        rig.offer_write(slot, 1);
    }
    rig.queue.process(&mut rig.ring, Wake::Kick).unwrap();
    leave(&mut rig);
    assert!(rig.queue.backend.has_ghosts(), "the host may still write");
    away.answer_all();
    assert!(!rig.queue.backend.has_ghosts(), "nothing runs any more");
    assert_eq!(rig.status(0), NO_STATUS);
}

/// Takes no writes until it is told to.
#[derive(Debug, Default)]
struct TakesNoWrites {
    takes: Mutex<bool>,
    changed: Condvar,
}

impl Image for TakesNoWrites {
    fn name(&self) -> &str {
        "takes no writes"
    }

    fn format(&self) -> &'static str {
        "raw"
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn capacity_sectors(&self) -> u64 {
        CAPACITY_SECTORS
    }

    fn physical_block_bytes(&self) -> u32 {
        512
    }

    fn punches_holes(&self) -> bool {
        false
    }

    fn direct(&self) -> Option<DirectIo> {
        None
    }

    fn locate(&self, _: Access, _: u64, len_bytes: u64) -> Place {
        Place::Worker { len_bytes }
    }

    fn perform(&self, task: &mut Task<'_>) -> Result<(), i32> {
        if !matches!(task, Task::Read { .. }) {
            let takes = self.takes.lock().unwrap();
            drop(self.changed.wait_while(takes, |takes| !*takes).unwrap());
        }
        Ok(())
    }
}

#[test]
fn reads_do_not_wait_for_threads_that_wait_for_writes() {
    const WRITES: u64 = 20;
    let image = Arc::<TakesNoWrites>::default();
    let backend = Backend::new(image.clone(), ServeOptions::default());
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut rig = rig_of(Arc::new(backend), CacheMode::WriteBack, file);
    for slot in 0..WRITES {
        rig.offer_write(slot, 1);
    }
    rig.offer_read(WRITES, 0, 512);
    let deadline = Instant::now() + Duration::from_secs(20);
    while rig.status(WRITES) == NO_STATUS && Instant::now() < deadline {
        rig.queue.process(&mut rig.ring, Wake::Event(0)).unwrap();
    }
    let status = rig.status(WRITES);
    *image.takes.lock().unwrap() = true;
    image.changed.notify_all();
    rig.complete_all();
    assert_eq!(status, 0, "the read waited");
    for slot in 0..WRITES {
        assert_eq!(rig.status(slot), 0, "write {slot}");
    }
}
