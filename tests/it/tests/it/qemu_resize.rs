//! A disk that grows under a running guest of QEMU, which hears of it by our daemon's
//! CONFIG_CHANGE_MSG alone.

use std::process::Command;
use std::time::Duration;

use api::device::ResizeRequest;
use api::device::disks_client::DisksClient;
use guest::plan::{End, Job, Plan};

use crate::guest_run;
use crate::process::Process;
use crate::qemu::Qemu;
use crate::qemu_frontend::expect_pattern;
use crate::site;

const SMALL_BYTES: u64 = 8 << 20;
const LARGE_BYTES: u64 = 24 << 20;
const SEED: u64 = 0x5eed_0004;

#[test]
fn guest_of_qemu_uses_what_its_disk_grew_by() {
    let dir = tempfile::tempdir().expect("a folder");
    let dir = dir.path();
    let (image, socket, control) = (dir.join("a.raw"), dir.join("a.vu"), dir.join("blk.sock"));
    let file = std::fs::File::create(&image).expect("an image can be created");
    file.set_len(SMALL_BYTES).expect("an image has a size");
    let mut command = Command::new(site::program("device-blk"));
    command
        .arg("--control-socket")
        .arg(&control)
        .arg("--disk")
        .arg(format!(
            "id=a,path={},socket={}",
            image.display(),
            socket.display()
        ));
    let mut blk = Process::spawn(dir, "device-blk", &mut command);
    blk.wait_for_socket(&control);

    let write = |bytes| Job::Disk {
        device: "vda".into(),
        seed: SEED,
        bytes,
    };
    let plan = Plan {
        root: None,
        jobs: vec![write(SMALL_BYTES / 2)],
        end: End::Obey,
    };
    let mut qemu = Qemu::new(&plan).disk(&socket).start_listening(dir);
    guest_run::wait_for_line(&mut qemu, "\"job\":\"done\"", 1);
    grow(&control);
    let plan = Plan {
        root: None,
        jobs: vec![write(LARGE_BYTES / 2)],
        end: End::PowerOff,
    };
    qemu.tell(&plan.to_string());
    guest_run::finish(&mut qemu);
    blk.terminate(Duration::from_secs(10));
    expect_pattern(&image, SEED, LARGE_BYTES / 2);
}

fn grow(control: &std::path::Path) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let request = ResizeRequest {
        id: "a".into(),
        capacity_bytes: LARGE_BYTES,
    };
    let resized = runtime.block_on(async {
        let channel = api::connect::unix(control, Duration::from_secs(10))
            .await
            .expect("the daemon answers");
        DisksClient::new(channel).resize(request).await
    });
    resized.expect("the disk grows");
}
