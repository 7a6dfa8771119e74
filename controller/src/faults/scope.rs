//! What an experiment may touch: which VMs and devices its targets stand for, and which others are to
//! stay as they are.

use std::collections::BTreeSet;

use api::controller::fault_injection::Action;
use api::controller::{FaultExperimentSpec, FaultInjection};
use api::device::fault_rule;
use api::names::Name;
use api::node::{FaultProcess, VmStatus};

use crate::model::{VmRecord, prefix};
use crate::plan::Fleet;
use crate::reconciler::decode;
use crate::store::{Range, SharedStore, StoreError};

/// A VM and where it is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Vm {
    /// Its resource name.
    pub(crate) name: String,
    /// Its id on the host.
    pub(crate) node_id: String,
    /// The host's id; empty while none has it.
    pub(crate) host: String,
    /// Disks, then NICs, then devices of third parties.
    pub(crate) devices: Vec<Device>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Device {
    pub(crate) name: String,
    /// blk, net, fs ...
    pub(crate) kind: String,
}

/// All VMs, and what of them an experiment aims at.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scope {
    pub(crate) vms: Vec<Vm>,
    /// (VM, device), by the names that users know.
    targets: BTreeSet<(String, String)>,
    target_vms: BTreeSet<String>,
}

impl Scope {
    /// As the store and the host have it now.
    pub(crate) async fn load(
        store: &SharedStore,
        fleet: &Fleet,
        project: &str,
        spec: &FaultExperimentSpec,
    ) -> Result<Self, StoreError> {
        let mut vms = Vec::new();
        for item in store.list(Range::all(prefix::VMS)).await?.items {
            let record: VmRecord = decode(&item.key, &item.value)?;
            vms.push(vm(record));
        }
        Ok(Self::of(vms, fleet, project, spec))
    }

    fn of(vms: Vec<Vm>, fleet: &Fleet, project: &str, spec: &FaultExperimentSpec) -> Self {
        let mut scope = Self {
            vms,
            ..Self::default()
        };
        for fault in &spec.faults {
            for vm in scope.vms_of(fault, project) {
                scope.target_vms.insert(vm.name.clone());
                for device in devices_of(fault, &vm) {
                    scope.targets.insert((vm.name.clone(), device));
                }
                if hits_processes(fault) {
                    let shared = scope.sharing(fault, &vm, fleet);
                    scope.targets.extend(shared);
                }
            }
            // A host's fault is everybody's; that of its agent is to be nobody's.
            if matches!(fault.action, Some(Action::Host(_))) {
                for vm in &scope.vms {
                    let devices = vm.devices.iter();
                    let all = devices.map(|device| (vm.name.clone(), device.name.clone()));
                    scope.targets.extend(all);
                }
            }
        }
        scope
    }

    /// VMs that a fault's target stands for.
    pub(crate) fn vms_of(&self, fault: &FaultInjection, project: &str) -> Vec<Vm> {
        if is_hosts(fault) {
            return Vec::new();
        }
        let target = fault.target.clone().unwrap_or_default();
        let wanted = |vm: &&Vm| match target.vm.as_str() {
            "" => Name::parse_vm(&vm.name).is_ok_and(|name| name.project == project),
            name => vm.name == name,
        };
        self.vms.iter().filter(wanted).cloned().collect()
    }

    /// Devices of any VM that have the same process as the target's, which goes down with all it serves.
    fn sharing(&self, fault: &FaultInjection, vm: &Vm, fleet: &Fleet) -> Vec<(String, String)> {
        let observed = fleet.of(&vm.host);
        let Some(seen) = observed.vms.get(&vm.node_id) else {
            return Vec::new();
        };
        let targets = devices_of(fault, vm);
        let hit: BTreeSet<u32> = seen
            .processes
            .iter()
            .filter(|process| process.pid != 0)
            .filter(|process| process.devices.iter().any(|name| targets.contains(name)))
            .map(|process| process.pid)
            .collect();
        let mut shared = Vec::new();
        for other in self.vms.iter().filter(|other| other.host == vm.host) {
            let Some(seen) = observed.vms.get(&other.node_id) else {
                continue;
            };
            let processes = seen.processes.iter();
            for process in processes.filter(|process| hit.contains(&process.pid)) {
                let devices = process.devices.iter();
                shared.extend(devices.map(|device| (other.name.clone(), device.clone())));
            }
        }
        shared
    }

    /// Some fault may hit this device.
    pub(crate) fn is_target(&self, vm: &str, device: &str) -> bool {
        self.targets.contains(&(vm.to_owned(), device.to_owned()))
    }

    /// Some fault names this VM.
    pub(crate) fn is_target_vm(&self, vm: &str) -> bool {
        self.target_vms.contains(vm)
    }

    /// Ids of the hosts that an experiment has to do with: those of its VMs, and those that its faults
    /// of hosts are for.
    pub(crate) fn hosts(&self, spec: &FaultExperimentSpec, fleet: &Fleet) -> BTreeSet<String> {
        let vms = self.target_vms().map(|vm| vm.host.clone());
        let mut hosts: BTreeSet<String> = vms.filter(|host| !host.is_empty()).collect();
        for fault in spec.faults.iter().filter(|fault| is_hosts(fault)) {
            hosts.extend(self.hosts_of(fault, fleet));
        }
        hosts
    }

    /// Ids of the hosts that a fault of hosts is for: the one that is named, those of the experiment's
    /// VMs, or all.
    pub(crate) fn hosts_of(&self, fault: &FaultInjection, fleet: &Fleet) -> BTreeSet<String> {
        let named = fault.target.as_ref().map_or("", |target| &target.host);
        if !named.is_empty() {
            return [crate::model::host_id(named).to_owned()].into();
        }
        let vms = self.target_vms().map(|vm| vm.host.clone());
        let hosts: BTreeSet<String> = vms.filter(|host| !host.is_empty()).collect();
        match hosts.is_empty() {
            true => fleet.hosts.keys().map(|id| id.to_string()).collect(),
            false => hosts,
        }
    }

    /// VMs that faults name.
    pub(crate) fn target_vms(&self) -> impl Iterator<Item = &Vm> {
        self.vms.iter().filter(|vm| self.is_target_vm(&vm.name))
    }
}

fn vm(record: VmRecord) -> Vm {
    let spec = record.vm.spec.unwrap_or_default();
    let disks = spec.disks.iter().map(|disk| (&disk.name, "blk"));
    let nics = spec.nics.iter().map(|nic| (&nic.name, "net"));
    let others = spec.vhost_user.iter();
    let others = others.map(|device| (&device.name, device.r#type.as_str()));
    let devices = disks.chain(nics).chain(others);
    Vm {
        name: record.vm.name.clone(),
        node_id: record.node_id,
        host: record.host,
        devices: devices
            .map(|(name, kind)| Device {
                name: name.clone(),
                kind: kind.to_owned(),
            })
            .collect(),
    }
}

/// The target's devices of this VM.
fn devices_of(fault: &FaultInjection, vm: &Vm) -> Vec<String> {
    let target = fault.target.clone().unwrap_or_default();
    let all = vm.devices.iter().map(|device| device.name.clone());
    let whole_vm = target.device.is_empty()
        || (target.process() == FaultProcess::Vmm && hits_processes(fault));
    all.filter(|name| whole_vm || *name == target.device)
        .collect()
}

/// It is done to the host or its agent, and to no VM.
pub(crate) fn is_hosts(fault: &FaultInjection) -> bool {
    let target = fault.target.as_ref();
    matches!(fault.action, Some(Action::Host(_)))
        || target.is_some_and(|target| target.process() == FaultProcess::Agent)
}

/// It takes a whole process down, not one device of it.
fn hits_processes(fault: &FaultInjection) -> bool {
    match &fault.action {
        Some(Action::Process(_) | Action::Upgrade(_)) => true,
        Some(Action::Rule(rule)) => match &rule.action {
            Some(fault_rule::Action::Crash(_) | fault_rule::Action::Hang(_)) => true,
            Some(fault_rule::Action::Torn(torn)) => torn.end() == api::device::TornEnd::Crash,
            _ => false,
        },
        _ => false,
    }
}

/// Whether a VM runs, as a host says.
pub(crate) fn is_running(seen: Option<&VmStatus>) -> bool {
    seen.is_some_and(|vm| vm.phase() == api::node::VmPhase::Running)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Observed;
    use api::controller::FaultTarget;
    use api::device::{FaultRule, LatencyFault};
    use api::node::{KillFault, ProcessFault, ProcessStatus, process_fault};

    fn vm(name: &str, devices: &[&str]) -> Vm {
        Vm {
            name: format!("projects/p/vms/{name}"),
            node_id: name.to_owned(),
            host: "h".to_owned(),
            devices: devices
                .iter()
                .map(|name| Device {
                    name: (*name).to_owned(),
                    kind: "blk".into(),
                })
                .collect(),
        }
    }

    fn observed(processes: &[(&str, u32, &[&str])]) -> Fleet {
        let mut observed = Observed::default();
        for (vm, pid, devices) in processes {
            let seen = observed.vms.entry((*vm).to_owned()).or_default();
            seen.processes.push(ProcessStatus {
                pid: *pid,
                devices: devices.iter().map(|name| (*name).to_owned()).collect(),
                ..Default::default()
            });
        }
        Fleet {
            hosts: [("h".into(), observed.into())].into(),
        }
    }

    fn fault(device: &str, action: Action) -> FaultInjection {
        FaultInjection {
            id: "f".into(),
            target: Some(FaultTarget {
                vm: "projects/p/vms/a".into(),
                device: device.into(),
                ..Default::default()
            }),
            action: Some(action),
            ..Default::default()
        }
    }

    fn kill() -> Action {
        Action::Process(ProcessFault {
            action: Some(process_fault::Action::Kill(KillFault::default())),
        })
    }

    fn slow() -> Action {
        Action::Rule(FaultRule {
            action: Some(fault_rule::Action::Latency(LatencyFault::default())),
            ..Default::default()
        })
    }

    fn targets(fault: FaultInjection) -> Vec<String> {
        let vms = vec![
            vm("a", &["root", "data", "nic0"]),
            vm("b", &["root", "nic0"]),
        ];
        let seen = observed(&[
            ("a", 10, &["root", "data"]),
            ("a", 11, &["nic0"]),
            ("b", 20, &["root"]),
            ("b", 11, &["nic0"]),
        ]);
        let spec = FaultExperimentSpec {
            faults: vec![fault],
            ..Default::default()
        };
        let scope = Scope::of(vms, &seen, "p", &spec);
        let short = |(vm, device): &(String, String)| {
            format!("{}/{device}", vm.trim_start_matches("projects/p/vms/"))
        };
        scope.targets.iter().map(short).collect()
    }

    #[test]
    fn a_slow_request_is_one_devices_matter() {
        assert_eq!(targets(fault("root", slow())), ["a/root"]);
        assert_eq!(targets(fault("", slow())), ["a/data", "a/nic0", "a/root"]);
    }

    #[test]
    fn a_killed_process_takes_down_all_it_serves_and_no_more() {
        assert_eq!(targets(fault("root", kill())), ["a/data", "a/root"]);
        assert_eq!(
            targets(fault("nic0", kill())),
            ["a/nic0", "b/nic0"],
            "ports of one switch"
        );
    }

    #[test]
    fn a_target_that_is_not_there_is_nothing() {
        assert!(targets(fault("elsewhere", kill())).is_empty());
    }
}
