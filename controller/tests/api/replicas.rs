//! Two controllers on one etcd, with a real node agent: one leads, the other takes over, and hosts
//! know the difference. And the state as a file.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use api::controller as pb;
use api::controller::states_client::StatesClient;
use api::node::node_agent_client::NodeAgentClient;
use etcd::Cluster;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio_stream::StreamExt as _;
use tonic::Code;

use crate::harness::{Controller, PATIENCE, Site, built, poll, poll_async};

/// Between two attempts at something that a takeover may interrupt.
const RETRY: Duration = Duration::from_millis(50);

/// A node agent in a directory; it ends with this.
struct Agent {
    dir: PathBuf,
    child: Child,
}

impl Agent {
    fn start(dir: &Path) -> Self {
        let child = Command::new(built("node-agent"))
            .args(["--listen", &format!("unix:{}/a.sock", dir.display())])
            .arg("--state-dir")
            .arg(dir.join("node"))
            .arg("--run-dir")
            .arg(dir.join("run"))
            .env("MORTISE_LOG", "warn")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let dir = dir.to_owned();
        Self { dir, child }
    }

    /// The epoch it keeps.
    fn epoch(&self) -> Option<u64> {
        let text = std::fs::read_to_string(self.dir.join("node/epoch")).ok()?;
        text.trim().parse().ok()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

async fn replica(dir: &Path, name: &str, cluster: &Cluster) -> Controller {
    let node = format!("unix:{}/a.sock", dir.display());
    let state_dir = dir.join(name);
    let args = [
        "--etcd",
        &cluster.endpoints().join(","),
        "--leader-lease",
        "5",
        "--node",
        &node,
        "--state-dir",
        state_dir.to_str().unwrap(),
    ];
    Controller::start(&args).await
}

async fn status(controller: &Controller) -> pb::ControllerStatus {
    let mut client = StatesClient::new(controller.channel.clone());
    let request = pb::GetControllerStatusRequest {};
    client
        .get_controller_status(request)
        .await
        .unwrap()
        .into_inner()
}

/// Waits until this controller leads, in an epoch past `after`.
async fn leads(controller: &Controller, after: u64) -> pb::ControllerStatus {
    let leads = |status: &pb::ControllerStatus| status.leads && status.epoch > after;
    poll_async("its lead", || status(controller), leads).await
}

fn create_volume(id: &str) -> pb::CreateVolumeRequest {
    let spec = pb::VolumeSpec {
        size_bytes: 1 << 20,
        ..Default::default()
    };
    pb::CreateVolumeRequest {
        parent: "projects/default".into(),
        volume_id: id.into(),
        volume: Some(pb::Volume {
            spec: Some(spec),
            ..Default::default()
        }),
        request_id: format!("make-{id}"),
        ..Default::default()
    }
}

/// Asks until it is acknowledged: the same request, which is done once.
async fn acknowledged(controller: &Controller, id: &str) -> pb::Operation {
    let attempts = async {
        loop {
            match controller.volumes().create_volume(create_volume(id)).await {
                Ok(answer) => return answer.into_inner(),
                Err(status) if matches!(status.code(), Code::Unavailable | Code::Aborted) => {}
                Err(status) => panic!("{status}"),
            }
            tokio::time::sleep(RETRY).await;
        }
    };
    tokio::time::timeout(PATIENCE, attempts)
        .await
        .expect("acknowledged in time")
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_leader_is_followed_and_nothing_acknowledged_is_lost() {
    let Some(cluster) = Cluster::start(1) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let first = replica(dir.path(), "a", &cluster).await;
    let led = leads(&first, 0).await;
    let second = replica(dir.path(), "b", &cluster).await;
    let knows = |seen: &pb::ControllerStatus| !seen.leader_address.is_empty();
    let seen = poll_async("a leader", || status(&second), knows).await;
    assert!(seen.epoch >= led.epoch, "all know who leads: {seen:?}");

    // Whom one asks makes no difference.
    for (controller, id) in [(&first, "v-1"), (&second, "v-2")] {
        let operation = acknowledged(controller, id).await;
        controller.succeeded(operation).await;
    }
    assert!(agent.epoch() >= Some(led.epoch));

    let mut begun = Vec::new();
    for n in 0..5 {
        begun.push(acknowledged(&second, &format!("w-{n}")).await);
    }
    begun.push(acknowledged(&first, "last-words").await);
    first.signal(Signal::SIGKILL);
    for n in 5..10 {
        begun.push(acknowledged(&second, &format!("w-{n}")).await);
    }
    let now = leads(&second, led.epoch).await;
    for operation in begun {
        second.succeeded(operation).await;
    }
    assert!(agent.epoch() >= Some(now.epoch));

    // What the dead one had on its way is refused.
    let channel = api::connect::unix(&dir.path().join("a.sock"), PATIENCE).await;
    let mut late = tonic::Request::new(api::node::DeleteVolumeRequest { id: "v-1".into() });
    late.metadata_mut()
        .insert("mortise-epoch", led.epoch.into());
    let mut client = NodeAgentClient::new(channel.unwrap());
    let refused = client.delete_volume(late).await.unwrap_err();
    let reason = api::errors::reason(&refused);
    assert_eq!(reason.as_deref(), Some("STALE_EPOCH"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn leader_that_was_frozen_goes_on_as_one_of_many() {
    let Some(cluster) = Cluster::start(1) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path());
    let first = replica(dir.path(), "a", &cluster).await;
    let led = leads(&first, 0).await;
    let second = replica(dir.path(), "b", &cluster).await;
    first.signal(Signal::SIGSTOP);
    let now = leads(&second, led.epoch).await;
    let operation = acknowledged(&second, "v-1").await;
    second.succeeded(operation).await;
    first.signal(Signal::SIGCONT);
    let knows = |seen: &pb::ControllerStatus| seen.epoch >= now.epoch;
    poll_async("the news", || status(&first), knows).await;
    let operation = acknowledged(&first, "v-2").await;
    first.succeeded(operation).await;
    assert!(agent.epoch() >= Some(now.epoch));
}

#[tokio::test(flavor = "multi_thread")]
async fn leader_that_ends_cleanly_is_followed() {
    let Some(cluster) = Cluster::start(1) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut first = replica(dir.path(), "a", &cluster).await;
    let led = leads(&first, 0).await;
    let second = replica(dir.path(), "b", &cluster).await;
    first.signal(Signal::SIGTERM);
    assert!(first.wait().success());
    leads(&second, led.epoch).await;
}

async fn backup(controller: &Controller) -> Vec<u8> {
    let mut client = StatesClient::new(controller.channel.clone());
    let answer = client.backup_state(pb::BackupStateRequest {}).await;
    let mut pieces = answer.unwrap().into_inner();
    let mut file = Vec::new();
    while let Some(piece) = pieces.next().await {
        file.extend(piece.unwrap().content);
    }
    file
}

async fn restore(
    controller: &Controller,
    file: &[u8],
    replace: bool,
) -> Result<pb::RestoreStateResponse, tonic::Status> {
    let pieces: Vec<_> = file.chunks(64 << 10).map(<[u8]>::to_vec).collect();
    let pieces = pieces
        .into_iter()
        .map(move |content| pb::RestoreStateRequest { replace, content });
    let mut client = StatesClient::new(controller.channel.clone());
    let answer = client.restore_state(tokio_stream::iter(pieces)).await;
    answer.map(tonic::Response::into_inner)
}

async fn volumes(controller: &Controller) -> Vec<String> {
    let request = pb::ListVolumesRequest {
        parent: "projects/default".into(),
        ..Default::default()
    };
    let list = controller.volumes().list_volumes(request).await;
    let list = list.unwrap().into_inner().volumes;
    list.into_iter().map(|volume| volume.name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn state_is_restored_from_a_file() {
    let site = Site::new().await;
    let controller = &site.controller;
    let operation = acknowledged(controller, "kept").await;
    controller.succeeded(operation).await;
    let file = backup(controller).await;
    let operation = acknowledged(controller, "later").await;
    controller.succeeded(operation).await;

    let refused = restore(controller, &file, false).await.unwrap_err();
    assert_eq!(
        api::errors::reason(&refused).as_deref(),
        Some("STORE_NOT_EMPTY")
    );
    let mut damaged = file.clone();
    damaged[file.len() / 2] ^= 1;
    let refused = restore(controller, &damaged, true).await.unwrap_err();
    assert_eq!(api::errors::reason(&refused).as_deref(), Some("BAD_BACKUP"));
    assert_eq!(volumes(controller).await.len(), 2, "nothing was changed");

    restore(controller, &file, true).await.unwrap();
    assert_eq!(volumes(controller).await, ["projects/default/volumes/kept"]);
    let operation = acknowledged(controller, "after").await;
    controller.succeeded(operation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn state_moves_into_etcd_with_one_command() {
    let Some(cluster) = Cluster::start(1) else {
        return;
    };
    let endpoint = cluster.endpoints().remove(0);
    let mut site = Site::new().await;
    let operation = acknowledged(&site.controller, "kept").await;
    site.controller.succeeded(operation).await;
    let state_dir = site.store_file().parent().unwrap().to_owned();
    let migrate = || {
        Command::new(built("controller"))
            .args(["migrate", "--from", state_dir.to_str().unwrap()])
            .args(["--to", &endpoint])
            .output()
            .unwrap()
    };
    let refused = migrate();
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success(), "a controller runs on it");
    assert!(words.contains("another controller uses"), "{words}");

    site.controller.signal(Signal::SIGTERM);
    site.controller.wait();
    let moved = poll("the state directory's release", || {
        Some(migrate()).filter(|moved| moved.status.success())
    });
    let words = String::from_utf8_lossy(&moved.stdout).into_owned();
    assert!(words.starts_with("moved "), "{words}");

    let node = format!("unix:{}", state_dir.with_file_name("agent.sock").display());
    let args = ["--node", &node, "--state-dir", state_dir.to_str().unwrap()];
    let old = Command::new(built("controller"))
        .args(args)
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&old.stderr).into_owned();
    assert!(words.contains("the state was moved to http://"), "{words}");
    let args = [&args[..], &["--etcd", &endpoint]].concat();
    let controller = Controller::start(&args).await;
    assert_eq!(
        volumes(&controller).await,
        ["projects/default/volumes/kept"]
    );
}
