//! Submitting several requests at once.
//!
//! A driver that gets a handful of requests back offers as many new ones, one after the other,
//! and a queue that looks for work sees the first while the second is being made. Each submission
//! costs a system call and a doorbell of the storage, which in a virtual machine is an exit. So
//! while the storage is busy anyway, the queue waits for as long as a driver takes for one more.

use std::time::{Duration, Instant};

use vhost_user::ring::{Ring, RingError};

/// Requests under way from which on a submission can wait.
pub(super) const MIN_UNANSWERED: usize = 6;
/// What a driver takes for the next request when it has one.
const PATIENCE: Duration = Duration::from_nanos(1500);

/// Waits for the driver's next request; false when there is none soon.
pub(super) fn await_more(ring: &mut Ring) -> Result<bool, RingError> {
    let started = Instant::now();
    loop {
        if ring.has_new()? {
            return Ok(true);
        }
        if started.elapsed() >= PATIENCE {
            return Ok(false);
        }
        std::hint::spin_loop();
    }
}
