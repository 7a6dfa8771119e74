//! Just enough Ethernet, ARP, IPv4, UDP and ICMP to talk to the kernel.

use std::net::Ipv4Addr;

use crate::host::{GUEST_IP, HOST_IP};

const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_UDP: u8 = 17;

/// Where the UDP header starts, for checksum offload.
pub(crate) const UDP_START: u16 = 34;
/// Where the checksum lies in it.
pub(crate) const UDP_CSUM_OFFSET: u16 = 6;

/// What a frame from the host is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// Somebody asks for [`GUEST_IP`]; the frame that answers.
    ArpRequest(Vec<u8>),
    ArpReply {
        host_mac: [u8; 6],
    },
    Udp {
        source_port: u16,
        destination_port: u16,
        payload: Vec<u8>,
    },
    EchoReply {
        payload: Vec<u8>,
    },
    Other,
}

pub(crate) fn parse(frame: &[u8]) -> Parsed {
    match be16(frame, 12) {
        ETHERTYPE_ARP => parse_arp(frame),
        ETHERTYPE_IPV4 => parse_ipv4(&frame[14..]),
        _ => Parsed::Other,
    }
}

fn parse_arp(frame: &[u8]) -> Parsed {
    let sender_mac: [u8; 6] = frame[22..28].try_into().unwrap();
    match (be16(frame, 20), &frame[38..42]) {
        (1, target) if target == GUEST_IP.octets() => {
            let sender_ip = Ipv4Addr::from(<[u8; 4]>::try_from(&frame[28..32]).unwrap());
            Parsed::ArpRequest(arp(2, sender_mac, sender_mac, sender_ip))
        }
        (2, _) => Parsed::ArpReply {
            host_mac: sender_mac,
        },
        _ => Parsed::Other,
    }
}

fn parse_ipv4(packet: &[u8]) -> Parsed {
    let packet = &packet[..usize::from(be16(packet, 2))];
    if packet[16..20] != GUEST_IP.octets() {
        return Parsed::Other;
    }
    let data = &packet[20..];
    match packet[9] {
        PROTOCOL_UDP => Parsed::Udp {
            source_port: be16(data, 0),
            destination_port: be16(data, 2),
            payload: data[8..].to_vec(),
        },
        PROTOCOL_ICMP if data[0] == 0 => Parsed::EchoReply {
            payload: data[8..].to_vec(),
        },
        _ => Parsed::Other,
    }
}

/// Asks for the host's Ethernet address.
pub(crate) fn arp_request() -> Vec<u8> {
    arp(1, [0xff; 6], [0; 6], HOST_IP)
}

fn arp(operation: u16, destination: [u8; 6], target_mac: [u8; 6], target_ip: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet(destination, ETHERTYPE_ARP);
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(GUEST_MAC);
    frame.extend(GUEST_IP.octets());
    frame.extend(target_mac);
    frame.extend(target_ip.octets());
    frame
}

/// An echo request from the guest.
pub(crate) fn ping(host_mac: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let mut icmp = vec![8, 0, 0, 0, 0, 7, 0, 1];
    icmp.extend(payload);
    let checksum = !sum(&icmp, 0);
    icmp[2..4].copy_from_slice(&checksum.to_be_bytes());
    ipv4(host_mac, PROTOCOL_ICMP, &icmp)
}

/// A datagram from the guest, without checksum.
pub(crate) fn udp(host_mac: [u8; 6], ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(ports.0.to_be_bytes());
    datagram.extend(ports.1.to_be_bytes());
    datagram.extend((8 + payload.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    ipv4(host_mac, PROTOCOL_UDP, &datagram)
}

/// As [`udp`], with the checksum left to the device: the field holds the pseudo header's sum.
pub(crate) fn udp_to_be_summed(host_mac: [u8; 6], ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut frame = udp(host_mac, ports, payload);
    let pseudo = pseudo_header_sum(GUEST_IP, HOST_IP, 8 + payload.len() as u16);
    let at = usize::from(UDP_START + UDP_CSUM_OFFSET);
    frame[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
    frame
}

/// Whether the UDP checksum of a frame from the host is complete and right.
pub(crate) fn has_right_udp_checksum(frame: &[u8]) -> bool {
    let datagram = &frame[usize::from(UDP_START)..];
    let len = be16(datagram, 4);
    let pseudo = pseudo_header_sum(HOST_IP, GUEST_IP, len);
    sum(&datagram[..usize::from(len)], pseudo) == 0xffff
}

fn pseudo_header_sum(source: Ipv4Addr, destination: Ipv4Addr, len: u16) -> u16 {
    let mut bytes = Vec::new();
    bytes.extend(source.octets());
    bytes.extend(destination.octets());
    bytes.extend([0, PROTOCOL_UDP]);
    bytes.extend(len.to_be_bytes());
    sum(&bytes, 0)
}

fn ipv4(host_mac: [u8; 6], protocol: u8, data: &[u8]) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend((20 + data.len() as u16).to_be_bytes());
    header.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    header.extend(GUEST_IP.octets());
    header.extend(HOST_IP.octets());
    let checksum = !sum(&header, 0);
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut frame = ethernet(host_mac, ETHERTYPE_IPV4);
    frame.extend(header);
    frame.extend(data);
    frame
}

fn ethernet(destination: [u8; 6], ethertype: u16) -> Vec<u8> {
    let mut frame = destination.to_vec();
    frame.extend(GUEST_MAC);
    frame.extend(ethertype.to_be_bytes());
    frame
}

/// The Internet's checksum, not inverted.
fn sum(bytes: &[u8], start: u16) -> u16 {
    let mut total = u64::from(start);
    for pair in bytes.chunks(2) {
        total += u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}
