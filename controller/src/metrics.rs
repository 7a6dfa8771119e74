//! The controller's own figures, in Prometheus' text format.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use ::api::controller as pb;

use crate::commands::{phase_word, visible_vm};
use crate::plan::{Desired, Fleet};

/// Renders VMs by phase, pending operations and the hosts' connections.
pub fn render(desired: &Desired, fleet: &Fleet) -> String {
    let mut phases: BTreeMap<String, usize> = BTreeMap::new();
    for stored in desired.vms.values() {
        let vm = visible_vm(&stored.record, fleet);
        *phases
            .entry(phase_word(vm.status.unwrap_or_default().phase()))
            .or_default() += 1;
    }
    let volumes = desired.volumes.len();
    let pending = desired.pending.len();
    let connected = fleet.connected().count();
    let known = desired.hosts.len();
    let mut text = String::new();
    let _ = writeln!(text, "# HELP mortise_controller_vms VMs by phase.");
    let _ = writeln!(text, "# TYPE mortise_controller_vms gauge");
    for phase in all_phases() {
        let count = phases.get(&phase).copied().unwrap_or(0);
        let _ = writeln!(text, "mortise_controller_vms{{phase=\"{phase}\"}} {count}");
    }
    let _ = writeln!(text, "# HELP mortise_controller_volumes Volumes.");
    let _ = writeln!(text, "# TYPE mortise_controller_volumes gauge");
    let _ = writeln!(text, "mortise_controller_volumes {volumes}");
    let _ = writeln!(
        text,
        "# HELP mortise_controller_operations_pending Operations not done."
    );
    let _ = writeln!(text, "# TYPE mortise_controller_operations_pending gauge");
    let _ = writeln!(text, "mortise_controller_operations_pending {pending}");
    let _ = writeln!(
        text,
        "# HELP mortise_controller_node_connected Node agents that answer."
    );
    let _ = writeln!(text, "# TYPE mortise_controller_node_connected gauge");
    let _ = writeln!(text, "mortise_controller_node_connected {connected}");
    let _ = writeln!(text, "# HELP mortise_controller_hosts Hosts.");
    let _ = writeln!(text, "# TYPE mortise_controller_hosts gauge");
    let _ = writeln!(text, "mortise_controller_hosts {known}");
    text
}

fn all_phases() -> impl Iterator<Item = String> {
    (1..)
        .map_while(|number| pb::VmPhase::try_from(number).ok())
        .map(phase_word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_has_a_line_even_without_vms() {
        let text = render(&Desired::default(), &Fleet::default());
        for phase in ["pending", "running", "failed"] {
            assert!(
                text.contains(&format!("{{phase=\"{phase}\"}} 0\n")),
                "{text}"
            );
        }
        assert!(text.contains("mortise_controller_node_connected 0\n"));
    }
}
