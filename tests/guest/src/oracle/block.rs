//! Blocks that describe themselves, sector by sector.
//!
//! ```text
//!   word 0  magic ^ seed     2  sequence     4..63  derived from the words before
//!        1  block            3  sector       63     checksum of all before
//! ```

/// The unit of reads and writes.
pub const BLOCK_LEN: usize = 4096;
/// What a disk writes as a whole at least.
const SECTOR_LEN: usize = 512;
const WORDS: usize = SECTOR_LEN / 8;
const MAGIC: u64 = 0x6f72_6163_6c65_2e31;

/// What a block turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeroes: never written.
    Blank,
    /// As one write made it.
    Whole {
        /// The block that it was written for.
        block: u64,
        /// Of the write.
        sequence: u64,
    },
    /// Sectors of several writes, or written and blank ones.
    Torn,
    /// Something else.
    Foreign,
}

/// Fills a block for write number `sequence`.
///
/// # Panics
/// If the buffer isn't a block.
pub fn stamp(seed: u64, block: u64, sequence: u64, buffer: &mut [u8]) {
    assert_eq!(buffer.len(), BLOCK_LEN, "blocks are written whole");
    for (index, sector) in (0..).zip(buffer.chunks_exact_mut(SECTOR_LEN)) {
        let mut filler = block.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ sequence << 8 ^ index;
        let mut checksum = 0;
        for (position, place) in sector.chunks_exact_mut(8).enumerate() {
            let word = match position {
                0 => MAGIC ^ seed,
                1 => block,
                2 => sequence,
                3 => index,
                last if last == WORDS - 1 => checksum,
                _ => {
                    filler = filler.rotate_left(23).wrapping_add(0xbf58_476d_1ce4_e5b9);
                    filler
                }
            };
            checksum = mix(checksum, word);
            place.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// What `buffer` is.
///
/// # Panics
/// If the buffer isn't a block.
#[must_use]
pub fn examine(seed: u64, buffer: &[u8]) -> Content {
    assert_eq!(buffer.len(), BLOCK_LEN, "blocks are read whole");
    let mut sectors = (0..)
        .zip(buffer.chunks_exact(SECTOR_LEN))
        .map(|(index, sector)| examine_sector(seed, index, sector));
    let first = sectors.next().unwrap_or(Content::Blank);
    sectors.fold(first, |content, sector| match (content, sector) {
        (Content::Foreign, _) | (_, Content::Foreign) => Content::Foreign,
        (one, other) if one == other => one,
        _ => Content::Torn,
    })
}

/// A number for what was found at `block`. Those of a disk's blocks, XORed, tell two states of it
/// apart.
#[must_use]
pub fn digest(block: u64, content: Content) -> u64 {
    match content {
        Content::Blank => 0,
        Content::Whole {
            block: found,
            sequence,
        } => mix(mix(mix(1, block), found), sequence),
        Content::Torn => mix(2, block),
        Content::Foreign => mix(3, block),
    }
}

fn examine_sector(seed: u64, index: u64, sector: &[u8]) -> Content {
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(sector.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    if words == [0; WORDS] {
        return Content::Blank;
    }
    let (checksum, rest) = words.split_last().unwrap_or((&0, &[]));
    let expected = rest.iter().fold(0, |sum, &word| mix(sum, word));
    if words[0] != MAGIC ^ seed || words[3] != index || *checksum != expected {
        return Content::Foreign;
    }
    Content::Whole {
        block: words[1],
        sequence: words[2],
    }
}

fn mix(checksum: u64, word: u64) -> u64 {
    (checksum ^ word)
        .wrapping_mul(0x0000_0100_0000_01b3)
        .rotate_left(29)
}
