//! One ring of a disk: a `Virtqueue` of the crate `virtio-driver` with block requests on it.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest::oracle::{self, BLOCK_LEN};
use virtio_driver::virtqueue::{Virtqueue, VirtqueueLayout};
use virtio_driver::{
    IovaTranslator, VhostUser, VirtioBlkConfig, VirtioFeatureFlags, VirtioTransport, iovec,
};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::Memory;
use crate::transport::{F_RING_PACKED, RingPlan};

/// Header, data, status.
const DESCRIPTORS_PER_REQUEST: usize = 3;
const PAGE_BYTES: usize = 4096;
/// `VIRTIO_BLK_T_*` (Virtio 1.2 section 5.2.6).
mod request {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
}
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
/// `struct virtq_used` (Virtio 1.2 section 2.7.8): the ring, an element of it, and the length in that,
/// whose lower half is enough for a frame.
const ELEMENTS_OFFSET: usize = 4;
const ELEMENT_BYTES: usize = 8;
const LEN_OFFSET: usize = 4;
/// No status is this.
const UNANSWERED: u8 = 0xff;

/// What is acknowledged of a disk's features.
pub fn features(packed: bool) -> u64 {
    let ring = if packed { F_RING_PACKED } else { 0 };
    VirtioFeatureFlags::VERSION_1.bits()
        | VirtioFeatureFlags::RING_EVENT_IDX.bits()
        | F_FLUSH
        | F_MQ
        | ring
}

/// What a request is for.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Of a block, into or from this place in memory.
    Write(oracle::Write, usize),
    /// As above.
    Read(oracle::Read, usize),
    /// Of what was acknowledged.
    Flush(oracle::Flush),
    /// Only to have memory touched.
    Touch,
}

/// A request that was answered.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// What it was for.
    pub kind: Kind,
    /// It succeeded.
    pub is_ok: bool,
    /// From its submission to its completion, as the driver sees it.
    pub took: Duration,
}

/// The backend completed what was not in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a completion of {0}, which is not in flight")]
pub struct Unasked(pub u16);

/// What driver and device share of a request besides its data.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Shared {
    header: [u8; 16],
    status: u8,
}

/// Cuts memory into rings, and pages for data behind them.
pub struct RingMemory<'a> {
    translator: Box<dyn Fn() -> Box<dyn IovaTranslator> + 'a>,
    memory: &'a Arc<Memory>,
    features: u64,
    end: usize,
}

impl<'a> RingMemory<'a> {
    /// For rings with these `features`. The crate makes translators of addresses only for
    /// connections, so one is made to `socket` and closed again.
    ///
    /// # Errors
    /// Nobody answers there.
    pub fn new(socket: &Path, features: u64, memory: &'a Arc<Memory>) -> io::Result<Self> {
        let socket = socket.to_str().ok_or(io::ErrorKind::InvalidFilename)?;
        let connection = VhostUser::<VirtioBlkConfig, Shared>::new(socket, features)?;
        Ok(Self {
            translator: Box::new(move || connection.iova_translator()),
            memory,
            features,
            end: 0,
        })
    }

    /// The next ring, with room for `depth` requests.
    ///
    /// # Errors
    /// The crate refuses the size.
    pub fn ring(&mut self, depth: usize) -> io::Result<Ring> {
        let size = u16::try_from((depth * DESCRIPTORS_PER_REQUEST).next_power_of_two())
            .map_err(|_| io::ErrorKind::InvalidInput)?;
        let flags = VirtioFeatureFlags::from_bits_truncate(self.features);
        let layout = VirtqueueLayout::new::<Shared>(1, usize::from(size), flags)?;
        let place = self.memory.at(self.end, layout.end_offset);
        self.end = (self.end + layout.end_offset).next_multiple_of(PAGE_BYTES);
        // SAFETY: inside the mapping, given to this ring alone, and kept mapped by the ring's
        // owner, who keeps the memory longer than the ring.
        let place = unsafe { std::slice::from_raw_parts_mut(place, layout.end_offset) };
        let mut queue = Virtqueue::new((self.translator)(), place, size, flags)?;
        queue.set_used_notif_enabled(true);
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Ring {
            queue,
            size,
            is_packed: self.features & F_RING_PACKED != 0,
            slots: vec![None; usize::from(size)],
            in_flight: 0,
            reaped: 0,
            kick: event()?,
            call: event()?,
            _memory: Arc::clone(self.memory),
        })
    }

    /// Where pages for data are, and the range of all of them.
    pub fn pages(self) -> (Vec<usize>, std::ops::Range<usize>) {
        let all = self.end..self.memory.len_bytes() / PAGE_BYTES * PAGE_BYTES;
        (all.clone().step_by(PAGE_BYTES).collect(), all)
    }
}

/// See the module's description.
pub struct Ring {
    queue: Virtqueue<'static, Shared>,
    size: u16,
    is_packed: bool,
    /// By chain.
    slots: Vec<Option<(Kind, Instant)>>,
    in_flight: usize,
    reaped: u16,
    kick: EventFd,
    pub(crate) call: EventFd,
    /// The queue is in it.
    _memory: Arc<Memory>,
}

impl Ring {
    /// As backends are told of it.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn plan(&self) -> io::Result<RingPlan> {
        Ok(RingPlan {
            size: self.size,
            desc: self.queue.desc_table_ptr() as usize,
            driver: self.queue.driver_area_ptr() as usize,
            device: self.queue.device_area_ptr() as usize,
            kick: self.kick.try_clone()?,
            call: self.call.try_clone()?,
        })
    }

    /// Requests that were not answered yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Writes the page at `page` to `block`.
    pub fn write(&mut self, block: u64, page: usize, memory: &Memory, kind: Kind) {
        let data = (memory.at(page, BLOCK_LEN), BLOCK_LEN);
        self.submit(request::OUT, block, Some((data, false)), kind);
    }

    /// Reads `len` bytes from `block` on to `place`.
    pub fn read(&mut self, block: u64, place: usize, len: usize, memory: &Memory, kind: Kind) {
        self.submit(
            request::IN,
            block,
            Some(((memory.at(place, len), len), true)),
            kind,
        );
    }

    /// Makes what was acknowledged durable.
    pub fn flush(&mut self, kind: Kind) {
        self.submit(request::FLUSH, 0, None, kind);
    }

    fn submit(
        &mut self,
        request_type: u32,
        block: u64,
        data: Option<((*mut u8, usize), bool)>,
        kind: Kind,
    ) {
        let sector = block * (BLOCK_LEN as u64 / 512);
        let added = self.queue.add_request(|shared, add| {
            shared.header = [0; 16];
            shared.header[..4].copy_from_slice(&request_type.to_le_bytes());
            shared.header[8..].copy_from_slice(&sector.to_le_bytes());
            shared.status = UNANSWERED;
            add(part(shared.header.as_mut_ptr(), 16), false)?;
            if let Some(((start, len), from_device)) = data {
                add(part(start, len), from_device)?;
            }
            add(part(&raw mut shared.status, 1), true)
        });
        let chain = added.expect("a ring has room for its depth");
        let old = self.slots[usize::from(chain)].replace((kind, Instant::now()));
        assert!(old.is_none(), "the driver gave out chain {chain} twice");
        self.in_flight += 1;
    }

    /// Tells the backend, if it wants to be told.
    pub fn kick(&mut self) {
        if self.queue.avail_notif_needed() {
            // Only a full counter fails, and then it is readable.
            let _ = self.kick.write(1);
        }
    }

    /// The next request that was answered.
    ///
    /// # Errors
    /// It was not in flight. The ring must not be used any more.
    pub fn next_completion(&mut self, memory: &Memory) -> Result<Option<Done>, Unasked> {
        self.check_next(memory)?;
        let Some(completion) = self.queue.completions().next() else {
            return Ok(None);
        };
        self.reaped = self.reaped.wrapping_add(1);
        let (kind, since) = self.slots[usize::from(completion.id)]
            .take()
            .ok_or(Unasked(completion.id))?;
        self.in_flight -= 1;
        Ok(Some(Done {
            kind,
            is_ok: completion.req.status == 0,
            took: since.elapsed(),
        }))
    }

    /// The crate trusts its device; a chain that is freed twice would never be right again.
    fn check_next(&self, memory: &Memory) -> Result<(), Unasked> {
        const INDEX_OFFSET: usize = 2;
        if self.is_packed {
            return Ok(());
        }
        let used = self.queue.device_area_ptr() as usize;
        if memory.load_u16(used + INDEX_OFFSET) == self.reaped {
            return Ok(());
        }
        let position = usize::from(self.reaped % self.size);
        let chain = memory.load_u16(used + ELEMENTS_OFFSET + position * ELEMENT_BYTES);
        match self.slots.get(usize::from(chain)) {
            Some(Some(_)) => Ok(()),
            _ => Err(Unasked(chain)),
        }
    }
}

/// `VIRTIO_NET_F_MAC`
const F_MAC: u64 = 1 << 5;

/// What is acknowledged of a NIC's features.
pub fn nic_features() -> u64 {
    VirtioFeatureFlags::VERSION_1.bits() | VirtioFeatureFlags::RING_EVENT_IDX.bits() | F_MAC
}

/// A ring whose requests are one buffer each: a NIC's.
pub struct FrameRing {
    queue: Virtqueue<'static, u64>,
    size: u16,
    /// The buffer's place, by chain.
    slots: Vec<Option<usize>>,
    in_flight: usize,
    reaped: u16,
    kick: EventFd,
    pub(crate) call: EventFd,
    /// The queue is in it.
    _memory: Arc<Memory>,
}

impl RingMemory<'_> {
    /// The next ring, with room for `depth` buffers.
    ///
    /// # Errors
    /// The crate refuses the size.
    pub fn frame_ring(&mut self, depth: usize) -> io::Result<FrameRing> {
        let size = u16::try_from(depth).map_err(|_| io::ErrorKind::InvalidInput)?;
        let flags = VirtioFeatureFlags::from_bits_truncate(self.features);
        let layout = VirtqueueLayout::new::<u64>(1, depth, flags)?;
        let place = self.memory.at(self.end, layout.end_offset);
        self.end = (self.end + layout.end_offset).next_multiple_of(PAGE_BYTES);
        // SAFETY: inside the mapping, given to this ring alone, and kept mapped by the ring.
        let place = unsafe { std::slice::from_raw_parts_mut(place, layout.end_offset) };
        let mut queue = Virtqueue::new((self.translator)(), place, size, flags)?;
        queue.set_used_notif_enabled(true);
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(FrameRing {
            queue,
            size,
            slots: vec![None; depth],
            in_flight: 0,
            reaped: 0,
            kick: event()?,
            call: event()?,
            _memory: Arc::clone(self.memory),
        })
    }
}

impl FrameRing {
    /// As backends are told of it.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn plan(&self) -> io::Result<RingPlan> {
        Ok(RingPlan {
            size: self.size,
            desc: self.queue.desc_table_ptr() as usize,
            driver: self.queue.driver_area_ptr() as usize,
            device: self.queue.device_area_ptr() as usize,
            kick: self.kick.try_clone()?,
            call: self.call.try_clone()?,
        })
    }

    /// Another buffer fits.
    pub fn has_room(&self) -> bool {
        self.in_flight < usize::from(self.size)
    }

    /// Offers a buffer.
    ///
    /// # Panics
    /// There is no room.
    pub fn add(&mut self, place: usize, len: usize, from_device: bool, memory: &Memory) {
        let buffer = part(memory.at(place, len), len);
        let added = self.queue.add_request(|_, add| add(buffer, from_device));
        let chain = added.expect("whoever adds has seen that there is room");
        self.slots[usize::from(chain)] = Some(place);
        self.in_flight += 1;
    }

    /// A buffer that is the driver's again, and how many bytes the backend put into it, which the crate
    /// keeps to itself.
    pub fn take_used(&mut self, memory: &Memory) -> Option<(usize, usize)> {
        let used = self.queue.device_area_ptr() as usize;
        let done = self.queue.completions().next()?;
        let position = usize::from(self.reaped % self.size);
        let element = used + ELEMENTS_OFFSET + position * ELEMENT_BYTES;
        let len_bytes = usize::from(memory.load_u16(element + LEN_OFFSET));
        self.reaped = self.reaped.wrapping_add(1);
        self.in_flight -= 1;
        let place = self.slots[usize::from(done.id)].take()?;
        Some((place, len_bytes))
    }

    /// Tells the backend, if it wants to be told.
    pub fn kick(&mut self) {
        if self.queue.avail_notif_needed() {
            // Only a full counter fails, and then it is readable.
            let _ = self.kick.write(1);
        }
    }
}

fn part(start: *mut u8, len: usize) -> iovec {
    iovec {
        iov_base: start.cast(),
        iov_len: len,
    }
}
