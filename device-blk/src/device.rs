//! A disk as the vhost-user session sees it: features, configuration space, queues.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use faults::{DeviceFaults, Wake};
use vhost_user::backend::{Device, QueueHandler};

use crate::confinement;
use crate::engine::backend::ServeOptions;
use crate::engine::misbehaviour::QueueWaker;
use crate::engine::{Backend, BlkQueue, CacheMode, MAX_QUEUE_SIZE, affinity};
use crate::image::{Image, SECTOR_BYTES};
use crate::stats::{QueueStats, Snapshot};
use request::{ID_BYTES, MAX_RANGE_SECTORS, MAX_RANGES};

/// `VIRTIO_BLK_F_*`, as bit numbers (Virtio 1.2 section 5.2.3).
mod feature {
    pub(super) const SIZE_MAX: u64 = 1 << 1;
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const CONFIG_WCE: u64 = 1 << 11;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
    pub(super) const LIFETIME: u64 = 1 << 15;
}

/// Data segments of one request: with header and status they fit a ring of 128, the smallest
/// that VMMs use for disks.
const SEG_MAX: u32 = 126;
/// Bytes of one data segment. Larger ones are served too; drivers that ask for no limit are given
/// one that keeps a request below the 2 GiB that the kernel moves at once.
const SIZE_MAX: u32 = 1 << 20;
/// Where `writeback` lies in `struct virtio_blk_config`.
const WRITEBACK_OFFSET: u32 = 32;

/// One disk. Outlives sessions.
pub(crate) struct BlkDevice {
    backend: Arc<Backend>,
    /// The driver's choice of cache mode; true for write-back.
    write_back: Arc<AtomicBool>,
    queues: Vec<Arc<QueueStats>>,
    /// Hears of faults for as long as the device is there.
    _fault_waker: Arc<dyn Wake>,
}

/// The answer to GET_ID; cut to 20 bytes.
pub(crate) fn serial_id(serial: &str) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    let len = serial.len().min(ID_BYTES);
    id[..len].copy_from_slice(&serial.as_bytes()[..len]);
    id
}

impl BlkDevice {
    /// Serves `image` on up to `num_queues` queues.
    pub(crate) fn new(image: Arc<dyn Image>, num_queues: u16, options: ServeOptions) -> Self {
        let slow = Arc::clone(&options.slow);
        let backend = Arc::new(Backend::new(image, options));
        let fault_waker: Arc<dyn Wake> = Arc::new(QueueWaker(Arc::clone(&backend)));
        backend.faults().add_waker(&fault_waker);
        Self {
            backend,
            _fault_waker: fault_waker,
            write_back: Arc::new(AtomicBool::new(true)),
            queues: (0..num_queues)
                .map(|index| Arc::new(QueueStats::new(index, Arc::clone(&slow))))
                .collect(),
        }
    }

    /// What the queues work on: to stop them, exchange the image, change how they poll.
    pub(crate) fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }

    /// What is served now.
    pub(crate) fn image(&self) -> Arc<dyn Image> {
        self.backend.image()
    }

    /// Grows the disk to `capacity_sectors`; the driver is told by the caller. Blocks.
    ///
    /// # Errors
    /// `InvalidInput` for less than now or for parts of a block; else what the image says.
    pub(crate) fn resize(&self, capacity_sectors: u64) -> io::Result<()> {
        let image = self.image();
        let block_sectors = u64::from(self.backend.block_bytes()) / SECTOR_BYTES;
        if capacity_sectors < self.backend.capacity_sectors(&*image)
            || !capacity_sectors.is_multiple_of(block_sectors)
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        image.resize(capacity_sectors)
    }

    /// What each queue did so far.
    pub(crate) fn queues(&self) -> &[Arc<QueueStats>] {
        &self.queues
    }

    /// What all queues did so far.
    pub(crate) fn stats(&self) -> Snapshot {
        Snapshot::of(self.queues.iter().map(|queue| &**queue))
    }

    /// Section 5.2.6.2: the toggle decides where it was negotiated; else a driver that cannot
    /// flush gets write-through.
    fn cache_mode(&self, features: u64) -> CacheMode {
        if features & feature::CONFIG_WCE != 0 {
            CacheMode::Toggled(Arc::clone(&self.write_back))
        } else if features & feature::FLUSH != 0 {
            CacheMode::WriteBack
        } else {
            CacheMode::WriteThrough
        }
    }
}

impl Device for BlkDevice {
    fn features(&self) -> u64 {
        let image = self.image();
        let mut features = feature::SEG_MAX
            | feature::SIZE_MAX
            | feature::LIFETIME
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::TOPOLOGY
            | feature::CONFIG_WCE;
        if image.is_read_only() {
            features |= feature::RO;
        } else {
            features |= feature::WRITE_ZEROES;
        }
        if image.punches_holes() {
            features |= feature::DISCARD;
        }
        if self.queues.len() > 1 {
            features |= feature::MQ;
        }
        features
    }

    fn num_queues(&self) -> u16 {
        self.queues.len() as u16
    }

    fn max_queue_size(&self) -> u16 {
        MAX_QUEUE_SIZE
    }

    fn config(&self) -> Vec<u8> {
        let image = self.image();
        let block_bytes = self.backend.block_bytes();
        let physical_block_bytes = image.physical_block_bytes().max(block_bytes);
        let blocks_per_physical = physical_block_bytes / block_bytes;
        ConfigSpace {
            capacity_sectors: self.backend.capacity_sectors(&*image),
            block_bytes,
            physical_block_exp: blocks_per_physical.trailing_zeros() as u8,
            min_io_blocks: blocks_per_physical as u16,
            write_back: self.write_back.load(Ordering::Acquire),
            num_queues: self.num_queues(),
            discard_alignment_sectors: physical_block_bytes / SECTOR_BYTES as u32,
            unmaps: image.punches_holes(),
        }
        .to_bytes()
    }

    /// Only `writeback` can be written (section 5.2.5).
    fn write_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        match (offset, data) {
            (WRITEBACK_OFFSET, [value @ (0 | 1)]) => {
                self.write_back.store(*value == 1, Ordering::Release);
                Ok(())
            }
            _ => Err(io::Error::from(io::ErrorKind::PermissionDenied)),
        }
    }

    fn start_queue(&self, index: u16, features: u64) -> io::Result<Box<dyn QueueHandler>> {
        if self.backend.has_ghosts() {
            return Err(io::Error::other(
                "requests of an earlier session have not ended yet; connect again when the storage \
                 answers",
            ));
        }
        let stats = self
            .queues
            .get(usize::from(index))
            .ok_or(io::ErrorKind::InvalidInput)?;
        let backend = Arc::clone(&self.backend);
        affinity::pin_this_thread(backend.cpus(), index)?;
        let queue = BlkQueue::new(backend, self.cache_mode(features), Arc::clone(stats))
            .map_err(io::Error::other)?;
        confinement::confine_queue_thread().map_err(io::Error::other)?;
        Ok(Box::new(queue))
    }

    fn faults(&self) -> Option<Arc<DeviceFaults>> {
        Some(Arc::clone(self.backend.faults())).filter(|faults| faults.is_possible())
    }

    fn reset(&self) {
        self.write_back.store(true, Ordering::Release);
    }
}

/// `struct virtio_blk_config` up to the write-zeroes fields (section 5.2.4).
struct ConfigSpace {
    capacity_sectors: u64,
    block_bytes: u32,
    /// log2 of the logical blocks in a physical one.
    physical_block_exp: u8,
    min_io_blocks: u16,
    write_back: bool,
    num_queues: u16,
    discard_alignment_sectors: u32,
    unmaps: bool,
}

impl ConfigSpace {
    const LEN_BYTES: usize = 60;

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; Self::LEN_BYTES];
        let mut put = |offset: usize, field: &[u8]| {
            bytes[offset..offset + field.len()].copy_from_slice(field);
        };
        put(0, &self.capacity_sectors.to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &self.block_bytes.to_le_bytes());
        put(24, &[self.physical_block_exp]);
        put(26, &self.min_io_blocks.to_le_bytes());
        put(WRITEBACK_OFFSET as usize, &[u8::from(self.write_back)]);
        put(34, &self.num_queues.to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &(MAX_RANGES as u32).to_le_bytes());
        put(44, &self.discard_alignment_sectors.to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &(MAX_RANGES as u32).to_le_bytes());
        put(56, &[u8::from(self.unmaps)]);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::image::{OpenOptions, RawImage};

    const OPTIONS: OpenOptions = OpenOptions {
        read_only: false,
        page_cache: false,
        block_bytes: 512,
        lock_patience: Duration::ZERO,
    };

    fn image_of(len_bytes: u64, options: OpenOptions) -> Arc<dyn Image> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len_bytes).unwrap();
        Arc::new(RawImage::from_file(file.reopen().unwrap(), "test".into(), options).unwrap())
    }

    fn disk(read_only: bool, num_queues: u16) -> BlkDevice {
        let options = OpenOptions {
            read_only,
            ..OPTIONS
        };
        BlkDevice::new(
            image_of(1 << 20, options),
            num_queues,
            ServeOptions::default(),
        )
    }

    #[test]
    fn config_space_has_every_field_in_its_place() {
        let bytes = ConfigSpace {
            capacity_sectors: 0x1122_3344,
            block_bytes: 4096,
            physical_block_exp: 3,
            min_io_blocks: 8,
            write_back: true,
            num_queues: 4,
            discard_alignment_sectors: 8,
            unmaps: true,
        }
        .to_bytes();
        assert_eq!(bytes.len(), 60);
        assert_eq!(bytes[..8], 0x1122_3344_u64.to_le_bytes());
        assert_eq!(bytes[8..12], (1_u32 << 20).to_le_bytes());
        assert_eq!(bytes[12..16], 126_u32.to_le_bytes());
        assert_eq!(bytes[20..24], 4096_u32.to_le_bytes());
        assert_eq!((bytes[24], &bytes[26..28]), (3, &[8, 0][..]));
        assert_eq!((bytes[32], &bytes[34..36]), (1, &[4, 0][..]));
        assert_eq!((bytes[40], bytes[44], bytes[52], bytes[56]), (32, 8, 32, 1));
    }

    #[test]
    fn read_only_disk_offers_nothing_that_writes() {
        let features = disk(true, 1).features();
        assert_ne!(features & feature::RO, 0);
        assert_eq!(features & (feature::DISCARD | feature::WRITE_ZEROES), 0);
        assert_eq!(disk(false, 1).features() & feature::RO, 0);
    }

    #[test]
    fn several_queues_are_offered_when_there_are_several() {
        assert_eq!(disk(false, 1).features() & feature::MQ, 0);
        let disk = disk(false, 4);
        assert_ne!(disk.features() & feature::MQ, 0);
        assert_eq!(disk.config()[34..36], [4, 0]);
    }

    #[test]
    fn driver_without_flush_gets_write_through() {
        let disk = disk(false, 1);
        assert!(matches!(disk.cache_mode(0), CacheMode::WriteThrough));
        assert!(matches!(
            disk.cache_mode(feature::FLUSH),
            CacheMode::WriteBack
        ));
    }

    #[test]
    fn writeback_toggle_is_honoured_and_forgotten_at_reset() {
        let disk = disk(false, 1);
        let CacheMode::Toggled(write_back) = disk.cache_mode(feature::CONFIG_WCE) else {
            panic!("the toggle was negotiated");
        };
        assert!(write_back.load(Ordering::Acquire));
        disk.write_config(WRITEBACK_OFFSET, &[0]).unwrap();
        assert!(!write_back.load(Ordering::Acquire));
        assert_eq!(disk.config()[32], 0);
        disk.reset();
        assert_eq!(disk.config()[32], 1);
    }

    #[test]
    fn other_config_fields_cannot_be_written() {
        let disk = disk(false, 1);
        for (offset, data) in [
            (0, &[0; 8][..]),
            (32, &[2]),
            (32, &[0, 0]),
            (33, &[1]),
            (u32::MAX, &[1]),
        ] {
            assert!(disk.write_config(offset, data).is_err(), "{offset}");
        }
    }

    #[test]
    fn serial_is_cut_to_twenty_bytes() {
        let long = "0123456789012345678901234";
        assert_eq!(&serial_id(long)[..], &long.as_bytes()[..20]);
        assert_eq!(serial_id("ab")[..3], *b"ab\0");
    }

    #[test]
    fn disk_of_large_blocks_has_whole_blocks() {
        let options = OpenOptions {
            block_bytes: 4096,
            ..OPTIONS
        };
        let image = image_of(3 * 4096 + 512, options);
        let serve = ServeOptions {
            block_bytes: 4096,
            ..ServeOptions::default()
        };
        let config = BlkDevice::new(image, 1, serve).config();
        assert_eq!(config[..8], 24_u64.to_le_bytes());
        assert_eq!(config[20..24], 4096_u32.to_le_bytes());
        assert_eq!(config[24], 0);
    }

    #[test]
    fn disk_grows_and_does_not_shrink() {
        let disk = disk(false, 1);
        assert!(disk.resize(8).is_err());
        disk.resize(4096).unwrap();
        disk.resize(4096).unwrap();
        assert_eq!(disk.config()[..8], 4096_u64.to_le_bytes());
        assert_eq!(disk.image().capacity_sectors(), 4096);
    }
}
