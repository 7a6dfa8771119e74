//! Random operations on an image and on a model of it.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use qcow2::{Access, Format, Image, Layer, Place};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

pub(crate) fn layer(path: &Path, format: Format, write: bool) -> Layer {
    Layer {
        file: Arc::new(File::options().read(true).write(write).open(path).unwrap()),
        format,
        mem_align_bytes: None,
    }
}

/// As [`layer`], past the page cache; `None` where the file system does not do that.
pub(crate) fn direct_layer(path: &Path, format: Format, write: bool) -> Option<Layer> {
    let file = File::options()
        .read(true)
        .write(write)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .ok()?;
    Some(Layer {
        file: Arc::new(file),
        format,
        mem_align_bytes: Some(4096),
    })
}

pub(crate) fn open(path: &Path) -> Image {
    Image::open(vec![layer(path, Format::Qcow2, true)], false).unwrap()
}

pub(crate) fn read(image: &Image, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0xee; len];
    image.read(offset, &mut &mut data[..]).unwrap();
    data
}

/// An image and what it must contain.
pub(crate) struct Modelled {
    pub(crate) image: Image,
    pub(crate) model: Vec<u8>,
    random: StdRng,
}

impl Modelled {
    pub(crate) fn new(image: Image, model: Vec<u8>, seed: u64) -> Self {
        assert_eq!(image.capacity_bytes(), model.len() as u64);
        // As disks that are served have it, every other time.
        if seed.is_multiple_of(2) {
            image.map_streams_ahead();
        }
        Self {
            image,
            model,
            random: StdRng::seed_from_u64(seed),
        }
    }

    /// Carries out random operations and checks every read.
    pub(crate) fn work(&mut self, operations: usize) {
        for _ in 0..operations {
            let range = self.range();
            let (offset, len) = (range.start as u64, range.len() as u64);
            match self.random.random_range(0..100) {
                0..45 => {
                    let mut data = vec![0; range.len()];
                    self.random.fill(&mut data[..]);
                    self.image.write(offset, &&data[..]).unwrap();
                    self.model[range].copy_from_slice(&data);
                }
                45..55 => {
                    let unmap = self.random.random();
                    self.image.write_zeroes(offset, len, unmap).unwrap();
                    self.model[range].fill(0);
                }
                55..62 => {
                    self.image.discard(offset, len).unwrap();
                    let now = read(&self.image, offset, range.len());
                    // Each sector is zero or as it was; from now on it stays so.
                    for (now, then) in now.chunks(512).zip(self.model[range.clone()].chunks(512)) {
                        assert!(now == then || now.iter().all(|&byte| byte == 0));
                    }
                    self.model[range].copy_from_slice(&now);
                }
                62..64 => self.image.flush().unwrap(),
                64..70 => self.check_places(offset, len),
                _ => {
                    let data = read(&self.image, offset, range.len());
                    assert!(data == self.model[range.clone()], "{range:?}");
                }
            }
        }
    }

    /// What `locate` says must be where the data is.
    fn check_places(&self, offset: u64, len: u64) {
        let files: Vec<_> = self.image.layers().map(|layer| &layer.file).collect();
        let mut done = 0;
        while done < len {
            let at = (offset + done) as usize;
            done += match self.image.locate(Access::Read, offset + done, len - done) {
                Place::Zeroes { len_bytes } => {
                    let zero = self.model[at..at + len_bytes as usize]
                        .iter()
                        .all(|&byte| byte == 0);
                    assert!(zero, "{at}");
                    len_bytes
                }
                Place::File {
                    layer,
                    offset_bytes,
                    len_bytes,
                    ticket,
                } => {
                    use std::os::unix::fs::FileExt;
                    let mut data = vec![0; len_bytes as usize];
                    files[layer].read_exact_at(&mut data, offset_bytes).unwrap();
                    assert!(data == self.model[at..at + data.len()], "{at}");
                    if let Some(ticket) = ticket {
                        self.image.release(ticket);
                    }
                    len_bytes
                }
                Place::Worker { len_bytes } => len_bytes,
            };
        }
    }

    pub(crate) fn check_all(&self) {
        let chunk = 1 << 20;
        for (index, expected) in self.model.chunks(chunk).enumerate() {
            let found = read(&self.image, (index * chunk) as u64, expected.len());
            assert!(found == expected, "chunk {index}");
        }
    }

    /// Small ranges most of the time, in a few places that are hit again and again.
    fn range(&mut self) -> std::ops::Range<usize> {
        let sectors = self.model.len() / 512;
        let len = match self.random.random_range(0..10) {
            0..5 => self.random.random_range(1..=16),
            5..8 => self.random.random_range(1..=256),
            _ => self.random.random_range(1..=2048),
        };
        let len = len.min(sectors);
        let mut start = self.random.random_range(0..=sectors - len);
        if self.random.random_range(0..3) == 0 {
            start = start / 128 * 128;
        }
        start * 512..(start + len) * 512
    }
}
