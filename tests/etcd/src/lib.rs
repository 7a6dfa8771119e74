//! An etcd cluster on loopback, for tests: members that are started, killed, frozen and started again.
//! Which etcd, the variable `ETCD` says; `cargo lab test` sets it.
//!
//! Each member has a loopback address of its own, drawn at random, instead of a port of its own: etcd
//! must know its ports beforehand, and nobody else is on that address.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const CLIENT_PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;
/// For a member to serve; an election among three takes some seconds on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Draws of addresses.
const ATTEMPTS: usize = 8;

/// What a cluster is started with.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// How many members; none means one.
    pub members: usize,
    /// The size of its data past which it refuses to grow; 0 for etcd's own.
    pub quota_bytes: u64,
    /// The members' certificate, its key, and whom clients' certificates must be signed by.
    pub tls: Option<Tls>,
    /// The addresses to use, one a member, instead of random ones.
    pub addresses: Vec<Ipv4Addr>,
}

/// PEM files.
#[derive(Debug, Clone)]
pub struct Tls {
    /// The members' certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The authority that clients' certificates come from.
    pub client_ca: PathBuf,
}

/// A running cluster; its members are killed and their data is removed when it is dropped.
#[derive(Debug)]
pub struct Cluster {
    dir: tempfile::TempDir,
    program: PathBuf,
    options: Options,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    address: Ipv4Addr,
    child: Option<Child>,
}

impl Cluster {
    /// One of `members`; `None`, said once, where there is no etcd.
    pub fn start(members: usize) -> Option<Self> {
        Self::start_with(Options {
            members,
            ..Options::default()
        })
    }

    /// As [`Self::start`].
    ///
    /// # Panics
    /// When the cluster does not come up.
    pub fn start_with(mut options: Options) -> Option<Self> {
        let Some(program) = std::env::var_os("ETCD").map(PathBuf::from) else {
            eprintln!("skipped: no etcd; cargo lab test brings one");
            return None;
        };
        options.members = options.members.max(1);
        for _ in 0..ATTEMPTS {
            if let Some(cluster) = Self::attempt(&program, &options) {
                return Some(cluster);
            }
        }
        panic!("no etcd cluster came up in {ATTEMPTS} attempts");
    }

    fn attempt(program: &Path, options: &Options) -> Option<Self> {
        let addresses = match options.addresses.len() {
            0 => draw(options.members)?,
            _ => options.addresses.clone(),
        };
        let member = |address| Member {
            address,
            child: None,
        };
        let mut cluster = Self {
            dir: tempfile::tempdir().expect("a directory for etcd"),
            program: program.to_path_buf(),
            options: options.clone(),
            members: addresses.into_iter().map(member).collect(),
        };
        for index in 0..cluster.members.len() {
            cluster.spawn(index);
        }
        cluster.wait_until_healthy().then_some(cluster)
    }

    /// What clients are given.
    pub fn endpoints(&self) -> Vec<String> {
        let scheme = self.scheme();
        let members = self.members.iter();
        members
            .map(|member| format!("{scheme}://{}:{CLIENT_PORT}", member.address))
            .collect()
    }

    /// Members end without warning (SIGKILL).
    pub fn kill(&mut self, index: usize) {
        if let Some(mut child) = self.members[index].child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// A member stops where it is (SIGSTOP), or goes on (SIGCONT).
    ///
    /// # Panics
    /// When it does not run.
    pub fn signal(&self, index: usize, signal: Signal) {
        let child = self.members[index].child.as_ref().expect("it runs");
        kill(Pid::from_raw(child.id() as i32), signal).expect("it is there");
    }

    /// Starts a member that was killed, with the data it had.
    pub fn restart(&mut self, index: usize) {
        self.spawn(index);
    }

    /// Whether all running members have a leader, in time.
    pub fn wait_until_healthy(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        for index in 0..self.members.len() {
            loop {
                let member = &mut self.members[index];
                let Some(child) = &mut member.child else {
                    break;
                };
                if !matches!(child.try_wait(), Ok(None)) || Instant::now() > deadline {
                    return false;
                }
                if self.is_healthy(index) {
                    break;
                }
                std::thread::sleep(POLL_INTERVAL);
            }
        }
        true
    }

    fn is_healthy(&self, index: usize) -> bool {
        let address = self.members[index].address;
        if self.options.tls.is_some() {
            // Its health is told to those with a certificate; that it serves must do.
            return TcpStream::connect_timeout(&socket(address), PROBE_TIMEOUT).is_ok();
        }
        health(address).is_ok_and(|answer| answer.contains("\"true\""))
    }

    fn scheme(&self) -> &'static str {
        match self.options.tls {
            Some(_) => "https",
            None => "http",
        }
    }

    fn spawn(&mut self, index: usize) {
        let name = format!("m{index}");
        let scheme = self.scheme();
        let address = self.members[index].address;
        let client = format!("{scheme}://{address}:{CLIENT_PORT}");
        let peer = format!("http://{address}:{PEER_PORT}");
        let members = self.members.iter().enumerate();
        let cluster: Vec<String> = members
            .map(|(index, member)| format!("m{index}=http://{}:{PEER_PORT}", member.address))
            .collect();
        let log = self.dir.path().join(format!("{name}.log"));
        let log = File::options().create(true).append(true).open(log);
        let log = log.expect("a log for etcd");
        let mut command = Command::new(&self.program);
        command
            .args(["--name", &name, "--logger", "zap", "--log-level", "warn"])
            .arg("--data-dir")
            .arg(self.dir.path().join(&name))
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &cluster.join(",")])
            .args(["--initial-cluster-state", "new"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log for etcd"))
            .stderr(log);
        if self.options.quota_bytes > 0 {
            command.arg("--quota-backend-bytes");
            command.arg(self.options.quota_bytes.to_string());
        }
        if let Some(tls) = &self.options.tls {
            command.arg("--cert-file").arg(&tls.certificate);
            command.arg("--key-file").arg(&tls.key);
            command.arg("--client-cert-auth");
            command.arg("--trusted-ca-file").arg(&tls.client_ca);
        }
        // SAFETY: prctl is async-signal-safe and touches no memory of this process.
        unsafe {
            command.pre_exec(|| {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from)
            });
        }
        self.members[index].child = Some(command.spawn().expect("etcd starts"));
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for index in 0..self.members.len() {
            self.kill(index);
        }
    }
}

/// For [`Options::addresses`], where a certificate must know them.
pub fn free_addresses(members: usize) -> Vec<Ipv4Addr> {
    let mut drawn = std::iter::from_fn(|| Some(draw(members)));
    drawn.find_map(|addresses| addresses).unwrap_or_default()
}

/// Addresses side by side on which nobody listens.
fn draw(members: usize) -> Option<Vec<Ipv4Addr>> {
    let chance = uuid::Uuid::new_v4();
    let [a, b, c, ..] = *chance.as_bytes();
    let last = 1 + c % 200;
    let addresses: Vec<_> = (0..members)
        .map(|index| Ipv4Addr::new(127, a | 1, b, last + index as u8))
        .collect();
    let free = |address: &Ipv4Addr| {
        let bound = [CLIENT_PORT, PEER_PORT].map(|port| TcpListener::bind((*address, port)));
        bound.iter().all(Result::is_ok)
    };
    addresses.iter().all(free).then_some(addresses)
}

fn socket(address: Ipv4Addr) -> SocketAddr {
    SocketAddr::from((address, CLIENT_PORT))
}

fn health(address: Ipv4Addr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&socket(address), PROBE_TIMEOUT)?;
    stream.set_read_timeout(Some(PROBE_TIMEOUT))?;
    write!(
        stream,
        "GET /health HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
