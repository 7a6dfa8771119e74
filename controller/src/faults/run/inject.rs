//! A run's dealings with its host: faults are begun, kept alive and ended.

use std::collections::BTreeMap;
use std::time::Duration;

use api::controller::fault_injection::Action;
use api::controller::{
    FaultInjection, Operation, OperationError, UpgradeAction, UpgradeDevicesRequest,
};
use api::names::Name;
use api::node::{self, ArmFaultsRequest, FaultProcess};
use api::validate::UpgradeTarget;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::{End, LOOK_INTERVAL, Run, Upgrading};
use crate::commands;
use crate::faults::schedule::Beginning;
use crate::faults::scope::is_hosts;
use crate::node::Node;
use crate::reconciler::decode;

const DEFAULT_TTL_MS: u32 = 10_000;
/// How long a host that is away may take until its faults are known to be over: its agent ends them by
/// itself by then.
const DISARM_TIMEOUT: Duration = Duration::from_secs(90);

impl Run {
    /// Begins a fault on everything that its target stands for; answers with what has to be ended.
    pub(super) async fn begin(&mut self, beginning: &Beginning) -> Result<Vec<String>, End> {
        let index = beginning.fault;
        let injection = self.spec.faults[index].clone();
        self.ledger.begin(index, self.began.elapsed_ms());
        if let Some(Action::Upgrade(upgrade)) = &injection.action {
            self.begin_upgrade(index, &injection, upgrade).await;
            return Ok(Vec::new());
        }
        let host_faults = self.host_faults(beginning, &injection);
        if host_faults.is_empty() {
            let words = "its target stands for no VM; see `vmctl vm list`";
            self.ledger.problem(index, words.to_owned());
            return Ok(Vec::new());
        }
        let all = host_faults.iter().flat_map(|(_, faults)| faults);
        let ids: Vec<String> = all.map(|fault| fault.id.clone()).collect();
        for (node, faults) in host_faults {
            let request = ArmFaultsRequest {
                experiment_id: self.host_id.clone(),
                faults,
                ttl_ms: u64::from(self.ttl_ms()),
                seed: beginning.seed,
            };
            self.arm(&node, request, index, &injection).await?;
        }
        Ok(ids)
    }

    /// Has one host begin a fault.
    async fn arm(
        &mut self,
        node: &Node,
        request: ArmFaultsRequest,
        index: usize,
        injection: &FaultInjection,
    ) -> Result<(), End> {
        match node.arm_faults(request).await {
            Ok(statuses) => {
                self.renewed = Instant::now();
                self.ledger.update(&statuses, &self.began);
            }
            Err(status) if is_switched_off(&status) => return Err(refused(&status)),
            // An agent that is killed does not answer any more; one that is away already is not hit.
            Err(status) if is_agents(injection) && has_hung_up(&status) => {
                let at_ms = self.began.elapsed_ms();
                self.ledger
                    .hit(index, at_ms, "", "", "the agent hung up".into());
            }
            Err(status) => {
                let words = api::errors::explain(&status);
                tracing::warn!(fault = %injection.id, %status, "the host did not begin a fault");
                self.ledger.problem(index, words);
            }
        }
        Ok(())
    }

    /// Connections to the hosts that the experiment has to do with.
    pub(super) fn nodes(&self) -> Vec<Node> {
        let ids = self.scope.hosts(&self.spec, &self.hosts.fleet());
        ids.iter().filter_map(|id| self.hosts.get(id)).collect()
    }

    /// Has the target's daemons exchanged, as `vmctl device upgrade` does.
    async fn begin_upgrade(
        &mut self,
        index: usize,
        injection: &FaultInjection,
        upgrade: &UpgradeAction,
    ) {
        let device = injection.target.clone().unwrap_or_default().device;
        for vm in self.scope.vms_of(injection, &self.project) {
            let Ok(name) = Name::parse_vm(&vm.name) else {
                continue;
            };
            let (target, at) = match device.as_str() {
                "" => (UpgradeTarget::Vm(name), vm.name.clone()),
                device => {
                    let at = format!("{}/devices/{device}", vm.name);
                    (UpgradeTarget::Device(name, device.to_owned()), at)
                }
            };
            let request = UpgradeDevicesRequest {
                target: at,
                binary: upgrade.binary.clone(),
                ..Default::default()
            };
            match commands::upgrade_devices(&self.store, &target, &request).await {
                Ok(operation) => self.upgrades.push(Upgrading {
                    operation: operation.name,
                    fault: index,
                    vm: vm.name,
                    device: device.clone(),
                }),
                Err(error) => {
                    let error = crate::reconciler::with_source(&error);
                    self.ledger.problem(index, error);
                }
            }
        }
    }

    /// Upgrades that were done are hits.
    pub(super) async fn look_at_upgrades(&mut self) {
        for upgrading in std::mem::take(&mut self.upgrades) {
            let Ok(Some(item)) = self.store.get(&upgrading.operation).await else {
                continue;
            };
            let Ok(operation) = decode::<Operation>(&item.key, &item.value) else {
                continue;
            };
            let fault = upgrading.fault;
            match (operation.done, operation.error) {
                (false, _) => self.upgrades.push(upgrading),
                (true, Some(error)) => self.ledger.problem(fault, error.message),
                (true, None) => {
                    let at_ms = operation.end_time.map(|time| self.began.to_ms(&time));
                    let at_ms = at_ms.unwrap_or_else(|| self.began.elapsed_ms());
                    let Upgrading { vm, device, .. } = upgrading;
                    self.ledger
                        .hit(fault, at_ms, &vm, &device, "upgraded".into());
                }
            }
        }
    }

    /// The fault as hosts are told it, once for each VM of its target; of one that is done to hosts, once
    /// for each of these.
    fn host_faults(
        &mut self,
        beginning: &Beginning,
        injection: &FaultInjection,
    ) -> Vec<(Node, Vec<node::Fault>)> {
        let target = injection.target.clone().unwrap_or_default();
        let fault = match injection.action.clone() {
            Some(Action::Rule(mut rule)) => {
                rule.duration_ms = u64::from(beginning.until_ms - beginning.at_ms);
                node::fault::Fault::Rule(rule)
            }
            Some(Action::Process(process)) => node::fault::Fault::Process(process),
            Some(Action::Host(host)) => node::fault::Fault::Host(host),
            // It is no fault of a host's.
            Some(Action::Upgrade(_)) | None => return Vec::new(),
        };
        if is_hosts(injection) {
            let target = (target.process() == FaultProcess::Agent).then(|| node::FaultTarget {
                process: target.process,
                ..Default::default()
            });
            let hosts = self.scope.hosts_of(injection, &self.hosts.fleet());
            let several = hosts.len() > 1;
            let mut faults = Vec::with_capacity(hosts.len());
            for (index, host) in hosts.iter().enumerate() {
                let Some(node) = self.hosts.get(host) else {
                    continue;
                };
                let mut id = format!("{}.{}", injection.id, beginning.number);
                if several {
                    id = format!("{id}.{index}");
                }
                self.ledger.open(&id, beginning.fault, "", "");
                let fault = node::Fault {
                    id,
                    target: target.clone(),
                    fault: Some(fault.clone()),
                };
                faults.push((node, vec![fault]));
            }
            return faults;
        }
        let vms = self.scope.vms_of(injection, &self.project);
        let mut faults: BTreeMap<&str, Vec<node::Fault>> = BTreeMap::new();
        for (index, vm) in vms.iter().enumerate() {
            if self.hosts.get(&vm.host).is_none() {
                continue;
            }
            let id = format!("{}.{}.{index}", injection.id, beginning.number);
            self.ledger
                .open(&id, beginning.fault, &vm.name, &target.device);
            faults.entry(&vm.host).or_default().push(node::Fault {
                id,
                target: Some(node::FaultTarget {
                    vm_id: vm.node_id.clone(),
                    device: target.device.clone(),
                    process: target.process,
                }),
                fault: Some(fault.clone()),
            });
        }
        let by_host = faults.into_iter();
        by_host
            .filter_map(|(host, faults)| Some((self.hosts.get(host)?, faults)))
            .collect()
    }

    /// Ends beginnings; one that a host away cannot end now ends by itself there.
    pub(super) async fn disarm(&mut self, ids: Vec<String>) {
        for node in self.nodes() {
            match node.disarm_faults(&self.host_id, ids.clone()).await {
                Ok(statuses) => self.ledger.update(&statuses, &self.began),
                Err(status) => {
                    tracing::warn!(%status, "a host did not end faults; they end by themselves");
                }
            }
        }
        let at_ms = self.began.elapsed_ms();
        for id in ids {
            self.ledger.close(&id, at_ms);
        }
    }

    /// Ends everything that the experiment has on hosts.
    pub(super) async fn disarm_all(&mut self) {
        let deadline = Instant::now() + DISARM_TIMEOUT;
        for node in self.nodes() {
            self.disarm_host(&node, deadline).await;
        }
    }

    async fn disarm_host(&mut self, node: &Node, deadline: Instant) {
        loop {
            match node.disarm_faults(&self.host_id, Vec::new()).await {
                Ok(statuses) => {
                    self.ledger.update(&statuses, &self.began);
                    return;
                }
                Err(status) if is_away(&status) && Instant::now() < deadline => {
                    self.say("waits for the host, to end its faults".to_owned());
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
                Err(status) => {
                    tracing::warn!(%status, "the host did not end the faults; they end by themselves");
                    return;
                }
            }
        }
    }

    /// Faults live on.
    pub(super) async fn renew(&mut self) -> Result<(), End> {
        let request = ArmFaultsRequest {
            experiment_id: self.host_id.clone(),
            faults: Vec::new(),
            ttl_ms: u64::from(self.ttl_ms()),
            seed: 0,
        };
        self.renewed = Instant::now();
        for node in self.nodes() {
            match node.arm_faults(request.clone()).await {
                Err(status) if !is_away(&status) => return Err(refused(&status)),
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn ttl_ms(&self) -> u32 {
        match self.spec.ttl_ms {
            0 => DEFAULT_TTL_MS,
            ttl_ms => ttl_ms,
        }
    }
}

fn is_agents(fault: &FaultInjection) -> bool {
    let target = fault.target.as_ref();
    target.is_some_and(|target| target.process() == FaultProcess::Agent)
}

/// In the midst of a call.
fn has_hung_up(status: &Status) -> bool {
    is_away(status) && status.code() != Code::Unavailable
}

fn is_away(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown
    )
}

/// The host does no faults at all.
fn is_switched_off(status: &Status) -> bool {
    let reason = api::errors::reason(status);
    status.code() == Code::Unimplemented
        || matches!(reason.as_deref(), Some("FAULTS_OFF" | "FAULTS_NOT_ALLOWED"))
}

fn refused(status: &Status) -> End {
    let message = match status.code() {
        Code::Unimplemented => "the host's agent knows no faults; upgrade node-agent".to_owned(),
        _ => api::errors::explain(status),
    };
    End::Failed(OperationError {
        code: status.code() as i32,
        message,
        reason: api::errors::reason(status).unwrap_or_else(|| "HOST_REFUSED".to_owned()),
    })
}
