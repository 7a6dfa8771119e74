//! The memory that running VMs were promised. A guest touches its memory little by little, so what
//! is available now says nothing about what the VMs that run already will still take.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Bytes of guest RAM by VM.
#[derive(Debug, Default)]
pub(crate) struct Promised {
    by_vm: Mutex<BTreeMap<String, u64>>,
}

impl Promised {
    /// Promises `bytes` to `vm`, instead of what it had, if the host's `total_bytes` suffice.
    ///
    /// # Errors
    /// What the other VMs have.
    pub(crate) fn promise(&self, vm: &str, bytes: u64, total_bytes: u64) -> Result<(), u64> {
        let mut by_vm = self.lock();
        let others_bytes: u64 = by_vm
            .iter()
            .filter(|(id, _)| *id != vm)
            .map(|(_, bytes)| bytes)
            .sum();
        if others_bytes.saturating_add(bytes) > total_bytes {
            return Err(others_bytes);
        }
        by_vm.insert(vm.to_owned(), bytes);
        Ok(())
    }

    /// Notes what a VM that runs already has.
    pub(crate) fn note(&self, vm: &str, bytes: u64) {
        self.lock().insert(vm.to_owned(), bytes);
    }

    /// The VM runs no more.
    pub(crate) fn release(&self, vm: &str) {
        self.lock().remove(vm);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        self.by_vm.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sum_of_all_promises_stays_within_the_host() {
        let promised = Promised::default();
        promised.note("adopted", 30);
        promised.promise("a", 50, 100).unwrap();
        assert_eq!(promised.promise("b", 21, 100), Err(80));
        promised.promise("b", 20, 100).unwrap();
        // A VM that starts again gives up what it had.
        promised.promise("a", 40, 100).unwrap();
        assert_eq!(promised.promise("a", 51, 100), Err(50));
        promised.release("adopted");
        promised.promise("a", 80, 100).unwrap();
        assert_eq!(promised.promise("c", u64::MAX, 100), Err(100));
    }
}
