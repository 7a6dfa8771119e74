//! A NIC on packet sockets. The interface is a tap whose other end, the wire, is the test's.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::daemon::{Daemon, await_true};
use crate::frame::{self, Parsed, UDP_CSUM_OFFSET, UDP_START};
use crate::guest::{Guest, HEADER_LEN, Received};
use crate::host::{Wire, configure, enter_namespace, open_tap};
use crate::traffic::payload;

const NIC: &str = "packet=tap0,mac=52:54:00:12:34:56";
const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const PEER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 9];
const PORTS: (u16, u16) = (4000, 5000);

/// Before each frame on the wire: the tap's header.
const WIRE_HEADER: usize = 10;

/// The wire's end.
fn wire() -> File {
    let fd = open_tap("tap0", 1).remove(0);
    // SAFETY: F_SETFL takes an integer.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    configure("tap0", 1500);
    File::from(fd)
}

/// A frame of the peer for the guest: what [`frame::udp`] sends, the other way round.
fn to_guest(mut frame: Vec<u8>) -> Vec<u8> {
    frame[..6].copy_from_slice(&GUEST_MAC);
    frame[6..12].copy_from_slice(&PEER_MAC);
    // No sum changes with the order of the addresses.
    let (source, destination) = frame[26..34].split_at_mut(4);
    source.swap_with_slice(destination);
    frame
}

fn put(wire: &mut File, header: [u8; WIRE_HEADER], frame: &[u8]) {
    let bytes = [&header[..], frame].concat();
    assert_eq!(wire.write(&bytes).unwrap(), bytes.len());
}

/// The next frame with an address of the peer.
fn take(wire: &mut File) -> Vec<u8> {
    let mut buffer = vec![0; 70_000];
    let mut found = None;
    await_true("a frame comes over the wire", || {
        match wire.read(&mut buffer) {
            Ok(len) if buffer[WIRE_HEADER..].starts_with(&PEER_MAC) => {
                found = Some(buffer[WIRE_HEADER..len].to_vec());
            }
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        found.is_some()
    });
    found.unwrap()
}

fn udp_payload(parsed: Parsed) -> Option<Vec<u8>> {
    match parsed {
        Parsed::Udp {
            destination_port: 5000,
            payload,
            ..
        } => Some(payload),
        _ => None,
    }
}

#[test]
fn guest_and_wire_exchange_frames() {
    if !enter_namespace() {
        return;
    }
    let mut wire = wire();
    let daemon = Daemon::with_nic(NIC);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    guest.supply(0, 64, 1536);
    for round in 0..100 {
        let data = payload(round, 1200);
        let sent = frame::udp(PEER_MAC, PORTS, &data);
        guest.send(0, &sent);
        assert_eq!(take(&mut wire), sent);
        put(&mut wire, [0; WIRE_HEADER], &to_guest(sent));
        let got = guest.receive(|_, parsed| udp_payload(parsed));
        assert_eq!(got, data, "round {round}");
    }
    // A frame whose checksum is left to the kernel.
    let data = payload(7, 1000);
    let mut header = [0; HEADER_LEN];
    header[..WIRE_HEADER].copy_from_slice(&unfinished(0));
    let unsummed = frame::udp_to_be_summed(PEER_MAC, PORTS, &data);
    guest.send_with(0, header, &unsummed);
    let sent = take(&mut wire);
    assert!(frame::has_right_udp_checksum(&sent));
    assert_eq!(sent[42..], data);
    assert!(daemon.terminate().success());
}

/// The header of a frame of UDP without checksum, to be cut into pieces of `segment_bytes` unless
/// that is 0.
fn unfinished(segment_bytes: u16) -> [u8; WIRE_HEADER] {
    let mut header = [0; WIRE_HEADER];
    header[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    if segment_bytes > 0 {
        header[1] = VIRTIO_NET_HDR_GSO_UDP_L4 as u8;
    }
    header[2..4].copy_from_slice(&42_u16.to_le_bytes());
    header[4..6].copy_from_slice(&segment_bytes.to_le_bytes());
    header[6..8].copy_from_slice(&UDP_START.to_le_bytes());
    header[8..10].copy_from_slice(&UDP_CSUM_OFFSET.to_le_bytes());
    header
}

#[test]
fn frame_that_the_driver_cannot_finish_is_finished_for_it() {
    if !enter_namespace() {
        return;
    }
    let mut wire = wire();
    let daemon = Daemon::with_nic(NIC);
    let plain = [VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF];
    let mut guest = Guest::connect_with(&daemon.socket(), 1, &plain);
    guest.supply(0, 64, 1536);
    let data = payload(3, 4500);
    let large = to_guest(frame::udp_to_be_summed(PEER_MAC, PORTS, &data));
    put(&mut wire, unfinished(1000), &large);
    let mut received: Vec<u8> = Vec::new();
    while received.len() < data.len() {
        let part = guest.receive(|received, parsed| {
            let part = udp_payload(parsed)?;
            assert_eq!(received.header[..WIRE_HEADER], [0; WIRE_HEADER]);
            assert!(frame::has_right_udp_checksum(&received.frame));
            Some(part)
        });
        received.extend(part);
    }
    assert_eq!(received, data);
}

#[test]
fn guest_does_not_see_what_the_host_sends_and_receives() {
    if !enter_namespace() {
        return;
    }
    let mut wire = wire();
    let daemon = Daemon::with_nic(NIC);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    guest.supply(0, 64, 1536);
    let host = Wire::new("tap0");
    let of = |to: [u8; 6], seed| {
        let mut frame = to_guest(frame::udp(PEER_MAC, PORTS, &payload(seed, 100)));
        frame[..6].copy_from_slice(&to);
        frame
    };
    host.send(&of(GUEST_MAC, 1));
    put(&mut wire, [0; WIRE_HEADER], &of(host.mac(), 2));
    put(&mut wire, [0; WIRE_HEADER], &of([0xff; 6], 3));
    let first = guest.receive(|_, parsed| udp_payload(parsed));
    assert_eq!(
        first,
        payload(3, 100),
        "the broadcast, and nothing before it"
    );
}

#[test]
fn packet_socket_is_an_uplink_of_a_switch() {
    if !enter_namespace() {
        return;
    }
    let mut wire = wire();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("net0.vu");
    let nic = format!(
        "id=net0,switch=s0,mac=52:54:00:12:34:56,socket={}",
        socket.display()
    );
    let uplink = "switch=s0,packet=tap0";
    let daemon = Daemon::start(dir, &["--nic", &nic, "--uplink", uplink]);
    let features = [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_HOST_USO,
    ];
    let mut guest = Guest::connect_with(&socket, 1, &features);
    guest.supply(0, 64, 1536);
    for round in 0..50 {
        let data = payload(round, 1200);
        let sent = frame::udp(PEER_MAC, PORTS, &data);
        guest.send(0, &sent);
        assert_eq!(take(&mut wire), sent);
        put(&mut wire, [0; WIRE_HEADER], &to_guest(sent));
        let got = guest.receive(|_, parsed| udp_payload(parsed));
        assert_eq!(got, data, "round {round}");
    }
    // A large datagram leaves in pieces.
    let data = payload(5, 2500);
    let mut header = [0; HEADER_LEN];
    header[..WIRE_HEADER].copy_from_slice(&unfinished(1000));
    guest.send_with(0, header, &frame::udp_to_be_summed(PEER_MAC, PORTS, &data));
    let pieces: Vec<Vec<u8>> = (0..3).map(|_| take(&mut wire)).collect();
    assert!(
        pieces
            .iter()
            .all(|piece| frame::has_right_udp_checksum(piece))
    );
    let payloads: Vec<&[u8]> = pieces.iter().map(|piece| &piece[42..]).collect();
    assert_eq!(payloads.concat(), data);
    assert!(daemon.terminate().success());
}

#[test]
fn vlans_are_tagged_on_the_wire_behind_a_packet_uplink() {
    if !enter_namespace() {
        return;
    }
    let mut wire = wire();
    let dir = tempfile::tempdir().unwrap();
    let sockets = ["plain", "ten"].map(|name| dir.path().join(format!("{name}.vu")));
    let nic = |id: &str, mac: &str, vlan: u32, socket: &Path| {
        let socket = socket.display();
        format!("id={id},switch=s0,mac={mac},vlan={vlan},socket={socket}")
    };
    let nics = [
        nic("plain", "52:54:00:12:34:57", 0, &sockets[0]),
        nic("ten", "52:54:00:12:34:56", 10, &sockets[1]),
    ];
    let uplink = "switch=s0,packet=tap0,vlan=0,trunk=all";
    let args = ["--nic", &nics[0], "--nic", &nics[1], "--uplink", uplink];
    let daemon = Daemon::start(dir, &args);
    let mut guests = sockets.each_ref().map(|socket| {
        let mut guest = Guest::connect(socket, 1);
        guest.supply(0, 64, 1536);
        guest
    });
    // The same bytes for everybody, each time in another VLAN: who gets them is told by the tag alone.
    let data = |round: u8| payload(round, 700);
    let broadcast = |round: u8, vlan: Option<u16>| {
        let mut frame = to_guest(frame::udp(PEER_MAC, PORTS, &data(round)));
        frame[..6].fill(0xff);
        with_tag(frame, vlan)
    };
    for (round, vlan) in [(0, Some(20)), (1, Some(10)), (2, None)] {
        put(&mut wire, [0; WIRE_HEADER], &broadcast(round, vlan));
    }
    let [plain, ten] = &mut guests;
    assert_eq!(ten.receive(|_, parsed| udp_payload(parsed)), data(1));
    assert_eq!(plain.receive(|_, parsed| udp_payload(parsed)), data(2));
    // A checksum that is left to be made is made where it is behind a tag.
    let unsummed = to_guest(frame::udp_to_be_summed(PEER_MAC, PORTS, &data(3)));
    let mut header = unfinished(0);
    for at in [2, 6] {
        header[at] += 4;
    }
    put(&mut wire, header, &with_tag(unsummed, Some(10)));
    let whole = ten.receive(|_, parsed| udp_payload(parsed));
    assert_eq!(whole, data(3));
    // Out: tagged, and as it is.
    let sent = frame::udp(PEER_MAC, PORTS, &data(4));
    ten.send(0, &sent);
    assert_eq!(take(&mut wire), with_tag(sent.clone(), Some(10)));
    let mut sent = sent;
    sent[6..12].copy_from_slice(&[0x52, 0x54, 0, 0x12, 0x34, 0x57]);
    // One that is tagged already would be in that VLAN outside.
    plain.send(0, &with_tag(sent.clone(), Some(10)));
    plain.send(0, &sent);
    assert_eq!(take(&mut wire), sent);
    assert!(daemon.terminate().success());
}

#[test]
fn tags_of_frames_for_the_guest_are_kept_and_so_are_its_own() {
    if !enter_namespace() {
        return;
    }
    let mut wire = wire();
    let daemon = Daemon::with_nic(NIC);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    guest.supply(0, 64, 1536);
    let tagged = |round: u8, vlan: Option<u16>| {
        let frame = to_guest(frame::udp(PEER_MAC, PORTS, &payload(round, 900)));
        with_tag(frame, vlan)
    };
    let from_peer =
        |received: &Received| (received.frame[6..12] == PEER_MAC).then(|| received.frame.clone());
    // With a priority; tagged twice; not at all; many that come together.
    let double = with_tag(tagged(1, Some(30)), Some(20));
    let mut frames = vec![tagged(0, Some(0xa00a)), double, tagged(2, None)];
    frames.extend((3..20).map(|round| tagged(round, (round % 3 > 0).then_some(round.into()))));
    for frame in &frames {
        put(&mut wire, [0; WIRE_HEADER], frame);
    }
    for (round, frame) in frames.iter().enumerate() {
        let received = guest.receive(|received, _| from_peer(received));
        assert!(
            received == *frame,
            "frame {round}: {:02x?}",
            &received[..22]
        );
    }
    // What the kernel left to be finished is found behind the tag.
    let unsummed = to_guest(frame::udp_to_be_summed(PEER_MAC, PORTS, &payload(7, 700)));
    let mut header = unfinished(0);
    for at in [2, 6] {
        header[at] += 4;
    }
    put(&mut wire, header, &with_tag(unsummed.clone(), Some(10)));
    let (received, received_header) =
        guest.receive(|received, _| Some((from_peer(received)?, received.header)));
    assert_eq!(received, with_tag(unsummed, Some(10)));
    let csum_start = u16::from_le_bytes([received_header[6], received_header[7]]);
    assert_eq!(csum_start, UDP_START + 4);
    // Large ones: the first by way of the daemon's memory, the others into the guest's buffers at once.
    let mut large = to_guest(frame::udp(PEER_MAC, PORTS, &payload(8, 9000)));
    // What stands there is TCP, as far as anybody looks.
    large[23] = libc::IPPROTO_TCP as u8;
    large[46] = 0x50;
    let mut header = unfinished(1000);
    header[1] = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
    header[2..4].copy_from_slice(&58_u16.to_le_bytes());
    header[6..8].copy_from_slice(&(UDP_START + 4).to_le_bytes());
    header[8..10].copy_from_slice(&16_u16.to_le_bytes());
    let able = [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
    ];
    drop(guest);
    let mut guest = Guest::connect_with(&daemon.socket(), 1, &able);
    guest.supply(0, 64, 1536);
    for round in 0..4 {
        put(
            &mut wire,
            header,
            &with_tag(large.clone(), Some(40 + round)),
        );
        let (received, received_header) =
            guest.receive(|received, _| Some((from_peer(received)?, received.header)));
        let expected = with_tag(large.clone(), Some(40 + round));
        assert!(
            received == expected,
            "large frame {round}: {} bytes, {:02x?}",
            received.len(),
            &received[..50]
        );
        assert_eq!(
            received_header[..WIRE_HEADER],
            header,
            "large frame {round}"
        );
    }
    // Its own.
    for vlan in [Some(10), None, Some(0x6fff)] {
        let sent = with_tag(frame::udp(PEER_MAC, PORTS, &payload(9, 600)), vlan);
        guest.send(0, &sent);
        assert_eq!(take(&mut wire), sent);
    }
    assert!(daemon.terminate().success());
}

/// The frame with a tag behind its addresses.
fn with_tag(mut frame: Vec<u8>, vlan: Option<u16>) -> Vec<u8> {
    if let Some(vlan) = vlan {
        let [high, low] = vlan.to_be_bytes();
        frame.splice(12..12, [0x81, 0, high, low]);
    }
    frame
}

#[test]
fn interface_that_does_not_exist_is_named() {
    if !enter_namespace() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("net0.vu");
    let output = crate::daemon::command(dir.path())
        .arg("--nic")
        .arg(format!(
            "id=net0,packet=nowhere,socket={}",
            socket.display()
        ))
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("no interface \"nowhere\""), "{text}");
    assert!(!socket.exists());
}

#[test]
fn sockets_of_another_kind_are_refused() {
    if !enter_namespace() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // SAFETY: socket takes no pointers, and its descriptor is owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)) };
    let fd = socket.as_raw_fd();
    let listening = dir.path().join("net0.vu");
    let output = crate::daemon::command(dir.path())
        .arg("--nic")
        .arg(format!(
            "id=net0,packet-fd={fd},socket={}",
            listening.display()
        ))
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("no packet socket"), "{text}");
}
