//! Several queue pairs, and rings that come and go.

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_MQ,
    VIRTIO_NET_OK,
};

use crate::daemon::{Daemon, await_true};
use crate::frame;
use crate::guest::{Guest, RING_SIZE};
use crate::host::{create_tap, enter_namespace};
use crate::traffic::{datagram, guest_address, host_socket, payload};

const NIC: &str = "tap=tap0,mac=52:54:00:12:34:56";
const TWO_PAIRS: &str = "tap=tap0,mac=52:54:00:12:34:56,queue-pairs=2";
const GUEST_PORT: u16 = 4000;

fn set_pairs(guest: &mut Guest, pairs: u16) -> u32 {
    let mut command = vec![
        VIRTIO_NET_CTRL_MQ as u8,
        VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8,
    ];
    command.extend(pairs.to_le_bytes());
    u32::from(guest.command(&command))
}

#[test]
fn answers_come_on_the_pair_that_asked() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 2, 1500);
    let mut daemon = Daemon::with_nic(TWO_PAIRS);
    let mut guest = Guest::connect(&daemon.socket(), 2);
    assert!(guest.has(VIRTIO_NET_F_MQ));
    guest.supply(0, 64, 1536);
    guest.supply(1, 64, 1536);
    assert_eq!(set_pairs(&mut guest, 2), VIRTIO_NET_OK);
    let host_mac = guest.find_host();
    let host = host_socket();
    let host_port = host.local_addr().unwrap().port();
    let echo_on = |guest: &mut Guest, pair: usize, data: &[u8]| {
        guest.send(pair, &frame::udp(host_mac, (GUEST_PORT, host_port), data));
        let mut buffer = [0; 2000];
        let (len, from) = host.recv_from(&mut buffer).unwrap();
        host.send_to(&buffer[..len], from).unwrap();
        let (received, got) = guest.receive(datagram);
        assert_eq!(got, data);
        received.pair
    };
    await_true("the second pair takes part", || {
        echo_on(&mut guest, 1, b"warm-up") == 1
    });
    for round in 0..20 {
        let pair = usize::from(round % 2);
        // The kernel learns the pair from the first frame; the second's answer must follow.
        echo_on(&mut guest, pair, &payload(round, 500));
        assert_eq!(echo_on(&mut guest, pair, &payload(round, 501)), pair);
    }

    // The driver goes back to one pair: nothing may be put where it does not look.
    assert_eq!(set_pairs(&mut guest, 1), VIRTIO_NET_OK);
    assert_eq!(
        echo_on(&mut guest, 1, b"sent on the other pair all the same"),
        0
    );
    assert_eq!(set_pairs(&mut guest, 3), VIRTIO_NET_ERR);
    assert_eq!(set_pairs(&mut guest, 0), VIRTIO_NET_ERR);

    // A successor is not told the number of pairs again, but finds buffers on both.
    assert_eq!(set_pairs(&mut guest, 2), VIRTIO_NET_OK);
    daemon = daemon.crash_and_restart(TWO_PAIRS);
    guest = guest.reconnect(&daemon.socket(), 2);
    await_true("answers come on the second pair again", || {
        echo_on(&mut guest, 1, b"again") == 1
    });
}

#[test]
fn frames_go_to_the_first_pair_while_the_second_has_no_buffers() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 2, 1500);
    let daemon = Daemon::with_nic(TWO_PAIRS);
    let mut guest = Guest::connect(&daemon.socket(), 2);
    guest.supply(0, 64, 1536);
    let _ = guest.find_host();
    // Many flows, which the kernel would spread over both queues.
    for round in 0..32 {
        let data = payload(round, 200);
        host_socket().send_to(&data, guest_address()).unwrap();
        let (received, got) = guest.receive(datagram);
        assert_eq!((received.pair, got), (0, data));
    }
}

#[test]
fn stopped_ring_gives_back_the_buffers_that_wait() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 1, 1500);
    let daemon = Daemon::with_nic(NIC);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    guest.supply(0, 32, 1536);
    let host = host_socket();
    host.send_to(b"one", guest_address()).unwrap();
    guest.receive(datagram);
    for _ in 0..3 {
        let base = guest.frontend.get_vring_base(0).unwrap();
        assert_eq!(
            base,
            u32::from(guest.machine.rings[0].used_idx()),
            "no buffer is kept"
        );
        guest.start(0);
        host.send_to(b"another", guest_address()).unwrap();
        assert_eq!(guest.receive(datagram).1, b"another");
    }
}

#[test]
fn disabled_ring_takes_no_frames_until_it_is_enabled() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 1, 1500);
    let daemon = Daemon::with_nic(NIC);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    guest.supply(0, 32, 1536);
    let host = host_socket();
    host.send_to(b"before", guest_address()).unwrap();
    guest.receive(datagram);
    guest.frontend.set_vring_enable(0, false).unwrap();
    let used_idx = guest.machine.rings[0].used_idx();
    let host_mac_known = host.send_to(b"meanwhile", guest_address());
    host_mac_known.unwrap();
    // Sending still works, and shows that the daemon had its turn.
    for _ in 0..10 {
        guest.send(0, &frame::arp_request());
    }
    assert_eq!(guest.machine.rings[0].used_idx(), used_idx);
    guest.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(
        guest.receive(datagram).1,
        b"meanwhile",
        "it waited in the tap"
    );
}

#[test]
fn burst_of_a_full_ring_is_sent_completely() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 1, 1500);
    let daemon = Daemon::with_nic(NIC);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    guest.supply(0, 32, 1536);
    let host_mac = guest.find_host();
    let host = host_socket();
    let host_port = host.local_addr().unwrap().port();
    let mut received = 0;
    for _ in 0..4 {
        let at = 20 << 20;
        let frame = frame::udp(host_mac, (GUEST_PORT, host_port), b"burst");
        guest.machine.memory.write(at, &[0; 12]);
        guest.machine.memory.write(at + 12, &frame);
        for _ in 0..RING_SIZE {
            let buffer = [(at, 12 + frame.len() as u32)];
            guest.machine.rings[1].add(&buffer, &[]).unwrap();
        }
        guest.kick(1);
        let mut done = 0;
        await_true("all frames are sent", || {
            while guest.machine.rings[1].pop_used().is_some() {
                done += 1;
            }
            done == RING_SIZE
        });
        let mut buffer = [0; 64];
        for _ in 0..RING_SIZE {
            assert_eq!(host.recv(&mut buffer).unwrap(), 5);
            received += 1;
        }
    }
    assert_eq!(received, 4 * u32::from(RING_SIZE));
}
