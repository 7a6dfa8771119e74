//! Guest clusters that one thread changes and nobody else may meanwhile.

use std::ops::Range;
use std::sync::{Condvar, Mutex, PoisonError};

/// Ranges that are taken: as many as there are threads at work.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    taken: Mutex<Vec<Range<u64>>>,
    given_back: Condvar,
}

/// Gives the range back when dropped.
#[derive(Debug)]
pub(crate) struct Taken<'a> {
    ranges: &'a Ranges,
    range: Range<u64>,
}

impl Ranges {
    /// Waits until nobody has any of `range`. Holders of a range take no other.
    pub(crate) fn take(&self, range: Range<u64>) -> Taken<'_> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        while taken
            .iter()
            .any(|other| other.start < range.end && range.start < other.end)
        {
            taken = self
                .given_back
                .wait(taken)
                .unwrap_or_else(PoisonError::into_inner);
        }
        taken.push(range.clone());
        Taken {
            ranges: self,
            range,
        }
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut taken = self
            .ranges
            .taken
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = taken.iter().position(|range| *range == self.range) {
            taken.swap_remove(at);
        }
        drop(taken);
        self.ranges.given_back.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn overlapping_range_is_waited_for_and_others_are_not() {
        let ranges = Ranges::default();
        let first = ranges.take(0..10);
        drop(ranges.take(10..20));
        let (sender, receiver) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _second = ranges.take(9..11);
                sender.send(()).unwrap();
            });
            assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
            drop(first);
            receiver.recv_timeout(Duration::from_secs(20)).unwrap();
        });
    }
}
