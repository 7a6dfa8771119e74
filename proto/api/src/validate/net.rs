//! What a NIC's other end may be.

use super::fields::{id, mac, mtu, token};
use super::{MAX_QUEUE_PAIRS, Violations, nic_policy};
use crate::device::{FdRef, NetConfig, SwitchPort};

/// VLANs of IEEE 802.1Q that a frame can belong to.
const VLANS: std::ops::RangeInclusive<u32> = 1..=4094;

pub(super) fn net_config(found: &mut Violations, at: &str, net: &NetConfig) {
    let ends = [
        !net.tap_fds.is_empty(),
        !net.packet_fds.is_empty(),
        net.switch_port.is_some(),
    ];
    let num_ends = ends.into_iter().filter(|&is_given| is_given).count();
    found.require(num_ends <= 1, at, || {
        "give one of tap_fds, packet_fds and switch_port".into()
    });
    match &net.switch_port {
        Some(port) => {
            switch_port(found, &format!("{at}.switch_port"), port);
            let pairs = net.queue_pairs;
            found.require(
                pairs <= MAX_QUEUE_PAIRS,
                &format!("{at}.queue_pairs"),
                || format!("{pairs} is above {MAX_QUEUE_PAIRS}"),
            );
        }
        None if net.packet_fds.is_empty() => fds(found, &format!("{at}.tap_fds"), &net.tap_fds),
        None => fds(found, &format!("{at}.packet_fds"), &net.packet_fds),
    }
    let is_port = net.switch_port.is_some();
    found.require(
        is_port || net.queue_pairs == 0,
        &format!("{at}.queue_pairs"),
        || "give as many descriptors as there are queue pairs instead".into(),
    );
    mac(found, &format!("{at}.mac"), &net.mac);
    mtu(found, &format!("{at}.mtu"), net.mtu);
    if let Some(policy) = &net.policy {
        nic_policy::policy(found, &format!("{at}.policy"), policy);
    }
    if let Some(limits) = &net.limits {
        nic_policy::net_limits(found, &format!("{at}.limits"), limits);
    }
}

/// Checks one descriptor for each queue pair.
fn fds(found: &mut Violations, at: &str, fds: &[FdRef]) {
    let pairs = fds.len();
    found.require((1..=MAX_QUEUE_PAIRS as usize).contains(&pairs), at, || {
        format!("has {pairs} descriptors; give one for each queue pair, {MAX_QUEUE_PAIRS} at most")
    });
    for (index, fd) in fds.iter().enumerate() {
        token(found, &format!("{at}[{index}]"), Some(fd));
    }
}

fn switch_port(found: &mut Violations, at: &str, port: &SwitchPort) {
    id(found, &format!("{at}.switch"), &port.switch);
    vlans(found, at, port.vlan, &port.trunk_vlans);
    let both = port.all_vlans && !port.trunk_vlans.is_empty();
    found.require(!both, &format!("{at}.all_vlans"), || {
        "is given beside trunk_vlans, which it includes".into()
    });
}

/// Checks the VLANs of a NIC: that of frames without a tag, or 0, and those with one.
pub(super) fn vlans(found: &mut Violations, at: &str, vlan: u32, trunk_vlans: &[u32]) {
    found.require(
        vlan == 0 || VLANS.contains(&vlan),
        &format!("{at}.vlan"),
        || format!("{vlan} must be 1 to 4094, or 0 for none"),
    );
    trunk(found, at, vlan, trunk_vlans);
}

fn trunk(found: &mut Violations, at: &str, vlan: u32, trunk_vlans: &[u32]) {
    for (index, tagged) in trunk_vlans.iter().enumerate() {
        let is_new = !trunk_vlans[..index].contains(tagged) && *tagged != vlan;
        found.require(
            VLANS.contains(tagged) && is_new,
            &format!("{at}.trunk_vlans[{index}]"),
            || format!("{tagged} must be 1 to 4094, and named once"),
        );
    }
}
