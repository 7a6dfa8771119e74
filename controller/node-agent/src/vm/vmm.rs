//! `vmm-core` as the agent sees it: its command line, its control socket and the note it leaves
//! when it ends.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    time::Duration,
};

use api::{
    connect,
    validate::SEED_DISK,
    vmm::{
        AllowRunRequest, DeviceHealth, GetDevicesRequest, GetVmmRequest, PauseRequest,
        PowerButtonRequest, RefreshDeviceConfigRequest, ResetRequest, ResumeRequest, StopRequest,
        VmmInfo, VmmState, vmm_client::VmmClient,
    },
};
use lease::Moment;
use serde::Deserialize;
use tonic::{Code, transport::Channel};

use super::{daemon, error_chain, passt, vmm_socket};
use crate::{
    faults::Knobs,
    process::{Exit, Guard, Process, ProcessError},
    spec::Spec,
};

const PROGRAM: &str = "vmm-core";
/// vmm-core itself gives its devices 10 s to connect; loading a kernel from a slow disk comes first.
const UP_WITHIN: Duration = Duration::from_secs(40);
/// A control call is answered from memory.
const CALL_DEADLINE: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Why `vmm-core` does not do what it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VmmError {
    /// It could not be started.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// It ended instead of running the machine.
    #[error("{0}")]
    Exited(String),
    /// It does not come up.
    #[error("{PROGRAM} did not start the machine within {UP_WITHIN:?}{}", .last_line.as_ref().map(|line| format!("; its last words: {line}")).unwrap_or_default())]
    Silent {
        /// Of its log.
        last_line: Option<String>,
    },
    /// It does not answer.
    #[error("{PROGRAM} does not answer")]
    Connect(#[from] connect::ConnectError),
    /// It refused.
    #[error("{PROGRAM} refused {call}: {message}")]
    Call {
        /// The RPC.
        call: &'static str,
        /// Its answer.
        code: Code,
        /// Its answer.
        message: String,
    },
}

impl VmmError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Process(_) => Code::Internal,
            // A kernel that is none, memory that cannot be had: the text says.
            Self::Exited(_) => Code::FailedPrecondition,
            Self::Silent { .. } => Code::DeadlineExceeded,
            Self::Connect(_) => Code::Unavailable,
            Self::Call { code, .. } => *code,
        }
    }
}

/// The note that `vmm-core` leaves in its --exit-file.
#[derive(Debug, Deserialize)]
pub(super) struct ExitNote {
    /// guest-shutdown, stop-request or vmm-error.
    pub(super) reason: String,
    /// For people.
    #[serde(default)]
    pub(super) message: String,
}

/// Where the log of `vmm-core` is.
pub(super) fn log(dir: &Path) -> PathBuf {
    dir.join("vmm.log")
}

/// Where `vmm-core` writes why it ended.
pub(super) fn exit_file(dir: &Path) -> PathBuf {
    dir.join("exit.json")
}

/// The note, if it left one.
pub(super) fn exit_note(dir: &Path) -> Option<ExitNote> {
    serde_json::from_slice(&std::fs::read(exit_file(dir)).ok()?).ok()
}

/// The command line of a spec's machine, which runs until then if that is said.
pub(super) fn args(
    spec: &Spec,
    dir: &Path,
    knobs: &Knobs,
    run_until: Option<Moment>,
) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["--control-socket".into(), vmm_socket(dir).into()];
    args.extend(knobs.daemon_args().map(Into::into));
    let mut option = |name: &str, value: OsString| args.extend([name.into(), value]);
    option("--id", spec.id.clone().into());
    if let Some(until) = run_until {
        option(
            "--run-until-boottime-ns",
            until.as_nanos().to_string().into(),
        );
    }
    option("--kernel", spec.kernel.clone().into());
    if let Some(initramfs) = &spec.initramfs {
        option("--initramfs", initramfs.clone().into());
    }
    if !spec.cmdline.is_empty() {
        option("--cmdline", spec.cmdline.clone().into());
    }
    option("--cpus", spec.vcpus.to_string().into());
    option("--memory", format!("{}K", spec.memory_bytes >> 10).into());
    option("--exit-file", exit_file(dir).into());
    // How many queues a device has is for its daemon to say.
    for disk in &spec.disks {
        option(
            "--device",
            device(&disk.name, "blk", &daemon::socket(dir, &disk.name), 0, 0),
        );
    }
    for nic in &spec.nics {
        let socket = daemon::socket(dir, &nic.name);
        option(
            "--device",
            match nic.user {
                None => device(&nic.name, "net", &socket, 0, 0),
                Some(_) => {
                    let mut text = device(&nic.name, "net", &socket, 2, 0);
                    text.push(passt::device_options(&daemon::mac(spec, nic), nic.mtu));
                    text
                }
            },
        );
    }
    for other in &spec.vhost_user {
        let (queues, queue_size) = (other.num_queues, other.queue_size);
        let mut text = device(&other.name, &other.kind, &other.socket, queues, queue_size);
        if !other.config.is_empty() {
            text.push(format!(",config=hex:{}", hex(&other.config)));
        }
        option("--device", text);
    }
    // Last, so that it moves no other device to another slot.
    if spec.cloud_init.is_some() {
        let socket = daemon::socket(dir, SEED_DISK);
        option("--device", device(SEED_DISK, "blk", &socket, 0, 0));
    }
    args
}

fn device(tag: &str, kind: &str, socket: &Path, queues: u32, queue_size: u32) -> OsString {
    let mut text = OsString::from(format!("tag={tag},type={kind},socket="));
    text.push(socket);
    if queues > 0 {
        text.push(format!(",queues={queues}"));
    }
    if queue_size > 0 {
        text.push(format!(",queue-size={queue_size}"));
    }
    text
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Starts `vmm-core` and waits until the machine runs (or has ended by itself already).
pub(super) async fn bring_up(
    bin_dir: &Path,
    spec: &Spec,
    dir: &Path,
    knobs: &Knobs,
    run_until: Option<Moment>,
) -> Result<Guard, VmmError> {
    let args = args(spec, dir, knobs, run_until);
    let guard = Process::spawn(&bin_dir.join(PROGRAM), &args, &log(dir))?;
    let exited = guard.exited();
    tokio::select! {
        exit = exited => {
            // A guest of a few instructions may have shut down before it was looked at.
            if exit == Exit::Code(0) && exit_note(dir).is_some() {
                return Ok(guard);
            }
            let message = match exit_note(dir) {
                Some(note) if !note.message.is_empty() => format!("{PROGRAM}: {}", note.message),
                _ => super::ending(PROGRAM, exit, &log(dir)),
            };
            Err(VmmError::Exited(message))
        }
        up = tokio::time::timeout(UP_WITHIN, running(dir)) => match up {
            Ok(()) => Ok(guard),
            Err(_) => Err(VmmError::Silent { last_line: crate::process::last_line(&log(dir)) }),
        }
    }
}

/// Polls until vCPUs run. That it does not answer is no failure: it may be waiting for a device,
/// or just be ending, and says itself what is wrong.
async fn running(dir: &Path) {
    loop {
        if let Ok(info) = info(dir).await
            && matches!(info.state(), VmmState::Running | VmmState::Paused)
        {
            return;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// What runs there.
pub(super) async fn info(dir: &Path) -> Result<VmmInfo, VmmError> {
    get(&mut client(dir, CALL_DEADLINE).await?).await
}

/// Hard-resets the machine.
pub(super) async fn reset(dir: &Path) -> Result<(), VmmError> {
    let mut client = client(dir, CALL_DEADLINE).await?;
    client
        .reset(with_deadline(ResetRequest {}))
        .await
        .map(drop)
        .map_err(refused("Reset"))
}

/// Has vCPUs and rings stand still.
pub(super) async fn pause(dir: &Path) -> Result<(), VmmError> {
    let mut client = client(dir, CALL_DEADLINE).await?;
    let paused = client.pause(with_deadline(PauseRequest {})).await;
    paused.map(drop).map_err(refused("Pause"))
}

/// Lets them go on.
pub(super) async fn resume(dir: &Path) -> Result<(), VmmError> {
    let mut client = client(dir, CALL_DEADLINE).await?;
    let resumed = client.resume(with_deadline(ResumeRequest {})).await;
    resumed.map(drop).map_err(refused("Resume"))
}

/// Lets vCPUs run until then, where they need leave.
pub(super) async fn allow_run(dir: &Path, until: Moment) -> Result<(), VmmError> {
    let mut client = client(dir, CALL_DEADLINE).await?;
    let request = with_deadline(AllowRunRequest {
        until_boottime_ns: until.as_nanos(),
    });
    let allowed = client.allow_run(request).await;
    allowed.map(drop).map_err(refused("AllowRun"))
}

/// The devices, each with its last `max_outages` outages.
pub(crate) async fn devices(dir: &Path, max_outages: u32) -> Result<Vec<DeviceHealth>, VmmError> {
    let mut client = client(dir, CALL_DEADLINE).await?;
    let request = with_deadline(GetDevicesRequest { max_outages });
    client
        .get_devices(request)
        .await
        .map(|answer| answer.into_inner().devices)
        .map_err(refused("GetDevices"))
}

/// Presses the power button.
pub(super) async fn power_button(dir: &Path) -> Result<(), VmmError> {
    let mut client = client(dir, CALL_DEADLINE).await?;
    let request = with_deadline(PowerButtonRequest {});
    client
        .power_button(request)
        .await
        .map(drop)
        .map_err(refused("PowerButton"))
}

/// Stops the machine without asking the guest.
pub(super) async fn stop(dir: &Path) -> Result<(), VmmError> {
    let mut client = client(dir, CALL_DEADLINE).await?;
    client
        .stop(with_deadline(StopRequest {}))
        .await
        .map(drop)
        .map_err(refused("Stop"))
}

/// Has the machine read a device's configuration space again, and the guest told if it changed.
pub(crate) async fn refresh_device(dir: &Path, tag: &str) -> Result<(), VmmError> {
    let mut client = client(dir, CALL_DEADLINE).await?;
    let request = with_deadline(RefreshDeviceConfigRequest {
        tag: tag.to_owned(),
    });
    client
        .refresh_device_config(request)
        .await
        .map(drop)
        .map_err(refused("RefreshDeviceConfig"))
}

async fn get(client: &mut VmmClient<Channel>) -> Result<VmmInfo, VmmError> {
    client
        .get_vmm(with_deadline(GetVmmRequest {}))
        .await
        .map(tonic::Response::into_inner)
        .map_err(refused("GetVmm"))
}

async fn client(dir: &Path, deadline: Duration) -> Result<VmmClient<Channel>, VmmError> {
    Ok(VmmClient::new(
        connect::unix(&vmm_socket(dir), deadline).await?,
    ))
}

fn with_deadline<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    telemetry::inject(request.metadata_mut());
    request.set_timeout(CALL_DEADLINE);
    request
}

fn refused(call: &'static str) -> impl FnOnce(tonic::Status) -> VmmError {
    move |status| VmmError::Call {
        call,
        code: status.code(),
        message: match std::error::Error::source(&status) {
            Some(source) if status.message().is_empty() => error_chain(source),
            _ => status.message().to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_devices_configuration_space_reaches_vmm_core() {
        let mut api = crate::spec::tests::api_spec("web");
        api.vhost_user = vec![api::node::VhostUserSpec {
            name: "share".into(),
            r#type: "fs".into(),
            socket: "/fs.sock".into(),
            num_queues: 2,
            config: vec![0x74, 0x00, 0xff],
            ..Default::default()
        }];
        let args = args(
            &Spec::from_validated(&api),
            Path::new("/run/m"),
            &Knobs::default(),
            None,
        );
        let wanted = "tag=share,type=fs,socket=/fs.sock,queues=2,config=hex:7400ff";
        assert!(args.iter().any(|arg| arg == wanted), "{args:?}");
    }
}
