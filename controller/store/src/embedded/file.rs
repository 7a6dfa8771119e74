//! The database and the file under it. A full disk must not take the store with it: blocks are
//! allocated when the file grows, so that what fails then is the growing and never a write half-way,
//! and a database that saw a failure, which does nothing more, is opened anew.

use std::fs::{OpenOptions, Permissions};
use std::io;
use std::ops::Bound;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use redb::backends::{FileBackend, InMemoryBackend};
use redb::{BackendError, Database, ReadTransaction, ReadableDatabase, StorageBackend};

use super::StoreError;

/// Pages kept in memory: the upper ones of the trees, and what is written now. The system keeps the others.
const CACHE_BYTES: usize = 8 << 20;

/// See the module.
pub(super) struct File {
    /// `None` while it could not be opened anew.
    database: RwLock<Option<Database>>,
    /// `None` in memory.
    path: Option<PathBuf>,
}

impl File {
    /// Opens or creates it.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        Ok(Self {
            database: RwLock::new(Some(open(path)?)),
            path: Some(path.to_owned()),
        })
    }

    /// A database without a file.
    pub(super) fn in_memory() -> Result<Self, StoreError> {
        let database = Database::builder().create_with_backend(InMemoryBackend::new());
        let database = database.map_err(failed)?;
        super::tables::create(&database)?;
        Ok(Self {
            database: RwLock::new(Some(database)),
            path: None,
        })
    }

    pub(super) fn is_memory(&self) -> bool {
        self.path.is_none()
    }

    /// Reads at one point in time.
    pub(super) fn read<T>(
        &self,
        work: impl FnOnce(&ReadTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.with(|database| work(&database.begin_read().map_err(failed)?))
    }

    /// Works on the database.
    pub(super) fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        work(database.as_ref().ok_or_else(closed)?)
    }

    /// Closes the database and opens it anew.
    pub(super) fn reopen(&self) -> Result<(), StoreError> {
        let Some(path) = &self.path else {
            return Err(closed());
        };
        let mut database = self
            .database
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        // The file is locked until the old one is gone.
        drop(database.take());
        *database = Some(open(path)?);
        Ok(())
    }
}

fn open(path: &Path) -> Result<Database, StoreError> {
    // It holds seeds' passwords.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    file.set_permissions(Permissions::from_mode(0o600))
        .map_err(failed)?;
    let second = file.try_clone().map_err(failed)?;
    let backend = Allocated {
        inner: FileBackend::new(file).map_err(failed)?,
        file: second,
    };
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    let database = builder.create_with_backend(backend).map_err(failed)?;
    super::tables::create(&database)?;
    Ok(database)
}

/// A file that has all its blocks.
#[derive(Debug)]
struct Allocated {
    inner: FileBackend,
    file: std::fs::File,
}

impl StorageBackend for Allocated {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.inner.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let now = self.inner.len()?;
        if let Some(more) = len.checked_sub(now).filter(|more| *more > 0) {
            let offset = |bytes: u64| i64::try_from(bytes).map_err(io::Error::other);
            nix::fcntl::posix_fallocate(&self.file, offset(now)?, offset(more)?)?;
        }
        self.inner.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.inner.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.inner.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.inner.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.query_lock_range(start, end)
    }
}

/// Any of redb's errors.
pub(super) fn failed(error: impl Into<redb::Error>) -> StoreError {
    match error.into() {
        redb::Error::Io(error)
            if matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ) =>
        {
            StoreError::Full(Box::new(error))
        }
        error => StoreError::Backend(Box::new(error)),
    }
}

fn closed() -> StoreError {
    StoreError::Unavailable("its file could not be opened again after an error".into())
}
