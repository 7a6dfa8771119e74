//! What happens, and what must be true afterwards.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use api::controller as pb;
use guest::journal::Journal;
use guest::oracle::BLOCK_LEN;
use guest::plan::{End, Job, Plan};
use guest::report::Report as Told;

use super::control::Control;
use super::host::Stale as Attempt;
use super::machines::Machine;
use super::{Settings, until};
use crate::fleet::refused;
use crate::scenario::Report;
use crate::stale::Stale;

/// Of the shared disk.
const BLOCKS: u64 = 512;
const SEED: u64 = 0x6d6f_7274_6973_6531;
/// What is to be on it before its host is lost: all of it, and a part twice.
const FIRST_WRITES: u64 = BLOCKS + BLOCKS / 4;
/// Of the volume's first owner.
const GENERATION: u64 = 1;
const POOL: &str = "shared";
/// The volume, and what it is called at the server.
const VOLUME: &str = "data";
const VM_MEMORY_BYTES: u64 = 192 << 20;
/// In hosts.
const GUEST_KERNEL: &str = "/boot/vmlinux";
const GUEST_INITRD: &str = "/boot/guest.cpio";
const ROAMING: &str = "roam";
const STAYING: &str = "stay";

/// Does it all; `step` is told what happens.
///
/// # Errors
/// When something does not come up, or does not come back.
pub fn run(settings: &Settings, step: &mut dyn FnMut(&str)) -> Result<Report> {
    // Sockets' paths are short.
    let dir = tempfile::Builder::new().prefix("fo").tempdir()?;
    step("starting a 3-member etcd, two controllers and the server of a shared disk");
    let mut control = Control::start(settings, dir.path())?;
    let image = dir.path().join("shared.img");
    let disk_address = control.serve_disk(&image, VOLUME, BLOCKS * BLOCK_LEN as u64)?;
    step("booting two emulated hosts, each of which joins with a token");
    let mut hosts = Vec::new();
    for number in 0..2 {
        let mut host = Machine::new(settings, dir.path(), number)?;
        host.start(Some(control.invite()?), None)?;
        hosts.push(host);
    }
    let addresses: Vec<String> = hosts.iter().map(Machine::address).collect();
    let names = until("both hosts", || {
        for host in &mut hosts {
            host.seen()?;
        }
        names(&control, &addresses)
    })?;

    step("starting a VM on each host: one may run anywhere, with a disk of the shared pool");
    control.share(POOL, &disk_address, VOLUME, BLOCKS * BLOCK_LEN as u64)?;
    control.run_vm(ROAMING, &roaming())?;
    let lost = until("the VM's host", || {
        hosts_of(&mut hosts, ROAMING).map(|on| on.first().copied())
    })?;
    let other = 1 - lost;
    control.run_vm(STAYING, &staying(&names[other]))?;
    until("the VM that stays", || {
        Ok(hosts_of(&mut hosts, STAYING)?
            .contains(&other)
            .then_some(()))
    })?;
    step("the guest boots and writes its disk");
    until("the first writes", || {
        Ok((read(&image)?.last >= FIRST_WRITES).then_some(()))
    })?;
    // Its host's requests that are still on their way when it is gone.
    let delayed = Stale::open(None, &disk_address, VOLUME, GENERATION)?;

    step(&format!("killing {} without warning", names[lost]));
    let lost_at = Instant::now();
    hosts[lost].kill();
    let left = read(&image)?;
    ensure!(left.wrong.is_empty(), "before: {}", left.wrong.join("; "));
    let mut ran_twice = false;
    let outage = until("the VM on the other host", || {
        ran_twice |= hosts_of(&mut hosts, ROAMING)?.len() > 1;
        Ok((read(&image)?.lives > left.lives).then(|| lost_at.elapsed()))
    })?;
    step(&format!(
        "it writes again on {}, {} ms later",
        names[other],
        outage.as_millis()
    ));
    let told = guests_verdict(&control)?;
    step(&format!(
        "its guest found {} of {BLOCKS} blocks as they must be, {} writes in all",
        told.0, told.1
    ));
    ensure!(
        !delayed.write(),
        "a delayed write of the lost host was let in"
    );

    step(&format!("{} returns", names[lost]));
    hosts[lost].start(None, Some(format!("{disk_address}/{VOLUME}@{GENERATION}")))?;
    let attempt = until("the returned host's attempt on the disk", || {
        let seen = hosts[lost].seen()?;
        ran_twice |= seen.vms.iter().any(|vm| vm == ROAMING);
        Ok((seen.stale != Attempt::Unknown).then_some(seen.stale))
    })?;
    ensure!(
        attempt == Attempt::Refused,
        "the disk's server let the returned host in with its old generation"
    );
    until("the end of what the lost host had", || {
        let seen = hosts[lost].seen()?;
        ran_twice |= seen.vms.iter().any(|vm| vm == ROAMING);
        let is_gone = !seen.records.iter().any(|vm| vm == ROAMING);
        let is_back = names_of(&control)?.contains(&names[lost]);
        Ok((is_gone && is_back).then_some(()))
    })?;
    step("the returned host was refused the disk and has nothing of the VM any more");
    let target = read(&image)?.last + BLOCKS / 4;
    until("further writes on the other host", || {
        ran_twice |= hosts_of(&mut hosts, ROAMING)? != [other];
        Ok((read(&image)?.last >= target).then_some(()))
    })?;
    for (id, host) in [(ROAMING, other), (STAYING, other)] {
        let status = control.status(id)?;
        ensure!(
            status.phase() == pb::VmPhase::Running && status.host == names[host],
            "{id} is {} on {}",
            status.phase().as_str_name(),
            status.host
        );
    }

    step("stopping the VM and reading its disk");
    control.stop_vm(ROAMING)?;
    until("the end of the VM", || {
        let is_over = hosts_of(&mut hosts, ROAMING)?.is_empty()
            && control.status(ROAMING)?.phase() == pb::VmPhase::Stopped;
        Ok(is_over.then_some(()))
    })?;
    let found = read(&image)?;
    for wrong in &found.wrong {
        step(wrong);
    }
    ensure!(found.lives == 2, "the guest ran {} times", found.lives);
    ensure!(
        found.last > left.last,
        "writes were lost: {} after {}",
        found.last,
        left.last
    );
    let status = image.with_extension("status");
    let (refused_clients, refused_writes) = until("the server's count", || {
        Ok(refused(&status).filter(|(clients, writes)| *clients > 0 && *writes > 0))
    })?;
    Ok(Report {
        outage_ms: outage.as_millis() as u64,
        blocks_verified: found.verified.min(told.0),
        blocks_wrong: BLOCKS - found.verified,
        fenced_writes: refused_clients + refused_writes,
        refused_clients,
        refused_writes,
        ran_twice,
        returned_clean: true,
    })
}

/// A VM that is started elsewhere should its host be lost.
fn roaming() -> pb::VmSpec {
    let job = Job::Journal {
        device: "vda".to_owned(),
        seed: SEED,
        bytes: BLOCKS * BLOCK_LEN as u64,
    };
    let mut spec = pb::VmSpec {
        disks: vec![pb::Disk {
            name: "root".to_owned(),
            source: Some(pb::disk::Source::Volume(format!(
                "projects/default/volumes/{VOLUME}"
            ))),
            ..pb::Disk::default()
        }],
        ..guest_of(vec![job])
    };
    spec.set_restart_policy(pb::RestartPolicy::Anywhere);
    spec
}

/// A VM that belongs to its host.
fn staying(host: &str) -> pb::VmSpec {
    let mut spec = pb::VmSpec {
        placement: Some(pb::Placement {
            host: host.to_owned(),
            ..pb::Placement::default()
        }),
        ..guest_of(vec![Job::Memory { mib: 64 }])
    };
    spec.set_restart_policy(pb::RestartPolicy::SameHost);
    spec
}

fn guest_of(jobs: Vec<Job>) -> pb::VmSpec {
    let plan = Plan {
        jobs,
        end: End::Wait,
        ..Plan::default()
    };
    pb::VmSpec {
        vcpus: 1,
        memory_bytes: VM_MEMORY_BYTES,
        kernel: GUEST_KERNEL.to_owned(),
        initramfs: GUEST_INITRD.to_owned(),
        cmdline: format!("console=ttyS0 quiet reboot=t panic=-1 mitigations=off {plan}"),
        shutdown_grace_ms: 1_000,
        ..pb::VmSpec::default()
    }
}

/// The controllers' names of all hosts, in the order of their addresses.
fn names(control: &Control, addresses: &[String]) -> Result<Option<Vec<String>>> {
    let connected = control.connected()?;
    let name = |address: &String| {
        let mut hosts = connected.iter();
        hosts.find_map(|(name, at)| at.contains(&format!("//{address}:")).then(|| name.clone()))
    };
    Ok(addresses.iter().map(name).collect())
}

fn names_of(control: &Control) -> Result<Vec<String>> {
    let connected = control.connected()?;
    Ok(connected.into_iter().map(|(name, _)| name).collect())
}

/// The hosts that say that they run a VM.
fn hosts_of(hosts: &mut [Machine], vm: &str) -> Result<Vec<usize>> {
    let mut running = Vec::new();
    for (number, host) in hosts.iter_mut().enumerate() {
        if host.seen()?.vms.iter().any(|id| id == vm) {
            running.push(number);
        }
    }
    Ok(running)
}

fn read(image: &Path) -> Result<Journal> {
    let bytes = fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
    Ok(Journal::of_bytes(SEED, &bytes))
}

/// What the guest found on the disk when it came up on the other host, and its last write so far.
fn guests_verdict(control: &Control) -> Result<(u64, u64)> {
    until("the guest's verdict", || {
        let console = control.console(ROAMING)?;
        let reports = console.lines().filter_map(Told::from_line);
        let mut verdict = None;
        for report in reports {
            if let Told::Journal {
                life: 2..,
                verified,
                last,
                error,
                ..
            } = report
            {
                if let Some(error) = error {
                    bail!("the guest reports: {error}");
                }
                verdict = Some((verified, last));
            }
        }
        Ok(verdict)
    })
}
