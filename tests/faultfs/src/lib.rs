//! A file system for tests whose requests fail, wait or stay short as a test wants.
//!
//! [`FaultFs::mount`] mounts a directory of the real file system again, through FUSE. Requests
//! pass to the files underneath unless a [`Fault`] applies. What happens to files underneath, by
//! [`FaultFs::underneath`], is what storage does behind one's back.
//!
//! The mount is in a mount namespace of the calling thread's own: that thread and the processes
//! it starts see it, nobody else, and it is gone when they are, however they end. It needs root
//! and `/dev/fuse`.

mod fault;
mod files;
mod server;
mod volatile;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, Config, MountOption, SessionACL};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

pub use fault::{Effect, Fault, FaultId, Op};

use files::Files;
use server::{DirectIo, Server, Shared};

/// How long waits of a test last at most.
const PATIENCE: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// A mounted file system; unmounted when dropped, and what it holds is let go.
#[derive(Debug)]
pub struct FaultFs {
    mounted_at: TempDir,
    underneath: TempDir,
    shared: Arc<Shared>,
    session: Option<BackgroundSession>,
}

impl FaultFs {
    /// Mounts an empty file system for this thread and the processes that it starts.
    ///
    /// # Errors
    /// The kernel refused: there is no `/dev/fuse`, or the process is not root.
    pub fn mount() -> io::Result<Self> {
        Self::mount_with(DirectIo::Asynchronous, false)
    }

    /// The same, but what is written stays in memory until it is flushed, and [`Self::forget`] loses it.
    ///
    /// # Errors
    /// As [`Self::mount`].
    pub fn mount_volatile() -> io::Result<Self> {
        Self::mount_with(DirectIo::Asynchronous, true)
    }

    /// The same, but direct I/O is waited for in the kernel by the thread that began it. FUSE
    /// reports short direct writes only then; a killed process ends when its requests do.
    ///
    /// # Errors
    /// As [`Self::mount`].
    pub fn mount_synchronous() -> io::Result<Self> {
        Self::mount_with(DirectIo::Synchronous, false)
    }

    fn mount_with(direct_io: DirectIo, volatile: bool) -> io::Result<Self> {
        let mounted_at = tempfile::tempdir()?;
        let underneath = tempfile::tempdir()?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        let files = Files::new(underneath.path(), volatile);
        let shared = Arc::new(Shared::new(files));
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("faultfs".to_owned())];
        config.acl = SessionACL::All;
        let server = Server::new(Arc::clone(&shared), direct_io)?;
        let session = fuser::spawn_mount(server, mounted_at.path(), &config)?;
        Ok(Self {
            mounted_at,
            underneath,
            shared,
            session: Some(session),
        })
    }

    /// Where the file is seen with its faults.
    pub fn path(&self, name: &str) -> PathBuf {
        self.mounted_at.path().join(name)
    }

    /// The mounted directory.
    pub fn dir(&self) -> &Path {
        self.mounted_at.path()
    }

    /// The file itself.
    pub fn underneath(&self, name: &str) -> PathBuf {
        self.underneath.path().join(name)
    }

    /// From now on `fault` applies. Of several that fit a request the first one does.
    pub fn inject(&self, fault: Fault) -> FaultId {
        self.shared.inject(fault)
    }

    /// From now on it applies no more. What it held stays held.
    pub fn lift(&self, fault: FaultId) {
        self.shared.lift(fault);
    }

    /// Requests that it was applied to. A test in which nothing was hit has shown nothing.
    pub fn hits(&self, fault: FaultId) -> u64 {
        self.shared.hits(fault)
    }

    /// Requests that are held now.
    pub fn held(&self) -> usize {
        self.shared.held()
    }

    /// Waits until `count` requests are held.
    ///
    /// # Panics
    /// They are not within 30 seconds.
    pub fn await_held(&self, count: usize) {
        let give_up = Instant::now() + PATIENCE;
        while self.held() < count {
            assert!(
                Instant::now() < give_up,
                "{} of {count} requests are held",
                self.held()
            );
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// What a machine does that loses its power: of what was written and not flushed, each page is
    /// lost or had been written back, as `lose` says. Returns how many were lost.
    ///
    /// # Errors
    /// Those of the file system underneath.
    pub fn forget(&self, lose: impl FnMut() -> bool) -> io::Result<u64> {
        self.shared.forget(lose)
    }

    /// Carries out what is held, in the order in which it came; returns how many.
    pub fn release(&self) -> usize {
        self.shared.release()
    }
}

impl Drop for FaultFs {
    fn drop(&mut self) {
        self.shared.close();
        // Also while somebody still has files open: the connection ends with the last of them.
        let _ = umount2(self.mounted_at.path(), MntFlags::MNT_DETACH);
        drop(self.session.take());
    }
}

#[cfg(test)]
mod tests;
