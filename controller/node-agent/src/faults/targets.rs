//! Which devices and processes of this host a fault is about, as things are now.

use std::path::PathBuf;

use api::node::{FaultProcess, FaultTarget, VmPhase, VmStatus};

use crate::{agent::Agent, network::port_id, record::DaemonKind, spec::Spec, vm::vmm_socket};

/// One device of one VM, or its vmm-core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) vm: String,
    /// As the spec calls it; empty for the VM's vmm-core as a whole.
    pub(super) device: String,
    /// Of the process that has to do with it; 0 while there is none.
    pub(super) pid: i32,
    /// Control socket of that process; none for a program that is not ours.
    pub(super) socket: Option<PathBuf>,
    /// What the process calls the device.
    pub(super) id: String,
}

/// All that fit, of VMs that run.
pub(super) async fn find(agent: &Agent, wanted: &FaultTarget) -> Vec<Target> {
    let mut found = Vec::new();
    for vm in agent.all().await {
        let (spec, status) = (vm.spec(), vm.status());
        let runs = matches!(
            status.phase(),
            VmPhase::Running | VmPhase::Paused | VmPhase::Stopping
        );
        if runs && (wanted.vm_id.is_empty() || wanted.vm_id == spec.id) {
            found.extend(of_vm(agent, &spec, &status, wanted));
        }
    }
    found
}

fn of_vm(agent: &Agent, spec: &Spec, status: &VmStatus, wanted: &FaultTarget) -> Vec<Target> {
    let dir = agent.env.vm_dir(&spec.id);
    let vmm_pid = pid_of(status, |process| process.name == "vmm-core");
    let target = |device: &str, pid, socket, id: String| Target {
        vm: spec.id.clone(),
        device: device.to_owned(),
        pid,
        socket,
        id,
    };
    let socket = |kind: DaemonKind| Some(dir.join(format!("{}.sock", kind.stem())));
    let serving = |device: &str| {
        pid_of(status, |process| {
            process.network.is_empty() && process.devices.iter().any(|name| name == device)
        })
    };
    let disks = spec.disks.iter().map(|disk| {
        let pid = serving(&disk.name);
        target(&disk.name, pid, socket(DaemonKind::Blk), disk.name.clone())
    });
    let nics = spec.nics.iter().map(|nic| {
        let network = nic.network.as_deref().unwrap_or_default();
        match agent.env.networks.switch_socket(network) {
            Some(socket) => {
                let pid = pid_of(status, |process| process.network == network);
                target(&nic.name, pid, Some(socket), port_id(&spec.id, &nic.name))
            }
            None => {
                let own = nic
                    .user
                    .is_none()
                    .then(|| socket(DaemonKind::Net))
                    .flatten();
                target(&nic.name, serving(&nic.name), own, nic.name.clone())
            }
        }
    });
    let devices = disks.chain(nics);
    let devices =
        devices.filter(|target| wanted.device.is_empty() || wanted.device == target.device);
    match wanted.process() {
        FaultProcess::Vmm if wanted.device.is_empty() => {
            vec![target("", vmm_pid, Some(vmm_socket(&dir)), String::new())]
        }
        FaultProcess::Vmm => devices
            .map(|found| Target {
                pid: vmm_pid,
                socket: Some(vmm_socket(&dir)),
                id: found.device.clone(),
                ..found
            })
            .collect(),
        FaultProcess::Unspecified | FaultProcess::Daemon => devices.collect(),
        // No VM's: see `experiment`.
        FaultProcess::Agent => Vec::new(),
    }
}

fn pid_of(status: &VmStatus, is_meant: impl Fn(&api::node::ProcessStatus) -> bool) -> i32 {
    let process = status.processes.iter().find(|process| is_meant(process));
    process.map_or(0, |process| process.pid as i32)
}
