//! The limit: the load on the file itself by io_uring, from one thread and one ring, with nothing
//! in between.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::buffer::Buffer;
use crate::load::{Load, Offsets, Outcome};
use crate::meter::Meter;

/// A request that takes longer means that the disk hangs.
const STALL: Duration = Duration::from_secs(30);

/// Why a run on a file failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It is missing, or does not allow the access that the load needs.
    #[error("cannot open {0}")]
    Open(String, #[source] io::Error),
    /// Not one request fits.
    #[error("{file} has {bytes} bytes, less than one block; make it larger")]
    TooSmall {
        /// Its name.
        file: String,
        /// Its length.
        bytes: u64,
    },
    /// The kernel refuses io_uring, or it has no memory.
    #[error("cannot use io_uring (see the sysctl kernel.io_uring_disabled)")]
    Ring(#[source] io::Error),
    /// A request failed.
    #[error("a request at {offset_bytes} failed")]
    Request {
        /// Its place in the file.
        offset_bytes: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Neither success nor failure.
    #[error("no request completed within {} s", STALL.as_secs())]
    Stalled,
}

/// How the file is accessed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Past the page cache.
    pub direct: bool,
    /// Completions are processed only when they are waited for (IORING_SETUP_DEFER_TASKRUN).
    pub deferred: bool,
}

/// Puts `load` on the file.
///
/// # Errors
/// When the file cannot be used, or a request fails.
pub fn run(file_name: &Path, access: Access, load: &Load) -> Result<Outcome, Error> {
    let file = open(file_name, access.direct, load)?;
    let bytes = file.metadata().map_or(0, |metadata| metadata.len());
    if bytes < load.block_bytes as u64 {
        let file = file_name.display().to_string();
        return Err(Error::TooSmall { file, bytes });
    }
    let buffer = Buffer::new(load.depth, load.block_bytes).map_err(Error::Ring)?;
    let mut runner = Runner::new(&file, &buffer, access, load, bytes)?;
    let outcome = runner.count(load);
    runner.drain()?;
    outcome
}

fn open(name: &Path, direct: bool, load: &Load) -> Result<File, Error> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    OpenOptions::new()
        .read(true)
        .write(load.pattern.writes())
        .custom_flags(flags)
        .open(name)
        .map_err(|error| Error::Open(name.display().to_string(), error))
}

struct Runner<'a> {
    ring: IoUring,
    /// Written and read by requests in flight.
    buffer: &'a Buffer,
    offsets: Offsets,
    /// Offset of each slot's request.
    slots: Vec<u64>,
    writes: bool,
    inflight: usize,
    completed: u64,
}

impl<'a> Runner<'a> {
    fn new(
        file: &File,
        buffer: &'a Buffer,
        access: Access,
        load: &Load,
        bytes: u64,
    ) -> Result<Self, Error> {
        let entries = u32::try_from(load.depth).unwrap_or(u32::MAX);
        let mut builder = IoUring::builder();
        if access.deferred {
            builder.setup_single_issuer().setup_defer_taskrun();
        }
        let ring = builder
            .build(entries.next_power_of_two())
            .map_err(Error::Ring)?;
        ring.submitter()
            .register_files(&[file.as_raw_fd()])
            .map_err(Error::Ring)?;
        Ok(Self {
            ring,
            buffer,
            offsets: Offsets::new(load, bytes, 1),
            slots: vec![0; load.depth],
            writes: load.pattern.writes(),
            inflight: 0,
            completed: 0,
        })
    }

    fn count(&mut self, load: &Load) -> Result<Outcome, Error> {
        for slot in 0..load.depth {
            self.submit(slot)?;
        }
        let mut meter = Meter::start(load, &[]);
        loop {
            self.wait()?;
            for _ in 0..load.depth {
                let Some(slot) = self.reap()? else { break };
                self.submit(slot)?;
            }
            if let Some(outcome) = meter.check(self.completed).map_err(Error::Ring)? {
                return Ok(outcome);
            }
        }
    }

    fn submit(&mut self, slot: usize) -> Result<(), Error> {
        let offset = self.offsets.next_offset();
        self.slots[slot] = offset;
        let entry = self.entry(slot, offset);
        // SAFETY: the buffer and the file outlive the request, since `run` drains the ring before
        // it lets go of them; no two requests in flight share a slot.
        unsafe { self.ring.submission().push(&entry) }
            .map_err(|_| Error::Ring(io::ErrorKind::StorageFull.into()))?;
        self.inflight += 1;
        Ok(())
    }

    fn entry(&self, slot: usize, offset: u64) -> squeue::Entry {
        let (file, start) = (types::Fixed(0), self.buffer.slot(slot));
        let len = u32::try_from(self.buffer.slot_bytes()).unwrap_or(u32::MAX);
        let entry = if self.writes {
            opcode::Write::new(file, start, len).offset(offset).build()
        } else {
            opcode::Read::new(file, start, len).offset(offset).build()
        };
        entry.user_data(slot as u64)
    }

    /// Submits what is queued and waits for a completion.
    fn wait(&mut self) -> Result<(), Error> {
        let deadline = types::Timespec::from(STALL);
        let args = types::SubmitArgs::new().timespec(&deadline);
        match self.ring.submitter().submit_with_args(1, &args) {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => Err(Error::Stalled),
            Err(error) => Err(Error::Ring(error)),
            Ok(_) => Ok(()),
        }
    }

    /// The slot of a request that has completed.
    fn reap(&mut self) -> Result<Option<usize>, Error> {
        let Some(done) = self.ring.completion().next() else {
            return Ok(None);
        };
        self.inflight -= 1;
        let slot = usize::try_from(done.user_data()).unwrap_or(usize::MAX);
        self.verify(&done, slot)?;
        self.completed += 1;
        Ok(Some(slot))
    }

    fn verify(&self, done: &cqueue::Entry, slot: usize) -> Result<(), Error> {
        let source = match done.result() {
            result if result < 0 => io::Error::from_raw_os_error(-result),
            result if result.cast_unsigned() as usize != self.buffer.slot_bytes() => {
                io::ErrorKind::UnexpectedEof.into()
            }
            _ => return Ok(()),
        };
        Err(Error::Request {
            offset_bytes: self.slots[slot],
            source,
        })
    }

    /// Waits until nothing is in flight.
    fn drain(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + STALL;
        let mut first_error = Ok(());
        while self.inflight > 0 {
            if Instant::now() > deadline {
                return Err(Error::Stalled);
            }
            self.wait()?;
            loop {
                match self.reap() {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(error) => first_error = first_error.and(Err(error)),
                }
            }
        }
        first_error
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Pattern;

    fn load(pattern: Pattern, depth: usize) -> Load {
        Load {
            pattern,
            block_bytes: 4096,
            depth,
            warm_up: Duration::ZERO,
            duration: Duration::from_millis(20),
        }
    }

    fn scratch(bytes: usize) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, vec![0; bytes]).unwrap();
        file
    }

    #[test]
    fn a_file_is_read_and_written() {
        let file = scratch(1 << 20);
        let read = run(file.path(), Access::default(), &load(Pattern::Randread, 8)).unwrap();
        assert!(read.ios > 0 && read.iops > 0.0, "{read:?}");
        assert_eq!(read.daemon_cpu_seconds, None);
        assert!(std::fs::read(&file).unwrap().iter().all(|&byte| byte == 0));
        let deferred = Access {
            deferred: true,
            ..Access::default()
        };
        run(file.path(), deferred, &load(Pattern::Write, 3)).unwrap();
        assert!(std::fs::read(&file).unwrap()[..4096] != [0; 4096]);
    }

    #[test]
    fn a_file_without_a_block_is_refused() {
        let file = scratch(100);
        let error = run(file.path(), Access::default(), &load(Pattern::Randread, 1)).unwrap_err();
        assert!(
            matches!(error, Error::TooSmall { bytes: 100, .. }),
            "{error}"
        );
    }
}
