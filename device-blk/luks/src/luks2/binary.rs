//! The binary part of a LUKS2 header (LUKS2 specification, section 2.1).

use crate::hash::Hash;

/// Bytes of the binary part.
pub(crate) const BINARY_BYTES: usize = 4096;
/// Sizes that a header, JSON included, may have; the secondary one follows the primary.
pub(crate) const HEADER_SIZES: [u64; 9] = [
    16 << 10,
    32 << 10,
    64 << 10,
    128 << 10,
    256 << 10,
    512 << 10,
    1 << 20,
    2 << 20,
    4 << 20,
];

/// What every header of LUKS1 and every primary one of LUKS2 begins with.
pub(crate) const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
const SECONDARY_MAGIC: [u8; 6] = *b"SKUL\xba\xbe";
const VERSION: u16 = 2;
const CHECKSUM_AT: usize = 448;
const CHECKSUM_BYTES: usize = 64;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copy {
    Primary,
    Secondary,
}

impl Copy {
    fn magic(self) -> [u8; 6] {
        match self {
            Self::Primary => MAGIC,
            Self::Secondary => SECONDARY_MAGIC,
        }
    }
}

/// `struct luks2_hdr_disk`, as far as it is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BinaryHeader {
    /// JSON included; one of [`HEADER_SIZES`].
    pub(crate) header_bytes: u64,
    pub(crate) sequence: u64,
    pub(crate) uuid: String,
    pub(crate) label: String,
    pub(crate) salt: [u8; 64],
    checksum_hash: Hash,
    checksum: Vec<u8>,
}

impl BinaryHeader {
    /// A header to be written.
    pub(crate) fn new(header_bytes: u64, uuid: String, label: String, salt: [u8; 64]) -> Self {
        Self {
            header_bytes,
            sequence: 1,
            uuid,
            label,
            salt,
            checksum_hash: Hash::Sha256,
            checksum: Vec::new(),
        }
    }

    /// `None` if this is no header that belongs at `offset_bytes`.
    pub(crate) fn parse(bytes: &[u8], copy: Copy, offset_bytes: u64) -> Option<Self> {
        let be64 = |at: usize| {
            let mut field = [0; 8];
            field.copy_from_slice(&bytes[at..at + 8]);
            u64::from_be_bytes(field)
        };
        let text = |from: usize, to: usize| crate::slot::text(&bytes[from..to]).ok();
        if bytes[..6] != copy.magic() || bytes[6..8] != VERSION.to_be_bytes() {
            return None;
        }
        let header_bytes = be64(8);
        let belongs_here = match copy {
            Copy::Primary => offset_bytes == 0,
            Copy::Secondary => offset_bytes == header_bytes,
        };
        if !HEADER_SIZES.contains(&header_bytes) || !belongs_here || be64(256) != offset_bytes {
            return None;
        }
        let checksum_hash = Hash::from_name(text(72, 104)?)?;
        let mut salt = [0; 64];
        salt.copy_from_slice(&bytes[104..168]);
        Some(Self {
            header_bytes,
            sequence: be64(16),
            uuid: text(168, 208)?.to_owned(),
            label: text(24, 72)?.to_owned(),
            salt,
            checksum_hash,
            checksum: bytes[CHECKSUM_AT..CHECKSUM_AT + checksum_hash.digest_bytes()].to_vec(),
        })
    }

    /// Whether `whole`, JSON included, has the checksum that it names.
    pub(crate) fn checksum_matches(&self, whole: &[u8]) -> bool {
        checksum(whole, self.checksum_hash) == self.checksum
    }

    /// The whole header with `json`, for one of the two places.
    ///
    /// # Panics
    /// The JSON does not fit.
    pub(crate) fn to_bytes(&self, copy: Copy, json: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; self.header_bytes as usize];
        let mut put = |at: usize, field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
        };
        let offset_bytes = match copy {
            Copy::Primary => 0,
            Copy::Secondary => self.header_bytes,
        };
        put(0, &copy.magic());
        put(6, &VERSION.to_be_bytes());
        put(8, &self.header_bytes.to_be_bytes());
        put(16, &self.sequence.to_be_bytes());
        put(24, self.label.as_bytes());
        put(72, b"sha256");
        put(104, &self.salt);
        put(168, self.uuid.as_bytes());
        put(256, &offset_bytes.to_be_bytes());
        put(BINARY_BYTES, json);
        let checksum = checksum(&bytes, Hash::Sha256);
        bytes[CHECKSUM_AT..CHECKSUM_AT + checksum.len()].copy_from_slice(&checksum);
        bytes
    }
}

/// Of the whole header, the checksum's own field taken as zeroes.
fn checksum(whole: &[u8], hash: Hash) -> Vec<u8> {
    let mut digest = vec![0; hash.digest_bytes()];
    let parts = [
        &whole[..CHECKSUM_AT],
        &[0; CHECKSUM_BYTES],
        &whole[CHECKSUM_AT + CHECKSUM_BYTES..],
    ];
    hash.digest(parts, &mut digest);
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> BinaryHeader {
        BinaryHeader::new(16 << 10, "a-b-c".into(), "label".into(), [7; 64])
    }

    #[test]
    fn written_headers_are_read_and_have_their_checksum() {
        for (copy, offset_bytes) in [(Copy::Primary, 0), (Copy::Secondary, 16 << 10)] {
            let mut bytes = header().to_bytes(copy, b"{}");
            let parsed = BinaryHeader::parse(&bytes, copy, offset_bytes).unwrap();
            assert_eq!(parsed.uuid, "a-b-c");
            assert_eq!(parsed.label, "label");
            assert_eq!(parsed.sequence, 1);
            assert!(parsed.checksum_matches(&bytes));
            bytes[BINARY_BYTES + 1] ^= 1;
            assert!(!parsed.checksum_matches(&bytes));
        }
    }

    #[test]
    fn headers_that_do_not_belong_here_are_none() {
        let bytes = header().to_bytes(Copy::Primary, b"{}");
        assert!(BinaryHeader::parse(&bytes, Copy::Secondary, 16 << 10).is_none());
        assert!(BinaryHeader::parse(&bytes, Copy::Primary, 16 << 10).is_none());
        for (at, field) in [
            (0, &b"X"[..]),
            (6, &[0, 9]),
            (8, &[0xff; 8]),
            (8, &[0; 8]),
            (8, &[0, 0, 0, 0, 0, 0, 0x40, 1]),
            (72, b"md5\0"),
            (256, &[1]),
        ] {
            let mut bytes = bytes.clone();
            bytes[at..at + field.len()].copy_from_slice(field);
            assert_eq!(BinaryHeader::parse(&bytes, Copy::Primary, 0), None, "{at}");
        }
    }
}
