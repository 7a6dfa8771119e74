//! Disks encrypted with LUKS: headers, keys and AES-XTS on sectors.
//!
//! ```text
//! passphrase ─ kdf ─ key slot (xts, af) ─ volume key ─ digest ─ Cipher ─ sectors
//!              └───────────── header: luks2 or luks1 ─────────────┘
//! ```
//!
//! What is read: LUKS2 and LUKS1 volumes with one segment of `aes-xts-plain64`, 256 or 512 bits of
//! key, sectors of 512 or 4096 bytes, and key slots with PBKDF2 or Argon2. What is written: new
//! LUKS2 volumes with one key slot ([`format()`]). An existing header is never changed.
//!
//! A header comes from whoever wrote the image. Every size in it is checked before it is used, and
//! what deriving keys may cost is bounded by [`Limits`] before it begins.
//!
//! Passphrases and expanded volume keys live in pages that are left out of core files
//! ([`Passphrase`], [`Cipher`]); everything on the way between them is overwritten after use. No
//! type here prints a key.
//!
//! Format: LUKS2 On-Disk Format Specification 1.1.2; LUKS1 On-Disk Format Specification 1.2.3.

mod af;
mod area;
mod error;
mod format;
mod hash;
mod kdf;
mod luks1;
mod luks2;
mod passphrase;
mod protected;
mod slot;
mod volume;
mod xts;

pub use error::LuksError;
pub use format::{DEFAULT_PAYLOAD_OFFSET_BYTES, FormatOptions, Formatted, NewKdf, format};
pub use kdf::Limits;
pub use passphrase::{MAX_PASSPHRASE_BYTES, Passphrase, PassphraseError};
pub use volume::{Unlocked, Volume};
pub use xts::{Cipher, IV_SECTOR_BYTES};

#[cfg(test)]
mod tests;
