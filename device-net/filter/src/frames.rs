//! Frames for unit tests, built from the outside in.

use std::net::IpAddr;

use crate::packet::Packet;

pub(crate) const GUEST_MAC: &str = "52:54:00:00:00:01";
pub(crate) const PEER_MAC: &str = "52:54:00:00:00:02";
pub(crate) const GUEST: &str = "10.0.0.5";
pub(crate) const PEER: &str = "10.0.0.9";
pub(crate) const GUEST_V6: &str = "2001:db8::5";
pub(crate) const PEER_V6: &str = "2001:db8::9";

pub(crate) const SYN: u8 = 0x02;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const FIN: u8 = 0x01;
pub(crate) const RST: u8 = 0x04;

pub(crate) fn mac(text: &str) -> [u8; 6] {
    text.parse::<crate::address::Mac>().unwrap().0
}

/// An Ethernet frame from `source` to `destination`.
pub(crate) fn ethernet(source: &str, destination: &str, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend(mac(destination));
    frame.extend(mac(source));
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

/// The same frame with one more tag.
pub(crate) fn tagged(frame: &[u8], id: u16) -> Vec<u8> {
    let mut tagged = frame[..12].to_vec();
    tagged.extend(0x8100_u16.to_be_bytes());
    tagged.extend(id.to_be_bytes());
    tagged.extend(&frame[12..]);
    tagged
}

/// An IP packet of either version, in a frame between the usual MACs.
pub(crate) fn ip(source: &str, destination: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let from_guest = [GUEST, GUEST_V6].contains(&source);
    let (from, to) = if from_guest {
        (GUEST_MAC, PEER_MAC)
    } else {
        (PEER_MAC, GUEST_MAC)
    };
    ip_from(from, to, source, destination, protocol, payload)
}

pub(crate) fn ip_from(
    source_mac: &str,
    destination_mac: &str,
    source: &str,
    destination: &str,
    protocol: u8,
    payload: &[u8],
) -> Vec<u8> {
    let (ethertype, packet) = match (source.parse().unwrap(), destination.parse().unwrap()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut packet = vec![0x45, 0];
            packet.extend((20 + payload.len() as u16).to_be_bytes());
            packet.extend([0, 7, 0, 0, 64, protocol, 0, 0]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            (0x0800, packet)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut packet = vec![0x60, 0, 0, 0];
            packet.extend((payload.len() as u16).to_be_bytes());
            packet.extend([protocol, 255]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            (0x86dd, packet)
        }
        _ => panic!("{source} and {destination} are of two families"),
    };
    let packet = [packet, payload.to_vec()].concat();
    ethernet(source_mac, destination_mac, ethertype, &packet)
}

/// Makes a packet of IPv4 a fragment.
pub(crate) fn fragment(mut frame: Vec<u8>, id: u16, offset_bytes: u16, has_more: bool) -> Vec<u8> {
    frame[18..20].copy_from_slice(&id.to_be_bytes());
    let flags = (offset_bytes / 8) | if has_more { 0x2000 } else { 0 };
    frame[20..22].copy_from_slice(&flags.to_be_bytes());
    frame
}

pub(crate) fn tcp(source: &str, sport: u16, destination: &str, dport: u16, flags: u8) -> Vec<u8> {
    ip(source, destination, 6, &tcp_header(sport, dport, flags))
}

pub(crate) fn tcp_header(sport: u16, dport: u16, flags: u8) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(sport.to_be_bytes());
    header.extend(dport.to_be_bytes());
    header.extend([0; 8]);
    header.extend([0x50, flags, 0, 0, 0, 0, 0, 0]);
    header
}

pub(crate) fn udp(source: &str, sport: u16, destination: &str, dport: u16) -> Vec<u8> {
    ip(source, destination, 17, &udp_datagram(sport, dport))
}

pub(crate) fn udp_datagram(sport: u16, dport: u16) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(sport.to_be_bytes());
    datagram.extend(dport.to_be_bytes());
    datagram.extend([0, 12, 0, 0]);
    datagram.extend(b"data");
    datagram
}

/// An echo request or reply of either version.
pub(crate) fn echo(source: &str, destination: &str, is_reply: bool, id: u16) -> Vec<u8> {
    let is_v6 = source.contains(':');
    let kind = match (is_v6, is_reply) {
        (false, false) => 8,
        (false, true) => 0,
        (true, false) => 128,
        (true, true) => 129,
    };
    let [high, low] = id.to_be_bytes();
    let protocol = if is_v6 { 58 } else { 1 };
    ip(
        source,
        destination,
        protocol,
        &[kind, 0, 0, 0, high, low, 0, 1],
    )
}

/// An ICMP error about `frame`.
pub(crate) fn unreachable(source: &str, destination: &str, frame: &[u8]) -> Vec<u8> {
    let quoted = &frame[14..];
    let (protocol, kind) = if source.contains(':') {
        (58, 1)
    } else {
        (1, 3)
    };
    let message = [&[kind, 1, 0, 0, 0, 0, 0, 0], quoted].concat();
    ip(source, destination, protocol, &message)
}

/// ARP from `source_mac`, which says to be `sender_mac` at `sender`.
pub(crate) fn arp(
    source_mac: &str,
    operation: u16,
    sender_mac: &str,
    sender: &str,
    target: &str,
) -> Vec<u8> {
    let octets = |text: &str| text.parse::<std::net::Ipv4Addr>().unwrap().octets();
    let mut message = vec![0, 1, 8, 0, 6, 4];
    message.extend(operation.to_be_bytes());
    message.extend(mac(sender_mac));
    message.extend(octets(sender));
    message.extend([0; 6]);
    message.extend(octets(target));
    ethernet(source_mac, "ff:ff:ff:ff:ff:ff", 0x0806, &message)
}

/// A message of neighbour discovery about `target`, with an option if there is a MAC.
pub(crate) fn neighbour(source: &str, kind: u8, target: &str, link_layer: Option<&str>) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    if kind != 133 {
        message.extend(target.parse::<std::net::Ipv6Addr>().unwrap().octets());
    }
    if let Some(address) = link_layer {
        message.extend([if kind == 136 { 2 } else { 1 }, 1]);
        message.extend(mac(address));
    }
    ip_from(GUEST_MAC, PEER_MAC, source, "ff02::1", 58, &message)
}

pub(crate) fn parsed(frame: &[u8]) -> Packet {
    let head = &frame[..frame.len().min(crate::packet::HEAD_LEN_BYTES)];
    Packet::parse(head, frame.len()).expect("an Ethernet header")
}
