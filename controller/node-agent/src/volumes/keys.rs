//! Passphrases of encrypted volumes: RUN_DIR/keys, one file each, readable by this agent's user
//! alone. RUN_DIR is in memory where the system keeps it there (/run), so that a disk that is
//! carried away carries no key; a reboot forgets them.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// The directory of keys. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Keys {
    dir: PathBuf,
}

impl Keys {
    /// Opens RUN_DIR/keys.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn open(run_dir: &Path) -> io::Result<Self> {
        let dir = run_dir.join("keys");
        DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        Ok(Self { dir })
    }

    /// Keeps a volume's key, in place of another.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn set(&self, volume: &str, key: &[u8]) -> io::Result<()> {
        let temporary = self.dir.join(format!("{volume}.tmp"));
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(key)?;
        fs::rename(&temporary, self.path(volume))
    }

    /// Forgets a volume's key. One that is not there is no error.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub(crate) fn forget(&self, volume: &str) -> io::Result<()> {
        match fs::remove_file(self.path(volume)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether the key is here.
    pub(crate) fn has(&self, volume: &str) -> bool {
        self.path(volume).is_file()
    }

    /// A descriptor that yields the key; `None` when it is not here.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub(crate) fn reader(&self, volume: &str) -> io::Result<Option<File>> {
        match File::open(self.path(volume)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            opened => opened.map(Some),
        }
    }

    fn path(&self, volume: &str) -> PathBuf {
        self.dir.join(format!("{volume}.key"))
    }
}
