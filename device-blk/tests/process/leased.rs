//! What is done to a disk that may do I/O until a moment.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;

use api::device::attach_request::{Device as DeviceConfig, Listener};
use api::device::leases_client::LeasesClient;
use api::device::{AllowIoRequest, AttachRequest, BlkConfig, FdRef, JobState, StartCheckRequest};

use crate::control::Manager;
use crate::daemon::{DEADLINE, Daemon, Place};
use crate::jobs::{await_job, job};

/// Offset of the first refcount block: the header names the table, and the table the block.
fn first_block(file: &File) -> u64 {
    let at = |offset: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).unwrap();
        u64::from_be_bytes(bytes)
    };
    at(at(48))
}

fn leaks(file: &File) -> u64 {
    let report = qcow2::check(file, qcow2::Repair::Nothing).unwrap();
    report.leaked_clusters
}

#[test]
fn repair_waits_for_leave() {
    let place = Place::new();
    let path = place.path("a.qcow2");
    let image = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    let options = qcow2::CreateOptions {
        capacity_bytes: 16 << 20,
        cluster_bytes: 4096,
        ..qcow2::CreateOptions::default()
    };
    qcow2::create(&image, &options).unwrap();
    let leaked = first_block(&image) + 2 * 1000;
    image.write_all_at(&1_u16.to_be_bytes(), leaked).unwrap();
    assert_eq!(leaks(&image), 1);

    let fds = place.fds().display().to_string();
    let _daemon = Daemon::start_with(&place, &[], &["--fd-socket", &fds]);
    let mut manager = Manager::of(place);
    let listener = UnixListener::bind(manager.place.socket("a")).unwrap();
    manager.send("socket", listener.as_fd());
    manager.send_image("image", "a.qcow2");
    let token = |token: &str| FdRef {
        token: token.to_owned(),
    };
    let attached = manager.attach(AttachRequest {
        id: "a".to_owned(),
        listener: Some(Listener::SocketFd(token("socket"))),
        device: Some(DeviceConfig::Blk(BlkConfig {
            image_fd: Some(token("image")),
            format: "qcow2".to_owned(),
            leased: true,
            ..BlkConfig::default()
        })),
    });
    assert!(attached.unwrap().io_stopped);
    let check = StartCheckRequest {
        id: "a".to_owned(),
        job_id: "check".to_owned(),
        repair_leaks: true,
    };
    manager
        .disks(async |disks| disks.start_check(check).await)
        .unwrap();
    // Without its look at the lease it would be over long before.
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(
        job(&mut manager, "check").unwrap().state(),
        JobState::Running
    );
    assert_eq!(leaks(&image), 1);

    let control = manager.place.control();
    manager.runtime.block_on(async {
        let channel = api::connect::unix(&control, DEADLINE).await;
        let mut leases = LeasesClient::new(channel.unwrap());
        let request = AllowIoRequest {
            ids: Vec::new(),
            until_boottime_ns: api::boottime::now_ns() + DEADLINE.as_nanos() as u64,
        };
        leases.allow_io(request).await.unwrap();
    });
    let checked = await_job(&mut manager, "check", JobState::Done);
    assert_eq!(checked.check.unwrap().repaired_clusters, 1);
    assert_eq!(leaks(&image), 0);
}
