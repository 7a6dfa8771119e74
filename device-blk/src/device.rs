//! A disk as the vhost-user session sees it: features, configuration space, queues.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost_user::backend::{Device, QueueHandler};

use crate::confinement;
use crate::engine::{Backend, BlkQueue, CacheMode, MAX_QUEUE_SIZE};
use crate::image::{RawImage, SECTOR_BYTES};
use crate::request::{ID_BYTES, Limits, MAX_RANGE_SECTORS, MAX_RANGES};
use crate::stats::{QueueStats, Snapshot};

/// `VIRTIO_BLK_F_*`, as bit numbers (Virtio 1.2 section 5.2.3).
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const CONFIG_WCE: u64 = 1 << 11;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Data segments of one request: with header and status they fit a ring of 128, the smallest
/// that VMMs use for disks.
const SEG_MAX: u32 = 126;
/// Where `writeback` lies in `struct virtio_blk_config`.
const WRITEBACK_OFFSET: u32 = 32;

/// One disk. Outlives sessions.
#[derive(Debug)]
pub(crate) struct BlkDevice {
    image: Arc<RawImage>,
    serial: [u8; ID_BYTES],
    /// The driver's choice of cache mode; true for write-back.
    write_back: Arc<AtomicBool>,
    queues: Vec<Arc<QueueStats>>,
    has_ghosts: Arc<AtomicBool>,
}

impl BlkDevice {
    /// Serves `image` on up to `num_queues` queues. `serial` is cut to 20 bytes.
    pub(crate) fn new(image: RawImage, serial: &str, num_queues: u16) -> Self {
        let mut id = [0; ID_BYTES];
        let len = serial.len().min(ID_BYTES);
        id[..len].copy_from_slice(&serial.as_bytes()[..len]);
        Self {
            image: Arc::new(image),
            serial: id,
            write_back: Arc::new(AtomicBool::new(true)),
            queues: (0..num_queues).map(|_| Arc::default()).collect(),
            has_ghosts: Arc::default(),
        }
    }

    pub(crate) fn image(&self) -> &RawImage {
        &self.image
    }

    /// What all queues did so far.
    pub(crate) fn stats(&self) -> Snapshot {
        Snapshot::of(self.queues.iter().map(|queue| &**queue))
    }

    fn limits(&self) -> Limits {
        Limits {
            capacity_sectors: self.image.capacity_sectors(),
            read_only: self.image.is_read_only(),
            discard: self.image.punches_holes(),
        }
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
        let mut features = feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::TOPOLOGY
            | feature::CONFIG_WCE;
        if self.image.is_read_only() {
            features |= feature::RO;
        } else {
            features |= feature::WRITE_ZEROES;
        }
        if self.image.punches_holes() {
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
        let physical_block_bytes = u64::from(self.image.physical_block_bytes());
        let blocks_per_physical = physical_block_bytes / SECTOR_BYTES;
        ConfigSpace {
            capacity_sectors: self.image.capacity_sectors(),
            physical_block_exp: blocks_per_physical.trailing_zeros() as u8,
            min_io_blocks: blocks_per_physical as u16,
            write_back: self.write_back.load(Ordering::Acquire),
            num_queues: self.num_queues(),
            discard_alignment_sectors: blocks_per_physical as u32,
            unmaps: self.image.punches_holes(),
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
        if self.has_ghosts.load(Ordering::Acquire) {
            return Err(io::Error::other(
                "requests of an earlier session still run in the kernel; restart the daemon",
            ));
        }
        let stats = self
            .queues
            .get(usize::from(index))
            .ok_or(io::ErrorKind::InvalidInput)?;
        let backend = Backend {
            image: Arc::clone(&self.image),
            serial: self.serial,
            limits: self.limits(),
            cache: self.cache_mode(features),
            has_ghosts: Arc::clone(&self.has_ghosts),
        };
        let queue = BlkQueue::new(backend, Arc::clone(stats)).map_err(io::Error::other)?;
        confinement::confine_queue_thread().map_err(io::Error::other)?;
        Ok(Box::new(queue))
    }

    fn reset(&self) {
        self.write_back.store(true, Ordering::Release);
    }
}

/// `struct virtio_blk_config` up to the write-zeroes fields (section 5.2.4).
struct ConfigSpace {
    capacity_sectors: u64,
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
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR_BYTES as u32).to_le_bytes());
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
    use crate::image::OpenOptions;

    fn disk(read_only: bool, num_queues: u16) -> BlkDevice {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let options = OpenOptions {
            read_only,
            page_cache: false,
            lock_patience: Duration::ZERO,
        };
        BlkDevice::new(
            RawImage::from_file(file.reopen().unwrap(), "test".into(), options).unwrap(),
            "serial",
            num_queues,
        )
    }

    #[test]
    fn config_space_has_every_field_in_its_place() {
        let bytes = ConfigSpace {
            capacity_sectors: 0x1122_3344,
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
        assert_eq!(bytes[12..16], 126_u32.to_le_bytes());
        assert_eq!(bytes[20..24], 512_u32.to_le_bytes());
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
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let options = OpenOptions {
            read_only: true,
            page_cache: true,
            lock_patience: Duration::ZERO,
        };
        let disk = BlkDevice::new(
            RawImage::from_file(file.reopen().unwrap(), "test".into(), options).unwrap(),
            long,
            1,
        );
        assert_eq!(&disk.serial[..], &long.as_bytes()[..20]);
    }
}
