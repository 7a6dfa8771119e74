//! Disks in qcow2 files and chains of them, driven over virtio.

use std::path::PathBuf;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::daemon::{Daemon, Place, numbered_sector};
use crate::driver::Client;
use crate::io::pattern;
use crate::locks::has_tool;

const MIB: u64 = 1 << 20;

fn img(args: &[&str]) -> String {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let failed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {args:?}: {said}{failed}");
    said
}

/// An overlay over an overlay over a raw image of numbered sectors.
fn chain(place: &Place) -> PathBuf {
    place.image("base.img", 4 * MIB / 512);
    for (name, base, format) in [("mid", "base.img", "raw"), ("a", "mid.img", "qcow2")] {
        let path = place.path(&format!("{name}.img"));
        let path = path.to_str().unwrap();
        img(&[
            "create", "-q", "-f", "qcow2", "-b", base, "-F", format, path, "4M",
        ]);
    }
    place.path("a.img")
}

#[test]
fn chain_is_followed_and_only_its_top_is_written() {
    if !has_tool("qemu-img") {
        return;
    }
    let place = Place::new();
    let top = chain(&place);
    let below = ["base.img", "mid.img"].map(|name| std::fs::read(place.path(name)).unwrap());
    let spec = format!("{},format=qcow2", place.disk("a"));
    let mut daemon = Daemon::start(&place, &[&spec]);
    let mut client = Client::connect(&place.socket("a"));
    assert_eq!(client.config().capacity.to_native(), 4 * MIB / 512);
    assert_eq!(client.read(5 * 512, 512), numbered_sector(5));
    let data = pattern(9, 200 << 10);
    assert_eq!(client.write(MIB - 512, &data), 0);
    assert_eq!(client.read(MIB - 512, data.len()), data);
    assert_eq!(client.read(MIB - 1024, 512), numbered_sector(MIB / 512 - 2));
    assert_eq!(client.write_zeroes(2 * MIB, 100 << 10, true), 0);
    assert_eq!(client.read(2 * MIB, 512), [0; 512]);
    assert_eq!(client.discard(3 * MIB, 128 << 10), 0);
    assert_eq!(client.flush(), 0);
    drop(client);
    assert!(daemon.end(Signal::SIGTERM).success(), "{}", daemon.log());
    for (name, content) in ["base.img", "mid.img"].iter().zip(&below) {
        assert!(
            std::fs::read(place.path(name)).unwrap() == *content,
            "{name}"
        );
    }
    let top = top.to_str().unwrap();
    img(&["check", "-q", "-f", "qcow2", top]);
    let raw = place.path("converted.raw");
    img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        top,
        raw.to_str().unwrap(),
    ]);
    let content = std::fs::read(raw).unwrap();
    assert!(content[MIB as usize - 512..][..data.len()] == data);
    assert!(
        content[2 * MIB as usize..][..100 << 10]
            .iter()
            .all(|&byte| byte == 0)
    );
    assert!(content[..512] == numbered_sector(0));
}

#[test]
fn compressed_image_is_read_and_written() {
    if !has_tool("qemu-img") {
        return;
    }
    let place = Place::new();
    let raw = place.image("raw.img", 2 * MIB / 512);
    let top = place.path("a.img");
    let (raw, top) = (raw.to_str().unwrap(), top.to_str().unwrap());
    img(&["convert", "-c", "-f", "raw", "-O", "qcow2", raw, top]);
    let spec = format!("{},format=qcow2,page-cache", place.disk("a"));
    let mut daemon = Daemon::start(&place, &[&spec]);
    let mut client = Client::connect(&place.socket("a"));
    assert_eq!(client.read(MIB, 512), numbered_sector(MIB / 512));
    assert_eq!(client.write(MIB, &[7; 512]), 0);
    assert_eq!(client.read(MIB, 512), [7; 512]);
    assert_eq!(client.read(MIB + 512, 512), numbered_sector(MIB / 512 + 1));
    drop(client);
    assert!(daemon.end(Signal::SIGTERM).success(), "{}", daemon.log());
    img(&["check", "-q", "-f", "qcow2", top]);
}

#[test]
fn what_cannot_be_served_is_refused_with_a_remedy() {
    if !has_tool("qemu-img") {
        return;
    }
    let place = Place::new();
    let refused = |spec: &str| {
        let mut daemon = Daemon::spawn(&place, &[spec], &[], |_| ());
        assert_eq!(daemon.ended().code(), Some(1), "{}", daemon.log());
        daemon.log()
    };
    let image = place.path("a.img");
    let image = image.to_str().unwrap();
    let spec = format!("{},format=qcow2", place.disk("a"));
    for (options, remedy) in [
        ("extended_l2=on,cluster_size=64k", "qemu-img convert"),
        ("compression_type=zstd", "compression_type=zlib"),
        ("data_file=data.raw", "qemu-img convert"),
    ] {
        let _ = std::fs::remove_file(image);
        let data = place.path("data.raw");
        let options = options.replace("data.raw", data.to_str().unwrap());
        img(&["create", "-q", "-f", "qcow2", "-o", &options, image, "1M"]);
        let log = refused(&spec);
        assert!(
            log.contains(image) && log.contains(remedy),
            "{options}: {log}"
        );
    }
    std::fs::write(image, [0; 4096]).unwrap();
    assert!(refused(&spec).contains("not in the qcow2 format"));
}
