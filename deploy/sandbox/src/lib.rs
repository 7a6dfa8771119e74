//! What keeps a Mortise process in, once it has opened everything it needs.
//!
//! A process confines itself, while it still has a single thread and before it touches anything
//! that a guest or a peer controls. [`Confinement::enter`] takes all steps in the order in which
//! they must be taken; each step is also a function of its own:
//!
//! | step | function | when the kernel cannot |
//! |---|---|---|
//! | no core dumps | [`no_core_dumps`] | error |
//! | only known descriptors | [`close_other_fds`] | error |
//! | no network | [`deny_network`] | reported as missing |
//! | no files but those allowed | [`deny_filesystem`] | falls back to an empty root, else reported as missing |
//! | no capabilities | [`drop_capabilities`] | error |
//! | no new privileges | [`no_new_privs`] | error |
//! | few system calls | [`seccomp::Profile`] | error |
//!
//! Every step returns an [`Achieved`], whose names the process shows in its status.

mod descriptors;
mod filesystem;
mod network;
mod privileges;
pub mod seccomp;

use std::ops::AddAssign;
use std::os::fd::RawFd;
use std::path::PathBuf;

pub use descriptors::{DescriptorError, close_other_fds};
pub use filesystem::{Access, FilesystemError, deny_filesystem};
pub use network::deny_network;
pub use privileges::{Capability, PrivilegeError, drop_capabilities, no_core_dumps, no_new_privs};
use seccomp::{Profile, SeccompError};

/// Everything a process gives up, entered in one go.
#[derive(Debug)]
pub struct Confinement {
    profile: Profile,
    allowed_paths: Vec<(PathBuf, Access)>,
    kept_capabilities: Vec<Capability>,
    kept_fds: Option<Vec<RawFd>>,
}

impl Confinement {
    /// Nothing but `profile`'s system calls: no files, no network, no capabilities.
    pub fn new(profile: Profile) -> Self {
        Self {
            profile,
            allowed_paths: Vec::new(),
            kept_capabilities: Vec::new(),
            kept_fds: None,
        }
    }

    /// Leaves `path` (a file, or a directory and all beneath it) usable.
    pub fn allow_path(mut self, path: impl Into<PathBuf>, access: Access) -> Self {
        self.allowed_paths.push((path.into(), access));
        self
    }

    /// Keeps a capability that is held now.
    pub fn keep_capability(mut self, capability: Capability) -> Self {
        self.kept_capabilities.push(capability);
        self
    }

    /// Closes every descriptor except the standard three and `keep`.
    pub fn close_fds_except(mut self, keep: &[RawFd]) -> Self {
        self.kept_fds = Some(keep.to_vec());
        self
    }

    /// Confines the calling thread and all threads it starts from now on. Must be called while
    /// the process has a single thread: landlock, namespaces and capabilities belong to threads.
    ///
    /// # Errors
    /// A step that every supported kernel can take failed; the process must not serve.
    pub fn enter(self) -> Result<Achieved, ConfinementError> {
        let mut achieved = no_core_dumps()?;
        if let Some(keep) = &self.kept_fds {
            achieved += close_other_fds(keep)?;
        }
        achieved += deny_network();
        achieved += deny_filesystem(&self.allowed_paths)?;
        achieved += drop_capabilities(&self.kept_capabilities)?;
        achieved += no_new_privs()?;
        achieved += self.profile.apply_to_all_threads()?;
        Ok(achieved)
    }
}

/// A confinement step that had to succeed did not.
#[derive(Debug, thiserror::Error)]
pub enum ConfinementError {
    /// See [`PrivilegeError`].
    #[error(transparent)]
    Privilege(#[from] PrivilegeError),
    /// See [`DescriptorError`].
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// See [`FilesystemError`].
    #[error(transparent)]
    Filesystem(#[from] FilesystemError),
    /// See [`SeccompError`].
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
}

/// What holds now, as names for people: `no_new_privs`, `seccomp:device-net`,
/// `landlock:v6`, `!network: not permitted` (a leading `!` marks what could not be had).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Achieved(Vec<String>);

impl Achieved {
    fn of(name: impl Into<String>) -> Self {
        Self(vec![name.into()])
    }

    fn missing(name: &str, why: impl std::fmt::Display) -> Self {
        Self(vec![format!("!{name}: {why}")])
    }

    /// The names, in the order in which the steps were taken.
    pub fn names(&self) -> &[String] {
        &self.0
    }

    /// The names that say what could not be had.
    pub fn missing_names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|name| name.strip_prefix('!'))
    }

    /// The names, for a status message.
    pub fn into_names(self) -> Vec<String> {
        self.0
    }
}

impl AddAssign for Achieved {
    fn add_assign(&mut self, other: Self) {
        self.0.extend(other.0);
    }
}
