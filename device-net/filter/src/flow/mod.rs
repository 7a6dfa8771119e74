//! Flows: what belongs together in both directions.
//!
//! - [`Key`]: what the frames of a flow have in common
//! - [`state`]: how far a flow is, and how long it is remembered
//! - [`table`]: a bounded table of flows

mod state;
pub(crate) mod table;

use std::hash::{BuildHasher, RandomState};

use crate::address::Address;
use crate::packet::{Echo, IcmpBody, Ip, Packet, Ports, Quoted, TcpFlags, Transport};
use crate::rules::{Opening, has_ports};
use crate::verdict::Direction;

pub use state::State;

/// A flow as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowInfo {
    /// Number of the IP protocol.
    pub protocol: u8,
    /// The guest's end.
    pub local: Address,
    /// 0 without ports; ICMP's identifier.
    pub local_port: u16,
    /// The other end.
    pub remote: Address,
    /// 0 without ports; ICMP's identifier.
    pub remote_port: u16,
    /// Identifiers of up to two VLAN tags, outermost first; 0 for none.
    pub vlans: [u16; 2],
    /// Of the first frame.
    pub origin: Direction,
    /// How far it is.
    pub state: State,
    /// Frames and bytes to the guest.
    pub ingress: Volume,
    /// Frames and bytes from the guest.
    pub egress: Volume,
    /// Since the first frame.
    pub age_ns: u64,
    /// Since the last one.
    pub idle_ns: u64,
}

/// What was transferred.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Volume {
    /// Frames, with segments that are not cut yet as one.
    pub packets: u64,
    /// From the Ethernet header on.
    pub bytes: u64,
}

/// What the frames of a flow have in common, whichever way they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    local: Address,
    remote: Address,
    local_port: u16,
    remote_port: u16,
    /// All tags as one number.
    vlan: u32,
    protocol: u8,
    /// Which way ICMP's requests go.
    request: Option<Direction>,
}

/// What a frame does to its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Tcp(TcpFlags),
    /// Any frame of a protocol without connections.
    Datagram,
}

/// How a frame relates to flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Relation {
    /// Belongs to this one, and may open it.
    Part(Key, Event),
    /// An answer, which opens nothing.
    Answer(Key),
    /// An error about one, which leaves it as it is.
    Error(Key),
    /// Stands alone.
    None,
}

impl Relation {
    pub(crate) fn of(packet: &Packet, ip: &Ip, direction: Direction) -> Self {
        let key = |ports| Key::new(packet, ip, ports, direction);
        match ip.transport {
            Transport::Tcp { ports, flags } => Self::Part(key(ports), Event::Tcp(flags)),
            Transport::Ports(ports) => Self::Part(key(ports), Event::Datagram),
            Transport::Other => Self::Part(key(Ports::default()), Event::Datagram),
            Transport::Icmp(icmp) => match icmp.body {
                IcmpBody::Echo(echo, id) => {
                    let key = key(Ports::both(id)).of_echo(Some(echo), direction);
                    match echo {
                        Echo::Request => Self::Part(key, Event::Datagram),
                        Echo::Reply => Self::Answer(key),
                    }
                }
                IcmpBody::Error(quoted) => Self::Error(Key::of_quoted(packet, &quoted, direction)),
                _ => Self::None,
            },
            Transport::Malformed => Self::None,
        }
    }

    pub(crate) fn key(&self) -> Option<&Key> {
        match self {
            Self::Part(key, _) | Self::Answer(key) | Self::Error(key) => Some(key),
            Self::None => None,
        }
    }
}

impl Ports {
    pub(crate) fn both(id: u16) -> Self {
        Self {
            source: id,
            destination: id,
        }
    }
}

impl Key {
    fn new(packet: &Packet, ip: &Ip, ports: Ports, direction: Direction) -> Self {
        let sent = Self {
            local: ip.source,
            remote: ip.destination,
            local_port: ports.source,
            remote_port: ports.destination,
            vlan: packet.vlans.id(),
            protocol: ip.protocol,
            request: None,
        };
        sent.seen(direction)
    }

    /// Of the fragments of one packet.
    pub(crate) fn of_fragments(packet: &Packet, ip: &Ip, id: u32, direction: Direction) -> Self {
        let ports = Ports {
            source: (id >> 16) as u16,
            destination: id as u16,
        };
        Self::new(packet, ip, ports, direction)
    }

    /// The packet that an error is about went the other way.
    fn of_quoted(packet: &Packet, quoted: &Quoted, direction: Direction) -> Self {
        let direction = direction.reverse();
        let sent = Self {
            local: quoted.source,
            remote: quoted.destination,
            local_port: quoted.ports.source,
            remote_port: quoted.ports.destination,
            vlan: packet.vlans.id(),
            protocol: quoted.protocol,
            request: None,
        };
        sent.seen(direction).of_echo(quoted.echo, direction)
    }

    /// Turned round unless it was the guest that sent it.
    fn seen(self, direction: Direction) -> Self {
        match direction {
            Direction::Egress => self,
            Direction::Ingress => Self {
                local: self.remote,
                remote: self.local,
                local_port: self.remote_port,
                remote_port: self.local_port,
                ..self
            },
        }
    }

    /// Both sides may use the same identifier at the same time.
    fn of_echo(mut self, echo: Option<Echo>, direction: Direction) -> Self {
        self.request = echo.map(|echo| match echo {
            Echo::Request => direction,
            Echo::Reply => direction.reverse(),
        });
        self
    }

    /// What rules look at in the frame that opened the flow, in this direction.
    pub(crate) fn opening(&self, direction: Direction, icmp: Option<(u8, u8)>) -> Opening {
        let port = match direction {
            Direction::Ingress => self.local_port,
            Direction::Egress => self.remote_port,
        };
        Opening {
            remote: self.remote,
            protocol: self.protocol,
            destination_port: has_ports(self.protocol).then_some(port),
            icmp,
        }
    }
}

/// Hashes keys, with a secret, so that nobody can choose addresses that collide.
#[derive(Clone, Debug)]
pub(crate) struct KeyHasher {
    secrets: [u64; 4],
}

impl KeyHasher {
    pub(crate) fn new() -> Self {
        // The standard library's source of randomness for hash maps.
        let random = RandomState::new();
        Self {
            secrets: [0_u64, 1, 2, 3].map(|number| random.hash_one(number)),
        }
    }

    #[inline]
    pub(crate) fn hash(&self, key: &Key) -> u64 {
        let words = |address: Address| ((address.0 >> 64) as u64, address.0 as u64);
        let ((local_high, local_low), (remote_high, remote_low)) =
            (words(key.local), words(key.remote));
        let rest = u64::from(key.local_port)
            | u64::from(key.remote_port) << 16
            | u64::from(key.vlan) << 32
            | u64::from(key.protocol) << 56;
        let [a, b, c, d] = self.secrets;
        let local = fold(local_high ^ a, local_low ^ b);
        let remote = fold(remote_high ^ c, remote_low ^ d);
        let request = key.request.map_or(0, |direction| direction as u64 + 1);
        fold(
            local.wrapping_add(rest) ^ b,
            remote.wrapping_add(request) ^ d,
        )
    }
}

/// Both halves of the product: every bit of the result depends on every bit of both.
#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product >> 64) as u64 ^ product as u64
}
