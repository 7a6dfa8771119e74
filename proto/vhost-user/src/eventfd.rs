//! Event descriptors between driver, frontend and backend: kick, call, err, and the backend's own
//! wake-ups.
//!
//! A descriptor that was passed to a peer is the same open file there: the peer can read it, fill
//! its counter, and make it blocking at any time.

mod rescue;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rescue::Bell;

/// The writing end of an eventfd whose reader is not trusted: ringing it blocks for a fraction of a second at
/// most, and only once.
#[derive(Debug)]
pub struct Doorbell {
    bell: Arc<Bell>,
    /// The peer made it blocking, and may let its counter run full. Its mode is the peer's as
    /// well (one open file description), so it is not ours to change.
    may_block: bool,
}

impl Doorbell {
    /// Takes a descriptor as received.
    ///
    /// # Errors
    /// `InvalidInput` for a pipe, a socket or a device: a peer that makes it blocking and full can
    /// hold a writer up for good, while an eventfd's counter can be emptied from here.
    pub fn new(fd: OwnedFd) -> io::Result<Doorbell> {
        let file = File::from(fd);
        let kind = file.metadata()?.mode() & libc::S_IFMT;
        if [libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFCHR].contains(&kind) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        // SAFETY: F_GETFL only reads the descriptor's state.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        Ok(Doorbell {
            bell: Bell::new(file),
            may_block: flags < 0 || flags & libc::O_NONBLOCK == 0,
        })
    }

    /// Adds one. A full counter means that the peer has a signal waiting already.
    #[inline]
    pub fn ring(&self) {
        self.bell.write(|mut file| {
            if self.may_block && !is_ready(file.as_fd(), libc::POLLOUT) {
                return;
            }
            // The peer may have closed or replaced what is behind the descriptor; it is its own loss.
            let _ = file.write(&1u64.to_ne_bytes());
        });
    }
}

/// An eventfd that is read here.
#[derive(Debug)]
pub struct EventFd {
    file: File,
}

impl EventFd {
    /// A new one.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new() -> io::Result<EventFd> {
        // SAFETY: eventfd takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just returned by the kernel and is owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        Ok(EventFd { file })
    }

    /// Takes a kick descriptor as received. Its only reader is this process, so it is made
    /// non-blocking: a peer that reads it as well must not be able to block a worker.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn from_kick(fd: OwnedFd) -> io::Result<EventFd> {
        let file = File::from(fd);
        // SAFETY: F_GETFL and F_SETFL take and return integers.
        unsafe {
            let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
            if flags < 0
                || libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) < 0
            {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(EventFd { file })
    }

    /// Makes it readable.
    pub fn ring(&self) {
        let _ = (&self.file).write(&1u64.to_ne_bytes());
    }

    /// Takes what was added; false when nothing was.
    ///
    /// # Errors
    /// End of file or any other failure: this descriptor will never signal again.
    pub fn take(&self) -> io::Result<bool> {
        take(&self.file)
    }

    /// Another descriptor for the same eventfd.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn try_clone(&self) -> io::Result<EventFd> {
        Ok(EventFd {
            file: self.file.try_clone()?,
        })
    }

    /// Gives the descriptor away.
    pub fn into_fd(self) -> OwnedFd {
        self.file.into()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Takes what was added to an event descriptor; false when nothing was. Never blocks, whatever a
/// peer made of the descriptor.
///
/// # Errors
/// End of file or any other failure: this descriptor will never signal again.
pub fn take(event: &impl AsRawFd) -> io::Result<bool> {
    let mut value = [0u8; 8];
    match read_now(event.as_raw_fd(), &mut value) {
        Ok(0) => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
        Err(error) => Err(error),
    }
}

/// Adds one to an event descriptor that a peer holds too. A full counter means that it has its
/// signal already.
///
/// Linux has no write that ignores the descriptor's mode: only a peer that makes it blocking, and
/// fills it at the very instant between look and write, can hold this up.
pub fn ring(event: &impl AsRawFd) {
    // SAFETY: the descriptor is open while `event` lives, and the result lives no longer.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    if is_ready(fd, libc::POLLOUT) {
        let value = 1u64.to_ne_bytes();
        // SAFETY: the buffer is ours and of the length given. A failure is the peer's own loss.
        unsafe { libc::write(fd.as_raw_fd(), value.as_ptr().cast(), value.len()) };
    }
}

/// Whether something was added and not taken yet.
pub fn is_signalled(event: &impl AsRawFd) -> bool {
    // SAFETY: the descriptor is open while `event` lives, and the result lives no longer.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    is_ready(fd, libc::POLLIN)
}

/// Reads without blocking, in whatever mode the descriptor is.
fn read_now(fd: RawFd, buf: &mut [u8; 8]) -> io::Result<usize> {
    /// The descriptor's own position, if it has one.
    const CURRENT: libc::off_t = -1;
    let iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: one vector, which names a buffer of ours and its length.
    let read = unsafe { libc::preadv2(fd, &iov, 1, CURRENT, libc::RWF_NOWAIT) };
    if let Ok(read) = usize::try_from(read) {
        return Ok(read);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() != Some(libc::EOPNOTSUPP) {
        return Err(error);
    }
    // No eventfd, or a kernel before 5.8: the mode counts.
    // SAFETY: the buffer is ours and of the length given.
    let read = unsafe { libc::read(fd, buf.as_mut_ptr().cast(), buf.len()) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

fn is_ready(fd: BorrowedFd<'_>, events: libc::c_short) -> bool {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one valid pollfd is passed; a timeout of zero returns at once.
    unsafe { libc::poll(&mut poll, 1, 0) > 0 && poll.revents & events != 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made_blocking() -> EventFd {
        let event = EventFd::new().unwrap();
        // SAFETY: F_SETFL takes an integer.
        let set = unsafe { libc::fcntl(event.as_raw_fd(), libc::F_SETFL, 0) };
        assert_eq!(set, 0);
        event
    }

    #[test]
    fn descriptor_that_a_peer_made_blocking_is_taken_without_blocking() {
        let event = made_blocking();
        assert!(!event.take().unwrap(), "nothing was added");
        event.ring();
        assert!(is_signalled(&event));
        assert!(event.take().unwrap());
        assert!(!event.take().unwrap());
        assert!(!is_signalled(&event));
    }

    #[test]
    fn what_could_hold_a_writer_up_for_good_is_no_doorbell() {
        let (_reader, pipe) = io::pipe().unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let device = File::options().write(true).open("/dev/null").unwrap();
        for fd in [OwnedFd::from(pipe), socket.into(), device.into()] {
            let error = Doorbell::new(fd).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
        Doorbell::new(EventFd::new().unwrap().into_fd()).unwrap();
    }

    #[test]
    fn peer_that_blocks_a_writer_later_holds_it_up_once() {
        let event = EventFd::new().unwrap();
        let doorbell = Doorbell::new(event.try_clone().unwrap().into_fd()).unwrap();
        doorbell.ring();
        assert!(event.take().unwrap());
        // Only now it turns hostile.
        // SAFETY: F_SETFL takes an integer.
        let set = unsafe { libc::fcntl(event.as_raw_fd(), libc::F_SETFL, 0) };
        assert_eq!(set, 0);
        let (done, rung) = std::sync::mpsc::channel();
        let fill = |event: &EventFd| {
            let full = (u64::MAX - 1).to_ne_bytes();
            (&event.file).write_all(&full).unwrap();
        };
        fill(&event);
        let ringing = std::thread::spawn(move || {
            doorbell.ring();
            done.send(()).unwrap();
            doorbell
        });
        let deadline = std::time::Duration::from_secs(20);
        rung.recv_timeout(deadline).expect("the writer is let go");
        let doorbell = ringing.join().unwrap();
        let _ = event.take();
        fill(&event);
        doorbell.ring();
        assert!(event.take().unwrap());
        doorbell.ring();
        assert!(!event.take().unwrap(), "it is not rung any more");
    }

    #[test]
    fn descriptor_that_a_peer_made_blocking_and_filled_is_rung_without_blocking() {
        let event = made_blocking();
        let full = (u64::MAX - 1).to_ne_bytes();
        (&event.file).write_all(&full).unwrap();
        ring(&event);
        assert!(event.take().unwrap());
        ring(&event);
        assert!(event.take().unwrap());
    }
}
