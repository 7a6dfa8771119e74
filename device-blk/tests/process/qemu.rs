//! QEMU's own code as the frontend: its `virtio-blk-vhost-user` block driver (libblkio).

use std::path::Path;
use std::process::{Command, Output};

use crate::daemon::{Daemon, Place, read_image};
use crate::locks::has_tool;

/// Runs qemu-io commands over the daemon's socket.
fn qemu_io(socket: &Path, commands: &[&str]) -> Output {
    let options = format!(
        "driver=virtio-blk-vhost-user,path={},cache.direct=on",
        socket.display()
    );
    let mut qemu_io = Command::new("qemu-io");
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    qemu_io.args(["--image-opts", &options]).output().unwrap()
}

#[test]
fn qemu_writes_reads_and_verifies() {
    if !has_tool("qemu-io") {
        return;
    }
    let place = Place::new();
    let image = place.image("a.img", 64 << 10);
    let _daemon = Daemon::start(&place, &[&place.disk("a")]);
    let done = qemu_io(
        &place.socket("a"),
        &[
            "write -P 0xa5 0 1M",
            "write -P 0x5a 1049088 512",
            "read -P 0xa5 0 1M",
            "read -P 0x5a 1049088 512",
            "write -z 2M 64k",
            "read -P 0 2M 64k",
            "discard 4M 1M",
            "flush",
        ],
    );
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr)
    );
    if said.contains("Unknown driver") {
        eprintln!("skipped: this qemu-io has no virtio-blk-vhost-user driver");
        return;
    }
    assert!(done.status.success(), "{said}");
    assert!(!said.contains("failed"), "{said}");
    assert!(
        read_image(&image, 0, 1 << 20)
            .iter()
            .all(|&byte| byte == 0xa5)
    );
    assert!(
        read_image(&image, 1_049_088, 512)
            .iter()
            .all(|&byte| byte == 0x5a)
    );
    assert!(
        read_image(&image, 2 << 20, 64 << 10)
            .iter()
            .all(|&byte| byte == 0)
    );
}
