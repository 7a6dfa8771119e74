//! The command line, and the directories that it names.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::api::dirs;
use ::api::listen::Address;
use clap::{Parser, Subcommand};
use nix::fcntl::{Flock, FlockArg};
use thiserror::Error;

mod access;
mod store;
mod transport;

pub use access::{Access, AccessError};
pub use store::{EtcdAccess, Migrate, OpenError, Opened, StoreOptions};
pub use transport::{Transport, TransportError};

/// Runs virtual machines: keeps what is wanted and makes hosts do it.
///
/// Killing the controller changes nothing for running VMs; the next one with the same state
/// directory goes on. SIGTERM stops it cleanly: VMs, their devices and the node agent run on.
#[derive(Debug, Parser)]
#[command(
    version,
    subcommand_negates_reqs = true,
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  controller --standalone                              one machine, nothing to configure
  controller --standalone --listen unix:/run/c.sock    reachable by local users only
  controller --node unix:/run/a.sock --node unix:/run/b.sock
                                                       hosts whose agents listen there
  controller --listen unix:/run/c.sock --listen https://0.0.0.0:7070
                                                       hosts join by TLS (vmctl host token create)
  controller --etcd http://10.0.0.1:2379,http://10.0.0.2:2379,http://10.0.0.3:2379 --node 10.0.0.9:7071
                                                       one of several controllers
  controller migrate --from /var/lib/mortise --to http://10.0.0.1:2379
                                                       the state into etcd

Environment:
  MORTISE_LOG   what to log, such as info or controller=debug (default: info)"
)]
pub struct Options {
    /// Something else than to serve.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Manage this machine: start a node agent here, or adopt the one that runs
    #[arg(long, conflicts_with = "nodes")]
    pub standalone: bool,
    /// Manage the machine whose node agent listens there; may be given several times
    #[arg(long = "node", value_name = "https://HOST:PORT|HOST:PORT|unix:PATH")]
    pub nodes: Vec<Address>,
    /// Where to serve the API, https:// with TLS; port 0 lets the system choose; may be given several times
    #[arg(
        long,
        value_name = "https://HOST:PORT|HOST:PORT|unix:PATH",
        default_value = "127.0.0.1:7070"
    )]
    pub listen: Vec<Address>,
    /// What survives a reboot [default: /var/lib/mortise, or ~/.local/state/mortise unless root]
    #[arg(long, value_name = "DIR", default_value_os_t = dirs::default_state_dir(), hide_default_value = true)]
    pub state_dir: PathBuf,
    /// Sockets [default: /run/mortise, or $XDG_RUNTIME_DIR/mortise unless root]
    #[arg(long, value_name = "DIR", default_value_os_t = dirs::default_run_dir(), hide_default_value = true)]
    pub run_dir: PathBuf,
    /// Where node-agent and the other programs are [default: beside this one]
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
    /// Serve Prometheus metrics there, at /metrics
    #[arg(long, value_name = "HOST:PORT|unix:PATH")]
    pub metrics_listen: Option<Address>,
    /// Have the node agent that is started serve those of this machine and its VMs there
    #[arg(long, value_name = "HOST:PORT|unix:PATH", requires = "standalone")]
    pub agent_metrics_listen: Option<Address>,
    /// Let users break things on purpose (`vmctl fault`), where nothing of value runs: those with the
    /// role fault-injector, where callers say who they are. The node agent
    /// that is started may do so, too; one that is adopted keeps what it had
    #[arg(long)]
    pub allow_faults: bool,
    /// How long a host that lost contact goes on with VMs that are restarted anywhere: then their disks
    /// stop and they are paused. Longer than another controller takes to lead
    #[arg(long, value_name = "MS", default_value = "30000", value_parser = clap::value_parser!(u32).range(500..=3_600_000))]
    pub host_lease_ms: u32,
    /// How long they stay paused before the host stops them
    #[arg(long, value_name = "MS", default_value = "5000", value_parser = clap::value_parser!(u32).range(100..=3_600_000))]
    pub host_grace_ms: u32,
    /// How long that takes at most. All three and one percent after the last contact they are started
    /// elsewhere
    #[arg(long, value_name = "MS", default_value = "10000", value_parser = clap::value_parser!(u32).range(500..=3_600_000))]
    pub host_settle_ms: u32,
    /// Who may ask.
    #[command(flatten)]
    pub access: Access,
    /// Where the state is kept.
    #[command(flatten)]
    pub store: StoreOptions,
    /// Certificates.
    #[command(flatten)]
    pub transport: Transport,
}

/// What the program does besides serving.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Move the state from one store to another
    Migrate(Migrate),
}

impl Options {
    /// Whether hosts can come: those of this machine, named ones, ones that are in a shared store or that
    /// join.
    pub fn has_hosts(&self) -> bool {
        let joined = self.listen.iter().any(Address::is_tls);
        self.standalone || joined || !self.nodes.is_empty() || !self.store.etcd.is_empty()
    }

    /// What hosts are granted.
    pub fn lease_terms(&self) -> lease::Terms {
        let term = |term_ms: u32| Duration::from_millis(term_ms.into());
        lease::Terms {
            lease: term(self.host_lease_ms),
            grace: term(self.host_grace_ms),
            settle: term(self.host_settle_ms),
        }
    }

    /// The directory of the other programs.
    ///
    /// # Errors
    /// When the system does not tell where this program is.
    pub fn bin_dir(&self) -> io::Result<PathBuf> {
        if let Some(dir) = &self.bin_dir {
            return Ok(dir.clone());
        }
        let exe = std::env::current_exe()?;
        Ok(exe.parent().unwrap_or(Path::new("/")).to_owned())
    }
}

/// Locked by the controller that uses the directory; holds its pid.
const LOCK_FILE: &str = "controller.lock";

/// The state directory, for this controller alone.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    _lock: Flock<File>,
}

impl StateDir {
    /// Creates it (mode 0700) if need be and locks it.
    ///
    /// # Errors
    /// When it cannot be created, belongs to somebody else, or another controller uses it.
    pub fn lock(path: &Path) -> Result<Self, DirError> {
        create_dir(path)?;
        let failed = |source| DirError::Lock {
            path: path.to_owned(),
            source,
        };
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join(LOCK_FILE))
            .map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => {
                lock.set_len(0).map_err(failed)?;
                writeln!(&*lock, "{}", std::process::id()).map_err(failed)?;
                Ok(Self {
                    path: path.to_owned(),
                    _lock: lock,
                })
            }
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                let pid = std::fs::read_to_string(path.join(LOCK_FILE)).unwrap_or_default();
                Err(DirError::InUse {
                    path: path.to_owned(),
                    pid: pid.trim().to_owned(),
                })
            }
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }

    /// The file of the embedded store.
    pub fn store_file(&self) -> PathBuf {
        self.path.join("controller.redb")
    }
}

/// Creates a directory that only this user may enter, or checks that it is such a one.
///
/// # Errors
/// When it cannot be created or belongs to somebody else.
pub fn create_dir(path: &Path) -> Result<(), DirError> {
    let failed = |source| DirError::Create {
        path: path.to_owned(),
        source,
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(failed)?;
    let owner = std::fs::metadata(path).map_err(failed)?.uid();
    if owner != nix::unistd::geteuid().as_raw() {
        return Err(DirError::Foreign {
            path: path.to_owned(),
            owner,
        });
    }
    Ok(())
}

/// Why a directory cannot be used.
#[derive(Debug, Error)]
pub enum DirError {
    /// No permission, no space, a file in the way.
    #[error("cannot create the directory {path}; choose another with --state-dir or --run-dir", path = path.display())]
    Create {
        /// As asked for.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Somebody else could change what is in it.
    #[error("{path} belongs to user {owner}; choose another with --state-dir or --run-dir", path = path.display())]
    Foreign {
        /// As asked for.
        path: PathBuf,
        /// Its owner's number.
        owner: u32,
    },
    /// There is a controller.
    #[error("another controller uses {path} (process {pid}); stop it or choose another directory with --state-dir", path = path.display())]
    InUse {
        /// As asked for.
        path: PathBuf,
        /// Of the other controller.
        pid: String,
    },
    /// The file system refuses locks.
    #[error("cannot lock {path}", path = path.display())]
    Lock {
        /// As asked for.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        use clap::CommandFactory;
        Options::command().debug_assert();
        let alone = Options::try_parse_from(["controller"]).unwrap();
        assert!(!alone.has_hosts(), "standalone or a node");
        let both = ["controller", "--standalone", "--node", "127.0.0.1:1"];
        assert!(Options::try_parse_from(both).is_err());
    }

    #[test]
    fn second_controller_on_a_state_dir_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateDir::lock(dir.path()).unwrap();
        let error = StateDir::lock(dir.path()).unwrap_err();
        assert!(error.to_string().contains("another controller"), "{error}");
        drop(first);
        StateDir::lock(dir.path()).unwrap();
    }

    #[test]
    fn directory_that_cannot_be_made_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = StateDir::lock(&file.join("sub")).unwrap_err();
        assert!(error.to_string().contains("--state-dir"), "{error}");
    }
}
