//! Removing the socket files of a process that fails when it may not do so itself any more.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork, pipe2};

use super::SocketFile;

/// A process of its own that waits for the start of this one to succeed, and removes its socket
/// files if it fails. It has nothing open but the pipe over which it hears of that.
#[derive(Debug)]
pub struct Sweeper {
    served: File,
}

impl Sweeper {
    /// Call it when all is bound, before the process is confined, while it has a single thread.
    ///
    /// # Errors
    /// No pipe or no process to be had.
    pub fn start<'a>(files: impl IntoIterator<Item = &'a SocketFile>) -> io::Result<Self> {
        let files: Vec<_> = files.into_iter().map(SocketFile::again).collect();
        let started = Self::fork_twice(&files);
        // Here they are only copies.
        files.into_iter().for_each(std::mem::forget);
        started
    }

    /// Through a process in between, so that this one need not wait for the sweeper's end.
    fn fork_twice(files: &[SocketFile]) -> io::Result<Self> {
        let (hears, served) = pipe2(OFlag::O_CLOEXEC)?;
        // SAFETY: the process has a single thread, so the child may do what its parent could.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => {
                drop(hears);
                while waitpid(child, None) == Err(nix::errno::Errno::EINTR) {}
                Ok(Self {
                    served: File::from(served),
                })
            }
            ForkResult::Child => {
                drop(served);
                // SAFETY: as above.
                if let Ok(ForkResult::Child) = unsafe { fork() } {
                    sweep(hears, files);
                }
                // SAFETY: ends the process without running what is its parent's at exit.
                unsafe { libc::_exit(0) }
            }
        }
    }

    /// The process serves: the files stay.
    pub fn dismiss(mut self) {
        // A sweeper that is gone removes nothing either.
        let _ = self.served.write_all(&[1]);
    }
}

fn sweep(hears: OwnedFd, files: &[SocketFile]) {
    // What ends the process by its group must not leave its files.
    for ignored in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        // SAFETY: ignoring a signal installs no code.
        let _ = unsafe { signal(ignored, SigHandler::SigIgn) };
    }
    // Sockets, images and their locks are not held a moment longer for it.
    let fd = hears.as_raw_fd() as libc::c_uint;
    for (first, last) in [(0, fd.checked_sub(1)), (fd + 1, Some(libc::c_uint::MAX))] {
        if let Some(last) = last {
            // SAFETY: closes descriptors that nothing here uses.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
    let heard = File::from(hears).read(&mut [0]);
    if matches!(heard, Ok(0)) {
        files.iter().for_each(SocketFile::remove);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::listen::unix;

    #[test]
    fn sweeper_removes_the_files_of_a_start_that_fails() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = unix(&path).unwrap();
        let sweeper = Sweeper::start(listener.socket_file()).unwrap();
        assert!(path.exists());
        drop(sweeper);
        let give_up = Instant::now() + Duration::from_secs(20);
        while path.exists() {
            assert!(Instant::now() < give_up, "the file stays");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn file_of_another_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = unix(&path).unwrap();
        let sweeper = Sweeper::start(listener.socket_file()).unwrap();
        // Else the next socket may get the same inode within the clock's tick.
        std::fs::hard_link(&path, dir.path().join("kept")).unwrap();
        drop(listener);
        let again = unix(&path).unwrap();
        let second = dir.path().join("t");
        let witness = unix(&second).unwrap();
        let after = Sweeper::start(witness.socket_file()).unwrap();
        drop(sweeper);
        drop(after);
        let give_up = Instant::now() + Duration::from_secs(20);
        while second.exists() {
            assert!(Instant::now() < give_up, "the file stays");
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(path.exists());
        drop(again);
    }
}
