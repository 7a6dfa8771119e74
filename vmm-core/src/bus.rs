//! Port I/O and MMIO dispatch: which device answers which address.

use std::sync::Arc;

/// A device that answers reads and writes of the guest in a range of addresses.
///
/// Called on the vCPU threads, several at once; must not wait for any other process.
pub trait BusDevice: Send + Sync {
    /// Fills `data` (1, 2, 4 or 8 bytes) from `offset` within the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data` at `offset` within the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Ranges of one address space, sorted, not overlapping. Fixed once the machine is built.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

struct Range {
    base: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// Two devices claimed the same addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("addresses {base:#x}+{len:#x} are empty, wrap around or belong to another device already")]
pub struct Overlap {
    base: u64,
    len: u64,
}

impl Bus {
    /// Gives `[base, base + len)` to `device`.
    ///
    /// # Errors
    /// The range is empty, wraps around or overlaps another one.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), Overlap> {
        let overlap = Overlap { base, len };
        let end = base
            .checked_add(len)
            .filter(|end| *end > base)
            .ok_or(overlap)?;
        let at = self.ranges.partition_point(|range| range.base < base);
        let after_previous = at == 0 || self.ranges[at - 1].end() <= base;
        let before_next = self.ranges.get(at).is_none_or(|next| end <= next.base);
        if !after_previous || !before_next {
            return Err(overlap);
        }
        self.ranges.insert(at, Range { base, len, device });
        Ok(())
    }

    /// Reads for the guest; addresses of no device read as all ones, as on a PC.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        match self.find(addr, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes for the guest; writes to addresses of no device are dropped, as on a PC.
    pub fn write(&self, addr: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(addr, data.len()) {
            device.write(offset, data);
        }
    }

    /// The device that owns all of `[addr, addr + len)`, and the offset in its range.
    fn find(&self, addr: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let at = self
            .ranges
            .partition_point(|range| range.base <= addr)
            .checked_sub(1)?;
        let range = &self.ranges[at];
        let offset = addr - range.base;
        let fits = offset < range.len && len as u64 <= range.len - offset;
        fits.then(|| (range.device.as_ref(), offset))
    }
}

impl Range {
    fn end(&self) -> u64 {
        self.base + self.len
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn access_reaches_the_owner_with_its_offset() {
        let (low, high) = (Arc::new(Recorder::default()), Arc::new(Recorder::default()));
        let mut bus = Bus::default();
        bus.insert(0x2000, 0x10, high.clone()).unwrap();
        bus.insert(0x1000, 0x10, low.clone()).unwrap();
        bus.write(0x1004, &[7]);
        let mut data = [0; 2];
        bus.read(0x200e, &mut data);
        assert_eq!(*low.0.lock().unwrap(), [(4, vec![7])]);
        assert!(high.0.lock().unwrap().is_empty());
        assert_eq!(data, [0xe, 0xe]);
    }

    #[test]
    fn access_outside_or_across_an_end_reads_ones_and_writes_nothing() {
        let device = Arc::new(Recorder::default());
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x10, device.clone()).unwrap();
        for addr in [0, 0xfff, 0x100d, 0x1010, u64::MAX - 3] {
            let mut data = [0; 4];
            bus.read(addr, &mut data);
            bus.write(addr, &data);
            assert_eq!(data, [0xff; 4], "{addr:#x}");
        }
        assert!(device.0.lock().unwrap().is_empty());
    }

    #[test]
    fn overlapping_ranges_are_refused() {
        let device = Arc::new(Recorder::default());
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x10, device.clone()).unwrap();
        for (base, len) in [
            (0xfff, 2),
            (0x1000, 0x10),
            (0x100f, 1),
            (0x800, 0x1000),
            (0x3000, 0),
            (u64::MAX, 2),
        ] {
            assert!(
                bus.insert(base, len, device.clone()).is_err(),
                "{base:#x}+{len:#x}"
            );
        }
        bus.insert(0x1010, 1, device.clone()).unwrap();
        bus.insert(0xfff, 1, device).unwrap();
    }
}
