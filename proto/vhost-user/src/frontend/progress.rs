//! How far the rings of a driver's session are, read from what frontend and backend share: the rings in
//! guest memory and the in-flight region. Nobody has to answer for that.
//!
//! Both are read through their files: it is done now and then, and a file can be read without `unsafe`.
//! What stands there is written by guest and backend, so it decides nothing here but what people are told.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::memory::MemoryTable;
use super::session::{Activation, InflightRegion, QueueState};
use crate::ring::RingFormat;

/// Offset of `idx` in the available and used rings (Virtio 1.2 sections 2.7.6 and 2.7.8).
const IDX_OFFSET: u64 = 2;
/// Alignment of a queue's part of the in-flight region (vhost-user: inflight I/O tracking).
const QUEUE_ALIGN_BYTES: u64 = 64;

/// How far one ring is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueProgress {
    /// Index of the virtqueue.
    pub index: u16,
    /// Where the driver will put its next request. 0 for packed rings, which have no such field.
    pub avail_idx: u16,
    /// What is completed: changes with each batch. Of a packed ring its place, from the in-flight region.
    pub used_idx: u16,
    /// Requests made and not completed. Of a packed ring only those that the backend took.
    pub due: u16,
    /// Of these, taken by the backend; `None` without an in-flight region.
    pub in_flight: Option<u16>,
}

impl QueueProgress {
    /// Requests that the backend has taken and not completed, as far as this can be known.
    pub(super) fn taken(&self) -> u16 {
        self.in_flight.unwrap_or(self.due)
    }
}

/// A driver's session to look at. Cheap to clone.
#[derive(Clone)]
pub(super) struct Watched {
    queues: Arc<[QueueState]>,
    format: RingFormat,
    inflight: Option<InflightRegion>,
}

impl Watched {
    pub(super) fn new(activation: &Activation, inflight: Option<InflightRegion>) -> Self {
        Self {
            queues: activation.queues.as_slice().into(),
            format: RingFormat::of(activation.features),
            inflight,
        }
    }

    /// As it is now; rings outside memory are left out.
    pub(super) fn progress(&self, memory: &MemoryTable) -> Vec<QueueProgress> {
        self.queues
            .iter()
            .filter_map(|queue| self.queue(queue, memory))
            .collect()
    }

    fn queue(&self, queue: &QueueState, memory: &MemoryTable) -> Option<QueueProgress> {
        let region = self
            .inflight
            .as_ref()
            .and_then(|region| read_region(region, self.format, queue));
        let in_flight = region.as_ref().map(|region| region.in_flight);
        let index = queue.index;
        Some(match self.format {
            RingFormat::Split => {
                let avail_idx = memory.read_u16(queue.driver_gpa + IDX_OFFSET).ok()?;
                let used_idx = memory.read_u16(queue.device_gpa + IDX_OFFSET).ok()?;
                QueueProgress {
                    index,
                    avail_idx,
                    used_idx,
                    // More than the ring holds is a driver's mistake.
                    due: avail_idx.wrapping_sub(used_idx).min(queue.size),
                    in_flight,
                }
            }
            RingFormat::Packed => QueueProgress {
                index,
                avail_idx: 0,
                used_idx: region.map_or(0, |region| region.used),
                due: in_flight.unwrap_or(0),
                in_flight,
            },
        })
    }
}

/// Of one queue, from the in-flight region.
struct Noted {
    in_flight: u16,
    used: u16,
}

/// `None` when the region has no room for such a queue.
fn read_region(region: &InflightRegion, format: RingFormat, queue: &QueueState) -> Option<Noted> {
    let (header_bytes, entry_bytes, used_offset) = match format {
        RingFormat::Split => (16, 16, 14),
        RingFormat::Packed => (32, 32, 16),
    };
    let stride = (header_bytes + entry_bytes * u64::from(region.queue_size()))
        .next_multiple_of(QUEUE_ALIGN_BYTES);
    let len = header_bytes + entry_bytes * u64::from(queue.size);
    let start = stride * u64::from(queue.index);
    if len > stride || start + len > region.len_bytes() {
        return None;
    }
    let mut bytes = vec![0; len as usize];
    region
        .file()
        .read_exact_at(&mut bytes, region.file_offset().checked_add(start)?)
        .ok()?;
    let (header, entries) = bytes.split_at(header_bytes as usize);
    let in_flight = entries
        .chunks_exact(entry_bytes as usize)
        .filter(|entry| entry[0] != 0)
        .count();
    Some(Noted {
        // At most the ring's size.
        in_flight: in_flight as u16,
        used: u16::from_le_bytes([header[used_offset], header[used_offset + 1]]),
    })
}
