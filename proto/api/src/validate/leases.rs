//! Requests about leases.

use std::collections::BTreeSet;

use super::*;

/// More devices than a daemon serves.
const MAX_LEASED_DEVICES: usize = 256;
/// Nobody waits longer for a host.
const MAX_TERM_MS: u32 = 24 * 60 * 60 * 1000;
/// A session's name is a UUID.
const MAX_SESSION_BYTES: usize = 64;

/// Checks until when which devices may do I/O.
///
/// # Errors
/// INVALID_ARGUMENT with the path of each field that cannot be accepted.
pub fn allow_io_request(request: &device::AllowIoRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    found.require(request.ids.len() <= MAX_LEASED_DEVICES, "ids", || {
        format!("at most {MAX_LEASED_DEVICES}")
    });
    for (index, id) in request.ids.iter().enumerate() {
        super::id(&mut found, &format!("ids[{index}]"), id);
    }
    let distinct: BTreeSet<&String> = request.ids.iter().collect();
    found.require(distinct.len() == request.ids.len(), "ids", || {
        "name each device once".to_owned()
    });
    found.into_result()
}

/// Checks a renewal of a host's lease.
///
/// # Errors
/// INVALID_ARGUMENT with the path of each field that cannot be accepted.
pub fn renew_lease_request(request: &node::RenewLeaseRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    found.require(
        request.session.len() <= MAX_SESSION_BYTES,
        "session",
        || format!("at most {MAX_SESSION_BYTES} bytes"),
    );
    if request.session.is_empty() {
        return found.into_result();
    }
    for (field, term_ms) in [
        ("lease_ms", request.lease_ms),
        ("grace_ms", request.grace_ms),
        ("settle_ms", request.settle_ms),
    ] {
        found.require((1..=MAX_TERM_MS).contains(&term_ms), field, || {
            format!("must be 1 to {MAX_TERM_MS}, not {term_ms}")
        });
    }
    found.into_result()
}
