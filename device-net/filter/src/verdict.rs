//! What becomes of a frame, and why.

/// Which way a frame goes, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// To the guest.
    Ingress,
    /// From the guest.
    Egress,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// The way back.
    pub fn reverse(self) -> Self {
        match self {
            Self::Ingress => Self::Egress,
            Self::Egress => Self::Ingress,
        }
    }
}

/// Whether a frame goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// It does.
    Pass,
    /// It does not.
    Drop(DropReason),
}

/// Why a frame was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// Headers that contradict themselves or the frame's length, or are too long to be looked at.
    Malformed,
    /// The source MAC is not the guest's.
    MacSpoofed,
    /// The source address is not the guest's.
    AddressSpoofed,
    /// ARP that claims somebody else's address.
    ArpSpoofed,
    /// Neighbour discovery that claims somebody else's address.
    NeighbourSpoofed,
    /// What only a DHCP server sends.
    DhcpServer,
    /// What only a router sends.
    Router,
    /// What is for the bridge next to the guest alone: spanning tree, pause, LLDP.
    LinkControl,
    /// No security rule permits it.
    NotPermitted,
    /// Neither IP nor ARP.
    Ethertype,
    /// A fragment whose first one did not pass, or not yet.
    Fragment,
    /// A rate limit, where frames cannot wait.
    RateLimit,
    /// The time is over that the guest was allowed.
    LeaseEnded,
}

impl DropReason {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 13] = [
        Self::Malformed,
        Self::MacSpoofed,
        Self::AddressSpoofed,
        Self::ArpSpoofed,
        Self::NeighbourSpoofed,
        Self::DhcpServer,
        Self::Router,
        Self::LinkControl,
        Self::NotPermitted,
        Self::Ethertype,
        Self::Fragment,
        Self::RateLimit,
        Self::LeaseEnded,
    ];

    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::MacSpoofed => "mac_spoofed",
            Self::AddressSpoofed => "address_spoofed",
            Self::ArpSpoofed => "arp_spoofed",
            Self::NeighbourSpoofed => "neighbour_spoofed",
            Self::DhcpServer => "dhcp_server",
            Self::Router => "router",
            Self::LinkControl => "link_control",
            Self::NotPermitted => "not_permitted",
            Self::Ethertype => "ethertype",
            Self::Fragment => "fragment",
            Self::RateLimit => "rate_limit",
            Self::LeaseEnded => "lease_ended",
        }
    }
}
