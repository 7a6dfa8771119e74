//! Long work on a disk that is served meanwhile, each job on a thread of its own.
//!
//! ```text
//!            start            ready            CompleteJob
//!   (none) ───────► RUNNING ────────► READY ──────────────► DONE
//!                      │                │
//!                      ├── error ───────┴─► FAILED
//!                      └── CancelJob ─────► CANCELLED     over: kept until it is forgotten
//! ```
//!
//! A disk has one job at a time, so that no two of them exchange its image. A job that fails or is
//! cancelled leaves the disk as it was.
//!
//! - [`mirror`]: copies the disk and switches over to the copy; a commit is a mirror onto the
//!   backing image;
//! - [`backup`]: copies the disk as it was at one instant;
//! - [`copy`]: blocks from one image to another;
//! - [`guarded`]: an image whose blocks are saved before they are overwritten;
//! - [`target`]: what a job writes to.

pub(crate) mod backup;
pub(crate) mod copy;
pub(crate) mod guarded;
pub(crate) mod mirror;
pub(crate) mod target;

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use api::device::{CheckResult, Job, JobState};

use crate::image::Image;

/// Jobs that are over and can still be asked about.
const MAX_OVER: usize = 16;

/// How a job ended without success.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JobError {
    /// It was told to.
    #[error("cancelled")]
    Cancelled,
    /// In words for people.
    #[error("{0}")]
    Failed(String),
}

/// Why a job did not begin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// One at a time.
    #[error("the disk is busy with {kind} {job_id:?}; wait for its end or cancel it")]
    Busy {
        /// What runs.
        kind: &'static str,
        /// Its id.
        job_id: String,
    },
    /// The id is that of a job that is over.
    #[error("there was a job {job_id:?}; choose another id, or forget that one with CancelJob")]
    Taken {
        /// The id.
        job_id: String,
    },
    /// The disk is going away.
    #[error("the disk is being detached")]
    Ending,
    /// No thread to be had.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// The jobs of one disk.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: Option<Running>,
    /// Oldest first.
    over: VecDeque<Arc<Control>>,
    is_ending: bool,
}

#[derive(Debug)]
struct Running {
    control: Arc<Control>,
    thread: JoinHandle<()>,
}

/// What a job does. It looks at its [`Control`] between blocks.
pub(crate) type Work = Box<dyn FnOnce(&Control) -> Result<(), JobError> + Send>;

impl Jobs {
    /// Runs what `prepare` makes on a thread of its own. `prepare` is called only if the job can
    /// begin, and blocks others from it.
    ///
    /// # Errors
    /// Another job runs, the id is taken, or `prepare` says so.
    pub(crate) fn start<E: From<StartError>>(
        &self,
        job_id: &str,
        kind: &'static str,
        prepare: impl FnOnce() -> Result<Work, E>,
    ) -> Result<Arc<Control>, E> {
        let mut state = self.state();
        state.reap();
        state.check_free(Some(job_id))?;
        let work = prepare()?;
        let control = Arc::new(Control::new(job_id, kind));
        let of_thread = Arc::clone(&control);
        let thread = thread::Builder::new()
            .name(format!(
                "job/{}",
                job_id.chars().take(11).collect::<String>()
            ))
            .spawn(move || of_thread.run(work))
            .map_err(StartError::Thread)?;
        state.running = Some(Running {
            control: Arc::clone(&control),
            thread,
        });
        Ok(control)
    }

    /// Does `work` at once, while no job runs and none can begin.
    ///
    /// # Errors
    /// A job runs.
    pub(crate) fn exclude<T>(&self, work: impl FnOnce() -> T) -> Result<T, StartError> {
        let mut state = self.state();
        state.reap();
        state.check_free(None)?;
        Ok(work())
    }

    pub(crate) fn find(&self, job_id: &str) -> Option<Arc<Control>> {
        self.all().into_iter().find(|job| job.job_id == job_id)
    }

    pub(crate) fn all(&self) -> Vec<Arc<Control>> {
        let mut state = self.state();
        state.reap();
        let running = state.running.as_ref().map(|job| Arc::clone(&job.control));
        state.over.iter().cloned().chain(running).collect()
    }

    /// Ends a job and waits for that until `deadline`; one that is over is forgotten.
    pub(crate) fn cancel(&self, control: &Arc<Control>, deadline: Instant) {
        if control.is_over() {
            self.state().over.retain(|job| !Arc::ptr_eq(job, control));
            return;
        }
        control.cancel();
        control.await_end(deadline);
    }

    /// Ends all jobs for good; false when one did not end by `deadline`.
    pub(crate) fn end(&self, deadline: Instant) -> bool {
        let running = {
            let mut state = self.state();
            state.is_ending = true;
            state.running.as_ref().map(|job| Arc::clone(&job.control))
        };
        match running {
            Some(control) => {
                control.cancel();
                control.await_end(deadline)
            }
            None => true,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Moves a job that is over.
    fn reap(&mut self) {
        if !self
            .running
            .as_ref()
            .is_some_and(|job| job.control.is_over())
        {
            return;
        }
        if let Some(Running { control, thread }) = self.running.take() {
            // It has said its last word.
            let _ = thread.join();
            self.over.push_back(control);
            if self.over.len() > MAX_OVER {
                self.over.pop_front();
            }
        }
    }

    fn check_free(&self, job_id: Option<&str>) -> Result<(), StartError> {
        if self.is_ending {
            return Err(StartError::Ending);
        }
        if let Some(Running { control, .. }) = &self.running {
            return Err(StartError::Busy {
                kind: control.kind,
                job_id: control.job_id.clone(),
            });
        }
        match job_id {
            Some(job_id) if self.over.iter().any(|job| job.job_id == job_id) => {
                Err(StartError::Taken {
                    job_id: job_id.to_owned(),
                })
            }
            _ => Ok(()),
        }
    }
}

/// What a job and those who ask about it share.
#[derive(Debug)]
pub(crate) struct Control {
    job_id: String,
    kind: &'static str,
    phase: Mutex<Phase>,
    changed: Condvar,
    is_cancelled: AtomicBool,
    /// What the job writes to, while nobody else needs it: see [`Control::lend`].
    target: Mutex<Option<Arc<dyn Image>>>,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

#[derive(Debug)]
struct Phase {
    state: JobState,
    /// CompleteJob was called.
    completes: bool,
    error: String,
    check: Option<CheckResult>,
}

impl Control {
    fn new(job_id: &str, kind: &'static str) -> Self {
        Self {
            job_id: job_id.to_owned(),
            kind,
            phase: Mutex::new(Phase {
                state: JobState::Running,
                completes: false,
                error: String::new(),
                check: None,
            }),
            changed: Condvar::new(),
            is_cancelled: AtomicBool::new(false),
            target: Mutex::default(),
            done_bytes: AtomicU64::new(0),
            total_bytes: AtomicU64::new(0),
        }
    }

    /// How it goes; `id` is left to the caller.
    pub(crate) fn describe(&self) -> Job {
        let phase = self.phase();
        Job {
            job_id: self.job_id.clone(),
            id: String::new(),
            kind: self.kind.to_owned(),
            state: phase.state as i32,
            done_bytes: self.done_bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes.load(Ordering::Relaxed),
            error: phase.error.clone(),
            check: phase.check.clone(),
        }
    }

    pub(crate) fn state(&self) -> JobState {
        self.phase().state
    }

    pub(crate) fn is_over(&self) -> bool {
        matches!(
            self.state(),
            JobState::Done | JobState::Failed | JobState::Cancelled
        )
    }

    /// Lets a job that is ready switch over; false when it is not ready.
    pub(crate) fn complete(&self) -> bool {
        let mut phase = self.phase();
        match phase.state {
            JobState::Ready => phase.completes = true,
            JobState::Done => {}
            _ => return false,
        }
        self.changed.notify_all();
        true
    }

    /// Waits for the job's end; false when it has not come by `deadline`.
    pub(crate) fn await_end(&self, deadline: Instant) -> bool {
        let is_running =
            |phase: &mut Phase| matches!(phase.state, JobState::Running | JobState::Ready);
        let left = deadline.saturating_duration_since(Instant::now());
        let (phase, timeout) = self
            .changed
            .wait_timeout_while(self.phase(), left, is_running)
            .unwrap_or_else(PoisonError::into_inner);
        drop(phase);
        !timeout.timed_out()
    }

    fn cancel(&self) {
        let phase = self.phase();
        self.is_cancelled.store(true, Ordering::Relaxed);
        self.changed.notify_all();
        drop(phase);
        // The job may be waiting for the host that has it.
        if let Some(target) = self.target().take() {
            target.abandon();
        }
    }

    /// From now on a cancellation [abandons](Image::abandon) `target`.
    ///
    /// # Errors
    /// The job is to end.
    pub(crate) fn lend(&self, target: &Arc<dyn Image>) -> Result<(), JobError> {
        let mut lent = self.target();
        self.check_cancelled()?;
        *lent = Some(Arc::clone(target));
        Ok(())
    }

    /// Takes back what was lent: it can be relied on again.
    ///
    /// # Errors
    /// The job is to end.
    pub(crate) fn take_back(&self) -> Result<(), JobError> {
        *self.target() = None;
        self.check_cancelled()
    }

    fn target(&self) -> MutexGuard<'_, Option<Arc<dyn Image>>> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, work: Work) {
        tracing::info!(job = self.job_id, kind = self.kind, "job began");
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(self)));
        drop(self.target().take());
        let result = result.unwrap_or_else(|_| Err(JobError::Failed("the job panicked".into())));
        let mut phase = self.phase();
        match result {
            Ok(()) => phase.state = JobState::Done,
            Err(JobError::Cancelled) => phase.state = JobState::Cancelled,
            // Its target was taken from it.
            Err(_) if self.is_cancelled.load(Ordering::Relaxed) => {
                phase.state = JobState::Cancelled;
            }
            Err(JobError::Failed(error)) => {
                phase.state = JobState::Failed;
                phase.error = error;
            }
        }
        tracing::info!(
            job = self.job_id,
            kind = self.kind,
            state = phase.state.as_str_name(),
            error = phase.error,
            "job ended"
        );
        self.changed.notify_all();
    }

    /// # Errors
    /// The job is to end.
    pub(crate) fn check_cancelled(&self) -> Result<(), JobError> {
        if self.is_cancelled.load(Ordering::Relaxed) {
            Err(JobError::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Sleeps, but not through a cancellation or completion.
    ///
    /// # Errors
    /// The job is to end.
    pub(crate) fn pause(&self, time: Duration) -> Result<(), JobError> {
        let is_quiet =
            |phase: &mut Phase| !phase.completes && !self.is_cancelled.load(Ordering::Relaxed);
        drop(
            self.changed
                .wait_timeout_while(self.phase(), time, is_quiet)
                .unwrap_or_else(PoisonError::into_inner),
        );
        self.check_cancelled()
    }

    pub(crate) fn set_ready(&self) {
        self.phase().state = JobState::Ready;
        self.changed.notify_all();
    }

    /// The guest was faster: not to be completed now.
    pub(crate) fn set_running(&self) {
        self.phase().state = JobState::Running;
    }

    pub(crate) fn completes(&self) -> bool {
        self.phase().completes
    }

    pub(crate) fn set_check(&self, check: CheckResult) {
        self.phase().check = Some(check);
    }

    pub(crate) fn add_total(&self, bytes: u64) {
        self.total_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn add_done(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Total as the work proceeds: what is done and what is left.
    pub(crate) fn set_left(&self, left_bytes: u64) {
        let done_bytes = self.done_bytes.load(Ordering::Relaxed);
        self.total_bytes
            .store(done_bytes + left_bytes, Ordering::Relaxed);
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn until_cancelled() -> Result<Work, StartError> {
        Ok(Box::new(|control| {
            control.set_ready();
            loop {
                control.pause(Duration::from_secs(20))?;
                if control.completes() {
                    return Ok(());
                }
            }
        }))
    }

    fn work(
        work: impl FnOnce(&Control) -> Result<(), JobError> + Send + 'static,
    ) -> Result<Work, StartError> {
        Ok(Box::new(work))
    }

    #[test]
    fn second_job_is_refused_while_one_runs() {
        let jobs = Jobs::default();
        let first = jobs.start("a", "mirror", until_cancelled).unwrap();
        let busy = jobs.start("b", "backup", until_cancelled).unwrap_err();
        assert!(busy.to_string().contains("mirror"), "{busy}");
        assert!(jobs.exclude(|| ()).is_err());
        jobs.cancel(&first, soon());
        assert_eq!(first.state(), JobState::Cancelled);
        assert!(jobs.exclude(|| ()).is_ok());
        let taken = jobs.start("a", "mirror", until_cancelled).unwrap_err();
        assert!(matches!(taken, StartError::Taken { .. }), "{taken}");
        jobs.cancel(&first, soon());
        assert!(jobs.find("a").is_none(), "cancelled again: forgotten");
        assert!(jobs.start("a", "mirror", until_cancelled).is_ok());
        assert!(jobs.end(soon()));
        assert!(matches!(
            jobs.start("c", "mirror", until_cancelled),
            Err(StartError::Ending)
        ));
    }

    #[test]
    fn job_completes_only_when_it_is_ready() {
        let jobs = Jobs::default();
        let job = jobs.start("a", "mirror", until_cancelled).unwrap();
        while !job.complete() {
            thread::yield_now();
        }
        assert!(job.await_end(soon()));
        assert_eq!(job.state(), JobState::Done);
    }

    #[test]
    fn failure_and_panic_are_told() {
        let jobs = Jobs::default();
        let fails = || work(|_| Err(JobError::Failed("no space".into())));
        let job = jobs.start("a", "backup", fails).unwrap();
        assert!(job.await_end(soon()));
        let told = job.describe();
        assert_eq!(
            (told.state(), told.error.as_str()),
            (JobState::Failed, "no space")
        );
        let panics = || work(|_| panic!("on purpose"));
        let job = jobs.start("b", "backup", panics).unwrap();
        assert!(job.await_end(soon()));
        assert_eq!(job.state(), JobState::Failed);
    }

    #[test]
    fn jobs_that_are_over_are_bounded() {
        let jobs = Jobs::default();
        for number in 0..MAX_OVER + 5 {
            let job = jobs.start(&format!("j{number}"), "check", || work(|_| Ok(())));
            assert!(job.unwrap().await_end(soon()));
        }
        assert!(jobs.all().len() <= MAX_OVER + 1);
        assert!(jobs.find("j0").is_none());
    }
}
