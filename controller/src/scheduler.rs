//! Which host gets a VM: filters, which say why a host cannot have it, then scores among those that can.
//! Everything here is pure: what is wanted, and what is known of each host.
//!
//! ```text
//! Request + Candidate --filters--> Refusals, or --scores--> a number; the highest wins
//! ```

use std::collections::{BTreeMap, BTreeSet};

use api::controller as pb;

use crate::model::{HostRecord, ReservationRecord, fnv1a, has_labels, host_name, labelled};

mod filters;
mod scores;

/// Once so many hosts were found that can have a VM, no further ones are looked at: what a placement costs
/// does not grow with the fleet.
const ENOUGH_HOSTS: usize = 48;

/// A VM, or a volume, for which a host is sought.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Its resource name: what chance is left is made of it.
    pub name: String,
    /// Whose it is.
    pub project: String,
    /// What it would take.
    pub demand: ReservationRecord,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// What it asks for.
    pub placement: pb::Placement,
    /// Where what it needs is already: what that is, and the host's id.
    pub bound: Vec<(String, String)>,
    /// Hosts that it must not go to, by their ids, with the reason.
    pub excluded: BTreeMap<String, String>,
}

impl Request {
    /// Of a VM. `switched` are networks of its NICs whose NICs one daemon serves.
    pub fn of_vm(
        project: &str,
        name: &str,
        spec: &pb::VmSpec,
        switched: &BTreeSet<String>,
    ) -> Self {
        let placement = spec.placement.clone().unwrap_or_default();
        let sockets = spec.vhost_user.iter().map(|device| device.socket.as_str());
        let sockets = sockets.map(|socket| format!("socket {socket}"));
        let daemons = switched
            .iter()
            .map(|network| format!("switch of {network}"));
        let daemons: BTreeSet<String> = daemons.chain(sockets).collect();
        let set = labelled(project, &spec.labels);
        let one = |key: String| (key, 1);
        let bound = placement.max_vms_per_daemon;
        let repels = placement.affinity.iter().filter(|term| {
            term.anti && !term.preferred && filters::scope(term) == pb::AffinityScope::Host
        });
        Self {
            name: name.to_owned(),
            project: project.to_owned(),
            demand: ReservationRecord {
                vcpus: spec.vcpus.max(1).into(),
                memory_bytes: spec.memory_bytes,
                vms: 1,
                labels: [one(set.clone())].into(),
                daemon_labels: daemons
                    .iter()
                    .map(|daemon| one(format!("{daemon}|{set}")))
                    .collect(),
                repels: repels
                    .map(|term| one(labelled(project, &term.labels)))
                    .collect(),
                bounds: match bound {
                    0 => BTreeMap::new(),
                    bound => daemons
                        .iter()
                        .map(|daemon| one(format!("{daemon}|{bound}")))
                        .collect(),
                },
                daemons: daemons.into_iter().map(one).collect(),
            },
            labels: spec.labels.clone(),
            placement,
            bound: Vec::new(),
            excluded: BTreeMap::new(),
        }
    }

    /// Of a volume.
    pub fn of_volume(name: &str, host: &str) -> Self {
        Self {
            name: name.to_owned(),
            placement: pb::Placement {
                host: host.to_owned(),
                ..Default::default()
            },
            ..Self::default()
        }
    }

    fn is_vm(&self) -> bool {
        self.demand.vms > 0
    }
}

/// A host that may be chosen.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Its id.
    pub id: &'a str,
    /// As stored.
    pub record: &'a HostRecord,
    /// What was promised already.
    pub reserved: &'a ReservationRecord,
    /// Its agent answers.
    pub connected: bool,
}

impl Candidate<'_> {
    fn zone(&self) -> &str {
        let reported = self.record.inventory.as_ref();
        match self.record.spec.zone.as_str() {
            "" => reported.map_or("", |host| &host.zone),
            zone => zone,
        }
    }

    fn label(&self, key: &str) -> Option<&str> {
        let reported = self.record.inventory.as_ref().map(|host| &host.labels);
        let own = self.record.spec.labels.get(key);
        own.or_else(|| reported?.get(key)).map(String::as_str)
    }
}

/// Why a host cannot have something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Which condition: pinned, taints, memory ...
    pub filter: &'static str,
    /// In words.
    pub reason: String,
    /// It may be otherwise in a moment, without anybody's doing.
    pub passing: bool,
}

/// What the scheduler makes of a host.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// `hosts/{host}`
    pub host: String,
    /// Why it cannot have it; empty if it can.
    pub refusals: Vec<Refusal>,
    /// Higher is better; of a host that can have it.
    pub score: f64,
}

/// What is counted over whole zones; empty unless the request looks at zones.
#[derive(Debug, Default)]
struct Zones<'a> {
    labels: BTreeMap<&'a str, Vec<&'a ReservationRecord>>,
}

impl<'a> Zones<'a> {
    fn of(request: &Request, len: usize, at: &impl Fn(usize) -> Candidate<'a>) -> Self {
        let terms = &request.placement.affinity;
        let by_zone = |term: &pb::Affinity| filters::scope(term) == pb::AffinityScope::Zone;
        let mut zones = Self::default();
        if terms.iter().any(by_zone) {
            for candidate in (0..len).map(at) {
                let reported = candidate.record.inventory.as_ref();
                let zone = match candidate.record.spec.zone.as_str() {
                    "" => reported.map_or("", |host| host.zone.as_str()),
                    zone => zone,
                };
                zones
                    .labels
                    .entry(zone)
                    .or_default()
                    .push(candidate.reserved);
            }
        }
        zones
    }

    /// VMs in a zone whose labels have all of a set.
    fn count(&self, zone: &str, wanted: &str) -> u64 {
        let hosts = self.labels.get(zone).into_iter().flatten();
        hosts.map(|reserved| count(&reserved.labels, wanted)).sum()
    }
}

/// VMs whose labels have all of a set.
fn count(labels: &BTreeMap<String, u64>, wanted: &str) -> u64 {
    let matching = labels.iter().filter(|(set, _)| has_labels(set, wanted));
    matching.map(|(_, count)| count).sum()
}

/// The index of the best of `len` hosts.
///
/// # Errors
/// When there is none: what all of them say.
pub fn choose<'a>(
    request: &Request,
    len: usize,
    at: impl Fn(usize) -> Candidate<'a>,
) -> Result<usize, Vec<Verdict>> {
    let zones = Zones::of(request, len, &at);
    let mut best: Option<(f64, usize)> = None;
    let mut found = 0;
    // Others begin elsewhere, so that not all go to the same hosts.
    let first = fnv1a(request.name.as_bytes()) as usize % len.max(1);
    for index in (first..len).chain(0..first) {
        let candidate = &at(index);
        if filters::first(request, candidate, &zones).is_some() {
            continue;
        }
        let score = scores::of(request, candidate, &zones);
        if best.is_none_or(|(high, _)| score > high) {
            best = Some((score, index));
        }
        found += 1;
        if found >= ENOUGH_HOSTS {
            break;
        }
    }
    best.map(|(_, index)| index)
        .ok_or_else(|| explain(request, len, at))
}

/// What every host says, the best first, then by their names.
pub fn explain<'a>(
    request: &Request,
    len: usize,
    at: impl Fn(usize) -> Candidate<'a>,
) -> Vec<Verdict> {
    let zones = Zones::of(request, len, &at);
    let mut verdicts: Vec<Verdict> = (0..len)
        .map(at)
        .map(|candidate| {
            let refusals = filters::all(request, &candidate, &zones);
            let score = match refusals.is_empty() {
                true => scores::of(request, &candidate, &zones),
                false => 0.0,
            };
            Verdict {
                host: host_name(candidate.id),
                refusals,
                score,
            }
        })
        .collect();
    verdicts.sort_by(|one, other| {
        let refused = |verdict: &Verdict| !verdict.refusals.is_empty();
        let by_score = other.score.total_cmp(&one.score);
        let order = refused(one).cmp(&refused(other)).then(by_score);
        order.then_with(|| one.host.cmp(&other.host))
    });
    verdicts
}

/// Whether a host, as it is now, can have it after all that could be seen from other hosts was looked at.
pub fn still_fits(request: &Request, candidate: &Candidate) -> bool {
    let mut request = request.clone();
    let by_zone = |term: &pb::Affinity| filters::scope(term) == pb::AffinityScope::Zone;
    request.placement.affinity.retain(|term| !by_zone(term));
    filters::first(&request, candidate, &Zones::default()).is_none()
}

/// Whether waiting may help: some host is refused only for what passes by itself.
pub fn may_pass(verdicts: &[Verdict]) -> bool {
    let passes = |verdict: &Verdict| verdict.refusals.iter().all(|refusal| refusal.passing);
    verdicts.is_empty() || verdicts.iter().any(passes)
}

/// All refusals in one line.
pub fn words(verdicts: &[Verdict]) -> String {
    /// More hosts than anybody reads about at once.
    const MAX_NAMED: usize = 8;
    let named = verdicts.iter().take(MAX_NAMED).map(|verdict| {
        let reasons = verdict
            .refusals
            .iter()
            .map(|refusal| refusal.reason.as_str());
        format!(
            "{}: {}",
            verdict.host,
            reasons.collect::<Vec<_>>().join(", ")
        )
    });
    let mut words = named.collect::<Vec<_>>().join("; ");
    if verdicts.len() > MAX_NAMED {
        words.push_str(&format!("; and {} more", verdicts.len() - MAX_NAMED));
    }
    words
}

#[cfg(test)]
mod tests;
