//! Locks that keep a second user of an image out.
//!
//! Two ranges of open-file-description locks, which the kernel drops when the last user of
//! the description, requests in flight included, has gone:
//!
//! | bytes | lock | seen by |
//! |---|---|---|
//! | 0 to 99 | exclusive for a writer, shared for a reader | another device-blk, and programs that lock whole files |
//! | 100 + permission, 200 + permission | shared, as in QEMU's `block/file-posix.c` | QEMU, qemu-img, qemu-storage-daemon |
//! | far behind, one of each [`Attachment`] | shared | the next daemon of the same disk |
//!
//! QEMU's scheme: who uses a permission holds a shared lock on byte 100 + its bit; who does
//! not let others use it holds one on byte 200 + its bit. After taking its own, each side
//! tests whether the other kind is held by anybody else.
//!
//! A process killed with requests in flight keeps its locks until the kernel has ended them,
//! tens of milliseconds later. Hence [`acquire`] tries for a while: a successor must wait for
//! exactly that. Where only shared locks are possible, for read-only disks and backing files, the
//! last locks tell: who takes over a disk waits until nobody else holds its byte ([`fence`]).

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

/// From here on each disk has a byte of its own.
const ATTACHMENT_BASE: i64 = 1 << 40;

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
                pause(started);
            }
            Err(source) => {
                release(file);
                return Err(refusal(name, source));
            }
        }
    }
}

/// Before another attempt of a wait that began at `started`.
fn pause(started: Instant) {
    let (early, late) = RETRY_INTERVALS;
    let is_early = started.elapsed() < RECOVERY_TIME;
    std::thread::sleep(if is_early { early } else { late });
}

fn refusal(name: &str, source: io::Error) -> ImageError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS) => {
            ImageError::NoLocks { name, source }
        }
        _ => ImageError::Io {
            name,
            action: "be locked",
            source,
        },
    }
}

/// A disk as frontends know it: the same for all daemons that serve it one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attachment(u64);

impl Attachment {
    /// Of the disk whose frontends connect to the socket of this name. Names of two disks of which
    /// one is served have the same number once in 2^61.
    pub(crate) fn at(socket_name: &[u8]) -> Self {
        // Fowler, Noll, Vo: the same in every build of this program, as it must be.
        let hash = socket_name
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
            });
        Self(hash)
    }

    fn byte(self) -> i64 {
        ATTACHMENT_BASE + (self.0 >> 3) as i64
    }
}

/// Waits for `patience` at most until the requests of an earlier daemon of this disk no longer use
/// `file`, and from now on keeps its successors waiting.
///
/// Unlike the lock of a writer this works for files that many disks read.
pub(crate) fn fence(
    file: &File,
    name: &str,
    attachment: Attachment,
    patience: Duration,
) -> Result<(), ImageError> {
    const GHOSTS: &str = "requests of the last daemon of this disk still run on it";
    let refused = |source| refusal(name, source);
    let byte = attachment.byte();
    keep_waiting(file, name, attachment)?;
    let started = Instant::now();
    while is_held_by_other(file, byte).map_err(refused)? {
        if started.elapsed() >= patience {
            return Err(ImageError::InUse {
                name: name.to_owned(),
                holder: GHOSTS,
            });
        }
        pause(started);
    }
    Ok(())
}

/// As [`fence`], of a file that becomes part of the disk while this daemon serves it: the ghosts in question
/// are its own.
pub(crate) fn keep_waiting(
    file: &File,
    name: &str,
    attachment: Attachment,
) -> Result<(), ImageError> {
    // A shared lock is in no other one's way.
    let locked = lock(file, libc::F_RDLCK, attachment.byte(), 1);
    locked.map(drop).map_err(|source| refusal(name, source))
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

/// Gives up every lock of this description but that of [`fence`].
pub(crate) fn release(file: &File) {
    let unlocked = lock(file, libc::F_UNLCK, 0, ATTACHMENT_BASE);
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
    fn successor_of_a_reader_waits_and_other_readers_do_not() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let now = Duration::ZERO;
        let (disk, other) = (Attachment::at(b"/run/a.vu"), Attachment::at(b"/run/b.vu"));
        let [old, next, third] = [(); 3].map(|()| open(image.path(), false));
        for (file, attachment) in [(&old, disk), (&third, other)] {
            fence(file, "a", attachment, now).unwrap();
            acquire(file, "a", true, now).unwrap();
        }
        let early = fence(&next, "a", disk, now);
        assert!(matches!(early, Err(ImageError::InUse { .. })), "{early:?}");
        // Locks of the whole file that are given up leave the fence where it is.
        release(&old);
        assert!(fence(&next, "a", disk, now).is_err());
        let waiter =
            std::thread::spawn(move || fence(&next, "a", disk, Duration::from_secs(20)).map(drop));
        drop(old);
        waiter.join().unwrap().unwrap();
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
