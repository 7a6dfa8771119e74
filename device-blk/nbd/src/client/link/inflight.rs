//! A request under way, and the cookie that its reply is known by.

use super::coverage::Coverage;
use super::replies::Breach;
use crate::client::request::{Command, Request};

/// Requests under way on one connection.
pub(super) const MAX_INFLIGHT: usize = 128;

pub(super) struct Inflight {
    pub(super) request: Box<dyn Request>,
    pub(super) command: Command,
    pub(super) sequence: u64,
    pub(super) received: Coverage,
    pub(super) error: Option<u32>,
    /// Of [`crate::client::ledger::Ledger`], for a flush.
    pub(super) mark: u64,
}

impl Inflight {
    /// Where in the request's range a chunk lies.
    pub(super) fn place(&self, offset_bytes: u64, len_bytes: u32) -> Result<usize, Breach> {
        let Command::Read {
            offset_bytes: start,
            len_bytes: whole,
        } = self.command
        else {
            return Err(Breach("data for a request that reads nothing"));
        };
        let at_bytes = offset_bytes.checked_sub(start);
        match at_bytes {
            Some(at)
                if len_bytes > 0
                    && at
                        .checked_add(u64::from(len_bytes))
                        .is_some_and(|end| end <= u64::from(whole)) =>
            {
                Ok(at as usize)
            }
            _ => Err(Breach("data beyond what was asked for")),
        }
    }
}

pub(super) fn cookie(sequence: u64, slot: usize) -> u64 {
    sequence * MAX_INFLIGHT as u64 + slot as u64
}

pub(super) fn uncookie(cookie: u64) -> (u64, usize) {
    let slots = MAX_INFLIGHT as u64;
    (cookie / slots, (cookie % slots) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_tell_slot_and_sequence() {
        for (sequence, slot) in [(0, 0), (1, 127), (u64::from(u32::MAX), 5)] {
            assert_eq!(uncookie(cookie(sequence, slot)), (sequence, slot));
        }
    }
}
