//! A device daemon of a VM: which devices it serves, and how one incarnation of it comes up.
//!
//! Each incarnation gets the same listening sockets and taps but freshly opened images: a lock on
//! an image belongs to an open file, so it tells when the last request of the killed incarnation
//! is over.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use api::{
    connect,
    device::{
        AttachRequest, DaemonInfo, FdRef, GetMetricsRequest, NetConfig, Policy, attach_request,
        device_daemon_client::DeviceDaemonClient,
    },
    fds, listen,
};
use lease::{Moment, Restart};
use tonic::Code;

use super::{
    disk::{self, DiskError},
    disks::Disks,
    incarnation::{CALL_DEADLINE, Incarnation, Sockets, Standby, UP_WITHIN},
    leased::{allow_io, is_ignorant},
    nics::Nics,
    outage::StandIn,
    passt,
};
use crate::{
    cloud_init,
    faults::{Knobs, StartFault},
    leases::Leases,
    network::Networks,
    process::{Guard, ProcessError},
    record::DaemonKind,
    spec::{Disk, DiskSource, Nic, NicTuning, Spec, UserNetwork},
    tap::{self, KeptTaps, TapError},
    versions::Pinned,
    volumes::Pool,
};

/// Half of what the responder has for a scrape.
const METRICS_DEADLINE: Duration = Duration::from_secs(2);
const SEND_DEADLINE: Duration = Duration::from_secs(5);

/// Listening vhost-user sockets by device name. Held while the VM runs, so that connecting never
/// races a restart.
pub(super) type Listeners = BTreeMap<String, Arc<UnixListener>>;

/// What a daemon is started with and told to serve.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) kind: DaemonKind,
    program: PathBuf,
    /// Which version's copy `program` is; empty for the installed one.
    build: String,
    dir: PathBuf,
    volumes: Pool,
    networks: Networks,
    vm: String,
    pub(super) devices: Vec<DevicePlan>,
    taps: KeptTaps,
    stand_in: StandIn,
    knobs: Knobs,
    /// Of a VM that runs under the host's lease.
    leases: Option<Leases>,
}

/// One device of a daemon.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct DevicePlan {
    pub(super) name: String,
    backing: Backing,
}

#[derive(Clone, Debug, PartialEq)]
enum Backing {
    Disk(Box<Disk>),
    Tap {
        name: String,
        queue_pairs: u32,
        mac: String,
        mtu: u32,
        network: Option<String>,
        track_flows: bool,
        tuning: NicTuning,
    },
    User {
        network: UserNetwork,
        mtu: u32,
    },
}

/// A daemon that serves all its devices.
#[derive(Debug)]
pub(super) struct Up {
    pub(super) process: Guard,
    pub(super) listeners: Listeners,
    /// What it says of itself.
    pub(super) info: DaemonInfo,
}

/// Why a daemon does not serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    /// It could not be started.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// It ended.
    #[error("{0}")]
    Exited(String),
    /// It does not come up.
    #[error("{program} did not answer within {UP_WITHIN:?}{}", .last_line.as_ref().map(|line| format!("; its last words: {line}")).unwrap_or_default())]
    Silent {
        /// The daemon.
        program: &'static str,
        /// Of its log.
        last_line: Option<String>,
    },
    /// It does not answer.
    #[error("{program} does not answer")]
    Connect {
        /// The daemon.
        program: &'static str,
        /// Why.
        #[source]
        source: connect::ConnectError,
    },
    /// It does not answer a call.
    #[error("{program} did not answer {call} within {within:?}")]
    Mute {
        /// The daemon.
        program: &'static str,
        /// The RPC.
        call: String,
        /// How long it had.
        within: Duration,
    },
    /// It refused.
    #[error("{program} refused {call}: {message}")]
    Call {
        /// The daemon.
        program: &'static str,
        /// The RPC and its device.
        call: String,
        /// Its answer.
        code: Code,
        /// Its answer.
        message: String,
    },
    /// The image cannot be used.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The tap cannot be used.
    #[error("NIC {nic}")]
    Tap {
        /// Name of the NIC.
        nic: String,
        /// Why not.
        #[source]
        source: TapError,
    },
    /// The device's socket cannot be bound.
    #[error("socket of {device}")]
    Listen {
        /// Name of the device.
        device: String,
        /// Why not.
        #[source]
        source: listen::ListenError,
    },
    /// Descriptors could not be handed over.
    #[error("handing {device} to {program}")]
    Send {
        /// The daemon.
        program: &'static str,
        /// Name of the device.
        device: String,
        /// Why not.
        #[source]
        source: fds::SendError,
    },
}

impl DaemonError {
    /// The daemon does not know the device.
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Call { code, .. } if *code == Code::NotFound)
    }

    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Process(_) | Self::Send { .. } => Code::Internal,
            Self::Exited(_) | Self::Listen { .. } => Code::FailedPrecondition,
            Self::Silent { .. } | Self::Mute { .. } => Code::DeadlineExceeded,
            Self::Connect { .. } => Code::Unavailable,
            Self::Call { code, .. } => *code,
            Self::Disk(error) => error.code(),
            Self::Tap { source, .. } => source.code(),
        }
    }
}

/// Where a device of ours listens.
pub(super) fn socket(dir: &Path, device: &str) -> PathBuf {
    dir.join(format!("{device}.vu"))
}

/// The tap of a spec's NIC: the one it names, or the one made for it.
pub(super) fn tap_name(spec: &Spec, index: usize) -> String {
    spec.nics[index]
        .tap
        .clone()
        .unwrap_or_else(|| tap::name(&spec.id, index))
}

/// The address of a spec's NIC: the one it names, or one that follows from its name.
pub(crate) fn mac(spec: &Spec, nic: &Nic) -> String {
    match nic.mac.as_str() {
        "" => tap::derived_mac(&spec.id, &nic.name),
        mac => mac.to_owned(),
    }
}

/// The daemons that a spec's machine needs; `passt` is the program of user networks.
pub(super) fn plans(
    spec: &Spec,
    bin_dir: &Path,
    passt: &Path,
    dir: &Path,
    volumes: &Pool,
    networks: &Networks,
) -> Vec<Plan> {
    let seed = spec.cloud_init.as_ref().map(|_| cloud_init::disk(dir));
    let disks = spec.disks.iter().cloned().chain(seed);
    let disks = disks.map(|disk| DevicePlan {
        name: disk.name.clone(),
        backing: Backing::Disk(Box::new(disk)),
    });
    let nics = spec.nics.iter().enumerate();
    let taps = nics
        .clone()
        .filter(|(_, nic)| nic.user.is_none() && !nic.switched);
    let taps = taps.map(|(index, nic)| DevicePlan {
        name: nic.name.clone(),
        backing: Backing::Tap {
            name: tap_name(spec, index),
            queue_pairs: nic.queue_pairs,
            mac: mac(spec, nic),
            mtu: nic.mtu,
            network: nic.network.clone(),
            track_flows: nic.track_flows,
            tuning: nic.tuning,
        },
    });
    let users = nics.filter_map(|(index, nic)| {
        let device = DevicePlan {
            name: nic.name.clone(),
            backing: Backing::User {
                network: nic.user.clone()?,
                mtu: nic.mtu,
            },
        };
        Some((DaemonKind::Passt(index as u8), vec![device]))
    });
    [
        (DaemonKind::Blk, disks.collect::<Vec<_>>()),
        (DaemonKind::Net, taps.collect()),
    ]
    .into_iter()
    .chain(users)
    .filter(|(_, devices)| !devices.is_empty())
    .map(|(kind, devices)| Plan {
        kind,
        program: match kind {
            DaemonKind::Passt(_) => passt.to_owned(),
            _ => bin_dir.join(kind.program()),
        },
        build: String::new(),
        dir: dir.to_owned(),
        volumes: volumes.clone(),
        networks: networks.clone(),
        vm: spec.id.clone(),
        devices,
        taps: KeptTaps::default(),
        stand_in: StandIn::default(),
        knobs: Knobs::default(),
        leases: None,
    })
    .collect()
}

impl DevicePlan {
    /// Whether what it needs can be opened while another process has it.
    pub(super) fn opens_beside_another(&self) -> bool {
        matches!(self.backing, Backing::Disk(_))
    }
}

impl Plan {
    /// Takes over what may change of a running VM's disks; whether anything did.
    pub(super) fn tune(&mut self, spec: &Spec) -> bool {
        let mut changed = false;
        for device in &mut self.devices {
            match &mut device.backing {
                Backing::Disk(disk) => {
                    let wanted = spec.disks.iter().find(|wanted| wanted.name == disk.name);
                    if let Some(wanted) = wanted.filter(|wanted| wanted.tuning != disk.tuning) {
                        disk.tuning = wanted.tuning;
                        changed = true;
                    }
                }
                Backing::Tap { tuning, .. } => {
                    let wanted = spec.nics.iter().find(|wanted| wanted.name == device.name);
                    if let Some(wanted) = wanted.filter(|wanted| wanted.tuning != *tuning) {
                        *tuning = wanted.tuning;
                        changed = true;
                    }
                }
                Backing::User { .. } => {}
            }
        }
        changed
    }

    /// Tells the daemon what may change of all its devices.
    pub(super) async fn push_tuning(&self) -> Result<(), DaemonError> {
        let (disks, nics) = (Disks::of(&self.dir), Nics::of(&self.dir));
        for device in &self.devices {
            match &device.backing {
                Backing::Disk(disk) => disks.tune(&device.name, &disk.tuning).await?,
                Backing::Tap { tuning, .. } => nics.tune(&device.name, tuning).await?,
                Backing::User { .. } => {}
            }
        }
        Ok(())
    }

    pub(super) fn log(&self) -> PathBuf {
        self.dir.join(format!("{}.log", self.kind.stem()))
    }

    /// Of a process that answers at `sockets`.
    pub(super) fn args(&self, sockets: &Sockets) -> Vec<OsString> {
        let mut args = vec![
            "--control-socket".into(),
            sockets.control.clone().into(),
            "--fd-socket".into(),
            sockets.fds.clone().into(),
        ];
        args.extend(self.knobs.daemon_args().map(Into::into));
        // The only servers that this VM's daemon may be connected to.
        for device in &self.devices {
            if let Backing::Disk(disk) = &device.backing
                && let DiskSource::Nbd(nbd) = &disk.source
            {
                args.extend(["--remote".into(), nbd.address.clone().into()]);
            }
        }
        args
    }

    /// Has a process serve the devices: `spare` if that can, else one that is started. Sockets that
    /// `listeners` lacks are bound.
    pub(super) async fn bring_up(
        &self,
        listeners: Listeners,
        spare: Option<Standby>,
    ) -> Result<Up, DaemonError> {
        if let [
            DevicePlan {
                name,
                backing: Backing::User { network, mtu },
            },
        ] = self.devices.as_slice()
        {
            let socket = socket(&self.dir, name);
            let args = passt::args(&socket, network, *mtu, passt::resolver());
            return passt::bring_up(&self.program, &args, &socket, &self.log()).await;
        }
        let listeners = self.bind_missing(listeners)?;
        let standby = match spare {
            Some(spare) if spare.is_awake().await => spare,
            _ => Standby::start(self).await?,
        };
        let (process, info) = standby.take_over(self, &listeners).await?;
        if let Some(leases) = &self.leases
            && let Err(error) = self.allow_io(leases.io_until()).await
            && is_ignorant(&error)
            && self.kind == DaemonKind::Blk
        {
            process.kill().await;
            return Err(error);
        }
        Ok(Up {
            process,
            listeners,
            info,
        })
    }

    /// Whether an adopted daemon serves all devices, and what it says of itself then.
    pub(super) async fn check(&self, pid: i32) -> Result<Option<DaemonInfo>, DaemonError> {
        if let DaemonKind::Passt(_) = self.kind {
            return Ok(passt::sandbox(pid).map(passt::info));
        }
        let incarnation = Incarnation::usual(self, CALL_DEADLINE).await?;
        let listed = incarnation.devices(CALL_DEADLINE).await?;
        let complete = self
            .devices
            .iter()
            .all(|device| listed.iter().any(|served| served.id == device.name));
        if !complete {
            return Ok(None);
        }
        incarnation.info(CALL_DEADLINE).await.map(Some)
    }

    /// What fails its disks' requests while it is not there.
    pub(super) fn stand_in(&self) -> &StandIn {
        &self.stand_in
    }

    /// For the stand-in itself, which is not to dismiss itself.
    pub(super) fn without_stand_in(&self) -> Self {
        Self {
            stand_in: StandIn::default(),
            ..self.clone()
        }
    }

    /// Whether there can be several processes of this daemon.
    pub(super) fn can_stand_by(&self) -> bool {
        !matches!(self.kind, DaemonKind::Passt(_))
    }

    /// Uses what the VM's daemon of this kind was upgraded to.
    pub(super) fn use_pin(&mut self, pins: &[Pinned]) {
        if let Some(pin) = pins.iter().find(|pin| pin.kind == self.kind) {
            self.use_version(pin.path.clone(), pin.build.clone());
        }
    }

    /// Starts as a fault says.
    pub(super) fn use_knobs(&mut self, knobs: &Knobs) {
        self.knobs = knobs.clone();
    }

    /// Its devices are used while the host's lease says so, if the VM needs that.
    pub(super) fn use_leases(&mut self, spec: &Spec, leases: &Leases) {
        self.leases = (spec.restart == Restart::Anywhere).then(|| leases.clone());
    }

    /// Lets the daemon's devices be used until then. A third party's knows no leases: its guest does not
    /// run.
    pub(super) async fn allow_io(&self, until: Moment) -> Result<(), DaemonError> {
        if let DaemonKind::Passt(_) = self.kind {
            return Ok(());
        }
        let socket = self.dir.join(format!("{}.sock", self.kind.stem()));
        allow_io(&socket, self.kind.program(), Vec::new(), until).await
    }

    /// What goes wrong with a start on purpose.
    pub(super) fn start_fault(&self) -> StartFault {
        let devices = self.devices.iter().map(|device| device.name.as_str());
        self.knobs.at_start(&self.vm, devices)
    }

    /// Uses another version from the next process on.
    pub(super) fn use_version(&mut self, program: PathBuf, build: String) {
        self.program = program;
        self.build = build;
    }

    pub(super) fn program(&self) -> &Path {
        &self.program
    }

    pub(super) fn build(&self) -> &str {
        &self.build
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The disks among the devices.
    pub(super) fn disks(&self) -> impl Iterator<Item = &Disk> {
        self.devices
            .iter()
            .filter_map(|device| match &device.backing {
                Backing::Disk(disk) => Some(&**disk),
                Backing::Tap { .. } | Backing::User { .. } => None,
            })
    }

    pub(super) fn volumes(&self) -> &Pool {
        &self.volumes
    }

    /// As [`Self::bind_missing`], while a process that an earlier agent started listens on sockets of its
    /// own: frontends find the new ones from their next attempt on.
    pub(super) fn bind_beside(&self, mut listeners: Listeners) -> Result<Listeners, DaemonError> {
        for device in &self.devices {
            if listeners.contains_key(&device.name) {
                continue;
            }
            let path = socket(&self.dir, &device.name);
            let fresh = path.with_extension("vu.new");
            let failed = |source| DaemonError::Listen {
                device: device.name.clone(),
                source,
            };
            let (listener, file) = listen::unix_socket(&fresh).map_err(failed)?;
            std::fs::rename(&fresh, &path).map_err(|source| {
                failed(listen::ListenError::Unix {
                    path: path.clone(),
                    source,
                })
            })?;
            std::mem::forget(file);
            listeners.insert(device.name.clone(), Arc::new(listener));
        }
        Ok(listeners)
    }

    pub(super) fn bind_missing(&self, mut listeners: Listeners) -> Result<Listeners, DaemonError> {
        for device in &self.devices {
            if listeners.contains_key(&device.name) {
                continue;
            }
            let path = socket(&self.dir, &device.name);
            let (listener, file) =
                listen::unix_socket(&path).map_err(|source| DaemonError::Listen {
                    device: device.name.clone(),
                    source,
                })?;
            // The path must outlive the agent; the VM's clean-up removes it with the directory.
            std::mem::forget(file);
            listeners.insert(device.name.clone(), Arc::new(listener));
        }
        Ok(listeners)
    }

    /// Opens what the device needs, sends it, and answers with the request that names it.
    pub(super) async fn send_descriptors(
        &self,
        fd_socket: &Path,
        device: DevicePlan,
        listener: Arc<UnixListener>,
    ) -> Result<AttachRequest, DaemonError> {
        let (program, fd_socket) = (self.kind.program(), fd_socket.to_owned());
        let volumes = self.volumes.clone();
        let (networks, vm) = (self.networks.clone(), self.vm.clone());
        let io_until = self.leases.as_ref().map(Leases::io_until);
        let taps = self.taps.clone();
        let name = device.name.clone();
        let sending = tokio::task::spawn_blocking(move || {
            let send = |fd: BorrowedFd<'_>| {
                let token = uuid::Uuid::new_v4().to_string();
                fds::send(&fd_socket, &token, &[fd], SEND_DEADLINE)
                    .map(|()| FdRef { token })
                    .map_err(|source| DaemonError::Send {
                        program,
                        device: device.name.clone(),
                        source,
                    })
            };
            let backing = match &device.backing {
                Backing::Disk(disk) => {
                    let mut config = disk::open(disk, &volumes)?.into_config(disk, send)?;
                    config.leased = io_until.is_some();
                    config.io_until_boottime_ns = io_until.unwrap_or_default().as_nanos();
                    attach_request::Device::Blk(config)
                }
                Backing::User { .. } => unreachable!("passt is handed nothing"),
                Backing::Tap {
                    name,
                    queue_pairs,
                    mac,
                    mtu,
                    network,
                    track_flows,
                    tuning,
                } => {
                    let policy = network
                        .as_ref()
                        .and_then(|network| networks.policy(network, &vm, &device.name));
                    let policy = match track_flows {
                        true => Some(Policy {
                            track_flows: true,
                            ..policy.unwrap_or_default()
                        }),
                        false => policy,
                    };
                    let queues = taps.open(name, *queue_pairs);
                    let queues = queues.map_err(|source| DaemonError::Tap {
                        nic: device.name.clone(),
                        source,
                    })?;
                    let sent: Result<Vec<FdRef>, DaemonError> =
                        queues.iter().map(|queue| send(queue.as_fd())).collect();
                    attach_request::Device::Net(NetConfig {
                        tap_fds: sent?,
                        mac: mac.clone(),
                        mtu: *mtu,
                        tap_name: name.clone(),
                        policy,
                        limits: Some(tuning.limits()),
                        link_down: tuning.link_down,
                        leased: io_until.is_some(),
                        io_until_boottime_ns: io_until.unwrap_or_default().as_nanos(),
                        ..NetConfig::default()
                    })
                }
            };
            Ok(AttachRequest {
                id: device.name.clone(),
                listener: Some(attach_request::Listener::SocketFd(send(listener.as_fd())?)),
                device: Some(backing),
            })
        });
        sending
            .await
            .unwrap_or_else(|panic| panic!("handing over {name}: {panic}"))
    }
}

/// A daemon's metrics; `None` when it is not there or does not answer.
pub(super) async fn metrics(dir: &Path, kind: DaemonKind) -> Option<String> {
    let socket = dir.join(format!("{}.sock", kind.stem()));
    if !socket.exists() {
        return None;
    }
    let asking = async {
        let channel = connect::unix(&socket, METRICS_DEADLINE).await.ok()?;
        let mut client = DeviceDaemonClient::new(channel);
        Some(
            client
                .get_metrics(GetMetricsRequest {})
                .await
                .ok()?
                .into_inner()
                .text,
        )
    };
    tokio::time::timeout(METRICS_DEADLINE, asking).await.ok()?
}

pub(crate) fn with_deadline<T>(message: T, deadline: Duration) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    telemetry::inject(request.metadata_mut());
    request.set_timeout(deadline);
    request
}
