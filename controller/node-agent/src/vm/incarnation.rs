//! One process of a device daemon and where it answers.
//!
//! ```text
//! start ──▶ Standby ── take_over ──▶ serving, on the daemon's usual sockets
//!           (confined, no device)
//! ```
//!
//! Each process is started on sockets of its own, so that several of one daemon can be there side by side: one
//! that serves, one that stands by in case that one dies, one of another version.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use api::{
    connect,
    device::{
        AttachRequest, DaemonInfo, DetachRequest, Device, GetDaemonRequest, ListDevicesRequest,
        device_daemon_client::DeviceDaemonClient,
    },
};
use tokio::{net::UnixStream, task::JoinSet};
use tonic::{Code, transport::Channel};

use super::{
    daemon::{DaemonError, DevicePlan, Listeners, Plan, with_deadline},
    ending,
};
use crate::{
    process::{Guard, Process},
    record::DaemonKind,
};

/// From exec to an answering control socket; a loaded host runs 100 of them.
pub(super) const UP_WITHIN: Duration = Duration::from_secs(15);
/// Between two looks whether it answers.
const KNOCK_INTERVAL: Duration = Duration::from_millis(2);
/// Attaching waits for the ghost requests of a killed incarnation, which a slow disk may hold.
const ATTACH_DEADLINE: Duration = Duration::from_secs(30);
pub(super) const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// A process that broke off a call is reaped in a millisecond.
const DYING_WITHIN: Duration = Duration::from_millis(200);
/// One that stands by has nothing else to do than to answer.
const AWAKE_WITHIN: Duration = Duration::from_millis(250);

/// Tells the sockets of an agent's processes apart.
static NEXT: AtomicU32 = AtomicU32::new(1);

/// The sockets of a daemon's process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sockets {
    pub(super) control: PathBuf,
    pub(super) fds: PathBuf,
}

impl Sockets {
    /// Where the process that serves is found.
    pub(super) fn usual(dir: &Path, kind: DaemonKind) -> Self {
        Self::named(dir, &kind.stem())
    }

    /// Of a process that is about to be started.
    fn fresh(dir: &Path, kind: DaemonKind) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self::named(dir, &format!("{}.{number}", kind.stem()))
    }

    fn named(dir: &Path, stem: &str) -> Self {
        Self {
            control: dir.join(format!("{stem}.sock")),
            fds: dir.join(format!("{stem}.fds")),
        }
    }
}

/// A process of a daemon that answers. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Incarnation {
    kind: DaemonKind,
    pub(super) sockets: Sockets,
    client: DeviceDaemonClient<Channel>,
}

/// A process that is up and confined and serves nothing yet. Killed unless it is taken over.
#[derive(Debug)]
pub(super) struct Standby {
    pub(super) process: Guard,
    pub(super) incarnation: Incarnation,
    pub(super) info: DaemonInfo,
    /// What it executes.
    pub(super) program: PathBuf,
}

impl Standby {
    /// Starts a process of `plan`'s program.
    pub(super) async fn start(plan: &Plan) -> Result<Self, DaemonError> {
        let sockets = Sockets::fresh(plan.dir(), plan.kind);
        let fault = plan.start_fault();
        tokio::time::sleep(fault.delay).await;
        let program = fault.program.as_deref().unwrap_or_else(|| plan.program());
        let process = Process::spawn(program, &plan.args(&sockets), &plan.log())?;
        let exited = process.exited();
        let up = async {
            let incarnation = Incarnation::connect(plan.kind, sockets).await.ok()?;
            let info = incarnation.info(CALL_DEADLINE).await.ok()?;
            Some((incarnation, info))
        };
        tokio::select! {
            exit = exited => Err(DaemonError::Exited(ending(plan.kind.program(), exit, &plan.log()))),
            up = tokio::time::timeout(UP_WITHIN, up) => match up {
                Ok(Some((incarnation, info))) => Ok(Self {
                    process,
                    incarnation,
                    info,
                    program: program.to_owned(),
                }),
                Ok(None) | Err(_) => {
                    // Gone before the failure is told, not some time after.
                    process.kill().await;
                    Err(DaemonError::Silent {
                        program: plan.kind.program(),
                        last_line: crate::process::last_line(&plan.log()),
                    })
                }
            }
        }
    }

    /// Whether it can still be used.
    pub(super) async fn is_awake(&self) -> bool {
        self.process.exit().is_none() && self.incarnation.info(AWAKE_WITHIN).await.is_ok()
    }

    /// Has it serve all devices, and makes it the one that is found on the usual sockets. When that fails it
    /// is gone on return.
    pub(super) async fn take_over(
        self,
        plan: &Plan,
        listeners: &Listeners,
    ) -> Result<(Guard, DaemonInfo), DaemonError> {
        let exited = self.process.exited();
        let ended = |exit| DaemonError::Exited(ending(plan.kind.program(), exit, &plan.log()));
        tokio::select! {
            exit = exited => return Err(ended(exit)),
            served = self.incarnation.attach_all(plan, listeners) => match served {
                Ok(()) => {}
                // A call that a dying daemon cut off says less than its last words.
                Err(error) => match self.process.exited_within(DYING_WITHIN).await {
                    Some(exit) => return Err(ended(exit)),
                    None => {
                        self.process.kill().await;
                        return Err(error);
                    }
                },
            },
        }
        self.incarnation.become_usual(plan);
        Ok((self.process, self.info))
    }
}

impl Incarnation {
    /// The process that serves now.
    pub(super) async fn usual(plan: &Plan, within: Duration) -> Result<Self, DaemonError> {
        let sockets = Sockets::usual(plan.dir(), plan.kind);
        let client = client(plan.kind, &sockets.control, within).await?;
        Ok(Self {
            kind: plan.kind,
            sockets,
            client,
        })
    }

    /// A process that was just started: waits until it answers.
    async fn connect(kind: DaemonKind, sockets: Sockets) -> Result<Self, DaemonError> {
        while UnixStream::connect(&sockets.control).await.is_err() {
            tokio::time::sleep(KNOCK_INTERVAL).await;
        }
        let client = client(kind, &sockets.control, UP_WITHIN).await?;
        Ok(Self {
            kind,
            sockets,
            client,
        })
    }

    pub(super) async fn info(&self, within: Duration) -> Result<DaemonInfo, DaemonError> {
        let mut client = self.client.clone();
        let call = client.get_daemon(with_deadline(GetDaemonRequest {}, within));
        self.in_time("GetDaemon", within, call).await
    }

    pub(super) async fn devices(&self, within: Duration) -> Result<Vec<Device>, DaemonError> {
        let mut client = self.client.clone();
        let call = client.list_devices(with_deadline(ListDevicesRequest {}, within));
        let listed = self.in_time("ListDevices", within, call).await?;
        Ok(listed.devices)
    }

    /// Hands it all devices of `plan`, at the same time: none waits for another's ghosts.
    pub(super) async fn attach_all(
        &self,
        plan: &Plan,
        listeners: &Listeners,
    ) -> Result<(), DaemonError> {
        let shared = Arc::new(plan.clone());
        let mut attaching = JoinSet::new();
        for device in &plan.devices {
            let listener = listeners.get(&device.name).expect("bound before").clone();
            let (own, plan, device) = (self.clone(), shared.clone(), device.clone());
            attaching.spawn(async move { own.attach(&plan, device, listener).await });
        }
        let mut first_error = None;
        while let Some(joined) = attaching.join_next().await {
            match joined {
                Ok(Ok(())) => {}
                Ok(Err(error)) => first_error = first_error.or(Some(error)),
                Err(panic) => panic!("attaching a device: {panic}"),
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// Opens what the device needs and has it served.
    pub(super) async fn attach(
        &self,
        plan: &Plan,
        device: DevicePlan,
        listener: Arc<std::os::unix::net::UnixListener>,
    ) -> Result<(), DaemonError> {
        let request = plan
            .send_descriptors(&self.sockets.fds, device, listener)
            .await?;
        plan.stand_in().dismiss().await;
        self.attach_sent(request).await
    }

    /// As [`Self::attach`], of what was opened and sent before.
    pub(super) async fn attach_sent(&self, request: AttachRequest) -> Result<(), DaemonError> {
        let what = format!("to attach {}", request.id);
        let mut client = self.client.clone();
        let call = client.attach(with_deadline(request, ATTACH_DEADLINE));
        self.in_time(&what, ATTACH_DEADLINE, call).await.map(drop)
    }

    /// Has it let go of a device, after what is in flight was completed within `drain`. How many requests
    /// were not: whoever serves the device next finds them in the in-flight region.
    pub(super) async fn detach(
        &self,
        device: &str,
        drain: Duration,
    ) -> Result<Drained, DaemonError> {
        let request = || {
            let request = DetachRequest {
                id: device.to_owned(),
                drain_ms: drain.as_millis().clamp(1, u32::MAX.into()) as u32,
            };
            with_deadline(request, drain + CALL_DEADLINE)
        };
        let (mut client, what) = (self.client.clone(), format!("to detach {device}"));
        let within = drain + CALL_DEADLINE;
        match self.in_time(&what, within, client.detach(request())).await {
            Ok(_) => Ok(Drained::Wholly),
            Err(DaemonError::Call {
                code: Code::DeadlineExceeded,
                message,
                ..
            }) => {
                // It serves the device no more, but keeps it for somebody to look at.
                let again = self.in_time(&what, within, client.detach(request()));
                again.await.map(|_| Drained::InPart(message))
            }
            Err(error) => Err(error),
        }
    }

    /// Makes it the one that is found on the daemon's usual sockets.
    pub(super) fn become_usual(&self, plan: &Plan) {
        let usual = Sockets::usual(plan.dir(), plan.kind);
        let moves = [
            (&self.sockets.control, &usual.control),
            (&self.sockets.fds, &usual.fds),
        ];
        for (from, to) in moves {
            if let Err(error) = std::fs::rename(from, to) {
                tracing::warn!("renaming {} to {}: {error}", from.display(), to.display());
            }
        }
    }

    /// A call that is also given up when the process does not even refuse it.
    async fn in_time<T>(
        &self,
        what: &str,
        within: Duration,
        call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T, DaemonError> {
        match tokio::time::timeout(within + DYING_WITHIN, call).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(self.kind.refused(what)(status)),
            Err(_) => Err(DaemonError::Mute {
                program: self.kind.program(),
                call: what.to_owned(),
                within,
            }),
        }
    }
}

/// How a device was let go of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Drained {
    /// All requests were completed.
    Wholly,
    /// Some were not, in the daemon's words.
    InPart(String),
}

impl DaemonKind {
    fn refused(self, call: &str) -> impl FnOnce(tonic::Status) -> DaemonError + use<> {
        let (program, call) = (self.program(), call.to_owned());
        move |status| DaemonError::Call {
            program,
            call,
            code: status.code(),
            message: status.message().to_owned(),
        }
    }
}

async fn client(
    kind: DaemonKind,
    socket: &Path,
    within: Duration,
) -> Result<DeviceDaemonClient<Channel>, DaemonError> {
    connect::unix(socket, within)
        .await
        .map(DeviceDaemonClient::new)
        .map_err(|source| DaemonError::Connect {
            program: kind.program(),
            source,
        })
}
