//! Survives a peer that truncates the file behind shared memory.
//!
//! Touching a page that the file no longer has raises SIGBUS. A [`Guard`] makes that the end of
//! one session instead of the process: the signal handler puts an empty private page in the place
//! of the lost one, so that the interrupted access goes on, and rings the session's eventfd.
//! Memory that is sealed against truncation needs no guard.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::eventfd::EventFd;

/// Mappings guarded at once. Those beyond the bound are used unguarded.
const SLOTS: usize = 4096;

/// What the signal handler knows of a mapping. A slot is free while `len_bytes` is 0.
struct Slot {
    start: AtomicUsize,
    len_bytes: AtomicUsize,
    /// An eventfd, kept open by the [`Guard`].
    event_fd: AtomicI32,
}

static GUARDED: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        len_bytes: AtomicUsize::new(0),
        event_fd: AtomicI32::new(-1),
    }
}; SLOTS];

/// Serialises taking and freeing slots; the handler takes no lock.
static TAKING: Mutex<()> = Mutex::new(());

static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// Keeps a mapping guarded. To be dropped before the mapping is.
#[derive(Debug)]
pub(super) struct Guard {
    slot: usize,
    _event: Arc<EventFd>,
}

impl Guard {
    /// Guards `len_bytes` from the page-aligned `start`; `event` is rung when a page was lost.
    ///
    /// # Errors
    /// All slots are taken, or the handler could not be installed.
    pub(super) fn new(
        start: NonNull<u8>,
        len_bytes: usize,
        event: Arc<EventFd>,
    ) -> io::Result<Guard> {
        let _taking = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
        install_handler()?;
        let is_free = |slot: &Slot| slot.len_bytes.load(Ordering::Acquire) == 0;
        let slot = GUARDED.iter().position(is_free);
        let slot = slot.ok_or_else(|| io::Error::from(io::ErrorKind::QuotaExceeded))?;
        GUARDED[slot]
            .start
            .store(start.as_ptr() as usize, Ordering::Relaxed);
        GUARDED[slot]
            .event_fd
            .store(event.as_raw_fd(), Ordering::Relaxed);
        GUARDED[slot].len_bytes.store(len_bytes, Ordering::Release);
        Ok(Guard {
            slot,
            _event: event,
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _taking = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
        GUARDED[self.slot].len_bytes.store(0, Ordering::Release);
    }
}

/// Once per process; the lock of [`TAKING`] is held.
fn install_handler() -> io::Result<()> {
    if PREVIOUS.get().is_some() {
        return Ok(());
    }
    // SAFETY: all-zero sigactions are valid ones; the handler is async-signal-safe, and runs on
    // the alternate stack that the standard library gives each thread.
    let (result, previous) = unsafe {
        let mut previous: libc::sigaction = std::mem::zeroed();
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        (
            libc::sigaction(libc::SIGBUS, &action, &mut previous),
            previous,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // Nobody else sets it: the caller holds the lock.
    let _ = PREVIOUS.set(previous);
    Ok(())
}

extern "C" fn on_sigbus(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo of a SIGBUS.
    let address = unsafe { (*info).si_addr() } as usize;
    // SAFETY: errno is the interrupted thread's own; it is put back below.
    let errno = unsafe { *libc::__errno_location() };
    let slot = GUARDED.iter().find(|slot| {
        let len_bytes = slot.len_bytes.load(Ordering::Acquire);
        address.wrapping_sub(slot.start.load(Ordering::Relaxed)) < len_bytes
    });
    let replaced = slot.is_some_and(|slot| {
        let page_bytes = super::page_size_bytes() as usize;
        let page = address - address % page_bytes;
        // A huge page can only be replaced together with its whole mapping.
        let (start, len_bytes) = (
            slot.start.load(Ordering::Relaxed),
            slot.len_bytes.load(Ordering::Relaxed),
        );
        let replaced = replace(page, page_bytes) || replace(start, len_bytes);
        let one = 1u64;
        let event_fd = slot.event_fd.load(Ordering::Relaxed);
        // SAFETY: eight bytes of the handler's own stack; write is async-signal-safe.
        unsafe { libc::write(event_fd, ptr::from_ref(&one).cast(), 8) };
        replaced
    });
    if !replaced {
        pass_on(signal, info, context);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Puts empty private memory in the place of a part of a guarded mapping.
fn replace(start: usize, len_bytes: usize) -> bool {
    // SAFETY: the range lies in a mapping that its guard's owner keeps mapped; whoever uses it
    // expects other processes to change its content at any time, so zeroes are as good as any.
    let mapped = unsafe {
        libc::mmap(
            start as *mut libc::c_void,
            len_bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
}

/// Not ours: what would have happened without us.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
    let previous = PREVIOUS
        .get()
        .filter(|previous| previous.sa_flags & libc::SA_SIGINFO != 0);
    if let Some(previous) = previous {
        // SAFETY: SA_SIGINFO says that this is a handler of three arguments.
        let handler = unsafe { std::mem::transmute::<usize, Handler>(previous.sa_sigaction) };
        handler(signal, info, context);
        return;
    }
    // SAFETY: the default disposition; the access is repeated on return and ends the process.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}
