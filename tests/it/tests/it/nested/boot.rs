//! Kernels, boot protocols, processors, memory, reset.

use guest::plan::{End, Job, Plan};
use guest::report::{Report, UP_LINE};

use super::{Vmm, device_blk, disk_device, disk_plan, image};
use crate::guest_run;
use crate::qemu_frontend::expect_pattern;
use crate::site;
use std::time::Duration;

fn boots_and_uses(vmm: &Vmm) {
    let dir = tempfile::tempdir().expect("a folder");
    let plan = Plan {
        jobs: vec![Job::Smp { cpus: vmm.cpus }],
        end: End::PowerOff,
        ..Plan::default()
    };
    let reports = guest_run::finish(&mut vmm.spawn(dir.path(), &plan));
    let used = reports.iter().find_map(|report| match report {
        Report::Smp { used, .. } => Some(*used),
        _ => None,
    });
    assert_eq!(used, Some(vmm.cpus));
}

#[test]
fn bzimage_boots() {
    boots_and_uses(&Vmm {
        kernel: site::path("GUEST_BZIMAGE"),
        ..Vmm::default()
    });
}

#[test]
fn elf_boots_by_pvh_and_uses_four_cpus() {
    boots_and_uses(&Vmm {
        cpus: 4,
        more: vec!["--boot-protocol=pvh".into()],
        ..Vmm::default()
    });
}

#[test]
fn elf_boots_by_the_64_bit_protocol() {
    boots_and_uses(&Vmm {
        more: vec!["--boot-protocol=linux64".into()],
        ..Vmm::default()
    });
}

#[test]
fn memory_above_the_pci_hole_is_usable() {
    let dir = tempfile::tempdir().expect("a folder");
    let plan = Plan {
        end: End::PowerOff,
        ..Plan::default()
    };
    let vmm = Vmm {
        memory: "4608M",
        more: vec!["--boot-protocol=pvh".into()],
        ..Vmm::default()
    };
    let mut process = vmm.spawn(
        dir.path(),
        &Plan {
            jobs: vec![Job::Memory { mib: 4300 }],
            ..plan
        },
    );
    guest_run::finish(&mut process);
}

#[test]
fn a_guest_that_reboots_boots_again_with_its_disk() {
    const SEED: u64 = 77;
    const LEN_BYTES: u64 = 1 << 20;
    let dir = tempfile::tempdir().expect("a folder");
    let image = image(dir.path(), "disk.raw", 16 << 20);
    let mut blk = device_blk(dir.path(), &image);
    let vmm = Vmm {
        devices: vec![disk_device(dir.path())],
        ..Vmm::default()
    };
    let plan = disk_plan(SEED, LEN_BYTES, End::Reboot);
    let mut process = vmm.spawn(dir.path(), &plan);
    guest_run::wait_for_line(&mut process, UP_LINE, 2);
    // The second life's disk job works as well as the first one's.
    guest_run::wait_for_line(&mut process, "\"job\":\"done\",\"failed\":0", 2);
    process.terminate(Duration::from_secs(20));
    blk.terminate(Duration::from_secs(20));
    expect_pattern(&image, SEED, LEN_BYTES);
}
