//! Servers and clients, ours and QEMU's.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nbd::client::{self, Client, Dial, Options};
use nbd::server::{self, FileExport, Server};
use nbd::{Address, TlsServer};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
pub(crate) const MIB: u64 = 1 << 20;

/// Connects by itself.
struct Direct(Address);

impl Dial for Direct {
    fn dial(&mut self, deadline: Instant) -> io::Result<OwnedFd> {
        self.0.connect(deadline)
    }
}

pub(crate) fn options() -> Options {
    Options {
        export: "disk".into(),
        ..Options::default()
    }
}

pub(crate) fn connect(address: &Address, options: Options) -> Result<Client, String> {
    client::connect(Box::new(Direct(address.clone())), options)
        .and_then(|connected| connected.start("test"))
        .map_err(|error| error.describe())
}

/// False, and said so, when this machine has no `tool`.
pub(crate) fn has_tool(tool: &str) -> bool {
    let found = Command::new(tool)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !found {
        eprintln!("skipped: this machine has no {tool}");
    }
    found
}

pub(crate) fn run(tool: &str, args: &[&str]) -> Output {
    Command::new(tool).args(args).output().unwrap()
}

pub(crate) fn said(output: &Output) -> String {
    let [stdout, stderr] =
        [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    format!("{stdout}{stderr}")
}

/// An image full of holes.
pub(crate) fn image(place: &Path, name: &str, size_bytes: u64) -> PathBuf {
    let path = place.join(name);
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(size_bytes).unwrap();
    path
}

pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|at| (at.wrapping_mul(31) ^ (at >> 8) ^ seed) as u8)
        .collect()
}

/// Polls until `condition` holds.
pub(crate) fn await_true(what: &str, mut condition: impl FnMut() -> bool) {
    let give_up = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < give_up, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A server of QEMU's; killed when dropped.
pub(crate) struct QemuNbd(Child);

impl QemuNbd {
    /// Serves the raw `image` as `disk`.
    pub(crate) fn start(image: &Path, socket: &Path, more: &[&str]) -> Self {
        let child = Command::new("qemu-nbd")
            .args(["-f", "raw", "-x", "disk", "-t", "-e", "8"])
            .arg("--discard=unmap")
            .arg("-k")
            .arg(socket)
            .args(more)
            .arg(image)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut server = Self(child);
        await_true("qemu-nbd listens", || {
            let ended = server.0.try_wait().unwrap();
            assert!(ended.is_none(), "qemu-nbd ended with {ended:?}");
            UnixStream::connect(socket).is_ok()
        });
        server
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server of ours, in this process.
pub(crate) struct Own(Arc<Server>);

impl Own {
    pub(crate) fn start(image: &Path, listener: OwnedFd, tls: Option<TlsServer>) -> Self {
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(image)
            .unwrap();
        let size_bytes = file.metadata().unwrap().len();
        let options = server::Options {
            name: "disk".into(),
            tls,
            fence: None,
            max_connections: 32,
            disk_threads: 4,
            boot_id: [1; 16],
        };
        let export = Arc::new(FileExport::new(file, size_bytes, false));
        let server = Arc::new(Server::new(export, options).unwrap());
        let running = Arc::clone(&server);
        std::thread::spawn(move || running.run(listener).unwrap());
        Self(server)
    }

    pub(crate) fn on_unix(image: &Path, socket: &Path) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        Self::start(image, listener.into(), None)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let is_over = self.0.stop(DEADLINE);
        assert!(is_over || std::thread::panicking(), "clients stay");
    }
}
