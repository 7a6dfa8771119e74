//! Many reads or writes with one system call, by io_uring.
//!
//! Requests say RWF_NOWAIT (O_NONBLOCK alone would make the ring wait in our place), so that all of
//! a batch is over when the call returns: the ring is used as a list of system calls and nothing is
//! ever in flight. Descriptors are not registered:
//! that would keep a tap busy until the ring's teardown has ended, and its successor waiting.
//!
//! What goes through a ring is not seen by system call filters, so a ring is restricted to reading
//! and writing (`IORING_REGISTER_RESTRICTIONS`), and one thread alone, which talks to nobody, may
//! set rings up once the process serves guests. Where it was not started (tests), whoever wants a
//! ring sets it up.

use std::io;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue};

use super::slots::Slots;
use crate::confinement;

/// Operations the ring executes; anything else fails with EACCES.
const ALLOWED_OPS: [u8; 3] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::WriteFixed::CODE,
];

/// Setting up a ring takes a millisecond; its memory may have to be found.
const PATIENCE: Duration = Duration::from_secs(10);
/// Queues that start at the same time.
const MAX_ORDERS: usize = 64;

static ORDERS: OnceLock<SyncSender<Order>> = OnceLock::new();

/// A restricted ring; belongs to the thread that made it.
pub(super) struct Uring {
    ring: IoUring,
    /// Whether the buffers it was made with are registered.
    has_buffers: bool,
    pushed: usize,
}

struct Order {
    entries: u16,
    /// Address and length.
    buffers: Option<(usize, usize)>,
    answer: SyncSender<io::Result<(IoUring, bool)>>,
}

impl Uring {
    /// A ring for `entries` requests at one time. If possible, `buffers` are registered, which
    /// must outlive the ring.
    ///
    /// # Errors
    /// The kernel has none, or none for us.
    pub(super) fn new(entries: usize, buffers: Option<&Slots>) -> io::Result<Self> {
        let buffers = buffers.map(|slots| {
            let iovec = slots.as_iovec();
            (iovec.iov_base as usize, iovec.iov_len)
        });
        let (ring, has_buffers) = make(entries as u16, buffers)?;
        ring.submitter().register_enable_rings()?;
        Ok(Self {
            ring,
            has_buffers,
            pushed: 0,
        })
    }

    pub(super) fn has_buffers(&self) -> bool {
        self.has_buffers
    }

    /// Queues a request for the next [`Self::run`].
    ///
    /// # Safety
    /// Memory that `entry` names stays valid until then; it says RWF_NOWAIT.
    ///
    /// # Panics
    /// With more requests than the ring has entries.
    pub(super) unsafe fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the caller keeps what the entry points to.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("no more requests than entries");
        self.pushed += 1;
    }

    /// Carries out what was pushed, in that order, and tells `user_data` and result of each.
    ///
    /// # Errors
    /// The kernel is short of memory; the ring is of no use any more.
    pub(super) fn run(&mut self, mut done: impl FnMut(u64, i32)) -> io::Result<()> {
        while self.pushed > 0 {
            match self.ring.submit_and_wait(self.pushed) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
            for entry in self.ring.completion() {
                self.pushed -= 1;
                done(entry.user_data(), entry.result());
            }
        }
        Ok(())
    }
}

/// Starts the thread that sets rings up; it ends with the process.
///
/// # Errors
/// No thread to be had.
pub(crate) fn start_maker() -> io::Result<()> {
    let (orders, inbox) = sync_channel(MAX_ORDERS);
    thread::Builder::new()
        .name("ring-maker".to_owned())
        .spawn(move || serve(&inbox))?;
    // A second one would wait for orders that never come, and end.
    let _ = ORDERS.set(orders);
    Ok(())
}

fn make(entries: u16, buffers: Option<(usize, usize)>) -> io::Result<(IoUring, bool)> {
    let Some(orders) = ORDERS.get() else {
        return prepare(entries, buffers);
    };
    let (answer, made) = sync_channel(1);
    let order = Order {
        entries,
        buffers,
        answer,
    };
    let gone = || io::Error::other("the thread that sets up io_urings does not answer");
    orders.send(order).map_err(|_| gone())?;
    made.recv_timeout(PATIENCE).map_err(|_| gone())?
}

fn serve(inbox: &Receiver<Order>) {
    if let Err(error) = confinement::confine_ring_maker() {
        tracing::error!(%error, "the thread that sets up rings cannot be confined and ends");
        return;
    }
    for order in inbox {
        // Who gave up waiting does not want it any more.
        let _ = order.answer.send(prepare(order.entries, order.buffers));
    }
}

/// A restricted ring that has yet to be enabled, by the thread that will submit to it.
fn prepare(entries: u16, buffers: Option<(usize, usize)>) -> io::Result<(IoUring, bool)> {
    let ring = set_up(u32::from(entries))?;
    let has_buffers = buffers.is_some_and(|(address, len_bytes)| {
        let iovec = libc::iovec {
            iov_base: address as *mut libc::c_void,
            iov_len: len_bytes,
        };
        // SAFETY: whoever ordered the ring waits for it, or keeps the memory for longer than the
        // ring; a limit on locked memory may forbid this.
        unsafe { ring.submitter().register_buffers(&[iovec]) }.is_ok()
    });
    let mut restrictions = Vec::from(ALLOWED_OPS.map(Restriction::sqe_op));
    restrictions.push(Restriction::sqe_flags_allowed(0));
    ring.submitter().register_restrictions(&mut restrictions)?;
    Ok((ring, has_buffers))
}

/// The cheapest set-up that this kernel knows.
fn set_up(entries: u32) -> io::Result<IoUring> {
    // Linux 6.1.
    let deferred = IoUring::builder()
        .dontfork()
        .setup_r_disabled()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(entries);
    match deferred {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::builder()
            .dontfork()
            .setup_r_disabled()
            .build(entries),
        result => result,
    }
}

/// Whether a queue has a ring is decided once; the log need not hear of each.
pub(super) fn or_one_by_one(ring: io::Result<Uring>) -> Option<Uring> {
    static IS_KNOWN: OnceLock<()> = OnceLock::new();
    match ring {
        Ok(ring) => Some(ring),
        Err(error) => {
            IS_KNOWN.get_or_init(|| {
                tracing::warn!(
                    %error,
                    "io_uring is not available, frames take a system call each; it needs Linux \
                     5.10, kernel.io_uring_disabled = 0 (sysctl), and a container runtime whose \
                     seccomp profile allows it"
                );
            });
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use io_uring::types;

    use super::*;

    #[test]
    fn operations_that_move_no_frames_are_refused() {
        let mut uring = Uring::new(8, None).unwrap();
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/dev/null".as_ptr())
            .build()
            .user_data(7);
        // SAFETY: the path is a constant.
        unsafe { uring.push(&open) };
        let mut results = Vec::new();
        uring
            .run(|data, result| results.push((data, result)))
            .unwrap();
        assert_eq!(results, [(7, -libc::EACCES)]);
    }

    #[test]
    fn what_is_pushed_is_carried_out_in_order() {
        let (reader, writer) = std::os::unix::net::UnixDatagram::pair().unwrap();
        for socket in [&reader, &writer] {
            socket.set_nonblocking(true).unwrap();
        }
        let mut uring = Uring::new(8, None).unwrap();
        let texts: [&[u8]; 3] = [b"one", b"two", b"three"];
        for (number, text) in (0..).zip(texts) {
            let write = opcode::Write::new(
                types::Fd(writer.as_raw_fd()),
                text.as_ptr(),
                text.len() as u32,
            );
            // SAFETY: the text is a constant.
            unsafe { uring.push(&write.build().user_data(number)) };
        }
        let mut results = Vec::new();
        uring
            .run(|data, result| results.push((data, result)))
            .unwrap();
        assert_eq!(results, [(0, 3), (1, 3), (2, 5)]);
        let mut buffer = [0; 8];
        for text in texts {
            let len = reader.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..len], text);
        }
        // A read that would have to wait does not.
        let read = opcode::Read::new(types::Fd(reader.as_raw_fd()), buffer.as_mut_ptr(), 8)
            .rw_flags(libc::RWF_NOWAIT);
        // SAFETY: the buffer outlives the call that follows.
        unsafe { uring.push(&read.build()) };
        uring
            .run(|_, result| assert_eq!(result, -libc::EAGAIN))
            .unwrap();
    }
}
