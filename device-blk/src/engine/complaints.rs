//! Saying that I/O fails, but not for each of a million requests.

use std::time::{Duration, Instant};

use request::OpKind;

/// Between two complaints about the same error of the same kind of request on one queue.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);
/// Kinds and errors that are told apart; storage has few.
const MAX_SUBJECTS: usize = 32;

/// Says that I/O fails, but not for each of a million requests.
#[derive(Default)]
pub(super) struct Complaints(Vec<Subject>);

struct Subject {
    kind: OpKind,
    errno: i32,
    last: Instant,
    withheld: u64,
}

impl Complaints {
    pub(super) fn complain(&mut self, image: &str, kind: OpKind, errno: i32) {
        if let Some(withheld) = self.note(kind, errno, Instant::now()) {
            let error = std::io::Error::from_raw_os_error(errno);
            tracing::warn!(image, op = kind.name(), %error, withheld, "request failed; the guest gets IOERR");
        }
    }

    /// How many were withheld, when it is to be said.
    fn note(&mut self, kind: OpKind, errno: i32, now: Instant) -> Option<u64> {
        let is_same = |subject: &&mut Subject| subject.kind == kind && subject.errno == errno;
        if let Some(subject) = self.0.iter_mut().find(is_same) {
            if now.saturating_duration_since(subject.last) < COMPLAINT_INTERVAL {
                subject.withheld += 1;
                return None;
            }
            subject.last = now;
            return Some(std::mem::take(&mut subject.withheld));
        }
        if self.0.len() == MAX_SUBJECTS {
            self.0.clear();
        }
        self.0.push(Subject {
            kind,
            errno,
            last: now,
            withheld: 0,
        });
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_of_each_kind_is_said_once_in_a_while() {
        let mut complaints = Complaints::default();
        let now = Instant::now();
        assert_eq!(complaints.note(OpKind::Read, libc::EIO, now), Some(0));
        for _ in 0..3 {
            assert_eq!(complaints.note(OpKind::Read, libc::EIO, now), None);
        }
        assert_eq!(complaints.note(OpKind::Write, libc::EIO, now), Some(0));
        assert_eq!(complaints.note(OpKind::Write, libc::ENOSPC, now), Some(0));
        let later = now + COMPLAINT_INTERVAL;
        assert_eq!(complaints.note(OpKind::Read, libc::EIO, later), Some(3));
        for errno in 0..1000 {
            complaints.note(OpKind::Read, errno, later);
        }
        assert!(complaints.0.len() <= MAX_SUBJECTS);
    }
}
