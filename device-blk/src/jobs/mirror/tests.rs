//! A target that hangs at the worst moment.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Instant;

use super::*;
use crate::engine::backend::ServeOptions;
use crate::image::{Access, DirectIo, OpenOptions, Place, RawImage, Task};
use crate::jobs::{Jobs, StartError, Work};

const CAPACITY_BYTES: u64 = 1 << 20;
const DEADLINE: Duration = Duration::from_secs(20);

/// Takes writes until it hangs, and hangs until it is abandoned.
#[derive(Debug, Default)]
struct Stuck {
    hangs: AtomicBool,
    hung: AtomicUsize,
    is_abandoned: Mutex<bool>,
    abandoned: Condvar,
}

impl Image for Stuck {
    fn name(&self) -> &str {
        "stuck"
    }

    fn format(&self) -> &'static str {
        "nbd"
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn capacity_sectors(&self) -> u64 {
        CAPACITY_BYTES / SECTOR_BYTES
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
        if !self.hangs.load(Ordering::Acquire) {
            return Ok(());
        }
        self.hung.fetch_add(1, Ordering::AcqRel);
        let is_abandoned = self.is_abandoned.lock().unwrap();
        drop(
            self.abandoned
                .wait_while(is_abandoned, |is_abandoned| !*is_abandoned)
                .unwrap(),
        );
        Err(libc::ESHUTDOWN)
    }

    fn abandon(&self) {
        *self.is_abandoned.lock().unwrap() = true;
        self.abandoned.notify_all();
    }
}

struct Rig {
    backend: Arc<Backend>,
    tracker: Arc<Tracker>,
    target: Arc<Stuck>,
    jobs: Jobs,
}

impl Rig {
    fn new() -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(CAPACITY_BYTES).unwrap();
        let options = OpenOptions {
            read_only: false,
            page_cache: true,
            block_bytes: 512,
            lock_patience: Duration::ZERO,
        };
        let source = RawImage::from_file(file, "source".into(), options).unwrap();
        Self {
            backend: Arc::new(Backend::new(Arc::new(source), ServeOptions::default())),
            tracker: Arc::default(),
            target: Arc::default(),
            jobs: Jobs::default(),
        }
    }

    fn start(&self) -> Arc<Control> {
        let mirror = Mirror {
            backend: Arc::clone(&self.backend),
            tracker: Arc::clone(&self.tracker),
            target: Arc::clone(&self.target) as Arc<dyn Image>,
            fresh: Fresh::Unknown,
            initial: None,
            auto_complete: false,
            bytes_per_second: 0,
        };
        let work =
            || Ok::<_, StartError>(Box::new(|control: &Control| mirror.run(control)) as Work);
        self.jobs.start("m", "mirror", work).unwrap()
    }
}

fn await_true(what: &str, mut condition: impl FnMut() -> bool) {
    let give_up = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < give_up, "not within {DEADLINE:?}: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn target_that_hangs_at_the_switch_keeps_the_guest_for_a_bounded_time() {
    let rig = Rig::new();
    let job = rig.start();
    await_true("the job is ready", || {
        job.state() == api::device::JobState::Ready
    });
    // As if after the last look at the target, before the gate.
    let due = Arc::new(Bitmap::new(CAPACITY_BYTES, UNIT_BYTES as u32));
    due.fill();
    let rest = Rest {
        due,
        source: rig.backend.image(),
        target: rig.target.clone(),
        capacity_bytes: CAPACITY_BYTES,
        fresh: Fresh::Unknown,
        backend: Arc::clone(&rig.backend),
    };
    rig.target.hangs.store(true, Ordering::Release);
    let began = Instant::now();
    let refused = rig
        .backend
        .quiesced(DEADLINE, |_| rest.copy_within(REST_PATIENCE))
        .unwrap();
    assert!(began.elapsed() < DEADLINE, "{:?}", began.elapsed());
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("stays where it was"), "{error}");
    assert_eq!(rig.backend.image().name(), "source");
    assert!(rig.jobs.end(Instant::now() + DEADLINE));
}

#[test]
fn job_whose_target_hangs_is_cancelled() {
    let rig = Rig::new();
    rig.target.hangs.store(true, Ordering::Release);
    let job = rig.start();
    await_true("the target hangs", || {
        rig.target.hung.load(Ordering::Acquire) > 0
    });
    rig.jobs.cancel(&job, Instant::now() + DEADLINE);
    assert!(job.is_over(), "it waits for its target");
    assert!(*rig.target.is_abandoned.lock().unwrap());
}

/// The disk must not lose what it is served from.
#[test]
fn target_that_became_the_disk_is_not_abandoned() {
    let rig = Rig::new();
    let job = rig.start();
    await_true("the job completes", || job.complete() && job.is_over());
    assert_eq!(rig.backend.image().name(), "stuck");
    rig.jobs.cancel(&job, Instant::now() + DEADLINE);
    assert!(rig.jobs.end(Instant::now() + DEADLINE));
    assert!(!*rig.target.is_abandoned.lock().unwrap());
}
