//! An encrypted disk: a LUKS volume in a raw image.
//!
//! Sector N of the disk is N sectors behind the header, so that queues do the I/O by themselves.
//! Data passes a bounce buffer, where [`SectorCipher`] encrypts and decrypts it; what is stored is
//! never plain.
//!
//! - Zeroes are written encrypted: a hole reads as zeroes in the file and as noise from the disk.
//! - Discards punch holes. Who has the image can tell then which blocks are unused, as with
//!   `cryptsetup open --allow-discards`; discarded blocks read as noise.
//! - [`Image::perform`] moves what is stored, encrypted; jobs see the data through
//!   [`Image::cipher`].

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use luks::{Limits, Passphrase, Volume};

use super::task::OwnIovec;
use super::{
    Access, Buffers, DirectIo, Image, ImageError, Place, RawImage, SECTOR_BYTES, SectorCipher, Task,
};
use crate::engine::buffer::AlignedBuffer;

/// Encrypted zeroes written at a time.
const ZEROES_BYTES: usize = 256 << 10;

/// An unlocked volume.
#[derive(Debug)]
pub(crate) struct LuksImage {
    raw: RawImage,
    payload_offset_bytes: u64,
    capacity_sectors: AtomicU64,
    /// Written in the header, so that the disk cannot grow.
    has_fixed_len: bool,
    cipher: luks::Cipher,
}

impl LuksImage {
    /// Unlocks the volume in `raw`. Takes the time and memory that its key slots want, up to about
    /// two minutes and 1 GiB.
    ///
    /// # Errors
    /// There is no volume in the image, it is damaged or not supported, the passphrase is wrong,
    /// or guests with blocks of `block_bytes` cannot use its sectors.
    pub(crate) fn unlock(
        raw: RawImage,
        passphrase: &Passphrase,
        block_bytes: u32,
    ) -> Result<Self, ImageError> {
        let name = raw.name().to_owned();
        let refused = |source| ImageError::Locked {
            name: name.clone(),
            source,
        };
        let volume = Volume::read(raw.file()).map_err(refused)?;
        // Before the passphrase is tried: that takes long.
        if volume.sector_bytes() > block_bytes {
            return Err(ImageError::SectorsTooLarge {
                name,
                sector_bytes: volume.sector_bytes(),
                block_bytes,
            });
        }
        if volume.has_damaged_copy() {
            tracing::warn!(
                image = name,
                "one of the two copies of the LUKS2 header is damaged; write it anew: \
                 cryptsetup repair IMAGE"
            );
        }
        let unlocked = volume
            .unlock(raw.file(), passphrase.as_bytes(), Limits::default())
            .map_err(refused)?;
        let capacity_sectors = unlocked.payload_len_bytes / SECTOR_BYTES;
        tracing::info!(
            image = name,
            uuid = volume.uuid(),
            cipher = ?unlocked.cipher,
            "unlocked"
        );
        Ok(Self {
            raw,
            payload_offset_bytes: unlocked.payload_offset_bytes,
            capacity_sectors: AtomicU64::new(capacity_sectors),
            has_fixed_len: unlocked.has_fixed_len,
            cipher: unlocked.cipher,
        })
    }

    /// Of the disk, in the file.
    fn stored(&self, offset_bytes: u64) -> u64 {
        // Requests end inside the disk, whose end is in the file.
        self.payload_offset_bytes + offset_bytes
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), i32> {
        let piece_bytes = len_bytes.min(ZEROES_BYTES as u64) as usize;
        if piece_bytes == 0 {
            return Ok(());
        }
        let mut buffer = AlignedBuffer::new(piece_bytes);
        let mut done_bytes = 0;
        while done_bytes < len_bytes {
            let len = (len_bytes - done_bytes).min(piece_bytes as u64) as usize;
            let sectors = &mut buffer.as_mut_slice()[..len];
            sectors.fill(0);
            let at = offset_bytes + done_bytes;
            self.encrypt(at, sectors);
            self.raw.perform(&mut Task::Write {
                offset_bytes: self.stored(at),
                buffers: Buffers::of_iovec(&mut OwnIovec::new(sectors)),
            })?;
            done_bytes += len as u64;
        }
        Ok(())
    }
}

impl Image for LuksImage {
    fn name(&self) -> &str {
        self.raw.name()
    }

    fn format(&self) -> &'static str {
        "raw"
    }

    fn is_read_only(&self) -> bool {
        self.raw.is_read_only()
    }

    fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors.load(Ordering::Acquire)
    }

    fn physical_block_bytes(&self) -> u32 {
        self.raw
            .physical_block_bytes()
            .max(self.cipher.sector_bytes())
    }

    fn punches_holes(&self) -> bool {
        self.raw.punches_holes()
    }

    fn direct(&self) -> Option<DirectIo> {
        self.raw.direct()
    }

    fn locate(&self, access: Access, offset_bytes: u64, len_bytes: u64) -> Place {
        self.raw
            .locate(access, self.stored(offset_bytes), len_bytes)
    }

    fn perform(&self, task: &mut Task<'_>) -> Result<(), i32> {
        match task {
            Task::Read {
                offset_bytes,
                buffers,
            } => self.raw.perform(&mut Task::Read {
                offset_bytes: self.stored(*offset_bytes),
                buffers: *buffers,
            }),
            Task::Write {
                offset_bytes,
                buffers,
            } => self.raw.perform(&mut Task::Write {
                offset_bytes: self.stored(*offset_bytes),
                buffers: *buffers,
            }),
            Task::WriteZeroes {
                offset_bytes,
                len_bytes,
                ..
            } => self.write_zeroes(*offset_bytes, *len_bytes),
            Task::Discard {
                offset_bytes,
                len_bytes,
            } => self.raw.perform(&mut Task::Discard {
                offset_bytes: self.stored(*offset_bytes),
                len_bytes: *len_bytes,
            }),
            Task::Flush => self.raw.perform(&mut Task::Flush),
        }
    }

    fn flush_file(&self) -> Option<RawFd> {
        self.raw.flush_file()
    }

    fn is_in_memory(&self) -> bool {
        self.raw.is_in_memory()
    }

    fn cipher(&self) -> Option<&dyn SectorCipher> {
        Some(self)
    }

    fn resize(&self, capacity_sectors: u64) -> io::Result<()> {
        if self.has_fixed_len {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the volume's length is written in its LUKS header",
            ));
        }
        let block_sectors = u64::from(self.cipher.sector_bytes()) / SECTOR_BYTES;
        if !capacity_sectors.is_multiple_of(block_sectors) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let with_header = capacity_sectors
            .checked_add(self.payload_offset_bytes / SECTOR_BYTES)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        self.raw.resize(with_header)?;
        self.capacity_sectors
            .store(capacity_sectors, Ordering::Release);
        Ok(())
    }

    fn has_lost_writes(&self) -> bool {
        self.raw.has_lost_writes()
    }

    fn note_failed_flush(&self) {
        self.raw.note_failed_flush();
    }
}

impl SectorCipher for LuksImage {
    fn encrypt(&self, offset_bytes: u64, sectors: &mut [u8]) {
        self.cipher.encrypt(offset_bytes / SECTOR_BYTES, sectors);
    }

    fn decrypt(&self, offset_bytes: u64, sectors: &mut [u8]) {
        self.cipher.decrypt(offset_bytes / SECTOR_BYTES, sectors);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::time::Duration;

    use luks::{FormatOptions, LuksError, NewKdf};

    use super::*;
    use crate::image::OpenOptions;

    fn raw(file: &tempfile::NamedTempFile, block_bytes: u32) -> RawImage {
        let options = OpenOptions {
            read_only: false,
            page_cache: false,
            block_bytes,
            lock_patience: Duration::ZERO,
        };
        RawImage::from_file(file.reopen().unwrap(), "test".into(), options).unwrap()
    }

    fn volume(sector_bytes: u32) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len((16 << 20) + (1 << 20)).unwrap();
        let options = FormatOptions {
            sector_bytes,
            kdf: NewKdf::Pbkdf2 { iterations: 1000 },
            ..FormatOptions::default()
        };
        luks::format(file.as_file(), b"key", &options).unwrap();
        file
    }

    fn unlock(
        file: &tempfile::NamedTempFile,
        key: &[u8],
        block_bytes: u32,
    ) -> Result<LuksImage, ImageError> {
        let passphrase = Passphrase::read(key).unwrap();
        LuksImage::unlock(raw(file, block_bytes), &passphrase, block_bytes)
    }

    #[test]
    fn capacity_is_what_follows_the_header_and_grows_with_the_file() {
        let file = volume(512);
        let image = unlock(&file, b"key", 512).unwrap();
        assert_eq!(image.capacity_sectors(), 2048);
        image.resize(4096).unwrap();
        assert_eq!(image.capacity_sectors(), 4096);
        assert_eq!(file.as_file().metadata().unwrap().len(), 18 << 20);
        assert!(image.resize(2048).is_err(), "disks do not shrink");
    }

    #[test]
    fn wrong_passphrase_and_missing_header_are_told_apart() {
        let wrong = unlock(&volume(512), b"no key", 512).unwrap_err();
        assert!(
            matches!(
                &wrong,
                ImageError::Locked {
                    source: LuksError::WrongPassphrase,
                    ..
                }
            ),
            "{wrong}"
        );
        let plain = tempfile::NamedTempFile::new().unwrap();
        plain.as_file().set_len(1 << 20).unwrap();
        let missing = unlock(&plain, b"key", 512).unwrap_err();
        assert!(
            matches!(
                &missing,
                ImageError::Locked {
                    source: LuksError::NoHeader,
                    ..
                }
            ),
            "{missing}"
        );
    }

    #[test]
    fn large_sectors_demand_large_blocks() {
        let error = unlock(&volume(4096), b"key", 512).unwrap_err();
        assert!(
            matches!(error, ImageError::SectorsTooLarge { .. }),
            "{error}"
        );
        assert!(error.to_string().contains("4096"), "{error}");
        let image = unlock(&volume(4096), b"key", 4096).unwrap();
        assert_eq!(image.physical_block_bytes(), 4096);
    }

    #[test]
    fn zeroes_are_stored_encrypted_and_read_as_zeroes() {
        let file = volume(512);
        let image = unlock(&file, b"key", 512).unwrap();
        let len_bytes = 600 << 10;
        let mut task = Task::WriteZeroes {
            offset_bytes: 4096,
            len_bytes,
            unmap: true,
        };
        image.perform(&mut task).unwrap();
        let mut stored = vec![0; len_bytes as usize];
        let at = image.payload_offset_bytes + 4096;
        file.as_file().read_exact_at(&mut stored, at).unwrap();
        assert!(
            stored.chunks(16).all(|block| block != [0; 16]),
            "nothing is stored plain"
        );
        image.decrypt(4096, &mut stored);
        assert!(stored.iter().all(|&byte| byte == 0));
        let mut neighbour = [0; 512];
        file.as_file()
            .read_exact_at(&mut neighbour, at + len_bytes)
            .unwrap();
        assert_eq!(neighbour, [0; 512], "and nothing behind it");
    }
}
