//! Locks that keep a second user of an image out.
//!
//! Two ranges of open-file-description locks, which the kernel drops when the last user of
//! the description, requests in flight included, has gone:
//!
//! | bytes | lock | seen by |
//! |---|---|---|
//! | 0 to 99 | exclusive for a writer, shared for a reader | another device-blk, and programs that lock whole files |
//! | 100 + permission, 200 + permission | shared, as in QEMU's `block/file-posix.c` | QEMU, qemu-img, qemu-storage-daemon |
//!
//! QEMU's scheme: who uses a permission holds a shared lock on byte 100 + its bit; who does
//! not let others use it holds one on byte 200 + its bit. After taking its own, each side
//! tests whether the other kind is held by anybody else.
//!
//! A process killed with requests in flight keeps its locks until the kernel has ended them,
//! tens of milliseconds later. Hence [`acquire`] tries for a while: a successor must wait for
//! exactly that.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::ImageError;

/// `RAW_LOCK_PERM_BASE` of QEMU's `block/file-posix.c`.
const PERM_BASE: i64 = 100;
/// `RAW_LOCK_SHARED_BASE` of QEMU's `block/file-posix.c`.
const SHARED_BASE: i64 = 200;
/// Bytes in front of QEMU's that are ours.
const OWN_LEN: i64 = PERM_BASE;

/// `BLK_PERM_*` of QEMU's `include/block/block-common.h`, as bit numbers.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const WRITE_UNCHANGED: i64 = 2;
const RESIZE: i64 = 3;
const ALL_PERMS: [i64; 4] = [CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE];

/// How often a busy lock is tried again: at first, while it is likely a killed process's and a guest
/// waits for its fall, and after [`RECOVERY_TIME`].
const RETRY_INTERVALS: (Duration, Duration) =
    (Duration::from_micros(250), Duration::from_millis(5));
/// Killed processes hold their images for tens of milliseconds; with much memory, hundreds.
const RECOVERY_TIME: Duration = Duration::from_millis(500);

/// Locks `file` as its reader or its only writer, trying for `patience` at most.
///
/// The locks belong to the open file description and last as long as it does.
pub(crate) fn acquire(
    file: &File,
    name: &str,
    read_only: bool,
    patience: Duration,
) -> Result<(), ImageError> {
    let started = Instant::now();
    let give_up = started + patience;
    loop {
        match try_acquire(file, read_only) {
            Ok(None) => return Ok(()),
            Ok(Some(holder)) => {
                release(file);
                if Instant::now() >= give_up {
                    return Err(ImageError::InUse {
                        name: name.to_owned(),
                        holder,
                    });
                }
                let is_early = started.elapsed() < RECOVERY_TIME;
                std::thread::sleep(match is_early {
                    true => RETRY_INTERVALS.0,
                    false => RETRY_INTERVALS.1,
                });
            }
            Err(source) => {
                release(file);
                return Err(match source.raw_os_error() {
                    Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS) => ImageError::NoLocks {
                        name: name.to_owned(),
                        source,
                    },
                    _ => ImageError::Io {
                        name: name.to_owned(),
                        action: "be locked",
                        source,
                    },
                });
            }
        }
    }
}

/// Lets a writer go on as a reader. For an image that becomes the backing image of another.
pub(crate) fn downgrade(file: &File) -> io::Result<()> {
    lock(file, libc::F_UNLCK, PERM_BASE + WRITE, 1)?;
    lock(file, libc::F_RDLCK, 0, OWN_LEN)?;
    Ok(())
}

/// One attempt; `Some` tells who is in the way.
fn try_acquire(file: &File, read_only: bool) -> io::Result<Option<&'static str>> {
    const OURS: &str = "it holds a lock on the whole image, as device-blk does";
    const QEMUS: &str = "it holds QEMU's image lock, as QEMU, qemu-img and device-blk do";

    let own = if read_only {
        libc::F_RDLCK
    } else {
        libc::F_WRLCK
    };
    if !lock(file, own, 0, OWN_LEN)? {
        return Ok(Some(OURS));
    }
    let used: &[i64] = if read_only {
        &[CONSISTENT_READ]
    } else {
        &[CONSISTENT_READ, WRITE]
    };
    let shared = [CONSISTENT_READ, WRITE_UNCHANGED];
    let unshared = || ALL_PERMS.into_iter().filter(|perm| !shared.contains(perm));
    for &perm in used {
        if !lock(file, libc::F_RDLCK, PERM_BASE + perm, 1)? {
            return Ok(Some(QEMUS));
        }
    }
    for perm in unshared() {
        if !lock(file, libc::F_RDLCK, SHARED_BASE + perm, 1)? {
            return Ok(Some(QEMUS));
        }
    }
    for &perm in used {
        if is_held_by_other(file, SHARED_BASE + perm)? {
            return Ok(Some(QEMUS));
        }
    }
    for perm in unshared() {
        if is_held_by_other(file, PERM_BASE + perm)? {
            return Ok(Some(QEMUS));
        }
    }
    Ok(None)
}

/// Gives up every lock of this description.
pub(crate) fn release(file: &File) {
    let unlocked = lock(file, libc::F_UNLCK, 0, 0);
    debug_assert!(
        unlocked.is_ok(),
        "unlocking cannot fail where locking was tried"
    );
}

fn range(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

/// Takes a lock without waiting; false when somebody else's is in the way.
fn lock(file: &File, kind: i32, start: i64, len: i64) -> io::Result<bool> {
    let request = range(kind, start, len);
    // SAFETY: F_OFD_SETLK reads one `struct flock`, which lives across the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &request) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        e if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        e => Err(e),
    }
}

/// Whether another description holds any lock on this byte.
fn is_held_by_other(file: &File, byte: i64) -> io::Result<bool> {
    let mut query = range(libc::F_WRLCK, byte, 1);
    // SAFETY: F_OFD_GETLK reads and writes one `struct flock`, which lives across the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut query) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(query.l_type) != libc::F_UNLCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &std::path::Path, write: bool) -> File {
        std::fs::OpenOptions::new()
            .read(true)
            .write(write)
            .open(path)
            .unwrap()
    }

    #[test]
    fn second_writer_is_refused_and_readers_share() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let now = Duration::ZERO;
        let (a, b) = (open(image.path(), true), open(image.path(), true));
        acquire(&a, "a", false, now).unwrap();
        assert!(matches!(
            acquire(&b, "b", false, now),
            Err(ImageError::InUse { .. })
        ));
        assert!(matches!(
            acquire(&b, "b", true, now),
            Err(ImageError::InUse { .. })
        ));
        drop(a);
        acquire(&b, "b", true, now).unwrap();
        let (c, d) = (open(image.path(), false), open(image.path(), true));
        acquire(&c, "c", true, now).unwrap();
        assert!(matches!(
            acquire(&d, "d", false, now),
            Err(ImageError::InUse { .. })
        ));
    }

    #[test]
    fn refused_attempt_leaves_no_lock_behind() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let now = Duration::ZERO;
        let (a, b) = (open(image.path(), true), open(image.path(), true));
        acquire(&a, "a", true, now).unwrap();
        acquire(&b, "b", false, now).unwrap_err();
        drop(a);
        let c = open(image.path(), true);
        acquire(&c, "c", false, now).unwrap();
    }

    #[test]
    fn lock_is_waited_for() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (open(image.path(), true), open(image.path(), true));
        acquire(&a, "a", false, Duration::ZERO).unwrap();
        let waiter =
            std::thread::spawn(move || acquire(&b, "b", false, Duration::from_secs(20)).map(drop));
        drop(a);
        waiter.join().unwrap().unwrap();
    }
}
