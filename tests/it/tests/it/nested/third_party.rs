//! Other people's vhost-user daemons, which need nothing but the generic transport.

use std::process::Command;
use std::time::Duration;

use guest::pattern::{BLOCK_LEN, fill, first_mismatch};
use guest::plan::{End, Job, Plan};
use guest::report::Report;

use super::{Vmm, disk_device, disk_socket, image};
use crate::guest_run;
use crate::process::Process;
use crate::qemu_frontend::expect_pattern;

const SEED: u64 = 0xfeed;

#[test]
fn qemu_storage_daemon_serves_a_disk() {
    const LEN_BYTES: u64 = 4 << 20;
    let dir = tempfile::tempdir().expect("a folder");
    let image = image(dir.path(), "disk.raw", 16 << 20);
    let socket = disk_socket(dir.path());
    let mut daemon = Process::spawn(
        dir.path(),
        "qemu-storage-daemon",
        Command::new("qemu-storage-daemon")
            .args([
                "--blockdev",
                &format!("driver=file,node-name=f,filename={}", image.display()),
            ])
            .args(["--blockdev", "driver=raw,node-name=r,file=f"])
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=e,node-name=r,writable=on,addr.type=unix,addr.path={}",
                socket.display()
            )),
    );
    daemon.wait_until("its socket is there", || socket.exists());
    let vmm = Vmm {
        devices: vec![disk_device(dir.path())],
        ..Vmm::default()
    };
    let plan = Plan {
        jobs: vec![Job::Disk {
            device: "vda".into(),
            seed: SEED,
            bytes: LEN_BYTES,
        }],
        end: End::PowerOff,
        ..Plan::default()
    };
    let reports = guest_run::finish(&mut vmm.spawn(dir.path(), &plan));
    assert!(reports.iter().any(|report| matches!(
        report,
        Report::Disk {
            bytes: LEN_BYTES,
            ..
        }
    )));
    daemon.terminate(Duration::from_secs(20));
    expect_pattern(&image, SEED, LEN_BYTES);
}

#[test]
fn virtiofsd_shares_a_folder() {
    let dir = tempfile::tempdir().expect("a folder");
    let (shared, socket) = (dir.path().join("shared"), dir.path().join("fs.vu"));
    std::fs::create_dir(&shared).expect("a folder can be created");
    let mut content = vec![0; 16 * BLOCK_LEN];
    fill(SEED, 0, &mut content);
    std::fs::write(shared.join("from-host"), &content).expect("a file can be written");
    let mut daemon = Process::spawn(
        dir.path(),
        "virtiofsd",
        Command::new("virtiofsd")
            .arg(format!("--socket-path={}", socket.display()))
            .args([
                "-o",
                &format!("source={}", shared.display()),
                "-o",
                "sandbox=chroot",
            ]),
    );
    daemon.wait_until("its socket is there", || socket.exists());
    // virtiofsd has no configuration space of its own: tag (36 bytes) and number of request queues.
    let mut config = b"share".to_vec();
    config.resize(36, 0);
    config.extend(1u32.to_le_bytes());
    let config: String = config.iter().map(|byte| format!("{byte:02x}")).collect();
    let vmm = Vmm {
        devices: vec![format!(
            "tag=share,type=fs,socket={},queues=2,config=hex:{config}",
            socket.display()
        )],
        ..Vmm::default()
    };
    let plan = Plan {
        jobs: vec![Job::Folder {
            tag: "share".into(),
            seed: SEED,
        }],
        end: End::PowerOff,
        ..Plan::default()
    };
    guest_run::finish(&mut vmm.spawn(dir.path(), &plan));
    let answer = std::fs::read(shared.join("from-guest")).expect("the guest wrote a file");
    assert!(!answer.is_empty());
    assert_eq!(first_mismatch(!SEED, 0, &answer), None);
}
