//! The hash functions that headers name.

use sha1::Sha1;
use sha2::{Digest, Sha256, Sha512};

/// A hash function, as LUKS names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hash {
    /// Old volumes alone.
    Sha1,
    Sha256,
    Sha512,
}

/// Bytes of the longest digest.
pub(crate) const MAX_DIGEST_BYTES: usize = 64;

impl Hash {
    pub(crate) const NAMES: &'static str = "sha1, sha256 and sha512";

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        match name {
            "sha1" => Some(Self::Sha1),
            "sha256" => Some(Self::Sha256),
            "sha512" => Some(Self::Sha512),
            _ => None,
        }
    }

    pub(crate) fn digest_bytes(self) -> usize {
        match self {
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    /// The digest of `parts`, one after the other, cut to the length of `out`.
    pub(crate) fn digest<'a>(self, parts: impl IntoIterator<Item = &'a [u8]>, out: &mut [u8]) {
        fn run<'a, D: Digest>(parts: impl IntoIterator<Item = &'a [u8]>, out: &mut [u8]) {
            let mut hash = D::new();
            for part in parts {
                hash.update(part);
            }
            out.copy_from_slice(&hash.finalize()[..out.len()]);
        }
        match self {
            Self::Sha1 => run::<Sha1>(parts, out),
            Self::Sha256 => run::<Sha256>(parts, out),
            Self::Sha512 => run::<Sha512>(parts, out),
        }
    }

    /// PBKDF2 with HMAC of this hash (RFC 8018).
    pub(crate) fn pbkdf2(self, password: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        match self {
            Self::Sha1 => pbkdf2::pbkdf2_hmac::<Sha1>(password, salt, iterations, out),
            Self::Sha256 => pbkdf2::pbkdf2_hmac::<Sha256>(password, salt, iterations, out),
            Self::Sha512 => pbkdf2::pbkdf2_hmac::<Sha512>(password, salt, iterations, out),
        }
    }
}
