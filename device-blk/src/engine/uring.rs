//! The io_uring of one queue's thread, which [`ring_maker`] sets up.
//!
//! The ring starts disabled, is restricted to the operations that a disk needs
//! (`IORING_REGISTER_RESTRICTIONS`), and is enabled then: system call filters do not see what
//! goes through a ring, so without this a hijacked daemon could open files and connect
//! sockets. Files and buffers are not registered: that would hold the image's lock until the
//! ring's teardown has ended, and make every recovery 25 to 40 ms longer.
//!
//! Completions wake the thread through an eventfd, which is muted while the thread is at work
//! anyway, so that it costs nothing under load. (Polling the ring's own descriptor would save
//! it altogether, but a ring that defers its completions does not wake such a poll.)
//!
//! The kernel says by a flag that it has deferred something (`IORING_SQ_TASKRUN`). It sets the flag
//! after it has put the work on its list, so that a thread which asks in between gets the work, and
//! the flag appears afterwards, with nothing behind it, until work is deferred once more. So the flag
//! is a reason to ask the kernel once, and never one to ask until it is gone.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use vhost_user::eventfd::EventFd;

use super::ring_maker;

/// Operations the ring executes; anything else fails with EACCES.
const ALLOWED_OPS: [u8; 7] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::AsyncCancel::CODE,
];

/// Requests that are handed to the kernel in one go at most. With a completion queue for a ring of
/// the largest size it takes 25 KiB, which Linux counts against the limit on locked memory.
const SUBMISSION_ENTRIES: u32 = 128;

/// How long the rings of disks that went away just now may take to give back their memory.
const SET_UP_PATIENCE: Duration = Duration::from_secs(5);
const SET_UP_RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// `user_data` of the request that cancels all others.
const CANCEL_ALL: u64 = u64::MAX;
/// How long the kernel may be short of memory for requests before the thread looks elsewhere.
const SUBMIT_PATIENCE: Duration = Duration::from_millis(200);
const SUBMIT_RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UringError {
    /// Absent, or switched off.
    #[error(
        "io_uring is not available: it needs Linux 5.10 or newer, kernel.io_uring_disabled = 0 \
         (sysctl), and a container runtime whose seccomp profile allows it"
    )]
    Unavailable(#[source] io::Error),
    /// The limit on locked memory, which counts for all processes of a user together.
    #[error(
        "no memory for another io_uring: each queue takes some 25 KiB of what the user may lock; \
         raise the limit (ulimit -l, LimitMEMLOCK=) or give the daemon CAP_SYS_RESOURCE"
    )]
    OutOfMemory(#[source] io::Error),
    /// The ring could not be limited to disk operations.
    #[error("io_uring cannot be restricted to disk operations")]
    Restrict(#[source] io::Error),
    /// The thread that sets rings up did not.
    #[error("the thread that sets up io_urings does not answer; restart the daemon")]
    Maker(#[source] io::Error),
    /// No eventfd for its completions.
    #[error("io_uring cannot signal completions")]
    Eventfd(#[source] io::Error),
}

/// A restricted ring; belongs to the thread that made it.
pub(crate) struct Uring {
    ring: IoUring,
    completed: Arc<EventFd>,
    is_muted: bool,
    /// Pushed while the submission queue was full; oldest first.
    backlog: VecDeque<squeue::Entry>,
    /// Requests the kernel has and has not answered, plus those pushed and not submitted.
    unanswered: usize,
}

impl Uring {
    /// A ring for `entries` requests at one time.
    pub(crate) fn new(entries: u16) -> Result<Self, UringError> {
        let completed = Arc::new(EventFd::new().map_err(UringError::Eventfd)?);
        let ring = ring_maker::make(entries, &completed)?;
        ring.submitter()
            .register_enable_rings()
            .map_err(UringError::Restrict)?;
        Ok(Self {
            ring,
            completed,
            is_muted: false,
            backlog: VecDeque::new(),
            unanswered: 0,
        })
    }

    /// Becomes readable when a request completes while the ring is not muted.
    pub(crate) fn completion_event(&self) -> BorrowedFd<'_> {
        self.completed.as_fd()
    }

    /// Rings the completion event, for others who wake the ring's thread.
    pub(crate) fn waker(&self) -> Arc<EventFd> {
        Arc::clone(&self.completed)
    }

    /// Stops signalling completions: the thread looks for them by itself until
    /// [`Self::unmute`].
    pub(crate) fn mute(&mut self) {
        if !std::mem::replace(&mut self.is_muted, true) {
            self.ring.completion().disable_eventfd();
        }
    }

    /// Signals completions from now on. True when some arrived in the meantime, or the kernel did
    /// not take all that was pushed: then look again before going to sleep.
    pub(crate) fn unmute(&mut self) -> bool {
        self.is_muted = false;
        self.ring.completion().enable_eventfd();
        // The kernel posts a completion and then looks at the flag; we clear the flag and then
        // look for completions. Without the fence both could miss the other.
        fence(Ordering::SeqCst);
        if self.ring.submission().taskrun() {
            // What is deferred after this is signalled, whatever the flag says then.
            self.submit();
        }
        !self.ring.completion().is_empty()
            || !self.ring.submission().is_empty()
            || !self.backlog.is_empty()
    }

    /// Whether there are completions. The kernel is asked for those that it deferred: its flag alone
    /// would keep a thread that looks for work from ever sleeping while storage stalls.
    #[inline]
    pub(crate) fn has_news(&mut self) -> bool {
        if self.ring.completion().is_empty()
            && self.unanswered > 0
            && self.ring.submission().taskrun()
        {
            self.submit();
        }
        !self.ring.completion().is_empty()
    }

    /// Makes the event unreadable again.
    pub(crate) fn take_completion_event(&self) {
        // It fails only when there is nothing to take.
        let _ = self.completed.take();
    }

    /// Requests that will still complete.
    pub(crate) fn unanswered(&self) -> usize {
        self.unanswered
    }

    /// Queues a request for the next [`Self::submit`], at once when many are queued.
    ///
    /// # Safety
    /// Memory that `entry` names, vectors of segments too, stays valid until its completion was
    /// returned.
    pub(crate) unsafe fn push(&mut self, entry: squeue::Entry) {
        self.unanswered += 1;
        if self.backlog.is_empty() {
            // SAFETY: the caller keeps what the entry points to.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
        }
        self.backlog.push_back(entry);
        self.submit();
    }

    /// Hands what was pushed to the kernel, and lets it post completions that it deferred.
    pub(crate) fn submit(&mut self) {
        let give_up = Instant::now() + SUBMIT_PATIENCE;
        let mut has_deferred = self.ring.submission().taskrun();
        while self.has_requests_for_kernel() || has_deferred {
            match self.ring.submit() {
                Ok(_) => has_deferred = false,
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                // Short of memory. What is pushed stays, and keeps the thread from sleeping.
                Err(error) => {
                    if Instant::now() >= give_up {
                        tracing::error!(%error, "io_uring takes no requests; trying again later");
                        return;
                    }
                    std::thread::sleep(SUBMIT_RETRY_INTERVAL);
                }
            }
        }
    }

    fn has_requests_for_kernel(&mut self) -> bool {
        let mut queue = self.ring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: whoever pushed it keeps what it points to until it has completed.
            if unsafe { queue.push(entry) }.is_err() {
                break;
            }
            self.backlog.pop_front();
        }
        !queue.is_empty()
    }

    /// The next completion: the request's `user_data` and its result.
    pub(crate) fn next_completion(&mut self) -> Option<(u64, i32)> {
        loop {
            let entry = self.ring.completion().next()?;
            self.unanswered -= 1;
            if entry.user_data() != CANCEL_ALL {
                return Some((entry.user_data(), entry.result()));
            }
        }
    }

    /// Submits, and waits until a completion is there, the event was rung by others, or
    /// `deadline` has passed.
    pub(crate) fn wait(&mut self, deadline: Instant) {
        self.submit();
        let was_muted = self.is_muted;
        if !self.unmute() {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout_ms = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
            let mut poll = libc::pollfd {
                fd: self.completed.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one valid pollfd is passed. Whatever ends the wait, the caller looks.
            unsafe { libc::poll(&mut poll, 1, timeout_ms) };
            self.take_completion_event();
        }
        if was_muted {
            self.mute();
        }
        self.submit();
    }

    /// Asks the kernel to give up what it can; everything still completes.
    pub(crate) fn cancel_all(&mut self) {
        self.submit();
        let cancel = opcode::AsyncCancel2::new(types::CancelBuilder::any())
            .build()
            .user_data(CANCEL_ALL);
        // SAFETY: a cancellation names no memory.
        unsafe { self.push(cancel) };
        self.submit();
    }
}

/// A restricted ring that has yet to be enabled.
pub(super) fn prepare(entries: u16, completed: &EventFd) -> Result<IoUring, UringError> {
    let ring = set_up_patiently(u32::from(entries))?;
    ring.submitter()
        .register_eventfd(completed.as_fd().as_raw_fd())
        .map_err(UringError::Eventfd)?;
    restrict(&ring).map_err(UringError::Restrict)?;
    Ok(ring)
}

/// Waits for memory: a ring that was closed gives its own back some time later.
fn set_up_patiently(entries: u32) -> Result<IoUring, UringError> {
    let give_up = Instant::now() + SET_UP_PATIENCE;
    loop {
        match set_up(entries) {
            Ok(ring) => return Ok(ring),
            Err(e) if e.raw_os_error() != Some(libc::ENOMEM) => {
                return Err(UringError::Unavailable(e));
            }
            Err(e) if Instant::now() >= give_up => return Err(UringError::OutOfMemory(e)),
            Err(_) => std::thread::sleep(SET_UP_RETRY_INTERVAL),
        }
    }
}

/// The cheapest set-up that this kernel knows.
fn set_up(entries: u32) -> io::Result<IoUring> {
    let submissions = entries.min(SUBMISSION_ENTRIES);
    // One more for the request that cancels the others.
    let completions = (entries + 1).next_power_of_two();
    // Linux 6.1: completions are posted when the thread asks for them, in one go.
    let deferred = IoUring::builder()
        .dontfork()
        .setup_r_disabled()
        .setup_cqsize(completions)
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(submissions);
    match deferred {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => IoUring::builder()
            .dontfork()
            .setup_r_disabled()
            .setup_cqsize(completions)
            .build(submissions),
        result => result,
    }
}

fn restrict(ring: &IoUring) -> io::Result<()> {
    let mut restrictions = Vec::from(ALLOWED_OPS.map(Restriction::sqe_op));
    restrictions.push(Restriction::sqe_flags_allowed(0));
    ring.submitter().register_restrictions(&mut restrictions)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::sync::mpsc::channel;
    use std::{ptr, thread};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    #[test]
    fn operations_that_no_disk_needs_are_refused() {
        let mut uring = Uring::new(8).unwrap();
        let path = c"/dev/null";
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr())
            .build()
            .user_data(7);
        // SAFETY: the path is a constant.
        unsafe { uring.push(open) };
        uring.wait(Instant::now() + Duration::from_secs(10));
        assert_eq!(uring.next_completion(), Some((7, -libc::EACCES)));
        assert_eq!(uring.unanswered(), 0);
    }

    #[test]
    fn more_requests_than_submission_entries_complete_in_one_wait() {
        let count = 1024;
        let mut uring = Uring::new(count).unwrap();
        let file = tempfile::tempfile().unwrap();
        for _ in 0..count {
            push_sync(&mut uring, &file);
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut completed = 0;
        while completed < count && Instant::now() < deadline {
            uring.wait(deadline);
            while uring.next_completion().is_some() {
                completed += 1;
            }
        }
        assert_eq!((completed, uring.unanswered()), (count, 0));
    }

    fn is_signalled(uring: &Uring, timeout: PollTimeout) -> bool {
        let mut polls = [PollFd::new(uring.completion_event(), PollFlags::POLLIN)];
        poll(&mut polls, timeout).unwrap() == 1
    }

    fn push_sync(uring: &mut Uring, file: &std::fs::File) {
        let sync = opcode::Fsync::new(types::Fd(file.as_raw_fd()))
            .build()
            .user_data(1);
        // SAFETY: a sync names no memory.
        unsafe { uring.push(sync) };
    }

    #[test]
    fn completions_are_signalled_unless_muted() {
        let mut uring = Uring::new(8).unwrap();
        let file = tempfile::tempfile().unwrap();
        assert!(!is_signalled(&uring, PollTimeout::ZERO));
        push_sync(&mut uring, &file);
        uring.submit();
        let started = Instant::now();
        assert!(is_signalled(&uring, PollTimeout::from(20_000u16)));
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "the poll was woken"
        );
        uring.take_completion_event();
        uring.mute();
        uring.submit();
        assert_eq!(uring.next_completion(), Some((1, 0)));

        push_sync(&mut uring, &file);
        uring.wait(Instant::now() + Duration::from_secs(20));
        assert!(!is_signalled(&uring, PollTimeout::ZERO));
        assert!(uring.unmute(), "what came in the meantime is noticed");
        assert_eq!(uring.next_completion(), Some((1, 0)));
        assert!(!uring.unmute());
    }

    /// `IORING_SQ_TASKRUN`
    const TASKRUN: u32 = 1 << 2;

    /// Sets the flag as a kernel does that was asked between putting work on its list and saying so.
    fn pretend_deferred_work(uring: &Uring) {
        /// Words of `struct io_uring_params`, and the one that tells where the flags are.
        const PARAMS_WORDS: usize = 30;
        const FLAGS_AT: usize = 14;
        const MAPPED_BYTES: usize = 4096;
        let mut params = [0u32; PARAMS_WORDS];
        // SAFETY: the parameters are of the size that the kernel reads and writes.
        let other = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
        assert!(other >= 0, "{}", io::Error::last_os_error());
        // SAFETY: the descriptor was just returned and is nobody else's.
        unsafe { libc::close(other as i32) };
        let offset_bytes = params[FLAGS_AT] as usize;
        assert!(offset_bytes + 4 <= MAPPED_BYTES);
        // SAFETY: a new mapping of the ring's head, which every ring has.
        let map = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let fd = uring.ring.as_raw_fd();
            libc::mmap(
                ptr::null_mut(),
                MAPPED_BYTES,
                access,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        assert_ne!(map, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        // SAFETY: inside the mapping and aligned; the kernel changes it atomically as well.
        let flags = unsafe { AtomicU32::from_ptr(map.byte_add(offset_bytes).cast()) };
        flags.fetch_or(TASKRUN, Ordering::SeqCst);
        // SAFETY: the mapping was made above and is not used any more.
        unsafe { libc::munmap(map, MAPPED_BYTES) };
    }

    #[test]
    fn a_flag_without_work_behind_it_is_no_news_while_storage_stalls() {
        let mut uring = Uring::new(8).unwrap();
        let (stalled, mut storage) = io::pipe().unwrap();
        let mut byte = [0_u8];
        let read = opcode::Read::new(types::Fd(stalled.as_raw_fd()), byte.as_mut_ptr(), 1)
            .build()
            .user_data(1);
        // SAFETY: `byte` lives until the read has completed, below.
        unsafe { uring.push(read) };
        uring.submit();
        uring.mute();
        pretend_deferred_work(&uring);
        assert!(!uring.has_news(), "a thread that polls goes to sleep");
        io::Write::write_all(&mut storage, b"x").unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !uring.has_news() && Instant::now() < deadline {
            thread::yield_now();
        }
        assert_eq!(uring.next_completion(), Some((1, 1)));
    }

    #[test]
    fn a_flag_without_work_behind_it_keeps_no_completion_from_the_thread() {
        let (report, reported) = channel();
        // Where it fails, this thread does not end.
        thread::spawn(move || {
            let mut uring = Uring::new(8).unwrap();
            let file = tempfile::tempfile().unwrap();
            push_sync(&mut uring, &file);
            while uring.ring.completion().is_empty() {
                uring.submit();
                thread::yield_now();
            }
            pretend_deferred_work(&uring);
            assert!(uring.ring.submission().taskrun(), "the flag is set");
            uring.submit();
            report.send("submit returns").unwrap();
            assert_eq!(uring.next_completion(), Some((1, 0)));
            // Nothing is in flight: nobody looks again because of it, and the thread sleeps.
            assert!(!uring.has_news());
            assert!(!uring.unmute());
            report.send("the thread sleeps").unwrap();
            uring.take_completion_event();
            push_sync(&mut uring, &file);
            uring.wait(Instant::now() + Duration::from_secs(20));
            assert_eq!(uring.next_completion(), Some((1, 0)));
            report.send("and is woken").unwrap();
        });
        for expected in ["submit returns", "the thread sleeps", "and is woken"] {
            assert_eq!(
                reported.recv_timeout(Duration::from_secs(20)),
                Ok(expected),
                "the thread asks the kernel for work that it does not have"
            );
        }
    }
}
