//! The node agent's end of its host's lease.
//!
//! ```text
//!               renewed                        renewed in time
//!   Unheld ───────────────▶ Held ◀──────────────────────────┐
//!     ▲                      │ the lease ends                │
//!     │                      ▼                               │
//!     │                  Suspended: paused, no I/O ──────────┘
//!     │ all stopped,         │ grace is over
//!     └── new session ── Lapsed: refuses renewals until its VMs are stopped
//! ```

use serde::{Deserialize, Serialize};

use crate::{MAX_TERM, Moment, Renewal, Terms, Ticket};

/// What a host may do about its leased VMs at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Nothing was granted in this session: none may start, and none runs.
    Unheld,
    /// They run.
    Held {
        /// Until then, should nothing come.
        until: Moment,
    },
    /// They stand still, and their devices do no I/O.
    Suspended {
        /// Then they have to go.
        stop_at: Moment,
    },
    /// They have to go.
    Lapsed,
}

/// A host's lease. Survives its agent by serialisation, for the same boot of the host only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLease {
    session: String,
    /// The highest that was seen.
    epoch: u64,
    held: Option<Held>,
    /// The grace was over once; only [`HostLease::settled`] changes that.
    lapsed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    until: Moment,
    terms: Terms,
}

/// Why a renewal does not count.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Of somebody who does not lead any more.
    #[error("epoch {given} is over: this host has heard from the leader of epoch {seen}")]
    OldEpoch {
        /// As given.
        given: u64,
        /// The highest so far.
        seen: u64,
    },
    /// Granted before VMs were stopped here.
    #[error("session {given:?} is over; the present one is {present:?}")]
    OldSession {
        /// As given.
        given: String,
        /// As it is.
        present: String,
    },
    /// This host wrote no such ticket.
    #[error("the ticket is from the future of this host's clock")]
    Future,
    /// The end of what it grants has passed.
    #[error("it came too late to grant anything")]
    Late,
    /// The lease was lost, and what ran under it is still being stopped.
    #[error("the lease was lost and its VMs are still being stopped")]
    Lapsed,
    /// Nobody waits so long.
    #[error("terms of more than a day are not believed")]
    Terms,
}

impl HostLease {
    /// Of a host that runs no leased VM. `session` was never used before.
    pub fn new(session: String) -> Self {
        Self {
            session,
            epoch: 0,
            held: None,
            lapsed: false,
        }
    }

    /// Of a host whose last agent left leased VMs but no word of its lease: they have to go.
    pub fn lost(session: String) -> Self {
        Self {
            lapsed: true,
            ..Self::new(session)
        }
    }

    /// What a controller may renew.
    pub fn ticket(&self, now: Moment) -> Ticket {
        Ticket {
            session: self.session.clone(),
            at: now,
        }
    }

    /// The present session.
    pub fn session(&self) -> &str {
        &self.session
    }

    /// What may be done now. Call it often: a lapse is only noticed here and in [`Self::renew`].
    pub fn stage(&mut self, now: Moment) -> Stage {
        if self.lapsed {
            return Stage::Lapsed;
        }
        let Some(held) = self.held else {
            return Stage::Unheld;
        };
        let stop_at = held.until.after(held.terms.grace);
        if now < held.until {
            Stage::Held { until: held.until }
        } else if now < stop_at {
            Stage::Suspended { stop_at }
        } else {
            self.lapsed = true;
            Stage::Lapsed
        }
    }

    /// Takes a command's epoch in, if it is not over.
    ///
    /// # Errors
    /// When it is.
    pub fn admit(&mut self, epoch: u64) -> Result<(), Refused> {
        if epoch < self.epoch {
            return Err(Refused::OldEpoch {
                given: epoch,
                seen: self.epoch,
            });
        }
        self.epoch = epoch;
        Ok(())
    }

    /// Takes a grant in.
    ///
    /// # Errors
    /// When it is stale in any way. Nothing but the epoch has changed then.
    pub fn renew(&mut self, renewal: &Renewal, now: Moment) -> Result<Moment, Refused> {
        self.admit(renewal.epoch)?;
        let Renewal { ticket, terms, .. } = renewal;
        if ticket.session != self.session {
            return Err(Refused::OldSession {
                given: ticket.session.clone(),
                present: self.session.clone(),
            });
        }
        if [terms.lease, terms.grace, terms.settle]
            .iter()
            .any(|term| *term > MAX_TERM)
        {
            return Err(Refused::Terms);
        }
        if ticket.at > now {
            return Err(Refused::Future);
        }
        if self.stage(now) == Stage::Lapsed {
            return Err(Refused::Lapsed);
        }
        let until = ticket.at.after(terms.lease);
        if until <= now {
            return Err(Refused::Late);
        }
        // The later end with the terms that came with it: the leader waits for each grant as a whole.
        match self.held {
            Some(held) if held.until >= until => Ok(held.until),
            _ => {
                self.held = Some(Held {
                    until,
                    terms: *terms,
                });
                Ok(until)
            }
        }
    }

    /// All leased VMs are stopped after a lapse: begins `session`, in which nothing is granted yet.
    ///
    /// # Panics
    /// When the lease had not lapsed.
    pub fn settled(&mut self, session: String) {
        assert!(self.lapsed, "only a lapse is settled");
        self.session = session;
        self.held = None;
        self.lapsed = false;
    }

    /// When [`Self::stage`] will say something else if nothing comes; `None` for never.
    pub fn next_change(&mut self, now: Moment) -> Option<Moment> {
        match self.stage(now) {
            Stage::Held { until } => Some(until),
            Stage::Suspended { stop_at } => Some(stop_at),
            Stage::Unheld | Stage::Lapsed => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const TERMS: Terms = Terms {
        lease: Duration::from_secs(10),
        grace: Duration::from_secs(2),
        settle: Duration::from_secs(5),
    };

    fn at(secs: u64) -> Moment {
        Moment(Duration::from_secs(secs))
    }

    fn renewal(lease: &HostLease, ticket_at: Moment) -> Renewal {
        Renewal {
            ticket: lease.ticket(ticket_at),
            terms: TERMS,
            epoch: 1,
        }
    }

    #[test]
    fn lease_counts_from_the_ticket_and_not_from_its_answer() {
        let mut lease = HostLease::new("a".into());
        assert_eq!(lease.stage(at(0)), Stage::Unheld);
        assert_eq!(lease.renew(&renewal(&lease, at(100)), at(109)), Ok(at(110)));
        assert_eq!(lease.stage(at(109)), Stage::Held { until: at(110) });
        assert_eq!(lease.stage(at(110)), Stage::Suspended { stop_at: at(112) });
        assert_eq!(lease.next_change(at(110)), Some(at(112)));
        assert_eq!(lease.renew(&renewal(&lease, at(105)), at(111)), Ok(at(115)));
        assert_eq!(lease.stage(at(111)), Stage::Held { until: at(115) });
    }

    #[test]
    fn delayed_and_foreign_renewals_grant_nothing() {
        let mut lease = HostLease::new("a".into());
        assert_eq!(
            lease.renew(&renewal(&lease, at(1)), at(11)),
            Err(Refused::Late)
        );
        assert_eq!(
            lease.renew(&renewal(&lease, at(20)), at(11)),
            Err(Refused::Future)
        );
        let foreign = renewal(&HostLease::new("b".into()), at(10));
        assert!(matches!(
            lease.renew(&foreign, at(11)),
            Err(Refused::OldSession { .. })
        ));
        let mut long = renewal(&lease, at(10));
        long.terms.lease = MAX_TERM * 2;
        assert_eq!(lease.renew(&long, at(11)), Err(Refused::Terms));
        assert_eq!(lease.stage(at(11)), Stage::Unheld);
    }

    #[test]
    fn epochs_do_not_go_backwards() {
        let mut lease = HostLease::new("a".into());
        let mut newer = renewal(&lease, at(1));
        newer.epoch = 7;
        lease.renew(&newer, at(2)).unwrap();
        let stale = lease.renew(&renewal(&lease, at(3)), at(4));
        assert_eq!(stale, Err(Refused::OldEpoch { given: 1, seen: 7 }));
        assert_eq!(lease.stage(at(4)), Stage::Held { until: at(11) });
    }

    #[test]
    fn a_lapse_refuses_renewals_until_everything_is_stopped() {
        let mut lease = HostLease::new("a".into());
        lease.renew(&renewal(&lease, at(0)), at(0)).unwrap();
        // Nobody looked at the clock meanwhile, as after a freeze.
        let fresh = renewal(&lease, at(30));
        assert_eq!(lease.renew(&fresh, at(31)), Err(Refused::Lapsed));
        assert_eq!(lease.stage(at(31)), Stage::Lapsed);
        lease.settled("b".into());
        assert_eq!(lease.stage(at(32)), Stage::Unheld);
        assert!(matches!(
            lease.renew(&fresh, at(32)),
            Err(Refused::OldSession { .. })
        ));
        assert_eq!(lease.renew(&renewal(&lease, at(32)), at(33)), Ok(at(42)));
    }

    #[test]
    fn an_agent_that_left_vms_without_a_word_has_lost_them() {
        let mut lease = HostLease::lost("a".into());
        assert_eq!(lease.stage(at(0)), Stage::Lapsed);
        assert_eq!(
            lease.renew(&renewal(&lease, at(0)), at(0)),
            Err(Refused::Lapsed)
        );
    }

    #[test]
    fn the_longer_grant_keeps_its_own_terms() {
        let mut lease = HostLease::new("a".into());
        lease.renew(&renewal(&lease, at(0)), at(0)).unwrap();
        let mut other = renewal(&lease, at(1));
        other.terms = Terms {
            lease: Duration::from_secs(5),
            grace: Duration::from_secs(60),
            settle: Duration::ZERO,
        };
        assert_eq!(lease.renew(&other, at(1)), Ok(at(10)));
        // A minute after the first grant's end would be later than the leader waits.
        assert_eq!(lease.stage(at(11)), Stage::Suspended { stop_at: at(12) });
    }
}
