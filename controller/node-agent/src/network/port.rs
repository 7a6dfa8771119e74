//! A NIC as a port of its network's switch: what it is called there and attached with.

use std::path::PathBuf;

use api::device::{NetConfig, Policy, Polling, SwitchPort};

use crate::{leases::Leases, spec::NicTuning, tap::fnv1a};

/// Of an id, without the digits that make it unique: ids have 63 bytes.
const MAX_READABLE_BYTES: usize = 50;

/// A NIC as a port of a switch.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PortPlan {
    /// The VM.
    pub(crate) vm: String,
    /// The NIC's name in it.
    pub(crate) nic: String,
    /// Where its `vmm-core` connects to.
    pub(crate) socket: PathBuf,
    /// aa:bb:cc:dd:ee:ff
    pub(crate) mac: String,
    /// 1 to 16.
    pub(crate) queue_pairs: u32,
    /// 0 for the default.
    pub(crate) mtu: u32,
    /// Keep a table of flows, whatever the policy says.
    pub(crate) track_flows: bool,
    /// Of frames without a tag; 0 for none.
    pub(crate) vlan: u32,
    /// Those that come and go tagged.
    pub(crate) trunk_vlans: Vec<u32>,
    /// What may change while the VM runs.
    pub(crate) tuning: NicTuning,
    /// Of a VM that runs under the host's lease.
    pub(crate) leases: Option<Leases>,
}

/// What the daemon calls a NIC: readable, and unique among all VMs' NICs.
pub(crate) fn port_id(vm: &str, nic: &str) -> String {
    let digits = fnv1a(format!("{vm}/{nic}").as_bytes()) & 0xffff_ffff_ffff;
    let mut readable = format!("{vm}-{nic}");
    readable.truncate(MAX_READABLE_BYTES);
    format!("{readable}-{digits:012x}")
}

/// What may change of a port that is attached.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Told {
    pub(super) policy: Option<Policy>,
    pub(super) tuning: NicTuning,
}

impl PortPlan {
    /// What the daemon is attached with; `vlan_aware` if its switch is.
    pub(super) fn config(&self, switch: &str, vlan_aware: bool, told: &Told) -> NetConfig {
        NetConfig {
            mac: self.mac.clone(),
            mtu: self.mtu,
            switch_port: Some(SwitchPort {
                switch: switch.to_owned(),
                vlan: self.vlan,
                trunk_vlans: self.trunk_vlans.clone(),
                vlan_aware,
                ..SwitchPort::default()
            }),
            queue_pairs: self.queue_pairs,
            link_down: told.tuning.link_down,
            policy: told.policy.clone(),
            limits: Some(told.tuning.limits()),
            polling: Polling::Unspecified as i32,
            leased: self.leases.is_some(),
            io_until_boottime_ns: self
                .leases
                .as_ref()
                .map_or(0, |leases| leases.io_until().as_nanos()),
            ..NetConfig::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_short_and_tell_nics_apart_whose_names_run_together() {
        assert!(port_id("web", "nic0").starts_with("web-nic0-"));
        assert_ne!(port_id("a-b", "c"), port_id("a", "b-c"));
        let long = "a".repeat(63);
        let id = port_id(&long, &long);
        assert!(api::names::is_id(&id), "{id}");
        assert_ne!(id, port_id(&long, &long[1..]));
    }
}
