//! What networks are refused for, and where.

use super::*;

fn nat() -> pb::NetworkSpec {
    pb::NetworkSpec {
        kind: pb::NetworkKind::Nat as i32,
        ipv4_cidr: "10.20.0.0/24".into(),
        ipv6_prefix: "fd00:20::/64".into(),
        ..Default::default()
    }
}

fn refusal(spec: pb::NetworkSpec) -> String {
    let request = pb::CreateNetworkRequest {
        parent: "projects/default".into(),
        network_id: "front".into(),
        network: Some(pb::Network {
            spec: Some(spec),
            ..Default::default()
        }),
        ..Default::default()
    };
    match create_network_request(&request) {
        Ok(()) => String::new(),
        Err(status) => crate::errors::explain(&status),
    }
}

#[test]
fn sound_networks_pass() {
    assert_eq!(refusal(nat()), "");
    for kind in [pb::NetworkKind::HostOnly, pb::NetworkKind::Isolated] {
        let kind = kind as i32;
        let spec = pb::NetworkSpec { kind, ..nat() };
        assert_eq!(refusal(spec), "");
    }
    let bridged = pb::NetworkSpec {
        kind: pb::NetworkKind::Bridged as i32,
        bridge: "br0".into(),
        ..Default::default()
    };
    assert_eq!(refusal(bridged), "");
}

#[test]
fn each_mistake_is_named_with_its_field() {
    type Change = fn(&mut pb::NetworkSpec);
    let mistakes: [(&str, Change); 12] = [
        ("spec.kind", |spec| spec.kind = 0),
        ("spec.ipv4_cidr", |spec| {
            spec.ipv4_cidr = "10.20.0.1/24".into()
        }),
        ("spec.ipv4_cidr", |spec| {
            spec.ipv4_cidr = "10.20.0.0/31".into()
        }),
        ("spec.ipv4_gateway", |spec| {
            spec.ipv4_gateway = "10.21.0.1".into()
        }),
        ("spec.ipv4_pool_last", |spec| {
            spec.ipv4_pool_first = "10.20.0.9".into();
            spec.ipv4_pool_last = "10.20.0.8".into();
        }),
        ("spec.ipv6_prefix", |spec| {
            spec.ipv6_prefix = "fd00::/56".into()
        }),
        ("spec.mtu", |spec| spec.mtu = 1000),
        ("spec.bridge", |spec| spec.bridge = "br0".into()),
        ("spec.dns_servers[0]", |spec| {
            spec.dns_servers = vec!["one".into()]
        }),
        ("spec.dns_domain", |spec| spec.dns_domain = "-a.b".into()),
        ("spec.overlay.vni", |spec| {
            spec.overlay = Some(pb::Overlay::default())
        }),
        ("spec.datapath", |spec| spec.datapath = 9),
    ];
    for (field, change) in mistakes {
        let mut spec = nat();
        change(&mut spec);
        let text = refusal(spec);
        assert!(
            text.starts_with(&format!("network.{field}: ")),
            "{field}: {text}"
        );
    }
}

#[test]
fn bridged_network_has_one_way_out_and_an_interface_of_the_host_needs_a_switch() {
    let bridged = |bridge: &str, uplink: &str, datapath: pb::Datapath| {
        refusal(pb::NetworkSpec {
            kind: pb::NetworkKind::Bridged as i32,
            bridge: bridge.into(),
            uplink: uplink.into(),
            datapath: datapath as i32,
            ..Default::default()
        })
    };
    let (kernel, switch) = (pb::Datapath::Kernel, pb::Datapath::Switch);
    assert_eq!(bridged("br0", "", kernel), "");
    assert_eq!(bridged("br0", "", switch), "");
    assert_eq!(bridged("", "eth0", switch), "");
    for (text, field) in [
        (bridged("", "", kernel), "bridge"),
        (bridged("", "", switch), "bridge"),
        (bridged("br0", "eth0", kernel), "uplink"),
        (bridged("br0", "eth0", switch), "uplink"),
    ] {
        let start = format!("network.spec.{field}: ");
        assert!(text.starts_with(&start), "{field}: {text}");
    }
}

#[test]
fn vlans_need_a_switch_that_the_host_is_not_in() {
    let aware = |kind: pb::NetworkKind, datapath: pb::Datapath| {
        refusal(pb::NetworkSpec {
            kind: kind as i32,
            datapath: datapath as i32,
            vlan_aware: true,
            ..Default::default()
        })
    };
    use pb::Datapath::{Kernel, Switch};
    use pb::NetworkKind::{HostOnly, Isolated, Nat};
    assert_eq!(aware(Isolated, Switch), "");
    for (kind, datapath) in [(Isolated, Kernel), (Nat, Switch), (HostOnly, Switch)] {
        let text = aware(kind, datapath);
        assert!(text.starts_with("network.spec.vlan_aware: "), "{text}");
    }
}

#[test]
fn vlans_of_a_nic_are_numbers_that_exist_each_once_and_of_a_network() {
    let refusal = |network: &str, vlan: u32, trunk: &[u32]| {
        let nic = pb::Nic {
            network: network.into(),
            vlan,
            trunk_vlans: trunk.to_vec(),
            ..Default::default()
        };
        let mut found = Violations::new();
        nic_network(&mut found, "nic", &nic);
        let result = found.into_result();
        result.map_or_else(|status| crate::errors::explain(&status), |()| String::new())
    };
    let lan = "projects/p/networks/lan";
    assert_eq!(refusal(lan, 10, &[20, 4094]), "");
    for (network, vlan, trunk, field) in [
        (lan, 4095, &[][..], "nic.vlan"),
        (lan, 0, &[0], "nic.trunk_vlans[0]"),
        (lan, 10, &[20, 20], "nic.trunk_vlans[1]"),
        (lan, 10, &[10], "nic.trunk_vlans[0]"),
        ("", 10, &[], "nic.vlan"),
        ("", 0, &[10], "nic.trunk_vlans"),
    ] {
        let text = refusal(network, vlan, trunk);
        assert!(text.starts_with(&format!("{field}: ")), "{field}: {text}");
    }
}

#[test]
fn dhcp_needs_a_network_that_the_host_is_in() {
    let spec = pb::NetworkSpec {
        kind: pb::NetworkKind::Isolated as i32,
        dhcp: Some(true),
        ..nat()
    };
    assert!(refusal(spec).starts_with("network.spec.dhcp: "));
}
