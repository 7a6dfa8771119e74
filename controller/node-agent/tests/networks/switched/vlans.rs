//! VLANs of NICs: kept apart in the switch, tagged on the wire behind it.

use super::*;

/// A switch on `up0`, whose guests may call themselves what they like.
fn with_vlans() -> NetworkSpec {
    let mut spec = switched(NetworkKind::Bridged);
    spec.uplink = "up0".into();
    spec.vlan_aware = true;
    for endpoint in &mut spec.endpoints {
        endpoint.ipv4_address.clear();
        endpoint.ipv6_address.clear();
    }
    spec
}

fn run_in(host: &mut Host, (id, mac): (&str, &str), vlan: u32, trunk: &[u32]) -> VmStatus {
    let mut spec = host.vm(id, mac, 1, Power::On);
    spec.nics[0].vlan = vlan;
    spec.nics[0].trunk_vlans = trunk.to_vec();
    host.agent.apply_vm(&spec);
    host.settled(id)
}

#[test]
fn access_and_trunk_nics_reach_their_vlans_alone() {
    let mut host = Host::start();
    let world = Namespace::new();
    host.agent.host.connect("up0", &world, "eth0");
    for line in [
        "ip link add link eth0 name eth0.10 type vlan id 10",
        "ip link add link eth0 name eth0.20 type vlan id 20",
        "ip addr add 192.0.2.2/24 dev eth0",
        "ip addr add 10.10.0.2/24 dev eth0.10",
        "ip addr add 10.20.0.2/24 dev eth0.20",
        "ip link set eth0.10 up",
        "ip link set eth0.20 up",
    ] {
        world.run(line);
    }
    let status = host.agent.apply(&with_vlans()).unwrap();
    assert!(status.ready, "{}", status.error);
    for (vm, vlan, trunk) in [
        (("web", WEB_MAC), 10, &[][..]),
        (("db", DB_MAC), 0, &[10, 20]),
    ] {
        let status = run_in(&mut host, vm, vlan, trunk);
        assert_eq!(status.phase(), VmPhase::Running, "{}", status.error);
    }
    let (web, web_cable) = host.guest("web", WEB_MAC);
    let (db, db_cable) = host.guest("db", DB_MAC);
    web.run("ip addr add 10.10.0.5/24 dev eth0");
    web.run("ip addr add 192.0.2.5/24 dev eth0");
    for line in [
        "ip link add link eth0 name eth0.10 type vlan id 10",
        "ip link add link eth0 name eth0.20 type vlan id 20",
        "ip addr add 192.0.2.6/24 dev eth0",
        "ip addr add 10.10.0.6/24 dev eth0.10",
        "ip addr add 10.20.0.6/24 dev eth0.20",
        "ip link set eth0.10 up",
        "ip link set eth0.20 up",
    ] {
        db.run(line);
    }
    let _servers = [
        world.serve("192.0.2.2:7000"),
        world.serve("10.10.0.2:7000"),
        world.serve("10.20.0.2:7000"),
        db.serve("10.10.0.6:7000"),
        db.serve("192.0.2.6:7000"),
    ];
    let holds = || {
        let web_as = |server: &str| web.ask(server);
        assert_eq!(
            web_as("10.10.0.2:7000").as_deref(),
            Some("10.10.0.5"),
            "by the wire"
        );
        assert_eq!(
            web_as("10.10.0.6:7000").as_deref(),
            Some("10.10.0.5"),
            "the trunk"
        );
        assert_eq!(
            db.ask("10.20.0.2:7000").as_deref(),
            Some("10.20.0.6"),
            "tagged"
        );
        assert_eq!(
            db.ask("192.0.2.2:7000").as_deref(),
            Some("192.0.2.6"),
            "in none"
        );
    };
    holds();
    assert_eq!(
        web.ask("192.0.2.2:7000"),
        None,
        "VLAN 10 is not what is in none"
    );
    assert_eq!(
        web.ask("192.0.2.6:7000"),
        None,
        "VLAN 10 is not what is in none"
    );
    host.kill_switch();
    web_cable.await_connections(2);
    db_cable.await_connections(2);
    holds();
    host.remove("web", WEB_MAC);
    host.remove("db", DB_MAC);
    host.agent.delete("front").unwrap();
    host.agent.assert_clean();
}

#[test]
fn vlan_in_a_network_without_them_is_refused() {
    let mut host = Host::start();
    let mut spec = switched(NetworkKind::Isolated);
    let status = host.agent.apply(&spec).unwrap();
    assert!(status.ready, "{}", status.error);
    let failed = run_in(&mut host, ("web", WEB_MAC), 10, &[]);
    assert_eq!(failed.phase(), VmPhase::Failed);
    let named = failed.error.contains("NIC nic0") && failed.error.contains("has no VLANs");
    assert!(named, "{}", failed.error);
    spec.vlan_aware = true;
    let refused = host.agent.apply(&spec).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(
        refused.message().contains("vlan_aware"),
        "{}",
        refused.message()
    );
    host.remove("web", WEB_MAC);
    host.agent.delete("front").unwrap();
    host.agent.assert_clean();
}
