//! The service `Devices`: what `vmm-core` sees of a VM's devices, with what the agent knows of their daemons.

use api::{
    node::{
        DeviceDetails, GetDevicesRequest, GetDevicesResponse, ProcessStatus, VmPhase, VmStatus,
        devices_server::Devices,
    },
    validate,
    vmm::DeviceHealth,
};
use tonic::{Request, Response, Status};

use super::Service;
use crate::{
    spec::{OutagePolicy, Spec},
    vm::vmm_devices,
};

/// What nobody can promise of somebody else's daemon.
const NO_FENCE: &str = "writes of a dead daemon that are still in the kernel: it is not started by this agent, so \
     nothing holds its successor back until they are over";

/// Likewise.
const NO_HANG_DETECTION: &str = "an end to its hanging: it has no control socket to ask, and slow storage looks the \
     same, so it is never killed; how long requests have waited for storage is how long it has completed none";

#[tonic::async_trait]
impl Devices for Service {
    async fn get_devices(
        &self,
        request: Request<GetDevicesRequest>,
    ) -> Result<Response<GetDevicesResponse>, Status> {
        let request = request.into_inner();
        validate::node_id(&request.vm_id)?;
        let vm = self.agent.find(&request.vm_id).await?;
        let (spec, status) = (vm.spec(), vm.status());
        let runs = matches!(status.phase(), VmPhase::Running | VmPhase::Paused);
        let dir = self.agent.env.vm_dir(&spec.id);
        let mut seen = match runs {
            // One that is just ending has no health any more.
            true => vmm_devices(&dir, request.max_outages)
                .await
                .unwrap_or_default(),
            false => Vec::new(),
        };
        let devices = names(&spec)
            .into_iter()
            .map(|(name, kind)| {
                let at = seen.iter().position(|device| device.tag == name);
                let health = at.map(|at| seen.swap_remove(at));
                details(name, kind, health, &spec, &status)
            })
            .collect();
        Ok(Response::new(GetDevicesResponse {
            devices,
            paused_by_policy: status.phase() == VmPhase::Paused
                && spec
                    .outage_policies
                    .values()
                    .any(|policy| *policy == OutagePolicy::PauseVm),
        }))
    }
}

/// Names and types of all devices, in the order in which the guest finds them.
fn names(spec: &Spec) -> Vec<(String, String)> {
    let disks = spec.disks.iter().map(|disk| (disk.name.clone(), "blk"));
    let nics = spec.nics.iter().map(|nic| (nic.name.clone(), "net"));
    let others = spec.vhost_user.iter();
    let others = others.map(|device| (device.name.clone(), device.kind.as_str()));
    let seed = spec.cloud_init.iter();
    let seed = seed.map(|_| (validate::SEED_DISK.to_owned(), "blk"));
    disks
        .chain(nics)
        .chain(others)
        .chain(seed)
        .map(|(name, kind)| (name, kind.to_owned()))
        .collect()
}

fn details(
    name: String,
    kind: String,
    mut health: Option<DeviceHealth>,
    spec: &Spec,
    status: &VmStatus,
) -> DeviceDetails {
    let foreign = ProcessStatus::default();
    let serves = |process: &&ProcessStatus| process.devices.contains(&name);
    let process = status.processes.iter().find(serves);
    let is_ours = process.is_some_and(|process| process.name != "passt");
    if let Some(health) = health.as_mut().filter(|_| !is_ours && kind == "blk") {
        health.not_guaranteed.push(NO_FENCE.to_owned());
    }
    let is_foreign = spec.vhost_user.iter().any(|device| device.name == name);
    if let Some(health) = health.as_mut().filter(|_| is_foreign) {
        health.not_guaranteed.push(NO_HANG_DETECTION.to_owned());
    }
    let process = process.unwrap_or(&foreign);
    let known = status.devices.iter().find(|device| device.name == name);
    let waits_since = known.and_then(|known| known.storage_wait_since);
    let waited = waits_since
        .and_then(|since| std::time::SystemTime::try_from(since).ok())
        .and_then(|since| since.elapsed().ok());
    DeviceDetails {
        outage_policy: Some(spec.outage_policy(&name).to_api(&name)),
        failing_requests: known.is_some_and(|known| known.failing_requests),
        storage_wait_ms: waited.map_or(0, |waited| waited.as_millis() as u64),
        name,
        r#type: kind,
        health,
        daemon: process.name.clone(),
        version: process.version.clone(),
        pid: process.pid,
        restarts: process.restarts,
        hangs: process.hangs,
        last_error: process.last_error.clone(),
        incarnation: match process.name.is_empty() {
            true => 0,
            false => process.restarts + 1,
        },
    }
}
