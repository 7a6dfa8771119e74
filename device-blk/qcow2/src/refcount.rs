//! Reference counts of 1 to 64 bits, packed into a refcount block.
//!
//! Counts below a byte fill it from the least significant bit on; wider ones are big-endian.

/// Count number `index`, of 2^`order` bits.
pub(crate) fn get(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let (byte, shift, mask) = place(order, index);
            u64::from(block[byte] >> shift & mask)
        }
        3 => u64::from(block[index]),
        4 => u64::from(u16::from_be_bytes(array(block, index))),
        5 => u64::from(u32::from_be_bytes(array(block, index))),
        _ => u64::from_be_bytes(array(block, index)),
    }
}

/// Changes count number `index`; `value` must not be more than [`max`].
pub(crate) fn set(block: &mut [u8], order: u32, index: usize, value: u64) {
    debug_assert!(value <= max(order));
    match order {
        0..=2 => {
            let (byte, shift, mask) = place(order, index);
            block[byte] = block[byte] & !(mask << shift) | (value as u8) << shift;
        }
        _ => {
            let len = 1 << (order - 3);
            let bytes = &value.to_be_bytes()[8 - len..];
            block[index * len..(index + 1) * len].copy_from_slice(bytes);
        }
    }
}

/// The highest count that fits.
pub(crate) fn max(order: u32) -> u64 {
    u64::MAX >> (64 - (1_u32 << order))
}

fn place(order: u32, index: usize) -> (usize, u32, u8) {
    let bits = 1_u32 << order;
    let per_byte = 8 / bits as usize;
    let shift = (index % per_byte) as u32 * bits;
    (index / per_byte, shift, (1_u8 << bits) - 1)
}

fn array<const N: usize>(block: &[u8], index: usize) -> [u8; N] {
    block[index * N..(index + 1) * N]
        .try_into()
        .expect("N bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_neighbours() {
        for order in 0..=6 {
            let mut block = [0; 128];
            let count = (128 * 8) >> order;
            for index in 0..count {
                set(&mut block, order, index, (index as u64 * 7) & max(order));
            }
            for index in 0..count {
                assert_eq!(get(&block, order, index), (index as u64 * 7) & max(order));
            }
            set(&mut block, order, 3, max(order));
            assert_eq!(get(&block, order, 3), max(order));
            assert_eq!(get(&block, order, 4), 28 & max(order));
        }
    }
}
