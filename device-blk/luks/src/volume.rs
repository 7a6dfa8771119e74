//! Volumes: reading a header, unlocking with a passphrase.

use std::fs::File;

use crate::area;
use crate::error::LuksError;
use crate::kdf::{Budget, Limits};
use crate::luks2::binary::MAGIC;
use crate::slot::Layout;
use crate::xts::Cipher;
use crate::{luks1, luks2, protected};

/// A volume whose header was read; locked.
#[derive(Debug)]
pub struct Volume {
    layout: Layout,
}

/// What an unlocked volume needs to be used.
#[derive(Debug)]
pub struct Unlocked {
    /// Where data begins in the file.
    pub payload_offset_bytes: u64,
    /// Length of the data: whole sectors that are in the file.
    pub payload_len_bytes: u64,
    /// The segment's length is written in the header, so that it cannot grow with the file.
    pub has_fixed_len: bool,
    /// Unit in which data is encrypted, 512 or 4096.
    pub sector_bytes: u32,
    /// Encrypts and decrypts the data.
    pub cipher: Cipher,
}

impl Volume {
    /// Reads and checks the header of `file`, which may be open for direct I/O.
    ///
    /// # Errors
    /// There is no header, it is damaged or wrong, or it describes what is not supported.
    pub fn read(file: &File) -> Result<Self, LuksError> {
        let start = match area::read(file, 0, 8, "read the LUKS header") {
            Err(LuksError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::UnexpectedEof =>
            {
                return Err(LuksError::NoHeader);
            }
            start => start?,
        };
        let layout = match (
            start[..6] == MAGIC,
            u16::from_be_bytes([start[6], start[7]]),
        ) {
            (true, 1) => luks1::read(file)?,
            (true, 2) => luks2::read(file)?,
            (true, version) => {
                return Err(LuksError::Unsupported {
                    what: format!("version {version} of the header"),
                    supported: "versions 1 and 2",
                });
            }
            (false, _) if luks2::has_secondary(file)? => luks2::read(file)?,
            (false, _) => return Err(LuksError::NoHeader),
        };
        Ok(Self { layout })
    }

    /// Reads the header of `file` and unlocks the volume.
    ///
    /// # Errors
    /// As [`Self::read`] and [`Self::unlock`] say.
    pub fn open(file: &File, passphrase: &[u8], limits: Limits) -> Result<Unlocked, LuksError> {
        Self::read(file)?.unlock(file, passphrase, limits)
    }

    /// Unlocks the volume, whose header was read from `file`, by the first key slot that opens.
    /// Takes as long as the key slots want, within `limits`.
    ///
    /// # Errors
    /// No key slot opens, a key slot costs more than `limits` grant, or the file is too short.
    pub fn unlock(
        &self,
        file: &File,
        passphrase: &[u8],
        limits: Limits,
    ) -> Result<Unlocked, LuksError> {
        let layout = &self.layout;
        let payload_len_bytes = self.payload_len(area::file_len(file)?)?;
        let cipher = self.cipher(file, passphrase, limits);
        protected::wipe_stack();
        Ok(Unlocked {
            payload_offset_bytes: layout.payload_offset_bytes,
            payload_len_bytes,
            has_fixed_len: layout.payload_len_bytes.is_some(),
            sector_bytes: layout.sector_bytes,
            cipher: cipher?,
        })
    }

    #[inline(never)]
    fn cipher(&self, file: &File, passphrase: &[u8], limits: Limits) -> Result<Cipher, LuksError> {
        let layout = &self.layout;
        let mut budget = Budget::new(limits);
        for slot in &layout.slots {
            let key = slot.candidate(file, passphrase, &mut budget)?;
            if layout.digest.matches(&key, &mut budget)? {
                return Cipher::new(&key, layout.sector_bytes, layout.first_iv);
            }
        }
        Err(LuksError::WrongPassphrase)
    }

    fn payload_len(&self, file_len_bytes: u64) -> Result<u64, LuksError> {
        let layout = &self.layout;
        let too_small = LuksError::TooSmall {
            len_bytes: file_len_bytes,
            payload_offset_bytes: layout.payload_offset_bytes,
        };
        let Some(there) = file_len_bytes.checked_sub(layout.payload_offset_bytes) else {
            return Err(too_small);
        };
        let len_bytes = match layout.payload_len_bytes {
            Some(fixed) if fixed > there => return Err(too_small),
            Some(fixed) => fixed,
            None => there - there % u64::from(layout.sector_bytes),
        };
        if len_bytes == 0 {
            return Err(too_small);
        }
        Ok(len_bytes)
    }

    /// 1 or 2.
    pub fn version(&self) -> u8 {
        self.layout.version
    }

    /// As the header has it.
    pub fn uuid(&self) -> &str {
        &self.layout.uuid
    }

    /// Where data begins in the file.
    pub fn payload_offset_bytes(&self) -> u64 {
        self.layout.payload_offset_bytes
    }

    /// Unit in which data is encrypted, 512 or 4096.
    pub fn sector_bytes(&self) -> u32 {
        self.layout.sector_bytes
    }

    /// One of the two copies of the header cannot be used; `cryptsetup repair` writes it anew.
    pub fn has_damaged_copy(&self) -> bool {
        self.layout.has_damaged_copy
    }
}
