//! Images made to do harm: nothing panics, nothing hangs, and what is wrong is named.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use qcow2::{CreateOptions, Error, Format, Header, Image, Preallocation, Repair, check, create};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::workload::layer;

const SIZE: u64 = 2 << 20;
const CLUSTER: u64 = 4096;

fn new_image(path: &Path) -> File {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .unwrap();
    let options = CreateOptions {
        capacity_bytes: SIZE,
        cluster_bytes: CLUSTER as u32,
        preallocation: Preallocation::Metadata,
        ..CreateOptions::default()
    };
    create(&file, &options).unwrap();
    file
}

fn refusal(change: impl FnOnce(&File)) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let file = new_image(&path);
    change(&file);
    Image::open(vec![layer(&path, Format::Qcow2, true)], false).unwrap_err()
}

fn put(file: &File, at: u64, bytes: &[u8]) {
    file.write_all_at(bytes, at).unwrap();
}

fn get64(file: &File, at: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

#[test]
fn impossible_headers_are_refused() {
    let corrupt = |error: Error| assert!(matches!(error, Error::Corrupt(_)), "{error}");
    corrupt(refusal(|file| put(file, 20, &64_u32.to_be_bytes())));
    corrupt(refusal(|file| put(file, 20, &8_u32.to_be_bytes())));
    corrupt(refusal(|file| put(file, 36, &u32::MAX.to_be_bytes())));
    corrupt(refusal(|file| put(file, 36, &0_u32.to_be_bytes())));
    corrupt(refusal(|file| put(file, 40, &(1_u64 << 62).to_be_bytes())));
    corrupt(refusal(|file| put(file, 40, &(CLUSTER + 8).to_be_bytes())));
    corrupt(refusal(|file| put(file, 48, &(1_u64 << 50).to_be_bytes())));
    corrupt(refusal(|file| put(file, 56, &u32::MAX.to_be_bytes())));
    corrupt(refusal(|file| put(file, 56, &0_u32.to_be_bytes())));
    corrupt(refusal(|file| put(file, 96, &7_u32.to_be_bytes())));
    corrupt(refusal(|file| put(file, 100, &u32::MAX.to_be_bytes())));
    corrupt(refusal(|file| put(file, 100, &100_u32.to_be_bytes())));
    corrupt(refusal(|file| put(file, 24, &(1_u64 << 60).to_be_bytes())));
    // An extension and a name that leave the first cluster.
    corrupt(refusal(|file| {
        put(file, 112, &[0, 0, 0, 9, 0xff, 0xff, 0xff, 0xf8])
    }));
    corrupt(refusal(|file| {
        put(file, 8, &(CLUSTER - 4).to_be_bytes());
        put(file, 16, &8_u32.to_be_bytes());
    }));
    corrupt(refusal(|file| {
        put(file, 8, &u64::MAX.to_be_bytes());
        put(file, 16, &1000_u32.to_be_bytes());
    }));
    let error = refusal(|file| put(file, 4, &4_u32.to_be_bytes()));
    assert!(matches!(error, Error::Version(4)));
    let error = refusal(|file| put(file, 0, b"VMDK"));
    assert!(matches!(error, Error::NotQcow2));
}

#[test]
fn features_that_are_not_served_are_named_with_a_remedy() {
    for (at, value, feature, remedy) in [
        (32, 1_u32, "AES", "qemu-img convert"),
        (32, 2, "LUKS", "qemu-img convert"),
        (76, 1 << 2, "external data file", "qemu-img convert"),
        (76, 1 << 4, "extended L2", "qemu-img convert"),
        (76, 1 << 3, "compression", "compression_type=zlib"),
        (76, 1 << 9, "unknown", "qemu-img convert"),
        (76, 1, "dirty", "qemu-img check -r all"),
        (76, 2, "corrupt", "qemu-img check -r all"),
        (60, 3, "internal snapshots", "qemu-img snapshot -d"),
    ] {
        let error = refusal(|file| put(file, at, &value.to_be_bytes())).to_string();
        assert!(error.contains(feature) && error.contains(remedy), "{error}");
    }
}

#[test]
fn tables_on_top_of_one_another_are_refused_for_writing() {
    // The L1 table over the refcount table; an L2 table over the L1 table; a refcount block over
    // the header.
    for case in 0..3 {
        let error = refusal(|file| {
            let (l1, table) = (get64(file, 40), get64(file, 48));
            match case {
                0 => put(file, 40, &table.to_be_bytes()),
                1 => put(file, l1, &(1 << 63 | l1).to_be_bytes()),
                _ => put(file, table + 8, &get64(file, table).to_be_bytes()),
            }
        });
        assert!(matches!(error, Error::Corrupt(_)), "{case}: {error}");
    }
}

#[test]
fn entry_that_points_at_a_table_or_behind_the_end_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let file = new_image(&path);
    let l1 = get64(&file, 40);
    let l2 = get64(&file, l1) & !(1 << 63);
    for (index, offset) in [(0, l1), (1, l2), (2, 0), (3, 1 << 40), (4, CLUSTER + 512)] {
        let entry = (1 << 63) | offset;
        put(&file, l2 + index * 8, &entry.to_be_bytes());
    }
    let image = Image::open(vec![layer(&path, Format::Qcow2, true)], false).unwrap();
    for index in [0, 1, 3, 4] {
        let mut data = [0; 512];
        let read = image.read(index * CLUSTER, &mut &mut data[..]).unwrap_err();
        assert_eq!(read.raw_os_error(), Some(libc::EIO), "{index}");
        assert!(image.write(index * CLUSTER, &&data[..]).is_err(), "{index}");
    }
    // An offset of 0 is no offset: the cluster is just not there.
    image.write(2 * CLUSTER, &&[1; 512][..]).unwrap();
    image.write(5 * CLUSTER, &&[1; 512][..]).unwrap();
    assert_eq!(get64(&file, l1) & !(1 << 63), l2, "tables are as they were");
}

#[test]
fn shorter_and_broken_files_are_read_without_harm() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut random = StdRng::seed_from_u64(4711);
    for round in 0..400 {
        let file = new_image(&path);
        if round % 3 == 0 {
            file.set_len(random.random_range(0..64 * CLUSTER)).unwrap();
        }
        for _ in 0..random.random_range(1..8) {
            // Header, refcount table and block, L1 and L2 tables.
            let at = match random.random_range(0..3) {
                0 => random.random_range(0..136),
                _ => random.random_range(0..8) * CLUSTER + random.random_range(0..64),
            };
            match random.random_range(0..3) {
                0 => put(&file, at, &[random.random()]),
                1 => put(&file, at & !7, &random.random::<u64>().to_be_bytes()),
                _ => {
                    let cluster = random.random_range(0..64_u64) * CLUSTER;
                    let flags = random.random_range(0..4_u64) << 62;
                    put(&file, at & !7, &(cluster | flags).to_be_bytes());
                }
            }
        }
        let _ = Header::read(&file);
        let _ = check(&file, Repair::Nothing);
        for read_only in [true, false] {
            let Ok(image) = Image::open(vec![layer(&path, Format::Qcow2, true)], read_only) else {
                continue;
            };
            // Mutated headers may claim any size.
            let end = image.capacity_bytes().min(SIZE);
            exercise(&image, end, &mut random);
            let _ = image.check(Repair::Leaks, &|| true);
            let _ = image.settle();
        }
        // What was written must not have grown without bounds on the disk.
        use std::os::unix::fs::MetadataExt;
        assert!(
            file.metadata().unwrap().blocks() * 512 < 64 << 20,
            "round {round}"
        );
    }
}

fn exercise(image: &Image, end: u64, random: &mut StdRng) {
    if end < 512 {
        return;
    }
    for _ in 0..20 {
        let sectors = random.random_range(1..=(end / 512).min(64));
        let offset = random.random_range(0..=end / 512 - sectors) * 512;
        let mut data = vec![0x77; sectors as usize * 512];
        let _ = match random.random_range(0..4) {
            0 => image.read(offset, &mut &mut data[..]),
            1 => image.write(offset, &&data[..]),
            2 => image.discard(offset, sectors * 512),
            _ => image.write_zeroes(offset, sectors * 512, true),
        };
    }
}
