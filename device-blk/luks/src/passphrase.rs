//! A passphrase, read once from a descriptor.

use std::fmt;
use std::io::{self, Read};

use zeroize::Zeroize;

use crate::protected::Pages;

/// The longest key file that `cryptsetup` takes.
pub const MAX_PASSPHRASE_BYTES: usize = 8 << 20;

/// Why there is no passphrase.
#[derive(Debug, thiserror::Error)]
pub enum PassphraseError {
    /// The kernel refused.
    #[error("the key cannot be read")]
    Io(#[source] io::Error),
    /// Nothing came.
    #[error("the key is empty; pass the passphrase's bytes, at least one")]
    Empty,
    /// More came than is taken.
    #[error("the key has more than {MAX_PASSPHRASE_BYTES} bytes; pass a shorter one")]
    TooLong,
}

/// A passphrase: any bytes, a line feed at the end included. Overwritten when dropped; never
/// printed.
pub struct Passphrase {
    pages: Pages,
    len_bytes: usize,
}

impl Passphrase {
    /// Reads `source` to its end.
    ///
    /// # Errors
    /// It cannot be read, or has no byte or more than [`MAX_PASSPHRASE_BYTES`].
    pub fn read(mut source: impl Read) -> Result<Self, PassphraseError> {
        // One byte more tells a key of the full length from a longer one. Pages that are never
        // touched take no memory.
        let pages = Pages::new(MAX_PASSPHRASE_BYTES + 1).map_err(PassphraseError::Io)?;
        let mut passphrase = Self {
            pages,
            len_bytes: 0,
        };
        loop {
            let free = &mut passphrase.pages.as_mut_slice()[passphrase.len_bytes..];
            match source.read(free) {
                Ok(0) => break,
                Ok(count) => passphrase.len_bytes += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(PassphraseError::Io(error)),
            }
            if passphrase.len_bytes > MAX_PASSPHRASE_BYTES {
                return Err(PassphraseError::TooLong);
            }
        }
        if passphrase.len_bytes == 0 {
            return Err(PassphraseError::Empty);
        }
        Ok(passphrase)
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.pages.as_slice()[..self.len_bytes]
    }
}

impl Drop for Passphrase {
    fn drop(&mut self) {
        let used = self.len_bytes;
        self.pages.as_mut_slice()[..used].zeroize();
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_taken_as_they_are() {
        let passphrase = Passphrase::read(&b"secret\n\0"[..]).unwrap();
        assert_eq!(passphrase.as_bytes(), b"secret\n\0");
        assert_eq!(format!("{passphrase:?}"), "Passphrase(..)");
    }

    #[test]
    fn empty_and_endless_keys_are_refused() {
        let empty = Passphrase::read(io::empty()).unwrap_err();
        assert!(matches!(empty, PassphraseError::Empty), "{empty}");
        let endless = Passphrase::read(io::repeat(1)).unwrap_err();
        assert!(matches!(endless, PassphraseError::TooLong), "{endless}");
        let longest = Passphrase::read(io::repeat(1).take(MAX_PASSPHRASE_BYTES as u64)).unwrap();
        assert_eq!(longest.as_bytes().len(), MAX_PASSPHRASE_BYTES);
    }
}
