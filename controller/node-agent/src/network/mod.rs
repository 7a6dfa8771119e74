//! Networks of this host: each is a bridge, its addresses, nftables rules, a dnsmasq and, between
//! hosts, a VXLAN device. [`Networks`] knows them all and makes what is there match what was applied;
//! what it needs after its own end is in STATE_DIR/networks.
//!
//! ```text
//! links     interfaces, addresses, forwarding entries (netlink)
//! firewall  NAT, port forwards, who may reach whom (nft)
//! server    DHCP, DNS, router advertisements (dnsmasq)
//! sysctl    settings of single interfaces
//! record    what survives the agent
//! policy    what NICs let pass
//! ```

mod error;
mod firewall;
mod forwarding;
mod links;
mod policy;
mod programs;
mod record;
mod server;
mod sysctl;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use api::{
    device::Policy,
    node::{NetworkKind, NetworkSpec, NetworkStatus},
};
use ipnet::IpNet;
use tokio::sync::watch;

pub(crate) use error::NetworkError;

use self::{
    firewall::Ruleset,
    forwarding::Forwarding,
    links::{Links, Vxlan},
    server::Server,
};
use crate::{
    tap::fnv1a,
    vm::{DaemonError, error_chain, nics::Nics},
};

/// IFNAMSIZ less the NUL.
const MAX_NAME_BYTES: usize = 15;
/// VXLAN over IPv4 takes 50 bytes of Ethernet's 1500.
const OVERLAY_MTU: u32 = 1450;
/// A network that is being made when a VM wants to start is there in a moment.
const SETTLED_WITHIN: Duration = Duration::from_secs(30);

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
    host_id: String,
    underlay: Option<IpAddr>,
    forwarding: Forwarding,
    table: Mutex<BTreeMap<String, Arc<Network>>>,
}

/// One network.
struct Network {
    /// Held while it is worked on.
    work: tokio::sync::Mutex<Made>,
    seen: watch::Sender<Seen>,
}

/// What exists on its behalf.
#[derive(Default)]
struct Made {
    /// As recorded; `None` when nothing of it may exist.
    spec: Option<NetworkSpec>,
    server: Option<Server>,
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
    /// The bridge that its tap joins.
    pub(crate) bridge: String,
    /// 0 for the default.
    pub(crate) mtu: u32,
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
        host_id: &str,
        underlay: Option<IpAddr>,
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
                host_id: host_id.to_owned(),
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
        self.work_on(&network, &mut made, spec).await?;
        drop(made);
        Ok(self.status(&id, &network))
    }

    /// Removes a network. One that is not there is no error.
    ///
    /// # Errors
    /// When NICs are in it, or the kernel refuses.
    pub(crate) async fn delete(&self, id: &str) -> Result<(), NetworkError> {
        let Some(network) = self.table().get(id).cloned() else {
            return Ok(());
        };
        let mut made = network.work.lock().await;
        if let Some(spec) = made.spec.clone() {
            let vxlan = vxlan_name(id);
            let mut taps = links::ports(&self.bridge_name(&spec));
            taps.retain(|port| *port != vxlan);
            if spec.kind() != NetworkKind::Bridged && !taps.is_empty() {
                return Err(NetworkError::InUse {
                    id: id.to_owned(),
                    taps,
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
            .table()
            .get(id)
            .cloned()
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
        let known = |endpoint: &&api::node::Endpoint| endpoint.vm_id == vm && endpoint.nic == nic;
        if !seen.spec.endpoints.iter().any(|endpoint| known(&endpoint)) {
            return Err(NetworkError::UnknownNic {
                id: id.to_owned(),
                vm: vm.to_owned(),
                nic: nic.to_owned(),
            });
        }
        Ok(Place {
            bridge: self.bridge_name(&seen.spec),
            mtu: mtu(&seen.spec),
        })
    }

    /// What a NIC may let pass now; `None` when its network does not know it.
    pub(crate) fn policy(&self, id: &str, vm: &str, nic: &str) -> Option<Policy> {
        let network = self.table().get(id).cloned()?;
        let seen = network.seen.borrow();
        policy::of(&seen.spec, vm, nic)
    }

    async fn work_on(
        &self,
        network: &Network,
        made: &mut Made,
        spec: NetworkSpec,
    ) -> Result<(), NetworkError> {
        let is_new = made.spec.is_none();
        let result = self.make(made, &spec).await;
        if result.is_err() && is_new {
            let undone = self.unmake(made, &spec).await;
            if let Err(error) = undone {
                tracing::warn!(network = spec.id, "{}", error_chain(&error));
            }
        }
        // NICs that start from now on get this one.
        network.seen.send_modify(|seen| seen.spec = spec.clone());
        let result = match result {
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

    /// Checks first, then records what will exist, then makes it.
    async fn make(&self, made: &mut Made, spec: &NetworkSpec) -> Result<(), NetworkError> {
        let id = &spec.id;
        let bridge = self.bridge_name(spec);
        if spec.kind() == NetworkKind::Bridged {
            check_bridge(&bridge)?;
            made.spec = Some(spec.clone());
            return record::save(&self.inner.state_dir, spec);
        }
        if spec.datapath() == api::node::Datapath::Switch {
            return Err(NetworkError::Datapath(
                "DATAPATH_SWITCH is not served by this version of node-agent; use DATAPATH_KERNEL",
            ));
        }
        programs::find(id, programs::NFT)?;
        let dir = self.inner.run_dir.join(id);
        let plan = server::is_wanted(spec)
            .then(|| server::Plan::new(spec, &bridge, &dir))
            .transpose()?;
        if !spec.uplink.is_empty() && !links::exists(&spec.uplink) {
            return Err(NetworkError::NoUplink {
                uplink: spec.uplink.clone(),
            });
        }
        let vxlan = self.vxlan(spec)?;
        let links = Links::open(id)?;
        for net in gateways(spec) {
            if let Some((interface, other)) = links.overlapping(&bridge, net).await? {
                return Err(NetworkError::Overlap {
                    subnet: net.trunc().to_string(),
                    other: other.to_string(),
                    interface,
                });
            }
        }
        let names = [Some(&bridge), vxlan.as_ref().map(|vxlan| &vxlan.name)];
        if made.spec.is_none()
            && let Some(name) = names.into_iter().flatten().find(|name| links::exists(name))
        {
            return Err(NetworkError::Exists {
                id: id.clone(),
                name: name.clone(),
            });
        }
        record::save(&self.inner.state_dir, spec)?;
        made.spec = Some(spec.clone());
        fs::create_dir_all(&dir).map_err(NetworkError::io(id, "making", &dir))?;
        let mac = self.bridge_mac(id);
        links.ensure_bridge(&bridge, mac, mtu(spec)).await?;
        self.settings(spec, &bridge)?;
        links.ensure_addresses(&bridge, &gateways(spec)).await?;
        match &vxlan {
            Some(vxlan) => links.ensure_vxlan(vxlan, &bridge, mtu(spec)).await?,
            None => links.remove(&vxlan_name(id)).await?,
        }
        let ruleset = Ruleset {
            spec,
            bridge: &bridge,
            vxlan: vxlan.as_ref().map(|vxlan| vxlan.name.as_str()),
        };
        firewall::apply(&ruleset).await?;
        match plan {
            Some(plan) => made.server = Some(plan.ensure(made.server.take()).await?),
            None => self.stop_server(made, &dir).await,
        }
        Ok(())
    }

    /// Removes all that may exist of a network.
    async fn unmake(&self, made: &mut Made, spec: &NetworkSpec) -> Result<(), NetworkError> {
        if made.spec.is_none() {
            return Ok(());
        }
        let id = &spec.id;
        if spec.kind() != NetworkKind::Bridged {
            let dir = self.inner.run_dir.join(id);
            self.stop_server(made, &dir).await;
            firewall::remove(id).await?;
            let links = Links::open(id)?;
            links.remove(&vxlan_name(id)).await?;
            links.remove(&self.bridge_name(spec)).await?;
            self.inner.forwarding.release(id)?;
            match fs::remove_dir_all(&dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(NetworkError::io(id, "removing", &dir)(error));
                }
                _ => {}
            }
        }
        record::remove(&self.inner.state_dir, id)?;
        made.spec = None;
        Ok(())
    }

    async fn stop_server(&self, made: &mut Made, dir: &Path) {
        match made.server.take() {
            Some(server) => server.stop().await,
            None => server::stop_strays(dir).await,
        }
    }

    /// The bridge's settings go with it; those of other interfaces are noted.
    fn settings(&self, spec: &NetworkSpec, bridge: &str) -> Result<(), NetworkError> {
        let id = &spec.id;
        let nets = gateways(spec);
        let has_ipv6 = nets.iter().any(|net| net.addr().is_ipv6());
        let routes = spec.kind() == NetworkKind::Nat;
        let flag = |on: bool| if on { "1" } else { "0" };
        let ipv6 = |name: &str| sysctl::path("ipv6", bridge, name);
        // What guests advertise is none of the host's business.
        sysctl::set(id, &ipv6("accept_ra"), "0")?;
        sysctl::set(id, &ipv6("autoconf"), "0")?;
        // A bridge without ports would wait for ever to see whether others have its address.
        sysctl::set(id, &ipv6("accept_dad"), "0")?;
        sysctl::set(id, &ipv6("disable_ipv6"), flag(!has_ipv6))?;
        let ipv4 = |name: &str| sysctl::path("ipv4", bridge, name);
        sysctl::set(id, &ipv4("forwarding"), flag(routes))?;
        sysctl::set(id, &ipv4("route_localnet"), flag(routes))?;
        // 8: no ARP answers for any address of the host. 1: for the bridge's own only.
        let arp_ignore = if nets.is_empty() { "8" } else { "1" };
        sysctl::set(id, &ipv4("arp_ignore"), arp_ignore)?;
        if routes {
            let uplinks = match spec.uplink.as_str() {
                "" => sysctl::uplinks(),
                uplink => vec![uplink.to_owned()],
            };
            self.inner.forwarding.hold(id, bridge, &uplinks, has_ipv6)?;
        } else {
            self.inner.forwarding.release(id)?;
        }
        Ok(())
    }

    fn vxlan(&self, spec: &NetworkSpec) -> Result<Option<Vxlan>, NetworkError> {
        let Some(overlay) = &spec.overlay else {
            return Ok(None);
        };
        let given: Option<IpAddr> = overlay.underlay_address.parse().ok();
        let local = given
            .or(self.inner.underlay)
            .ok_or(NetworkError::NoUnderlay)?;
        let mut entries = BTreeSet::new();
        for peer in &overlay.peers {
            let Ok(host) = peer.underlay_address.parse::<IpAddr>() else {
                continue;
            };
            entries.insert(Vxlan::flood_to(host));
            entries.extend(
                peer.macs
                    .iter()
                    .filter_map(|mac| Some((parse_mac(mac)?, host))),
            );
        }
        Ok(Some(Vxlan {
            name: vxlan_name(&spec.id),
            vni: overlay.vni,
            local,
            port: overlay.port as u16,
            entries,
        }))
    }

    fn status(&self, id: &str, network: &Network) -> NetworkStatus {
        let seen = network.seen.borrow().clone();
        // Without waiting for work that goes on; what was seen last will do then.
        let (dhcp_pid, dhcp_restarts) = match network.work.try_lock() {
            Ok(made) => made.server.as_ref().map(Server::state).unwrap_or_default(),
            Err(_) => seen.dhcp,
        };
        let (error_code, error) = seen.problem.clone().unwrap_or_default();
        NetworkStatus {
            id: id.to_owned(),
            ready: seen.settled && seen.problem.is_none(),
            bridge: self.bridge_name(&seen.spec),
            observed_revision: seen.spec.revision,
            error_code,
            error,
            dhcp_pid,
            dhcp_restarts,
            leases: server::leases(&self.inner.run_dir.join(id)),
        }
    }

    fn bridge_name(&self, spec: &NetworkSpec) -> String {
        match spec.bridge.as_str() {
            "" => interface_name("mb", &spec.id),
            bridge => bridge.to_owned(),
        }
    }

    /// Locally administered, and another one on each host of an overlay.
    fn bridge_mac(&self, id: &str) -> [u8; 6] {
        let hash = fnv1a(format!("{}/{id}", self.inner.host_id).as_bytes()).to_be_bytes();
        [0x02, hash[0], hash[1], hash[2], hash[3], hash[4]]
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
        Self {
            work: tokio::sync::Mutex::new(made),
            seen: watch::Sender::new(Seen {
                spec,
                ..Seen::default()
            }),
        }
    }
}

fn check_bridge(bridge: &str) -> Result<(), NetworkError> {
    if !links::exists(bridge) {
        return Err(NetworkError::NoBridge {
            bridge: bridge.to_owned(),
        });
    }
    if !links::is_bridge(bridge) {
        return Err(NetworkError::NotABridge {
            bridge: bridge.to_owned(),
        });
    }
    Ok(())
}

fn gateways(spec: &NetworkSpec) -> Vec<IpNet> {
    [&spec.ipv4_gateway, &spec.ipv6_gateway]
        .into_iter()
        .filter_map(|text| text.parse().ok())
        .collect()
}

fn mtu(spec: &NetworkSpec) -> u32 {
    match (spec.mtu, &spec.overlay) {
        (0, Some(_)) => OVERLAY_MTU,
        (mtu, _) => mtu,
    }
}

fn vxlan_name(id: &str) -> String {
    interface_name("mx", id)
}

/// Readable where it fits.
fn interface_name(prefix: &str, id: &str) -> String {
    let readable = format!("{prefix}-{id}");
    if readable.len() <= MAX_NAME_BYTES {
        return readable;
    }
    format!("{prefix}.{:012x}", fnv1a(id.as_bytes()) & 0xffff_ffff_ffff)
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut octets = text.split(':');
    for octet in &mut mac {
        *octet = u8::from_str_radix(octets.next()?, 16).ok()?;
    }
    octets.next().is_none().then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_fit_and_do_not_collide() {
        assert_eq!(interface_name("mb", "front"), "mb-front");
        let long = "a".repeat(63);
        assert_eq!(interface_name("mb", &long).len(), MAX_NAME_BYTES);
        assert_ne!(
            interface_name("mb", &long),
            interface_name("mb", &long[..62])
        );
    }

    #[test]
    fn missing_bridge_and_other_interfaces_are_named_with_a_remedy() {
        let error = check_bridge("mb-no-such").unwrap_err();
        assert_eq!(error.code(), tonic::Code::NotFound);
        assert!(error.to_string().contains("ip link add"), "{error}");
        let error = check_bridge("lo").unwrap_err();
        assert_eq!(error.code(), tonic::Code::InvalidArgument);
    }
}
