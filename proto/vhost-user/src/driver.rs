//! The driver's end of a ring, split or [packed], and guest memory to put it into: what tests and
//! benches of the device's end drive it with. Not for use inside a VM.

mod packed;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};

use crate::memory::{Mapping, MemoryError, MemoryTable, Region, RegionLayout};
use crate::ring::RingAddresses;
pub use packed::PackedDriverRing;

/// Difference between frontend addresses and guest addresses, so that mixing them up shows.
const USER_ADDR_OFFSET: u64 = 0x5500_0000_0000;

/// Guest memory: one memfd, mapped as a guest would see it.
#[derive(Debug)]
pub struct GuestMemory {
    file: File,
    mapping: Mapping,
    layouts: Vec<RegionLayout>,
}

impl GuestMemory {
    /// One region of `len_bytes` at guest address 0.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(len_bytes: u64) -> io::Result<GuestMemory> {
        GuestMemory::with_regions(&[(0, len_bytes)])
    }

    /// Regions given as (guest address, size), one behind the other in the file.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn with_regions(regions: &[(u64, u64)]) -> io::Result<GuestMemory> {
        let mut mmap_offset = 0;
        let layouts = regions
            .iter()
            .map(|&(gpa, len_bytes)| {
                let layout = RegionLayout {
                    gpa,
                    len_bytes,
                    user_addr: gpa + USER_ADDR_OFFSET,
                    mmap_offset,
                };
                mmap_offset += len_bytes;
                layout
            })
            .collect();
        // SAFETY: the name is a NUL-terminated literal; the result is checked below.
        let fd = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just returned by the kernel and is owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(mmap_offset)?;
        let mapping = Mapping::new(file.as_fd(), 0, mmap_offset)?;
        Ok(GuestMemory {
            file,
            mapping,
            layouts,
        })
    }

    /// The file behind all regions.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where the regions lie.
    pub fn layouts(&self) -> &[RegionLayout] {
        &self.layouts
    }

    /// The memory as a backend maps it.
    ///
    /// # Errors
    /// [`MemoryError`] for regions that do not fit together.
    pub fn table(&self) -> Result<Arc<MemoryTable>, MemoryError> {
        let regions = self
            .layouts
            .iter()
            .map(|layout| Region::map(*layout, &self.file));
        Ok(Arc::new(MemoryTable::new(
            regions.collect::<Result<_, _>>()?,
        )?))
    }

    /// Copies `data` to guest address `gpa`.
    ///
    /// # Panics
    /// When the bytes are not inside one region.
    pub fn write(&self, gpa: u64, data: &[u8]) {
        // SAFETY: `host` checked that the target is mapped and this long.
        unsafe {
            self.host(gpa, data.len())
                .copy_from_nonoverlapping(NonNull::from(data).cast(), data.len())
        };
    }

    /// Copies `len` bytes from guest address `gpa`.
    ///
    /// # Panics
    /// When the bytes are not inside one region.
    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        // SAFETY: `host` checked that the source is mapped and this long.
        unsafe {
            self.host(gpa, len)
                .copy_to_nonoverlapping(NonNull::from(&mut data[..]).cast(), len)
        };
        data
    }

    fn host(&self, gpa: u64, len: usize) -> NonNull<u8> {
        let layout = self
            .layouts
            .iter()
            .find(|layout| gpa >= layout.gpa && gpa + len as u64 <= layout.gpa + layout.len_bytes)
            .expect("address inside guest memory");
        // SAFETY: the region lies in the file at `mmap_offset`, all of which is mapped.
        unsafe {
            self.mapping
                .as_ptr()
                .add((layout.mmap_offset + gpa - layout.gpa) as usize)
        }
    }

    fn field(&self, gpa: u64) -> &AtomicU16 {
        // SAFETY: two mapped bytes at an even address, which outlive `self`'s borrow.
        unsafe { self.host(gpa, 2).cast().as_ref() }
    }
}

/// A buffer of a request: guest address and length.
pub type Buffer = (u64, u32);

/// The driver's end of one ring.
#[derive(Debug)]
pub struct DriverRing {
    memory: Arc<GuestMemory>,
    base_gpa: u64,
    size: u16,
    event_idx: bool,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    avail_idx: u16,
    kicked_idx: u16,
    last_used: u16,
}

impl DriverRing {
    /// A ring of `size` descriptors at the page-aligned guest address `base_gpa`.
    pub fn new(memory: &Arc<GuestMemory>, base_gpa: u64, size: u16, features: u64) -> DriverRing {
        let ring = DriverRing {
            memory: Arc::clone(memory),
            base_gpa,
            size,
            event_idx: features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            avail_idx: 0,
            kicked_idx: 0,
            last_used: 0,
        };
        memory.write(base_gpa, &vec![0; ring.len_bytes() as usize]);
        ring
    }

    /// Guest memory that the ring occupies.
    pub fn len_bytes(&self) -> u64 {
        self.used_gpa() + u64::from(self.size) * 8 + 6 - self.base_gpa
    }

    /// Where the areas are, in the frontend's addresses.
    pub fn addresses(&self) -> RingAddresses {
        RingAddresses {
            desc: self.base_gpa + USER_ADDR_OFFSET,
            avail: self.avail_gpa() + USER_ADDR_OFFSET,
            used: self.used_gpa() + USER_ADDR_OFFSET,
        }
    }

    /// Makes a request available; returns its head, or None when descriptors are short.
    pub fn add(&mut self, readable: &[Buffer], writable: &[Buffer]) -> Option<u16> {
        let count = readable.len() + writable.len();
        if count == 0 || count > self.free.len() {
            return None;
        }
        let indices = self.free.split_off(self.free.len() - count);
        let buffers = readable.iter().map(|buffer| (buffer, 0));
        let buffers = buffers.chain(writable.iter().map(|buffer| (buffer, VRING_DESC_F_WRITE)));
        for (position, (&(gpa, len), flags)) in buffers.enumerate() {
            let next = indices.get(position + 1).copied();
            let chained = if next.is_some() { VRING_DESC_F_NEXT } else { 0 };
            self.set_desc(
                indices[position],
                gpa,
                len,
                (flags | chained) as u16,
                next.unwrap_or(0),
            );
        }
        Some(self.offer(indices))
    }

    /// Makes a request available through an indirect table at `table_gpa`.
    pub fn add_indirect(
        &mut self,
        table_gpa: u64,
        readable: &[Buffer],
        writable: &[Buffer],
    ) -> Option<u16> {
        let head = self.free.pop()?;
        let count = (readable.len() + writable.len()) as u32;
        let buffers = readable.iter().map(|buffer| (buffer, 0));
        let buffers = buffers.chain(writable.iter().map(|buffer| (buffer, VRING_DESC_F_WRITE)));
        for (position, (&(gpa, len), flags)) in (0u32..).zip(buffers) {
            let chained = if position + 1 < count {
                VRING_DESC_F_NEXT
            } else {
                0
            };
            let entry_gpa = table_gpa + u64::from(position) * 16;
            self.write_desc(
                entry_gpa,
                gpa,
                len,
                (flags | chained) as u16,
                position as u16 + 1,
            );
        }
        self.set_desc(head, table_gpa, count * 16, VRING_DESC_F_INDIRECT as u16, 0);
        Some(self.offer(vec![head]))
    }

    /// Whether the device asked to be kicked for what was added since the last call.
    pub fn needs_kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.kicked_idx, self.avail_idx);
        if old == self.avail_idx {
            return false;
        }
        if !self.event_idx {
            return self.memory.field(self.used_gpa()).load(Ordering::Relaxed) & 1 == 0;
        }
        let avail_event = self.avail_event();
        self.avail_idx.wrapping_sub(avail_event).wrapping_sub(1) < self.avail_idx.wrapping_sub(old)
    }

    /// Takes a completed request: its head and the bytes written.
    pub fn pop_used(&mut self) -> Option<(u16, u32)> {
        if self.used_idx() == self.last_used {
            return None;
        }
        let elem_gpa = self.used_gpa() + 4 + u64::from(self.last_used % self.size) * 8;
        let elem = self.memory.read(elem_gpa, 8);
        let word =
            |at: usize| u32::from_le_bytes([elem[at], elem[at + 1], elem[at + 2], elem[at + 3]]);
        let head = word(0) as u16;
        self.last_used = self.last_used.wrapping_add(1);
        let mut indices = std::mem::take(&mut self.chains[usize::from(head)]);
        self.free.append(&mut indices);
        Some((head, word(4)))
    }

    /// The device is to signal when it completes the request after the last one popped.
    pub fn ask_for_signal(&self) {
        self.set_used_event(self.last_used);
    }

    /// Raw `used_event`.
    pub fn set_used_event(&self, used_event: u16) {
        self.memory
            .field(self.avail_gpa() + 4 + u64::from(self.size) * 2)
            .store(used_event, Ordering::SeqCst);
    }

    /// Raw `avail_event`, as the device wrote it.
    pub fn avail_event(&self) -> u16 {
        self.memory
            .field(self.used_gpa() + 4 + u64::from(self.size) * 8)
            .load(Ordering::SeqCst)
    }

    /// Raw flags of the available ring (bit 0: no interrupt).
    pub fn set_avail_flags(&self, flags: u16) {
        self.memory
            .field(self.avail_gpa())
            .store(flags, Ordering::SeqCst);
    }

    /// Raw flags of the used ring (bit 0: no notification).
    pub fn used_flags(&self) -> u16 {
        self.memory.field(self.used_gpa()).load(Ordering::SeqCst)
    }

    /// `used->idx` as the device published it.
    pub fn used_idx(&self) -> u16 {
        self.memory
            .field(self.used_gpa() + 2)
            .load(Ordering::Acquire)
    }

    /// `avail->idx` as published to the device.
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// Starts the ring's indices at `idx`, as if that many requests had passed.
    pub fn start_at(&mut self, idx: u16) {
        self.last_used = idx;
        self.kicked_idx = idx;
        self.memory
            .field(self.used_gpa() + 2)
            .store(idx, Ordering::SeqCst);
        self.set_avail_idx(idx);
    }

    /// Raw descriptor, sane or not.
    pub fn set_desc(&self, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        self.write_desc(self.base_gpa + u64::from(index) * 16, gpa, len, flags, next);
    }

    /// Raw descriptor at any guest address, sane or not.
    pub fn write_desc(&self, at_gpa: u64, gpa: u64, len: u32, flags: u16, next: u16) {
        let mut desc = [0u8; 16];
        desc[..8].copy_from_slice(&gpa.to_le_bytes());
        desc[8..12].copy_from_slice(&len.to_le_bytes());
        desc[12..14].copy_from_slice(&flags.to_le_bytes());
        desc[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write(at_gpa, &desc);
    }

    /// Puts a head into the available ring, sane or not.
    pub fn push_avail(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.memory
            .field(self.avail_gpa() + 4 + slot * 2)
            .store(head, Ordering::Relaxed);
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    /// Raw `avail->idx`, sane or not.
    pub fn set_avail_idx(&mut self, avail_idx: u16) {
        self.avail_idx = avail_idx;
        self.memory
            .field(self.avail_gpa() + 2)
            .store(avail_idx, Ordering::SeqCst);
    }

    fn offer(&mut self, indices: Vec<u16>) -> u16 {
        let head = indices[0];
        self.chains[usize::from(head)] = indices;
        self.push_avail(head);
        head
    }

    fn avail_gpa(&self) -> u64 {
        self.base_gpa + u64::from(self.size) * 16
    }

    fn used_gpa(&self) -> u64 {
        (self.avail_gpa() + u64::from(self.size) * 2 + 6).next_multiple_of(4)
    }
}
