//! The driver's end of a packed ring (Virtio 1.2 section 2.8).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};

use super::{Buffer, GuestMemory, USER_ADDR_OFFSET};
use crate::ring::RingAddresses;

const F_AVAIL: u16 = 1 << 7;
const F_USED: u16 = 1 << 15;
const DESC_BYTES: u64 = 16;
/// Position and flags.
const EVENT_BYTES: u64 = 4;
const WRAP: u16 = 1 << 15;

/// The driver's end of one ring.
#[derive(Debug)]
pub struct PackedDriverRing {
    memory: Arc<GuestMemory>,
    base_gpa: u64,
    size: u16,
    event_idx: bool,
    /// Buffer ids that are not in use.
    free_ids: Vec<u16>,
    /// Descriptors of each id's chain.
    counts: Vec<u16>,
    free_descs: u16,
    next_avail: (u16, bool),
    next_used: (u16, bool),
    /// Descriptors made available since the last kick.
    unkicked: u16,
}

impl PackedDriverRing {
    /// A ring of `size` descriptors at the page-aligned guest address `base_gpa`.
    pub fn new(
        memory: &Arc<GuestMemory>,
        base_gpa: u64,
        size: u16,
        features: u64,
    ) -> PackedDriverRing {
        let ring = PackedDriverRing {
            memory: Arc::clone(memory),
            base_gpa,
            size,
            event_idx: features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0,
            free_ids: (0..size).rev().collect(),
            counts: vec![0; usize::from(size)],
            free_descs: size,
            next_avail: (0, true),
            next_used: (0, true),
            unkicked: 0,
        };
        memory.write(base_gpa, &vec![0; ring.len_bytes() as usize]);
        ring
    }

    /// Guest memory that the ring occupies.
    pub fn len_bytes(&self) -> u64 {
        self.device_event_gpa() + EVENT_BYTES - self.base_gpa
    }

    /// Where the areas are, in the frontend's addresses.
    pub fn addresses(&self) -> RingAddresses {
        RingAddresses {
            desc: self.base_gpa + USER_ADDR_OFFSET,
            avail: self.driver_event_gpa() + USER_ADDR_OFFSET,
            used: self.device_event_gpa() + USER_ADDR_OFFSET,
        }
    }

    /// Makes a request available; returns its buffer id, or None when descriptors are short.
    pub fn add(&mut self, readable: &[Buffer], writable: &[Buffer]) -> Option<u16> {
        let readable = readable.iter().map(|buffer| (*buffer, 0));
        let writable = writable.iter().map(|buffer| (*buffer, VRING_DESC_F_WRITE));
        let buffers: Vec<_> = readable.chain(writable).collect();
        let last = buffers.len().checked_sub(1)?;
        let descs: Vec<_> = (0..)
            .zip(buffers)
            .map(|(position, ((gpa, len), flags))| {
                let chained = if position < last {
                    VRING_DESC_F_NEXT
                } else {
                    0
                };
                (gpa, len, (flags | chained) as u16)
            })
            .collect();
        self.offer(&descs)
    }

    /// Makes a request available through an indirect table at `table_gpa`.
    pub fn add_indirect(
        &mut self,
        table_gpa: u64,
        readable: &[Buffer],
        writable: &[Buffer],
    ) -> Option<u16> {
        let readable = readable.iter().map(|buffer| (buffer, 0));
        let writable = writable.iter().map(|buffer| (buffer, VRING_DESC_F_WRITE));
        let mut count = 0;
        for (&(gpa, len), flags) in readable.chain(writable) {
            let at = table_gpa + u64::from(count) * DESC_BYTES;
            self.memory.write(at, &desc(gpa, len, 0, flags as u16));
            count += 1;
        }
        let table_bytes = count * DESC_BYTES as u32;
        self.offer(&[(table_gpa, table_bytes, VRING_DESC_F_INDIRECT as u16)])
    }

    /// Makes descriptors (address, length, flags) available as one chain, sane or not.
    pub fn offer(&mut self, descs: &[(u64, u32, u16)]) -> Option<u16> {
        let count = descs.len() as u16;
        if count == 0 || count > self.free_descs {
            return None;
        }
        let id = self.free_ids.pop()?;
        self.counts[usize::from(id)] = count;
        self.free_descs -= count;
        self.write_chain(id, descs);
        Some(id)
    }

    /// Writes a chain into the ring, whether or not there is room.
    pub fn write_chain(&mut self, id: u16, descs: &[(u64, u32, u16)]) {
        let (head, _) = self.next_avail;
        let mut head_flags = 0;
        for (position, &(gpa, len, flags)) in descs.iter().enumerate() {
            let (index, wrap) = self.next_avail;
            let available = if wrap { F_AVAIL } else { F_USED };
            let (at, flags) = (self.desc_gpa(index), flags | available);
            // The flags come last, and those of the head after all others.
            self.memory.write(at, &desc(gpa, len, id, flags)[..14]);
            if position == 0 {
                head_flags = flags;
            } else {
                self.memory.field(at + 14).store(flags, Ordering::Release);
            }
            self.next_avail = self.after(self.next_avail, 1);
        }
        let flags = self.memory.field(self.desc_gpa(head) + 14);
        flags.store(head_flags, Ordering::Release);
        self.unkicked += descs.len() as u16;
    }

    /// Whether the device asked to be kicked for what was added since the last call.
    pub fn needs_kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let added = std::mem::take(&mut self.unkicked);
        if added == 0 {
            return false;
        }
        let (event, flags) = self.device_event();
        match flags {
            0 => true,
            1 => false,
            _ => self.distance(self.next_avail, event) <= u32::from(added),
        }
    }

    /// Takes a completed request: its buffer id and the bytes written.
    pub fn pop_used(&mut self) -> Option<(u16, u32)> {
        let (index, wrap) = self.next_used;
        let at = self.desc_gpa(index);
        let flags = self.memory.field(at + 14).load(Ordering::Acquire);
        if (flags & F_AVAIL != 0) != wrap || (flags & F_USED != 0) != wrap {
            return None;
        }
        let used = self.memory.read(at, 16);
        let len = u32::from_le_bytes([used[8], used[9], used[10], used[11]]);
        let id = u16::from_le_bytes([used[12], used[13]]);
        let count = self.counts[usize::from(id)];
        self.next_used = self.after(self.next_used, count);
        self.free_descs += count;
        self.free_ids.push(id);
        Some((id, len))
    }

    /// The device is to signal when it completes the request after the last one popped.
    pub fn ask_for_signal(&self) {
        match self.event_idx {
            true => self.set_driver_event(self.raw_next_used(), 2),
            false => self.set_driver_event(0, 0),
        }
    }

    /// Raw driver event suppression: position with wrap counter, and flags.
    pub fn set_driver_event(&self, position: u16, flags: u16) {
        let gpa = self.driver_event_gpa();
        self.memory.field(gpa).store(position, Ordering::SeqCst);
        self.memory.field(gpa + 2).store(flags, Ordering::SeqCst);
    }

    /// Where the next used descriptor is expected, with its wrap counter in the highest bit.
    pub fn raw_next_used(&self) -> u16 {
        raw(self.next_used)
    }

    /// Where the next descriptor goes, with its wrap counter in the highest bit.
    pub fn raw_next_avail(&self) -> u16 {
        raw(self.next_avail)
    }

    /// Raw device event suppression, as the device wrote it.
    pub fn raw_device_event(&self) -> (u16, u16) {
        let gpa = self.device_event_gpa();
        let field = |gpa| self.memory.field(gpa).load(Ordering::SeqCst);
        (field(gpa), field(gpa + 2))
    }

    /// Starts the ring at a position, as if requests had passed.
    pub fn start_at(&mut self, index: u16, wrap: bool) {
        self.next_avail = (index, wrap);
        self.next_used = (index, wrap);
        // What the driver has yet to write looks used in the laps before.
        for at in 0..self.size {
            let lap = if at < index { wrap } else { !wrap };
            let flags = if lap { F_AVAIL | F_USED } else { 0 };
            let gpa = self.desc_gpa(at) + 14;
            self.memory.field(gpa).store(flags, Ordering::SeqCst);
        }
    }

    fn device_event(&self) -> ((u16, bool), u16) {
        let (position, flags) = self.raw_device_event();
        ((position & !WRAP, position & WRAP != 0), flags)
    }

    /// Descriptors from `earlier` to `later`, modulo two laps, of which 0 counts as both.
    fn distance(&self, later: (u16, bool), earlier: (u16, bool)) -> u32 {
        let laps = 2 * u32::from(self.size);
        let linear = |(index, wrap)| u32::from(index) + if wrap { 0 } else { laps / 2 };
        match (linear(later) + laps - linear(earlier)) % laps {
            0 => laps,
            distance => distance,
        }
    }

    fn after(&self, (index, wrap): (u16, bool), count: u16) -> (u16, bool) {
        let index = u32::from(index) + u32::from(count);
        match index.checked_sub(u32::from(self.size)) {
            Some(index) => (index as u16, !wrap),
            None => (index as u16, wrap),
        }
    }

    fn desc_gpa(&self, index: u16) -> u64 {
        self.base_gpa + u64::from(index) * DESC_BYTES
    }

    fn driver_event_gpa(&self) -> u64 {
        self.desc_gpa(self.size)
    }

    fn device_event_gpa(&self) -> u64 {
        self.driver_event_gpa() + EVENT_BYTES
    }
}

fn raw((index, wrap): (u16, bool)) -> u16 {
    index | if wrap { WRAP } else { 0 }
}

fn desc(gpa: u64, len: u32, id: u16, flags: u16) -> [u8; DESC_BYTES as usize] {
    let mut desc = [0; DESC_BYTES as usize];
    desc[..8].copy_from_slice(&gpa.to_le_bytes());
    desc[8..12].copy_from_slice(&len.to_le_bytes());
    desc[12..14].copy_from_slice(&id.to_le_bytes());
    desc[14..].copy_from_slice(&flags.to_le_bytes());
    desc
}
