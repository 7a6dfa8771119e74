//! Overlays and what they are based on.

use std::fs::File;
use std::path::{Path, PathBuf};

use qcow2::{BackingRef, CreateOptions, Error, Format, Image, create};

use crate::qemu;
use crate::workload::{Modelled, layer, read};

fn overlay(dir: &Path, name: &str, base: &Path, format: &str, options: CreateOptions) -> PathBuf {
    let path = dir.join(name);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    let options = CreateOptions {
        backing: Some(BackingRef {
            name: base.file_name().unwrap().to_str().unwrap().into(),
            format: Some(format.into()),
        }),
        ..options
    };
    create(&file, &options).unwrap();
    path
}

fn raw_image(dir: &Path, len: usize) -> (PathBuf, Vec<u8>) {
    let path = dir.join("base.raw");
    let data: Vec<u8> = (0..len)
        .map(|at| (at / 512) as u8 ^ (at / 65536) as u8)
        .collect();
    std::fs::write(&path, &data).unwrap();
    (path, data)
}

#[test]
fn chain_of_three_over_raw_reads_and_writes_like_qemus() {
    if qemu::is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    // The raw image ends before the overlays do, and inside a sector.
    let (raw, mut model) = raw_image(dir, (5 << 20) + 100);
    model.resize(8 << 20, 0);
    let mut bases = vec![(raw, Format::Raw)];
    for (index, cluster_bytes) in [65536, 4096, 512 << 10].into_iter().enumerate() {
        let options = CreateOptions {
            capacity_bytes: 8 << 20,
            cluster_bytes,
            ..CreateOptions::default()
        };
        let format = if index == 0 { "raw" } else { "qcow2" };
        let (base, _) = &bases[0];
        let path = overlay(dir, &format!("{index}.qcow2"), base, format, options);
        let mut layers = vec![layer(&path, Format::Qcow2, true)];
        layers.extend(
            bases
                .iter()
                .map(|(path, format)| layer(path, *format, false)),
        );
        let image = Image::open(layers, false).unwrap();
        let mut modelled = Modelled::new(image, model, index as u64);
        modelled.check_all();
        modelled.work(150);
        modelled.check_all();
        modelled.image.settle().unwrap();
        model = modelled.model;
        qemu::assert_clean(&path);
        assert!(qemu::read_all(&path, dir) == model, "layer {index}");
        bases.insert(0, (path, Format::Qcow2));
    }
}

#[test]
fn version_two_overlay_hides_zeroes_by_writing_them() {
    if qemu::is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (raw, model) = raw_image(dir, 4 << 20);
    let path = dir.join("old.qcow2");
    let (raw_name, name) = (raw.to_str().unwrap(), path.to_str().unwrap());
    qemu::img(&[
        "create",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10",
        "-b",
        raw_name,
        "-F",
        "raw",
        name,
    ]);
    let layers = vec![
        layer(&path, Format::Qcow2, true),
        layer(&raw, Format::Raw, false),
    ];
    let image = Image::open(layers, false).unwrap();
    assert!(!image.discards());
    let mut modelled = Modelled::new(image, model, 3);
    modelled.work(150);
    modelled.check_all();
    modelled.image.settle().unwrap();
    qemu::assert_clean(&path);
    assert!(qemu::read_all(&path, dir) == modelled.model);
}

#[test]
fn compressed_clusters_are_read_and_replaced() {
    if qemu::is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (raw, model) = raw_image(dir, 6 << 20);
    for cluster_size in [512, 4096, 65536, 2 << 20] {
        let path = dir.join(format!("compressed-{cluster_size}.qcow2"));
        let options = format!("cluster_size={cluster_size}");
        let (from, to) = (raw.to_str().unwrap(), path.to_str().unwrap());
        qemu::img(&[
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, from, to,
        ]);
        let image = Image::open(vec![layer(&path, Format::Qcow2, true)], false).unwrap();
        let mut modelled = Modelled::new(image, model.clone(), 11);
        modelled.check_all();
        modelled.work(120);
        modelled.check_all();
        modelled.image.settle().unwrap();
        qemu::assert_clean(&path);
        assert!(
            qemu::read_all(&path, dir) == modelled.model,
            "{cluster_size}"
        );
    }
}

#[test]
fn chain_must_be_named_to_its_end_and_not_beyond() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (raw, _) = raw_image(dir, 1 << 20);
    let options = CreateOptions {
        capacity_bytes: 1 << 20,
        ..CreateOptions::default()
    };
    let path = overlay(dir, "top.qcow2", &raw, "raw", options);
    let top = || layer(&path, Format::Qcow2, true);
    let base = || layer(&raw, Format::Raw, false);
    let error = Image::open(vec![top()], false).unwrap_err();
    assert!(matches!(error, Error::NoBacking { .. }), "{error}");
    let error = Image::open(vec![top(), base(), base()], false).unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error}");
    let error = Image::open(vec![base()], false).unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error}");
    Image::open(vec![top(), base()], false).unwrap();
}

#[test]
fn growing_over_a_longer_backing_image_shows_zeroes() {
    if qemu::is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (raw, model) = raw_image(dir, 4 << 20);
    let options = CreateOptions {
        capacity_bytes: (1 << 20) + 512,
        ..CreateOptions::default()
    };
    let path = overlay(dir, "short.qcow2", &raw, "raw", options);
    let layers = vec![
        layer(&path, Format::Qcow2, true),
        layer(&raw, Format::Raw, false),
    ];
    let image = Image::open(layers, false).unwrap();
    image.resize(8 << 20).unwrap();
    let all = read(&image, 0, 8 << 20);
    assert!(all[..(1 << 20) + 512] == model[..(1 << 20) + 512]);
    assert!(all[(1 << 20) + 512..].iter().all(|&byte| byte == 0));
    image.settle().unwrap();
    qemu::assert_clean(&path);
    assert!(qemu::read_all(&path, dir) == all);
}
