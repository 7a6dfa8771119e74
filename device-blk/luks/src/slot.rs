//! Key slots and digests, as both versions of the header have them.

use std::fs::File;

use zeroize::Zeroizing;

use crate::error::LuksError;
use crate::hash::Hash;
use crate::kdf::{Budget, Kdf};
use crate::xts::Cipher;
use crate::{af, area};

/// Sector size inside key slots, whatever the payload's.
const SLOT_SECTOR_BYTES: u32 = 512;

/// One passphrase's copy of the volume key.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) kdf: Kdf,
    pub(crate) salt: Vec<u8>,
    pub(crate) af_hash: Hash,
    pub(crate) stripes: u32,
    /// Where the striped key lies.
    pub(crate) area_offset_bytes: u64,
    /// Of the key that the passphrase gives.
    pub(crate) area_key_bytes: usize,
    /// Of the volume key.
    pub(crate) key_bytes: usize,
}

impl Slot {
    /// Bytes of the striped key.
    pub(crate) fn striped_bytes(&self) -> usize {
        self.key_bytes * self.stripes as usize
    }

    /// What this slot takes for the volume key; a wrong passphrase gives a wrong one.
    pub(crate) fn candidate(
        &self,
        file: &File,
        passphrase: &[u8],
        budget: &mut Budget,
    ) -> Result<Zeroizing<Vec<u8>>, LuksError> {
        let cipher = self.cipher(passphrase, budget)?;
        let padded = self
            .striped_bytes()
            .next_multiple_of(SLOT_SECTOR_BYTES as usize);
        let mut striped = area::read(file, self.area_offset_bytes, padded, "read a key slot")?;
        cipher.decrypt(0, &mut striped);
        Ok(af::merge(
            &striped[..self.striped_bytes()],
            self.key_bytes,
            self.af_hash,
        ))
    }

    /// What is to be stored for `volume_key`, padded with random bytes to `area_bytes`.
    pub(crate) fn seal(
        &self,
        volume_key: &[u8],
        passphrase: &[u8],
        random: Zeroizing<Vec<u8>>,
        budget: &mut Budget,
    ) -> Result<Zeroizing<Vec<u8>>, LuksError> {
        let cipher = self.cipher(passphrase, budget)?;
        let mut striped = random;
        af::split(
            volume_key,
            &mut striped[..self.striped_bytes()],
            self.af_hash,
        );
        cipher.encrypt(0, &mut striped);
        Ok(striped)
    }

    fn cipher(&self, passphrase: &[u8], budget: &mut Budget) -> Result<Cipher, LuksError> {
        let key = self
            .kdf
            .derive(passphrase, &self.salt, self.area_key_bytes, budget)?;
        Cipher::new(&key, SLOT_SECTOR_BYTES, 0)
    }
}

/// By what a volume key is recognised.
#[derive(Clone, Debug)]
pub(crate) struct KeyDigest {
    pub(crate) hash: Hash,
    pub(crate) iterations: u32,
    pub(crate) salt: Vec<u8>,
    pub(crate) digest: Vec<u8>,
}

impl KeyDigest {
    pub(crate) fn matches(
        &self,
        volume_key: &[u8],
        budget: &mut Budget,
    ) -> Result<bool, LuksError> {
        let kdf = Kdf::Pbkdf2 {
            hash: self.hash,
            iterations: self.iterations,
        };
        let computed = kdf.derive(volume_key, &self.salt, self.digest.len(), budget)?;
        Ok(*computed == self.digest)
    }
}

/// What a header says, checked: everything that is needed to unlock its volume.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// 1 or 2.
    pub(crate) version: u8,
    pub(crate) uuid: String,
    /// In the order in which they are to be tried.
    pub(crate) slots: Vec<Slot>,
    pub(crate) digest: KeyDigest,
    pub(crate) payload_offset_bytes: u64,
    /// `None` for all that follows.
    pub(crate) payload_len_bytes: Option<u64>,
    pub(crate) sector_bytes: u32,
    pub(crate) first_iv: u64,
    /// The other copy of the header cannot be used.
    pub(crate) has_damaged_copy: bool,
}

/// Of one field that both versions have.
pub(crate) fn checked_stripes(stripes: u32) -> Result<u32, LuksError> {
    if (1..=af::STRIPES).contains(&stripes) {
        Ok(stripes)
    } else {
        Err(LuksError::malformed(format!(
            "a key slot has {stripes} stripes, and 1 to {} are possible",
            af::STRIPES
        )))
    }
}

/// A key of AES-128-XTS or AES-256-XTS.
pub(crate) fn checked_key_bytes(key_bytes: u64) -> Result<usize, LuksError> {
    match key_bytes {
        32 | 64 => Ok(key_bytes as usize),
        _ => Err(LuksError::Unsupported {
            what: format!("a key of {} bits", u128::from(key_bytes) * 8),
            supported: "AES-XTS keys of 256 and 512 bits",
        }),
    }
}

pub(crate) fn checked_cipher(name: &str) -> Result<(), LuksError> {
    if name == "aes-xts-plain64" {
        Ok(())
    } else {
        Err(LuksError::Unsupported {
            what: format!("the cipher {name:?}"),
            supported: "aes-xts-plain64",
        })
    }
}

pub(crate) fn checked_hash(name: &str) -> Result<Hash, LuksError> {
    Hash::from_name(name).ok_or_else(|| LuksError::Unsupported {
        what: format!("the hash {name:?}"),
        supported: Hash::NAMES,
    })
}

/// Text of a fixed-size field, which ends at its first NUL.
pub(crate) fn text(field: &[u8]) -> Result<&str, LuksError> {
    let len = field
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(field.len());
    std::str::from_utf8(&field[..len])
        .map_err(|_| LuksError::malformed("a name in it is not UTF-8"))
}
