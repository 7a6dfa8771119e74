//! What this process gives up before it meets its guest: [`Confinement`] takes the steps for the
//! whole process and for each kind of thread, and keeps account of what was achieved.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sandbox::{Access, Achieved};
use tracing::info;

use crate::error::chain;
use crate::machine::Confine;
use crate::seccomp::ThreadKind;

/// The steps that were taken so far.
#[derive(Clone, Default)]
pub struct Confinement(Arc<Mutex<Vec<String>>>);

impl Confinement {
    /// What holds for all threads; to be called while there is only one. Kernel, initramfs and
    /// `/dev/kvm` are open by then, and backends are reached through Unix sockets. Only the
    /// directories of the `written` files stay.
    ///
    /// # Errors
    /// The kernel refused a step that every supported kernel has.
    pub fn of_process(written: &[&Path]) -> Result<Self, String> {
        let directories: Vec<_> = written
            .iter()
            .map(|path| (directory_of(path), Access::ReadWrite))
            .collect();
        let mut achieved = sandbox::no_core_dumps().map_err(|err| chain(&err))?;
        achieved += sandbox::deny_network();
        achieved += sandbox::deny_filesystem(&directories).map_err(|err| chain(&err))?;
        achieved += sandbox::drop_capabilities(&[]).map_err(|err| chain(&err))?;
        achieved += sandbox::no_new_privs().map_err(|err| chain(&err))?;
        info!("sandbox: {}", achieved.names().join(", "));
        let confinement = Self::default();
        confinement.note(achieved);
        Ok(confinement)
    }

    /// What each thread calls first.
    pub fn of_threads(&self) -> Confine {
        let confinement = self.clone();
        Arc::new(move |kind: ThreadKind| {
            confinement.note(kind.confine().map_err(|err| chain(&err))?);
            Ok(())
        })
    }

    /// Names of all that holds, as in `sandbox` of the other daemons; a leading `!` marks what
    /// could not be had.
    pub fn names(&self) -> Vec<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Threads of one kind achieve the same.
    fn note(&self, achieved: Achieved) {
        let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for name in achieved.into_names() {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
}

fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.into(),
        _ => ".".into(),
    }
}
