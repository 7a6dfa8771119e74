//! VLANs of a port (IEEE 802.1Q): which one a frame from it belongs to, and how a frame of one
//! leaves by it.

use api::device::SwitchPort;

/// Ethertype of a tag.
pub(super) const TPID: u16 = 0x8100;

/// Bytes of a tag.
pub(super) const TAG_LEN_BYTES: usize = 4;

/// What is in no VLAN: ports that know none, and frames without a tag where VLANs are read but untagged ones
/// have none. No tag names it.
pub(super) const NO_VLAN: u16 = 0;

/// Highest VLAN there is.
pub(super) const MAX_VLAN: u16 = 4094;

/// What a port knows of VLANs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Vlans {
    /// Nothing: tags are passed on as any other bytes, to ports of the same kind.
    Unaware,
    /// Frames without a tag belong to `native`, if there is one.
    Aware {
        native: Option<u16>,
        /// VLANs that come and go tagged; a bit for each.
        tagged: Box<[u64; 64]>,
    },
}

/// How a frame leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Egress {
    /// As it is inside the switch: without the tag that told its VLAN.
    Untagged,
    /// With a tag of its VLAN.
    Tagged,
}

/// Numbers that make no VLANs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum VlanError {
    #[error("VLAN {0} does not exist; they are 1 to {MAX_VLAN}")]
    NoSuchVlan(u32),
    #[error("VLAN {0} cannot come both with and without a tag; name it once")]
    Twice(u32),
}

impl Vlans {
    /// Of a port.
    pub(super) fn of(port: &SwitchPort) -> Result<Self, VlanError> {
        let (native, tagged) = (port.vlan, &port.trunk_vlans);
        if native == 0 && tagged.is_empty() && !port.vlan_aware && !port.all_vlans {
            return Ok(Self::Unaware);
        }
        let checked = |vlan: u32| match u16::try_from(vlan) {
            Ok(vlan @ 1..=MAX_VLAN) => Ok(vlan),
            _ => Err(VlanError::NoSuchVlan(vlan)),
        };
        let native_vlan = match native {
            0 => port.vlan_aware.then_some(NO_VLAN),
            vlan => Some(checked(vlan)?),
        };
        let mut bits = Box::new([0; 64]);
        if port.all_vlans {
            let others = (1..=MAX_VLAN).filter(|&vlan| native_vlan != Some(vlan));
            others.for_each(|vlan| bits[usize::from(vlan / 64)] |= 1 << (vlan % 64));
        }
        for &vlan in tagged {
            let number = checked(vlan)?;
            if native_vlan == Some(number) {
                return Err(VlanError::Twice(vlan));
            }
            bits[usize::from(number / 64)] |= 1 << (number % 64);
        }
        Ok(Self::Aware {
            native: native_vlan,
            tagged: bits,
        })
    }

    /// The VLAN of a frame that comes with `tag` (priority, and VLAN in the lower twelve bits);
    /// None when it may not come.
    #[inline]
    pub(super) fn ingress(&self, tag: Option<u16>) -> Option<u16> {
        match (self, tag.map(|tag| tag & 0xfff)) {
            (Self::Unaware, _) => Some(NO_VLAN),
            // VLAN 0 in a tag: only its priority counts.
            (Self::Aware { native, .. }, None | Some(0)) => *native,
            (Self::Aware { tagged, .. }, Some(vlan)) => has(tagged, vlan).then_some(vlan),
        }
    }

    /// How a frame of `vlan` leaves, if it does. `looks_tagged` is a frame whose first bytes, without
    /// the tag of `vlan`, are a tag again: without another before it, others would take it for
    /// one of its VLAN.
    #[inline]
    pub(super) fn egress(&self, vlan: u16, looks_tagged: bool) -> Option<Egress> {
        match self {
            Self::Unaware => (vlan == NO_VLAN).then_some(Egress::Untagged),
            Self::Aware { native, .. } if *native == Some(vlan) => {
                (!looks_tagged).then_some(Egress::Untagged)
            }
            Self::Aware { tagged, .. } => has(tagged, vlan).then_some(Egress::Tagged),
        }
    }

    /// Whether tags of frames that come from the port are read, and taken off.
    #[inline]
    pub(super) fn reads_tags(&self) -> bool {
        matches!(self, Self::Aware { .. })
    }
}

fn has(bits: &[u64; 64], vlan: u16) -> bool {
    bits[usize::from(vlan / 64) % 64] & 1 << (vlan % 64) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vlans(native: u32, tagged: &[u32]) -> Result<Vlans, VlanError> {
        Vlans::of(&SwitchPort {
            vlan: native,
            trunk_vlans: tagged.to_vec(),
            ..SwitchPort::default()
        })
    }

    #[test]
    fn access_port_takes_and_gives_untagged_frames_of_its_vlan_alone() {
        let access = vlans(10, &[]).unwrap();
        assert_eq!(access.ingress(None), Some(10));
        assert_eq!(access.ingress(Some(0x6000)), Some(10), "priority alone");
        assert_eq!(access.ingress(Some(10)), None, "its own VLAN, but tagged");
        assert_eq!(access.ingress(Some(20)), None);
        assert_eq!(access.egress(10, false), Some(Egress::Untagged));
        assert_eq!(access.egress(10, true), None, "a second tag would hop");
        assert_eq!(access.egress(20, false), None);
        assert_eq!(access.egress(NO_VLAN, false), None);
    }

    #[test]
    fn trunk_port_carries_its_vlans_tagged() {
        let trunk = vlans(1, &[20, 4094]).unwrap();
        assert_eq!(trunk.ingress(None), Some(1));
        assert_eq!(trunk.ingress(Some(0xe000 | 20)), Some(20));
        assert_eq!(trunk.ingress(Some(21)), None);
        assert_eq!(trunk.egress(4094, true), Some(Egress::Tagged));
        assert_eq!(trunk.egress(1, false), Some(Egress::Untagged));
        assert_eq!(trunk.egress(21, false), None);
        let without_native = vlans(0, &[20]).unwrap();
        assert_eq!(without_native.ingress(None), None);
    }

    #[test]
    fn port_without_vlans_passes_tags_on_among_its_kind() {
        let unaware = vlans(0, &[]).unwrap();
        assert_eq!(unaware.ingress(Some(20)), Some(NO_VLAN));
        assert_eq!(unaware.egress(NO_VLAN, true), Some(Egress::Untagged));
        assert_eq!(unaware.egress(20, false), None);
    }

    #[test]
    fn aware_port_without_vlan_lets_no_tag_through() {
        let aware = SwitchPort {
            vlan_aware: true,
            ..SwitchPort::default()
        };
        let port = Vlans::of(&aware).unwrap();
        assert_eq!(port.ingress(None), Some(NO_VLAN));
        assert_eq!(port.ingress(Some(20)), None);
        assert_eq!(port.egress(NO_VLAN, false), Some(Egress::Untagged));
        assert_eq!(
            port.egress(NO_VLAN, true),
            None,
            "it would be in VLAN 20 outside"
        );
        let uplink = SwitchPort {
            all_vlans: true,
            ..aware
        };
        let uplink = Vlans::of(&uplink).unwrap();
        assert_eq!(uplink.ingress(None), Some(NO_VLAN));
        assert_eq!(uplink.egress(NO_VLAN, true), None);
        for vlan in [1, 20, MAX_VLAN] {
            assert_eq!(uplink.ingress(Some(vlan)), Some(vlan));
            assert_eq!(uplink.egress(vlan, false), Some(Egress::Tagged));
        }
        assert_eq!(uplink.ingress(Some(4095)), None);
    }

    #[test]
    fn numbers_that_are_no_vlans_are_named() {
        assert_eq!(vlans(4095, &[]), Err(VlanError::NoSuchVlan(4095)));
        assert_eq!(vlans(1, &[0]), Err(VlanError::NoSuchVlan(0)));
        assert_eq!(vlans(1, &[70_000]), Err(VlanError::NoSuchVlan(70_000)));
        assert_eq!(vlans(7, &[7]), Err(VlanError::Twice(7)));
    }
}
