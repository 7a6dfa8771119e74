//! The control socket: NICs that come and go as descriptors, statistics, metrics.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use api::device::attach_request::{Device as DeviceConfig, Listener};
use api::device::device_daemon_client::DeviceDaemonClient;
use api::device::{
    AttachRequest, DetachRequest, Device, FdRef, GetDaemonRequest, GetDeviceRequest,
    ListDevicesRequest, NetConfig,
};
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::daemon::{DEADLINE, Daemon, await_true};
use crate::guest::Guest;
use crate::host::{configure, create_tap, enter_namespace, open_tap};
use crate::traffic::{datagram, guest_address, host_socket};

/// A manager: gRPC and the descriptor socket.
pub(crate) struct Manager {
    pub(crate) runtime: Runtime,
    client: DeviceDaemonClient<Channel>,
}

impl Manager {
    pub(crate) fn of(daemon: &Daemon) -> Manager {
        let runtime = Runtime::new().unwrap();
        let control = daemon.control();
        let connecting = api::connect::unix(&control, DEADLINE);
        let client = DeviceDaemonClient::new(runtime.block_on(connecting).unwrap());
        Manager { runtime, client }
    }

    pub(crate) fn attach(&mut self, request: AttachRequest) -> Result<Device, Status> {
        let attaching = self.client.attach(request);
        self.runtime
            .block_on(attaching)
            .map(tonic::Response::into_inner)
    }

    fn detach(&mut self, id: &str) -> Result<(), Status> {
        let detaching = self.client.detach(DetachRequest {
            id: id.to_owned(),
            drain_ms: 0,
        });
        self.runtime.block_on(detaching).map(drop)
    }

    pub(crate) fn get(&mut self, id: &str) -> Device {
        let getting = self
            .client
            .get_device(GetDeviceRequest { id: id.to_owned() });
        self.runtime.block_on(getting).unwrap().into_inner()
    }

    pub(crate) fn list(&mut self) -> Vec<Device> {
        let listing = self.client.list_devices(ListDevicesRequest {});
        self.runtime.block_on(listing).unwrap().into_inner().devices
    }
}

pub(crate) fn send(daemon: &Daemon, token: &str, fds: &[OwnedFd]) {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    api::fds::send(&daemon.fds(), token, &fds, DEADLINE).unwrap();
}

pub(crate) fn reference(token: &str) -> FdRef {
    FdRef {
        token: token.to_owned(),
    }
}

fn request(id: &str, tap_tokens: &[&str]) -> AttachRequest {
    AttachRequest {
        id: id.to_owned(),
        listener: Some(Listener::SocketFd(reference("socket"))),
        device: Some(DeviceConfig::Net(NetConfig {
            tap_fds: tap_tokens.iter().map(|token| reference(token)).collect(),
            mac: "52:54:00:12:34:56".to_owned(),
            mtu: 1400,
            tap_name: "tap0".to_owned(),
            ..NetConfig::default()
        })),
    }
}

pub(crate) fn managed() -> Option<(Daemon, Manager)> {
    if !enter_namespace() {
        return None;
    }
    let daemon = Daemon::start(tempfile::tempdir().unwrap(), &[]);
    let manager = Manager::of(&daemon);
    Some((daemon, manager))
}

#[test]
fn nic_of_descriptors_serves_counts_and_goes() {
    let Some((daemon, mut manager)) = managed() else {
        return;
    };
    create_tap("tap0", 2, 1500);
    let socket = daemon.dir().join("a.vu");
    let listener: OwnedFd = UnixListener::bind(&socket).unwrap().into();
    send(&daemon, "socket", &[listener.try_clone().unwrap()]);
    for (token, tap) in ["t0", "t1"].into_iter().zip(open_tap("tap0", 2)) {
        send(&daemon, token, &[tap]);
    }
    let device = manager.attach(request("a", &["t0", "t1"])).unwrap();
    assert_eq!((device.r#type.as_str(), device.connected), ("net", false));
    let again = manager.attach(request("a", &["t0", "t1"])).unwrap();
    assert_eq!(again.id, "a", "an identical repetition is no error");
    let taken = manager.attach(request("a", &["t0"])).unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists, "{taken}");

    let mut guest = Guest::connect(&socket, 2);
    guest.supply(0, 32, 1536);
    guest.find_host();
    let host = host_socket();
    host.send_to(b"counted", guest_address()).unwrap();
    guest.receive(datagram);
    guest.transmit(0, &[(0, 5)]);
    await_true("all five rings are served", || {
        manager.get("a").queues_running == 5
    });
    let device = manager.get("a");
    let stats = device.net.unwrap();
    assert!(device.connected);
    assert_eq!(device.sessions, 1);
    assert_eq!(stats.mac, "52:54:00:12:34:56");
    assert!(stats.rx_packets >= 2 && stats.rx_bytes > 60, "{stats:?}");
    assert!(stats.tx_packets >= 1 && stats.tx_bytes >= 42, "{stats:?}");
    assert_eq!(stats.tx_drops, 1, "{stats:?}");

    manager.detach("a").unwrap();
    assert!(manager.list().is_empty());
    // Socket and tap are free: attach them again, under another name.
    send(&daemon, "socket", &[listener]);
    for (token, tap) in ["t2", "t3"].into_iter().zip(open_tap("tap0", 2)) {
        send(&daemon, token, &[tap]);
    }
    manager.attach(request("b", &["t2", "t3"])).unwrap();
    let mut guest = Guest::connect(&socket, 1);
    guest.supply(0, 32, 1536);
    guest.find_host();
}

#[test]
fn descriptors_that_are_no_fitting_taps_are_refused_and_leave_nothing() {
    let Some((mut daemon, mut manager)) = managed() else {
        return;
    };
    create_tap("tap0", 1, 1500);
    create_tap("tap1", 2, 1500);
    create_tap("tap2", 2, 1500);
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let first = |name, pairs| open_tap(name, pairs).swap_remove(0);
    let cases = [
        (vec![null()], "no tap"),
        (vec![first("tap0", 1), null()], "IFF_MULTI_QUEUE"),
        (vec![first("tap1", 2), first("tap2", 2)], "different taps"),
    ];
    for (taps, named) in cases {
        let socket = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(socket.path().join("s")).unwrap();
        send(&daemon, "socket", &[listener.into()]);
        send(&daemon, "taps", &taps);
        let error = manager.attach(request("a", &["taps"])).unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains(named), "{error}");
        assert!(manager.list().is_empty());
    }
    daemon.assert_alive();
}

#[test]
fn process_is_confined_before_it_serves() {
    let Some((daemon, mut manager)) = managed() else {
        return;
    };
    let asking = manager.client.get_daemon(GetDaemonRequest {});
    let info = manager.runtime.block_on(asking).unwrap().into_inner();
    assert_eq!((info.name.as_str(), info.pid), ("device-net", daemon.pid()));
    for name in ["no_new_privs", "seccomp:device-net", "no_capabilities"] {
        assert!(
            info.sandbox.iter().any(|held| held == name),
            "{name}: {:?}",
            info.sandbox
        );
    }
    for task in std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"] {
            assert!(status.contains(line), "{line} in\n{status}");
        }
    }
}

#[test]
fn metrics_are_served_over_http() {
    if !enter_namespace() {
        return;
    }
    // The namespace has no loopback address that is up; the tap's will do.
    create_tap("tap0", 1, 1500);
    create_tap("tap1", 1, 1500);
    configure("tap1", 1500);
    let dir = tempfile::tempdir().unwrap();
    let nic = format!(
        "id=net0,tap=tap0,socket={}",
        dir.path().join("net0.vu").display()
    );
    let address = "10.99.0.1:9464";
    let _daemon = Daemon::start(dir, &["--nic", &nic, "--metrics-listen", address]);
    bring_up_loopback();
    let mut text = String::new();
    await_true("metrics are served", || {
        text.clear();
        let Ok(mut stream) = TcpStream::connect(address) else {
            return false;
        };
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        stream.read_to_string(&mut text).is_ok()
    });
    assert!(
        text.contains("mortise_net_rx_packets_total{daemon=\"device-net\",device=\"net0\"} 0"),
        "{text}"
    );
}

/// Packets to an address of one's own take the loopback interface.
fn bring_up_loopback() {
    let status = std::process::Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status();
    assert!(status.is_ok_and(|status| status.success()));
}
