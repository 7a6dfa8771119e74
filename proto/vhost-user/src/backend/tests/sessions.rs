//! What an honest frontend relies on.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use super::peers::{Guest, Honest, MEMORY_BYTES, PACKED};
use super::*;
use crate::driver::DriverRing;

#[test]
fn full_handshake_serves_both_queues() {
    let served = Served::new();
    let mut honest = Honest::connect(&served);
    honest.set_up();
    honest.track_inflight();
    honest.start(0);
    honest.start(1);
    for round in 0..50u8 {
        honest.assert_echo(0, &[round; 100]);
        honest.assert_echo(1, &[round; 7]);
    }
    let status = served.status();
    assert!(status.connected);
    assert_eq!(
        (status.sessions, status.queues_running, status.inflight),
        (1, 2, 0)
    );
    assert_eq!(status.memory_sealed, Some(false));
    eventually("completions are counted", || {
        served.status().completed == 100
    });
}

#[test]
fn offered_features_are_what_the_specification_needs() {
    let served = Served::new();
    let mut honest = Honest::connect(&served);
    let features = honest.frontend.get_features().unwrap();
    assert_eq!(
        features,
        1 << 5 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32 | PACKED
    );
    honest.set_up();
    // MQ, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS;
    // libblkio insists on the second, fourth and last.
    let protocol_features = honest.frontend.get_protocol_features().unwrap();
    let expected = [0, 3, 5, 9, 12, 13, 15].map(|bit| 1 << bit);
    assert_eq!(protocol_features.bits(), expected.iter().sum::<u64>());
    assert_eq!(
        honest.frontend.get_queue_num().unwrap(),
        u64::from(NUM_QUEUES)
    );
    assert_eq!(honest.frontend.get_max_mem_slots().unwrap(), 509);
}

#[test]
fn config_is_read_whole_in_part_and_past_its_end() {
    let served = Served::new();
    let mut honest = Honest::connect(&served);
    honest.set_up();
    let flags = VhostUserConfigFlags::empty();
    for (offset, size) in [(0u32, 13u32), (4, 3), (0, 60), (100, 8), (0, 256)] {
        let placeholder = vec![0; size as usize];
        let (_, bytes) = honest
            .frontend
            .get_config(offset, size, flags, &placeholder)
            .unwrap();
        let mut expected: Vec<u8> = CONFIG
            .iter()
            .copied()
            .skip(offset as usize)
            .take(size as usize)
            .collect();
        expected.resize(size as usize, 0);
        assert_eq!(bytes, expected, "{size} at {offset}");
    }
    honest.frontend.set_config(0, flags, b"allowed").unwrap();
    honest
        .frontend
        .set_config(0, flags, b"refused")
        .unwrap_err();
    honest.start(0);
    honest.assert_echo(0, b"the session goes on");
}

#[test]
fn frontends_are_served_one_after_another_on_one_listener() {
    let served = Served::new();
    for round in 1..=10 {
        let mut honest = Honest::connect(&served);
        honest.set_up();
        honest.start(0);
        honest.assert_echo(0, &[round as u8; 16]);
        assert_eq!(served.status().sessions, round);
        honest.hang_up();
        eventually("the session's state is forgotten", || {
            served.device.resets.load(Ordering::SeqCst) == round as u32
        });
    }
    let end = served.status().last_session_end;
    assert_eq!(end.as_deref(), Some("the frontend hung up"));
}

#[test]
fn second_frontend_waits_until_the_first_has_gone() {
    let served = Served::new();
    let mut first = Honest::connect(&served);
    first.set_up();
    first.start(0);
    let second = Honest::connect(&served);
    let waiting = thread::spawn(move || {
        let mut second = second;
        second.set_up();
        second.start(0);
        second.assert_echo(0, b"second");
    });
    first.assert_echo(0, b"first");
    assert_eq!(served.status().sessions, 1);
    first.hang_up();
    waiting.join().unwrap();
    assert_eq!(served.status().sessions, 2);
}

#[test]
fn requests_in_flight_at_a_hang_up_are_resubmitted_in_order() {
    let served = Served::new();
    served.device.holds.store(true, Ordering::SeqCst);
    let mut honest = Honest::connect(&served);
    honest.set_up();
    honest.track_inflight();
    honest.start(0);
    for slot in 0..5u8 {
        honest.guest.offer(0, u64::from(slot), &[slot + 1; 8]);
    }
    honest.guest.kick(0);
    eventually("all requests are taken", || {
        served.device.taken() == [1, 2, 3, 4, 5]
    });
    // A sixth is offered and never kicked: the daemon did not see it.
    let mut guest = crash(&served, honest);
    guest.offer(0, 5, &[6; 8]);

    let mut honest = Honest::connect_with(&served, guest);
    honest.set_up();
    honest.track_inflight();
    honest.start(0);
    eventually("everything is answered", || {
        honest.guest.rings[0].used_idx() == 6
    });
    assert_eq!(served.device.taken(), [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6]);
    for slot in 0..6 {
        assert_eq!(
            honest.guest.answer(slot, 8),
            [slot as u8 + 1; 8],
            "slot {slot}"
        );
    }
    while honest.guest.rings[0].pop_used().is_some() {}
    honest.assert_echo(0, b"and the ring goes on");
}

/// The session ends with requests in flight that are never completed, as if the daemon had died.
/// Afterwards the device completes requests again.
fn crash(served: &Served, honest: Honest) -> Guest {
    let (description, file) = honest.guest.inflight.as_ref().unwrap();
    let copy = std::fs::File::from(OwnedFd::from(file.try_clone().unwrap()));
    let len = description.mmap_size as usize;
    let mut before = vec![0; len];
    std::os::unix::fs::FileExt::read_exact_at(&copy, &mut before, 0).unwrap();
    let memory_before = honest.guest.memory.read(0, MEMORY_BYTES as usize);

    served.device.holds.store(false, Ordering::SeqCst);
    let guest = honest.hang_up();
    eventually("the session is over", || {
        served.device.resets.load(Ordering::SeqCst) > 0
    });

    // The drain completed them; a killed process would not have. Put the clock back.
    guest.memory.write(0, &memory_before);
    std::os::unix::fs::FileExt::write_all_at(&copy, &before, 0).unwrap();
    guest
}

#[test]
fn get_vring_base_drains_and_the_ring_starts_again_from_there() {
    let served = Served::new();
    let mut honest = Honest::connect(&served);
    honest.set_up();
    honest.track_inflight();
    honest.start(0);
    honest.assert_echo(0, b"one");

    served.device.holds.store(true, Ordering::SeqCst);
    honest.guest.offer(0, 1, b"held back");
    honest.guest.kick(0);
    eventually("it is in flight", || served.status().inflight == 1);
    let device = Arc::clone(&served.device);
    let release = thread::spawn(move || device.holds.store(false, Ordering::SeqCst));
    assert_eq!(honest.frontend.get_vring_base(0).unwrap(), 2);
    release.join().unwrap();
    assert_eq!(honest.guest.answer(1, 9), b"held back");
    assert_eq!(served.status().queues_running, 0);

    // Nobody serves it now.
    honest.guest.rings[0].pop_used().unwrap();
    honest.guest.offer(0, 2, b"later");
    honest.guest.kick(0);
    honest.frontend.get_features().unwrap();
    assert_eq!(honest.guest.rings[0].used_idx(), 2);

    honest.start_from(0, 2);
    eventually("it is served", || honest.guest.rings[0].used_idx() == 3);
    assert_eq!(honest.guest.answer(2, 5), b"later");
}

#[test]
fn disabled_ring_takes_nothing_until_it_is_enabled() {
    let served = Served::new();
    let mut honest = Honest::connect(&served);
    honest.set_up();
    honest.start(0);
    honest.start(1);
    honest.frontend.set_vring_enable(0, false).unwrap();
    honest.guest.offer(0, 1, b"waits");
    honest.guest.kicks[0].write(1).unwrap();
    honest.assert_echo(1, b"the other queue is served");
    assert_eq!(honest.guest.rings[0].used_idx(), 0);
    honest.frontend.set_vring_enable(0, true).unwrap();
    eventually("it is served", || honest.guest.rings[0].used_idx() == 1);
}

#[test]
fn driver_error_stops_its_ring_only_and_signals_err() {
    let served = Served::new();
    let mut honest = Honest::connect(&served);
    honest.set_up();
    honest.start(0);
    honest.start(1);
    honest.guest.rings[0].push_avail(999);
    honest.guest.kicks[0].write(1).unwrap();
    eventually("the frontend is told", || {
        honest.guest.errs[0].read().is_ok()
    });
    honest.assert_echo(1, b"other ring");
    assert_eq!(served.status().queues_running, 1);
    assert_eq!(honest.frontend.get_vring_base(0).unwrap(), 0);

    // The driver resets the device and starts over, in the same session.
    honest.guest.rings[0] = DriverRing::new(&honest.guest.memory, 0x10000, 16, 1 << 29);
    honest.start(0);
    honest.assert_echo(0, b"healed");
}

#[test]
fn queue_that_cannot_start_leaves_the_session_alive() {
    let served = Served::new();
    served.device.refuses_to_start.store(true, Ordering::SeqCst);
    let mut honest = Honest::connect(&served);
    honest.set_up();
    honest.start(0);
    eventually("the frontend is told", || {
        honest.guest.errs[0].read().is_ok()
    });
    assert_eq!(honest.frontend.get_vring_base(0).unwrap(), 0);
    served
        .device
        .refuses_to_start
        .store(false, Ordering::SeqCst);
    honest.start(0);
    honest.assert_echo(0, b"now");
}

#[test]
fn memory_can_be_added_removed_and_replaced_while_rings_run() {
    let served = Served::new();
    let mut honest = Honest::connect(&served);
    honest.set_up();
    honest.start(0);
    honest.assert_echo(0, b"before");

    let more = tempfile::tempfile().unwrap();
    more.set_len(0x2000).unwrap();
    let mut region = honest.guest.regions()[0];
    region.guest_phys_addr = 1 << 32;
    region.userspace_addr = 0x7700_0000_0000;
    region.memory_size = 0x2000;
    region.mmap_handle = more.as_raw_fd();
    honest.frontend.add_mem_region(&region).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&more, b"plugged", 16).unwrap();
    honest.guest.rings[0]
        .add(&[((1 << 32) + 16, 7)], &[((1 << 32) + 64, 7)])
        .unwrap();
    honest.guest.kick(0);
    eventually("it is served", || {
        honest.guest.rings[0].pop_used().is_some()
    });
    let mut answer = [0; 7];
    std::os::unix::fs::FileExt::read_exact_at(&more, &mut answer, 64).unwrap();
    assert_eq!(&answer, b"plugged");

    // QEMU repeats itself for each queue pair; that is no second region.
    honest.frontend.add_mem_region(&region).unwrap();
    let other = tempfile::tempfile().unwrap();
    other.set_len(0x2000).unwrap();
    let mut in_its_place = region;
    in_its_place.mmap_handle = other.as_raw_fd();
    honest
        .frontend
        .add_mem_region(&in_its_place)
        .expect_err("another region is there");
    honest.frontend.remove_mem_region(&region).unwrap();
    honest
        .frontend
        .remove_mem_region(&region)
        .expect_err("it is gone");
    honest
        .frontend
        .remove_mem_region(&honest.guest.regions()[0])
        .expect_err("the ring lies in it");
    honest
        .frontend
        .set_mem_table(&[region])
        .expect_err("the ring would lose its areas");
    honest
        .frontend
        .set_mem_table(&honest.guest.regions())
        .unwrap();
    honest.assert_echo(0, b"after");
}

#[test]
fn device_reset_stops_rings_and_keeps_the_session() {
    let served = Served::new();
    let mut honest = Honest::connect(&served);
    honest.set_up();
    honest.start(0);
    honest.assert_echo(0, b"before");
    honest.frontend.reset_device().unwrap();
    assert_eq!(served.status().queues_running, 0);
    assert_eq!(served.device.resets.load(Ordering::SeqCst), 1);
    let features = honest.frontend.get_features().unwrap();
    honest.frontend.set_features(features & !PACKED).unwrap();
    honest.guest.rings[0] = DriverRing::new(&honest.guest.memory, 0x10000, 16, 1 << 29);
    honest.start(0);
    honest.assert_echo(0, b"after");
}

#[test]
fn stop_drains_and_frees_the_socket() {
    let mut served = Served::new();
    served.device.holds.store(true, Ordering::SeqCst);
    let mut honest = Honest::connect(&served);
    honest.set_up();
    honest.start(0);
    honest.guest.offer(0, 0, b"in flight");
    honest.guest.kick(0);
    eventually("it is in flight", || served.status().inflight == 1);
    let device = Arc::clone(&served.device);
    let release = thread::spawn(move || device.holds.store(false, Ordering::SeqCst));
    served.stop();
    release.join().unwrap();
    assert_eq!(honest.guest.answer(0, 9), b"in flight");
    UnixStream::connect(&served.path).expect_err("nobody listens any more");
}

#[test]
fn stop_says_how_many_requests_remain() {
    let mut served = Served::new();
    served.device.holds.store(true, Ordering::SeqCst);
    let mut honest = Honest::connect(&served);
    honest.set_up();
    honest.start(0);
    honest.guest.offer(0, 0, b"never");
    honest.guest.kick(0);
    eventually("it is in flight", || served.status().inflight == 1);
    let error = served
        .server
        .take()
        .unwrap()
        .stop(Duration::from_millis(100))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "device echo: 1 requests were not completed in time"
    );
    assert_eq!(
        honest.guest.rings[0].used_idx(),
        0,
        "nothing was completed that was not done"
    );
}

#[test]
fn idle_server_stops_at_once() {
    let mut served = Served::new();
    served.stop();
}

#[test]
fn socket_of_a_dead_process_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device.sock");
    let first = bind(&path).unwrap();
    assert!(matches!(bind(&path), Err(BindError::InUse { .. })));
    drop(first);
    assert!(path.exists());
    bind(&path).unwrap();

    let plain = dir.path().join("file");
    std::fs::write(&plain, b"").unwrap();
    assert!(matches!(bind(&plain), Err(BindError::NotASocket { .. })));
    assert!(matches!(
        bind(&dir.path().join("no/such/dir")),
        Err(BindError::Io { .. })
    ));
}

#[test]
fn inherited_descriptor_must_be_a_listening_socket() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("x.sock")).unwrap();
    listener_from_fd(listener.into()).unwrap();
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(
        listener_from_fd(file.into()),
        Err(BindError::NotListening { .. })
    ));
    let (connected, _peer) = UnixStream::pair().unwrap();
    assert!(matches!(
        listener_from_fd(connected.into()),
        Err(BindError::NotListening { .. })
    ));
}
