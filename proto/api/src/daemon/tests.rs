//! The service over a real socket, with devices that only count.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::oneshot;
use tonic::Code;
use tonic::transport::Channel;

use super::*;
use crate::device::device_daemon_client::DeviceDaemonClient;
use crate::device::{NetConfig, NetQueueStats, NetStats};
use crate::{connect, fds, listen};

#[derive(Default)]
struct Counts {
    attached: AtomicUsize,
    stopped: AtomicUsize,
}

struct Dummy {
    counts: Arc<Counts>,
    num_fds: usize,
    /// Can not be stopped at the first attempt.
    is_stubborn: AtomicBool,
    _listener: UnixListener,
}

impl ServedDevice for Dummy {
    fn describe(&self) -> Device {
        Device {
            r#type: "net".into(),
            sessions: 7,
            inflight: self.num_fds as u64,
            net: Some(NetStats {
                rx_packets: 5,
                tx_drops_by_reason: [("link_down".to_owned(), 2)].into(),
                queues: vec![NetQueueStats {
                    pair: 1,
                    rx_packets: 5,
                    tx_drops: 2,
                    ..NetQueueStats::default()
                }],
                ..NetStats::default()
            }),
            ..Device::default()
        }
    }
    fn histograms(&self) -> Vec<DeviceHistogram> {
        vec![DeviceHistogram {
            queue: 1,
            op: "tx",
            buckets: vec![(0.5, 3), (f64::INFINITY, 1)],
            sum_seconds: 2.5,
        }]
    }
    fn stop(&self, _: Duration) -> Result<(), Status> {
        self.counts.stopped.fetch_add(1, Ordering::SeqCst);
        if self.is_stubborn.swap(false, Ordering::SeqCst) {
            return Err(Status::deadline_exceeded("not drained"));
        }
        Ok(())
    }
}

struct Daemon {
    dir: TempDir,
    counts: Arc<Counts>,
    client: DeviceDaemonClient<Channel>,
    table: Arc<DeviceTable>,
    _stop: oneshot::Sender<()>,
}

async fn daemon() -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let counts = Arc::<Counts>::default();
    let inbox = Inbox::bind(&dir.path().join("fds")).unwrap();
    let table = DeviceTable::new("device-test", vec!["seccomp".into()], Some(inbox), {
        let counts = counts.clone();
        move |parts: Parts| {
            if parts.request.id == "broken" {
                return Err(Status::failed_precondition("broken"));
            }
            counts.attached.fetch_add(1, Ordering::SeqCst);
            Ok(Arc::new(Dummy {
                counts: counts.clone(),
                num_fds: parts.fds.len(),
                is_stubborn: AtomicBool::new(parts.request.id.starts_with("stubborn")),
                _listener: parts.listener,
            }) as Arc<dyn ServedDevice>)
        }
    });
    let path = dir.path().join("control");
    let listener = listen::unix(&path).unwrap();
    let (stop, stopped) = oneshot::channel();
    let services = Services::new().with(DeviceDaemonServer::new(Control(table.clone())));
    tokio::spawn(serve::on(listener, services, async {
        let _ = stopped.await;
    }));
    let channel = connect::unix(&path, Duration::from_secs(5)).await.unwrap();
    Daemon {
        dir,
        counts,
        client: DeviceDaemonClient::new(channel),
        table,
        _stop: stop,
    }
}

impl Daemon {
    async fn send(&self, token: &str, fds: Vec<OwnedFd>) {
        let path = self.dir.path().join("fds");
        let token = token.to_owned();
        tokio::task::spawn_blocking(move || {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            fds::send(&path, &token, &fds, Duration::from_secs(5)).unwrap();
        })
        .await
        .unwrap();
    }

    /// Sends a listening socket and a tap under the tokens that [`request`] names.
    async fn send_parts(&self) {
        let listener = UnixListener::bind(unused(self.dir.path())).unwrap();
        self.send("socket", vec![listener.into()]).await;
        self.send("tap", vec![File::open("/dev/null").unwrap().into()])
            .await;
    }
}

fn unused(dir: &Path) -> std::path::PathBuf {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    dir.join(format!("{}.vu", NEXT.fetch_add(1, Ordering::SeqCst)))
}

fn request(id: &str) -> AttachRequest {
    let reference = |token: &str| FdRef {
        token: token.into(),
    };
    AttachRequest {
        id: id.into(),
        listener: Some(ListenerConfig::SocketFd(reference("socket"))),
        device: Some(DeviceConfig::Net(NetConfig {
            tap_fds: vec![reference("tap")],
            ..NetConfig::default()
        })),
    }
}

#[tokio::test]
async fn attach_is_idempotent_and_detach_frees_the_id() {
    let mut daemon = daemon().await;
    daemon.send_parts().await;
    let first = daemon.client.attach(request("net0")).await.unwrap();
    assert_eq!(first.get_ref().id, "net0");
    assert_eq!(first.get_ref().inflight, 1, "the tap arrived");
    let again = daemon.client.attach(request("net0")).await.unwrap();
    assert_eq!(first.get_ref(), again.get_ref());
    assert_eq!(daemon.counts.attached.load(Ordering::SeqCst), 1);

    let mut other = request("net0");
    other.listener = Some(ListenerConfig::SocketPath("/tmp/x".into()));
    let status = daemon.client.attach(other).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists, "{status}");

    let detach = |id: &str| DetachRequest {
        id: id.into(),
        drain_ms: 0,
    };
    daemon.client.detach(detach("net0")).await.unwrap();
    assert_eq!(daemon.counts.stopped.load(Ordering::SeqCst), 1);
    let status = daemon.client.detach(detach("net0")).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound, "{status}");
    daemon.send_parts().await;
    daemon.client.attach(request("net0")).await.unwrap();
}

#[tokio::test]
async fn failed_attach_leaves_nothing_behind() {
    let mut daemon = daemon().await;
    daemon.send_parts().await;
    let status = daemon.client.attach(request("broken")).await.unwrap_err();
    assert_eq!(status.message(), "broken");
    let list = daemon.client.list_devices(ListDevicesRequest {}).await;
    assert!(list.unwrap().get_ref().devices.is_empty());
}

#[tokio::test]
async fn unknown_token_says_what_to_do_first() {
    let mut daemon = daemon().await;
    let status = daemon.client.attach(request("net0")).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert!(status.message().contains("send them"), "{status}");
}

#[tokio::test]
async fn socket_that_does_not_listen_is_refused() {
    let mut daemon = daemon().await;
    daemon
        .send("socket", vec![File::open("/dev/null").unwrap().into()])
        .await;
    let status = daemon.client.attach(request("net0")).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    daemon.send("socket", vec![one.into()]).await;
    let status = daemon.client.attach(request("net0")).await.unwrap_err();
    assert!(status.message().contains("not listening"), "{status}");
}

#[tokio::test]
async fn metrics_count_each_device() {
    let mut daemon = daemon().await;
    daemon.send_parts().await;
    daemon.client.attach(request("net0")).await.unwrap();
    let text = daemon.client.get_metrics(GetMetricsRequest {}).await;
    let text = text.unwrap().into_inner().text;
    let labels = r#"{daemon="device-test",device="net0"}"#;
    for line in [
        format!("mortise_device_sessions_total{labels} 7"),
        format!("mortise_net_rx_packets_total{labels} 5"),
    ] {
        assert!(text.lines().any(|have| have == line), "{line} in\n{text}");
    }
    let device = r#"daemon="device-test",device="net0""#;
    for line in [
        format!(r#"mortise_net_queue_packets_total{{{device},pair="1",direction="rx"}} 5"#),
        format!(r#"mortise_net_queue_drops_total{{{device},pair="1",direction="tx"}} 2"#),
        format!(
            r#"mortise_net_drops_by_reason_total{{{device},direction="tx",reason="link_down"}} 2"#
        ),
        format!(
            r#"mortise_net_frame_duration_seconds_count{{{device},pair="1",direction="tx"}} 4"#
        ),
        format!(
            r#"mortise_net_frame_duration_seconds_bucket{{le="0.5",{device},pair="1",direction="tx"}} 3"#
        ),
    ] {
        assert!(text.lines().any(|have| have == line), "{line} in\n{text}");
    }
    assert!(
        !text.contains("mortise_blk_request_duration_seconds_count{"),
        "{text}"
    );
    assert!(!text.contains("mortise_blk_errors_total{"), "{text}");
}

#[tokio::test]
async fn stop_all_stops_each_device_once() {
    let mut daemon = daemon().await;
    for id in ["net0", "net1"] {
        daemon.send_parts().await;
        daemon.client.attach(request(id)).await.unwrap();
    }
    daemon.table.stop_all().unwrap();
    assert_eq!(daemon.counts.stopped.load(Ordering::SeqCst), 2);
    assert!(daemon.table.list().is_empty());
}

#[tokio::test]
async fn device_that_can_not_be_drained_is_not_detached_with_success() {
    let mut daemon = daemon().await;
    daemon.send_parts().await;
    daemon.client.attach(request("stubborn")).await.unwrap();
    let detach = || DetachRequest {
        id: "stubborn".into(),
        drain_ms: 1,
    };
    let error = daemon.client.detach(detach()).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    assert_eq!(daemon.table.list().len(), 1, "it can be looked at");
    daemon.client.detach(detach()).await.unwrap();
    assert!(daemon.table.list().is_empty());
}

#[tokio::test]
async fn shutdown_says_which_device_could_not_be_drained() {
    let mut daemon = daemon().await;
    for id in ["fine", "stubborn"] {
        daemon.send_parts().await;
        daemon.client.attach(request(id)).await.unwrap();
    }
    let error = daemon.table.stop_all().unwrap_err().to_string();
    assert!(
        error.contains("stubborn") && !error.contains("fine"),
        "{error}"
    );
}

#[tokio::test]
async fn services_of_the_daemon_find_their_devices_by_type() {
    let mut daemon = daemon().await;
    daemon.send_parts().await;
    daemon.client.attach(request("net0")).await.unwrap();
    let found: Arc<Dummy> = daemon.table.attached("net0").unwrap();
    assert_eq!(found.num_fds, 1);
    let none = daemon
        .table
        .attached::<Dummy>("net1")
        .map(drop)
        .unwrap_err();
    assert_eq!(none.code(), Code::NotFound);
    assert_eq!(daemon.table.all_attached::<Dummy>().len(), 1);
}
