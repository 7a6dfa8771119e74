//! The leader's end of all hosts' leases: when is a host's VM surely stopped.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::{Moment, Renewal, Terms, Ticket};

/// What one leadership knows of the hosts' leases.
///
/// Leaderships before this one may have granted leases, too. Each grant of theirs answers a ticket
/// that was written before they last proved to lead, which was before this leadership began. So a
/// host that was not heard from is lost as if it had been heard from at the beginning.
#[derive(Clone, Debug)]
pub struct Keeper {
    terms: Terms,
    epoch: u64,
    began: Moment,
    /// From a ticket until nothing of a VM is left, by the longest terms that were ever granted.
    longest: Duration,
    hosts: BTreeMap<String, Known>,
}

#[derive(Clone, Debug)]
struct Known {
    session: String,
    /// Nothing runs there after this.
    over_at: Moment,
}

impl Keeper {
    /// Of a leadership that was won before `now`, by the clock that all later calls use.
    pub fn new(terms: Terms, epoch: u64, now: Moment) -> Self {
        Self {
            terms,
            epoch,
            began: now,
            longest: terms.surely_over(),
            hosts: BTreeMap::new(),
        }
    }

    /// Leaders before may have granted leases that were surely over only after `longest`.
    #[must_use]
    pub fn after_leases_of(mut self, longest: Duration) -> Self {
        self.longest = self.longest.max(longest);
        self
    }

    /// What is granted.
    pub fn terms(&self) -> Terms {
        self.terms
    }

    /// A host's ticket arrived before `now`. The renewal may be sent once a later moment than `now`
    /// is known at which this leadership was not over.
    pub fn heard(&mut self, host: &str, ticket: Ticket, now: Moment) -> Renewal {
        let over_at = now.after(self.terms.surely_over());
        let known = self.hosts.entry(host.to_owned()).or_insert_with(|| Known {
            session: String::new(),
            over_at,
        });
        known.over_at = known.over_at.max(over_at);
        known.session.clone_from(&ticket.session);
        Renewal {
            ticket,
            terms: self.terms,
            epoch: self.epoch,
        }
    }

    /// The host's session, if it was heard from: what it is told to start belongs to it.
    pub fn session(&self, host: &str) -> Option<&str> {
        self.hosts.get(host).map(|known| known.session.as_str())
    }

    /// When the host's leased VMs are surely stopped if nothing is heard any more.
    pub fn over_at(&self, host: &str) -> Moment {
        let first = self.began.after(self.longest);
        match self.hosts.get(host) {
            Some(known) => known.over_at.max(first),
            None => first,
        }
    }

    /// Nothing that needs a lease runs on the host any more, nor will before it is heard from.
    pub fn is_lost(&self, host: &str, now: Moment) -> bool {
        now >= self.over_at(host)
    }

    /// Those of `hosts` that are lost. Cheapest when they are in order.
    pub fn lost<'a>(
        &self,
        hosts: impl Iterator<Item = &'a String>,
        now: Moment,
    ) -> impl Iterator<Item = &'a String> {
        let somebody_may_be = now >= self.began.after(self.longest);
        let mut known = self.hosts.iter().peekable();
        hosts.filter(move |host| {
            if !somebody_may_be {
                return false;
            }
            while known.next_if(|(id, _)| id < host).is_some() {}
            match known.peek() {
                Some((id, known)) if id == host => now >= known.over_at,
                _ => self.is_lost(host, now),
            }
        })
    }

    /// Nobody asks for this host any more.
    pub fn forget(&mut self, host: &str) {
        self.hosts.remove(host);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{HostLease, Stage};

    fn at(millis: u64) -> Moment {
        Moment(Duration::from_millis(millis))
    }

    const TERMS: Terms = Terms {
        lease: Duration::from_secs(10),
        grace: Duration::from_secs(2),
        settle: Duration::from_secs(5),
    };

    fn keeper(now: Moment) -> Keeper {
        Keeper::new(TERMS, 1, now)
    }

    #[test]
    fn silent_host_is_lost_after_lease_grace_and_settling() {
        let mut keeper = keeper(at(0));
        let ticket = HostLease::new("s".into()).ticket(at(777));
        let renewal = keeper.heard("a", ticket.clone(), at(50_000));
        assert_eq!((renewal.ticket, renewal.epoch), (ticket, 1));
        let over_at = at(50_000).after(Duration::from_millis(17_170));
        assert!(!keeper.is_lost("a", at(67_169)));
        assert_eq!(keeper.over_at("a"), over_at);
        assert!(keeper.is_lost("a", over_at));
        assert_eq!(keeper.session("a"), Some("s"));
    }

    #[test]
    fn new_leader_waits_for_what_others_granted() {
        let mut keeper = keeper(at(1_000_000));
        assert!(!keeper.is_lost("never-heard", at(1_017_169)));
        assert!(keeper.is_lost("never-heard", at(1_017_170)));
        keeper.heard("a", HostLease::new("s".into()).ticket(at(0)), at(1_000_000));
        keeper.forget("a");
        assert!(!keeper.is_lost("a", at(1_017_000)));
    }

    #[test]
    fn new_leader_waits_for_the_longer_leases_of_those_before() {
        let longer = Duration::from_secs(100);
        let mut keeper = keeper(at(1_000)).after_leases_of(longer);
        assert_eq!(keeper.over_at("never-heard"), at(101_000));
        keeper.heard("a", HostLease::new("s".into()).ticket(at(0)), at(2_000));
        assert_eq!(keeper.over_at("a"), at(101_000));
        let shorter = Keeper::new(TERMS, 1, at(0)).after_leases_of(Duration::ZERO);
        assert_eq!(shorter.over_at("a"), at(17_170));
    }

    /// Whatever the delays and however the two clocks drift, a host that the leader holds for lost
    /// has stopped before.
    #[test]
    fn a_lost_host_has_stopped_before() {
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        let mut chance = |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        for round in 0..2_000 {
            // The host's clock runs up to 0.5 % slow or fast and began elsewhere.
            let (zero, rate) = (chance(1 << 40), 995 + chance(11));
            let by_host = |real: u64| at(zero + real * rate / 1000);
            let mut lease = HostLease::new("s".into());
            let mut keeper = keeper(at(0));
            let mut real = 0;
            for _ in 0..chance(20) {
                let ticket = lease.ticket(by_host(real));
                real += chance(4_000);
                let renewal = keeper.heard("a", ticket, at(real));
                real += chance(4_000);
                let _ = lease.renew(&renewal, by_host(real));
            }
            let lost = keeper.over_at("a").as_nanos() / 1_000_000;
            let settle = TERMS.settle.as_millis() as u64;
            let stage = lease.stage(by_host(lost - settle));
            assert!(
                matches!(stage, Stage::Lapsed | Stage::Unheld),
                "round {round}: {stage:?}"
            );
        }
    }
}
