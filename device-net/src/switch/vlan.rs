//! VLANs of a port (IEEE 802.1Q): which one a frame from it belongs to, and how a frame of one
//! leaves by it.

/// Ethertype of a tag.
pub(super) const TPID: u16 = 0x8100;

/// Bytes of a tag.
pub(super) const TAG_LEN_BYTES: usize = 4;

/// The VLAN that ports without VLANs are in. No tag names it.
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
    /// Of a port whose untagged frames belong to `native` (0: to none) and that carries `tagged`.
    pub(super) fn new(native: u32, tagged: &[u32]) -> Result<Self, VlanError> {
        if native == 0 && tagged.is_empty() {
            return Ok(Self::Unaware);
        }
        let checked = |vlan: u32| match u16::try_from(vlan) {
            Ok(vlan @ 1..=MAX_VLAN) => Ok(vlan),
            _ => Err(VlanError::NoSuchVlan(vlan)),
        };
        let native_vlan = match native {
            0 => None,
            vlan => Some(checked(vlan)?),
        };
        let mut bits = Box::new([0; 64]);
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

    #[test]
    fn access_port_takes_and_gives_untagged_frames_of_its_vlan_alone() {
        let access = Vlans::new(10, &[]).unwrap();
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
        let trunk = Vlans::new(1, &[20, 4094]).unwrap();
        assert_eq!(trunk.ingress(None), Some(1));
        assert_eq!(trunk.ingress(Some(0xe000 | 20)), Some(20));
        assert_eq!(trunk.ingress(Some(21)), None);
        assert_eq!(trunk.egress(4094, true), Some(Egress::Tagged));
        assert_eq!(trunk.egress(1, false), Some(Egress::Untagged));
        assert_eq!(trunk.egress(21, false), None);
        let without_native = Vlans::new(0, &[20]).unwrap();
        assert_eq!(without_native.ingress(None), None);
    }

    #[test]
    fn port_without_vlans_passes_tags_on_among_its_kind() {
        let unaware = Vlans::new(0, &[]).unwrap();
        assert_eq!(unaware.ingress(Some(20)), Some(NO_VLAN));
        assert_eq!(unaware.egress(NO_VLAN, true), Some(Egress::Untagged));
        assert_eq!(unaware.egress(20, false), None);
    }

    #[test]
    fn numbers_that_are_no_vlans_are_named() {
        assert_eq!(Vlans::new(4095, &[]), Err(VlanError::NoSuchVlan(4095)));
        assert_eq!(Vlans::new(1, &[0]), Err(VlanError::NoSuchVlan(0)));
        assert_eq!(Vlans::new(1, &[70_000]), Err(VlanError::NoSuchVlan(70_000)));
        assert_eq!(Vlans::new(7, &[7]), Err(VlanError::Twice(7)));
    }
}
