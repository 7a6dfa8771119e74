//! Verified disk I/O past the page cache.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::{self, File, OpenOptions};
use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use guest::pattern::{BLOCK_LEN, fill, first_mismatch};
use guest::report::Report;

use crate::system::wait_for;

const CHUNK_LEN: usize = 16 * BLOCK_LEN;
/// What is discarded and zeroed, behind the pattern.
const SPARE_LEN: u64 = 256 << 10;

mod ioctl {
    use nix::{ioctl_write_ptr_bad, request_code_none};

    // linux/fs.h; both take a range as two 64-bit numbers.
    ioctl_write_ptr_bad!(discard, request_code_none!(0x12, 119), [u64; 2]);
    ioctl_write_ptr_bad!(zero_out, request_code_none!(0x12, 127), [u64; 2]);
}

/// Writes the pattern from all CPUs at once, flushes, reads back; then discards and zeroes a range
/// behind it, where the device offers that.
pub(crate) fn write_and_verify(device: &str, seed: u64, bytes: u64) -> Report {
    check(device, bytes, |disk| {
        disk.each_chunk(bytes, |file, offset, chunk| {
            fill(seed, offset / BLOCK_LEN as u64, chunk);
            file.write_all_at(chunk, offset)
                .map_err(|error| format!("write at {offset}: {error}"))
        })?;
        disk.file
            .sync_all()
            .map_err(|error| format!("flush: {error}"))?;
        disk.compare(seed, bytes)?;
        disk.discarded = disk.discard_spare(bytes)?;
        disk.zeroed = disk.zero_spare(bytes)?;
        Ok(())
    })
}

/// Reads and compares only.
pub(crate) fn verify(device: &str, seed: u64, bytes: u64) -> Report {
    check(device, bytes, |disk| disk.compare(seed, bytes))
}

/// A disk past the page cache, which has room for `bytes`.
pub(crate) fn open_direct(device: &str, bytes: u64, writable: bool) -> Result<File, String> {
    let disk = Disk::open(device, bytes)?;
    match disk.attribute("ro") == "1" && writable {
        true => Err(format!("{device} is read-only")),
        false => Ok(disk.file),
    }
}

fn check(device: &str, bytes: u64, work: impl FnOnce(&mut Disk) -> Result<(), String>) -> Report {
    let started = Instant::now();
    let mut disk = match Disk::open(device, bytes) {
        Ok(disk) => disk,
        Err(error) => {
            return Report::Disk {
                device: device.to_owned(),
                bytes: 0,
                serial: String::new(),
                discarded: false,
                zeroed: false,
                elapsed_ms: 0,
                error: Some(error),
            };
        }
    };
    let error = work(&mut disk).err();
    Report::Disk {
        device: device.to_owned(),
        bytes: if error.is_none() { bytes } else { 0 },
        serial: disk.attribute("serial"),
        discarded: disk.discarded,
        zeroed: disk.zeroed,
        elapsed_ms: started.elapsed().as_millis() as u64,
        error,
    }
}

struct Disk {
    name: String,
    file: File,
    size_bytes: u64,
    discarded: bool,
    zeroed: bool,
}

impl Disk {
    fn open(name: &str, bytes: u64) -> Result<Self, String> {
        let path = Path::new("/dev").join(name);
        wait_for(&format!("/dev/{name}"), Duration::from_secs(20), || {
            path.exists()
        })?;
        let attribute = |file: &str| fs::read_to_string(format!("/sys/block/{name}/{file}"));
        let read_only = attribute("ro").is_ok_and(|text| text.trim() == "1");
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_DIRECT)
            .open(&path)
            .map_err(|error| format!("cannot open /dev/{name}: {error}"))?;
        let sectors: u64 = attribute("size")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0);
        let size_bytes = sectors * 512;
        if bytes == 0 || bytes > size_bytes || !bytes.is_multiple_of(BLOCK_LEN as u64) {
            return Err(format!(
                "{bytes} bytes do not fit the {size_bytes} bytes of {name}"
            ));
        }
        Ok(Self {
            name: name.to_owned(),
            file,
            size_bytes,
            discarded: false,
            zeroed: false,
        })
    }

    fn compare(&self, seed: u64, bytes: u64) -> Result<(), String> {
        self.each_chunk(bytes, |file, offset, chunk| {
            file.read_exact_at(chunk, offset)
                .map_err(|error| format!("read at {offset}: {error}"))?;
            match first_mismatch(seed, offset / BLOCK_LEN as u64, chunk) {
                Some(block) => Err(format!("block {block} does not hold what was written")),
                None => Ok(()),
            }
        })
    }

    /// Calls `io` for each chunk; every CPU takes its share, so that every queue is used.
    fn each_chunk(
        &self,
        bytes: u64,
        io: impl Fn(&File, u64, &mut [u8]) -> Result<(), String> + Sync,
    ) -> Result<(), String> {
        let workers = thread::available_parallelism().map_or(1, usize::from) as u64;
        thread::scope(|scope| {
            let io = &io;
            let threads: Vec<_> = (0..workers)
                .map(|worker| {
                    scope.spawn(move || {
                        let mut buffer = Aligned::new(CHUNK_LEN);
                        let mut offset = worker * CHUNK_LEN as u64;
                        while offset < bytes {
                            let len = (bytes - offset).min(CHUNK_LEN as u64) as usize;
                            io(&self.file, offset, &mut buffer[..len])?;
                            offset += workers * CHUNK_LEN as u64;
                        }
                        Ok(())
                    })
                })
                .collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().unwrap_or_else(|_| Err("panicked".into())))
        })
    }

    /// Discards the spare range; `Ok(false)` if the device doesn't offer it or has no room.
    /// What the range reads as afterwards is the device's choice (Virtio 1.2 section 5.2.6.2).
    fn discard_spare(&self, after: u64) -> Result<bool, String> {
        let Some(start) = self.spare(after, "discard_max_bytes") else {
            return Ok(false);
        };
        discard(&self.file, [start, SPARE_LEN])?;
        Ok(true)
    }

    /// Fills the spare range, zeroes it and expects zeroes; `Ok(false)` if the device doesn't
    /// offer it or has no room.
    fn zero_spare(&self, after: u64) -> Result<bool, String> {
        let Some(start) = self.spare(after, "write_zeroes_max_bytes") else {
            return Ok(false);
        };
        let mut buffer = Aligned::new(SPARE_LEN as usize);
        buffer.fill(0xa5);
        let at = |what: &str, error: std::io::Error| format!("{what} of the spare range: {error}");
        self.file
            .write_all_at(&buffer, start)
            .map_err(|error| at("write", error))?;
        zero_out(&self.file, [start, SPARE_LEN])?;
        self.file
            .read_exact_at(&mut buffer, start)
            .map_err(|error| at("read", error))?;
        match buffer.iter().all(|byte| *byte == 0) {
            true => Ok(true),
            false => Err("a range that was zeroed does not read as zeroes".into()),
        }
    }

    /// Where the spare range starts, if the device has the limit and the room.
    fn spare(&self, after: u64, limit: &str) -> Option<u64> {
        let start = after.next_multiple_of(SPARE_LEN);
        let offered = self
            .attribute(&format!("queue/{limit}"))
            .parse()
            .unwrap_or(0_u64)
            > 0;
        (offered && start + SPARE_LEN <= self.size_bytes).then_some(start)
    }

    fn attribute(&self, file: &str) -> String {
        let text = fs::read_to_string(format!("/sys/block/{}/{file}", self.name));
        text.unwrap_or_default().trim().to_owned()
    }
}

fn discard(file: &File, range: [u64; 2]) -> Result<(), String> {
    // SAFETY: the kernel reads two numbers from the array, which lives through the call.
    let result = unsafe { ioctl::discard(file.as_raw_fd(), &raw const range) };
    result
        .map(drop)
        .map_err(|error| format!("discard: {error}"))
}

pub(crate) fn zero_out(file: &File, range: [u64; 2]) -> Result<(), String> {
    // SAFETY: the kernel reads two numbers from the array, which lives through the call.
    let result = unsafe { ioctl::zero_out(file.as_raw_fd(), &raw const range) };
    result
        .map(drop)
        .map_err(|error| format!("write zeroes: {error}"))
}

/// Memory as `O_DIRECT` wants it.
pub(crate) struct Aligned {
    start: *mut u8,
    layout: Layout,
}

impl Aligned {
    pub(crate) fn new(len: usize) -> Self {
        assert!(len > 0, "a buffer of nothing");
        let layout =
            Layout::from_size_align(len, BLOCK_LEN).expect("a block's length is a power of two");
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout) };
        assert!(
            !start.is_null(),
            "the guest has no memory for a buffer of {len} bytes"
        );
        Self { start, layout }
    }
}

impl Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start` has `layout.size()` initialised bytes that only `self` reaches.
        unsafe { std::slice::from_raw_parts(self.start, self.layout.size()) }
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.layout.size()) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.start, self.layout) };
    }
}
