//! The header of LUKS2: a binary part and JSON, twice.
//!
//! ```text
//! 0           hdr_size      2 hdr_size                      segment offset
//! │ binary JSON │ binary JSON │ key slot areas ...          │ data
//!   primary       secondary
//! ```
//!
//! Each copy has a checksum and a sequence number; the valid copy with the higher number counts.

pub(crate) mod binary;
pub(crate) mod metadata;

use std::fs::File;

use crate::area;
use crate::error::LuksError;
use crate::slot::Layout;
use binary::{BINARY_BYTES, BinaryHeader, Copy, HEADER_SIZES};
use metadata::Metadata;

/// Reads the better copy of the header.
///
/// # Errors
/// There is no valid copy, or it describes what is not supported.
pub(crate) fn read(file: &File) -> Result<Layout, LuksError> {
    let primary = read_copy(file, Copy::Primary, 0)?;
    let secondary = match &primary {
        Some((header, _)) => read_copy(file, Copy::Secondary, header.header_bytes)?,
        None => find_secondary(file)?,
    };
    let has_damaged_copy = primary.is_none() || secondary.is_none();
    let better = match (primary, secondary) {
        (Some(primary), Some(secondary)) if secondary.0.sequence > primary.0.sequence => secondary,
        (Some(primary), _) => primary,
        (None, Some(secondary)) => secondary,
        (None, None) => return Err(LuksError::Damaged),
    };
    let (header, json) = better;
    let metadata = Metadata::parse(&json)?;
    metadata.layout(&header, has_damaged_copy)
}

/// True if a secondary header stands where one may be: the primary was overwritten.
pub(crate) fn has_secondary(file: &File) -> Result<bool, LuksError> {
    Ok(find_secondary(file)?.is_some())
}

fn find_secondary(file: &File) -> Result<Option<(BinaryHeader, Vec<u8>)>, LuksError> {
    for offset_bytes in HEADER_SIZES {
        if let Some(found) = read_copy(file, Copy::Secondary, offset_bytes)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// A valid copy at this place, and its JSON.
fn read_copy(
    file: &File,
    copy: Copy,
    offset_bytes: u64,
) -> Result<Option<(BinaryHeader, Vec<u8>)>, LuksError> {
    const ACTION: &str = "read the LUKS2 header";
    let start = match area::read(file, offset_bytes, BINARY_BYTES, ACTION) {
        Ok(start) => start,
        Err(error) if is_end_of_file(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let Some(header) = BinaryHeader::parse(&start, copy, offset_bytes) else {
        return Ok(None);
    };
    let whole = match area::read(file, offset_bytes, header.header_bytes as usize, ACTION) {
        Ok(whole) => whole,
        Err(error) if is_end_of_file(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    if !header.checksum_matches(&whole) {
        return Ok(None);
    }
    Ok(Some((header, whole[BINARY_BYTES..].to_vec())))
}

fn is_end_of_file(error: &LuksError) -> bool {
    matches!(error, LuksError::Io { source, .. } if source.kind() == std::io::ErrorKind::UnexpectedEof)
}
