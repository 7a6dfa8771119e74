//! Making what is on the host match a network's specification, and removing it.

use std::{collections::BTreeSet, fs, io, net::IpAddr, path::Path};

use api::node::{Datapath, NetworkKind, NetworkSpec};
use ipnet::IpNet;

use super::{
    Made, Network, Networks,
    error::NetworkError,
    firewall::{self, Ruleset},
    links::{self, Links, Vxlan},
    names, programs, record, server,
    switch::{self, Uplink},
    sysctl,
};
use crate::tap::{self, fnv1a};

/// VXLAN over IPv4 takes 50 bytes of Ethernet's 1500.
const OVERLAY_MTU: u32 = 1450;

/// NICs are ports of a switch in a process.
pub(super) fn is_switched(spec: &NetworkSpec) -> bool {
    spec.datapath() == Datapath::Switch
}

/// The bridge that leads out of the network, its own or another; `None` when nothing of it is in the
/// kernel.
pub(super) fn bridge_of(spec: &NetworkSpec) -> Option<String> {
    let has_none = match spec.kind() {
        NetworkKind::Isolated => spec.overlay.is_none(),
        // It is on an interface of the host.
        NetworkKind::Bridged => spec.bridge.is_empty(),
        _ => false,
    };
    (!(is_switched(spec) && has_none)).then(|| names::bridge(spec))
}

/// The bridge is the network's own, with all that belongs to it.
fn has_own_bridge(spec: &NetworkSpec) -> bool {
    spec.kind() != NetworkKind::Bridged && bridge_of(spec).is_some()
}

/// The largest packet; 0 for the default.
pub(super) fn mtu(spec: &NetworkSpec) -> u32 {
    match (spec.mtu, &spec.overlay) {
        (0, Some(_)) => OVERLAY_MTU,
        (mtu, _) => mtu,
    }
}

impl Networks {
    /// Checks first, then records what will exist, then makes it.
    pub(super) async fn make(
        &self,
        network: &Network,
        made: &mut Made,
        spec: &NetworkSpec,
    ) -> Result<(), NetworkError> {
        let id = &spec.id;
        if let Some(before) = &made.spec
            && is_switched(before) != is_switched(spec)
        {
            return Err(NetworkError::Datapath { id: id.clone() });
        }
        if let Some(before) = &made.spec
            && before.vlan_aware != spec.vlan_aware
        {
            return Err(NetworkError::VlanAware { id: id.clone() });
        }
        let dir = self.inner.run_dir.join(id);
        if spec.kind() == NetworkKind::Bridged && !spec.bridge.is_empty() {
            check_bridge(&spec.bridge)?;
        }
        if !spec.uplink.is_empty() && !links::exists(&spec.uplink) {
            return Err(NetworkError::NoUplink {
                uplink: spec.uplink.clone(),
            });
        }
        let uplink = self.uplink(made, spec)?;
        let program = switch::Program::of(made.pin.as_ref(), &self.inner.bin_dir);
        if is_switched(spec) && !program.path.is_file() {
            return Err(NetworkError::NoSwitchProgram {
                id: id.clone(),
                path: program.path,
            });
        }
        if has_own_bridge(spec) {
            self.make_bridge(made, spec, &dir).await?;
        } else {
            made.spec = Some(spec.clone());
            record::save(&self.inner.state_dir, spec, made.pin.as_ref())?;
        }
        if !is_switched(spec) {
            return Ok(());
        }
        fs::create_dir_all(&dir).map_err(NetworkError::io(id, "making", &dir))?;
        if let (Some(Uplink::Tap(tap)), Some(bridge)) = (&uplink, bridge_of(spec)) {
            let ensured = tap::ensure(tap, &bridge, mtu(spec)).await;
            ensured.map_err(|source| NetworkError::Tap {
                id: id.clone(),
                source,
            })?;
        }
        let plan = switch::Plan {
            network: id.clone(),
            program,
            dir,
            uplink,
            vlan_aware: spec.vlan_aware,
            knobs: self.inner.knobs.clone(),
            hang_after: self.inner.hang_after,
        };
        made.switch = Some(plan.ensure(made.switch.take(), &network.ports).await?);
        Ok(())
    }

    /// The switch's way out, which must not be anybody else's.
    fn uplink(&self, made: &Made, spec: &NetworkSpec) -> Result<Option<Uplink>, NetworkError> {
        if !is_switched(spec) {
            return Ok(None);
        }
        if bridge_of(spec).is_none() {
            let has_uplink = !spec.uplink.is_empty();
            return Ok(has_uplink.then(|| Uplink::Interface(spec.uplink.clone())));
        }
        let name = names::uplink(&spec.id);
        if made.spec.is_none() && links::exists(&name) {
            return Err(NetworkError::Exists {
                id: spec.id.clone(),
                name,
            });
        }
        Ok(Some(Uplink::Tap(name)))
    }

    /// A bridge and what belongs to it.
    async fn make_bridge(
        &self,
        made: &mut Made,
        spec: &NetworkSpec,
        dir: &Path,
    ) -> Result<(), NetworkError> {
        let id = &spec.id;
        let bridge = names::bridge(spec);
        programs::find(id, programs::NFT)?;
        let plan = server::is_wanted(spec)
            .then(|| server::Plan::new(spec, &bridge, dir))
            .transpose()?;
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
        record::save(&self.inner.state_dir, spec, made.pin.as_ref())?;
        made.spec = Some(spec.clone());
        fs::create_dir_all(dir).map_err(NetworkError::io(id, "making", dir))?;
        let mac = self.bridge_mac(id);
        links.ensure_bridge(&bridge, mac, mtu(spec)).await?;
        self.settings(spec, &bridge)?;
        links.ensure_addresses(&bridge, &gateways(spec)).await?;
        match &vxlan {
            Some(vxlan) => links.ensure_vxlan(vxlan, &bridge, mtu(spec)).await?,
            None => links.remove(&names::vxlan(id)).await?,
        }
        let ruleset = Ruleset {
            spec,
            bridge: &bridge,
            vxlan: vxlan.as_ref().map(|vxlan| vxlan.name.as_str()),
        };
        firewall::apply(&ruleset).await?;
        match plan {
            Some(plan) => made.server = Some(plan.ensure(made.server.take()).await?),
            None => self.stop_server(made, dir).await,
        }
        Ok(())
    }

    /// Removes all that may exist of a network.
    pub(super) async fn unmake(
        &self,
        made: &mut Made,
        spec: &NetworkSpec,
    ) -> Result<(), NetworkError> {
        if made.spec.is_none() {
            return Ok(());
        }
        let id = &spec.id;
        let dir = self.inner.run_dir.join(id);
        if is_switched(spec) {
            match made.switch.take() {
                Some(switch) => switch.stop().await,
                None => switch::stop_strays(&dir).await,
            }
            let removed = tap::remove(&names::uplink(id)).await;
            removed.map_err(|source| NetworkError::Tap {
                id: id.clone(),
                source,
            })?;
        }
        if has_own_bridge(spec) {
            self.stop_server(made, &dir).await;
            firewall::remove(id).await?;
            let links = Links::open(id)?;
            links.remove(&names::vxlan(id)).await?;
            links.remove(&names::bridge(spec)).await?;
            self.inner.forwarding.release(id)?;
        }
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(NetworkError::io(id, "removing", &dir)(error));
            }
            _ => {}
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
            name: names::vxlan(&spec.id),
            vni: overlay.vni,
            local,
            port: overlay.port as u16,
            entries,
        }))
    }

    /// Locally administered, and another one on each host of an overlay.
    fn bridge_mac(&self, id: &str) -> [u8; 6] {
        let hash = fnv1a(format!("{}/{id}", self.inner.host_id).as_bytes()).to_be_bytes();
        [0x02, hash[0], hash[1], hash[2], hash[3], hash[4]]
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
    fn missing_bridge_and_other_interfaces_are_named_with_a_remedy() {
        let error = check_bridge("mb-no-such").unwrap_err();
        assert_eq!(error.code(), tonic::Code::NotFound);
        assert!(error.to_string().contains("ip link add"), "{error}");
        let error = check_bridge("lo").unwrap_err();
        assert_eq!(error.code(), tonic::Code::InvalidArgument);
    }

    #[test]
    fn isolated_switch_needs_nothing_of_the_kernel() {
        let mut spec = NetworkSpec {
            id: "front".into(),
            kind: NetworkKind::Isolated as i32,
            datapath: Datapath::Switch as i32,
            ..Default::default()
        };
        assert_eq!(bridge_of(&spec), None);
        spec.overlay = Some(Default::default());
        assert_eq!(bridge_of(&spec).as_deref(), Some("mb-front"));
        spec.overlay = None;
        spec.datapath = Datapath::Kernel as i32;
        assert_eq!(bridge_of(&spec).as_deref(), Some("mb-front"));
        spec.kind = NetworkKind::Bridged as i32;
        spec.bridge = "br0".into();
        assert_eq!(bridge_of(&spec).as_deref(), Some("br0"));
    }
}
