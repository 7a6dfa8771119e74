//! A single image, of every cluster size and both versions.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use qcow2::{Access, CreateOptions, Format, Header, Image, Place, Preallocation, create};

use crate::qemu;
use crate::workload::{Modelled, direct_layer, layer, open};

const SIZE: usize = 12 << 20;

fn create_at(path: &Path, options: &CreateOptions) {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap();
    create(&file, options).unwrap();
}

/// Works on an image that reads zeroes, in the given sessions; QEMU judges after each.
fn work_and_compare(path: &Path, dir: &Path, sessions: u64) {
    let mut model = vec![0; SIZE];
    for session in 0..sessions {
        let mut modelled = Modelled::new(open(path), model, session + 7);
        modelled.work(150);
        modelled.check_all();
        modelled.image.settle().unwrap();
        model = modelled.model;
        qemu::assert_clean(path);
        assert!(qemu::read_all(path, dir) == model, "session {session}");
    }
}

#[test]
fn what_we_write_into_qemus_images_qemu_reads_with_every_cluster_size() {
    if qemu::is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for bits in [9, 10, 12, 13, 16, 18, 21] {
        let path = dir.path().join(format!("{bits}.qcow2"));
        let options = format!("cluster_size={}", 1 << bits);
        img_create(&path, &options, SIZE);
        work_and_compare(&path, dir.path(), 2);
    }
}

fn img_create(path: &Path, options: &str, size: usize) {
    let path = path.to_str().unwrap();
    let size = size.to_string();
    qemu::img(&["create", "-f", "qcow2", "-o", options, path, &size]);
}

#[test]
fn version_two_and_narrow_and_wide_reference_counts_are_kept_up() {
    if qemu::is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for options in [
        "compat=0.10",
        "refcount_bits=1",
        "refcount_bits=4,cluster_size=4096",
        "refcount_bits=64,cluster_size=512",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "preallocation=falloc,cluster_size=4096",
    ] {
        let path = dir.path().join(format!("{options}.qcow2"));
        img_create(&path, options, SIZE);
        work_and_compare(&path, dir.path(), 1);
    }
}

#[test]
fn our_images_are_clean_and_written_by_both() {
    if qemu::is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for preallocation in [
        Preallocation::Off,
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ] {
        for cluster_bytes in [512, 4096, 0, 2 << 20] {
            let path = dir
                .path()
                .join(format!("{preallocation:?}-{cluster_bytes}"));
            let options = CreateOptions {
                capacity_bytes: SIZE as u64,
                cluster_bytes,
                backing: None,
                preallocation,
            };
            create_at(&path, &options);
            qemu::assert_clean(&path);
            qemu::io(
                &path,
                &[
                    "write -P 0x11 1M 100k",
                    "discard 1M 64k",
                    "write -P 0x22 3M 7k",
                ],
            );
            let mut model = qemu::read_all(&path, dir.path());
            let mut modelled = Modelled::new(open(&path), model, 99);
            modelled.check_all();
            modelled.work(60);
            modelled.image.settle().unwrap();
            model = modelled.model;
            qemu::assert_clean(&path);
            assert!(qemu::read_all(&path, dir.path()) == model);
        }
    }
}

#[test]
fn direct_io_changes_nothing() {
    if qemu::is_missing() {
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for cluster_bytes in [512, 4096, 65536] {
        let path = dir.path().join(format!("{cluster_bytes}.qcow2"));
        let options = CreateOptions {
            capacity_bytes: SIZE as u64,
            cluster_bytes,
            ..CreateOptions::default()
        };
        create_at(&path, &options);
        let Some(top) = direct_layer(&path, Format::Qcow2, true) else {
            eprintln!("skipped: no direct I/O here");
            return;
        };
        let image = Image::open(vec![top], false).unwrap();
        let mut modelled = Modelled::new(image, vec![0; SIZE], 5);
        modelled.work(80);
        modelled.check_all();
        modelled.image.settle().unwrap();
        qemu::assert_clean(&path);
        assert!(qemu::read_all(&path, dir.path()) == modelled.model);
    }
}

#[test]
fn refcount_table_grows_when_the_image_outgrows_it() {
    if qemu::is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small-clusters.qcow2");
    // One cluster of 512 bytes as refcount table counts 8 MiB.
    img_create(&path, "cluster_size=512", 40 << 20);
    let image = open(&path);
    let data = vec![0x5a; 1 << 20];
    for part in 0..40 {
        image.write(part << 20, &&data[..]).unwrap();
    }
    image.settle().unwrap();
    qemu::assert_clean(&path);
    assert!(
        qemu::read_all(&path, dir.path())
            .iter()
            .all(|&byte| byte == 0x5a)
    );
}

#[test]
fn disk_grows_while_it_is_used() {
    if qemu::is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (cluster_bytes, from, to) in [
        (512, (1 << 20) + 512, 9 << 20),
        (65536, 1 << 20, (3 << 30) + 512),
        (65536, 65536 + 512, 65536 + 4096),
    ] {
        let path = dir.path().join(format!("{from}-{to}.qcow2"));
        let options = CreateOptions {
            capacity_bytes: from,
            cluster_bytes,
            ..CreateOptions::default()
        };
        create_at(&path, &options);
        let image = open(&path);
        let data = vec![7; 1024];
        image.write(from - 1024, &&data[..]).unwrap();
        assert!(image.resize(from - 512).is_err());
        image.resize(to).unwrap();
        image.resize(to).unwrap();
        image.write(to - 1024, &&data[..]).unwrap();
        let between = crate::workload::read(&image, from, 1024);
        assert!(between.iter().all(|&byte| byte == 0));
        image.settle().unwrap();
        drop(image);
        qemu::assert_clean(&path);
        let header = Header::read(&File::open(&path).unwrap()).unwrap();
        assert_eq!(header.capacity_bytes(), to);
        qemu::io(
            &path,
            &[
                &format!("read -P 7 {} 1k", from - 1024),
                &format!("read -P 0 {from} {}", (to - 1024 - from).min(1 << 20)),
                &format!("read -P 7 {} 1k", to - 1024),
            ],
        );
    }
}

#[test]
fn threads_share_an_image() {
    if qemu::is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shared.qcow2");
    img_create(&path, "cluster_size=4096", 32 << 20);
    let image = Arc::new(open(&path));
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let image = &image;
            scope.spawn(move || {
                // Interleaved sectors, so that clusters are shared by all threads.
                for round in 0..200_u64 {
                    let sector = (round * 37 % 512) * 8 + thread;
                    let data = [thread as u8 + 1; 512];
                    image.write(sector * 512, &&data[..]).unwrap();
                    if round % 50 == 49 {
                        let from = (16 << 20) + thread * (1 << 20);
                        image.write(from, &&vec![9; 1 << 20][..]).unwrap();
                        image.discard(from, 1 << 20).unwrap();
                    }
                }
            });
        }
    });
    image.settle().unwrap();
    for round in 0..200_u64 {
        for thread in 0..8_u64 {
            let sector = (round * 37 % 512) * 8 + thread;
            let found = crate::workload::read(&image, sector * 512, 512);
            assert!(found.iter().all(|&byte| byte == thread as u8 + 1));
        }
    }
    qemu::assert_clean(&path);
    let _reader = layer(&path, Format::Qcow2, false);
}

#[test]
fn stream_of_writes_finds_its_clusters_mapped() {
    if qemu::is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for cluster_bytes in [4096, 65536, 2 << 20] {
        let path = dir.path().join(format!("{cluster_bytes}.qcow2"));
        let options = CreateOptions {
            capacity_bytes: 16 << 20,
            cluster_bytes,
            ..CreateOptions::default()
        };
        create_at(&path, &options);
        let image = open(&path);
        image.map_streams_ahead();
        let data = [5; 32 << 10];
        let mut in_place = 0;
        for part in 0..256_u64 {
            let offset = part * data.len() as u64;
            if let Place::File { ticket, .. } = image.locate(Access::Write, offset, 512) {
                in_place += 1;
                image.release(ticket.unwrap());
            }
            image.write(offset, &&data[..]).unwrap();
        }
        assert!(in_place > 200, "{cluster_bytes}: {in_place} of 256");
        // What was mapped and not written reads zeroes.
        let rest = crate::workload::read(&image, 8 << 20, 8 << 20);
        assert!(rest.iter().all(|&byte| byte == 0));
        image.settle().unwrap();
        qemu::assert_clean(&path);
        let all = qemu::read_all(&path, dir.path());
        assert!(all[..8 << 20].iter().all(|&byte| byte == 5));
        assert!(all[8 << 20..].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn what_was_written_is_found_without_a_thread_that_works_it_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let options = CreateOptions {
        capacity_bytes: 1 << 30,
        ..CreateOptions::default()
    };
    create_at(&path, &options);
    let image = open(&path);
    for offset in [0, 512 << 20] {
        image.write(offset, &&[5; 4096][..]).unwrap();
        let Place::File { ticket, .. } = image.locate(Access::Read, offset, 4096) else {
            panic!("{offset}: somebody has to look");
        };
        image.release(ticket.unwrap());
    }
}
