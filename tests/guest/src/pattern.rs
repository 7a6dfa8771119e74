//! Data derived from a seed, so that a verifier needs no copy of it.
//!
//! Every block names its place: a block at the wrong place or of an older seed never matches.

/// Blocks are derived one by one; the unit of a disk's verification.
pub const BLOCK_LEN: usize = 4096;

/// Fills whole blocks; `first_block` is the index of the first.
///
/// # Panics
/// If the buffer isn't a whole number of blocks.
pub fn fill(seed: u64, first_block: u64, buffer: &mut [u8]) {
    assert!(
        buffer.len().is_multiple_of(BLOCK_LEN),
        "patterns come in whole blocks"
    );
    for (index, block) in (first_block..).zip(buffer.chunks_exact_mut(BLOCK_LEN)) {
        let mut state = seed ^ index.wrapping_mul(0xd6e8_feb8_6659_fd93);
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&splitmix64(&mut state).to_le_bytes());
        }
    }
}

/// The index of the first block that isn't as [`fill`] makes it.
///
/// # Panics
/// If the buffer isn't a whole number of blocks.
#[must_use]
pub fn first_mismatch(seed: u64, first_block: u64, buffer: &[u8]) -> Option<u64> {
    assert!(
        buffer.len().is_multiple_of(BLOCK_LEN),
        "patterns come in whole blocks"
    );
    let mut expected = [0; BLOCK_LEN];
    (first_block..)
        .zip(buffer.chunks_exact(BLOCK_LEN))
        .find_map(|(index, block)| {
            fill(seed, index, &mut expected);
            (block != expected).then_some(index)
        })
}

/// Steele, Lea, Flood: "Fast splittable pseudorandom number generators" (2014).
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_at_the_wrong_place_mismatches() {
        let mut data = vec![0; 3 * BLOCK_LEN];
        fill(7, 10, &mut data);
        assert_eq!(first_mismatch(7, 10, &data), None);
        assert_eq!(first_mismatch(7, 11, &data), Some(11));
        assert_eq!(first_mismatch(8, 10, &data), Some(10));
        data[2 * BLOCK_LEN + 5] ^= 1;
        assert_eq!(first_mismatch(7, 10, &data), Some(12));
    }
}
