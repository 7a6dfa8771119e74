//! Entries of L1 and L2 tables.

use crate::error::Error;
use crate::header::MAX_OFFSET;

/// The cluster that the entry points at has a reference count of one: it may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Version 3: reads zeroes, whatever the offset says.
const ZERO: u64 = 1;
const OFFSET_MASK: u64 = (MAX_OFFSET - 1) & !0x1ff;

/// What an L2 entry says about a guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// Look in the backing image; zeroes if there is none.
    Absent,
    /// Reads zeroes; a host cluster may be kept for it.
    Zero {
        host: Option<Host>,
    },
    Data(Host),
    Compressed(Compressed),
}

/// A host cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Host {
    pub(crate) offset: u64,
    /// Belongs to this entry alone.
    pub(crate) copied: bool,
}

/// A stretch of deflated data, at any byte of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Compressed {
    pub(crate) offset: u64,
    /// At most; the data says itself where it ends.
    pub(crate) len_bytes: u64,
}

impl Mapping {
    /// Decodes an entry of an image with these properties.
    ///
    /// # Errors
    /// The offset is not that of a cluster.
    pub(crate) fn decode(entry: u64, version: u32, cluster_bits: u32) -> Result<Self, Error> {
        if entry & COMPRESSED != 0 {
            return Ok(Self::Compressed(Compressed::decode(entry, cluster_bits)));
        }
        let offset = entry & OFFSET_MASK;
        if !offset.is_multiple_of(1 << cluster_bits) {
            return Err(Error::corrupt(format!(
                "an L2 entry that points into a cluster ({entry:#x})"
            )));
        }
        let host = (offset != 0).then_some(Host {
            offset,
            copied: entry & COPIED != 0,
        });
        Ok(match host {
            _ if version >= 3 && entry & ZERO != 0 => Self::Zero { host },
            Some(host) => Self::Data(host),
            None => Self::Absent,
        })
    }

    pub(crate) fn encode(self, cluster_bits: u32) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Zero { host } => ZERO | host.map_or(0, Host::encode),
            Self::Data(host) => host.encode(),
            Self::Compressed(compressed) => compressed.encode(cluster_bits),
        }
    }
}

impl Host {
    fn encode(self) -> u64 {
        self.offset | if self.copied { COPIED } else { 0 }
    }
}

impl Compressed {
    /// The offset has `62 - (cluster_bits - 8)` bits, the number of further sectors the rest.
    fn decode(entry: u64, cluster_bits: u32) -> Self {
        let offset_bits = 62 - (cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
        Self {
            offset,
            len_bytes: (sectors + 1) * 512 - offset % 512,
        }
    }

    fn encode(self, cluster_bits: u32) -> u64 {
        let offset_bits = 62 - (cluster_bits - 8);
        let sectors = (self.len_bytes + self.offset % 512) / 512 - 1;
        COMPRESSED | sectors << offset_bits | self.offset
    }

    /// The host clusters it touches.
    pub(crate) fn clusters(self, cluster_bits: u32) -> std::ops::RangeInclusive<u64> {
        let last = self.offset.saturating_add(self.len_bytes - 1);
        self.offset >> cluster_bits..=last >> cluster_bits
    }
}

/// Where the L2 table of an L1 entry is; `None` when there is none.
///
/// # Errors
/// The offset is not that of a cluster.
pub(crate) fn l2_table(entry: u64, cluster_bits: u32) -> Result<Option<u64>, Error> {
    let offset = entry & OFFSET_MASK;
    if !offset.is_multiple_of(1 << cluster_bits) {
        return Err(Error::corrupt(format!(
            "an L1 entry that points into a cluster ({entry:#x})"
        )));
    }
    Ok((offset != 0).then_some(offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_a_round_trip() {
        for cluster_bits in 9..=21 {
            let cluster_bytes = 1 << cluster_bits;
            let host = Host {
                offset: 5 * cluster_bytes,
                copied: true,
            };
            let compressed = Compressed {
                offset: 3 * cluster_bytes + 77,
                len_bytes: 1024 - 77,
            };
            for mapping in [
                Mapping::Absent,
                Mapping::Zero { host: None },
                Mapping::Zero { host: Some(host) },
                Mapping::Data(host),
                Mapping::Compressed(compressed),
            ] {
                let entry = mapping.encode(cluster_bits);
                assert_eq!(Mapping::decode(entry, 3, cluster_bits).unwrap(), mapping);
            }
        }
    }

    #[test]
    fn version_two_knows_no_zero_flag() {
        let entry = ZERO | 0x10000 | COPIED;
        assert!(matches!(
            Mapping::decode(entry, 2, 16).unwrap(),
            Mapping::Data(Host {
                offset: 0x10000,
                ..
            })
        ));
    }

    #[test]
    fn offsets_inside_clusters_are_refused() {
        assert!(Mapping::decode(0x10200, 3, 16).is_err());
        assert!(l2_table(COPIED | 0x8000, 16).is_err());
    }
}
