//! Disks on other hosts: QEMU's server and ours behind the daemon, killed, stopped and taken over.

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use api::device::attach_request::{Device as Config, Listener};
use api::device::{AttachRequest, BlkConfig, FdRef, NbdSource};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::control::Manager;
use crate::daemon::{Daemon, Place, await_true, numbered_sector, read_image};
use crate::driver::Client;
use crate::io::pattern;
use crate::locks::has_tool;

/// An NBD server process; killed when dropped.
pub(crate) struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// `qemu-nbd` with the raw image `NAME.img` as the export NAME.
    fn qemu(place: &Place, name: &str) -> Self {
        let socket = place.path(&format!("{name}.nbd"));
        let mut command = Command::new("qemu-nbd");
        command
            .args(["-f", "raw", "-x", name, "-t", "-e", "8"])
            .args(["--discard=unmap", "-k"])
            .arg(&socket)
            .arg(place.path(&format!("{name}.img")));
        Self::start(command, socket)
    }

    /// `device-blk nbd-serve`, the same way.
    pub(crate) fn own(place: &Place, name: &str, more: &[&str]) -> Self {
        let socket = place.path(&format!("{name}.nbd"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_device-blk"));
        command
            .args(["nbd-serve", "--export", name, "--listen"])
            .arg(format!("unix:{}", socket.display()))
            .args(more);
        if !more.contains(&"--image") {
            let image = place.path(&format!("{name}.img"));
            command.arg("--image").arg(image);
        }
        Self::start(command, socket)
    }

    fn start(mut command: Command, socket: PathBuf) -> Self {
        let _ = std::fs::remove_file(&socket);
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let mut server = Self { child, socket };
        await_true("the server listens", || {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none(), "the server ended with {ended:?}");
            UnixStream::connect(&server.socket).is_ok()
        });
        server
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    pub(crate) fn end(mut self, signal: Signal) -> Option<i32> {
        self.signal(signal);
        self.child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `id=a,nbd=unix:a.nbd/a,socket=a.vu`
pub(crate) fn remote_disk(place: &Place, generation: &str) -> String {
    format!(
        "id=a,nbd=unix:{}/a{generation},socket={}",
        place.path("a.nbd").display(),
        place.socket("a").display()
    )
}

fn write_read_verify(place: &Place, image: &Path) {
    let mut client = Client::connect(&place.socket("a"));
    assert_eq!(client.read(17 * 512, 512), numbered_sector(17));
    for (seed, (offset, len)) in [(0, 512), (512, 4096), (4096, 65_536), (1 << 20, 6 << 20)]
        .into_iter()
        .enumerate()
    {
        let data = pattern(seed as u64 + 1, len);
        assert_eq!(client.write(offset, &data), 0);
        assert!(client.read(offset, len) == data, "{len} at {offset}");
        assert_eq!(client.flush(), 0);
        assert!(read_image(image, offset, len) == data, "{len} at {offset}");
    }
    assert_eq!(client.write_zeroes(2 << 20, 1 << 20, true), 0);
    assert_eq!(client.write_zeroes(4 << 20, 65_536, false), 0);
    assert!(client.read(2 << 20, 1 << 20).iter().all(|&byte| byte == 0));
    assert_eq!(client.discard(3 << 20, 1 << 20), 0);
}

#[test]
fn disk_of_qemus_server_is_read_and_written() {
    if !has_tool("qemu-nbd") {
        return;
    }
    let place = Place::new();
    let image = place.image("a.img", 16 << 10);
    let _server = Server::qemu(&place, "a");
    let _daemon = Daemon::start(&place, &[&remote_disk(&place, "")]);
    write_read_verify(&place, &image);
}

#[test]
fn disk_of_our_server_is_read_and_written() {
    let place = Place::new();
    let image = place.image("a.img", 16 << 10);
    let record = place.path("a.generation");
    let server = Server::own(
        &place,
        "a",
        &["--generation-file", record.to_str().unwrap()],
    );
    let mut daemon = Daemon::start(&place, &[&remote_disk(&place, "@3")]);
    write_read_verify(&place, &image);
    assert!(daemon.end(Signal::SIGTERM).success());
    assert_eq!(server.end(Signal::SIGTERM), Some(0));
}

#[test]
fn server_that_is_not_there_leaves_no_sockets_behind() {
    let place = Place::new();
    let mut daemon = Daemon::spawn(&place, &[&remote_disk(&place, "")], &[], |_| ());
    assert!(!daemon.ended().success());
    let log = daemon.log();
    let address = format!("unix:{}", place.path("a.nbd").display());
    assert!(
        log.contains("cannot connect") && log.contains(&address),
        "{log}"
    );
    assert!(!place.control().exists(), "the control socket stays: {log}");
    assert!(
        !place.socket("a").exists(),
        "the vhost-user socket stays: {log}"
    );
}

/// Eight blocks at a time are written and, when all are answered, looked for in the image;
/// meanwhile the server is killed or stands still.
fn verified_under(place: &Place, disturb: &mut dyn FnMut(u64)) {
    const LEN: usize = 64 << 10;
    const BLOCKS: u64 = 8;
    let image = File::open(place.path("a.img")).unwrap();
    let mut client = Client::connect(&place.socket("a"));
    for round in 0..12_u64 {
        let data: Vec<_> = (0..BLOCKS)
            .map(|block| pattern(round * BLOCKS + block, LEN))
            .collect();
        for (block, data) in data.iter().enumerate() {
            client.buffer()[block * LEN..][..LEN].copy_from_slice(data);
            client.submit_write(0, (block * LEN) as u64, block * LEN, LEN, block);
        }
        client.kick(0);
        disturb(round);
        for _ in 0..BLOCKS {
            let (block, result) = client.completion(0);
            assert_eq!(result, 0, "round {round}, block {block}");
        }
        for (block, data) in data.iter().enumerate() {
            let mut found = vec![0; LEN];
            image
                .read_exact_at(&mut found, (block * LEN) as u64)
                .unwrap();
            assert!(&found == data, "round {round}, block {block}");
        }
        assert_eq!(client.flush(), 0);
    }
}

#[test]
fn servers_that_die_cost_no_request_and_no_byte() {
    let place = Place::new();
    place.image("a.img", 4096);
    let record = place.path("a.generation");
    let record = ["--generation-file", record.to_str().unwrap()];
    let mut server = Some(Server::own(&place, "a", &record));
    let mut daemon = Daemon::start(&place, &[&remote_disk(&place, "@3")]);
    verified_under(&place, &mut |round| {
        let signal = if round % 3 == 2 {
            Signal::SIGTERM
        } else {
            Signal::SIGKILL
        };
        server.take().unwrap().end(signal);
        server = Some(Server::own(&place, "a", &record));
    });
    daemon.assert_alive();
    assert!(daemon.log().contains("NBD connection restored"));
}

#[test]
fn qemus_server_that_dies_or_stands_still_costs_no_request() {
    if !has_tool("qemu-nbd") {
        return;
    }
    let place = Place::new();
    place.image("a.img", 4096);
    let mut server = Some(Server::qemu(&place, "a"));
    let _daemon = Daemon::start(&place, &[&remote_disk(&place, "")]);
    verified_under(&place, &mut |round| {
        if round % 2 == 0 {
            drop(server.take());
            server = Some(Server::qemu(&place, "a"));
        } else {
            let server = server.as_ref().unwrap();
            server.signal(Signal::SIGSTOP);
            server.signal(Signal::SIGCONT);
        }
    });
}

#[test]
fn stale_owner_is_refused_at_connect_and_at_every_write() {
    let (place, other) = (Place::new(), Place::new());
    let image = place.image("a.img", 4096);
    let record = place.path("a.generation");
    let _server = Server::own(
        &place,
        "a",
        &["--generation-file", record.to_str().unwrap()],
    );
    let mut old_daemon = Daemon::start(&place, &[&remote_disk(&place, "@3")]);
    let mut old = Client::connect(&place.socket("a"));
    assert_eq!(old.write(0, &[1; 512]), 0);

    // The volume's next owner, on another host.
    let spec = remote_disk(&place, "@4").replace(
        &place.socket("a").display().to_string(),
        &other.socket("a").display().to_string(),
    );
    let _new_daemon = Daemon::start(&other, &[&spec]);
    let mut new = Client::connect(&other.socket("a"));
    assert_eq!(new.write(512, &[4; 512]), 0);
    assert_eq!(old.write(512, &[3; 512]), -libc::EIO);
    assert_eq!(old.write(0, &[3; 512]), -libc::EIO);
    assert_eq!(new.read(0, 1024), [[1; 512], [4; 512]].concat());
    assert_eq!(read_image(&image, 0, 1024), [[1; 512], [4; 512]].concat());
    old_daemon.assert_alive();
    assert!(
        old_daemon.log().contains("another owner has taken over"),
        "{}",
        old_daemon.log()
    );
    drop(old);
    drop(old_daemon);

    let mut late = Daemon::spawn(&place, &[&remote_disk(&place, "@3")], &[], |_| ());
    assert!(!late.ended().success());
    await_true("what was refused when confined leaves no sockets", || {
        !place.control().exists() && !place.socket("a").exists()
    });
    let log = late.log();
    assert!(
        log.contains("generation 3 is stale, 4 has been here"),
        "{log}"
    );
    assert_eq!(new.write(1024, &[4; 512]), 0);
}

/// By name, over TCP, with certificates on both ends; all of it from inside the sandboxes.
#[test]
fn disk_of_another_host_comes_by_tls() {
    let place = Place::new();
    let image = place.image("a.img", 16 << 10);
    let pem = Certificates::new();
    std::fs::write(place.path("server.pem"), pem.bundle("localhost")).unwrap();
    std::fs::write(place.path("client.pem"), pem.bundle("client")).unwrap();
    std::fs::write(
        place.path("stranger.pem"),
        Certificates::new().bundle("client"),
    )
    .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let fd = listener.as_raw_fd();
    let mut command = Command::new(env!("CARGO_BIN_EXE_device-blk"));
    command
        .args(["nbd-serve", "--export", "a", "--tls-file"])
        .arg(place.path("server.pem"))
        .arg("--image")
        .arg(&image)
        .arg(format!("--listen-fd={fd}"));
    // SAFETY: fcntl is async-signal-safe, and the descriptor is open in the child as well.
    unsafe {
        command.pre_exec(move || match libc::fcntl(fd, libc::F_SETFD, 0) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        })
    };
    let _server = Server {
        child: command.spawn().unwrap(),
        socket: PathBuf::new(),
    };
    let disk = |pem: &str, hostname: &str| {
        format!(
            "id=a,nbd=localhost:{port}/a,nbd-tls-file={},nbd-tls-hostname={hostname},socket={}",
            place.path(pem).display(),
            place.socket("a").display()
        )
    };
    for (spec, named) in [
        (
            disk("stranger.pem", "localhost"),
            "invalid peer certificate",
        ),
        (disk("client.pem", "elsewhere"), "not valid for name"),
    ] {
        let mut refused = Daemon::spawn(&place, &[&spec], &[], |_| ());
        assert!(!refused.ended().success());
        assert!(refused.log().contains(named), "{}", refused.log());
    }
    let _daemon = Daemon::start(
        &place,
        &[&format!("{},queues=2", disk("client.pem", "localhost"))],
    );
    write_read_verify(&place, &image);
}

/// A CA with what it issues.
struct Certificates(rcgen::CertifiedIssuer<'static, rcgen::KeyPair>);

impl Certificates {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        Self(rcgen::CertifiedIssuer::self_signed(params, key).unwrap())
    }

    /// The CA's certificate, and one with its key for `name`.
    fn bundle(&self, name: &str) -> String {
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let own = params.signed_by(&key, &self.0).unwrap();
        format!("{}{}{}", self.0.pem(), own.pem(), key.serialize_pem())
    }
}

#[test]
fn image_that_is_served_is_locked() {
    let place = Place::new();
    place.image("a.img", 4096);
    let _server = Server::own(&place, "a", &[]);
    let local = place.disk("a");
    let mut daemon = Daemon::spawn(&place, &[&local], &["--lock-wait=0"], |_| ());
    assert!(!daemon.ended().success());
    assert!(daemon.log().contains("in use"), "{}", daemon.log());
}

#[test]
fn connector_is_confined_and_ends_with_its_daemon() {
    let place = Place::new();
    place.image("a.img", 4096);
    let _server = Server::own(&place, "a", &[]);
    let daemon = Daemon::start(&place, &[&remote_disk(&place, "")]);
    // One connector, which ends with its daemon.
    let children = format!("/proc/{0}/task/{0}/children", daemon.pid());
    let connector = std::fs::read_to_string(children).unwrap();
    let connector: u32 = connector.trim().parse().expect("one child");
    let status = std::fs::read_to_string(format!("/proc/{connector}/status")).unwrap();
    assert!(status.contains("Seccomp:\t2"), "{status}");
    drop(daemon);
    await_true("the connector ends", || {
        !Path::new(&format!("/proc/{connector}")).exists()
    });
}

/// What the command line did not name is not connected to, whoever asks.
#[test]
fn attached_disk_needs_an_address_that_is_allowed() {
    let place = Place::new();
    place.image("a.img", 4096);
    let server = Server::own(&place, "a", &[]);
    let allowed = format!("unix:{}", place.path("a.nbd").display());
    let fds = place.fds();
    let more = ["--fd-socket", fds.to_str().unwrap(), "--remote", &allowed];
    let mut daemon = Daemon::start_with(&place, &[], &more);
    let socket_path = |id: &str| place.socket(id);
    let attach = |id: &str, address: String| AttachRequest {
        id: id.into(),
        listener: Some(Listener::SocketFd(FdRef {
            token: format!("{id}-socket"),
        })),
        device: Some(Config::Blk(BlkConfig {
            nbd: Some(NbdSource {
                address,
                export: "a".into(),
                ..NbdSource::default()
            }),
            num_queues: 1,
            ..BlkConfig::default()
        })),
    };
    let sockets = ["a", "b"].map(|id| (id, socket_path(id)));
    let mut manager = Manager::of(place);
    for (id, path) in &sockets {
        let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
        manager.send(&format!("{id}-socket"), listener.as_fd());
    }
    let refused = manager
        .attach(attach("b", "127.0.0.1:1".into()))
        .unwrap_err();
    assert!(refused.message().contains("--remote"), "{refused}");
    manager.attach(attach("a", allowed)).unwrap();
    let nbd = |manager: &mut Manager| manager.get("a").blk.unwrap().nbd.unwrap();
    assert_eq!(nbd(&mut manager).state, "serving");
    drop(server);
    await_true("the loss is told", || {
        nbd(&mut manager).state == "reconnecting"
    });
    assert!(!nbd(&mut manager).reason.is_empty());
    daemon.assert_alive();
}

#[test]
fn qcow2_image_is_served_to_qemu() {
    if !has_tool("qemu-img") || !has_tool("qemu-io") {
        return;
    }
    let place = Place::new();
    let image = place.path("a.qcow2");
    let image = image.to_str().unwrap();
    let run = |tool: &str, args: &[&str]| {
        let output = Command::new(tool).args(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{tool} {args:?}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    run("qemu-img", &["create", "-q", "-f", "qcow2", image, "16M"]);
    let server = Server::own(&place, "a", &["--image", image, "--format", "qcow2"]);
    let url = format!("nbd+unix:///a?socket={}", server.socket.display());
    let said = run(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "write -P 0x11 64k 1M",
            "-c",
            "write -z 128k 64k",
            "-c",
            "read -P 0x11 64k 64k",
            "-c",
            "read -P 0 128k 64k",
            "-c",
            "flush",
            &url,
        ],
    );
    assert!(!said.contains("ailed"), "{said}");
    let copy = place.path("copy.img");
    let copy = copy.to_str().unwrap();
    run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "raw", &url, copy],
    );
    assert_eq!(server.end(Signal::SIGTERM), Some(0));
    run(
        "qemu-img",
        &["compare", "-f", "qcow2", "-F", "raw", image, copy],
    );
    run("qemu-img", &["check", "-f", "qcow2", image]);
}
