//! Which port an address was last seen at.
//!
//! Every frame is looked up by the thread that forwards it, without a lock; learning something new
//! takes one. The table has a fixed size: entries that were not seen for a while are taken over
//! first, and no port holds more than its share, so that a guest that makes addresses up only
//! forgets its own. An address that a port was [given](MacTable::pin) stays there.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, PoisonError};

/// Number of a port in its switch.
pub(super) type PortNumber = u16;

/// An entry that was not seen for so long is none (IEEE 802.1Q's default).
pub(super) const AGING_SECONDS: u32 = 300;

/// A bucket is one cache line of keys and values.
const WAYS: usize = 4;

/// Room for 8192 addresses: some eight for each of as many NICs as a host has memory for.
const NUM_BUCKETS: usize = 2048;

const OCCUPIED: u64 = 1 << 63;
const PINNED: u64 = 1 << 63;

/// See the module's description.
#[derive(Debug)]
pub(super) struct MacTable {
    buckets: Box<[Bucket]>,
    /// Whoever changes something; how many entries each port has.
    writer: Mutex<Vec<usize>>,
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Bucket {
    /// Address, VLAN and [`OCCUPIED`]; zero for none.
    keys: [AtomicU64; WAYS],
    /// When last seen in the lower half, then the port, and [`PINNED`].
    values: [AtomicU64; WAYS],
}

/// An address in a VLAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key(u64);

impl Key {
    #[inline]
    pub(super) fn new(mac: [u8; 6], vlan: u16) -> Self {
        let [a, b, c, d, e, f] = mac;
        let address = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
        Self(OCCUPIED | u64::from(vlan & 0xfff) << 48 | address)
    }

    /// Either of its two buckets.
    #[inline]
    fn buckets(self) -> [usize; 2] {
        let mixed = self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = mixed ^ mixed >> 29;
        let mixed = mixed.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        [(mixed >> 52) as usize, (mixed >> 32) as usize].map(|hash| hash % NUM_BUCKETS)
    }
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Value {
    port: PortNumber,
    seen_s: u32,
    is_pinned: bool,
}

impl Value {
    fn of(raw: u64) -> Self {
        Self {
            port: (raw >> 32) as u16,
            seen_s: raw as u32,
            is_pinned: raw & PINNED != 0,
        }
    }

    fn raw(self) -> u64 {
        let pinned = if self.is_pinned { PINNED } else { 0 };
        pinned | u64::from(self.port) << 32 | u64::from(self.seen_s)
    }

    fn is_aged(self, now_s: u32) -> bool {
        !self.is_pinned && now_s.saturating_sub(self.seen_s) > AGING_SECONDS
    }
}

/// Why an address could not be given to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PinError {
    #[error("another port has it")]
    Taken,
    #[error("the address table is full")]
    Full,
}

impl MacTable {
    pub(super) fn new() -> Self {
        Self {
            buckets: (0..NUM_BUCKETS).map(|_| Bucket::default()).collect(),
            writer: Mutex::default(),
        }
    }

    /// The port that `key` is at.
    #[inline]
    pub(super) fn port_of(&self, key: Key, now_s: u32) -> Option<PortNumber> {
        let (_, value) = self.find(key)?;
        (!value.is_aged(now_s)).then_some(value.port)
    }

    /// A frame from `key` came in by `port`, of which `share` addresses may be known. False when the
    /// address belongs to another one.
    #[inline]
    pub(super) fn learn(&self, key: Key, port: PortNumber, now_s: u32, share: usize) -> bool {
        match self.find(key) {
            Some((_, value))
                if value.port == port && (value.is_pinned || value.seen_s == now_s) =>
            {
                true
            }
            Some((_, value)) if value.is_pinned && value.port != port => false,
            _ => {
                self.note(key, port, now_s, share);
                true
            }
        }
    }

    /// `key` is at `port` until the port goes.
    pub(super) fn pin(&self, key: Key, port: PortNumber) -> Result<(), PinError> {
        let mut counts = self.lock();
        let value = Value {
            port,
            seen_s: 0,
            is_pinned: true,
        };
        if let Some((slot, known)) = self.find(key) {
            if known.is_pinned && known.port != port {
                return Err(PinError::Taken);
            }
            self.remove(slot, &mut counts);
        }
        let slot = self.slots(key).min_by_key(|&slot| self.worth(slot));
        let slot = slot.filter(|&slot| !self.value(slot).is_some_and(|value| value.is_pinned));
        let slot = slot.ok_or(PinError::Full)?;
        self.remove(slot, &mut counts);
        self.put(slot, key, value, &mut counts);
        Ok(())
    }

    /// Forgets all that is known of `port`.
    pub(super) fn forget(&self, port: PortNumber) {
        let mut counts = self.lock();
        self.remove_all(&mut counts, |value| value.port == port);
    }

    /// Writes down where `key` was seen.
    #[cold]
    fn note(&self, key: Key, port: PortNumber, now_s: u32, share: usize) {
        let mut counts = self.lock();
        let value = Value {
            port,
            seen_s: now_s,
            is_pinned: false,
        };
        if let Some((slot, known)) = self.find(key) {
            if !known.is_pinned {
                self.remove(slot, &mut counts);
                self.put(slot, key, value, &mut counts);
            }
            return;
        }
        if counts
            .get(usize::from(port))
            .is_some_and(|&count| count >= share)
        {
            self.remove_all(&mut counts, |value| {
                value.port == port && value.is_aged(now_s)
            });
            if counts[usize::from(port)] >= share {
                return;
            }
        }
        let slot = self.slots(key).min_by_key(|&slot| self.worth(slot));
        let replaceable = slot.filter(|&slot| match self.value(slot) {
            None => true,
            // Others' addresses are only taken over once they are old.
            Some(held) => held.is_aged(now_s) || (held.port == port && !held.is_pinned),
        });
        if let Some(slot) = replaceable {
            self.remove(slot, &mut counts);
            self.put(slot, key, value, &mut counts);
        }
    }

    fn remove_all(&self, counts: &mut [usize], mut is_meant: impl FnMut(Value) -> bool) {
        for bucket in 0..NUM_BUCKETS {
            for way in 0..WAYS {
                if self.value((bucket, way)).is_some_and(&mut is_meant) {
                    self.remove((bucket, way), counts);
                }
            }
        }
    }

    /// Where `key` is, and what is said of it.
    #[inline]
    fn find(&self, key: Key) -> Option<((usize, usize), Value)> {
        for index in key.buckets() {
            let bucket = &self.buckets[index];
            for way in 0..WAYS {
                if bucket.keys[way].load(Ordering::Acquire) != key.0 {
                    continue;
                }
                let value = bucket.values[way].load(Ordering::Acquire);
                fence(Ordering::Acquire);
                // Else the place was given to another address in between.
                if bucket.keys[way].load(Ordering::Relaxed) == key.0 {
                    return Some(((index, way), Value::of(value)));
                }
            }
        }
        None
    }

    fn slots(&self, key: Key) -> impl Iterator<Item = (usize, usize)> {
        key.buckets()
            .into_iter()
            .flat_map(|bucket| (0..WAYS).map(move |way| (bucket, way)))
    }

    /// What would be lost by taking over `slot`, to compare.
    fn worth(&self, slot: (usize, usize)) -> u64 {
        match self.value(slot) {
            None => 0,
            Some(value) if value.is_pinned => u64::MAX,
            Some(value) => 1 + u64::from(value.seen_s),
        }
    }

    fn value(&self, (bucket, way): (usize, usize)) -> Option<Value> {
        let bucket = &self.buckets[bucket];
        let is_occupied = bucket.keys[way].load(Ordering::Relaxed) != 0;
        is_occupied.then(|| Value::of(bucket.values[way].load(Ordering::Relaxed)))
    }

    fn put(&self, (bucket, way): (usize, usize), key: Key, value: Value, counts: &mut Vec<usize>) {
        let bucket = &self.buckets[bucket];
        bucket.values[way].store(value.raw(), Ordering::Release);
        bucket.keys[way].store(key.0, Ordering::Release);
        let port = usize::from(value.port);
        if counts.len() <= port {
            counts.resize(port + 1, 0);
        }
        counts[port] += usize::from(!value.is_pinned);
    }

    fn remove(&self, slot: (usize, usize), counts: &mut [usize]) {
        let Some(value) = self.value(slot) else {
            return;
        };
        self.buckets[slot.0].keys[slot.1].store(0, Ordering::Release);
        fence(Ordering::Release);
        if let Some(count) = counts.get_mut(usize::from(value.port)) {
            *count -= usize::from(!value.is_pinned);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<usize>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
