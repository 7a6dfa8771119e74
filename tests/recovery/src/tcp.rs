//! A TCP connection's receiving end, as small as it can be: it asks for one connection, takes what
//! comes in order, acknowledges, and answers ARP. What makes the connection live through an outage is
//! the other end, the kernel's.

use std::net::Ipv4Addr;

/// Of both ends here.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// This end.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
/// Where the host listens.
pub const PORT: u16 = 5000;
/// This end's hardware address.
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

const OWN_PORT: u16 = 40_000;
const ETHERNET_BYTES: usize = 14;
const IP_BYTES: usize = 20;
const TCP_BYTES: usize = 20;
const ARP_BYTES: usize = 28;
const ETHERTYPE_IP: [u8; 2] = [8, 0];
const ETHERTYPE_ARP: [u8; 2] = [8, 6];
const PROTOCOL_TCP: u8 = 6;
const WINDOW: u16 = 65_535;

mod flag {
    pub(super) const SYN: u8 = 2;
    pub(super) const RST: u8 = 4;
    pub(super) const ACK: u8 = 16;
}

/// The byte at a place of the stream that the host sends.
pub fn byte_at(position: u64) -> u8 {
    (position / 8).to_le_bytes()[(position % 8) as usize]
}

/// See the module's description.
#[derive(Debug)]
pub struct Receiver {
    /// Asked for first: TCP takes nothing that came to everybody.
    peer_mac: Option<[u8; 6]>,
    state: State,
    /// Bytes taken in order.
    received: u64,
    wrong: u64,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Asking,
    /// With the next sequence number that is wanted, and ours.
    Connected {
        wanted: u32,
        own: u32,
    },
    Reset,
}

/// What a frame brought.
#[derive(Debug, PartialEq, Eq)]
pub struct Heard {
    /// To be sent back.
    pub answer: Option<Vec<u8>>,
    /// New bytes, in order.
    pub is_progress: bool,
}

const OWN_FIRST: u32 = 1000;

impl Default for Receiver {
    fn default() -> Self {
        Self {
            peer_mac: None,
            state: State::Asking,
            received: 0,
            wrong: 0,
        }
    }
}

impl Receiver {
    /// Bytes of the stream so far, and how many of them were wrong.
    pub fn received(&self) -> (u64, u64) {
        (self.received, self.wrong)
    }

    /// The peer gave the connection up.
    pub fn is_reset(&self) -> bool {
        self.state == State::Reset
    }

    /// What to send when nothing has come for a while.
    pub fn nudge(&self) -> Vec<u8> {
        if self.peer_mac.is_none() {
            return arp(Arp::Request, [0xff; 6], HOST);
        }
        match self.state {
            State::Asking | State::Reset => self.segment(flag::SYN, OWN_FIRST, 0),
            State::Connected { wanted, own } => self.segment(flag::ACK, own, wanted),
        }
    }

    /// Takes a frame.
    pub fn hear(&mut self, frame: &[u8]) -> Heard {
        let nothing = Heard {
            answer: None,
            is_progress: false,
        };
        match frame.get(12..ETHERNET_BYTES) {
            Some(kind) if kind == ETHERTYPE_ARP => Heard {
                answer: self.hear_arp(&frame[ETHERNET_BYTES..]),
                ..nothing
            },
            Some(kind) if kind == ETHERTYPE_IP => {
                self.hear_ip(&frame[ETHERNET_BYTES..]).unwrap_or(nothing)
            }
            _ => nothing,
        }
    }

    fn hear_arp(&mut self, heard: &[u8]) -> Option<Vec<u8>> {
        let (fixed, _) = heard.split_first_chunk::<ARP_BYTES>()?;
        if fixed[14..18] != HOST.octets() || fixed[24..28] != GUEST.octets() {
            return None;
        }
        let (mac, _) = fixed[8..].split_first_chunk::<6>()?;
        self.peer_mac = Some(*mac);
        Some(match fixed[7] == Arp::Request as u8 {
            true => arp(Arp::Reply, *mac, HOST),
            false => self.nudge(),
        })
    }

    fn hear_ip(&mut self, packet: &[u8]) -> Option<Heard> {
        let header = packet.get(..IP_BYTES)?;
        let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let packet = packet.get(..len)?;
        let header_len = usize::from(header[0] & 15) * 4;
        if header[9] != PROTOCOL_TCP || header[16..20] != GUEST.octets() {
            return None;
        }
        let segment = packet.get(header_len..)?;
        let fixed = segment.get(..TCP_BYTES)?;
        if u16::from_be_bytes([fixed[2], fixed[3]]) != OWN_PORT {
            return None;
        }
        let sequence = u32::from_be_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]);
        let data = segment.get(usize::from(fixed[12] >> 4) * 4..)?;
        self.hear_segment(fixed[13], sequence, data)
    }

    fn hear_segment(&mut self, flags: u8, sequence: u32, data: &[u8]) -> Option<Heard> {
        if flags & flag::RST != 0 {
            self.state = State::Reset;
            return None;
        }
        let mut is_progress = false;
        match &mut self.state {
            State::Asking if flags & flag::SYN != 0 => {
                self.state = State::Connected {
                    wanted: sequence.wrapping_add(1),
                    own: OWN_FIRST + 1,
                };
            }
            State::Connected { wanted, .. } => {
                let known = wanted.wrapping_sub(sequence) as usize;
                if let Some(new) = data.get(known..).filter(|new| !new.is_empty()) {
                    *wanted = wanted.wrapping_add(new.len() as u32);
                    is_progress = true;
                    for (position, &byte) in (self.received..).zip(new) {
                        self.wrong += u64::from(byte != byte_at(position));
                    }
                    self.received += new.len() as u64;
                }
                if data.is_empty() && flags & flag::SYN == 0 {
                    return None;
                }
            }
            _ => return None,
        }
        Some(Heard {
            answer: Some(self.nudge()),
            is_progress,
        })
    }

    fn segment(&self, flags: u8, sequence: u32, acknowledged: u32) -> Vec<u8> {
        let mut tcp = Vec::with_capacity(TCP_BYTES);
        tcp.extend(OWN_PORT.to_be_bytes());
        tcp.extend(PORT.to_be_bytes());
        tcp.extend(sequence.to_be_bytes());
        tcp.extend(acknowledged.to_be_bytes());
        tcp.extend([(TCP_BYTES as u8 / 4) << 4, flags]);
        tcp.extend(WINDOW.to_be_bytes());
        tcp.extend([0; 4]);
        let pseudo = [
            &GUEST.octets()[..],
            &HOST.octets(),
            &[0, PROTOCOL_TCP, 0, TCP_BYTES as u8],
            &tcp,
        ];
        let checksum = checksum(&pseudo.concat());
        tcp[16..18].copy_from_slice(&checksum);
        let total = (IP_BYTES + TCP_BYTES) as u16;
        let mut ip = vec![0x45, 0];
        ip.extend(total.to_be_bytes());
        ip.extend([0, 0, 0x40, 0, 64, PROTOCOL_TCP, 0, 0]);
        ip.extend(GUEST.octets());
        ip.extend(HOST.octets());
        let checksum = self::checksum(&ip);
        ip[10..12].copy_from_slice(&checksum);
        let peer_mac = self.peer_mac.unwrap_or([0xff; 6]);
        [&peer_mac[..], &MAC, &ETHERTYPE_IP, &ip, &tcp].concat()
    }
}

#[derive(Clone, Copy)]
enum Arp {
    Request = 1,
    Reply = 2,
}

/// A frame of ours about `peer`, whose hardware address is `mac`, or everybody's.
fn arp(operation: Arp, mac: [u8; 6], peer: Ipv4Addr) -> Vec<u8> {
    let mut frame = [&mac[..], &MAC, &ETHERTYPE_ARP].concat();
    frame.extend([0, 1, 8, 0, 6, 4, 0, operation as u8]);
    frame.extend(MAC);
    frame.extend(GUEST.octets());
    frame.extend(mac);
    frame.extend(peer.octets());
    frame
}

/// RFC 1071, of an even number of bytes.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.as_chunks::<2>().0.iter();
    let mut sum: u32 = words.map(|&word| u32::from(u16::from_be_bytes(word))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A segment of the host's.
    fn from_host(flags: u8, sequence: u32, data: &[u8]) -> Vec<u8> {
        let mut frame = [&MAC[..], &[2, 0, 0, 0, 0, 1], &ETHERTYPE_IP].concat();
        let mut ip = vec![0; IP_BYTES];
        ip[0] = 0x45;
        let total = (IP_BYTES + TCP_BYTES + data.len()) as u16;
        ip[2..4].copy_from_slice(&total.to_be_bytes());
        ip[9] = PROTOCOL_TCP;
        ip[16..20].copy_from_slice(&GUEST.octets());
        let mut tcp = vec![0; TCP_BYTES];
        tcp[2..4].copy_from_slice(&OWN_PORT.to_be_bytes());
        tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
        tcp[12] = 5 << 4;
        tcp[13] = flags;
        frame.extend(ip);
        frame.extend(tcp);
        frame.extend(data);
        frame
    }

    fn stream(range: std::ops::Range<u64>) -> Vec<u8> {
        range.map(byte_at).collect()
    }

    #[test]
    fn the_stream_is_taken_in_order_and_once() {
        let mut receiver = Receiver::default();
        receiver.hear(&from_host(flag::SYN | flag::ACK, 99, &[]));
        assert!(
            receiver
                .hear(&from_host(flag::ACK, 100, &stream(0..50)))
                .is_progress
        );
        // Lost: 150..200. What follows is asked for again.
        let gap = receiver.hear(&from_host(flag::ACK, 200, &stream(100..150)));
        assert!(!gap.is_progress && gap.answer.is_some());
        // Overlaps what is there.
        assert!(
            receiver
                .hear(&from_host(flag::ACK, 120, &stream(20..150)))
                .is_progress
        );
        assert!(
            !receiver
                .hear(&from_host(flag::ACK, 100, &stream(0..50)))
                .is_progress
        );
        assert_eq!(receiver.received(), (150, 0));
        receiver.hear(&from_host(flag::ACK, 250, &[0xee; 8]));
        assert!(receiver.received().1 > 0);
        receiver.hear(&from_host(flag::RST, 300, &[]));
        assert!(receiver.is_reset());
    }

    #[test]
    fn the_hosts_address_is_asked_for_before_the_connection() {
        let mut receiver = Receiver::default();
        let request = receiver.nudge();
        assert_eq!((&request[12..14], request[21]), (&ETHERTYPE_ARP[..], 1));
        let mut reply = request.clone();
        reply[21] = 2;
        reply[22..28].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        reply[28..32].copy_from_slice(&HOST.octets());
        reply[38..42].copy_from_slice(&GUEST.octets());
        let answer = receiver.hear(&reply).answer.unwrap();
        assert_eq!(answer[..6], [2, 0, 0, 0, 0, 1]);
        assert_eq!(&answer[12..14], &ETHERTYPE_IP);
    }

    #[test]
    fn segments_carry_right_checksums() {
        let frame = Receiver {
            peer_mac: Some([2, 0, 0, 0, 0, 1]),
            ..Receiver::default()
        }
        .nudge();
        let ip = &frame[ETHERNET_BYTES..ETHERNET_BYTES + IP_BYTES];
        assert_eq!(checksum(ip), [0, 0]);
        let tcp = &frame[ETHERNET_BYTES + IP_BYTES..];
        let pseudo = [&ip[12..20], &[0, PROTOCOL_TCP, 0, TCP_BYTES as u8], tcp];
        assert_eq!(checksum(&pseudo.concat()), [0, 0]);
    }
}
