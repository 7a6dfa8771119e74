//! Our check beside QEMU's, and commits.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;

use qcow2::{Format, Image, Repair, TopExtent, check};

use crate::qemu;
use crate::workload::{layer, open, read};

fn create(path: &Path, options: &str, size: &str) {
    let path = path.to_str().unwrap();
    qemu::img(&["create", "-f", "qcow2", "-o", options, path, size]);
}

fn file(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// Offset of the first refcount block.
fn first_block(file: &File) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 48).unwrap();
    let table = u64::from_be_bytes(bytes);
    file.read_exact_at(&mut bytes, table).unwrap();
    u64::from_be_bytes(bytes)
}

#[test]
fn leaks_are_found_repaired_and_then_qemu_finds_none() {
    if qemu::is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for options in ["cluster_size=65536", "cluster_size=512", "refcount_bits=1"] {
        let path = dir.path().join(format!("{options}.qcow2"));
        create(&path, options, "8M");
        let image = open(&path);
        image.write(0, &&[1; 4096][..]).unwrap();
        image.flush().unwrap();
        // As if killed: what is reserved is not given back.
        std::mem::forget(image);
        let found = check(&file(&path), Repair::Nothing).unwrap();
        assert!(
            found.leaked_clusters > 0 && found.corruptions == 0,
            "{found:?}"
        );
        let repaired = check(&file(&path), Repair::Leaks).unwrap();
        assert_eq!(repaired.repaired_clusters, found.leaked_clusters);
        qemu::assert_clean(&path);
        let clean = check(&file(&path), Repair::Nothing).unwrap();
        assert_eq!((clean.leaked_clusters, clean.corruptions), (0, 0));
        assert!(read(&open(&path), 0, 4096).iter().all(|&byte| byte == 1));
    }
}

#[test]
fn image_in_use_is_checked_and_goes_on() {
    if qemu::is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("used.qcow2");
    create(&path, "cluster_size=4096", "16M");
    let image = open(&path);
    image.write(0, &&vec![1; 1 << 20][..]).unwrap();
    image.discard(0, 512 << 10).unwrap();
    // A leak of somebody else's: a count that nothing stands behind.
    let leaked = file(&path);
    let block = first_block(&leaked);
    leaked
        .write_all_at(&1_u16.to_be_bytes(), block + 2 * 2000)
        .unwrap();
    let image_again = open(&path);
    drop(image);
    let report = image_again.check(Repair::Leaks, &|| true).unwrap();
    assert_eq!(report.corruptions, 0, "{report:?}");
    assert!(report.repaired_clusters >= 1, "{report:?}");
    image_again.write(4 << 20, &&vec![2; 1 << 20][..]).unwrap();
    image_again.settle().unwrap();
    qemu::assert_clean(&path);
}

#[test]
fn image_that_may_not_be_written_any_more_keeps_its_leaks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("late.qcow2");
    drop(File::create_new(&path).unwrap());
    let options = qcow2::CreateOptions {
        capacity_bytes: 16 << 20,
        cluster_bytes: 4096,
        ..qcow2::CreateOptions::default()
    };
    qcow2::create(&file(&path), &options).unwrap();
    let leaked = file(&path);
    let block = first_block(&leaked);
    leaked
        .write_all_at(&1_u16.to_be_bytes(), block + 2 * 1000)
        .unwrap();
    let leaks = || {
        check(&file(&path), Repair::Nothing)
            .unwrap()
            .leaked_clusters
    };
    assert_eq!(leaks(), 1);
    let image = open(&path);
    // Over from the start, and by the time that something is to be repaired.
    for looks in [0_u32, 1] {
        let left = std::cell::Cell::new(looks);
        let may_write = || left.replace(left.get().saturating_sub(1)) > 0;
        let late = image.check(Repair::Leaks, &may_write).unwrap_err();
        assert!(matches!(late, qcow2::Error::Invalid(_)), "{late}");
        assert_eq!(leaks(), 1);
    }
    let report = image.check(Repair::Leaks, &|| true).unwrap();
    assert_eq!((report.repaired_clusters, leaks()), (1, 0));
}

#[test]
fn image_is_checked_while_it_is_written_and_discarded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("busy.qcow2");
    let empty = File::create_new(&path).unwrap();
    drop(empty);
    let options = qcow2::CreateOptions {
        capacity_bytes: 16 << 20,
        cluster_bytes: 4096,
        ..qcow2::CreateOptions::default()
    };
    qcow2::create(&file(&path), &options).unwrap();
    let image = std::sync::Arc::new(open(&path));
    let (done, is_done) = std::sync::mpsc::channel();
    for first in [0, 8 << 20] {
        let (image, done) = (std::sync::Arc::clone(&image), done.clone());
        std::thread::spawn(move || {
            for round in 0..100_u8 {
                image.write(first, &&vec![round; 64 << 10][..]).unwrap();
                image.discard(first, 64 << 10).unwrap();
            }
            done.send(()).unwrap();
        });
    }
    let checked = std::sync::Arc::clone(&image);
    std::thread::spawn(move || {
        for _ in 0..50 {
            match checked.check(Repair::Leaks, &|| true) {
                Ok(report) => assert_eq!(report.corruptions, 0, "{report:?}"),
                Err(error) => assert!(matches!(error, qcow2::Error::Invalid(_)), "{error}"),
            }
        }
        done.send(()).unwrap();
    });
    for _ in 0..3 {
        is_done
            .recv_timeout(std::time::Duration::from_secs(60))
            .expect("nobody waits for another for ever");
    }
    image.settle().unwrap();
    let report = check(&file(&path), Repair::Nothing).unwrap();
    assert_eq!((report.corruptions, report.leaked_clusters), (0, 0));
}

#[test]
fn corruptions_are_told_and_not_repaired() {
    if qemu::is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("broken.qcow2");
    create(&path, "cluster_size=65536", "8M");
    qemu::io(&path, &["write -P 1 0 1M"]);
    let broken = file(&path);
    let block = first_block(&broken);
    // The last data cluster is counted no more.
    let last = broken.metadata().unwrap().len().div_ceil(65536) - 1;
    broken
        .write_all_at(&0_u16.to_be_bytes(), block + 2 * last)
        .unwrap();
    let report = check(&broken, Repair::Leaks).unwrap();
    assert!(report.corruptions >= 1, "{report:?}");
    assert_eq!(report.repaired_clusters, 0);
    assert!(!report.findings.is_empty());
}

#[test]
fn overlay_is_committed_into_its_base() {
    if qemu::is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (dir.path().join("base.qcow2"), dir.path().join("top.qcow2"));
    create(&base, "cluster_size=65536", "8M");
    qemu::io(&base, &["write -P 1 0 2M", "write -P 2 4M 1M"]);
    let (base_name, top_name) = (base.to_str().unwrap(), top.to_str().unwrap());
    qemu::img(&[
        "create",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4096",
        "-b",
        base_name,
        "-F",
        "qcow2",
        top_name,
    ]);
    qemu::io(
        &top,
        &["write -P 3 1M 128k", "write -z 4M 64k", "write -P 4 7M 12k"],
    );
    let layers = vec![
        layer(&top, Format::Qcow2, true),
        layer(&base, Format::Qcow2, false),
    ];
    let image = Image::open(layers, false).unwrap();
    assert_eq!(
        image.top_extent(0, 8 << 20).unwrap(),
        (TopExtent::Absent, 1 << 20)
    );
    assert_eq!(
        image.top_extent(1 << 20, 8 << 20).unwrap().0,
        TopExtent::Data
    );
    assert_eq!(
        image.top_extent(4 << 20, 4 << 20).unwrap(),
        (TopExtent::Zeroes, 64 << 10)
    );
    let expected = read(&image, 0, 8 << 20);
    let below = open(&base);
    let mut steps = 0;
    let mut progress = |_| {
        steps += 1;
        ControlFlow::Continue(())
    };
    image.commit_into(&below, &mut progress).unwrap();
    assert!(steps > 1);
    below.settle().unwrap();
    assert!(read(&below, 0, 8 << 20) == expected);
    qemu::assert_clean(&base);
    assert!(qemu::read_all(&base, dir.path()) == expected);
}
