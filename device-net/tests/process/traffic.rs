//! Frames between guest and host.

use std::net::{SocketAddr, UdpSocket};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_UDP_L4,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::daemon::{DEADLINE, Daemon};
use crate::frame::{self, Parsed, UDP_CSUM_OFFSET, UDP_START};
use crate::guest::{Guest, HEADER_LEN, Received, USUAL};
use crate::host::{GUEST_IP, HOST_IP, configure, create_tap, enter_namespace, is_up};

pub(crate) const GUEST_PORT: u16 = 4000;
const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const NIC: &str = "tap=tap0,mac=52:54:00:12:34:56";

/// Buffers of the size that Linux uses where they are mergeable.
const MERGEABLE_LEN: u32 = 1536;

pub(crate) fn host_socket() -> UdpSocket {
    let socket = UdpSocket::bind((HOST_IP, 0)).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket
}

pub(crate) fn guest_address() -> SocketAddr {
    (GUEST_IP, GUEST_PORT).into()
}

pub(crate) fn payload(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ seed)
        .collect()
}

/// A datagram for the guest's port.
pub(crate) fn datagram(received: &Received, parsed: Parsed) -> Option<(Received, Vec<u8>)> {
    match parsed {
        Parsed::Udp {
            destination_port: GUEST_PORT,
            payload,
            ..
        } => {
            let Received {
                pair,
                header,
                num_buffers,
                ..
            } = *received;
            let frame = received.frame.clone();
            Some((
                Received {
                    pair,
                    header,
                    frame,
                    num_buffers,
                },
                payload,
            ))
        }
        _ => None,
    }
}

#[test]
fn ping_and_datagrams_pass_both_ways() {
    if !enter_namespace() {
        return;
    }
    let daemon = Daemon::with_nic(NIC);
    assert!(
        is_up("tap0"),
        "the daemon brings up the tap that it creates"
    );
    configure("tap0", 1500);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    guest.supply(0, 64, MERGEABLE_LEN);
    let host_mac = guest.find_host();

    let data = payload(1, 1000);
    guest.send(0, &frame::ping(host_mac, &data));
    guest.receive(|_, parsed| {
        (parsed
            == Parsed::EchoReply {
                payload: data.clone(),
            })
        .then_some(())
    });

    let host = host_socket();
    let host_port = host.local_addr().unwrap().port();
    // More than the ring has buffers, so that each is used again.
    for round in 0..200 {
        let data = payload(round, 1400);
        guest.send(0, &frame::udp(host_mac, (GUEST_PORT, host_port), &data));
        let mut buffer = [0; 2000];
        let (len, from) = host.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..len], from), (&data[..], guest_address()));
        host.send_to(&data, from).unwrap();
        let (_, back) = guest.receive(datagram);
        assert_eq!(back, data, "round {round}");
    }
    assert!(daemon.terminate().success());
}

#[test]
fn large_frame_is_spread_over_mergeable_buffers() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 1, 65521);
    let daemon = Daemon::with_nic(&format!("{NIC},mtu=65521"));
    let mut guest = Guest::connect(&daemon.socket(), 1);
    guest.supply(0, 100, MERGEABLE_LEN);
    let host = host_socket();
    for len in [1000, 10_000, 65_000, 65_000, 3, 40_000] {
        let data = payload(2, len);
        host.send_to(&data, guest_address()).unwrap();
        let (received, got) = guest.receive(datagram);
        assert_eq!(got, data);
        let total = HEADER_LEN + received.frame.len();
        let needed = total.div_ceil(MERGEABLE_LEN as usize) as u16;
        assert_eq!(received.num_buffers, needed, "for {len} bytes");
    }
}

#[test]
fn frame_waits_until_the_driver_has_supplied_enough_buffers() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 1, 65521);
    let daemon = Daemon::with_nic(NIC);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    guest.supply(0, 4, MERGEABLE_LEN);
    let host = host_socket();
    // Answers ARP first; the frame after it needs more than there is.
    let small = payload(3, 100);
    host.send_to(&small, guest_address()).unwrap();
    assert_eq!(guest.receive(datagram).1, small);
    let large = payload(4, 20_000);
    host.send_to(&large, guest_address()).unwrap();
    for _ in 0..10 {
        assert!(
            guest
                .try_receive(0)
                .is_none_or(|received| received.num_buffers == 1)
        );
        guest.supply(0, 1, MERGEABLE_LEN);
    }
    assert_eq!(guest.receive(datagram).1, large);
}

#[test]
fn without_mergeable_buffers_a_frame_that_fits_none_is_dropped_and_the_next_arrives() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 1, 9000);
    let daemon = Daemon::with_nic(NIC);
    let features = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX];
    let mut guest = Guest::connect_with(&daemon.socket(), 1, &features);
    guest.supply(0, 16, MERGEABLE_LEN);
    let host = host_socket();
    host.send_to(&payload(5, 100), guest_address()).unwrap();
    guest.receive(datagram);
    host.send_to(&payload(6, 5000), guest_address()).unwrap();
    let fits = payload(7, 1400);
    host.send_to(&fits, guest_address()).unwrap();
    let (received, got) = guest.receive(datagram);
    assert_eq!((got, received.num_buffers), (fits, 1));
}

#[test]
fn checksums_are_left_to_whoever_agreed() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 1, 1500);
    let daemon = Daemon::with_nic(NIC);
    let host = host_socket();
    let host_port = host.local_addr().unwrap().port();

    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert!(guest.has(VIRTIO_NET_F_CSUM) && guest.has(VIRTIO_NET_F_GUEST_CSUM));
    guest.supply(0, 64, MERGEABLE_LEN);
    let host_mac = guest.find_host();
    let data = payload(8, 777);
    let frame = frame::udp_to_be_summed(host_mac, (GUEST_PORT, host_port), &data);
    guest.send_with(0, csum_header(), &frame);
    let mut buffer = [0; 2000];
    let (len, from) = host.recv_from(&mut buffer).unwrap();
    assert_eq!(buffer[..len], data);
    host.send_to(&data, from).unwrap();
    let (received, _) = guest.receive(datagram);
    assert_eq!(received.header[0], NEEDS_CSUM, "left to the driver");
    guest.hang_up();

    let plain = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX];
    let mut guest = Guest::connect_with(&daemon.socket(), 1, &plain);
    guest.supply(0, 64, MERGEABLE_LEN);
    // A header that asks for what was not negotiated: dropped.
    guest.send_with(0, csum_header(), &frame);
    host.send_to(&data, from).unwrap();
    let (received, _) = guest.receive(datagram);
    assert_eq!(received.header[0], 0);
    assert!(frame::has_right_udp_checksum(&received.frame));
    host.set_nonblocking(true).unwrap();
    assert!(
        host.recv_from(&mut buffer).is_err(),
        "the frame was dropped"
    );
}

fn csum_header() -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[0] = NEEDS_CSUM;
    header[6..8].copy_from_slice(&UDP_START.to_le_bytes());
    header[8..10].copy_from_slice(&UDP_CSUM_OFFSET.to_le_bytes());
    header
}

#[test]
fn one_large_frame_becomes_several_datagrams_and_the_other_way_round() {
    const SEGMENT: u16 = 1000;
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 1, 1500);
    let daemon = Daemon::with_nic(NIC);
    let uso = [
        VIRTIO_NET_F_HOST_USO,
        VIRTIO_NET_F_GUEST_USO4,
        VIRTIO_NET_F_GUEST_USO6,
    ];
    let mut guest = Guest::connect_with(&daemon.socket(), 1, &[USUAL, &uso].concat());
    if !guest.has(VIRTIO_NET_F_HOST_USO) {
        eprintln!("skipped: this kernel's tap does not segment UDP (Linux 6.2)");
        return;
    }
    guest.supply(0, 100, MERGEABLE_LEN);
    let host_mac = guest.find_host();
    let host = host_socket();
    let host_port = host.local_addr().unwrap().port();

    let data = payload(9, 5 * usize::from(SEGMENT));
    let frame = frame::udp_to_be_summed(host_mac, (GUEST_PORT, host_port), &data);
    let mut header = csum_header();
    header[1] = VIRTIO_NET_HDR_GSO_UDP_L4 as u8;
    header[2..4].copy_from_slice(&42_u16.to_le_bytes());
    header[4..6].copy_from_slice(&SEGMENT.to_le_bytes());
    guest.send_with(0, header, &frame);
    for segment in data.chunks(usize::from(SEGMENT)) {
        let mut buffer = [0; 9000];
        let (len, _) = host.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], segment);
    }

    set_segment_size(&host, SEGMENT);
    host.send_to(&data, guest_address()).unwrap();
    let (received, got) = guest.receive(datagram);
    assert_eq!(got, data, "one frame for all segments");
    assert_eq!(received.header[1], VIRTIO_NET_HDR_GSO_UDP_L4 as u8);
    assert_eq!(received.header[4..6], SEGMENT.to_le_bytes());
}

fn set_segment_size(socket: &UdpSocket, len: u16) {
    use std::os::fd::AsRawFd;
    let value = libc::c_int::from(len);
    // SAFETY: UDP_SEGMENT reads one live int.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn traffic_goes_on_after_the_daemon_is_killed() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 1, 1500);
    let mut daemon = Daemon::with_nic(NIC);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    guest.supply(0, 64, MERGEABLE_LEN);
    let host_mac = guest.find_host();
    let host = host_socket();
    let host_port = host.local_addr().unwrap().port();
    for round in 0..5 {
        let data = payload(round, 900);
        host.send_to(&data, guest_address()).unwrap();
        assert_eq!(guest.receive(datagram).1, data);
        daemon = daemon.crash_and_restart(NIC);
        guest = guest.reconnect(&daemon.socket(), 1);
        guest.send(0, &frame::udp(host_mac, (GUEST_PORT, host_port), &data));
        let mut buffer = [0; 2000];
        let (len, _) = host.recv_from(&mut buffer).unwrap();
        assert_eq!(buffer[..len], data);
    }
    // No buffer was lost on the way: the ring still takes as many frames as were supplied.
    for round in 0..64 {
        host.send_to(&payload(round, 300), guest_address()).unwrap();
    }
    for round in 0..64 {
        assert_eq!(guest.receive(datagram).1, payload(round, 300));
    }
}
