//! The files underneath, by the inode numbers that the kernel knows them by.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};

use crate::volatile::Unflushed;

/// The root directory's number in FUSE.
const ROOT: u64 = 1;

/// Files of one directory; each stays open, so that its inode number stays its own.
#[derive(Debug)]
pub(crate) struct Files {
    dir: PathBuf,
    open: Mutex<HashMap<u64, Arc<OpenFile>>>,
    /// What is not flushed stays in memory.
    volatile: bool,
}

/// A file underneath.
#[derive(Debug)]
pub(crate) struct OpenFile {
    pub(crate) file: File,
    /// The name it was found by, and those it was given since.
    names: Mutex<Vec<String>>,
    /// None where what is written is underneath at once.
    unflushed: Option<Mutex<Unflushed>>,
}

impl OpenFile {
    pub(crate) fn names(&self) -> Vec<String> {
        locked(&self.names).clone()
    }

    pub(crate) fn attr(&self) -> io::Result<FileAttr> {
        Ok(attr_of(&self.file.metadata()?))
    }

    /// At most `len_bytes`; less at the end of the file.
    pub(crate) fn read(&self, offset_bytes: u64, len_bytes: usize) -> io::Result<Vec<u8>> {
        let mut data = vec![0; len_bytes];
        let mut filled = 0;
        while filled < len_bytes {
            match self
                .file
                .read_at(&mut data[filled..], offset_bytes + filled as u64)?
            {
                0 => break,
                count => filled += count,
            }
        }
        data.truncate(filled);
        if let Some(unflushed) = &self.unflushed {
            locked(unflushed).overlay(offset_bytes, &mut data);
        }
        Ok(data)
    }

    pub(crate) fn write(&self, offset_bytes: u64, data: &[u8]) -> io::Result<()> {
        match &self.unflushed {
            Some(unflushed) => locked(unflushed).write(&self.file, offset_bytes, data),
            None => self.file.write_all_at(data, offset_bytes),
        }
    }

    /// What was written before survives the loss of memory.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.forget(|| false)?;
        self.file.sync_data()
    }

    /// Loses pages that `lose` takes, and writes the others back; returns how many were lost.
    pub(crate) fn forget(&self, mut lose: impl FnMut() -> bool) -> io::Result<u64> {
        match &self.unflushed {
            Some(unflushed) => locked(unflushed).write_back(&self.file, || !lose()),
            None => Ok(0),
        }
    }
}

impl Files {
    pub(crate) fn new(dir: &Path, volatile: bool) -> Self {
        Self {
            dir: dir.to_owned(),
            open: Mutex::default(),
            volatile,
        }
    }

    /// All that were ever looked at.
    pub(crate) fn all(&self) -> Vec<Arc<OpenFile>> {
        locked(&self.open).values().cloned().collect()
    }

    pub(crate) fn find(&self, name: &OsStr) -> io::Result<FileAttr> {
        let file = File::options()
            .read(true)
            .write(true)
            .open(self.dir.join(name))?;
        self.note(file, name)
    }

    pub(crate) fn create(&self, name: &OsStr) -> io::Result<FileAttr> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(self.dir.join(name))?;
        self.note(file, name)
    }

    fn note(&self, file: File, name: &OsStr) -> io::Result<FileAttr> {
        let attr = attr_of(&file.metadata()?);
        let name = name.to_string_lossy().into_owned();
        let mut open = locked(&self.open);
        let entry = open.entry(attr.ino.0).or_insert_with(|| {
            Arc::new(OpenFile {
                file,
                names: Mutex::default(),
                unflushed: self.volatile.then(Mutex::default),
            })
        });
        let mut names = locked(&entry.names);
        if !names.contains(&name) {
            names.push(name);
        }
        Ok(attr)
    }

    pub(crate) fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        std::fs::rename(self.dir.join(from), self.dir.join(to))
    }

    pub(crate) fn remove(&self, name: &OsStr) -> io::Result<()> {
        std::fs::remove_file(self.dir.join(name))
    }

    pub(crate) fn get(&self, inode: INodeNo) -> io::Result<Arc<OpenFile>> {
        let open = locked(&self.open);
        let file = open.get(&inode.0).cloned();
        file.ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))
    }

    pub(crate) fn attr(&self, inode: INodeNo) -> io::Result<FileAttr> {
        if inode.0 == ROOT {
            let mut attr = attr_of(&std::fs::metadata(&self.dir)?);
            attr.ino = inode;
            return Ok(attr);
        }
        self.get(inode)?.attr()
    }
}

fn attr_of(meta: &Metadata) -> FileAttr {
    let time = |seconds: i64, nanoseconds: i64| -> SystemTime {
        let since = Duration::new(seconds.max(0) as u64, nanoseconds.max(0) as u32);
        UNIX_EPOCH + since
    };
    let changed = time(meta.ctime(), meta.ctime_nsec());
    FileAttr {
        ino: INodeNo(meta.ino()),
        size: meta.size(),
        blocks: meta.blocks(),
        atime: time(meta.atime(), meta.atime_nsec()),
        mtime: time(meta.mtime(), meta.mtime_nsec()),
        ctime: changed,
        crtime: changed,
        kind: match meta.is_dir() {
            true => FileType::Directory,
            false => FileType::RegularFile,
        },
        perm: (meta.mode() & 0o7777) as u16,
        nlink: meta.nlink() as u32,
        uid: meta.uid(),
        gid: meta.gid(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
