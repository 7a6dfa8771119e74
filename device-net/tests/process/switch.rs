//! Frames between guests on one switch.

mod injected;
mod kills;

use std::path::PathBuf;
use std::time::Instant;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::daemon::{DEADLINE, Daemon, await_true};
use crate::frame::{self, UDP_CSUM_OFFSET, UDP_START};
use crate::guest::{Guest, HEADER_LEN, Received, USUAL};
use crate::host::{create_tap, enter_namespace};
use crate::traffic::{GUEST_PORT, datagram, guest_address, host_socket, payload};

/// Buffers of the size that Linux uses where they are mergeable.
const MERGEABLE_LEN: u32 = 1536;

const BROADCAST: [u8; 6] = [0xff; 6];

/// Ports of one switch, each with an address of its own.
struct Ports {
    daemon: Daemon,
    count: usize,
}

impl Ports {
    /// `rest` continues the specification of each.
    fn new(rest: &[&str]) -> Ports {
        Self::with(rest, &[])
    }

    /// With further options of the daemon.
    fn with(rest: &[&str], options: &[&str]) -> Ports {
        let dir = tempfile::tempdir().unwrap();
        let specs: Vec<String> = rest
            .iter()
            .enumerate()
            .map(|(number, rest)| {
                let socket = dir.path().join(format!("port{number}.vu"));
                let mac = text(mac(number));
                let socket = socket.display();
                format!("id=port{number},switch=s0,mac={mac},socket={socket}{rest}")
            })
            .collect();
        let nics = specs.iter().flat_map(|spec| ["--nic", spec]);
        let args: Vec<&str> = nics.chain(options.iter().copied()).collect();
        let daemon = Daemon::start(dir, &args);
        Ports {
            daemon,
            count: rest.len(),
        }
    }

    fn socket(&self, number: usize) -> PathBuf {
        self.daemon.dir().join(format!("port{number}.vu"))
    }

    /// A guest at each, with buffers.
    fn guests(&self) -> Vec<Guest> {
        (0..self.count)
            .map(|number| self.guest(number, USUAL))
            .collect()
    }

    fn guest(&self, number: usize, features: &[u32]) -> Guest {
        let mut guest = Guest::connect_with(&self.socket(number), 1, features);
        guest.supply(0, 200, MERGEABLE_LEN);
        guest
    }
}

fn mac(number: usize) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, number as u8 + 1]
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|octet| format!("{octet:02x}")).join(":")
}

fn ethernet(target: [u8; 6], source: [u8; 6], payload: &[u8]) -> Vec<u8> {
    [&target[..], &source, &[0x88, 0xb5], payload].concat()
}

fn tagged(target: [u8; 6], source: [u8; 6], tag: u16, payload: &[u8]) -> Vec<u8> {
    let tag = tag.to_be_bytes();
    [
        &target[..],
        &source,
        &[0x81, 0],
        &tag,
        &[0x88, 0xb5],
        payload,
    ]
    .concat()
}

/// The next frame; `from` sends meanwhile nothing.
#[track_caller]
fn next(guest: &mut Guest) -> Received {
    let mut received = None;
    await_true("a frame comes", || {
        received = guest.try_receive(0);
        received.is_some()
    });
    received.unwrap()
}

/// `send` makes nothing come to `guest`: what `marker` sends afterwards comes first.
#[track_caller]
fn assert_nothing(guest: &mut Guest, marker: &mut Guest, frame: &[u8]) {
    marker.send(0, frame);
    assert_eq!(next(guest).frame, frame);
}

#[test]
fn frames_go_to_the_port_that_has_the_address_and_to_no_other() {
    let ports = Ports::new(&["", "", ""]);
    let mut guests = ports.guests();
    for (round, len) in [46, 50, 200, 1486, 1500, 1537, 4000, 65000]
        .into_iter()
        .enumerate()
    {
        let frame = ethernet(mac(1), mac(0), &payload(round as u8, len));
        guests[0].send(0, &frame);
        let received = next(&mut guests[1]);
        assert_eq!(received.frame, frame, "{len}");
        assert_eq!(received.header[..10], [0; 10]);
        assert_eq!(
            usize::from(received.num_buffers),
            (frame.len() + HEADER_LEN).div_ceil(MERGEABLE_LEN as usize)
        );
    }
    let [_, first, third] = &mut guests[..] else {
        unreachable!()
    };
    assert_nothing(third, first, &ethernet(mac(2), mac(1), b"only this"));
}

#[test]
fn broadcasts_and_unknown_addresses_reach_everybody_until_they_are_learnt() {
    let ports = Ports::new(&["", "", ""]);
    let mut guests = ports.guests();
    let made_up = [0x02, 0, 0, 0, 9, 9];
    for target in [BROADCAST, [0x01, 0, 0x5e, 0, 0, 1], made_up] {
        let frame = ethernet(target, mac(0), &payload(1, 100));
        guests[0].send(0, &frame);
        assert_eq!(next(&mut guests[1]).frame, frame);
        assert_eq!(next(&mut guests[2]).frame, frame);
    }
    // Behind port 2, as from a bridge in the guest.
    let hello = ethernet(mac(0), made_up, b"here I am");
    guests[2].send(0, &hello);
    assert_eq!(next(&mut guests[0]).frame, hello);
    let frame = ethernet(made_up, mac(0), b"to you alone");
    guests[0].send(0, &frame);
    assert_eq!(next(&mut guests[2]).frame, frame);
    let [first, second, _] = &mut guests[..] else {
        unreachable!()
    };
    assert_nothing(second, first, &ethernet(mac(1), mac(0), b"nothing before"));
}

#[test]
fn address_of_another_port_is_not_taken_over() {
    let ports = Ports::new(&["", "", ""]);
    let mut guests = ports.guests();
    let spoofed = ethernet(mac(2), mac(1), b"I am port 1");
    guests[0].send(0, &spoofed);
    let frame = ethernet(mac(1), mac(2), b"to port 1");
    guests[2].send(0, &frame);
    assert_eq!(next(&mut guests[1]).frame, frame);
    let [_, second, third] = &mut guests[..] else {
        unreachable!()
    };
    assert_nothing(third, second, &ethernet(mac(2), mac(1), b"the real one"));
}

#[test]
fn vlans_are_kept_apart_and_a_trunk_carries_them_tagged() {
    let ports = Ports::new(&[
        ",vlan=10",
        ",vlan=20",
        ",vlan=10",
        ",vlan=1,trunk=10,trunk=20",
        "",
    ]);
    let mut guests = ports.guests();
    let data = payload(3, 90);
    guests[0].send(0, &ethernet(BROADCAST, mac(0), &data));
    assert_eq!(
        next(&mut guests[2]).frame,
        ethernet(BROADCAST, mac(0), &data)
    );
    assert_eq!(
        next(&mut guests[3]).frame,
        tagged(BROADCAST, mac(0), 10, &data)
    );
    // From the trunk, with a priority, to where the tag says.
    guests[3].send(0, &tagged(mac(1), mac(3), 0xe000 | 20, &data));
    assert_eq!(next(&mut guests[1]).frame, ethernet(mac(1), mac(3), &data));
    // Untagged from the trunk is VLAN 1, which nobody else has; 30 is not carried; an access port
    // takes no tags; inside 10 a tag within the tag does not come out.
    guests[3].send(0, &ethernet(BROADCAST, mac(3), &data));
    guests[3].send(0, &tagged(BROADCAST, mac(3), 30, &data));
    guests[0].send(0, &tagged(BROADCAST, mac(0), 20, &data));
    let mut nested = tagged(BROADCAST, mac(3), 10, &[]);
    nested[16..].copy_from_slice(&[0x81, 0]);
    nested.extend([0, 20, 0x88, 0xb5]);
    nested.extend(&data);
    guests[3].send(0, &nested);
    let [a, b, c, trunk, _] = &mut guests[..] else {
        unreachable!()
    };
    assert_nothing(a, c, &ethernet(mac(0), mac(2), b"in 10"));
    trunk.send(0, &tagged(mac(1), mac(3), 20, b"in 20"));
    assert_eq!(next(b).frame, ethernet(mac(1), mac(3), b"in 20"));
    a.send(0, &ethernet(mac(2), mac(0), b"in 10 again"));
    assert_eq!(next(c).frame, ethernet(mac(2), mac(0), b"in 10 again"));
}

#[test]
fn receiver_without_offloads_gets_finished_frames() {
    let ports = Ports::new(&["", ""]);
    let sender = [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_HOST_USO,
    ];
    let mut from = ports.guest(0, &sender);
    let plain = [VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF];
    let mut to = ports.guest(1, &plain);
    // A checksum.
    let mut header = [0; HEADER_LEN];
    header[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    header[6..8].copy_from_slice(&UDP_START.to_le_bytes());
    header[8..10].copy_from_slice(&UDP_CSUM_OFFSET.to_le_bytes());
    let mut datagram = frame::udp_to_be_summed(mac(1), (4000, 4001), &payload(1, 333));
    datagram[6..12].copy_from_slice(&mac(0));
    from.send_with(0, header, &datagram);
    let received = next(&mut to);
    assert_eq!(received.header[..10], [0; 10]);
    assert!(frame::has_right_udp_checksum(&received.frame));
    // Segmentation.
    let data = payload(2, 2500);
    let mut large = frame::udp_to_be_summed(mac(1), (4000, 4001), &data);
    large[6..12].copy_from_slice(&mac(0));
    header[1] = VIRTIO_NET_HDR_GSO_UDP_L4 as u8;
    header[4..6].copy_from_slice(&1000_u16.to_le_bytes());
    from.send_with(0, header, &large);
    let mut got = Vec::new();
    for len in [1000, 1000, 500] {
        let received = next(&mut to);
        assert_eq!(received.frame.len(), 42 + len);
        assert!(frame::has_right_udp_checksum(&received.frame));
        got.extend_from_slice(&received.frame[42..]);
    }
    assert_eq!(got, data);
    // A receiver that can finish it gets it as it is.
    drop(to);
    let able = [
        VIRTIO_F_VERSION_1,
        VIRTIO_NET_F_MRG_RXBUF,
        virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM,
        virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_USO4,
        virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_USO6,
    ];
    let mut to = ports.guest(1, &able);
    from.send_with(0, header, &large);
    let received = next(&mut to);
    assert_eq!(received.header[..10], header[..10]);
    assert_eq!(received.frame, large);
}

#[test]
fn full_receiver_loses_frames_and_nobody_waits() {
    let ports = Ports::new(&["", "", ""]);
    let mut sender = ports.guest(0, USUAL);
    let mut other = ports.guest(2, USUAL);
    // Eight buffers, and nobody empties them.
    let mut full = Guest::connect(&ports.socket(1), 1);
    full.supply(0, 8, MERGEABLE_LEN);
    let started = Instant::now();
    for round in 0..100 {
        sender.send(0, &ethernet(mac(1), mac(0), &payload(round, 60)));
    }
    assert!(started.elapsed() < DEADLINE / 4, "the sender was held up");
    sender.send(0, &ethernet(mac(2), mac(0), b"others are served"));
    assert_eq!(next(&mut other).frame[14..], *b"others are served");
    for round in 0..8 {
        assert_eq!(next(&mut full).frame[14..], payload(round, 60));
    }
    sender.send(0, &ethernet(mac(1), mac(0), b"room again"));
    assert_eq!(next(&mut full).frame[14..], *b"room again");
}

#[test]
fn ports_come_and_go_while_others_send() {
    let ports = Ports::new(&["", "", ""]);
    let mut sender = ports.guest(0, USUAL);
    let mut bystander = ports.guest(2, USUAL);
    for round in 0..20 {
        let mut guest = ports.guest(1, USUAL);
        let frame = ethernet(mac(1), mac(0), &payload(round, 700));
        sender.send(0, &frame);
        assert_eq!(next(&mut guest).frame, frame, "round {round}");
        drop(guest.hang_up());
        // Into nowhere, until the daemon notices and afterwards.
        for _ in 0..5 {
            sender.send(0, &frame);
        }
        let frame = ethernet(mac(2), mac(0), &payload(round, 80));
        sender.send(0, &frame);
        assert_eq!(next(&mut bystander).frame, frame);
    }
}

#[test]
fn hostile_receiver_loses_its_ring_and_nobody_elses() {
    let ports = Ports::new(&["", "", ""]);
    let mut sender = ports.guest(0, USUAL);
    let mut bystander = ports.guest(2, USUAL);
    type Hostility = fn(&mut Guest);
    let hostilities: [Hostility; 4] = [
        |guest| guest.machine.rings[0].set_avail_idx(5000),
        |guest| guest.machine.rings[0].push_avail(60_000),
        // The same head again and again.
        |guest| (0..20).for_each(|_| guest.machine.rings[0].push_avail(3)),
        // Buffers outside of memory, readable ones, loops.
        |guest| {
            guest.machine.rings[0].set_desc(0, u64::MAX - 5, 4096, 2, 0);
            guest.machine.rings[0].set_desc(1, 0x1000, 4096, 0, 0);
            guest.machine.rings[0].set_desc(2, 0x1000, 64, 3, 2);
            (0..3).for_each(|head| guest.machine.rings[0].push_avail(head));
        },
    ];
    for (kind, hostility) in hostilities.into_iter().enumerate() {
        let mut hostile = Guest::connect(&ports.socket(1), 1);
        hostility(&mut hostile);
        for _ in 0..30 {
            sender.send(0, &ethernet(mac(1), mac(0), &payload(1, 300)));
        }
        let frame = ethernet(mac(2), mac(0), &payload(kind as u8, 80));
        sender.send(0, &frame);
        assert_eq!(next(&mut bystander).frame, frame, "kind {kind}");
        drop(hostile.hang_up());
        let mut honest = ports.guest(1, USUAL);
        sender.send(0, &ethernet(mac(1), mac(0), b"hello again"));
        assert_eq!(
            next(&mut honest).frame[14..],
            *b"hello again",
            "kind {kind}"
        );
    }
}

#[test]
fn successor_of_a_daemon_goes_on_with_the_same_rings() {
    let dir = tempfile::tempdir().unwrap();
    let specs = |dir: &std::path::Path| {
        [0, 1].map(|number| {
            let socket = dir.join(format!("port{number}.vu"));
            let (mac, socket) = (text(mac(number)), socket.display());
            format!("id=port{number},switch=s0,mac={mac},socket={socket}")
        })
    };
    let sockets = [0, 1].map(|number| dir.path().join(format!("port{number}.vu")));
    let args = specs(dir.path());
    let args = ["--nic", &args[0], "--nic", &args[1]];
    let mut daemon = Daemon::start(dir, &args);
    let mut guests = sockets.each_ref().map(|socket| {
        let mut guest = Guest::connect(socket, 1);
        guest.supply(0, 100, MERGEABLE_LEN);
        guest
    });
    for round in 0..3 {
        let frame = ethernet(mac(1), mac(0), &payload(round, 600));
        guests[0].send(0, &frame);
        assert_eq!(next(&mut guests[1]).frame, frame);
        daemon = daemon.crash_and_start(&args);
        let [first, second] = guests;
        guests = [
            first.reconnect(&sockets[0], 1),
            second.reconnect(&sockets[1], 1),
        ];
    }
    drop(daemon);
}

#[test]
fn duplicate_address_is_refused_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let spec = |number: usize| {
        let socket = dir.path().join(format!("port{number}.vu"));
        format!(
            "id=port{number},switch=s0,mac=52:54:00:00:00:01,socket={}",
            socket.display()
        )
    };
    let output = crate::daemon::command(dir.path())
        .args(["--nic", &spec(0), "--nic", &spec(1)])
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("52:54:00:00:00:01 is the address of another port of switch \"s0\""),
        "{said}"
    );
    // The process could not remove its files any more; its sweeper does.
    await_true("no socket is left behind", || {
        std::fs::read_dir(dir.path()).unwrap().next().is_none()
    });
}

#[test]
fn uplink_leads_to_the_host_and_back() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 1, 65521);
    let dir = tempfile::tempdir().unwrap();
    let sockets = [0, 1].map(|number| dir.path().join(format!("port{number}.vu")));
    let nics = sockets.each_ref().map(|socket| {
        // The guest that talks to the host has the address that its frames name.
        let mac = match socket == &sockets[0] {
            true => "52:54:00:12:34:56".to_owned(),
            false => text(mac(1)),
        };
        let number = usize::from(socket == &sockets[1]);
        format!(
            "id=port{number},switch=s0,mac={mac},socket={}",
            socket.display()
        )
    });
    let args = [
        "--nic",
        &nics[0],
        "--nic",
        &nics[1],
        "--uplink",
        "switch=s0,tap=tap0",
    ];
    let daemon = Daemon::start(dir, &args);
    let mut other = Guest::connect(&sockets[1], 1);
    other.supply(0, 100, MERGEABLE_LEN);
    let mut guest = Guest::connect(&sockets[0], 1);
    guest.supply(0, 200, MERGEABLE_LEN);
    let host_mac = guest.find_host();
    let host = host_socket();
    let host_port = host.local_addr().unwrap().port();
    // From the host with what it left to be finished, and whole.
    for (round, len) in [100, 1400, 20_000, 60_000].into_iter().enumerate() {
        let data = payload(round as u8, len);
        let small = &data[..len.min(1400)];
        guest.send(0, &frame::udp(host_mac, (GUEST_PORT, host_port), small));
        let mut buffer = [0; 2000];
        let (len, from) = host.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..len], from), (small, guest_address()));
        host.send_to(&data, from).unwrap();
        let (_, back) = guest.receive(datagram);
        assert_eq!(back, data, "round {round}");
    }
    // The other guest saw the question for everybody, and nothing that was for one of them.
    let question = next(&mut other);
    assert_eq!(question.frame[..6], BROADCAST);
    let frame = ethernet(mac(1), [0x52, 0x54, 0, 0x12, 0x34, 0x56], b"guest to guest");
    guest.send(0, &frame);
    loop {
        let received = next(&mut other);
        if received.frame == frame {
            break;
        }
        assert!(
            received.frame[0] & 1 != 0,
            "{received:?} was not for this guest"
        );
    }
    assert!(daemon.terminate().success());
}
