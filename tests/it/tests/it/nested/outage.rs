//! A device process dies while its guest does verified I/O.

use std::time::Duration;

use guest::plan::End;
use guest::report::{Report, UP_LINE};

use super::{Vmm, device_blk, disk_device, disk_plan, image};
use crate::guest_run;
use crate::qemu_frontend::expect_pattern;

#[test]
fn a_killed_device_blk_is_replaced_and_the_guest_sees_no_error() {
    const SEED: u64 = 0xdead;
    const LEN_BYTES: u64 = 16 << 20;
    const KILLS: u32 = 3;
    let dir = tempfile::tempdir().expect("a folder");
    let image = image(dir.path(), "disk.raw", 32 << 20);
    let mut blk = device_blk(dir.path(), &image);
    let vmm = Vmm {
        cpus: 2,
        devices: vec![disk_device(dir.path())],
        ..Vmm::default()
    };
    let plan = disk_plan(SEED, LEN_BYTES, End::PowerOff);
    let mut process = vmm.spawn(dir.path(), &plan);
    guest_run::wait_for_line(&mut process, UP_LINE, 1);
    for kill in 1..=KILLS {
        // In the middle of the work: some more of the image was written than at the last kill.
        let written = |share: u64| allocated_bytes(&image) >= LEN_BYTES / 8 * share;
        blk.wait_until("the guest writes", || written(u64::from(kill)));
        blk.kill();
        blk = device_blk(dir.path(), &image);
    }
    let reports = guest_run::finish(&mut process);
    assert!(reports.iter().any(|report| matches!(
        report,
        Report::Disk {
            bytes: LEN_BYTES,
            ..
        }
    )));
    blk.terminate(Duration::from_secs(20));
    expect_pattern(&image, SEED, LEN_BYTES);
}

pub(super) fn allocated_bytes(image: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(image)
        .expect("the image is there")
        .blocks()
        * 512
}
