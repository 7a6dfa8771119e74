//! Options about where the state is kept.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use thiserror::Error;

use super::{DirError, StateDir};
use crate::store::backup::{self, BackupError};
use crate::store::embedded::EmbeddedStore;
#[cfg(feature = "etcd")]
use crate::store::etcd::{EtcdOptions, EtcdStore, TlsFiles};
use crate::store::schema::{self, SchemaError};
use crate::store::{SharedStore, StoreError};

/// See the module.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "State")]
pub struct StoreOptions {
    /// Keep the state in this etcd cluster instead of the state directory, so that several controllers
    /// share it: addresses of its members, with commas between them
    #[arg(long, value_name = "URL,...", value_delimiter = ',')]
    pub etcd: Vec<String>,
    /// How etcd is reached.
    #[command(flatten)]
    pub access: EtcdAccess,
    /// How long a leader that died is waited for; another leads at the latest twice as long after
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(2..=600))]
    pub leader_lease: u32,
}

/// How etcd is reached.
#[derive(Debug, Clone, Args)]
pub struct EtcdAccess {
    /// What all keys in etcd begin with
    #[arg(long, value_name = "TEXT", default_value = "mortise/")]
    pub etcd_prefix: String,
    /// Who vouches for etcd's members, PEM
    #[arg(long, value_name = "FILE")]
    pub etcd_ca: Option<PathBuf>,
    /// The certificate to show to etcd, PEM
    #[arg(long, value_name = "FILE", requires = "etcd_key")]
    pub etcd_cert: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    pub etcd_key: Option<PathBuf>,
    /// The name to log in to etcd with
    #[arg(long, value_name = "NAME", requires = "etcd_password_file")]
    pub etcd_user: Option<String>,
    /// A file whose first line is the password
    #[arg(long, value_name = "FILE", requires = "etcd_user")]
    pub etcd_password_file: Option<PathBuf>,
}

/// Moves the state from one store to another, where both are told as a state directory or as the
/// addresses of an etcd cluster. No controller may be running.
#[derive(Debug, Clone, Args)]
pub struct Migrate {
    /// Where it is
    #[arg(long, value_name = "DIR|URL,...")]
    pub from: String,
    /// Where it is to be
    #[arg(long, value_name = "DIR|URL,...")]
    pub to: String,
    /// Replace what is there
    #[arg(long)]
    pub force: bool,
    /// How etcd is reached.
    #[command(flatten)]
    pub access: EtcdAccess,
}

/// A store that was opened.
pub struct Opened {
    /// The store.
    pub store: SharedStore,
    /// Other controllers may use it.
    pub shared: bool,
    /// Nobody else opens it while this is there.
    _dir: Option<StateDir>,
}

impl Opened {
    /// How users are told what kind it is.
    pub fn kind(&self) -> &'static str {
        match self.shared {
            true => "etcd",
            false => "embedded",
        }
    }
}

impl StoreOptions {
    /// Opens the store and looks whether this program may use what it holds.
    ///
    /// # Errors
    /// When it cannot be opened or must not be used.
    pub async fn open(&self, state_dir: StateDir) -> Result<Opened, OpenError> {
        let opened = match self.etcd.is_empty() {
            true => open_embedded(state_dir)?,
            false => Opened {
                _dir: Some(state_dir),
                ..open_etcd(&self.etcd, &self.access).await?
            },
        };
        schema::check_usable(&opened.store).await?;
        Ok(opened)
    }

    /// How long the leader's lease lasts.
    pub fn lease_period(&self) -> Duration {
        Duration::from_secs(self.leader_lease.into())
    }
}

impl Migrate {
    /// Does it; answers how many records were moved.
    ///
    /// # Errors
    /// When a store cannot be opened, a controller uses one, or the new one is not empty.
    pub async fn run(&self) -> Result<usize, OpenError> {
        let from = open_at(&self.from, &self.access).await?;
        let to = open_at(&self.to, &self.access).await?;
        Ok(backup::migrate(&from.store, &to.store, &self.to, self.force).await?)
    }
}

async fn open_at(location: &str, access: &EtcdAccess) -> Result<Opened, OpenError> {
    if location.starts_with("http://") || location.starts_with("https://") {
        let endpoints: Vec<String> = location.split(',').map(str::to_owned).collect();
        return open_etcd(&endpoints, access).await;
    }
    open_embedded(StateDir::lock(Path::new(location))?)
}

fn open_embedded(dir: StateDir) -> Result<Opened, OpenError> {
    let file = dir.store_file();
    let store = EmbeddedStore::open(&file);
    let store = store.map_err(|source| OpenError::File { file, source })?;
    Ok(Opened {
        store: Arc::new(store),
        shared: false,
        _dir: Some(dir),
    })
}

#[cfg(feature = "etcd")]
async fn open_etcd(endpoints: &[String], access: &EtcdAccess) -> Result<Opened, OpenError> {
    let password = access.etcd_password_file.as_ref().map(|file| {
        let text = std::fs::read_to_string(file);
        let text = text.map_err(|source| OpenError::Password {
            file: file.clone(),
            source,
        });
        text.map(|text| text.lines().next().unwrap_or_default().to_owned())
    });
    let identity = access.etcd_cert.clone().zip(access.etcd_key.clone());
    let options = EtcdOptions {
        endpoints: endpoints.to_vec(),
        prefix: access.etcd_prefix.clone(),
        tls: TlsFiles {
            ca: access.etcd_ca.clone(),
            identity,
        },
        user: access.etcd_user.clone().zip(password.transpose()?),
    };
    let store = EtcdStore::connect(&options).await;
    let store = store.map_err(|source| OpenError::Etcd {
        endpoints: endpoints.join(","),
        source,
    })?;
    Ok(Opened {
        store: Arc::new(store),
        shared: true,
        _dir: None,
    })
}

#[cfg(not(feature = "etcd"))]
async fn open_etcd(_endpoints: &[String], _access: &EtcdAccess) -> Result<Opened, OpenError> {
    Err(OpenError::NoEtcd)
}

/// Why there is no store.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The embedded store.
    #[error("cannot open {file}; move it away to begin anew", file = file.display())]
    File {
        /// Its file.
        file: PathBuf,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// The cluster.
    #[error(
        "cannot use etcd at {endpoints}; see that its members run and that --etcd and the other --etcd- options are right"
    )]
    Etcd {
        /// As given.
        endpoints: String,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// The password's file.
    #[error("cannot read {file}", file = file.display())]
    Password {
        /// As given.
        file: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The program was built without.
    #[error(
        "this program was built without the feature etcd; build it with that, or use a state directory"
    )]
    NoEtcd,
    /// The state directory.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// What the store holds.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// Moving it.
    #[error(transparent)]
    Backup(#[from] BackupError),
}
