//! The host's pool of volumes: raw files in STATE_DIR/volumes. A volume appears under its name
//! only when it is complete and durable.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::watch;
use tonic::Code;

use crate::{
    image::{self, Claims, ImageError},
    record::{self, RecordError},
};

const SECTOR_BYTES: u64 = 512;
/// ext4's largest file with 4 KiB blocks is 16 TiB; leave the file system the last word below that.
const MAX_VOLUME_BYTES: u64 = 16 << 40;
/// Copied between two reports of progress.
const COPY_CHUNK_BYTES: u64 = 16 << 20;

/// Why a volume cannot be made or removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    /// No number of sectors.
    #[error(
        "volume {id:?}: the size must be a multiple of 512 bytes, at least 512 and at most 16 TiB, not {size_bytes}"
    )]
    Size {
        /// The volume.
        id: String,
        /// As asked for.
        size_bytes: u64,
    },
    /// The source does not fit.
    #[error(
        "volume {id:?}: {size_bytes} bytes are too small for the source of {source_bytes} bytes; ask for at least that, or for 0 to take its size"
    )]
    TooSmall {
        /// The volume.
        id: String,
        /// As asked for.
        size_bytes: u64,
        /// Of the source.
        source_bytes: u64,
    },
    /// Another one of this name.
    #[error(
        "volume {id:?} exists already with {size_bytes} bytes; choose another name or delete it"
    )]
    Exists {
        /// The volume.
        id: String,
        /// Its size.
        size_bytes: u64,
    },
    /// A VM has it.
    #[error("volume {id:?} is attached to VM {vm:?}; delete the VM or detach the volume first")]
    Attached {
        /// The volume.
        id: String,
        /// The VM.
        vm: String,
    },
    /// The source, or the volume itself, is in use or not usable.
    #[error("volume {id:?}")]
    Image {
        /// The volume.
        id: String,
        /// What is wrong.
        #[source]
        source: ImageError,
    },
    /// The disk is full.
    #[error("volume {id:?}: no space left in {dir} ({free_mib} MiB are free); delete volumes or ask for less", dir = .dir.display())]
    NoSpace {
        /// The volume.
        id: String,
        /// The pool.
        dir: PathBuf,
        /// What is left.
        free_mib: u64,
    },
    /// A file could not be handled.
    #[error("volume {id:?}: {action}")]
    Io {
        /// The volume.
        id: String,
        /// What was done.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The directory could not be synced.
    #[error(transparent)]
    Sync(#[from] RecordError),
    /// The pool cannot be opened.
    #[error("opening the pool {dir}", dir = .dir.display())]
    Pool {
        /// The pool.
        dir: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl VolumeError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Size { .. } | Self::TooSmall { .. } => Code::InvalidArgument,
            Self::Exists { .. } => Code::AlreadyExists,
            Self::Attached { .. } => Code::FailedPrecondition,
            Self::Image { source, .. } => source.code(),
            Self::NoSpace { .. } => Code::ResourceExhausted,
            Self::Io { .. } | Self::Sync(_) | Self::Pool { .. } => Code::Internal,
        }
    }
}

/// What is to be made.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// A checked name.
    pub(crate) id: String,
    /// 0 for the source's.
    pub(crate) size_bytes: u64,
    /// Raw image to copy.
    pub(crate) source: Option<PathBuf>,
    /// Reserve all blocks.
    pub(crate) preallocate: bool,
}

/// A volume, complete or on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    /// Its name.
    pub(crate) id: String,
    /// Its size.
    pub(crate) size_bytes: u64,
    /// Bytes of the source that were copied, while it is being made.
    pub(crate) creating: Option<u64>,
}

/// The pool. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Pool {
    dir: PathBuf,
    claims: Claims,
    creating: Arc<Mutex<HashMap<String, Arc<Creation>>>>,
}

/// A volume on its way.
#[derive(Debug)]
struct Creation {
    size_bytes: AtomicU64,
    copied_bytes: AtomicU64,
    /// Closed when it is over, however it ended.
    over: watch::Receiver<()>,
}

impl Pool {
    /// Opens STATE_DIR/volumes; what a dead agent left half-made is removed.
    ///
    /// # Errors
    /// When it cannot be created or read.
    pub(crate) fn open(state_dir: &Path, claims: Claims) -> Result<Self, VolumeError> {
        let dir = state_dir.join("volumes");
        let prepare = || {
            fs::create_dir_all(&dir)?;
            for entry in fs::read_dir(&dir)? {
                let path = entry?.path();
                if path.extension().is_some_and(|extension| extension == "tmp") {
                    fs::remove_file(path)?;
                }
            }
            Ok(())
        };
        prepare().map_err(|source| VolumeError::Pool {
            dir: dir.clone(),
            source,
        })?;
        Ok(Self {
            dir,
            claims,
            creating: Arc::default(),
        })
    }

    /// Where a volume is once it is complete.
    pub(crate) fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.raw"))
    }

    /// All volumes, by name.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub(crate) fn list(&self) -> Result<Vec<Volume>, VolumeError> {
        let error = |source| VolumeError::Pool {
            dir: self.dir.clone(),
            source,
        };
        let mut volumes: Vec<Volume> = self
            .lock()
            .iter()
            .map(|(id, creation)| Volume {
                id: id.clone(),
                size_bytes: creation.size_bytes.load(Ordering::Relaxed),
                creating: Some(creation.copied_bytes.load(Ordering::Relaxed)),
            })
            .collect();
        for entry in fs::read_dir(&self.dir).map_err(error)? {
            let entry = entry.map_err(error)?;
            let name = entry.file_name();
            let Some(id) = name.to_str().and_then(|name| name.strip_suffix(".raw")) else {
                continue;
            };
            // One that was just completed is still among those being made.
            volumes.retain(|volume| volume.id != id);
            volumes.push(Volume {
                id: id.to_owned(),
                size_bytes: entry.metadata().map_err(error)?.len(),
                creating: None,
            });
        }
        volumes.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(volumes)
    }

    /// Makes a volume, or waits for the one that is being made under this name.
    ///
    /// # Errors
    /// When it cannot be made; nothing is left of it then.
    pub(crate) async fn create(&self, request: Request) -> Result<Volume, VolumeError> {
        loop {
            if let Some(volume) = self.existing(&request)? {
                return Ok(volume);
            }
            let (over_sender, over) = watch::channel(());
            let creation = Arc::new(Creation {
                size_bytes: AtomicU64::new(request.size_bytes),
                copied_bytes: AtomicU64::new(0),
                over,
            });
            let other = {
                let mut creating = self.lock();
                let other = creating.get(&request.id).cloned();
                if other.is_none() {
                    creating.insert(request.id.clone(), creation.clone());
                }
                other
            };
            if let Some(other) = other {
                let _ = other.over.clone().changed().await;
                continue;
            }
            let pool = self.clone();
            // Goes on when the caller hangs up; the same request finds it again.
            let making = tokio::task::spawn_blocking(move || {
                let made = pool.make(&request, &creation);
                pool.lock().remove(&request.id);
                drop(over_sender);
                made
            });
            return making
                .await
                .unwrap_or_else(|panic| panic!("making a volume: {panic}"));
        }
    }

    /// Removes a volume. One that is not there is no error.
    ///
    /// # Errors
    /// When a VM or a copy uses it.
    pub(crate) fn delete(&self, id: &str) -> Result<(), VolumeError> {
        let path = self.path(id);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            opened => opened.map_err(io_error(id, "opening it"))?,
        };
        let image = |source| VolumeError::Image {
            id: id.to_owned(),
            source,
        };
        let _claim = self
            .claims
            .claim(&path, &file, "a deletion", false)
            .map_err(image)?;
        image::probe_locks(&path, &file, false).map_err(image)?;
        fs::remove_file(&path).map_err(io_error(id, "removing it"))?;
        record::sync_dir(&self.dir)?;
        Ok(())
    }

    fn existing(&self, request: &Request) -> Result<Option<Volume>, VolumeError> {
        let size_bytes = match fs::metadata(self.path(&request.id)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            found => found.map_err(io_error(&request.id, "looking at it"))?.len(),
        };
        if request.size_bytes != 0 && request.size_bytes != size_bytes {
            return Err(VolumeError::Exists {
                id: request.id.clone(),
                size_bytes,
            });
        }
        Ok(Some(Volume {
            id: request.id.clone(),
            size_bytes,
            creating: None,
        }))
    }

    fn make(&self, request: &Request, creation: &Creation) -> Result<Volume, VolumeError> {
        let temporary = self.dir.join(format!("{}.tmp", request.id));
        let made = self
            .fill(&temporary, request, creation)
            .and_then(|size_bytes| {
                fs::rename(&temporary, self.path(&request.id))
                    .map_err(io_error(&request.id, "naming it"))?;
                record::sync_dir(&self.dir)?;
                Ok(Volume {
                    id: request.id.clone(),
                    size_bytes,
                    creating: None,
                })
            });
        if made.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        made.map_err(|error| self.explain_full_disk(error))
    }

    fn fill(
        &self,
        temporary: &Path,
        request: &Request,
        creation: &Creation,
    ) -> Result<u64, VolumeError> {
        let id = &request.id;
        let source = request
            .source
            .as_deref()
            .map(|path| self.open_source(id, path))
            .transpose()?;
        let source_bytes = source.as_ref().map_or(0, |source| source.len_bytes);
        let size_bytes = if request.size_bytes == 0 {
            source_bytes
        } else {
            request.size_bytes
        };
        if !(SECTOR_BYTES..=MAX_VOLUME_BYTES).contains(&size_bytes)
            || !size_bytes.is_multiple_of(SECTOR_BYTES)
        {
            return Err(VolumeError::Size {
                id: id.clone(),
                size_bytes,
            });
        }
        if size_bytes < source_bytes {
            return Err(VolumeError::TooSmall {
                id: id.clone(),
                size_bytes,
                source_bytes,
            });
        }
        creation.size_bytes.store(size_bytes, Ordering::Relaxed);
        let volume = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(temporary)
            .map_err(io_error(id, "creating it"))?;
        volume
            .set_len(size_bytes)
            .map_err(io_error(id, "sizing it"))?;
        if request.preallocate {
            nix::fcntl::fallocate(
                &volume,
                nix::fcntl::FallocateFlags::empty(),
                0,
                size_bytes as i64,
            )
            .map_err(|errno| io_error(id, "reserving its blocks")(errno.into()))?;
        }
        if let Some(source) = source {
            copy_data(&source.file, &volume, source_bytes, &creation.copied_bytes)
                .map_err(io_error(id, "copying the source"))?;
        }
        volume.sync_all().map_err(io_error(id, "syncing it"))?;
        Ok(size_bytes)
    }

    fn open_source(&self, id: &str, path: &Path) -> Result<Source, VolumeError> {
        let open = || {
            let file = image::open(path, true)?;
            image::refuse_qcow2(path, &file)?;
            let claim = self
                .claims
                .claim(path, &file, "a copy into a volume", true)?;
            image::probe_locks(path, &file, true)?;
            Ok((file, claim))
        };
        let (mut file, claim) = open().map_err(|source| VolumeError::Image {
            id: id.to_owned(),
            source,
        })?;
        // A block device's metadata has no length.
        let len_bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0))
            .map_err(io_error(id, "measuring the source"))?;
        Ok(Source {
            file,
            len_bytes,
            _claim: claim,
        })
    }

    fn explain_full_disk(&self, error: VolumeError) -> VolumeError {
        match error {
            VolumeError::Io { id, source, .. } if is_full(&source) => {
                let free_mib = nix::sys::statvfs::statvfs(&self.dir).map_or(0, |stat| {
                    (stat.blocks_available() * stat.fragment_size()) >> 20
                });
                VolumeError::NoSpace {
                    id,
                    dir: self.dir.clone(),
                    free_mib,
                }
            }
            other => other,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Creation>>> {
        self.creating.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An image that is copied, and the claim that keeps writers off meanwhile.
struct Source {
    file: File,
    len_bytes: u64,
    _claim: image::Claim,
}

/// Copies what is not a hole, by reference where the file system can.
fn copy_data(source: &File, target: &File, len_bytes: u64, copied: &AtomicU64) -> io::Result<()> {
    let mut at = 0;
    while at < len_bytes {
        let Some(data) = seek(source, at, libc::SEEK_DATA)? else {
            break;
        };
        let hole = seek(source, data, libc::SEEK_HOLE)?
            .unwrap_or(len_bytes)
            .min(len_bytes);
        at = data;
        while at < hole {
            copied.store(at, Ordering::Relaxed);
            at += copy_chunk(source, target, at, (hole - at).min(COPY_CHUNK_BYTES))?;
        }
    }
    copied.store(len_bytes, Ordering::Relaxed);
    Ok(())
}

fn copy_chunk(source: &File, target: &File, at: u64, len_bytes: u64) -> io::Result<u64> {
    let (mut from, mut to) = (at as i64, at as i64);
    // SAFETY: copy_file_range reads and writes the two offsets, which live across the call.
    let copied = unsafe {
        libc::copy_file_range(
            source.as_raw_fd(),
            &mut from,
            target.as_raw_fd(),
            &mut to,
            len_bytes as usize,
            0,
        )
    };
    match copied {
        1.. => return Ok(copied as u64),
        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
        _ => {}
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // Block devices, and file systems that copy only within themselves.
        Some(libc::EINVAL | libc::EXDEV | libc::EOPNOTSUPP | libc::ENOSYS) => {
            copy_by_hand(source, target, at, len_bytes)
        }
        _ => Err(error),
    }
}

fn copy_by_hand(source: &File, target: &File, at: u64, len_bytes: u64) -> io::Result<u64> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; len_bytes.min(1 << 20) as usize];
    let read = source.read_at(&mut buffer, at)?;
    if read == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    target.write_all_at(&buffer[..read], at)?;
    Ok(read as u64)
}

/// `None` beyond the last data.
fn seek(file: &File, at: u64, whence: i32) -> io::Result<Option<u64>> {
    // SAFETY: lseek takes its arguments by value.
    let found = unsafe { libc::lseek(file.as_raw_fd(), at as i64, whence) };
    if found >= 0 {
        return Ok(Some(found as u64));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENXIO) => Ok(None),
        // A file that cannot tell is all data.
        Some(libc::EINVAL) => Ok((whence == libc::SEEK_DATA).then_some(at)),
        _ => Err(error),
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG)
    )
}

fn io_error(id: &str, action: &'static str) -> impl FnOnce(io::Error) -> VolumeError {
    let id = id.to_owned();
    move |source| VolumeError::Io { id, action, source }
}

#[cfg(test)]
mod tests;
