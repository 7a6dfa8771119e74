//! Requests that the rate limit does not let begin yet: held in their order, until the alarm rings.

use vhost_user::ring::Ring;

use super::BlkQueue;
use super::alarm::monotonic_ns;
use super::job::Job;
use crate::image::Access;

impl BlkQueue {
    /// Whether the request may begin now: the rate limit allows it, and none is held before it.
    pub(super) fn admit(&mut self, job: &Job) -> bool {
        let Some((access, len_bytes)) = job.cost() else {
            return true;
        };
        self.held[access as usize].is_empty() && self.is_in_limit(access, len_bytes)
    }

    fn is_in_limit(&mut self, access: Access, len_bytes: u64) -> bool {
        let admission = &self.backend.options.admission;
        admission
            .admit(self.stats.queue(), access, len_bytes, self.now_ns)
            .inspect_err(|&again_ns| self.held_until_ns[access as usize] = again_ns)
            .is_ok()
    }

    /// Begins what was held and may go on now; true when there was something.
    #[cold]
    pub(super) fn admit_held(&mut self, ring: &mut Ring, limited: bool) -> bool {
        let mut progress = false;
        self.now_ns = monotonic_ns();
        for access in [Access::Read, Access::Write] {
            while let Some(job) = self.held[access as usize].front() {
                let len_bytes = job.cost().map_or(0, |(_, len_bytes)| len_bytes);
                if limited && !self.is_in_limit(access, len_bytes) {
                    break;
                }
                let job = self.held[access as usize].pop_front().expect("the front");
                self.begin(ring, job);
                progress = true;
            }
        }
        progress
    }

    /// Makes the thread come back when the next held request may begin.
    #[cold]
    pub(super) fn set_alarm(&mut self) {
        let held = self.held.iter().zip(self.held_until_ns);
        let next = held
            .filter(|(jobs, _)| !jobs.is_empty())
            .map(|(_, at_ns)| at_ns);
        if let Some(at_ns) = next.chain(self.misbehaviour.next_ns()).min() {
            self.alarm.set(at_ns);
        }
    }
}
