//! AES in XTS mode on sectors (IEEE 1619), with `plain64` tweaks: a sector's number, little-endian.

use std::fmt;

use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit, consts::U16};
use aes::{Aes128, Aes256};

use crate::error::LuksError;
use crate::protected::Protected;

/// Unit in which sectors are counted for tweaks, whatever their size.
pub const IV_SECTOR_BYTES: u64 = 512;

/// Bytes that are worked on at once: whole sectors of either size, and few enough that data and
/// tweaks stay in the first-level cache.
const CHUNK_BYTES: usize = 4096;
const BLOCK_BYTES: usize = 16;
const CHUNK_BLOCKS: usize = CHUNK_BYTES / BLOCK_BYTES;

type Block = Array<u8, U16>;

/// Encrypts and decrypts the sectors of one volume.
pub struct Cipher {
    keys: Protected<Keys>,
    sector_bytes: usize,
    /// Added to every sector's number.
    first_iv: u64,
}

#[expect(
    clippy::large_enum_variant,
    reason = "a box would take keys out of their protected pages"
)]
enum Keys {
    Aes128 { data: Aes128, tweak: Aes128 },
    Aes256 { data: Aes256, tweak: Aes256 },
}

impl Cipher {
    /// `key` has 32 or 64 bytes: one half for data, one for tweaks.
    pub(crate) fn new(key: &[u8], sector_bytes: u32, first_iv: u64) -> Result<Self, LuksError> {
        let (data, tweak) = key.split_at(key.len() / 2);
        let keys = match key.len() {
            32 => Keys::Aes128 {
                data: expand(data),
                tweak: expand(tweak),
            },
            64 => Keys::Aes256 {
                data: expand(data),
                tweak: expand(tweak),
            },
            _ => {
                return Err(LuksError::Unsupported {
                    what: format!("a key of {} bits", key.len() * 8),
                    supported: "AES-XTS keys of 256 and 512 bits",
                });
            }
        };
        let keys = Protected::new(keys).map_err(LuksError::io("allocate memory for keys"))?;
        Ok(Self {
            keys,
            sector_bytes: sector_bytes as usize,
            first_iv,
        })
    }

    /// Unit in which data is encrypted: 512 or 4096.
    pub fn sector_bytes(&self) -> u32 {
        self.sector_bytes as u32
    }

    /// Encrypts `data` in place; it begins at sector `first_sector` of the payload, in units of
    /// [`IV_SECTOR_BYTES`].
    ///
    /// # Panics
    /// `data` is not made of whole sectors of this volume.
    pub fn encrypt(&self, first_sector: u64, data: &mut [u8]) {
        match &*self.keys {
            Keys::Aes128 { data: key, tweak } => {
                self.run(first_sector, data, tweak, |blocks| {
                    key.encrypt_blocks(blocks)
                });
            }
            Keys::Aes256 { data: key, tweak } => {
                self.run(first_sector, data, tweak, |blocks| {
                    key.encrypt_blocks(blocks)
                });
            }
        }
    }

    /// Decrypts `data` in place, as [`Self::encrypt`] encrypts it.
    ///
    /// # Panics
    /// `data` is not made of whole sectors of this volume.
    pub fn decrypt(&self, first_sector: u64, data: &mut [u8]) {
        match &*self.keys {
            Keys::Aes128 { data: key, tweak } => {
                self.run(first_sector, data, tweak, |blocks| {
                    key.decrypt_blocks(blocks)
                });
            }
            Keys::Aes256 { data: key, tweak } => {
                self.run(first_sector, data, tweak, |blocks| {
                    key.decrypt_blocks(blocks)
                });
            }
        }
    }

    fn run(
        &self,
        first_sector: u64,
        data: &mut [u8],
        tweak_key: &impl BlockCipherEncrypt<BlockSize = U16>,
        apply: impl Fn(&mut [Block]),
    ) {
        let ivs_per_sector = self.sector_bytes as u64 / IV_SECTOR_BYTES;
        assert!(
            data.len().is_multiple_of(self.sector_bytes)
                && first_sector.is_multiple_of(ivs_per_sector),
            "only whole sectors can be encrypted"
        );
        let mut tweaks = [0_u128; CHUNK_BLOCKS];
        let mut iv = self.first_iv.wrapping_add(first_sector);
        for chunk in data.chunks_mut(CHUNK_BYTES) {
            let sectors = chunk.len() / self.sector_bytes;
            let mut first = [Block::default(); CHUNK_BYTES / IV_SECTOR_BYTES as usize];
            for block in &mut first[..sectors] {
                block[..8].copy_from_slice(&iv.to_le_bytes());
                iv = iv.wrapping_add(ivs_per_sector);
            }
            tweak_key.encrypt_blocks(&mut first[..sectors]);
            let blocks_per_sector = self.sector_bytes / BLOCK_BYTES;
            for (first, tweaks) in first.iter().zip(tweaks.chunks_mut(blocks_per_sector)) {
                let mut tweak = u128::from_le_bytes((*first).into());
                for place in tweaks {
                    *place = tweak;
                    tweak = doubled(tweak);
                }
            }
            let (blocks, _) = chunk.as_chunks_mut::<BLOCK_BYTES>();
            whiten(blocks, &tweaks);
            apply(Array::cast_slice_from_core_mut(blocks));
            whiten(blocks, &tweaks);
        }
    }
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = match &*self.keys {
            Keys::Aes128 { .. } => 128,
            Keys::Aes256 { .. } => 256,
        };
        f.debug_struct("Cipher")
            .field("aes_bits", &bits)
            .field("sector_bytes", &self.sector_bytes)
            .finish_non_exhaustive()
    }
}

fn expand<A: KeyInit>(half: &[u8]) -> A {
    A::new_from_slice(half).expect("the caller matched the length")
}

/// Multiplies by x in GF(2^128) with IEEE 1619's polynomial.
#[inline(always)]
fn doubled(tweak: u128) -> u128 {
    // The sign bit, spread over the word.
    let carry = ((tweak as i128) >> 127) as u128;
    (tweak << 1) ^ (carry & 0x87)
}

#[inline(always)]
fn whiten(blocks: &mut [[u8; BLOCK_BYTES]], tweaks: &[u128; CHUNK_BLOCKS]) {
    for (block, tweak) in blocks.iter_mut().zip(tweaks) {
        *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    const KEY_256: &str = "2718281828459045235360287471352631415926535897932384626433832795";
    const KEY_512: &str = "27182818284590452353602874713526624977572470936999595749669676273\
                           141592653589793238462643383279502884197169399375105820974944592";

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex
            .chars()
            .map(|digit| digit.to_digit(16).unwrap() as u8)
            .collect();
        digits
            .chunks(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect()
    }

    fn counting(len: usize) -> Vec<u8> {
        (0..len).map(|place| place as u8).collect()
    }

    /// IEEE 1619-2007 vectors 4 and 10; the last one and the digests of whole sectors are OpenSSL's.
    #[test]
    fn known_sectors_are_encrypted_as_the_standard_says() {
        for (key, sector_bytes, sector, head, digest) in [
            (
                KEY_256,
                512,
                0,
                "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c",
                "ebee4d64dd2395bb2d6a2d37a0a48ecb2bf4913cfc99d27c2214f2f4144715ea",
            ),
            (
                KEY_512,
                512,
                0xff,
                "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
                "e97e974fa393af794f7a4684395814cf820de60a01eaec677d87b452e316b364",
            ),
            (
                KEY_512,
                4096,
                8,
                "2ba7fe1526a56fbf446f4fff0e936e33",
                "06bf66621fd81ca059ec8331e309a3e2065326a1af7d2bce2c9221b2ce654213",
            ),
        ] {
            let cipher = Cipher::new(&bytes(key), sector_bytes, 0).unwrap();
            let mut data = counting(sector_bytes as usize);
            cipher.encrypt(sector, &mut data);
            assert!(data.starts_with(&bytes(head)), "{sector_bytes} {sector}");
            assert_eq!(Sha256::digest(&data).as_slice(), bytes(digest));
            cipher.decrypt(sector, &mut data);
            assert!(data == counting(sector_bytes as usize));
        }
    }

    #[test]
    fn many_sectors_at_once_are_as_each_alone() {
        for (sector_bytes, sectors) in [(512_u32, 1), (512, 7), (512, 41), (4096, 3)] {
            let cipher = Cipher::new(&bytes(KEY_512), sector_bytes, 0).unwrap();
            let step = u64::from(sector_bytes) / IV_SECTOR_BYTES;
            let mut together = counting(sectors * sector_bytes as usize);
            let mut apart = together.clone();
            cipher.encrypt(16, &mut together);
            for (index, sector) in apart.chunks_mut(sector_bytes as usize).enumerate() {
                cipher.encrypt(16 + index as u64 * step, sector);
            }
            assert!(together == apart, "{sectors} of {sector_bytes}");
            cipher.decrypt(16, &mut together);
            assert!(together == counting(sectors * sector_bytes as usize));
        }
    }

    #[test]
    fn first_iv_is_added_to_the_sector() {
        let key = bytes(KEY_512);
        let (mut one, mut other) = ([1; 512], [1; 512]);
        Cipher::new(&key, 512, 5).unwrap().encrypt(3, &mut one);
        Cipher::new(&key, 512, 0).unwrap().encrypt(8, &mut other);
        assert_eq!(one, other);
    }

    #[test]
    #[should_panic(expected = "only whole sectors")]
    fn part_of_a_sector_is_refused() {
        let cipher = Cipher::new(&bytes(KEY_512), 4096, 0).unwrap();
        cipher.encrypt(0, &mut [0; 512]);
    }

    #[test]
    fn keys_are_not_printed() {
        let cipher = Cipher::new(&bytes(KEY_256), 512, 0).unwrap();
        assert_eq!(
            format!("{cipher:?}"),
            "Cipher { aes_bits: 128, sector_bytes: 512, .. }"
        );
    }

    /// Run with `--release --ignored --nocapture` to see what a processor does.
    #[test]
    #[ignore = "a measurement"]
    fn throughput() {
        for (key, sector_bytes) in [(KEY_256, 512), (KEY_512, 512), (KEY_512, 4096)] {
            let cipher = Cipher::new(&bytes(key), sector_bytes, 0).unwrap();
            for len in [4096, 128 << 10] {
                let mut data = counting(len);
                let rounds = (256 << 20) / len;
                for decrypts in [false, true] {
                    let began = std::time::Instant::now();
                    for _ in 0..rounds {
                        match decrypts {
                            true => cipher.decrypt(0, &mut data),
                            false => cipher.encrypt(0, &mut data),
                        }
                    }
                    let mb_per_s = (rounds * len) as f64 / 1e6 / began.elapsed().as_secs_f64();
                    let name = if decrypts { "decrypt" } else { "encrypt" };
                    println!(
                        "{} bits, {sector_bytes} byte sectors, {len} at once: {name} {mb_per_s:.0} MB/s",
                        key.len() * 4
                    );
                }
            }
        }
    }
}
