//! IPv4 (RFC 791), IPv6 (RFC 8200) and what they carry.

use super::{
    DCCP, Echo, Fragment, ICMP, ICMPV6, Icmp, IcmpBody, Ip, Neighbour, NeighbourMessage, Ports,
    Quoted, SCTP, TCP, TcpFlags, Transport, UDP, UDP_LITE, array_at, u16_at, u32_at,
};
use crate::address::{Address, Mac};

const IPV4_MIN_LEN_BYTES: usize = 20;
const IPV6_LEN_BYTES: usize = 40;
const TCP_MIN_LEN_BYTES: usize = 20;
const ICMP_LEN_BYTES: usize = 8;

/// Extension headers in one packet at most: each kind once, and one to spare.
const MAX_EXTENSIONS: usize = 8;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;

const OPTION_SOURCE_LINK_LAYER: u8 = 1;
const OPTION_TARGET_LINK_LAYER: u8 = 2;

impl Ip {
    pub(super) fn parse_v4(bytes: &[u8], available_bytes: usize) -> Option<Self> {
        let header: &[u8; IPV4_MIN_LEN_BYTES] = bytes.first_chunk()?;
        let header_len = usize::from(header[0] & 0xf) * 4;
        let total_len = usize::from(u16_at(header, 2)?);
        if header[0] >> 4 != 4
            || header_len < IPV4_MIN_LEN_BYTES
            || total_len < header_len
            || total_len > available_bytes
        {
            return None;
        }
        let payload = clip(bytes.get(header_len..)?, total_len - header_len);
        let flags = u16_at(header, 6)?;
        let has_more = flags & 0x2000 != 0;
        let fragment = Fragment::of(u16_at(header, 4)?.into(), (flags & 0x1fff) * 8, has_more);
        let protocol = header[9];
        Some(Self {
            source: Address::v4(array_at(header, 12)?),
            destination: Address::v4(array_at(header, 16)?),
            hop_limit: header[8],
            protocol,
            fragment,
            transport_at: header_len,
            transport: Transport::parse(protocol, fragment, payload, total_len - header_len, true),
        })
    }

    pub(super) fn parse_v6(bytes: &[u8], available_bytes: usize) -> Option<Self> {
        let (header, rest) = bytes.split_first_chunk::<IPV6_LEN_BYTES>()?;
        let payload_len = usize::from(u16_at(header, 4)?);
        if header[0] >> 4 != 6 || IPV6_LEN_BYTES + payload_len > available_bytes {
            return None;
        }
        let source = Address::v6(array_at(header, 8)?);
        let destination = Address::v6(array_at(header, 24)?);
        // Never on the wire (RFC 4291 section 2.5.5.2), and IPv4 to the rest of this crate.
        if source.is_ipv4() || destination.is_ipv4() {
            return None;
        }
        let upper = Upper::find(header[6], clip(rest, payload_len), payload_len)?;
        Some(Self {
            source,
            destination,
            hop_limit: header[7],
            protocol: upper.protocol,
            fragment: upper.fragment,
            transport_at: IPV6_LEN_BYTES + payload_len - upper.len_bytes,
            transport: Transport::parse(
                upper.protocol,
                upper.fragment,
                upper.payload,
                upper.len_bytes,
                false,
            ),
        })
    }
}

impl Fragment {
    fn of(id: u32, offset_bytes: u16, has_more: bool) -> Self {
        match (offset_bytes, has_more) {
            (0, false) => Self::Whole,
            (0, true) => Self::First { id },
            _ => Self::Later { id, offset_bytes },
        }
    }
}

/// What is behind IPv6's extension headers.
struct Upper<'a> {
    protocol: u8,
    fragment: Fragment,
    payload: &'a [u8],
    /// Of the payload, which may be cut off.
    len_bytes: usize,
}

impl<'a> Upper<'a> {
    fn find(mut next: u8, mut bytes: &'a [u8], mut len_bytes: usize) -> Option<Self> {
        let mut fragment = Fragment::Whole;
        for _ in 0..=MAX_EXTENSIONS {
            let header_len = match next {
                HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | MOBILITY => {
                    // Type 0 lets a sender choose the way (RFC 5095).
                    if next == ROUTING && *bytes.get(2)? == 0 {
                        return None;
                    }
                    8 + usize::from(*bytes.get(1)?) * 8
                }
                AUTHENTICATION => 8 + usize::from(*bytes.get(1)?) * 4,
                FRAGMENT if fragment == Fragment::Whole => {
                    let offset = u16_at(bytes, 2)?;
                    fragment = Fragment::of(u32_at(bytes, 4)?, offset & !7, offset & 1 != 0);
                    8
                }
                FRAGMENT => return None,
                _ => {
                    return Some(Self {
                        protocol: next,
                        fragment,
                        payload: bytes,
                        len_bytes,
                    });
                }
            };
            next = *bytes.first()?;
            bytes = bytes.get(header_len..)?;
            len_bytes = len_bytes.checked_sub(header_len)?;
            // What follows is payload, whatever `next` says.
            if let Fragment::Later { .. } = fragment {
                return Some(Self {
                    protocol: next,
                    fragment,
                    payload: bytes,
                    len_bytes,
                });
            }
        }
        None
    }
}

impl Transport {
    /// `payload` may be cut off; there are `len_bytes` of it.
    fn parse(
        protocol: u8,
        fragment: Fragment,
        payload: &[u8],
        len_bytes: usize,
        is_ipv4: bool,
    ) -> Self {
        if let Fragment::Later { offset_bytes, .. } = fragment {
            // Would replace a header that was already judged (RFC 1858).
            let overlaps = protocol == TCP && usize::from(offset_bytes) < TCP_MIN_LEN_BYTES;
            return if overlaps {
                Self::Malformed
            } else {
                Self::Other
            };
        }
        let parsed = match protocol {
            TCP => Self::tcp(payload, len_bytes),
            UDP if len_bytes < 8 => None,
            UDP | UDP_LITE | SCTP | DCCP => ports(payload).map(Self::Ports),
            ICMP if is_ipv4 => Icmp::parse_v4(payload).map(Self::Icmp),
            ICMPV6 if !is_ipv4 => {
                let is_complete = payload.len() == len_bytes && fragment == Fragment::Whole;
                Icmp::parse_v6(payload, is_complete).map(Self::Icmp)
            }
            _ => Some(Self::Other),
        };
        parsed.unwrap_or(Self::Malformed)
    }

    fn tcp(bytes: &[u8], len_bytes: usize) -> Option<Self> {
        let header: &[u8; TCP_MIN_LEN_BYTES] = bytes.first_chunk()?;
        let header_len = usize::from(header[12] >> 4) * 4;
        if header_len < TCP_MIN_LEN_BYTES || header_len > len_bytes {
            return None;
        }
        Some(Self::Tcp {
            ports: ports(header)?,
            flags: TcpFlags(header[13]),
        })
    }
}

fn ports(bytes: &[u8]) -> Option<Ports> {
    Some(Ports {
        source: u16_at(bytes, 0)?,
        destination: u16_at(bytes, 2)?,
    })
}

impl Icmp {
    fn parse_v4(bytes: &[u8]) -> Option<Self> {
        let header: &[u8; ICMP_LEN_BYTES] = bytes.first_chunk()?;
        let id = u16_at(header, 4)?;
        let body = match header[0] {
            8 | 13 => IcmpBody::Echo(Echo::Request, id),
            0 | 14 => IcmpBody::Echo(Echo::Reply, id),
            // Unreachable, source quench, redirect, time exceeded, parameter problem.
            3 | 4 | 5 | 11 | 12 => Quoted::parse_v4(&bytes[ICMP_LEN_BYTES..])
                .map_or(IcmpBody::UnreadableError, IcmpBody::Error),
            _ => IcmpBody::Other,
        };
        Some(Self {
            kind: header[0],
            code: header[1],
            body,
        })
    }

    /// `bytes` are the whole message if `is_complete`.
    fn parse_v6(bytes: &[u8], is_complete: bool) -> Option<Self> {
        let header: &[u8; ICMP_LEN_BYTES] = bytes.first_chunk()?;
        let id = u16_at(header, 4)?;
        let rest = &bytes[ICMP_LEN_BYTES..];
        let kind = header[0];
        // Fragments must be ignored by who receives them (RFC 6980), but are not by everybody; and
        // options must not hide behind what is looked at.
        if (133..=137).contains(&kind) && !is_complete {
            return None;
        }
        let body = match kind {
            128 => IcmpBody::Echo(Echo::Request, id),
            129 => IcmpBody::Echo(Echo::Reply, id),
            // Unreachable, packet too big, time exceeded, parameter problem.
            1..=4 => Quoted::parse_v6(rest).map_or(IcmpBody::UnreadableError, IcmpBody::Error),
            130..=132 | 143 => IcmpBody::MulticastListener,
            133 => IcmpBody::Neighbour(Neighbour {
                message: NeighbourMessage::RouterSolicitation,
                link_layer: link_layer_option(rest, OPTION_SOURCE_LINK_LAYER)?,
            }),
            134 | 137 => IcmpBody::FromRouter,
            135 => IcmpBody::Neighbour(Neighbour {
                message: NeighbourMessage::Solicitation {
                    target: Address::v6(array_at(rest, 0)?),
                },
                link_layer: link_layer_option(&rest[16..], OPTION_SOURCE_LINK_LAYER)?,
            }),
            136 => IcmpBody::Neighbour(Neighbour {
                message: NeighbourMessage::Advertisement {
                    target: Address::v6(array_at(rest, 0)?),
                },
                link_layer: link_layer_option(&rest[16..], OPTION_TARGET_LINK_LAYER)?,
            }),
            _ => IcmpBody::Other,
        };
        Some(Self {
            kind,
            code: header[1],
            body,
        })
    }
}

impl Quoted {
    /// RFC 792 promises header and 8 bytes.
    fn parse_v4(bytes: &[u8]) -> Option<Self> {
        let header: &[u8; IPV4_MIN_LEN_BYTES] = bytes.first_chunk()?;
        let header_len = usize::from(header[0] & 0xf) * 4;
        if header[0] >> 4 != 4 || header_len < IPV4_MIN_LEN_BYTES {
            return None;
        }
        let is_later_fragment = u16_at(header, 6)? & 0x1fff != 0;
        Self {
            source: Address::v4(array_at(header, 12)?),
            destination: Address::v4(array_at(header, 16)?),
            protocol: header[9],
            ports: Ports::default(),
            echo: None,
        }
        .with_ports(bytes.get(header_len..)?, is_later_fragment)
    }

    fn parse_v6(bytes: &[u8]) -> Option<Self> {
        let (header, rest) = bytes.split_first_chunk::<IPV6_LEN_BYTES>()?;
        if header[0] >> 4 != 6 {
            return None;
        }
        let upper = Upper::find(header[6], rest, usize::from(u16_at(header, 4)?))?;
        let is_later_fragment = matches!(upper.fragment, Fragment::Later { .. });
        Self {
            source: Address::v6(array_at(header, 8)?),
            destination: Address::v6(array_at(header, 24)?),
            protocol: upper.protocol,
            ports: Ports::default(),
            echo: None,
        }
        .with_ports(upper.payload, is_later_fragment)
    }

    fn with_ports(mut self, payload: &[u8], is_later_fragment: bool) -> Option<Self> {
        match self.protocol {
            _ if is_later_fragment => return None,
            TCP | UDP | UDP_LITE | SCTP | DCCP => self.ports = ports(payload)?,
            ICMP | ICMPV6 => {
                self.ports = Ports::both(u16_at(payload, 4)?);
                self.echo = match payload[0] {
                    8 | 13 | 128 => Some(Echo::Request),
                    0 | 14 | 129 => Some(Echo::Reply),
                    _ => return None,
                };
            }
            _ => {}
        }
        Some(self)
    }
}

/// The address in the option of type `wanted`, if there is one. None when the options, of which
/// any may hide others, cannot be read to their end: whoever receives them drops the message.
fn link_layer_option(mut options: &[u8], wanted: u8) -> Option<Option<Mac>> {
    let mut found = None;
    while let Some((&[kind, units], _)) = options.split_first_chunk() {
        let len_bytes = usize::from(units) * 8;
        let option = options.get(..len_bytes).filter(|_| units > 0)?;
        if kind == wanted {
            // Two could say two things.
            if found.is_some() || len_bytes != 8 {
                return None;
            }
            found = Some(Mac(array_at(option, 2)?));
        }
        options = &options[len_bytes..];
    }
    options.is_empty().then_some(found)
}

fn clip(bytes: &[u8], len_bytes: usize) -> &[u8] {
    &bytes[..bytes.len().min(len_bytes)]
}
