//! The main job, once through: a VM made of separate processes boots an unmodified kernel, does
//! verified disk and network I/O and shuts down cleanly.
//!
//! ```text
//! launch (controller or by hand) -> console: up, CPUs, net, disk -> look at the processes
//!   -> power button -> guest powers off -> read the image -> nothing may be left
//! ```

mod by_hand;
mod console;
mod managed;
mod peer;
mod processes;

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use guest::pattern::{BLOCK_LEN, first_mismatch};
use guest::plan::{End, Job as GuestJob, Plan};
use guest::report::{Report, UP_LINE};

use super::Events;
use crate::job::{DemoReport, Event, Process, Site};
use crate::nested::RunDir;
use console::{Console, Line};
use peer::Peer;

const CPUS: u32 = 2;
const MEMORY_MIB: u32 = 256;
const DISK_MIB: u64 = 64;
const DISK_BYTES: u64 = 8 << 20;
const NET_BYTES: u64 = 2 << 20;
/// An emulated guest boots in 8 s on an idle machine, in three times that on a busy one.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
const JOB_LIMIT: Duration = Duration::from_secs(120);
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(60);

/// What to launch.
struct Order<'a> {
    site: &'a Site,
    dir: &'a Path,
    cmdline: &'a str,
    /// The host's end of the NIC, as address/prefix.
    host_cidr: &'a str,
}

/// A VM that was launched, by whichever means.
trait Machine {
    /// The console's lines from the start.
    fn console(&mut self) -> Result<Console>;
    fn processes(&mut self) -> Result<Vec<Process>>;
    /// Asks the guest to power itself off.
    fn ask_to_power_off(&mut self) -> Result<()>;
    /// Waits for the end; an error unless the guest itself powered off.
    fn wait_until_off(&mut self, deadline: Instant) -> Result<()>;
    /// The disk's image.
    fn image(&self) -> PathBuf;
    /// Removes everything; an error if something stays behind.
    fn remove(self: Box<Self>) -> Result<()>;
}

/// Runs it. Measurements are reported even if something fails on the way.
pub(super) fn run(site: &Site, by_hand: bool, events: &mut Events) -> Result<i32> {
    let started = Instant::now();
    let mut report = DemoReport {
        guest_kernel: site.kernel_release.clone(),
        ..DemoReport::default()
    };
    if let Err(error) = drive(site, by_hand, events, &mut report) {
        report.problems.push(format!("{error:#}"));
    }
    report.elapsed_ms = started.elapsed().as_millis() as u64;
    let verified = report.problems.is_empty()
        && report.disk_verified
        && report.net_verified
        && report.clean_shutdown;
    events.send(&Event::Demo(report));
    Ok(i32::from(!verified))
}

fn drive(site: &Site, by_hand: bool, events: &mut Events, report: &mut DemoReport) -> Result<()> {
    let dir = RunDir::create_in(Path::new("/tmp"))?;
    // RFC 2544's benchmarking range: no real network uses it.
    let subnet: u8 = rand::random();
    let host = format!("198.18.{subnet}.1");
    let (disk_seed, net_seed) = (rand::random(), rand::random());
    let peer = Peer::listen(&host, net_seed, NET_BYTES)?;
    let plan = Plan {
        root: None,
        jobs: vec![
            GuestJob::Smp { cpus: CPUS },
            GuestJob::Address(format!("198.18.{subnet}.2/24")),
            GuestJob::Net {
                peer: peer.address().into(),
                seed: net_seed,
                bytes: NET_BYTES,
            },
            GuestJob::Disk {
                device: "vda".into(),
                seed: disk_seed,
                bytes: DISK_BYTES,
            },
        ],
        // By hand there is no client for the power button; leaving the shell ends the guest.
        end: if by_hand { End::Shell } else { End::Wait },
    };
    let order = Order {
        site,
        dir: &dir.0,
        cmdline: &format!("console=ttyS0 quiet reboot=t panic=-1 {plan}"),
        host_cidr: &format!("{host}/24"),
    };
    let result = launch(&order, by_hand, events).and_then(|mut machine| {
        let result = check(&mut *machine, peer, disk_seed, events, report);
        events.step("removing everything");
        let removed = machine.remove();
        result.and(removed)
    });
    if result.is_err() {
        show_logs(&dir.0, events);
    }
    report.clean_shutdown = result.is_ok();
    result
}

fn launch(order: &Order, by_hand: bool, events: &mut Events) -> Result<Box<dyn Machine>> {
    if by_hand {
        events.step("starting device-blk, device-net and vmm-core by hand");
        Ok(Box::new(by_hand::Machine::launch(order)?))
    } else {
        events.step("starting controller --standalone, creating volume and VM");
        Ok(Box::new(managed::Machine::launch(order)?))
    }
}

/// The ends of all logs below a folder, which is about to vanish.
fn show_logs(dir: &Path, events: &mut Events) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            show_logs(&path, events);
        } else if path.extension().is_some_and(|extension| extension == "log") {
            let text = fs::read_to_string(&path).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            for line in &lines[lines.len().saturating_sub(10)..] {
                events.step(format_args!("{}: {line}", path.display()));
            }
        }
    }
}

fn check(
    machine: &mut dyn Machine,
    peer: Peer,
    disk_seed: u64,
    events: &mut Events,
    report: &mut DemoReport,
) -> Result<()> {
    let mut console = machine.console()?;
    events.step("the guest boots");
    let up = console.wait_for(UP_LINE, BOOT_LIMIT)?;
    let processes = machine.processes()?;
    report.boot_ms = boot_ms(&processes, &up)?;
    events.step(format_args!("userspace is up after {} ms", report.boot_ms));
    follow_reports(&mut console, events, report)?;
    // The peer's verdict first: what it received is the half that the guest can't see.
    let hash = peer
        .outcome()
        .context("the exchange over TCP, seen from the host")?;
    report.net_verified = report.net_bytes > 0;
    events.step(format_args!(
        "network verified, SHA-256 {}...",
        &hash.to_string()[..16]
    ));
    report.processes = machine.processes()?;
    processes::expect_one_of_each(&report.processes)?;
    events.step("asking the guest to power off");
    machine.ask_to_power_off()?;
    machine.wait_until_off(Instant::now() + SHUTDOWN_LIMIT)?;
    events.step("powered off; reading the image");
    let verified = verify_image(&machine.image(), disk_seed)?;
    ensure!(
        report.disk_bytes == verified,
        "the guest verified {} bytes",
        report.disk_bytes
    );
    report.disk_verified = true;
    Ok(())
}

/// From the exec of vmm-core, as the kernel recorded it, to the line's arrival.
fn boot_ms(processes: &[Process], up: &Line) -> Result<u64> {
    let vmm = processes.iter().find(|process| process.name == "vmm-core");
    let vmm = vmm.context("no vmm-core among the VM's processes")?;
    let start = processes::start_time(vmm.pid)?;
    Ok(up.since_boot.saturating_sub(start).as_millis() as u64)
}

/// Reads reports until the guest waits for its end.
fn follow_reports(
    console: &mut Console,
    events: &mut Events,
    report: &mut DemoReport,
) -> Result<()> {
    let deadline = Instant::now() + JOB_LIMIT;
    loop {
        let line = console
            .next(deadline)
            .context("waiting for the guest's reports")?;
        let Some(told) = Report::from_line(&line.text) else {
            continue;
        };
        if let Some(error) = told.error() {
            bail!("the guest reports: {error}");
        }
        match told {
            Report::Smp { used, .. } => {
                events.step(format_args!("{used} CPUs run"));
                report.vcpus_used = used;
            }
            Report::Net { bytes, .. } => report.net_bytes = 2 * bytes,
            Report::Disk {
                bytes, elapsed_ms, ..
            } => {
                events.step(format_args!(
                    "{bytes} bytes written and read back in {elapsed_ms} ms"
                ));
                report.disk_bytes = bytes;
            }
            Report::Done { .. } => break,
            _ => {}
        }
    }
    console.wait_for("mortise-guest: waiting", JOB_LIMIT)?;
    Ok(())
}

/// Compares the image's start with what the guest was told to write.
fn verify_image(path: &Path, seed: u64) -> Result<u64> {
    let mut image = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut chunk = vec![0; 64 * BLOCK_LEN];
    let mut block = 0;
    while block * (BLOCK_LEN as u64) < DISK_BYTES {
        image
            .read_exact(&mut chunk)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => anyhow::anyhow!("the image is too short"),
                _ => error.into(),
            })?;
        if let Some(wrong) = first_mismatch(seed, block, &chunk) {
            bail!(
                "block {wrong} of {} does not hold what the guest wrote",
                path.display()
            );
        }
        block += (chunk.len() / BLOCK_LEN) as u64;
    }
    Ok(block * BLOCK_LEN as u64)
}
