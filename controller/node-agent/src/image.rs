//! Disk images: opening them for a daemon, and making sure that no two machines write one.
//!
//! Two checks guard an image. [`Claims`] knows what this agent's own VMs use, by device and
//! inode, so that links and relative paths do not fool it. [`probe_locks`] asks the kernel about
//! everybody else: a daemon of ours holds a lock on its image as long as requests are in flight,
//! and QEMU and its tools lock the bytes from 100 on.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, Read},
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tonic::Code;

use crate::spec::Format;

/// QEMU's block/file-posix.c: byte 100+n is read-locked by holders of permission n, byte 200+n
/// by those who do not let others have it. Permission 1 is "write".
const QEMU_HOLDS_WRITE: i64 = 101;
const QEMU_FORBIDS_CONSISTENT_READ: i64 = 200;
/// Ghost requests of a killed daemon keep its lock for up to some hundred milliseconds.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(20);
const QCOW2_MAGIC: &[u8; 4] = b"QFI\xfb";
const SECTOR_BYTES: u64 = 512;

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    /// No such file.
    #[error("image {path} does not exist; create it (vmctl volume create, truncate -s 4G) or correct the path", path = .path.display())]
    Missing {
        /// The image.
        path: PathBuf,
    },
    /// It cannot be opened.
    #[error("opening image {path}", path = .path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Neither file nor block device.
    #[error("image {path} is neither a regular file nor a block device", path = .path.display())]
    Kind {
        /// The image.
        path: PathBuf,
    },
    /// Its size is no number of sectors.
    #[error("image {path} has {len_bytes} bytes: a disk needs a multiple of 512, at least 512; enlarge it with truncate -s", path = .path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size.
        len_bytes: u64,
    },
    /// qcow2 given as a raw image.
    #[error("image {path} is in the qcow2 format and was given as a raw one; say format=qcow2, or convert it: qemu-img convert -O raw {path} IMAGE.raw", path = .path.display())]
    Qcow2 {
        /// The image.
        path: PathBuf,
    },
    /// Another VM of this host has it.
    #[error("image {path} is in use by {holder}; stop that first, or attach the image read-only to both", path = .path.display())]
    Claimed {
        /// The image.
        path: PathBuf,
        /// The VM or volume operation that has it.
        holder: String,
    },
    /// Another process has locked it.
    #[error("image {path} is in use: another process{} holds a lock on it; stop that first (lslocks shows it)", .pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default(), path = .path.display())]
    Locked {
        /// The image.
        path: PathBuf,
        /// Known for locks that belong to a process rather than to an open file.
        pid: Option<i32>,
    },
}

impl ImageError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Missing { .. } => Code::NotFound,
            Self::Open { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Code::PermissionDenied
            }
            Self::Open { .. } => Code::FailedPrecondition,
            Self::Kind { .. } | Self::Size { .. } | Self::Qcow2 { .. } => Code::InvalidArgument,
            Self::Claimed { .. } | Self::Locked { .. } => Code::FailedPrecondition,
        }
    }
}

/// Opens an image with a description of its own: the lock that the daemon will take on it belongs
/// to this one incarnation.
///
/// # Errors
/// When it cannot be opened or cannot be a disk.
pub(crate) fn open(path: &Path, read_only: bool, format: Format) -> Result<File, ImageError> {
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        // A FIFO would block the open for ever.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ImageError::Missing {
                path: path.to_owned(),
            },
            _ => ImageError::Open {
                path: path.to_owned(),
                source,
            },
        })?;
    clear_nonblock(&file).map_err(|source| ImageError::Open {
        path: path.to_owned(),
        source,
    })?;
    let len_bytes = disk_len(&file, path)?;
    let is_raw = format == Format::Raw;
    if is_raw && (len_bytes < SECTOR_BYTES || !len_bytes.is_multiple_of(SECTOR_BYTES)) {
        return Err(ImageError::Size {
            path: path.to_owned(),
            len_bytes,
        });
    }
    Ok(file)
}

/// Refuses qcow2 where a person named the file. (A guest may write what it likes into a volume
/// of its own, so volumes are not looked at.)
///
/// # Errors
/// When it is one, or cannot be read.
pub(crate) fn refuse_qcow2(path: &Path, file: &File) -> Result<(), ImageError> {
    let mut magic = [0; QCOW2_MAGIC.len()];
    let read = { file }.read(&mut magic);
    match read {
        Ok(_) if magic == *QCOW2_MAGIC => Err(ImageError::Qcow2 {
            path: path.to_owned(),
        }),
        Ok(_) => Ok(()),
        Err(source) => Err(ImageError::Open {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Refuses an image that another process has locked against our use of it, after giving ghost
/// requests of a killed daemon time to end. Blocks up to two seconds.
///
/// # Errors
/// When it stays locked.
pub(crate) fn probe_locks(path: &Path, file: &File, read_only: bool) -> Result<(), ImageError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        let held = conflicting_lock(file, read_only).map_err(|source| ImageError::Open {
            path: path.to_owned(),
            source,
        })?;
        match held {
            None => return Ok(()),
            Some(_) if Instant::now() < deadline => std::thread::sleep(LOCK_POLL_INTERVAL),
            Some(pid) => {
                return Err(ImageError::Locked {
                    path: path.to_owned(),
                    pid: (pid > 0).then_some(pid),
                });
            }
        }
    }
}

/// io_uring would answer EAGAIN instead of waiting where O_NONBLOCK is set.
fn clear_nonblock(file: &File) -> io::Result<()> {
    // SAFETY: F_SETFL takes an int; the file is open. None of the flags that it can change is wanted.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn conflicting_lock(file: &File, read_only: bool) -> io::Result<Option<i32>> {
    const WHOLE_FILE: (i64, i64) = (0, 0);
    if !read_only {
        // Whoever holds any lock at all reads or writes the image.
        return test_lock(file, libc::F_WRLCK, WHOLE_FILE);
    }
    for (kind, range) in [
        (libc::F_RDLCK, WHOLE_FILE),
        (libc::F_WRLCK, (QEMU_HOLDS_WRITE, 1)),
        (libc::F_WRLCK, (QEMU_FORBIDS_CONSISTENT_READ, 1)),
    ] {
        if let Some(pid) = test_lock(file, kind, range)? {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// The holder of a lock that stands against one of `kind` on `(start, len)`: its pid, or -1 for a
/// lock of an open file description.
fn test_lock(file: &File, kind: i32, (start, len): (i64, i64)) -> io::Result<Option<i32>> {
    let mut lock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: F_OFD_GETLK reads and writes the flock it is given, which lives across the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((lock.l_type != libc::F_UNLCK as i16).then_some(lock.l_pid))
}

fn disk_len(file: &File, path: &Path) -> Result<u64, ImageError> {
    let open_error = |source| ImageError::Open {
        path: path.to_owned(),
        source,
    };
    let metadata = file.metadata().map_err(open_error)?;
    let kind = metadata.file_type();
    if kind.is_file() {
        Ok(metadata.len())
    } else if kind.is_block_device() {
        // A block device's metadata says 0; its end can be sought.
        io::Seek::seek(&mut { file }, io::SeekFrom::End(0))
            .and_then(|len| io::Seek::rewind(&mut { file }).map(|()| len))
            .map_err(open_error)
    } else {
        Err(ImageError::Kind {
            path: path.to_owned(),
        })
    }
}

/// Which images this host's VMs and volume operations have in use. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Claims {
    held: Arc<Mutex<HashMap<ImageId, Vec<Holder>>>>,
}

impl ImageId {
    fn of(metadata: &std::fs::Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            Self::BlockDevice {
                number: metadata.rdev(),
            }
        } else {
            Self::File {
                device: metadata.dev(),
                inode: metadata.ino(),
            }
        }
    }
}

/// Device and inode of a file, or the number of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum ImageId {
    File { device: u64, inode: u64 },
    BlockDevice { number: u64 },
}

#[derive(Debug)]
struct Holder {
    name: String,
    read_only: bool,
    /// The image whose claim this one ends with.
    follows: Option<ImageId>,
}

/// The right to use an image until it is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    claims: Claims,
    image: ImageId,
    holder: String,
}

impl Claims {
    /// Claims an image for `holder` ("VM web"): one writer, or any number of readers.
    ///
    /// # Errors
    /// When another holder stands against it.
    pub(crate) fn claim(
        &self,
        path: &Path,
        file: &File,
        holder: &str,
        read_only: bool,
    ) -> Result<Claim, ImageError> {
        let metadata = file.metadata().map_err(|source| ImageError::Open {
            path: path.to_owned(),
            source,
        })?;
        let image = ImageId::of(&metadata);
        let mut held = self.lock();
        let holders = held.entry(image).or_default();
        if let Some(other) = holders.iter().find(|other| !(read_only && other.read_only)) {
            return Err(ImageError::Claimed {
                path: path.to_owned(),
                holder: other.name.clone(),
            });
        }
        holders.push(Holder {
            name: holder.to_owned(),
            read_only,
            follows: None,
        });
        Ok(Claim {
            claims: self.clone(),
            image,
            holder: holder.to_owned(),
        })
    }

    /// Whoever writes the image at `before` reads it from now on and writes `after` instead, until
    /// its claim ends.
    pub(crate) fn follow(&self, before: &Path, after: &File) {
        let (Ok(before), Ok(after)) = (std::fs::metadata(before), after.metadata()) else {
            return;
        };
        let (before, after) = (ImageId::of(&before), ImageId::of(&after));
        let mut held = self.lock();
        let holders = held.get_mut(&before).map(Vec::as_mut_slice);
        let writer = holders
            .unwrap_or_default()
            .iter_mut()
            .find(|holder| !holder.read_only);
        let Some(writer) = writer else {
            return;
        };
        writer.read_only = true;
        let next = Holder {
            name: writer.name.clone(),
            read_only: false,
            follows: Some(writer.follows.unwrap_or(before)),
        };
        held.entry(after).or_default().push(next);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ImageId, Vec<Holder>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut held = self.claims.lock();
        if let Some(holders) = held.get_mut(&self.image)
            && let Some(index) = holders
                .iter()
                .position(|holder| holder.name == self.holder && holder.follows.is_none())
        {
            holders.swap_remove(index);
        }
        held.retain(|_, holders| {
            holders
                .retain(|holder| holder.follows != Some(self.image) || holder.name != self.holder);
            !holders.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(dir: &Path, len_bytes: u64) -> PathBuf {
        let path = dir.join("disk.raw");
        File::create(&path).unwrap().set_len(len_bytes).unwrap();
        path
    }

    fn ofd_lock(file: &File, kind: i32, (start, len): (i64, i64)) {
        let lock = libc::flock {
            l_type: kind as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: start,
            l_len: len,
            l_pid: 0,
        };
        // SAFETY: F_OFD_SETLK only reads the flock.
        let locked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
        assert_eq!(locked, 0);
    }

    #[test]
    fn file_that_is_no_disk_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let missing = open(&dir.path().join("none"), false, Format::Raw).unwrap_err();
        assert_eq!(missing.code(), Code::NotFound);
        assert!(missing.to_string().contains("none"));
        for len_bytes in [0, 100, 1000] {
            let path = image(dir.path(), len_bytes);
            assert!(
                matches!(
                    open(&path, false, Format::Raw),
                    Err(ImageError::Size { .. })
                ),
                "{len_bytes}"
            );
        }
        assert!(matches!(
            open(dir.path(), true, Format::Raw),
            Err(ImageError::Kind { .. })
        ));
        let path = image(dir.path(), 512);
        std::fs::write(&path, [b"QFI\xfb".as_slice(), &[0; 508]].concat()).unwrap();
        let file = open(&path, false, Format::Raw).unwrap();
        assert!(matches!(
            refuse_qcow2(&path, &file),
            Err(ImageError::Qcow2 { .. })
        ));
    }

    #[test]
    fn image_has_one_writer_or_many_readers() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), 4096);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let (file, linked) = (
            open(&path, false, Format::Raw).unwrap(),
            open(&link, false, Format::Raw).unwrap(),
        );
        let claims = Claims::default();
        let writer = claims.claim(&path, &file, "VM a", false).unwrap();
        let error = claims.claim(&link, &linked, "VM b", true).unwrap_err();
        assert!(error.to_string().contains("VM a"), "{error}");
        drop(writer);
        let _one = claims.claim(&path, &file, "VM a", true).unwrap();
        let _two = claims.claim(&link, &linked, "VM b", true).unwrap();
        assert!(claims.claim(&path, &file, "VM c", false).is_err());
    }

    #[test]
    fn writer_that_goes_on_in_another_image_holds_both() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), 4096);
        let file = open(&path, false, Format::Raw).unwrap();
        let claims = Claims::default();
        let claim = claims.claim(&path, &file, "VM a", false).unwrap();
        let overlays: Vec<(PathBuf, File)> = ["one", "two"]
            .map(|name| dir.path().join(name))
            .map(|path| (path.clone(), File::create(path).unwrap()))
            .into();
        claims.follow(&path, &overlays[0].1);
        claims.follow(&overlays[0].0, &overlays[1].1);
        // What was written before is read by anybody now.
        for (path, file) in [(&path, &file), (&overlays[0].0, &overlays[0].1)] {
            drop(claims.claim(path, file, "VM b", true).unwrap());
            assert!(claims.claim(path, file, "VM b", false).is_err());
        }
        assert!(
            claims
                .claim(&overlays[1].0, &overlays[1].1, "VM b", true)
                .is_err()
        );
        drop(claim);
        assert!(
            claims
                .claim(&overlays[1].0, &overlays[1].1, "VM b", false)
                .is_ok()
        );
        assert!(claims.claim(&path, &file, "VM b", false).is_ok());
    }

    #[test]
    fn lock_of_another_process_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), 4096);
        let (other, ours) = (
            open(&path, false, Format::Raw).unwrap(),
            open(&path, false, Format::Raw).unwrap(),
        );
        assert!(conflicting_lock(&ours, false).unwrap().is_none());
        // QEMU as a writer.
        ofd_lock(&other, libc::F_RDLCK, (QEMU_HOLDS_WRITE, 1));
        assert!(conflicting_lock(&ours, false).unwrap().is_some());
        assert!(conflicting_lock(&ours, true).unwrap().is_some());
        ofd_lock(&other, libc::F_UNLCK, (0, 0));
        // QEMU as a reader.
        ofd_lock(&other, libc::F_RDLCK, (100, 1));
        assert!(conflicting_lock(&ours, false).unwrap().is_some());
        assert!(conflicting_lock(&ours, true).unwrap().is_none());
        ofd_lock(&other, libc::F_UNLCK, (0, 0));
        // A writer that locks all.
        ofd_lock(&other, libc::F_WRLCK, (0, 0));
        assert!(conflicting_lock(&ours, true).unwrap().is_some());
    }
}
