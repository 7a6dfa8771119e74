//! Merging an overlay into what it is based on.

use std::io;
use std::ops::ControlFlow;

use crate::entry::Mapping;
use crate::image::Image;
use crate::layer::{OpenLayer, Origin, Walker};
use crate::storage::Buffer;

/// Data copied at a time.
const CHUNK_BYTES: u64 = 1 << 20;

/// What the top of a chain has for some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopExtent {
    /// Data of its own.
    Data,
    /// Zeroes, whatever the backing image has.
    Zeroes,
    /// Nothing: the backing image decides.
    Absent,
}

/// The image below, while an overlay is merged into it.
pub trait Base {
    /// Size of its disk.
    fn capacity_bytes(&self) -> u64;
    /// Writes whole sectors; the memory is aligned to pages.
    ///
    /// # Errors
    /// What the storage said.
    fn write(&self, offset_bytes: u64, data: &[u8]) -> io::Result<()>;
    /// Lets bytes read zeroes.
    ///
    /// # Errors
    /// What the storage said.
    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()>;
    /// Puts what was written on stable storage.
    ///
    /// # Errors
    /// What the storage said.
    fn flush(&self) -> io::Result<()>;
}

impl Image {
    /// What the top has at `offset_bytes`, and for how many bytes, at most `len_bytes`, that is
    /// so.
    ///
    /// # Errors
    /// The kernel's, or that the map is broken there.
    pub fn top_extent(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<(TopExtent, u64)> {
        let mut walker = Walker::new(&self.layers[..1]);
        let mut done = 0;
        let mut kind = None;
        while done < len_bytes {
            let (found, here) = top_kind(&mut walker, &self.layers[0], offset_bytes + done)?;
            if *kind.get_or_insert(found) != found {
                break;
            }
            done += here.min(len_bytes - done);
        }
        Ok((kind.unwrap_or(TopExtent::Absent), done))
    }

    /// Copies all that the top has into `base`, which is the image below it, and flushes that.
    /// The disk must not be written meanwhile. `progress` is told the bytes that are done, of the
    /// disk's size, and may end it; so may an error: the base then has a part, which changes
    /// nothing for the overlay.
    ///
    /// # Errors
    /// The kernel's, `Interrupted` when `progress` ended it, `StorageFull` when the base is
    /// smaller than the overlay.
    pub fn commit_into(
        &self,
        base: &dyn Base,
        progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let capacity_bytes = self.capacity_bytes();
        if base.capacity_bytes() < capacity_bytes {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                "the backing image is smaller than the overlay; resize it first",
            ));
        }
        let mut buffer = Buffer::new(CHUNK_BYTES as usize);
        let mut offset = 0;
        while offset < capacity_bytes {
            if progress(offset).is_break() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let wanted = CHUNK_BYTES.min(capacity_bytes - offset);
            let (kind, len) = self.top_extent(offset, wanted)?;
            match kind {
                TopExtent::Data => {
                    let mut into = &mut buffer[..len as usize];
                    self.read(offset, &mut into)?;
                    base.write(offset, &buffer[..len as usize])?;
                }
                TopExtent::Zeroes => base.write_zeroes(offset, len)?,
                TopExtent::Absent => {}
            }
            offset += len;
        }
        base.flush()
    }
}

impl Base for Image {
    fn capacity_bytes(&self) -> u64 {
        Image::capacity_bytes(self)
    }

    fn write(&self, offset_bytes: u64, data: &[u8]) -> io::Result<()> {
        Image::write(self, offset_bytes, &data)
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        Image::write_zeroes(self, offset_bytes, len_bytes, true)
    }

    fn flush(&self) -> io::Result<()> {
        Image::flush(self)
    }
}

fn top_kind(walker: &mut Walker<'_>, top: &OpenLayer, offset: u64) -> io::Result<(TopExtent, u64)> {
    let geometry = top.geometry().expect("the top is qcow2");
    let (origin, len) = walker.origin(0, offset)?;
    let kind = match origin {
        Origin::File { .. } | Origin::Compressed { .. } => TopExtent::Data,
        Origin::Broken => return Err(io::Error::from_raw_os_error(libc::EIO)),
        Origin::Zeroes => {
            let raw = walker.entry(0, geometry, offset >> geometry.cluster_bits)?;
            match Mapping::decode(raw, geometry.version, geometry.cluster_bits)? {
                Mapping::Absent => TopExtent::Absent,
                _ => TopExtent::Zeroes,
            }
        }
    };
    Ok((kind, len))
}
