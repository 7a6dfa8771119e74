//! Conditions that a host meets or does not.

use api::controller as pb;

use super::{Candidate, Refusal, Request, Zones, count};
use crate::model::{has_labels, host_name, labelled};

type Filter = fn(&Request, &Candidate, &Zones) -> Option<Refusal>;

/// The cheap ones first.
const FILTERS: &[Filter] = &[
    pinned, excluded, bound, answers, cordoned, cpus, memory, taints, selector, zone, machine,
    version, affinity, repelled, daemons,
];

/// The first condition that a host does not meet.
pub(super) fn first(request: &Request, host: &Candidate, zones: &Zones) -> Option<Refusal> {
    FILTERS
        .iter()
        .find_map(|filter| filter(request, host, zones))
}

/// All of them.
pub(super) fn all(request: &Request, host: &Candidate, zones: &Zones) -> Vec<Refusal> {
    let refusals = FILTERS.iter();
    let refusals = refusals.filter_map(|filter| filter(request, host, zones));
    refusals.collect()
}

fn refusal(filter: &'static str, reason: impl Into<String>) -> Option<Refusal> {
    Some(Refusal {
        filter,
        reason: reason.into(),
        passing: false,
    })
}

fn passing(filter: &'static str, reason: impl Into<String>) -> Option<Refusal> {
    refusal(filter, reason).map(|refusal| Refusal {
        passing: true,
        ..refusal
    })
}

fn pinned(request: &Request, host: &Candidate, _: &Zones) -> Option<Refusal> {
    let wanted = request.placement.host.as_str();
    if wanted.is_empty() || wanted == host_name(host.id) {
        return None;
    }
    refusal("pinned", format!("it is to be on {wanted}"))
}

fn excluded(request: &Request, host: &Candidate, _: &Zones) -> Option<Refusal> {
    let reason = request.excluded.get(host.id)?;
    passing("excluded", reason.as_str())
}

/// Volumes and the like are where they are.
fn bound(request: &Request, host: &Candidate, _: &Zones) -> Option<Refusal> {
    let elsewhere = request.bound.iter().find(|(_, at)| at != host.id);
    let (what, at) = elsewhere?;
    refusal("volumes", format!("{what} is on {}", host_name(at)))
}

fn answers(_: &Request, host: &Candidate, _: &Zones) -> Option<Refusal> {
    match host.connected {
        true => None,
        false => passing("connected", "its node agent does not answer"),
    }
}

fn cordoned(_: &Request, host: &Candidate, _: &Zones) -> Option<Refusal> {
    match host.record.spec.cordoned {
        true => passing("cordoned", "it is cordoned"),
        false => None,
    }
}

fn cpus(request: &Request, host: &Candidate, _: &Zones) -> Option<Refusal> {
    let ratio = host.record.spec.cpu_overcommit;
    let cpus = host.record.inventory.as_ref().map_or(0, |seen| seen.cpus);
    if ratio <= 0.0 || cpus == 0 || !request.is_vm() {
        return None;
    }
    let limit = (f64::from(cpus) * ratio) as u64;
    let (wanted, promised) = (request.demand.vcpus, host.reserved.vcpus);
    if promised.saturating_add(wanted) <= limit {
        return None;
    }
    let reason = format!("{wanted} vCPUs are wanted, {promised} of {limit} are promised");
    refusal("cpus", reason)
}

fn memory(request: &Request, host: &Candidate, _: &Zones) -> Option<Refusal> {
    let ratio = host.record.spec.memory_overcommit;
    let bytes = host.record.inventory.as_ref();
    let bytes = bytes.map_or(0, |seen| seen.memory_bytes);
    if ratio <= 0.0 || bytes == 0 || !request.is_vm() {
        return None;
    }
    let limit = (bytes as f64 * ratio) as u64;
    let (wanted, promised) = (request.demand.memory_bytes, host.reserved.memory_bytes);
    if promised.saturating_add(wanted) <= limit {
        return None;
    }
    let mib = |bytes: u64| bytes >> 20;
    let reason = format!(
        "{} MiB are wanted, {} of {} MiB are promised",
        mib(wanted),
        mib(promised),
        mib(limit)
    );
    refusal("memory", reason)
}

fn taints(request: &Request, host: &Candidate, _: &Zones) -> Option<Refusal> {
    let tolerated = |taint: &pb::Taint| {
        let tolerations = &request.placement.tolerations;
        tolerations.iter().any(|toleration| {
            (toleration.key.is_empty() || toleration.key == taint.key)
                && (toleration.value.is_empty() || toleration.value == taint.value)
        })
    };
    if !request.is_vm() {
        return None;
    }
    let taint = host
        .record
        .spec
        .taints
        .iter()
        .find(|taint| !tolerated(taint));
    let pb::Taint { key, value } = taint?;
    refusal(
        "taints",
        format!("its taint {key}={value} is not tolerated"),
    )
}

fn selector(request: &Request, host: &Candidate, _: &Zones) -> Option<Refusal> {
    let selector = &request.placement.node_selector;
    let wanted = selector.iter();
    let missing = wanted.filter(|(key, value)| host.label(key) != Some(value));
    let (key, value) = missing.into_iter().next()?;
    let has = match host.label(key) {
        Some(other) => format!("its label {key} is {other}, not {value}"),
        None => format!("it has no label {key}={value}"),
    };
    refusal("labels", has)
}

fn zone(request: &Request, host: &Candidate, _: &Zones) -> Option<Refusal> {
    let (zones, own) = (&request.placement.zones, host.zone());
    if zones.is_empty() || zones.iter().any(|zone| zone == own) {
        return None;
    }
    let own = match own {
        "" => "it is in no zone".to_owned(),
        own => format!("its zone is {own}"),
    };
    refusal("zones", format!("{own}, not {}", zones.join(" or ")))
}

/// Model and features of the CPU, and what runs guests.
fn machine(request: &Request, host: &Candidate, _: &Zones) -> Option<Refusal> {
    let wanted = &request.placement;
    if wanted.cpu_model.is_empty() && wanted.cpu_features.is_empty() && wanted.kvm.is_empty() {
        return None;
    }
    let Some(seen) = &host.record.inventory else {
        return passing("machine", "its agent has not reported its machine yet");
    };
    if !wanted.kvm.is_empty() && wanted.kvm != seen.kvm {
        let reason = format!("its KVM is {:?}, not {:?}", seen.kvm, wanted.kvm);
        return refusal("kvm", reason);
    }
    if !wanted.cpu_model.is_empty() && wanted.cpu_model != seen.cpu_model {
        let reason = format!(
            "its CPU is {:?}, not {:?}",
            seen.cpu_model, wanted.cpu_model
        );
        return refusal("cpu_model", reason);
    }
    let features = wanted.cpu_features.iter();
    let missing: Vec<&str> = features
        .filter(|feature| !seen.cpu_features.contains(feature))
        .map(String::as_str)
        .collect();
    match missing.is_empty() {
        true => None,
        false => refusal(
            "cpu_features",
            format!("its CPU lacks {}", missing.join(", ")),
        ),
    }
}

/// The agent, and the daemons that it says it has.
fn version(request: &Request, host: &Candidate, _: &Zones) -> Option<Refusal> {
    let wanted = request.placement.min_version.as_str();
    if wanted.is_empty() {
        return None;
    }
    let Some(seen) = &host.record.inventory else {
        return passing("version", "its agent has not reported its version yet");
    };
    let programs = seen.programs.iter();
    let programs = programs.map(|program| (program.name.as_str(), program.version.as_str()));
    let mut all = programs.chain([("node-agent", seen.version.as_str())]);
    let (name, own) = all.find(|(_, own)| numbers(own) < numbers(wanted))?;
    refusal(
        "version",
        format!("its {name} is {own:?}, older than {wanted}"),
    )
}

/// 1.10.2 comes after 1.9.
fn numbers(version: &str) -> Vec<u64> {
    let parts = version.split(['.', '-', '+']);
    parts.map_while(|part| part.parse().ok()).collect()
}

/// What a term of affinity is about.
pub(super) fn scope(term: &pb::Affinity) -> pb::AffinityScope {
    match term.scope() {
        pb::AffinityScope::Unspecified => pb::AffinityScope::Host,
        scope => scope,
    }
}

/// VMs within a term's scope, seen from a host, that it is about.
pub(super) fn matching(
    request: &Request,
    term: &pb::Affinity,
    host: &Candidate,
    zones: &Zones,
) -> u64 {
    let wanted = labelled(&request.project, &term.labels);
    match scope(term) {
        pb::AffinityScope::Zone => zones.count(host.zone(), &wanted),
        pb::AffinityScope::Daemon => {
            let shared = host.reserved.daemon_labels.iter();
            let shared = shared.filter(|(key, _)| {
                key.split_once('|').is_some_and(|(daemon, set)| {
                    request.demand.daemons.contains_key(daemon) && has_labels(set, &wanted)
                })
            });
            shared.map(|(_, count)| count).sum()
        }
        _ => count(&host.reserved.labels, &wanted),
    }
}

fn affinity(request: &Request, host: &Candidate, zones: &Zones) -> Option<Refusal> {
    for term in &request.placement.affinity {
        if term.preferred {
            continue;
        }
        let there = matching(request, term, host, zones);
        let place = match scope(term) {
            pb::AffinityScope::Zone => "in its zone",
            pb::AffinityScope::Daemon => "behind a device daemon that it would share there",
            _ => "on it",
        };
        let labels = labelled("", &term.labels);
        let labels = labels.trim_start_matches(':');
        if term.anti && there > 0 {
            let reason = format!("{there} VMs with {labels} are {place}");
            return refusal("anti_affinity", reason);
        }
        if !term.anti && there == 0 {
            return refusal("affinity", format!("no VM with {labels} is {place}"));
        }
    }
    None
}

/// Those that are there may keep others away.
fn repelled(request: &Request, host: &Candidate, _: &Zones) -> Option<Refusal> {
    if host.reserved.repels.is_empty() || !request.is_vm() {
        return None;
    }
    let own = labelled(&request.project, &request.labels);
    let mut repels = host.reserved.repels.keys();
    let term = repels.find(|term| has_labels(&own, term))?;
    let labels = term.split_once(':').map_or("", |(_, labels)| labels);
    refusal(
        "anti_affinity",
        format!("a VM on it keeps away from {labels}"),
    )
}

/// How many VMs the death of one daemon would touch.
fn daemons(request: &Request, host: &Candidate, _: &Zones) -> Option<Refusal> {
    for daemon in request.demand.daemons.keys() {
        let there = host.reserved.daemons.get(daemon).copied().unwrap_or(0);
        let others = host.reserved.bounds.keys().filter_map(|key| {
            let (of, bound) = key.split_once('|')?;
            (of == daemon).then(|| bound.parse::<u64>().ok()).flatten()
        });
        let own = u64::from(request.placement.max_vms_per_daemon);
        let bound = others.chain((own > 0).then_some(own)).min();
        if let Some(bound) = bound
            && there + 1 > bound
        {
            let reason = format!("the {daemon} serves {there} VMs there, of {bound} at most");
            return refusal("daemons", reason);
        }
    }
    None
}
