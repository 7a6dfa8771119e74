//! A guest that poses as somebody else.

use super::*;

const ROUTER: &str = "fe80::1";
/// Made of the guest's MAC.
const LINK_LOCAL: &str = "fe80::5054:ff:fe00:1";

fn identity() -> AntiSpoofing {
    AntiSpoofing {
        macs: vec![GUEST_MAC.parse().unwrap()],
        addresses: Some(vec![GUEST.parse().unwrap(), GUEST_V6.parse().unwrap()]),
        ..AntiSpoofing::default()
    }
}

fn guarded(identity: AntiSpoofing) -> Bench {
    Bench::new(&Policy {
        anti_spoofing: Some(identity),
        ..Policy::default()
    })
}

fn from_guest(source: &str, destination: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    ip_from(GUEST_MAC, PEER_MAC, source, destination, protocol, payload)
}

#[test]
fn guest_sends_as_itself() {
    let bench = guarded(identity());
    bench.passes(Egress, &udp(GUEST, 1, PEER, 2));
    bench.passes(Egress, &tcp(GUEST_V6, 1, PEER_V6, 2, SYN));
    bench.passes(
        Egress,
        &from_guest(LINK_LOCAL, PEER_V6, 17, &udp_datagram(1, 2)),
    );
    bench.passes(Egress, &tagged(&udp(GUEST, 1, PEER, 2), 5));
    bench.passes(Egress, &ethernet(GUEST_MAC, PEER_MAC, 0x1234, &[]));
    assert_eq!(bench.gate.num_flows(), 0);
}

#[test]
fn other_macs_are_dropped() {
    let bench = guarded(identity());
    let payload = udp_datagram(1, 2);
    let spoofed = ip_from(PEER_MAC, PEER_MAC, GUEST, PEER, 17, &payload);
    bench.drops(Egress, &spoofed, DropReason::MacSpoofed);
    bench.drops(
        Egress,
        &ethernet(PEER_MAC, GUEST_MAC, 0x1234, &[]),
        DropReason::MacSpoofed,
    );
    // What comes in may be from anybody.
    bench.passes(Ingress, &spoofed);
    let bpdu = ethernet(GUEST_MAC, "01:80:c2:00:00:00", 38, &[0x42, 0x42, 3]);
    bench.drops(Egress, &bpdu, DropReason::LinkControl);
}

#[test]
fn other_addresses_are_dropped_behind_tags_as_well() {
    let bench = guarded(identity());
    let payload = udp_datagram(1, 2);
    for source in [PEER, "0.0.0.0", "255.255.255.255", "127.0.0.1"] {
        let frame = from_guest(source, "10.0.0.1", 17, &payload);
        for frame in [
            frame.clone(),
            tagged(&frame, 3),
            tagged(&tagged(&frame, 3), 4),
        ] {
            bench.drops(Egress, &frame, DropReason::AddressSpoofed);
        }
    }
    for source in [PEER_V6, "::", "::1", ROUTER, "ff02::1"] {
        let frame = from_guest(source, "2001:db8::1", 17, &payload);
        bench.drops(Egress, &frame, DropReason::AddressSpoofed);
    }
    // More tags than are looked behind.
    let hidden = tagged(&tagged(&tagged(&udp(PEER, 1, GUEST, 2), 1), 2), 3);
    let hidden = [&mac(PEER_MAC)[..], &mac(GUEST_MAC), &hidden[12..]].concat();
    bench.drops(Egress, &hidden, DropReason::Malformed);
}

#[test]
fn guests_without_an_address_can_get_one() {
    let bench = guarded(identity());
    let payload = udp_datagram(68, 67);
    bench.passes(
        Egress,
        &from_guest("0.0.0.0", "255.255.255.255", 17, &payload),
    );
    bench.passes(Egress, &arp(GUEST_MAC, 1, GUEST_MAC, "0.0.0.0", GUEST));
    bench.passes(Egress, &neighbour("::", 135, GUEST_V6, None));
    bench.passes(Egress, &neighbour("::", 133, "::", None));
    let report = [143, 0, 0, 0, 0, 0, 0, 0];
    let hop_by_hop = [&[58, 0, 5, 2, 0, 0, 1, 0], &report[..]].concat();
    bench.passes(Egress, &from_guest("::", "ff02::16", 0, &hop_by_hop));
    bench.passes(Egress, &from_guest("0.0.0.0", "224.0.0.22", 2, &[0x22; 8]));
    // Somebody else's address is not to be asked for as one's own.
    let frame = neighbour("::", 135, PEER_V6, None);
    bench.drops(Egress, &frame, DropReason::NeighbourSpoofed);
}

#[test]
fn arp_for_others_is_dropped() {
    let bench = guarded(identity());
    bench.passes(Egress, &arp(GUEST_MAC, 1, GUEST_MAC, GUEST, PEER));
    bench.passes(Egress, &arp(GUEST_MAC, 2, GUEST_MAC, GUEST, PEER));
    for frame in [
        arp(GUEST_MAC, 2, GUEST_MAC, PEER, GUEST),
        arp(GUEST_MAC, 1, GUEST_MAC, PEER, PEER),
        arp(GUEST_MAC, 2, PEER_MAC, GUEST, PEER),
        arp(GUEST_MAC, 2, GUEST_MAC, "0.0.0.0", PEER),
    ] {
        bench.drops(Egress, &frame, DropReason::ArpSpoofed);
    }
    let mut odd = arp(GUEST_MAC, 1, GUEST_MAC, GUEST, PEER);
    odd[18] = 8;
    bench.drops(Egress, &odd, DropReason::Malformed);
    bench.drops(Egress, &odd[..30], DropReason::Malformed);
}

#[test]
fn neighbours_are_not_advertised_for_others() {
    let bench = guarded(identity());
    bench.passes(Egress, &neighbour(GUEST_V6, 136, GUEST_V6, Some(GUEST_MAC)));
    bench.passes(Egress, &neighbour(LINK_LOCAL, 136, LINK_LOCAL, None));
    bench.passes(Egress, &neighbour(GUEST_V6, 135, PEER_V6, Some(GUEST_MAC)));
    for frame in [
        neighbour(GUEST_V6, 136, PEER_V6, Some(GUEST_MAC)),
        neighbour(GUEST_V6, 136, ROUTER, Some(GUEST_MAC)),
        neighbour(GUEST_V6, 136, GUEST_V6, Some(PEER_MAC)),
        neighbour(GUEST_V6, 135, PEER_V6, Some(PEER_MAC)),
        neighbour(GUEST_V6, 133, "::", Some(PEER_MAC)),
    ] {
        bench.drops(Egress, &frame, DropReason::NeighbourSpoofed);
    }
}

#[test]
fn neighbour_discovery_cannot_hide() {
    let bench = guarded(identity());
    let lie = neighbour(GUEST_V6, 136, PEER_V6, None);
    let message = &lie[54..];
    // In a fragment.
    let fragmented = [&[58, 0, 0, 1, 0, 0, 0, 9], message].concat();
    let frame = from_guest(GUEST_V6, "ff02::1", 44, &fragmented);
    bench.drops(Egress, &frame, DropReason::Malformed);
    // Behind destination options, where it is found.
    let behind = [&[58, 0, 1, 4, 0, 0, 0, 0], message].concat();
    let frame = from_guest(GUEST_V6, "ff02::1", 60, &behind);
    bench.drops(Egress, &frame, DropReason::NeighbourSpoofed);
    // Behind an option that is as long as all that is looked at.
    let honest = neighbour(GUEST_V6, 136, GUEST_V6, None);
    let filler = [&[14, 23][..], &[0; 23 * 8 - 2]].concat();
    let option = [&[2, 1][..], &mac(PEER_MAC)].concat();
    let long = [&honest[54..], &filler, &option].concat();
    let frame = from_guest(GUEST_V6, "ff02::1", 58, &long);
    bench.drops(Egress, &frame, DropReason::Malformed);
    // Two options, the second of which lies.
    let two = [&honest[54..], &[2, 1], &mac(GUEST_MAC)[..], &option].concat();
    let frame = from_guest(GUEST_V6, "ff02::1", 58, &two);
    bench.drops(Egress, &frame, DropReason::Malformed);
}

#[test]
fn only_servers_and_routers_speak_as_such() {
    let advertisement = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    let frames = [
        (
            from_guest(GUEST, PEER, 17, &udp_datagram(67, 68)),
            DropReason::DhcpServer,
        ),
        (
            from_guest(LINK_LOCAL, PEER_V6, 17, &udp_datagram(547, 546)),
            DropReason::DhcpServer,
        ),
        (
            from_guest(LINK_LOCAL, "ff02::1", 58, &advertisement),
            DropReason::Router,
        ),
    ];
    let bench = guarded(identity());
    for (frame, reason) in &frames {
        bench.drops(Egress, frame, *reason);
    }
    let bench = guarded(AntiSpoofing {
        dhcp_server: true,
        router: true,
        ..identity()
    });
    for (frame, _) in &frames {
        bench.passes(Egress, frame);
    }
}

#[test]
fn guests_may_be_given_more_freedom() {
    let private = "fe80::1234:5678:9abc:def0";
    let frame = from_guest(private, PEER_V6, 17, &udp_datagram(1, 2));
    guarded(identity()).drops(Egress, &frame, DropReason::AddressSpoofed);
    let any_link_local = AntiSpoofing {
        any_link_local: true,
        ..identity()
    };
    guarded(any_link_local).passes(Egress, &frame);
    let any_address = guarded(AntiSpoofing {
        addresses: None,
        ..identity()
    });
    any_address.passes(Egress, &from_guest(PEER, GUEST, 17, &udp_datagram(1, 2)));
    any_address.passes(Egress, &arp(GUEST_MAC, 2, GUEST_MAC, PEER, GUEST));
    let lie = arp(GUEST_MAC, 2, PEER_MAC, PEER, GUEST);
    any_address.drops(Egress, &lie, DropReason::ArpSpoofed);
}
