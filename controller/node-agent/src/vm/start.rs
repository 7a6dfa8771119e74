//! Starting a VM: everything is checked first, then made in the order in which it is needed.
//! [`Rising`] collects what was made, so that a failure or a cancellation at any point undoes
//! just that.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Instant,
};

use api::validate::SEED_DISK;
use lease::{Restart, Stage};
use tonic::Code;

use super::{
    Env,
    daemon::{self, DaemonError},
    disk::{self, DiskError},
    machine::{Daemon, Machine},
    now_ms,
    passt::{self, PasstError},
    ports, remove_dir,
    stop::{self, sweep},
    vmm::{self, VmmError},
};
use crate::{
    cloud_init,
    host::{self, HostError},
    image::Claim,
    leases::LeaseError,
    network::NetworkError,
    process::Process,
    record::Assets,
    spec::Spec,
    tap::{self, TapError},
    versions::Pinned,
};

/// sun_path less the NUL.
const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Why a VM could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// The host cannot.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A boot file cannot be used.
    #[error("{what} {path}: {problem}", path = .path.display())]
    BootFile {
        /// kernel or initramfs
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A boot file cannot be read.
    #[error("cannot open {what} {path}; correct the path or its permissions", path = .path.display())]
    OpenBootFile {
        /// kernel or initramfs
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A program is missing.
    #[error("program {path} does not exist; build it, or name its directory with --bin-dir", path = .path.display())]
    Program {
        /// Where it should be.
        path: PathBuf,
    },
    /// A socket of a third party is missing.
    #[error("vhost-user device {device}: socket {path} does not exist; start its daemon first", path = .path.display())]
    ForeignSocket {
        /// Name of the device.
        device: String,
        /// Where the daemon should listen.
        path: PathBuf,
    },
    /// The sockets' names do not fit.
    #[error("socket path {path} has {} bytes, at most {MAX_SOCKET_PATH_BYTES} fit: choose a shorter --run-dir or shorter names", .path.as_os_str().len(), path = .path.display())]
    SocketPath {
        /// The longest one.
        path: PathBuf,
    },
    /// The VM's directory or its seed cannot be made.
    #[error("making {path}", path = .path.display())]
    Dir {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A disk's images cannot be used.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A tap cannot be made.
    #[error("NIC {nic}")]
    Tap {
        /// Name of the NIC.
        nic: String,
        /// Why not.
        #[source]
        source: TapError,
    },
    /// Its network cannot be joined.
    #[error("NIC {nic}")]
    Network {
        /// Name of the NIC.
        nic: String,
        /// Why not.
        #[source]
        source: Box<NetworkError>,
    },
    /// There are no user networks here.
    #[error(transparent)]
    Passt(#[from] PasstError),
    /// The host lost its lease meanwhile.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A device daemon does not serve.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// `vmm-core` does not run the machine.
    #[error(transparent)]
    Vmm(#[from] VmmError),
}

impl StartError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Host(error) => error.code(),
            Self::BootFile { .. } => Code::InvalidArgument,
            Self::OpenBootFile { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => Code::NotFound,
                io::ErrorKind::PermissionDenied => Code::PermissionDenied,
                _ => Code::FailedPrecondition,
            },
            Self::Program { .. } | Self::ForeignSocket { .. } => Code::FailedPrecondition,
            Self::SocketPath { .. } => Code::InvalidArgument,
            Self::Dir { .. } => Code::Internal,
            Self::Disk(error) => error.code(),
            Self::Tap { source, .. } => source.code(),
            Self::Network { source, .. } => source.code(),
            Self::Passt(_) => Code::FailedPrecondition,
            Self::Lease(_) => Code::Unavailable,
            Self::Daemon(error) => error.code(),
            Self::Vmm(error) => error.code(),
        }
    }
}

/// What exists so far of a VM that is being started.
pub(super) struct Rising {
    id: String,
    dir: PathBuf,
    dir_made: bool,
    /// Taps to be made that did not exist before: ours to remove from then on.
    planned_taps: Vec<String>,
    taps: Vec<String>,
    claims: Vec<Claim>,
    daemons: Vec<Daemon>,
    vmm: Option<Process>,
    boot_id: String,
    pins: Vec<Pinned>,
}

impl Rising {
    pub(super) fn new(env: &Env, spec: &Spec, pins: &[Pinned]) -> Self {
        let planned_taps = (0..spec.nics.len())
            .filter(|&index| spec.nics[index].tap.is_none() && spec.nics[index].user.is_none())
            .map(|index| tap::name(&spec.id, index))
            .filter(|name| !tap::exists(name))
            .collect();
        Self {
            id: spec.id.clone(),
            dir: env.vm_dir(&spec.id),
            dir_made: false,
            planned_taps,
            taps: Vec::new(),
            claims: Vec::new(),
            daemons: Vec::new(),
            vmm: None,
            boot_id: env.boot_id.clone(),
            pins: pins.to_vec(),
        }
    }

    /// What the next agent has to remove when this one dies before the VM is up.
    pub(super) fn planned_assets(&self) -> Assets {
        Assets {
            boot_id: self.boot_id.clone(),
            taps: self.planned_taps.clone(),
            ..Assets::default()
        }
    }

    /// The VM is up.
    pub(super) fn into_machine(self) -> Machine {
        let vmm = self.vmm.expect("brought up");
        Machine::new(
            self.dir,
            vmm,
            self.daemons,
            self.taps,
            self.claims,
            self.boot_id,
            now_ms(),
        )
    }

    /// Removes all that was made.
    pub(super) async fn undo(mut self, env: &Env) {
        stop::terminate(self.vmm.take().into_iter().collect()).await;
        let daemons = self
            .daemons
            .iter()
            .filter_map(|daemon| daemon.process.clone())
            .collect();
        stop::terminate(daemons).await;
        env.networks.withdraw(&self.id).await;
        sweep(&self.dir, &[]).await;
        stop::remove_taps(&self.id, &self.taps).await;
        if self.dir_made
            && let Err(error) = remove_dir(&env.vm_dir(&self.id))
        {
            tracing::warn!(vm = self.id, "removing {}: {error}", self.dir.display());
        }
    }
}

/// Checks and makes everything that `spec` needs, and starts the machine.
pub(super) async fn bring_up(
    env: &Env,
    spec: &Spec,
    rising: &mut Rising,
) -> Result<(), StartError> {
    let dir = env.vm_dir(&spec.id);
    let passt = passt::find(env.passt.as_deref(), &env.bin_dir, spec).await?;
    let spec = &ports::joined(env, spec).await?;
    let mut plans = daemon::plans(
        spec,
        &env.bin_dir,
        &passt,
        &dir,
        &env.volumes,
        &env.networks,
    );
    for plan in &mut plans {
        plan.use_pin(&rising.pins);
        plan.use_knobs(&env.knobs);
        plan.use_leases(spec, &env.leases);
    }
    check_host(env, spec, &dir, &plans)?;
    claim_images(env, spec, &mut rising.claims).await?;
    make_dir(&dir, &mut rising.dir_made)?;
    make_seed(spec, &dir)?;
    for index in 0..spec.nics.len() {
        make_tap(spec, index, rising).await?;
    }
    for plan in plans {
        let up = plan.bring_up(daemon::Listeners::new(), None).await?;
        rising.daemons.push(Daemon::up(plan, up));
    }
    ports::attach(env, spec, &dir).await?;
    let run_until = match (spec.restart, env.leases.stage()) {
        (Restart::Anywhere, Stage::Held { until }) => Some(until),
        (Restart::Anywhere, _) => return Err(StartError::Lease(LeaseError::NotHeld)),
        _ => None,
    };
    let started = Instant::now();
    rising.vmm = Some(
        vmm::bring_up(&env.bin_dir, spec, &dir, &env.knobs, run_until)
            .await?
            .keep(),
    );
    tracing::info!(
        vm = spec.id,
        "running {} ms after exec of vmm-core",
        started.elapsed().as_millis()
    );
    Ok(())
}

fn check_host(
    env: &Env,
    spec: &Spec,
    dir: &Path,
    plans: &[daemon::Plan],
) -> Result<(), StartError> {
    check_boot_file("kernel", &spec.kernel)?;
    if let Some(initramfs) = &spec.initramfs {
        check_boot_file("initramfs", initramfs)?;
    }
    check_socket_paths(spec, dir)?;
    let ours = plans.iter().filter(|plan| plan.can_stand_by());
    let programs = ours.map(|plan| plan.program().to_owned());
    for path in std::iter::once(env.bin_dir.join("vmm-core")).chain(programs) {
        if !path.is_file() {
            return Err(StartError::Program { path });
        }
    }
    for device in &spec.vhost_user {
        if !device.socket.exists() {
            return Err(StartError::ForeignSocket {
                device: device.name.clone(),
                path: device.socket.clone(),
            });
        }
    }
    host::check_kvm()?;
    host::check_memory(spec.memory_bytes)?;
    host::promise_memory(&env.promised, &spec.id, spec.memory_bytes)?;
    Ok(())
}

fn check_boot_file(what: &'static str, path: &Path) -> Result<(), StartError> {
    let error = |source| StartError::OpenBootFile {
        what,
        path: path.to_owned(),
        source,
    };
    let problem = |problem| StartError::BootFile {
        what,
        path: path.to_owned(),
        problem,
    };
    // Opening a FIFO would wait for its writer.
    if !fs::metadata(path).map_err(error)?.is_file() {
        return Err(problem(
            "is no regular file; name an uncompressed or compressed image file",
        ));
    }
    let file = File::open(path).map_err(error)?;
    if file.metadata().map_err(error)?.len() == 0 {
        return Err(problem("is empty; copy it again"));
    }
    Ok(())
}

fn check_socket_paths(spec: &Spec, dir: &Path) -> Result<(), StartError> {
    let devices = spec
        .disks
        .iter()
        .map(|disk| disk.name.as_str())
        .chain(spec.nics.iter().map(|nic| nic.name.as_str()))
        .chain(spec.cloud_init.as_ref().map(|_| SEED_DISK));
    let paths = devices
        .map(|name| daemon::socket(dir, name))
        // The longest that a process of a daemon is started on.
        .chain(std::iter::once(dir.join("blk.100000.sock")));
    match paths.max_by_key(|path| path.as_os_str().len()) {
        Some(path) if path.as_os_str().len() > MAX_SOCKET_PATH_BYTES => {
            Err(StartError::SocketPath { path })
        }
        _ => Ok(()),
    }
}

/// Claims each disk's images, and checks that nobody else on the host has them.
async fn claim_images(env: &Env, spec: &Spec, claims: &mut Vec<Claim>) -> Result<(), StartError> {
    for disk in &spec.disks {
        let (table, volumes) = (env.claims.clone(), env.volumes.clone());
        let (disk, vm) = (disk.clone(), spec.id.clone());
        // Probing waits for other processes' locks.
        let claiming =
            tokio::task::spawn_blocking(move || disk::claim(&disk, &volumes, &table, &vm));
        claims.extend(
            claiming
                .await
                .unwrap_or_else(|panic| panic!("claiming an image: {panic}"))?,
        );
    }
    Ok(())
}

fn make_dir(dir: &Path, made: &mut bool) -> Result<(), StartError> {
    let error = |source| StartError::Dir {
        path: dir.to_owned(),
        source,
    };
    // Logs of the last run.
    remove_dir(dir).map_err(error)?;
    DirBuilder::new().mode(0o700).create(dir).map_err(error)?;
    *made = true;
    Ok(())
}

fn make_seed(spec: &Spec, dir: &Path) -> Result<(), StartError> {
    let Some(seed) = &spec.cloud_init else {
        return Ok(());
    };
    seed.write(dir).map_err(|source| StartError::Dir {
        path: cloud_init::path(dir),
        source,
    })
}

async fn make_tap(spec: &Spec, index: usize, rising: &mut Rising) -> Result<(), StartError> {
    let nic = &spec.nics[index];
    if nic.user.is_some() || nic.switched {
        return Ok(());
    }
    let error = |source| StartError::Tap {
        nic: nic.name.clone(),
        source,
    };
    let name = daemon::tap_name(spec, index);
    if nic.tap.is_some() {
        return tap::open(&name, nic.queue_pairs).map(drop).map_err(error);
    }
    if rising.planned_taps.contains(&name) {
        rising.taps.push(name.clone());
    }
    tap::create(&name, nic).await.map_err(error)
}
