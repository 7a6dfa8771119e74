//! qcow2 images and their chains, by the crate of that name.
//!
//! Queues look clusters up by themselves and do the I/O; what has to be allocated, copied or
//! inflated goes to worker threads. Everything is written through: when a request completes, its
//! data and the map are in the file, so a daemon that is killed loses nothing, and a request that
//! is run again finds its clusters in place.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use ::qcow2::{Format, Layer, Place as Found, Sink, Source};

use super::direct::{self, DirectIo};
use super::{
    Access, Buffers, Image, ImageError, OpenOptions, Place, SECTOR_BYTES, Task, Ticket,
    TicketIssuer, lock, raw,
};

/// Threads for one image: allocating writes wait for the storage several times.
const MAX_WORKERS: usize = 8;

/// An image of a chain that was opened, and is not checked yet.
#[derive(Debug)]
pub(crate) struct Backing {
    pub(crate) file: File,
    pub(crate) format: Format,
    pub(crate) name: String,
}

/// A locked chain.
#[derive(Debug)]
pub(crate) struct Qcow2Image {
    image: Arc<::qcow2::Image>,
    name: String,
    /// By layer.
    fds: Vec<RawFd>,
    direct: Option<DirectIo>,
    is_in_memory: bool,
    physical_block_bytes: u32,
}

impl Qcow2Image {
    /// Takes over a chain that somebody else opened, nearest backing image first. The
    /// descriptions should be fresh ones: locks and `O_DIRECT` flags are this image's.
    pub(crate) fn open(
        top: File,
        name: String,
        backing: Vec<Backing>,
        options: OpenOptions,
    ) -> Result<Self, ImageError> {
        let mut layers = vec![layer(top, Format::Qcow2, &name, options)?];
        for image in backing {
            let read_only = OpenOptions {
                read_only: true,
                ..options
            };
            layers.push(layer(image.file, image.format, &image.name, read_only)?);
        }
        Self::of_layers(layers, name, options.read_only)
    }

    /// Puts an overlay on top of `below`, from whose files it reads from then on. `below` must not
    /// be written any more.
    pub(crate) fn over(
        below: &dyn Image,
        overlay: File,
        name: String,
        options: OpenOptions,
    ) -> Result<Self, ImageError> {
        let mut layers = vec![layer(overlay, Format::Qcow2, &name, options)?];
        layers.extend(below.layers().map_err(|source| ImageError::Io {
            name: below.name().to_owned(),
            action: "become a backing image",
            source,
        })?);
        Self::of_layers(layers, name, options.read_only)
    }

    /// Serves a chain whose files are locked.
    pub(crate) fn of_layers(
        layers: Vec<Layer>,
        name: String,
        read_only: bool,
    ) -> Result<Self, ImageError> {
        let fds = layers.iter().map(|layer| layer.file.as_raw_fd()).collect();
        let aligns = layers.iter().filter_map(|layer| layer.mem_align_bytes);
        let direct = aligns.max().map(|mem_align_bytes| DirectIo {
            mem_align_bytes,
            block_bytes: SECTOR_BYTES as usize,
        });
        let is_in_memory = layers.iter().all(|layer| direct::is_in_memory(&layer.file));
        let block_bytes = layers[0]
            .file
            .metadata()
            .map_or(4096, |meta| meta.blksize());
        let image = ::qcow2::Image::open(layers, read_only).map_err(|source| {
            let name = name.clone();
            ImageError::Format { name, source }
        })?;
        #[cfg(debug_assertions)]
        if std::env::var_os("MORTISE_TEST_COUNT_LATE").is_some() {
            image.count_late();
        }
        if image.capacity_bytes() < SECTOR_BYTES {
            let len_bytes = image.capacity_bytes();
            return Err(ImageError::TooSmall { name, len_bytes });
        }
        Ok(Self {
            image: Arc::new(image),
            name,
            fds,
            direct,
            is_in_memory,
            physical_block_bytes: if block_bytes.is_power_of_two() {
                block_bytes.clamp(SECTOR_BYTES, 4096) as u32
            } else {
                SECTOR_BYTES as u32
            },
        })
    }

    /// The chain itself.
    pub(crate) fn chain(&self) -> &::qcow2::Image {
        &self.image
    }
}

impl Drop for Qcow2Image {
    fn drop(&mut self) {
        if let Err(error) = self.image.settle() {
            tracing::warn!(image = %self.name, %error, "clusters that were reserved are leaked");
        }
    }
}

/// Checks and locks one file.
fn layer(
    file: File,
    format: Format,
    name: &str,
    options: OpenOptions,
) -> Result<Layer, ImageError> {
    raw::check_access(&file, name, options.read_only)?;
    lock::acquire(&file, name, options.read_only, options.lock_patience)?;
    let direct = if options.page_cache || direct::is_in_memory(&file) {
        direct::disable(&file).map(|()| None)
    } else {
        // The map has pieces of 512 bytes, whatever the guest's blocks are.
        direct::enable(&file, SECTOR_BYTES as u32)
    };
    let direct = direct.map_err(|source| ImageError::Io {
        name: name.to_owned(),
        action: "be switched between direct I/O and the page cache",
        source,
    })?;
    Ok(Layer {
        file: Arc::new(file),
        format,
        mem_align_bytes: direct.map(|direct| direct.mem_align_bytes),
    })
}

impl Image for Qcow2Image {
    fn name(&self) -> &str {
        &self.name
    }

    fn format(&self) -> &'static str {
        "qcow2"
    }

    fn is_read_only(&self) -> bool {
        self.image.is_read_only()
    }

    fn capacity_sectors(&self) -> u64 {
        self.image.capacity_bytes() / SECTOR_BYTES
    }

    fn physical_block_bytes(&self) -> u32 {
        self.physical_block_bytes
    }

    fn punches_holes(&self) -> bool {
        self.image.discards()
    }

    fn direct(&self) -> Option<DirectIo> {
        self.direct
    }

    fn locate(&self, access: Access, offset_bytes: u64, len_bytes: u64) -> Place {
        let access = match access {
            Access::Read => ::qcow2::Access::Read,
            Access::Write => ::qcow2::Access::Write,
        };
        match self.image.locate(access, offset_bytes, len_bytes) {
            Found::File {
                layer,
                offset_bytes,
                len_bytes,
                ticket,
            } => Place::File {
                fd: self.fds[layer],
                offset_bytes,
                len_bytes,
                ticket: ticket.map(|ticket| {
                    let issuer: Arc<dyn TicketIssuer> = self.image.clone();
                    Ticket::new(issuer, ticket.into_key())
                }),
            },
            Found::Zeroes { len_bytes } => Place::Zeroes { len_bytes },
            Found::Worker { len_bytes } => Place::Worker { len_bytes },
        }
    }

    fn perform(&self, task: &mut Task<'_>) -> Result<(), i32> {
        let done = match task {
            Task::Read {
                offset_bytes,
                buffers,
            } => self.image.read(*offset_bytes, &mut Memory(*buffers)),
            Task::Write {
                offset_bytes,
                buffers,
            } => self.image.write(*offset_bytes, &Memory(*buffers)),
            Task::WriteZeroes {
                offset_bytes,
                len_bytes,
                unmap,
            } => self.image.write_zeroes(*offset_bytes, *len_bytes, *unmap),
            Task::Discard {
                offset_bytes,
                len_bytes,
            } => self.image.discard(*offset_bytes, *len_bytes),
            Task::Flush => self.image.flush(),
        };
        done.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
    }

    fn flush_file(&self) -> Option<RawFd> {
        Some(self.fds[0])
    }

    fn is_in_memory(&self) -> bool {
        self.is_in_memory
    }

    fn max_workers(&self) -> usize {
        MAX_WORKERS
    }

    fn layers(&self) -> io::Result<Vec<Layer>> {
        Ok(self.image.layers().cloned().collect())
    }

    fn as_qcow2(&self) -> Option<&Qcow2Image> {
        Some(self)
    }

    fn resize(&self, capacity_sectors: u64) -> io::Result<()> {
        let capacity_bytes = capacity_sectors
            .checked_mul(SECTOR_BYTES)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        self.image
            .resize(capacity_bytes)
            .map_err(|error| match error {
                ::qcow2::Error::Invalid(_) => io::Error::new(io::ErrorKind::InvalidInput, error),
                other => other.into(),
            })
    }

    fn has_lost_writes(&self) -> bool {
        self.image.has_lost_writes()
    }

    fn note_failed_flush(&self) {
        self.image.note_failed_flush();
    }
}

impl TicketIssuer for ::qcow2::Image {
    fn give_back(&self, key: u64) {
        self.release(::qcow2::Ticket::from_key(key));
    }
}

/// A task's memory, for the crate.
struct Memory<'a>(Buffers<'a>);

impl Memory<'_> {
    /// Lets `transfer` move a part, and returns how much it moved.
    fn with_part(
        &self,
        at: usize,
        len_bytes: usize,
        transfer: impl FnOnce(Buffers<'_>) -> Result<usize, i32>,
    ) -> io::Result<usize> {
        let part = self.0.part(at, len_bytes);
        // SAFETY: a part of memory that is valid for as long as `self`.
        let part = unsafe { Buffers::new(&part) };
        transfer(part).map_err(io::Error::from_raw_os_error)
    }
}

impl Sink for Memory<'_> {
    fn len_bytes(&self) -> usize {
        self.0.len_bytes()
    }

    fn put(&mut self, at: usize, data: &[u8]) {
        self.0.write_at(at, data);
    }

    fn put_zeroes(&mut self, at: usize, len_bytes: usize) {
        self.0.zero_at(at, len_bytes);
    }

    fn read_from(
        &mut self,
        at: usize,
        len_bytes: usize,
        file: &File,
        offset_bytes: u64,
    ) -> io::Result<usize> {
        self.with_part(at, len_bytes, |part| {
            part.read_from(file.as_raw_fd(), offset_bytes)
        })
    }
}

impl Source for Memory<'_> {
    fn len_bytes(&self) -> usize {
        self.0.len_bytes()
    }

    fn get(&self, at: usize, into: &mut [u8]) {
        self.0.read_at(at, into);
    }

    fn write_to(
        &self,
        at: usize,
        len_bytes: usize,
        file: &File,
        offset_bytes: u64,
    ) -> io::Result<()> {
        let written = self.with_part(at, len_bytes, |part| {
            part.write_to(file.as_raw_fd(), offset_bytes)
        })?;
        if written == len_bytes {
            return Ok(());
        }
        // The storage took a part and no more.
        Err(io::Error::from_raw_os_error(libc::EIO))
    }
}
