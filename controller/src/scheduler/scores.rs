//! Which of the hosts that can have a VM is the best: the one with the most room, near what is liked and
//! away from what is not.

use super::{Candidate, Request, Zones, filters};

/// A host that says it cannot run VMs is the last resort.
const PROBLEM: f64 = 1000.0;
/// Of each wish about other VMs.
const WISH: f64 = 100.0;
/// Of a device daemon that others share: its death would touch this one, too.
const SHARED: f64 = 5.0;

/// Higher is better.
pub(super) fn of(request: &Request, host: &Candidate, zones: &Zones) -> f64 {
    let mut score = room(request, host);
    let seen = host.record.inventory.as_ref();
    if seen.is_none_or(|seen| !seen.problem.is_empty()) {
        score -= PROBLEM;
    }
    for term in request
        .placement
        .affinity
        .iter()
        .filter(|term| term.preferred)
    {
        let there = filters::matching(request, term, host, zones) > 0;
        score += match there == term.anti {
            true => -WISH,
            false => WISH,
        };
    }
    for daemon in request.demand.daemons.keys() {
        let others = host.reserved.daemons.get(daemon).copied().unwrap_or(0);
        score -= SHARED * (others as f64).min(10.0);
    }
    score
}

/// What would be left of the host, of CPUs or of memory, whichever is less, in per cent.
fn room(request: &Request, host: &Candidate) -> f64 {
    let seen = host.record.inventory.as_ref();
    let spec = &host.record.spec;
    let ratio = |ratio: f64| if ratio > 0.0 { ratio } else { 1.0 };
    let cpus = seen.map_or(0.0, |seen| f64::from(seen.cpus)) * ratio(spec.cpu_overcommit);
    let bytes = seen.map_or(0.0, |seen| seen.memory_bytes as f64) * ratio(spec.memory_overcommit);
    let share = |has: f64, promised: u64, wanted: u64| match has > 0.0 {
        true => 100.0 - 100.0 * (promised as f64 + wanted as f64) / has,
        // Who has not said what it has is judged by what it was given.
        false => -(promised as f64),
    };
    let vcpus = share(cpus, host.reserved.vcpus, request.demand.vcpus);
    let memory = share(
        bytes,
        host.reserved.memory_bytes,
        request.demand.memory_bytes,
    );
    vcpus.min(memory)
}
