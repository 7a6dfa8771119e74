//! The control socket: attach by descriptors, detach, list, metrics.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;

use api::device::attach_request::{Device as DeviceConfig, Listener};
use api::device::device_daemon_client::DeviceDaemonClient;
use api::device::disks_client::DisksClient;
use api::device::{
    AttachRequest, BlkConfig, DetachRequest, Device, FdRef, GetDaemonRequest, GetDeviceRequest,
    GetMetricsRequest, ListDevicesRequest,
};
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::daemon::{DEADLINE, Daemon, Place, await_true};
use crate::driver::Client;

/// A manager: gRPC and the descriptor socket.
pub(crate) struct Manager {
    pub(crate) runtime: Runtime,
    client: DeviceDaemonClient<Channel>,
    disks: DisksClient<Channel>,
    pub(crate) place: Place,
}

impl Manager {
    pub(crate) fn of(place: Place) -> Self {
        let runtime = Runtime::new().unwrap();
        let channel = runtime
            .block_on(api::connect::unix(&place.control(), DEADLINE))
            .unwrap();
        Self {
            runtime,
            client: DeviceDaemonClient::new(channel.clone()),
            disks: DisksClient::new(channel),
            place,
        }
    }

    /// Calls the service `Disks`.
    pub(crate) fn disks<T>(
        &mut self,
        call: impl AsyncFnOnce(&mut DisksClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, Status> {
        self.runtime
            .block_on(call(&mut self.disks))
            .map(Response::into_inner)
    }

    pub(crate) fn send(&self, token: &str, fd: BorrowedFd<'_>) {
        api::fds::send(&self.place.fds(), token, &[fd], DEADLINE).unwrap();
    }

    pub(crate) fn send_image(&self, token: &str, name: &str) {
        let path = self.place.path(name);
        let image = File::options().read(true).write(true).open(path).unwrap();
        self.send(token, image.as_fd());
    }

    /// Sends image `a.img` and a listening socket, and asks to attach them.
    pub(crate) fn attach(&mut self, request: AttachRequest) -> Result<Device, Status> {
        self.runtime
            .block_on(self.client.attach(request))
            .map(Response::into_inner)
    }

    pub(crate) fn detach(&mut self, id: &str) -> Result<(), Status> {
        let request = DetachRequest {
            id: id.to_owned(),
            drain_ms: 0,
        };
        self.runtime.block_on(self.client.detach(request)).map(drop)
    }

    pub(crate) fn list(&mut self) -> Vec<Device> {
        let listed = self
            .runtime
            .block_on(self.client.list_devices(ListDevicesRequest {}));
        listed.unwrap().into_inner().devices
    }

    pub(crate) fn get(&mut self, id: &str) -> Device {
        let request = GetDeviceRequest { id: id.to_owned() };
        self.runtime
            .block_on(self.client.get_device(request))
            .unwrap()
            .into_inner()
    }

    pub(crate) fn metrics(&mut self) -> String {
        let metrics = self
            .runtime
            .block_on(self.client.get_metrics(GetMetricsRequest {}));
        metrics.unwrap().into_inner().text
    }
}

fn request(id: &str, socket_token: &str, image_token: &str) -> AttachRequest {
    AttachRequest {
        id: id.to_owned(),
        listener: Some(Listener::SocketFd(FdRef {
            token: socket_token.to_owned(),
        })),
        device: Some(DeviceConfig::Blk(BlkConfig {
            image_fd: Some(FdRef {
                token: image_token.to_owned(),
            }),
            image_name: format!("{id}.img"),
            num_queues: 2,
            ..BlkConfig::default()
        })),
    }
}

fn managed() -> (Daemon, Manager) {
    let place = Place::new();
    let fds = place.fds().display().to_string();
    let daemon = Daemon::start_with(&place, &[], &["--fd-socket", &fds]);
    (daemon, Manager::of(place))
}

/// Open descriptors, threads, and resident KiB.
fn footprint(daemon: &Daemon) -> (usize, usize, u64) {
    let entries = |what: &str| {
        let dir = format!("/proc/{}/{what}", daemon.pid());
        std::fs::read_dir(dir).unwrap().count()
    };
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let rss = status.lines().find(|line| line.starts_with("VmRSS:"));
    let rss_kib = rss.unwrap().split_whitespace().nth(1).unwrap();
    (entries("fd"), entries("task"), rss_kib.parse().unwrap())
}

#[test]
fn attaching_and_detaching_for_ever_keeps_nothing() {
    const ROUNDS: usize = 300;
    let (daemon, mut manager) = managed();
    manager.place.image("a.img", 64);
    let socket = manager.place.socket("a");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut round = |number: usize| {
        let (socket_token, image_token) = (format!("s{number}"), format!("i{number}"));
        manager.send(&socket_token, listener.as_fd());
        manager.send_image(&image_token, "a.img");
        let request = request("a", &socket_token, &image_token);
        manager.attach(request).unwrap();
        if number.is_multiple_of(10) {
            let mut client = Client::connect(&socket);
            assert_eq!(client.write(0, &[1; 4096]), 0);
        }
        manager.detach("a").unwrap();
    };
    // What is made once and kept: threads of the runtime, the allocator's arenas.
    (0..50).for_each(&mut round);
    let before = footprint(&daemon);
    (50..50 + ROUNDS).for_each(&mut round);
    await_true("descriptors and threads are as before", || {
        let now = footprint(&daemon);
        now.0 <= before.0 && now.1 <= before.1
    });
    let grown_kib = footprint(&daemon).2.saturating_sub(before.2);
    assert!(
        grown_kib < 4096,
        "{grown_kib} KiB more after {ROUNDS} rounds"
    );
}

#[test]
fn attached_disk_is_served_and_detached_disk_is_let_go() {
    let (mut daemon, mut manager) = managed();
    let image = manager.place.image("a.img", 2048);
    let socket = manager.place.socket("a");
    let listener = UnixListener::bind(&socket).unwrap();
    manager.send("s1", listener.as_fd());
    manager.send_image("i1", "a.img");
    let device = manager.attach(request("a", "s1", "i1")).unwrap();
    assert_eq!((device.r#type.as_str(), device.connected), ("blk", false));
    assert_eq!(device.blk.unwrap().capacity_bytes, 1 << 20);

    let again = manager.attach(request("a", "s1", "i1")).unwrap();
    assert_eq!(again.id, "a", "an identical repetition is no error");
    let taken = manager.attach(request("a", "s2", "i2")).unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists, "{taken}");

    let mut client = Client::connect(&socket);
    assert_eq!(client.write(0, &[1; 4096]), 0);
    assert_eq!(client.write(4096, &[2; 4096]), 0);
    assert_eq!(client.read(0, 512), [1; 512]);
    assert_eq!(client.flush(), 0);
    assert_eq!(client.write_at(0, 1 << 20, 0, 512), -libc::EIO);
    let device = manager.get("a");
    let stats = device.blk.unwrap();
    assert!(device.connected);
    assert_eq!((device.sessions, device.queues_running), (1, 1));
    assert_eq!((stats.write_requests, stats.write_bytes), (3, 8192));
    assert_eq!((stats.read_requests, stats.read_bytes), (1, 512));
    assert_eq!((stats.flush_requests, stats.errors), (1, 1));
    assert_eq!(device.inflight, 0);

    manager.detach("a").unwrap();
    assert!(manager.list().is_empty());
    assert_eq!(manager.detach("a").unwrap_err().code(), Code::NotFound);
    drop(client);
    // Image and socket are free: attach them again, under another name.
    manager.send("s3", listener.as_fd());
    manager.send_image("i3", "a.img");
    manager.attach(request("b", "s3", "i3")).unwrap();
    assert_eq!(Client::connect(&socket).read(4096, 512), [2; 512]);
    daemon.assert_alive();
    drop(image);
}

#[test]
fn attach_of_an_image_in_use_fails_and_leaves_nothing() {
    let (mut daemon, mut manager) = managed();
    manager.place.image("a.img", 64);
    let listener = UnixListener::bind(manager.place.socket("a")).unwrap();
    manager.send("s1", listener.as_fd());
    manager.send_image("i1", "a.img");
    manager.attach(request("a", "s1", "i1")).unwrap();
    manager.send("s2", listener.as_fd());
    manager.send_image("i2", "a.img");
    let error = manager.attach(request("b", "s2", "i2")).unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(
        error.message().contains("b.img") && error.message().contains("in use"),
        "{error}"
    );
    assert_eq!(manager.list().len(), 1);
    daemon.assert_alive();
}

#[test]
fn wrong_descriptors_are_refused() {
    let (mut daemon, mut manager) = managed();
    manager.place.image("a.img", 64);
    manager.place.image("empty.img", 0);
    let listener = UnixListener::bind(manager.place.socket("a")).unwrap();
    let refused = |manager: &mut Manager, image: &str, read_write: bool| {
        manager.send("s", listener.as_fd());
        let path = manager.place.path(image);
        let file = File::options()
            .read(true)
            .write(read_write)
            .open(path)
            .unwrap();
        manager.send("i", file.as_fd());
        manager.attach(request("a", "s", "i")).unwrap_err()
    };
    let error = refused(&mut manager, "empty.img", true);
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    let error = refused(&mut manager, "a.img", false);
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    let error = refused(&mut manager, ".", false);
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    let error = manager.attach(request("a", "none", "none")).unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(manager.list().is_empty());
    daemon.assert_alive();
}

#[test]
fn disks_of_the_command_line_are_listed_beside_attached_ones() {
    let place = Place::new();
    place.image("a.img", 64);
    place.image("b.img", 64);
    let fds = place.fds().display().to_string();
    let disk = format!("{},readonly", place.disk("a"));
    let _daemon = Daemon::start_with(&place, &[&disk], &["--fd-socket", &fds]);
    let mut manager = Manager::of(place);
    let listener = UnixListener::bind(manager.place.socket("b")).unwrap();
    manager.send("s", listener.as_fd());
    manager.send_image("i", "b.img");
    manager.attach(request("b", "s", "i")).unwrap();
    let ids: Vec<_> = manager.list().into_iter().map(|device| device.id).collect();
    assert_eq!(ids, ["a", "b"]);
    manager.detach("a").unwrap();
    assert_eq!(manager.list().len(), 1);
}

#[test]
fn sandbox_is_reported() {
    let (daemon, mut manager) = managed();
    let info = manager
        .runtime
        .block_on(manager.client.get_daemon(GetDaemonRequest {}));
    let info = info.unwrap().into_inner();
    assert_eq!((info.name.as_str(), info.pid), ("device-blk", daemon.pid()));
    let has = |wanted: &str| info.sandbox.iter().any(|name| name.starts_with(wanted));
    let files = has("landlock") || has("empty-root") || has("!landlock") || has("!filesystem");
    let network = has("network") || has("!network");
    let always = has("no_new_privs") && has("seccomp:device-blk");
    assert!(files && network && always, "{:?}", info.sandbox);
}

#[test]
fn metrics_count_requests_and_sessions() {
    let place = Place::new();
    place.image("a.img", 64);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port.local_addr().unwrap().to_string();
    drop(port);
    let _daemon = Daemon::start_with(&place, &[&place.disk("a")], &["--metrics-listen", &address]);
    let mut client = Client::connect(&place.socket("a"));
    assert_eq!(client.write(0, &[1; 4096]), 0);
    drop(client);
    let mut manager = Manager::of(place);
    await_true("the session ends", || !manager.get("a").connected);

    let mut stream = TcpStream::connect(&address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut over_http = String::new();
    stream.read_to_string(&mut over_http).unwrap();
    for text in [over_http, manager.metrics()] {
        for line in [
            "mortise_blk_write_requests_total{daemon=\"device-blk\",device=\"a\"} 1",
            "mortise_blk_write_bytes_total{daemon=\"device-blk\",device=\"a\"} 4096",
            "mortise_device_sessions_total{daemon=\"device-blk\",device=\"a\"} 1",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
