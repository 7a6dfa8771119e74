//! Saying that I/O fails, but not for each of a million requests.

use std::time::{Duration, Instant};

use crate::request::OpKind;

/// Between two complaints about failing I/O on one queue.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

/// Says that I/O fails, but not for each of a million requests.
#[derive(Default)]
pub(super) struct Complaints {
    last: Option<Instant>,
    withheld: u64,
}

impl Complaints {
    pub(super) fn complain(&mut self, image: &str, kind: OpKind, errno: i32) {
        if self
            .last
            .is_some_and(|last| last.elapsed() < COMPLAINT_INTERVAL)
        {
            self.withheld += 1;
            return;
        }
        self.last = Some(Instant::now());
        let error = std::io::Error::from_raw_os_error(errno);
        let withheld = std::mem::take(&mut self.withheld);
        tracing::warn!(image, op = kind.name(), %error, withheld, "request failed; the guest gets IOERR");
    }
}
