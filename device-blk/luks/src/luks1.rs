//! The header of LUKS1: 592 bytes, big-endian, once.

use std::fs::File;

use crate::area;
use crate::error::LuksError;
use crate::kdf::Kdf;
use crate::slot::{
    KeyDigest, Layout, Slot, checked_cipher, checked_hash, checked_key_bytes, checked_stripes, text,
};

/// `struct phdr` (LUKS1 specification, figure 1).
const HEADER_BYTES: usize = 592;
const SECTOR_BYTES: u64 = 512;
/// `LUKS_KEY_ENABLED`
const SLOT_IN_USE: u32 = 0x00AC_71F3;
/// `LUKS_DIGESTSIZE`
const DIGEST_BYTES: usize = 20;

/// Reads the header of a file that begins with LUKS' magic and version 1.
///
/// # Errors
/// The header is wrong, or of a kind that is not supported.
pub(crate) fn read(file: &File) -> Result<Layout, LuksError> {
    parse(&area::read(file, 0, HEADER_BYTES, "read the LUKS header")?)
}

fn parse(header: &[u8]) -> Result<Layout, LuksError> {
    let cipher = format!("{}-{}", text(&header[8..40])?, text(&header[40..72])?);
    checked_cipher(&cipher)?;
    let hash = checked_hash(text(&header[72..104])?)?;
    let key_bytes = checked_key_bytes(u64::from(be32(header, 108)))?;
    let payload_offset_bytes = u64::from(be32(header, 104)) * SECTOR_BYTES;
    if payload_offset_bytes == 0 {
        return Err(LuksError::Unsupported {
            what: "a detached header".to_owned(),
            supported: "headers in front of their data",
        });
    }
    let mut slots = Vec::new();
    for slot in header[208..].as_chunks::<48>().0 {
        if be32(slot, 0) != SLOT_IN_USE {
            continue;
        }
        let slot = Slot {
            kdf: Kdf::Pbkdf2 {
                hash,
                iterations: be32(slot, 4),
            },
            salt: slot[8..40].to_vec(),
            af_hash: hash,
            stripes: checked_stripes(be32(slot, 44))?,
            area_offset_bytes: u64::from(be32(slot, 40)) * SECTOR_BYTES,
            area_key_bytes: key_bytes,
            key_bytes,
        };
        let end_bytes = slot.area_offset_bytes + slot.striped_bytes() as u64;
        if slot.area_offset_bytes < HEADER_BYTES as u64 || end_bytes > payload_offset_bytes {
            return Err(LuksError::malformed(
                "a key slot lies outside of the space between header and data",
            ));
        }
        slots.push(slot);
    }
    Ok(Layout {
        version: 1,
        uuid: text(&header[168..208])?.to_owned(),
        slots,
        digest: KeyDigest {
            hash,
            iterations: be32(header, 164),
            salt: header[132..164].to_vec(),
            digest: header[112..112 + DIGEST_BYTES].to_vec(),
        },
        payload_offset_bytes,
        payload_len_bytes: None,
        sector_bytes: SECTOR_BYTES as u32,
        first_iv: 0,
        has_damaged_copy: false,
    })
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Vec<u8> {
        let mut header = vec![0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| {
            header[at..at + field.len()].copy_from_slice(field);
        };
        put(8, b"aes");
        put(40, b"xts-plain64");
        put(72, b"sha256");
        put(104, &4096_u32.to_be_bytes());
        put(108, &64_u32.to_be_bytes());
        put(164, &1000_u32.to_be_bytes());
        put(208, &SLOT_IN_USE.to_be_bytes());
        put(212, &1000_u32.to_be_bytes());
        put(248, &8_u32.to_be_bytes());
        put(252, &4000_u32.to_be_bytes());
        header
    }

    #[test]
    fn slots_in_use_are_found() {
        let layout = parse(&header()).unwrap();
        assert_eq!(layout.slots.len(), 1);
        assert_eq!(layout.slots[0].area_offset_bytes, 4096);
        assert_eq!(layout.payload_offset_bytes, 2 << 20);
    }

    #[test]
    fn hostile_fields_are_refused() {
        for (at, value, kind) in [
            (252, u32::MAX, "stripes"),
            (252, 0, "stripes"),
            (248, u32::MAX, "outside"),
            (248, 0, "outside"),
            (248, 4095, "outside"),
            (108, u32::MAX, "bits"),
            (108, 0, "bits"),
            (104, 0, "detached"),
            (8, u32::MAX, "UTF-8"),
            (72, 0x6162_6300, "hash"),
        ] {
            let mut header = header();
            header[at..at + 4].copy_from_slice(&value.to_be_bytes());
            let error = parse(&header).unwrap_err();
            assert!(error.to_string().contains(kind), "{at}: {error}");
        }
    }
}
