//! Drivers that break the rules: they lose their own ring or frame, and nothing else.

use vhost::VhostBackend;

use crate::daemon::{Daemon, await_true};
use crate::guest::{Guest, HEADER_LEN};
use crate::host::{create_tap, enter_namespace};
use crate::traffic::{datagram, guest_address, host_socket, payload};

const NIC: &str = "tap=tap0,mac=52:54:00:12:34:56";
const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;

fn served() -> Option<(Daemon, Guest)> {
    if !enter_namespace() {
        return None;
    }
    create_tap("tap0", 1, 1500);
    let daemon = Daemon::with_nic(NIC);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    guest.supply(0, 32, 1536);
    Some((daemon, guest))
}

/// The daemon lives, and serves a driver that keeps the rules.
fn assert_serves_the_next(mut daemon: Daemon, broken: Guest) {
    daemon.assert_alive();
    drop(broken.hang_up());
    let mut guest = Guest::connect(&daemon.socket(), 1);
    guest.supply(0, 32, 1536);
    guest.find_host();
    host_socket().send_to(b"well", guest_address()).unwrap();
    assert_eq!(guest.receive(datagram).1, b"well");
    daemon.assert_alive();
}

fn await_error(guest: &Guest, queue: usize) {
    await_true("the ring's error is signalled", || {
        guest.machine.errs[queue].read().is_ok()
    });
}

#[test]
fn frame_outside_memory_is_dropped_and_the_ring_goes_on() {
    let Some((daemon, mut guest)) = served() else {
        return;
    };
    let outside = u64::MAX - 0xfff;
    guest.transmit(0, &[(outside, 100)]);
    guest.find_host();
    assert_serves_the_next(daemon, guest);
}

#[test]
fn looping_chains_come_back_empty_and_the_rings_go_on() {
    let Some((daemon, mut guest)) = served() else {
        return;
    };
    guest.find_host();
    for (queue, flags) in [(0, DESC_F_NEXT | DESC_F_WRITE), (1, DESC_F_NEXT)] {
        let ring = &mut guest.machine.rings[queue];
        ring.set_desc(254, 1 << 20, 64, flags, 255);
        ring.set_desc(255, 1 << 20, 64, flags, 254);
        ring.push_avail(254);
        guest.kick(queue);
    }
    let mut used = None;
    await_true("the device is done with the frame", || {
        used = guest.machine.rings[1].pop_used();
        used.is_some()
    });
    assert_eq!(used, Some((254, 0)));
    // The receive ring meets the loop once it has used up the buffers before it.
    let host = host_socket();
    let frame = payload(0, 64);
    await_true("the receive buffer comes back", || {
        let _ = host.send_to(&frame, guest_address());
        guest.machine.rings[0].pop_used() == Some((254, 0))
    });
    guest.supply(0, 32, 1536);
    guest.find_host();
    assert_serves_the_next(daemon, guest);
}

#[test]
fn available_index_that_jumps_stops_the_ring() {
    let Some((daemon, mut guest)) = served() else {
        return;
    };
    let avail_idx = guest.machine.rings[1].avail_idx();
    guest.machine.rings[1].set_avail_idx(avail_idx.wrapping_add(1000));
    guest.kick(1);
    await_error(&guest, 1);
    assert_serves_the_next(daemon, guest);
}

#[test]
fn frames_that_make_no_sense_are_dropped_and_the_ring_goes_on() {
    let Some((daemon, mut guest)) = served() else {
        return;
    };
    let at = 20 << 20;
    guest.machine.memory.write(at, &vec![0xff; 1 << 20]);
    // No header; part of one; a header alone; a header full of nonsense; more than any frame.
    for len in [1, 11, 12, 60, 70_000, 1 << 20] {
        guest.transmit(0, &[(at, len)]);
    }
    // Only a buffer to be written.
    guest.machine.rings[1].add(&[], &[(at, 100)]).unwrap();
    guest.kick(1);
    await_true("it is given back", || {
        guest.machine.rings[1].pop_used().is_some()
    });
    // A sound header before bytes that are no Ethernet frame.
    guest.send_with(0, [0; HEADER_LEN], &[1]);
    guest.find_host();
    assert_serves_the_next(daemon, guest);
}

#[test]
fn useless_receive_buffers_come_back_empty() {
    let Some((daemon, mut guest)) = served() else {
        return;
    };
    host_socket()
        .send_to(b"uses a buffer", guest_address())
        .unwrap();
    guest.receive(datagram);
    guest.hang_up();
    let mut guest = Guest::connect(&daemon.socket(), 1);
    // Too small for a header, readable only, just large enough.
    guest.machine.rings[0].add(&[], &[(20 << 20, 12)]).unwrap();
    guest.machine.rings[0]
        .add(&[(20 << 20, 2000)], &[])
        .unwrap();
    guest.kick(0);
    let mut empty = 0;
    await_true("both come back", || {
        empty += usize::from(
            guest.machine.rings[0]
                .pop_used()
                .is_some_and(|used| used.1 == 0),
        );
        empty == 2
    });
    guest.supply(0, 120, 13);
    host_socket()
        .send_to(b"in crumbs", guest_address())
        .unwrap();
    let (received, data) = guest.receive(datagram);
    assert_eq!(data, b"in crumbs");
    assert_eq!(
        usize::from(received.num_buffers),
        (HEADER_LEN + received.frame.len()).div_ceil(13)
    );
    assert_serves_the_next(daemon, guest);
}

#[test]
fn frame_larger_than_the_whole_ring_is_dropped() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 1, 65521);
    let daemon = Daemon::with_nic(NIC);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    guest.supply(0, 256, 100);
    let host = host_socket();
    host.send_to(b"first", guest_address()).unwrap();
    assert_eq!(guest.receive(datagram).1, b"first");
    host.send_to(&payload(1, 60_000), guest_address()).unwrap();
    host.send_to(b"after", guest_address()).unwrap();
    assert_eq!(guest.receive(datagram).1, b"after");
}

#[test]
fn rings_outside_memory_are_refused() {
    let Some((daemon, guest)) = served() else {
        return;
    };
    let bad = vhost::VringConfigData {
        queue_max_size: 256,
        queue_size: 256,
        flags: 0,
        desc_table_addr: 0x10,
        used_ring_addr: 0x20,
        avail_ring_addr: 0x30,
        log_addr: None,
    };
    guest.frontend.get_vring_base(1).unwrap();
    assert!(guest.frontend.set_vring_addr(1, &bad).is_err());
    assert_serves_the_next(daemon, guest);
}
