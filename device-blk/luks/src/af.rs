//! The anti-forensic splitter: a key is spread over so many stripes that losing any one of them
//! loses the key (LUKS1 specification, section 2.4).

use zeroize::Zeroizing;

use crate::hash::Hash;

/// Stripes of every key slot that `cryptsetup` and QEMU make.
pub(crate) const STRIPES: u32 = 4000;

/// The key of `key_bytes` in `striped`, whose length is a multiple of it.
pub(crate) fn merge(striped: &[u8], key_bytes: usize, hash: Hash) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; key_bytes]);
    let stripes = striped.len() / key_bytes;
    for (index, stripe) in striped.chunks_exact(key_bytes).enumerate() {
        xor(&mut key, stripe);
        if index + 1 < stripes {
            diffuse(&mut key, hash);
        }
    }
    key
}

/// Splits `key` over `striped`, a multiple of its length full of random bytes.
pub(crate) fn split(key: &[u8], striped: &mut [u8], hash: Hash) {
    let mut last = Zeroizing::new(vec![0; key.len()]);
    let (random, end) = striped.split_at_mut(striped.len() - key.len());
    for stripe in random.chunks_exact(key.len()) {
        xor(&mut last, stripe);
        diffuse(&mut last, hash);
    }
    xor(&mut last, key);
    end.copy_from_slice(&last);
}

fn xor(into: &mut [u8], other: &[u8]) {
    for (byte, other) in into.iter_mut().zip(other) {
        *byte ^= other;
    }
}

/// Each piece of a digest's length becomes the digest of its number and itself; the last piece
/// may be shorter.
fn diffuse(block: &mut [u8], hash: Hash) {
    for (number, piece) in block.chunks_mut(hash.digest_bytes()).enumerate() {
        let mut digest = Zeroizing::new([0; crate::hash::MAX_DIGEST_BYTES]);
        let digest = &mut digest[..piece.len()];
        hash.digest([&(number as u32).to_be_bytes()[..], &*piece], digest);
        piece.copy_from_slice(digest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_split_is_merged_again() {
        for hash in [Hash::Sha1, Hash::Sha256, Hash::Sha512] {
            for key_bytes in [32, 64] {
                let key: Vec<u8> = (0..key_bytes as u8).collect();
                let mut striped: Vec<u8> = (0..key_bytes * 100).map(|i| (i * 7) as u8).collect();
                split(&key, &mut striped, hash);
                assert_eq!(*merge(&striped, key_bytes, hash), key, "{hash:?}");
                striped[5] ^= 1;
                assert_ne!(
                    *merge(&striped, key_bytes, hash),
                    key,
                    "every stripe counts"
                );
            }
        }
    }
}
