//! A device daemon of a VM: which devices it serves, and how one incarnation of it comes up.
//!
//! Each incarnation gets the same listening sockets but freshly opened images and taps: a lock on
//! an image belongs to an open file, so it tells when the last request of the killed incarnation
//! is over.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use api::{
    connect,
    device::{
        AttachRequest, FdRef, GetDaemonRequest, GetMetricsRequest, ListDevicesRequest, NetConfig,
        Policy, attach_request, device_daemon_client::DeviceDaemonClient,
    },
    fds, listen,
};
use tonic::{Code, transport::Channel};

use super::{
    disk::{self, DiskError},
    disks::Disks,
    ending,
    nics::Nics,
    passt,
};
use crate::{
    cloud_init,
    network::Networks,
    process::{Guard, Process, ProcessError},
    record::DaemonKind,
    spec::{Disk, DiskSource, Nic, NicTuning, Spec, UserNetwork},
    tap::{self, TapError},
    volumes::Pool,
};

/// From exec to an answering control socket; a loaded host runs 100 of them.
const UP_WITHIN: Duration = Duration::from_secs(15);
/// Attaching waits for the ghost requests of a killed incarnation, which a slow disk may hold.
const ATTACH_DEADLINE: Duration = Duration::from_secs(30);
const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// A process that broke off a call is reaped in a millisecond.
const DYING_WITHIN: Duration = Duration::from_millis(200);
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
    dir: PathBuf,
    volumes: Pool,
    networks: Networks,
    vm: String,
    pub(super) devices: Vec<DevicePlan>,
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
    pub(super) sandbox: Vec<String>,
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
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Process(_) | Self::Send { .. } => Code::Internal,
            Self::Exited(_) | Self::Listen { .. } => Code::FailedPrecondition,
            Self::Silent { .. } => Code::DeadlineExceeded,
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
        dir: dir.to_owned(),
        volumes: volumes.clone(),
        networks: networks.clone(),
        vm: spec.id.clone(),
        devices,
    })
    .collect()
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

    fn control_socket(&self) -> PathBuf {
        self.dir.join(format!("{}.sock", self.kind.stem()))
    }

    fn fd_socket(&self) -> PathBuf {
        self.dir.join(format!("{}.fds", self.kind.stem()))
    }

    fn args(&self) -> Vec<OsString> {
        let mut args = vec![
            "--control-socket".into(),
            self.control_socket().into(),
            "--fd-socket".into(),
            self.fd_socket().into(),
        ];
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

    /// Starts the daemon and hands it its devices. Sockets that `listeners` lacks are bound.
    pub(super) async fn bring_up(&self, listeners: Listeners) -> Result<Up, DaemonError> {
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
        let process = Process::spawn(&self.program, &self.args(), &self.log())?;
        let exited = process.exited();
        let ended = |exit| DaemonError::Exited(ending(self.kind.program(), exit, &self.log()));
        let sandbox = tokio::select! {
            exit = exited => return Err(ended(exit)),
            served = self.hand_over(&listeners) => match served {
                Ok(sandbox) => sandbox,
                // A call that a dying daemon cut off says less than its last words.
                Err(error) => match process.exited_within(DYING_WITHIN).await {
                    Some(exit) => return Err(ended(exit)),
                    None => {
                        // Gone before the failure is told, not some time after.
                        process.kill().await;
                        return Err(error);
                    }
                },
            },
        };
        Ok(Up {
            process,
            listeners,
            sandbox,
        })
    }

    /// Whether an adopted daemon serves all devices, and what its sandbox is.
    pub(super) async fn check(&self, pid: i32) -> Result<Option<Vec<String>>, DaemonError> {
        if let DaemonKind::Passt(_) = self.kind {
            return Ok(passt::sandbox(pid));
        }
        let mut client = self.client(CALL_DEADLINE).await?;
        let listed = client
            .list_devices(with_deadline(ListDevicesRequest {}, CALL_DEADLINE))
            .await
            .map_err(self.refused("ListDevices"))?
            .into_inner();
        let complete = self
            .devices
            .iter()
            .all(|device| listed.devices.iter().any(|served| served.id == device.name));
        if !complete {
            return Ok(None);
        }
        self.sandbox(&mut client).await.map(Some)
    }

    fn bind_missing(&self, mut listeners: Listeners) -> Result<Listeners, DaemonError> {
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

    async fn hand_over(&self, listeners: &Listeners) -> Result<Vec<String>, DaemonError> {
        let mut client = match tokio::time::timeout(UP_WITHIN, self.client(UP_WITHIN)).await {
            Ok(Ok(client)) => client,
            Ok(Err(_)) | Err(_) => {
                return Err(DaemonError::Silent {
                    program: self.kind.program(),
                    last_line: crate::process::last_line(&self.log()),
                });
            }
        };
        for device in &self.devices {
            let listener = listeners.get(&device.name).expect("bound before").clone();
            let request = self.send_descriptors(device.clone(), listener).await?;
            client
                .attach(with_deadline(request, ATTACH_DEADLINE))
                .await
                .map_err(self.refused(&format!("to attach {}", device.name)))?;
        }
        self.sandbox(&mut client).await
    }

    /// Opens what the device needs, sends it, and answers with the request that names it.
    async fn send_descriptors(
        &self,
        device: DevicePlan,
        listener: Arc<UnixListener>,
    ) -> Result<AttachRequest, DaemonError> {
        let (program, fd_socket) = (self.kind.program(), self.fd_socket());
        let volumes = self.volumes.clone();
        let (networks, vm) = (self.networks.clone(), self.vm.clone());
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
                    let config = disk::open(disk, &volumes)?.into_config(disk, send)?;
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
                    let queues = open_tap(&device.name, name, *queue_pairs)?;
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

    async fn client(&self, within: Duration) -> Result<DeviceDaemonClient<Channel>, DaemonError> {
        connect::unix(&self.control_socket(), within)
            .await
            .map(DeviceDaemonClient::new)
            .map_err(|source| DaemonError::Connect {
                program: self.kind.program(),
                source,
            })
    }

    async fn sandbox(
        &self,
        client: &mut DeviceDaemonClient<Channel>,
    ) -> Result<Vec<String>, DaemonError> {
        client
            .get_daemon(with_deadline(GetDaemonRequest {}, CALL_DEADLINE))
            .await
            .map(|info| info.into_inner().sandbox)
            .map_err(self.refused("GetDaemon"))
    }

    fn refused(&self, call: &str) -> impl FnOnce(tonic::Status) -> DaemonError {
        let (program, call) = (self.kind.program(), call.to_owned());
        move |status| DaemonError::Call {
            program,
            call,
            code: status.code(),
            message: status.message().to_owned(),
        }
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

fn open_tap(nic: &str, name: &str, queue_pairs: u32) -> Result<Vec<OwnedFd>, DaemonError> {
    tap::open(name, queue_pairs).map_err(|source| DaemonError::Tap {
        nic: nic.to_owned(),
        source,
    })
}

pub(crate) fn with_deadline<T>(message: T, deadline: Duration) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(deadline);
    request
}
