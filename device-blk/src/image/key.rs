//! Reading a disk's passphrase from the descriptor that it was passed by.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use luks::{Passphrase, PassphraseError};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Who passes a pipe has written it already, or does so at once.
const PATIENCE: Duration = Duration::from_secs(10);

/// Reads the passphrase once, to the end of a pipe or socket, or all of a file, and closes `fd`.
///
/// # Errors
/// It is empty or too long, cannot be read, or does not end in time.
pub(crate) fn read(fd: OwnedFd) -> Result<Passphrase, PassphraseError> {
    Passphrase::read(Patient::new(fd).map_err(PassphraseError::Io)?)
}

/// Reads what is no secret the same way, `max_bytes` at most.
///
/// # Errors
/// It is too long, cannot be read, or does not end in time.
pub(crate) fn read_bytes(fd: OwnedFd, max_bytes: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    Patient::new(fd)?
        .take(max_bytes as u64 + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() > max_bytes {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("more than {max_bytes} bytes"),
        ));
    }
    Ok(bytes)
}

/// Waits no longer than until `give_up`.
struct Patient {
    file: File,
    give_up: Instant,
}

impl Patient {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        let mut file = File::from(fd);
        // A memfd that was just written stands at its end; a pipe stands nowhere.
        match file.rewind() {
            Err(error) if error.raw_os_error() != Some(libc::ESPIPE) => return Err(error),
            _ => {}
        }
        let give_up = Instant::now() + PATIENCE;
        Ok(Self { file, give_up })
    }
}

impl Read for Patient {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = self.give_up.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let mut polls = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polls, timeout)? {
            0 => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "nobody closed its other end; write the key and close it",
            )),
            _ => self.file.read(into),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn pipes_and_files_are_read_whole() {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"key\n").unwrap();
        drop(writer);
        assert_eq!(read(reader.into()).unwrap().as_bytes(), b"key\n");

        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"file").unwrap();
        assert_eq!(read(file.into()).unwrap().as_bytes(), b"file");
    }

    #[test]
    fn pipe_that_nobody_closes_is_given_up() {
        let (reader, _writer) = io::pipe().unwrap();
        let mut patient = Patient {
            file: File::from(OwnedFd::from(reader)),
            give_up: Instant::now() + Duration::from_millis(20),
        };
        let error = patient.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
