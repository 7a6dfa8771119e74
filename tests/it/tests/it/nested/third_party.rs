//! Other people's vhost-user daemons, which need nothing but the generic transport.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use api::vmm::vmm_client::VmmClient;
use api::vmm::{DeviceHealth, GetDevicesRequest};
use guest::pattern::{BLOCK_LEN, fill, first_mismatch};
use guest::plan::{End, Job, Plan};
use guest::report::{Report, UP_LINE};

use super::outage::allocated_bytes;
use super::{Vmm, disk_device, disk_plan, disk_socket, image};
use crate::guest_run;
use crate::process::Process;
use crate::qemu_frontend::expect_pattern;

const SEED: u64 = 0xfeed;

/// Serves one image at `DIR/disk.vu`.
pub(super) fn qemu_storage_daemon(dir: &Path, image: &Path) -> Process {
    let socket = disk_socket(dir);
    // One that was killed leaves its socket behind.
    let _ = std::fs::remove_file(&socket);
    let mut daemon = Process::spawn(
        dir,
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
    daemon
}

#[test]
fn qemu_storage_daemon_serves_a_disk() {
    const LEN_BYTES: u64 = 4 << 20;
    let dir = tempfile::tempdir().expect("a folder");
    let image = image(dir.path(), "disk.raw", 16 << 20);
    let mut daemon = qemu_storage_daemon(dir.path(), &image);
    let vmm = Vmm {
        devices: vec![disk_device(dir.path())],
        ..Vmm::default()
    };
    let plan = disk_plan(SEED, LEN_BYTES, End::PowerOff);
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

/// It tracks nothing in flight, so only what one request after the other needs can be had: the guest has
/// one processor, which waits for each.
#[test]
fn qemu_storage_daemon_that_is_killed_comes_back_and_health_says_what_is_not_guaranteed() {
    const LEN_BYTES: u64 = 8 << 20;
    let dir = tempfile::tempdir().expect("a folder");
    let image = image(dir.path(), "disk.raw", 16 << 20);
    let mut daemon = qemu_storage_daemon(dir.path(), &image);
    let vmm = Vmm {
        devices: vec![disk_device(dir.path())],
        ..Vmm::default()
    };
    let plan = disk_plan(SEED, LEN_BYTES, End::PowerOff);
    let mut process = vmm.spawn(dir.path(), &plan);
    guest_run::wait_for_line(&mut process, UP_LINE, 1);
    daemon.wait_until("the guest writes", || {
        allocated_bytes(&image) >= LEN_BYTES / 4
    });
    daemon.kill();
    daemon = qemu_storage_daemon(dir.path(), &image);
    let health = health(&dir.path().join("vmm.sock"));
    assert!(!health.inflight_tracking, "{health:?}");
    let said = health.not_guaranteed.join("; ");
    assert!(said.contains("out of order"), "{said:?}");
    guest_run::finish(&mut process);
    daemon.terminate(Duration::from_secs(20));
    expect_pattern(&image, SEED, LEN_BYTES);
}

/// Of the one device, connected for the second time.
fn health(vmm: &Path) -> DeviceHealth {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let channel = api::connect::unix(vmm, Duration::from_secs(20)).await;
        let mut vmm = VmmClient::new(channel.expect("vmm-core's control socket answers"));
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let request = GetDevicesRequest { max_outages: 8 };
            let devices = vmm.get_devices(request).await.expect("it answers");
            let health = devices.into_inner().devices.remove(0);
            if health.incarnations == 2 {
                return health;
            }
            assert!(Instant::now() < deadline, "{health:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
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
