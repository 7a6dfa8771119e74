//! Which bytes of a read have come: each must, exactly once.

use super::replies::Breach;

/// Pieces out of order; each is an entry to search.
const MAX_RANGES: usize = 8192;

/// Which bytes of a read have come.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    /// Sorted, neither touching nor overlapping.
    ranges: Vec<(usize, usize)>,
}

impl Coverage {
    pub(super) fn add(&mut self, at_bytes: usize, len_bytes: usize) -> Result<(), Breach> {
        let end = at_bytes + len_bytes;
        let index = self.ranges.partition_point(|range| range.0 < at_bytes);
        let overlaps_before = index > 0 && self.ranges[index - 1].1 > at_bytes;
        let overlaps_after = self.ranges.get(index).is_some_and(|range| range.0 < end);
        if overlaps_before || overlaps_after {
            return Err(Breach("the same bytes of a read twice"));
        }
        // Chunks come in order from every server that is known: one range, growing.
        if index > 0 && self.ranges[index - 1].1 == at_bytes {
            self.ranges[index - 1].1 = end;
        } else {
            self.ranges.insert(index, (at_bytes, end));
        }
        if self.ranges.len() > MAX_RANGES {
            return Err(Breach("a read answered in too many pieces"));
        }
        Ok(())
    }

    pub(super) fn is_whole(&self, len_bytes: usize) -> bool {
        let mut end = 0;
        for range in &self.ranges {
            if range.0 != end {
                return false;
            }
            end = range.1;
        }
        end == len_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_count_when_every_byte_came_once() {
        let mut whole = Coverage::default();
        for (at, len) in [(512, 512), (0, 512), (1024, 1024)] {
            assert!(!whole.is_whole(2048));
            assert!(whole.add(at, len).is_ok());
        }
        assert!(whole.is_whole(2048));
        for (at, len) in [(0, 1), (2047, 1), (511, 2), (0, 4096)] {
            assert!(whole.add(at, len).is_err(), "{at}+{len}");
        }
    }
}
