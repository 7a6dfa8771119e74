//! Conditions that are looked at: at the start, all the time, at the end.

use std::collections::BTreeMap;

use api::controller::{FaultProbe, FaultProbeKind, GuestReport};

use super::guest::Listener;
use super::observe::Observer;
use super::scope::{Scope, Vm, is_running};
use crate::plan::Fleet;

/// When it is looked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Edge {
    Start,
    During,
    End,
}

/// What there is to look at.
pub(crate) struct Sight<'a> {
    pub(crate) scope: &'a Scope,
    pub(crate) fleet: &'a Fleet,
    pub(crate) observer: &'a Observer,
    pub(crate) listeners: &'a BTreeMap<String, Listener>,
}

/// Whether a probe is to be looked at then.
pub(crate) fn is_due(probe: &FaultProbe, edge: Edge) -> bool {
    match edge {
        Edge::Start => probe.at_start,
        Edge::During => probe.during,
        Edge::End => probe.at_end,
    }
}

/// Why the probe does not hold, or `None` when it does.
pub(crate) fn problem(probe: &FaultProbe, edge: Edge, sight: &Sight) -> Option<String> {
    let vms: Vec<&Vm> = match probe.vm.as_str() {
        "" => sight.scope.target_vms().collect(),
        name => sight
            .scope
            .vms
            .iter()
            .filter(|vm| vm.name == name)
            .collect(),
    };
    if vms.is_empty() {
        return Some("there is no such VM".to_owned());
    }
    vms.into_iter().find_map(|vm| {
        problem_of(probe, edge, sight, vm).map(|words| format!("{}: {words}", vm.name))
    })
}

fn problem_of(probe: &FaultProbe, edge: Edge, sight: &Sight, vm: &Vm) -> Option<String> {
    match probe.kind() {
        FaultProbeKind::Unspecified => None,
        FaultProbeKind::VmRunning => {
            let trouble = sight.observer.vm_trouble(&vm.name).map(str::to_owned);
            let running = is_running(sight.fleet.of(&vm.host).vms.get(&vm.node_id));
            trouble.or_else(|| (!running).then(|| "does not run".to_owned()))
        }
        FaultProbeKind::GuestLine => match sight.listeners.get(&vm.name) {
            Some(listener) if listener.said(&probe.contains) => None,
            Some(_) => Some(format!("its console did not say {:?}", probe.contains)),
            None => Some("nobody listens to its console".to_owned()),
        },
        FaultProbeKind::GuestVerifies => {
            let reports = sight.listeners.get(&vm.name).map(Listener::reports);
            verifies(edge, &reports.unwrap_or_default())
        }
        FaultProbeKind::DeviceConnected => each(probe, vm, |device| {
            match sight.observer.is_connected(&vm.name, device) {
                Some(true) => None,
                Some(false) => Some("no daemon serves it".to_owned()),
                None => Some("was not seen yet".to_owned()),
            }
        }),
        FaultProbeKind::Progress => each(probe, vm, |device| {
            match sight.observer.progresses(&vm.name, device) {
                Some(true) => None,
                Some(false) => Some("completes nothing".to_owned()),
                None => Some("was not seen yet".to_owned()),
            }
        }),
        FaultProbeKind::Figure => each(probe, vm, |device| {
            match sight.observer.figure(&vm.name, device, &probe.figure) {
                Some(figure) if figure <= probe.at_most => None,
                Some(figure) => Some(format!(
                    "{} is {figure:.1}, at most {} wanted",
                    probe.figure, probe.at_most
                )),
                None => Some("was not seen yet".to_owned()),
            }
        }),
    }
}

/// The first device of the probe with a problem.
fn each(probe: &FaultProbe, vm: &Vm, problem: impl Fn(&str) -> Option<String>) -> Option<String> {
    let wanted = |name: &&str| probe.device.is_empty() || *name == probe.device;
    let mut names: Vec<&str> = vm
        .devices
        .iter()
        .map(|device| device.name.as_str())
        .collect();
    names.retain(|name| wanted(name));
    if names.is_empty() {
        return Some(format!("has no device {:?}", probe.device));
    }
    names
        .into_iter()
        .find_map(|name| problem(name).map(|words| format!("{name}: {words}")))
}

/// Before and during, a verifier has to speak and to find nothing; at the end it has to be done.
fn verifies(edge: Edge, reports: &[GuestReport]) -> Option<String> {
    let wrong = |report: &GuestReport| {
        report.lost + report.torn + report.misplaced + report.foreign + report.unanswered > 0
    };
    if let Some(report) = reports.iter().find(|report| wrong(report)) {
        let first = report.findings.first().cloned().unwrap_or_default();
        return Some(format!("{} is not as promised: {first}", report.device));
    }
    match edge {
        Edge::Start if reports.is_empty() => Some("no verifier was heard".to_owned()),
        Edge::End if reports.is_empty() => Some("no verifier was heard".to_owned()),
        Edge::End => reports
            .iter()
            .find(|report| !report.finished)
            .map(|report| format!("the verifier of {} is not done", report.device)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verifier_has_to_speak_first_and_to_end_at_last() {
        let speaks = GuestReport {
            device: "vda".into(),
            ..Default::default()
        };
        let done = GuestReport {
            finished: true,
            ..speaks.clone()
        };
        let wrong = GuestReport {
            torn: 1,
            ..done.clone()
        };
        let holds = |edge, reports: &[GuestReport]| verifies(edge, reports).is_none();
        assert!(!holds(Edge::Start, &[]) && !holds(Edge::End, &[]));
        assert!(holds(Edge::During, &[]), "it may be silent for a while");
        assert!(holds(Edge::Start, std::slice::from_ref(&speaks)));
        assert!(!holds(Edge::End, &[done.clone(), speaks]));
        assert!(holds(Edge::End, &[done]));
        assert!(!holds(Edge::During, &[wrong]));
    }
}
