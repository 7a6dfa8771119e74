//! Host leases: until when a host may run the VMs that are restarted elsewhere should it be lost. No
//! I/O and no clock in here: both ends pass the time in.
//!
//! ```text
//!  agent (boottime of its host)                     leader (its monotonic clock)
//!    ticket = now, session        ───answer───▶     heard at c: the host may go on until
//!                                                   c + (lease + grace + settle) + 1 %
//!                                                   then it proves that it still leads
//!    lease ends at ticket + lease ◀──renewal───     the same ticket comes back, with the terms
//!
//!    lease end                 devices begin no more I/O, by their own clocks; the VMs are paused
//!    lease end + grace         the VMs are stopped; a new session begins when they are
//!    ... + settle              nothing of them is left
//! ```
//!
//! The lease is counted from the ticket, which the host wrote before the leader saw it. So a message
//! that took an hour, in either direction, grants nothing, and no two clocks are ever compared: only
//! the rates of the clocks are trusted, to one percent.
//!
//! A leader grants only what it hears before it proves that it leads. Whoever leads next counts from
//! its own beginning, which came later than that proof: see [`Keeper`].
//!
//! | module | whose |
//! |---|---|
//! | [`HostLease`] | the node agent's end |
//! | [`Keeper`] | the leading controller's end |

mod host;
mod keeper;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use host::{HostLease, Refused, Stage};
pub use keeper::Keeper;

/// How far a clock may go wrong: one part in so many.
const DRIFT_PARTS: u32 = 100;
/// A leader that asks for more than a day is not believed.
const MAX_TERM: Duration = Duration::from_secs(24 * 60 * 60);

/// Time on one clock, since some instant in the past that is the same for all its readings.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Moment(pub Duration);

impl Moment {
    /// So many nanoseconds after the clock's zero.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(Duration::from_nanos(nanos))
    }

    /// Nanoseconds since the clock's zero, of which there are 584 years.
    pub fn as_nanos(self) -> u64 {
        u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX)
    }

    /// Later by `by`.
    #[must_use]
    pub fn after(self, by: Duration) -> Self {
        Self(self.0.saturating_add(by))
    }

    /// How long until `other`; nothing if that has passed.
    pub fn until(self, other: Self) -> Duration {
        other.0.saturating_sub(self.0)
    }
}

/// How long a host may go on by itself, and how long it then takes to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// From a ticket to the lease's end.
    pub lease: Duration,
    /// From there, while contact may come back and VMs are only paused.
    pub grace: Duration,
    /// From there: I/O in flight ends, and processes do.
    pub settle: Duration,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            // Longer than controllers take to elect another leader.
            lease: Duration::from_secs(30),
            grace: Duration::from_secs(5),
            settle: Duration::from_secs(10),
        }
    }
}

impl Terms {
    /// From a ticket until nothing of a VM is left, by a clock that may run too fast.
    pub fn surely_over(&self) -> Duration {
        let all = self.lease + self.grace + self.settle;
        all + all / DRIFT_PARTS
    }

    /// How often a lease is to be renewed: five messages may be lost. Every five seconds by default.
    pub fn renew_every(&self) -> Duration {
        self.lease / 6
    }
}

/// What an agent hands out for a renewal to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The host's session: changes when its VMs had to stop.
    pub session: String,
    /// When it was written, by the host's clock.
    pub at: Moment,
}

/// What a leader grants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// As it was heard.
    pub ticket: Ticket,
    /// From then on.
    pub terms: Terms,
    /// Which leadership this is; 0 where there is only one.
    pub epoch: u64,
}

/// What is done about a VM that is not running any more although it should.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Restart {
    /// It stays as it is.
    #[default]
    Never,
    /// Its host starts it again.
    SameHost,
    /// So does its host; when that is lost, another one does. Such a VM needs its host's lease.
    Anywhere,
}
