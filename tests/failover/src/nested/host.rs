//! What runs inside of a host: its node agent, and somebody who tells on the second serial line which VMs
//! are there.

use std::fmt;
use std::fs::{self, File};
use std::io::Write;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nbd::Generation;
use nbd::client::{Dial, Options, connect};
use nix::mount::{MsFlags, mount};
use serde::{Deserialize, Serialize};

/// Where the agent listens.
pub const AGENT_PORT: u16 = 7071;
const AGENT: &str = "/usr/bin/node-agent";
const EVENTS: &str = "/dev/ttyS1";
const STATE_DISK: &str = "/dev/vda";
const STATE: &str = "/mnt";
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// It is said again even when nothing changed.
const TELL_INTERVAL: Duration = Duration::from_secs(2);
const DEVICE_PATIENCE: Duration = Duration::from_secs(60);

/// On the host's kernel command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Order {
    /// Its own.
    pub address: String,
    /// What it joins with, when it has not yet.
    pub invitation: Option<Invitation>,
    /// A disk that is not its own any more, which it is to try: `HOST:PORT/EXPORT@GENERATION`.
    pub stale: Option<String>,
}

/// What lets a host into the fleet, once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Invitation {
    /// The token's secret.
    pub token: String,
    /// SHA-256 of the authority, by which it knows the controllers.
    pub ca_hash: String,
    /// Where these speak TLS: `https://HOST:PORT`.
    pub controllers: Vec<String>,
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fleet.address={}", self.address)?;
        if let Some(invitation) = &self.invitation {
            let Invitation {
                token,
                ca_hash,
                controllers,
            } = invitation;
            write!(f, " fleet.token={token} fleet.ca_hash={ca_hash}")?;
            write!(f, " fleet.controllers={}", controllers.join(","))?;
        }
        match &self.stale {
            Some(disk) => write!(f, " fleet.stale={disk}"),
            None => Ok(()),
        }
    }
}

impl Order {
    fn from_cmdline(cmdline: &str) -> Self {
        let value = |key: &str| {
            let mut words = cmdline.split_ascii_whitespace();
            words.find_map(|word| word.strip_prefix(key)?.strip_prefix('=').map(str::to_owned))
        };
        Self {
            address: value("fleet.address").unwrap_or_default(),
            invitation: value("fleet.token").map(|token| Invitation {
                token,
                ca_hash: value("fleet.ca_hash").unwrap_or_default(),
                controllers: value("fleet.controllers")
                    .map(|all| all.split(',').map(str::to_owned).collect())
                    .unwrap_or_default(),
            }),
            stale: value("fleet.stale"),
        }
    }
}

/// What a host says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// VMs whose `vmm-core` lives.
    pub vms: Vec<String>,
    /// VMs that the agent has a record of.
    pub records: Vec<String>,
    /// What became of the attempt on the disk that is not its own; empty before.
    pub stale: Stale,
}

/// An attempt of somebody whose time is over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stale {
    /// None was made yet.
    #[default]
    Unknown,
    /// The server let it in.
    Admitted,
    /// The server refused it.
    Refused,
}

impl Seen {
    /// Reads what [`run`] wrote; `None` for anything else on that line.
    pub fn from_line(line: &str) -> Option<Self> {
        serde_json::from_str(line.trim()).ok()
    }
}

/// Serves until the host is switched off.
///
/// # Errors
/// When the host cannot be made one, or its agent ends.
pub fn run() -> Result<()> {
    let order = Order::from_cmdline(&fs::read_to_string("/proc/cmdline")?);
    ensure!(
        !order.address.is_empty(),
        "fleet.address is not on the kernel command line"
    );
    await_file(STATE_DISK)?;
    let none = None::<&str>;
    mount(
        Some(STATE_DISK),
        STATE,
        Some("ext4"),
        MsFlags::empty(),
        none,
    )
    .context("cannot mount the state disk")?;
    await_file("/sys/class/net/eth0")?;
    ip(&format!("addr add {}/24 dev eth0", order.address))?;
    ip("link set eth0 up")?;
    let state = Path::new(STATE).join("agent");
    let listen = format!("https://{}:{AGENT_PORT}", order.address);
    if let Some(invitation) = &order.invitation {
        join(invitation, &listen, &state)?;
    }
    let mut agent = Command::new(AGENT)
        .args(["--listen", &listen])
        .arg("--state-dir")
        .arg(&state)
        .args(["--run-dir", "/run/mortise"])
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start node-agent")?;
    let stale = Arc::new(Mutex::new(Stale::Unknown));
    if let Some(disk) = order.stale {
        let stale = stale.clone();
        std::thread::spawn(move || {
            let outcome = attempt(&disk);
            eprintln!("as an owner of before, {disk}: {outcome:?}");
            if let Ok(mut stale) = stale.lock() {
                *stale = outcome;
            }
        });
    }
    let mut events = File::options().write(true).open(EVENTS)?;
    let (mut told, mut told_at) = (None, Instant::now());
    loop {
        if let Some(status) = agent.try_wait()? {
            bail!("node-agent ended: {status}");
        }
        let seen = Seen {
            vms: running(),
            records: records(&state),
            stale: stale.lock().map(|stale| *stale).unwrap_or_default(),
        };
        if told.as_ref() != Some(&seen) || told_at.elapsed() > TELL_INTERVAL {
            let line = serde_json::to_string(&seen)? + "\n";
            events.write_all(line.as_bytes())?;
            (told, told_at) = (Some(seen), Instant::now());
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// Gets the host its certificate; the network may have just come up.
fn join(invitation: &Invitation, address: &str, state: &Path) -> Result<()> {
    let deadline = Instant::now() + DEVICE_PATIENCE;
    loop {
        let mut command = Command::new(AGENT);
        command.args(["join", "--address", address, "--state-dir"]);
        command
            .arg(state)
            .args(["--token", &invitation.token])
            .args(["--ca-hash", &invitation.ca_hash]);
        for controller in &invitation.controllers {
            command.args(["--controller", controller]);
        }
        if command.stdin(Stdio::null()).status()?.success() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "no controller lets the host in");
        std::thread::sleep(LOOK_INTERVAL);
    }
}

fn await_file(path: &str) -> Result<()> {
    let deadline = Instant::now() + DEVICE_PATIENCE;
    while !Path::new(path).exists() {
        ensure!(Instant::now() < deadline, "{path} did not appear");
        std::thread::sleep(LOOK_INTERVAL);
    }
    Ok(())
}

fn ip(line: &str) -> Result<()> {
    let status = Command::new("/bin/busybox")
        .arg("ip")
        .args(line.split_ascii_whitespace())
        .status()?;
    ensure!(status.success(), "ip {line} failed");
    Ok(())
}

/// VMs whose `vmm-core` lives: its sockets are in `RUN/vms/ID`.
fn running() -> Vec<String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut vms: Vec<String> = entries
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).into_owned();
            vm_of(&command).map(str::to_owned)
        })
        .collect();
    vms.sort_unstable();
    vms.dedup();
    vms
}

/// A process's arguments end with NUL each.
fn vm_of(command: &str) -> Option<&str> {
    let program = command.split('\0').next()?;
    if !program.ends_with("vmm-core") {
        return None;
    }
    let (_, rest) = command.split_once("/vms/")?;
    rest.split(['/', '\0']).next()
}

fn records(state: &Path) -> Vec<String> {
    let entries = fs::read_dir(state.join("vms"))
        .into_iter()
        .flatten()
        .flatten();
    let mut records: Vec<String> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            Some(name.to_str()?.strip_suffix(".json")?.to_owned())
        })
        .collect();
    records.sort_unstable();
    records
}

struct Dialer(String);

impl Dial for Dialer {
    fn dial(&mut self, _: Instant) -> std::io::Result<OwnedFd> {
        TcpStream::connect(&self.0).map(OwnedFd::from)
    }
}

/// Opens a disk as its owner of before.
fn attempt(disk: &str) -> Stale {
    let parts = disk
        .split_once('/')
        .and_then(|(address, export)| Some((address, export.split_once('@')?)));
    let Some((address, (export, generation))) = parts else {
        return Stale::Unknown;
    };
    let options = Options {
        export: export.to_owned(),
        generation: generation.parse().ok().map(Generation),
        ..Options::default()
    };
    let deadline = Instant::now() + DEVICE_PATIENCE;
    loop {
        match connect(Box::new(Dialer(address.to_owned())), options.clone()) {
            Ok(_) => return Stale::Admitted,
            Err(error) if error.is_final() => return Stale::Refused,
            // The network has just come up.
            Err(error) => eprintln!("{}", error.describe()),
        }
        if Instant::now() > deadline {
            return Stale::Unknown;
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_survives_the_command_line() {
        let order = Order {
            address: "10.77.0.2".into(),
            invitation: Some(Invitation {
                token: "mt-0a1b".into(),
                ca_hash: "5f".into(),
                controllers: vec![
                    "https://10.77.0.1:7070".into(),
                    "https://10.77.0.1:7071".into(),
                ],
            }),
            stale: Some("10.77.0.1:10809/roam@3".into()),
        };
        let cmdline = format!("quiet {order} panic=-1");
        assert_eq!(Order::from_cmdline(&cmdline), order);
        assert_eq!(Order::from_cmdline("quiet"), Order::default());
    }

    #[test]
    fn vms_are_known_by_their_vmm() {
        let vmm = "/usr/bin/vmm-core\0--control-socket\0/run/mortise/vms/roam/vmm.ctl\0";
        assert_eq!(vm_of(vmm), Some("roam"));
        assert_eq!(
            vm_of("/usr/bin/device-blk\0/run/mortise/vms/roam/x\0"),
            None
        );
        assert_eq!(vm_of(""), None);
    }
}
