//! Taps that outlive the processes that use them: while none does, frames wait in the kernel's queue,
//! and the interface keeps its carrier, so that neither the host nor a bridge forgets its neighbours.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use super::{TapError, interface_request, open};

/// The queues of a machine's taps by name, each open since it was asked for first.
#[derive(Clone, Debug, Default)]
pub(crate) struct KeptTaps(Arc<Mutex<BTreeMap<String, Vec<OwnedFd>>>>);

impl KeptTaps {
    /// As [`open`], but the same queues each time, all of them attached to the interface, as long as that
    /// is there. Waits for no other process, unless none was opened yet.
    ///
    /// # Errors
    /// As [`open`], or when no descriptors are left.
    pub(crate) fn open(&self, name: &str, queue_pairs: u32) -> Result<Vec<OwnedFd>, TapError> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let queues = kept
            .remove(name)
            .filter(|queues| queues.len() == queue_pairs as usize && queues.iter().all(is_usable));
        let queues = match queues {
            Some(queues) => queues,
            None => open(name, queue_pairs)?,
        };
        let copies: io::Result<_> = queues.iter().map(OwnedFd::try_clone).collect();
        kept.insert(name.to_owned(), queues);
        copies.map_err(|source| TapError::Driver {
            name: name.to_owned(),
            source,
        })
    }
}

/// Attaches a queue that its last user had taken out; false when its interface was deleted.
fn is_usable(queue: &OwnedFd) -> bool {
    let mut request = interface_request("", 0);
    let mut is_attached = || {
        // SAFETY: TUNGETIFF writes an ifreq, which lives across the call.
        unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNGETIFF, &raw mut request) == 0 }
    };
    if is_attached() {
        return true;
    }
    let attach = interface_request("", libc::IFF_ATTACH_QUEUE);
    // SAFETY: TUNSETQUEUE reads an ifreq, which lives across the call.
    unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETQUEUE, &raw const attach) };
    is_attached()
}
