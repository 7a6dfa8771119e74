//! A host is lost; its VM runs again on the other one, once, with its disk intact.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use api::controller as pb;
use serde::Serialize;

use crate::disk::Found;
use crate::fleet::{Fleet, refused};
use crate::guest::{self, BLOCK_BYTES, BLOCKS};
use crate::stale::Stale;

/// The generation of the VM's first attachment.
const GENERATION: u64 = 10;
/// Rounds that the first guest makes before its host is lost: enough to tell its writes from the next
/// one's.
const FIRST_ROUNDS: u32 = 4;
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// What is done.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where the programs are.
    pub bin_dir: PathBuf,
    /// How the host is lost.
    pub loss: Loss,
}

/// How a host is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// All its processes end, and its cable is pulled.
    Kill,
    /// Its cable is pulled.
    Partition,
}

/// What was seen.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// From the loss to the first write of the VM on the other host.
    pub outage_ms: u64,
    /// Blocks that have what must be there.
    pub blocks_verified: u64,
    /// Blocks that have not, before and after.
    pub blocks_wrong: u64,
    /// Attempts of earlier owners that the disk's server refused: clients and writes.
    pub fenced_writes: u64,
    /// Of these, writes of a session that was open before.
    pub refused_writes: u64,
    /// Of these, clients that were not let in.
    pub refused_clients: u64,
    /// At some time two copies of the VM were there.
    pub ran_twice: bool,
    /// The lost host came back and has nothing of the VM any more.
    pub returned_clean: bool,
}

impl Report {
    /// All is as it should be.
    pub fn is_good(&self) -> bool {
        self.blocks_wrong == 0
            && self.blocks_verified > 0
            && self.fenced_writes > 0
            && self.refused_writes > 0
            && !self.ran_twice
            && self.returned_clean
    }
}

impl Settings {
    /// Where this program is.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn beside_this_program() -> Result<PathBuf> {
        let program = std::env::current_exe()?;
        let dir = program
            .parent()
            .context("this program is in no directory")?;
        // Tests are one level further down.
        let dir = match dir.ends_with("deps") {
            true => dir.parent().unwrap_or(dir),
            false => dir,
        };
        Ok(dir.to_owned())
    }
}

/// Does it all; `step` is told what happens.
///
/// # Errors
/// When something does not come up, or does not come back.
pub fn run(settings: &Settings, step: &mut dyn FnMut(&str)) -> Result<Report> {
    step("starting two hosts, a controller and a server of a shared disk");
    let mut fleet = Fleet::start(&settings.bin_dir, 2)?;
    let kernel = fleet.path().join("kernel");
    guest::write_kernel(&kernel)?;
    let image = fleet.path().join("disk.img");
    let status = image.with_extension("status");
    fleet.serve_disk(&image, u64::from(BLOCKS) * BLOCK_BYTES as u64)?;
    // Somebody who had the disk before, and does not know better.
    let address = fleet.disk_address();
    let earlier = Stale::open(Some(&fleet.core), &address, "disk", GENERATION - 1)?;

    step("starting a VM that may run anywhere");
    let disk = pb::Disk {
        name: "root".to_owned(),
        nbd: Some(pb::NbdSource {
            address: address.clone(),
            export: "disk".to_owned(),
            generation: GENERATION,
            ..pb::NbdSource::default()
        }),
        ..pb::Disk::default()
    };
    fleet.run_vm("roam", &kernel, Some(disk))?;
    let lost = fleet.until("the VM", || {
        Ok((0..2).find(|host| fleet.has_copy(*host, "roam")))
    })?;
    fleet.until("enough writes", || {
        let found = Found::read(&image)?;
        Ok((found.last() >= FIRST_ROUNDS * BLOCKS).then_some(()))
    })?;
    if earlier.write() {
        bail!("the disk's server let an earlier owner write");
    }

    step(&format!("losing host h{lost}"));
    let lost_at = Instant::now();
    fleet.set_cable(lost, false)?;
    if settings.loss == Loss::Kill {
        fleet.kill_host(lost);
    }
    let (left, outage, ran_twice) = watch(&fleet, lost, &image, lost_at)?;
    step(&format!(
        "it runs on the other one, {} ms later",
        outage.as_millis()
    ));
    if Stale::open(Some(&fleet.core), &address, "disk", GENERATION).is_ok() {
        bail!("the disk's server let the lost host's generation in");
    }

    step("the lost host returns");
    fleet.set_cable(lost, true)?;
    if settings.loss == Loss::Kill {
        fleet.start_agent(lost)?;
    }
    let vm_dir = fleet.path().join(format!("h{lost}/s/vms/roam.json"));
    fleet.until("the end of what the lost host had", || {
        let is_clean = !fleet.has_copy(lost, "roam") && !vm_dir.exists();
        Ok(is_clean.then_some(()))
    })?;
    let status_now = fleet.status("roam")?;
    if status_now.phase() != pb::VmPhase::Running {
        bail!(
            "the VM is {}\n{}",
            status_now.phase().as_str_name(),
            fleet.logs()
        );
    }
    let ran_twice = ran_twice || fleet.has_copy(lost, "roam");

    // Everything stops, so that the disk stands still.
    let other = 1 - lost;
    fleet.kill_host(other);
    std::thread::sleep(Duration::from_millis(300));
    let (wrong, second) = Found::read(&image)?.of_two_guests(&left);
    step(&format!(
        "the disk has {} writes of the first run and {second} of the second, {} blocks are wrong",
        left.last(),
        wrong.len()
    ));
    let before = left.of_one_guest();
    for wrong in before.iter().chain(&wrong) {
        step(&format!("{wrong:?}"));
    }
    let (refused_clients, refused_writes) = fleet.until("the server's count", || {
        Ok(refused(&status).filter(|(clients, writes)| *clients > 0 && *writes > 0))
    })?;
    Ok(Report {
        outage_ms: outage.as_millis() as u64,
        blocks_verified: u64::from(BLOCKS) - wrong.len() as u64,
        blocks_wrong: (wrong.len() + before.len()) as u64,
        fenced_writes: refused_clients + refused_writes,
        refused_clients,
        refused_writes,
        ran_twice,
        returned_clean: true,
    })
}

/// Until the VM writes on the other host: what the first one left, how long that took, and whether there
/// were two copies at a time.
fn watch(
    fleet: &Fleet,
    lost: usize,
    image: &std::path::Path,
    lost_at: Instant,
) -> Result<(Found, Duration, bool)> {
    let other = 1 - lost;
    let (over, twice) = (AtomicBool::new(false), AtomicBool::new(false));
    let seen = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                if fleet.has_copy(lost, "roam") && fleet.has_copy(other, "roam") {
                    twice.store(true, Ordering::Release);
                }
                std::thread::sleep(LOOK_INTERVAL);
            }
        });
        let mut left = Found::read(image)?;
        let seen = fleet.until("the VM on the other host", || {
            let now = Found::read(image)?;
            if !fleet.has_copy(other, "roam") {
                left = now;
                return Ok(None);
            }
            // Its first write is number 1, in block 1.
            let is_new = now.has_begun_anew(&left);
            Ok(is_new.then(|| lost_at.elapsed()))
        });
        over.store(true, Ordering::Release);
        seen.map(|outage| (left, outage))
    });
    let (left, outage) = seen?;
    Ok((left, outage, twice.into_inner()))
}
