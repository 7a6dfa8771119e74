//! Data comes back as it was written, on every path through the engine.

use std::os::unix::fs::MetadataExt;

use vhost_user::frontend::connection::Connection;
use vhost_user::frontend::session;
use virtio_driver::VirtioBlkFeatureFlags;

use crate::daemon::{DEADLINE, Daemon, Place, numbered_sector, read_image};
use crate::driver::{Client, all_features};

/// Bytes that differ from place to place.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn device_describes_itself() {
    let place = Place::new();
    place.image("a.img", 2048);
    let _daemon = Daemon::start(&place, &[&format!("{},queues=4", place.disk("a"))]);
    let client = Client::connect(&place.socket("a"));
    let config = client.config();
    assert_eq!(u64::from(config.capacity), 2048);
    assert_eq!(u32::from(config.blk_size), 512);
    assert_eq!(u16::from(config.num_queues), 4);
    assert_eq!(config.writeback, 1);
    let expected = VirtioBlkFeatureFlags::FLUSH
        | VirtioBlkFeatureFlags::MQ
        | VirtioBlkFeatureFlags::DISCARD
        | VirtioBlkFeatureFlags::WRITE_ZEROES
        | VirtioBlkFeatureFlags::CONFIG_WCE;
    assert!(
        client.features().contains(expected),
        "{:?}",
        client.features()
    );
    assert!(!client.features().contains(VirtioBlkFeatureFlags::RO));
}

fn write_read_verify(extra: &str) {
    let place = Place::new();
    let image = place.image("a.img", 8192);
    let _daemon = Daemon::start(&place, &[&format!("{}{extra}", place.disk("a"))]);
    let mut client = Client::connect(&place.socket("a"));

    assert_eq!(client.read(17 * 512, 512), numbered_sector(17));
    for (seed, (offset, len)) in [
        (0, 512),
        (512, 4096),
        (4096, 65_536),
        (8191 * 512, 512),
        (1 << 20, 1 << 20),
    ]
    .into_iter()
    .enumerate()
    {
        let data = pattern(seed as u64 + 1, len);
        assert_eq!(client.write(offset, &data), 0);
        assert!(
            client.read(offset, len) == data,
            "what was written at {offset} comes back"
        );
        assert_eq!(client.flush(), 0);
        assert!(
            read_image(&image, offset, len) == data,
            "{offset} is in the image"
        );
    }
    assert_eq!(
        read_image(&image, 5000 * 512, 512),
        numbered_sector(5000),
        "neighbours are unharmed"
    );
}

#[test]
fn written_data_comes_back_and_is_in_the_image() {
    write_read_verify("");
}

#[test]
fn written_data_comes_back_through_the_page_cache() {
    write_read_verify(",page-cache");
}

#[test]
fn image_on_tmpfs_is_served() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("skipped: no /dev/shm here");
        return;
    };
    let place = Place::new();
    let image = dir.path().join("t.img");
    std::fs::write(&image, pattern(9, 1 << 20)).unwrap();
    let disk = format!(
        "id=t,path={},socket={}",
        image.display(),
        place.socket("t").display()
    );
    let _daemon = Daemon::start(&place, &[&disk]);
    let mut client = Client::connect(&place.socket("t"));
    assert!(client.read(0, 1 << 20) == pattern(9, 1 << 20));
    assert_eq!(client.write(4096, &[7; 4096]), 0);
    assert_eq!(client.write_zeroes(4096, 512, false), 0);
    assert_eq!(client.flush(), 0);
    let around = read_image(&image, 4096, 1024);
    assert!(around[..512] == [0; 512] && around[512..] == [7; 512]);
}

#[test]
fn buffers_at_any_address_are_served() {
    let place = Place::new();
    let image = place.image("a.img", 8192);
    let _daemon = Daemon::start(&place, &[&place.disk("a")]);
    let mut client = Client::connect(&place.socket("a"));
    // Longer than a bounce buffer, so that it goes in several pieces.
    let len = (1 << 20) + 512;
    for at in [1, 2, 3, 511, 4095] {
        let data = pattern(at as u64, len);
        client.buffer()[at..at + len].copy_from_slice(&data);
        assert_eq!(client.write_at(0, 512, at, len), 0);
        client.buffer()[..at + len + 1].fill(0xee);
        assert_eq!(client.read_at(0, 512, at, len), 0);
        assert!(client.buffer()[at..at + len] == data, "buffer at {at}");
        assert_eq!(
            client.buffer()[at - 1],
            0xee,
            "nothing before the buffer is touched"
        );
        assert_eq!(
            client.buffer()[at + len],
            0xee,
            "nothing behind the buffer is touched"
        );
        assert!(read_image(&image, 512, len) == data);
    }
}

#[test]
fn segments_of_any_length_add_up() {
    let place = Place::new();
    let image = place.image("a.img", 8192);
    let _daemon = Daemon::start(&place, &[&place.disk("a")]);
    let mut client = Client::connect(&place.socket("a"));
    for parts in [
        &[(0, 512), (8192, 512), (4096, 1024)][..],
        &[(0, 1), (100, 510), (1000, 1)],
        &[(7, 1000), (5000, 24), (9000, 4096)],
        &[(0, 4096), (65_536, 4096), (32_768, 8192), (12_291, 512)],
    ] {
        let len: usize = parts.iter().map(|part| part.1).sum();
        let data = pattern(len as u64, len);
        let mut rest = &data[..];
        for &(at, part) in parts {
            client.buffer()[at..at + part].copy_from_slice(&rest[..part]);
            rest = &rest[part..];
        }
        assert_eq!(client.transfer(true, 1024, parts), 0);
        assert!(
            read_image(&image, 1024, len) == data,
            "{parts:?} in the image"
        );
        client.buffer()[..128 << 10].fill(0xee);
        assert_eq!(client.transfer(false, 1024, parts), 0);
        let gathered: Vec<u8> = parts
            .iter()
            .flat_map(|&(at, part)| client.buffer()[at..at + part].to_vec())
            .collect();
        assert!(gathered == data, "{parts:?} read back");
    }
}

#[test]
fn many_requests_in_flight_on_many_queues_keep_their_data() {
    let place = Place::new();
    place.image("a.img", 64 << 10);
    let _daemon = Daemon::start(&place, &[&format!("{},queues=4", place.disk("a"))]);
    let mut client = Client::connect_with(&place.socket("a"), 4, all_features());
    const LEN: usize = 4096;
    const DEPTH: usize = 32;
    // Misaligned slots, so that more bounce buffers are wanted than there are.
    let slot = |queue: usize, id: usize| (queue * DEPTH + id) * (LEN + 512) + 3;
    let offset = |round: u64, queue: usize, id: usize| {
        ((round * 4 + queue as u64) * DEPTH as u64 + id as u64) * LEN as u64
    };
    for round in 0..8 {
        for queue in 0..4 {
            for id in 0..DEPTH {
                let (at, offset) = (slot(queue, id), offset(round, queue, id));
                client.buffer()[at..at + LEN].copy_from_slice(&pattern(offset, LEN));
                client.submit_write(queue, offset, at, LEN, id);
            }
            client.kick(queue);
        }
        for queue in 0..4 {
            for _ in 0..DEPTH {
                assert_eq!(client.completion(queue).1, 0);
            }
        }
    }
    client.buffer().fill(0);
    for round in 0..8 {
        for queue in 0..4 {
            for id in 0..DEPTH {
                client.submit_read(queue, offset(round, queue, id), slot(queue, id), LEN, id);
            }
            client.kick(queue);
        }
        for queue in 0..4 {
            for _ in 0..DEPTH {
                let (id, result) = client.completion(queue);
                assert_eq!(result, 0);
                let (at, expected) = (slot(queue, id), pattern(offset(round, queue, id), LEN));
                assert!(
                    client.buffer()[at..at + LEN] == expected,
                    "round {round} queue {queue} id {id}"
                );
            }
        }
    }
}

#[test]
fn discarded_blocks_are_given_back_and_zeroes_read_zero() {
    let place = Place::new();
    let image = place.image("a.img", 16 << 10);
    let blocks_before = image.metadata().unwrap().blocks();
    let _daemon = Daemon::start(&place, &[&place.disk("a")]);
    let mut client = Client::connect(&place.socket("a"));

    assert_eq!(client.discard(1 << 20, 4 << 20), 0);
    assert_eq!(client.flush(), 0);
    let blocks_after = image.metadata().unwrap().blocks();
    assert!(
        blocks_after + 4096 <= blocks_before,
        "{blocks_before} -> {blocks_after} blocks"
    );

    for (offset, len, unmap) in [
        (0, 512, false),
        (1536, 65_536, true),
        (6 << 20, 1 << 20, false),
    ] {
        assert_eq!(client.write_zeroes(offset, len, unmap), 0);
        assert!(
            client
                .read(offset, len as usize)
                .iter()
                .all(|&byte| byte == 0),
            "{offset}"
        );
        assert!(
            read_image(&image, offset, len as usize)
                .iter()
                .all(|&byte| byte == 0)
        );
    }
    assert_eq!(
        client.read(512, 512),
        numbered_sector(1),
        "neighbours are unharmed"
    );
    assert_eq!(
        image.metadata().unwrap().len(),
        8 << 20,
        "the image keeps its size"
    );
}

#[test]
fn driver_without_flush_is_served_write_through() {
    let place = Place::new();
    let image = place.image("a.img", 64);
    let _daemon = Daemon::start(&place, &[&place.disk("a")]);
    let without = VirtioBlkFeatureFlags::FLUSH | VirtioBlkFeatureFlags::CONFIG_WCE;
    let mut client = Client::connect_with(&place.socket("a"), 1, all_features() & !without.bits());
    assert_eq!(client.write(512, &[3; 512]), 0);
    assert_eq!(client.write_zeroes(1024, 512, true), 0);
    assert_eq!(client.discard(2048, 512), 0);
    let image = read_image(&image, 512, 1024);
    assert!(image[..512] == [3; 512] && image[512..] == [0; 512]);
}

#[test]
fn cache_mode_is_switched_through_the_configuration() {
    let place = Place::new();
    place.image("a.img", 64);
    let mut daemon = Daemon::start(&place, &[&place.disk("a")]);
    let connect = || {
        let mut connection = Connection::connect(&place.socket("a"), DEADLINE).unwrap();
        let offer = session::handshake(&mut connection, 60).unwrap();
        (connection, offer.config.unwrap())
    };
    let (mut connection, config) = connect();
    assert_eq!(config[32], 1, "write-back at first");
    connection.set_config(32, &[0]).unwrap();
    assert_eq!(connection.config(60).unwrap()[32], 0);
    assert!(
        connection.set_config(0, &[0xff; 8]).is_err(),
        "the capacity is not the driver's to set"
    );
    drop(connection);
    let (_connection, config) = connect();
    assert_eq!(config[32], 1, "a new driver begins with write-back");
    assert_eq!(config[..8], 64_u64.to_le_bytes());
    daemon.assert_alive();
}

#[test]
fn two_disks_in_one_process_are_kept_apart() {
    let place = Place::new();
    let (a, b) = (place.image("a.img", 64), place.image("b.img", 128));
    let _daemon = Daemon::start(&place, &[&place.disk("a"), &place.disk("b")]);
    let mut to_a = Client::connect(&place.socket("a"));
    let mut to_b = Client::connect(&place.socket("b"));
    assert_eq!(u64::from(to_a.config().capacity), 64);
    assert_eq!(u64::from(to_b.config().capacity), 128);
    assert_eq!(to_a.write(0, &[b'a'; 512]), 0);
    assert_eq!(to_b.write(512, &[b'b'; 512]), 0);
    assert_eq!((to_a.flush(), to_b.flush()), (0, 0));
    assert_eq!(read_image(&a, 0, 512), [b'a'; 512]);
    assert_eq!(read_image(&a, 512, 512), numbered_sector(1));
    assert_eq!(read_image(&b, 0, 512), numbered_sector(0));
    assert_eq!(read_image(&b, 512, 512), [b'b'; 512]);
}

#[test]
fn read_only_disk_reads_and_refuses_changes() {
    let place = Place::new();
    let image = place.image("a.img", 64);
    let mut permissions = image.metadata().unwrap().permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&image, permissions).unwrap();
    let mut daemon = Daemon::start(&place, &[&format!("{},readonly", place.disk("a"))]);
    let mut client = Client::connect(&place.socket("a"));
    assert!(client.features().contains(VirtioBlkFeatureFlags::RO));
    assert_eq!(client.read(512, 512), numbered_sector(1));
    assert_eq!(client.write(512, &[1; 512]), -libc::EIO);
    assert_eq!(client.discard(0, 512), -libc::EIO);
    assert_eq!(client.write_zeroes(0, 512, false), -libc::EIO);
    assert_eq!(client.flush(), 0);
    assert_eq!(client.read(512, 512), numbered_sector(1));
    assert_eq!(read_image(&image, 512, 512), numbered_sector(1));
    daemon.assert_alive();
}
