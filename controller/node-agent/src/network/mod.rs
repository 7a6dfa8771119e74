//! Networks of this host: each is a bridge, its addresses, nftables rules, a dnsmasq and, between
//! hosts, a VXLAN device. [`Networks`] knows them all and makes what is there match what was applied;
//! what it needs after its own end is in STATE_DIR/networks.
//!
//! ```text
//! make      all of it, in order, and its end
//! names     what its interfaces are called
//! links     interfaces, addresses, forwarding entries (netlink)
//! firewall  NAT, port forwards, who may reach whom (nft)
//! server    DHCP, DNS, router advertisements (dnsmasq)
//! sysctl    settings of single interfaces
//! record    what survives the agent
//! policy    what NICs let pass
//! switch    the device-net that serves the NICs of all VMs, where that is the network's datapath
//! ports     which NICs those are, and what the switch was told of each (port)
//! ```

mod error;
mod exchange;
mod firewall;
mod forwarding;
mod links;
mod make;
mod names;
mod policy;
mod port;
mod ports;
mod programs;
mod record;
mod server;
mod switch;
mod sysctl;

use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use api::{
    device::Policy,
    node::{Endpoint, NetworkKind, NetworkProcess, NetworkSpec, NetworkStatus, ProcessStatus},
};
use tokio::sync::watch;

pub(crate) use error::NetworkError;
pub(crate) use exchange::Exchangeable;
pub(crate) use port::{PortPlan, port_id};

use self::{forwarding::Forwarding, ports::Ports, record::Pin, server::Server, switch::Switch};
use crate::{
    epoch,
    faults::Knobs,
    spec::Spec,
    vm::{DaemonError, daemon_metrics, error_chain, nics::Nics},
};

/// A network that is being made when a VM wants to start is there in a moment.
const SETTLED_WITHIN: Duration = Duration::from_secs(30);
/// A switch that is being restarted is back in a moment.
const ATTACHED_WITHIN: Duration = Duration::from_secs(20);
/// Figures of a NIC are changed in memory; who asked is answered even if its daemon is not there.
const TUNED_WITHIN: Duration = Duration::from_millis(500);
/// A policy for each NIC, which its daemon reads at once.
const TOLD_WITHIN: Duration = Duration::from_secs(10);
/// NICs of a VM that ended have nothing to drain.
const DETACHED_WITHIN: Duration = Duration::from_secs(10);

/// All networks of the host. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Networks {
    inner: Arc<Inner>,
}

struct Inner {
    state_dir: PathBuf,
    run_dir: PathBuf,
    /// Where the VMs' sockets are.
    vms_dir: PathBuf,
    /// Where device-net is.
    bin_dir: PathBuf,
    host_id: String,
    underlay: Option<IpAddr>,
    knobs: Knobs,
    /// How long a daemon may be silent.
    hang_after: Duration,
    forwarding: Forwarding,
    table: Mutex<BTreeMap<String, Arc<Network>>>,
}

/// One network.
struct Network {
    /// Held while it is worked on.
    work: tokio::sync::Mutex<Made>,
    seen: watch::Sender<Seen>,
    /// NICs of running VMs, where it has a switch.
    ports: Arc<Ports>,
}

/// What exists on its behalf.
#[derive(Default)]
struct Made {
    /// As recorded; `None` when nothing of it may exist.
    spec: Option<NetworkSpec>,
    server: Option<Server>,
    switch: Option<Switch>,
    /// What its switch was upgraded to.
    pin: Option<Pin>,
    /// What running NICs were told by this agent, by VM and NIC.
    policies: BTreeMap<(String, String), Policy>,
}

/// What others may know of it without waiting for the work.
#[derive(Clone, Debug, Default)]
struct Seen {
    spec: NetworkSpec,
    /// Its first application has ended.
    settled: bool,
    /// What is wrong: a google.rpc.Code and words.
    problem: Option<(i32, String)>,
    dhcp: (u32, u64),
}

/// Where a NIC goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The bridge that its tap joins; `None` when it is a port of the network's switch.
    pub(crate) bridge: Option<String>,
    /// 0 for the default.
    pub(crate) mtu: u32,
    /// It may be in VLANs there.
    pub(crate) vlan_aware: bool,
}

impl std::fmt::Debug for Networks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Networks").finish_non_exhaustive()
    }
}

impl Networks {
    /// Reads the records; [`Networks::adopt`] mends what they are about.
    ///
    /// # Errors
    /// When they cannot be read.
    pub(crate) fn open(
        state_dir: &Path,
        run_dir: &Path,
        bin_dir: &Path,
        host_id: &str,
        underlay: Option<IpAddr>,
        knobs: &Knobs,
        hang_after: Duration,
    ) -> Result<Self, NetworkError> {
        let vms_dir = run_dir.join("vms");
        let state_dir = state_dir.join("networks");
        let run_dir = run_dir.join("networks");
        for dir in [&state_dir, &run_dir] {
            fs::create_dir_all(dir).map_err(NetworkError::io("*", "making", dir))?;
        }
        let mut table = BTreeMap::new();
        for record in record::load(&state_dir)? {
            let Some(spec) = record.spec else { continue };
            let id = spec.id.clone();
            let network = Network::new(Made {
                spec: Some(spec),
                pin: record.pin,
                ..Made::default()
            });
            table.insert(id, Arc::new(network));
        }
        Ok(Self {
            inner: Arc::new(Inner {
                forwarding: Forwarding::open(&state_dir)?,
                state_dir,
                run_dir,
                vms_dir,
                bin_dir: bin_dir.to_owned(),
                host_id: host_id.to_owned(),
                knobs: knobs.clone(),
                hang_after,
                underlay,
                table: Mutex::new(table),
            }),
        })
    }

    /// Makes all recorded networks what they should be, in the background.
    pub(crate) fn adopt(&self) {
        for (id, network) in self.table().clone() {
            let networks = self.clone();
            tokio::spawn(async move {
                let mut made = network.work.lock().await;
                let Some(spec) = made.spec.clone() else {
                    return;
                };
                if let Err(error) = networks.work_on(&network, &mut made, spec).await {
                    tracing::warn!(network = id, "{}", error_chain(&error));
                }
            });
        }
    }

    /// Makes a network match `spec`.
    ///
    /// # Errors
    /// When it cannot be made; nothing of a new one is left then.
    pub(crate) async fn apply(&self, spec: NetworkSpec) -> Result<NetworkStatus, NetworkError> {
        let network = self
            .table()
            .entry(spec.id.clone())
            .or_insert_with(|| Arc::new(Network::new(Made::default())))
            .clone();
        let id = spec.id.clone();
        let mut made = network.work.lock().await;
        epoch::recheck()?;
        self.work_on(&network, &mut made, spec).await?;
        drop(made);
        Ok(self.status(&id, &network))
    }

    /// Removes a network. One that is not there is no error.
    ///
    /// # Errors
    /// When NICs are in it, or the kernel refuses.
    pub(crate) async fn delete(&self, id: &str) -> Result<(), NetworkError> {
        let Some(network) = self.find(id) else {
            return Ok(());
        };
        let mut made = network.work.lock().await;
        epoch::recheck()?;
        if let Some(spec) = made.spec.clone() {
            let own = [names::vxlan(id), names::uplink(id)];
            let mut users = network.ports.names();
            if spec.kind() != NetworkKind::Bridged {
                let taps = links::ports(&names::bridge(&spec)).into_iter();
                users.extend(taps.filter(|port| !own.contains(port)));
            }
            if !users.is_empty() {
                return Err(NetworkError::InUse {
                    id: id.to_owned(),
                    users,
                });
            }
            self.unmake(&mut made, &spec).await?;
        }
        self.table().remove(id);
        Ok(())
    }

    /// All networks, by id.
    pub(crate) fn list(&self) -> Vec<NetworkStatus> {
        let table = self.table().clone();
        table
            .iter()
            .map(|(id, network)| self.status(id, network))
            .collect()
    }

    /// Where a NIC of a VM that is about to start goes.
    ///
    /// # Errors
    /// When the network is not there or does not know the NIC.
    pub(crate) async fn place(&self, id: &str, vm: &str, nic: &str) -> Result<Place, NetworkError> {
        let network = self
            .find(id)
            .ok_or_else(|| NetworkError::NotFound { id: id.to_owned() })?;
        let mut seen = network.seen.subscribe();
        let settled = seen.wait_for(|seen| seen.settled);
        let seen = match tokio::time::timeout(SETTLED_WITHIN, settled).await {
            Ok(Ok(seen)) => seen.clone(),
            _ => {
                return Err(NetworkError::NotReady {
                    id: id.to_owned(),
                    problem: "it is still being made".into(),
                });
            }
        };
        if let Some((_, problem)) = seen.problem {
            return Err(NetworkError::NotReady {
                id: id.to_owned(),
                problem,
            });
        }
        seen.place(vm, nic).ok_or_else(|| NetworkError::UnknownNic {
            id: id.to_owned(),
            vm: vm.to_owned(),
            nic: nic.to_owned(),
        })
    }

    /// As [`Networks::place`], by what is known without waiting.
    pub(crate) fn known_place(&self, id: &str, vm: &str, nic: &str) -> Option<Place> {
        let network = self.find(id)?;
        let seen = network.seen.borrow();
        seen.place(vm, nic)
    }

    /// Makes a NIC a port of its network's switch; on return it can be connected to.
    ///
    /// # Errors
    /// When the network is not there, or its switch does not take the NIC.
    pub(crate) async fn attach(&self, id: &str, plan: PortPlan) -> Result<(), NetworkError> {
        let network = self
            .find(id)
            .ok_or_else(|| NetworkError::NotFound { id: id.to_owned() })?;
        let port = port_id(&plan.vm, &plan.nic);
        network.ports.want(plan, false);
        let served = network.ports.served(&port, ATTACHED_WITHIN).await;
        served.map_err(|problem| NetworkError::Switch {
            id: id.to_owned(),
            code: problem.code,
            message: problem.message,
        })
    }

    /// A NIC of a VM that an earlier agent left running is a port of its network's switch.
    pub(crate) fn expect(&self, id: &str, plan: PortPlan) {
        if let Some(network) = self.find(id) {
            network.ports.want(plan, true);
        }
    }

    /// Takes over what may change of a running VM's NICs, as far as they are ports of switches.
    pub(crate) async fn tune(&self, spec: &Spec) {
        let mut tuned = Vec::new();
        for nic in &spec.nics {
            if let Some(network) = nic.network.as_deref().and_then(|id| self.find(id)) {
                network
                    .ports
                    .tune(&port_id(&spec.id, &nic.name), nic.tuning);
                tuned.push(network);
            }
        }
        for network in tuned {
            // What was not told in time is told later.
            let _ = network.ports.told(TUNED_WITHIN).await;
        }
    }

    /// A VM is gone, and with it all ports that its NICs were.
    pub(crate) async fn withdraw(&self, vm: &str) {
        let networks: Vec<_> = self.table().values().cloned().collect();
        for network in networks {
            network.ports.withdraw(vm, DETACHED_WITHIN).await;
        }
    }

    /// Where the network's switch answers; `None` when it has none.
    pub(crate) fn switch_socket(&self, id: &str) -> Option<PathBuf> {
        let network = self.find(id)?;
        let dir = self.inner.run_dir.join(id);
        make::is_switched(&network.seen.borrow().spec).then(|| switch::Plan::control_socket(&dir))
    }

    /// The switches that serve NICs of a VM: where they answer, and what they call these NICs.
    pub(crate) fn switched_nics(&self, vm: &str) -> Vec<(PathBuf, Vec<String>)> {
        let table = self.table().clone();
        let switches = table.iter().map(|(id, network)| {
            let nics = network.ports.of_vm(vm);
            let ids = nics.iter().map(|nic| port_id(vm, nic)).collect();
            (
                switch::Plan::control_socket(&self.inner.run_dir.join(id)),
                ids,
            )
        });
        switches
            .filter(|(_, ids): &(_, Vec<_>)| !ids.is_empty())
            .collect()
    }

    /// The switches that serve NICs of a VM.
    pub(crate) fn processes_of(&self, vm: &str) -> Vec<ProcessStatus> {
        let table = self.table().clone();
        let serving = table.iter().filter_map(|(id, network)| {
            let nics = network.ports.of_vm(vm);
            let switch = self
                .switch_process(id, network)
                .filter(|_| !nics.is_empty())?;
            Some(ProcessStatus {
                name: switch.name,
                pid: switch.pid,
                devices: nics,
                restarts: switch.restarts,
                sandbox: switch.sandbox,
                last_error: switch.last_error,
                log: switch.log,
                network: id.clone(),
                version: network.ports.daemon().version,
                build: network.ports.daemon().build,
                ..ProcessStatus::default()
            })
        });
        serving.collect()
    }

    /// What a NIC may let pass now; `None` when its network does not know it.
    pub(crate) fn policy(&self, id: &str, vm: &str, nic: &str) -> Option<Policy> {
        let network = self.find(id)?;
        let seen = network.seen.borrow();
        policy::of(&seen.spec, vm, nic)
    }

    /// The metrics of the networks' switches, by network. Their NICs are called as those of VMs' own
    /// daemons are.
    pub(crate) async fn switch_metrics(&self) -> Vec<(String, String)> {
        let mut metrics = Vec::new();
        let networks = self.table().clone();
        for (id, network) in networks {
            if !make::is_switched(&network.seen.borrow().spec) {
                continue;
            }
            for text in daemon_metrics(&self.inner.run_dir.join(&id)).await {
                metrics.push((id.clone(), network.ports.with_names(text)));
            }
        }
        metrics
    }

    async fn work_on(
        &self,
        network: &Network,
        made: &mut Made,
        spec: NetworkSpec,
    ) -> Result<(), NetworkError> {
        let is_new = made.spec.is_none();
        let result = self.make(network, made, &spec).await;
        if result.is_err() && is_new {
            let undone = self.unmake(made, &spec).await;
            if let Err(error) = undone {
                tracing::warn!(network = spec.id, "{}", error_chain(&error));
            }
        }
        // NICs that start from now on get this one.
        network.seen.send_modify(|seen| seen.spec = spec.clone());
        network.ports.set_spec(&spec);
        let result = match result {
            Ok(()) if make::is_switched(&spec) => tell_ports(network, &spec).await,
            Ok(()) => self.tell_policies(made, &spec).await,
            failed => failed,
        };
        network.seen.send_replace(Seen {
            problem: result
                .as_ref()
                .err()
                .map(|error| (error.code() as i32, error_chain(error))),
            dhcp: made.server.as_ref().map(Server::state).unwrap_or_default(),
            settled: true,
            spec,
        });
        result
    }

    /// Tells the NICs that run already. One whose daemon is not there gets its policy with its start.
    async fn tell_policies(&self, made: &mut Made, spec: &NetworkSpec) -> Result<(), NetworkError> {
        let mut told = std::mem::take(&mut made.policies);
        for endpoint in &spec.endpoints {
            let (vm, nic) = (&endpoint.vm_id, &endpoint.nic);
            let nics = Nics::of(&self.inner.vms_dir.join(vm));
            let Some(policy) = policy::of(spec, vm, nic).filter(|_| nics.are_served()) else {
                continue;
            };
            let key = (vm.clone(), nic.clone());
            if told.remove(&key).as_ref() != Some(&policy) {
                match nics.set_policy(nic, policy.clone()).await {
                    Ok(()) => {}
                    // It died; its successor asks for the policy.
                    Err(DaemonError::Connect { .. }) => continue,
                    Err(source) => {
                        return Err(NetworkError::Policy {
                            id: spec.id.clone(),
                            vm: vm.clone(),
                            nic: nic.clone(),
                            source: Box::new(source),
                        });
                    }
                }
            }
            made.policies.insert(key, policy);
        }
        Ok(())
    }

    fn status(&self, id: &str, network: &Network) -> NetworkStatus {
        let seen = network.seen.borrow().clone();
        // Without waiting for work that goes on; what was seen last will do then.
        let (dhcp_pid, dhcp_restarts) = match network.work.try_lock() {
            Ok(made) => made.server.as_ref().map(Server::state).unwrap_or_default(),
            Err(_) => seen.dhcp,
        };
        let (error_code, error) = seen.problem.clone().unwrap_or_default();
        let dnsmasq = (dhcp_pid != 0 || dhcp_restarts != 0).then(|| NetworkProcess {
            name: programs::DNSMASQ.0.to_owned(),
            pid: dhcp_pid,
            restarts: dhcp_restarts,
            log: server::log(&self.inner.run_dir.join(id))
                .display()
                .to_string(),
            ..NetworkProcess::default()
        });
        let processes = self.switch_process(id, network).into_iter().chain(dnsmasq);
        NetworkStatus {
            id: id.to_owned(),
            ready: seen.settled && seen.problem.is_none(),
            bridge: make::bridge_of(&seen.spec).unwrap_or_default(),
            observed_revision: seen.spec.revision,
            error_code,
            error,
            dhcp_pid,
            dhcp_restarts,
            leases: server::leases(&self.inner.run_dir.join(id)),
            processes: processes.collect(),
        }
    }

    fn switch_process(&self, id: &str, network: &Network) -> Option<NetworkProcess> {
        if !make::is_switched(&network.seen.borrow().spec) {
            return None;
        }
        let daemon = network.ports.daemon();
        let log = switch::Plan::log(&self.inner.run_dir.join(id));
        Some(NetworkProcess {
            name: switch::PROGRAM.to_owned(),
            pid: daemon.process.map_or(0, |process| process.pid() as u32),
            restarts: daemon.restarts,
            sandbox: daemon.sandbox,
            last_error: daemon.last_error,
            log: log.display().to_string(),
            nics: network.ports.names(),
        })
    }

    fn find(&self, id: &str) -> Option<Arc<Network>> {
        self.table().get(id).cloned()
    }

    fn table(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Network>>> {
        self.inner
            .table
            .lock()
            .expect("nothing panics under this lock")
    }
}

impl Network {
    fn new(made: Made) -> Self {
        let spec = made.spec.clone().unwrap_or_default();
        let ports = Arc::new(Ports::default());
        ports.set_spec(&spec);
        Self {
            ports,
            work: tokio::sync::Mutex::new(made),
            seen: watch::Sender::new(Seen {
                spec,
                ..Seen::default()
            }),
        }
    }
}

impl Seen {
    /// Where one of its NICs goes.
    fn place(&self, vm: &str, nic: &str) -> Option<Place> {
        let is_it = |endpoint: &&Endpoint| endpoint.vm_id == vm && endpoint.nic == nic;
        let _: &Endpoint = self.spec.endpoints.iter().find(is_it)?;
        Some(Place {
            bridge: match make::is_switched(&self.spec) {
                true => None,
                false => make::bridge_of(&self.spec),
            },
            mtu: make::mtu(&self.spec),
            vlan_aware: self.spec.vlan_aware,
        })
    }
}

async fn tell_ports(network: &Network, spec: &NetworkSpec) -> Result<(), NetworkError> {
    let told = network.ports.told(TOLD_WITHIN).await;
    told.map_err(|(port, problem)| NetworkError::Port {
        id: spec.id.clone(),
        vm: port.vm,
        nic: port.nic,
        code: problem.code,
        message: problem.message,
    })
}
