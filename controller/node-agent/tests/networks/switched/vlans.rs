//! VLANs of NICs: kept apart in the switch, tagged on the wire behind it.

use super::*;

const PLAIN_MAC: &str = "52:54:00:12:34:07";

/// A switch on `up0`, whose guests may call themselves what they like.
fn with_vlans() -> NetworkSpec {
    let mut spec = switched(NetworkKind::Bridged);
    spec.uplink = "up0".into();
    spec.vlan_aware = true;
    spec.endpoints.push(Endpoint {
        vm_id: "plain".into(),
        nic: "nic0".into(),
        mac: PLAIN_MAC.into(),
        ..Default::default()
    });
    for endpoint in &mut spec.endpoints {
        endpoint.ipv4_address.clear();
        endpoint.ipv6_address.clear();
    }
    spec
}

fn run_in(host: &mut Host, vm: (&str, &str), vlan: u32) -> VmStatus {
    apply_in(host, vm, vlan, (1, Power::On))
}

fn apply_in(
    host: &mut Host,
    (id, mac): (&str, &str),
    vlan: u32,
    (generation, power): (u64, Power),
) -> VmStatus {
    let mut spec = host.vm(id, mac, generation, power);
    spec.nics[0].vlan = vlan;
    host.agent.apply_vm(&spec);
    host.settled(id)
}

#[test]
fn nics_reach_their_vlan_alone_and_what_is_in_none_the_wire() {
    let mut host = Host::start();
    let world = Namespace::new();
    host.agent.host.connect("up0", &world, "eth0");
    world.run("ip addr add 10.20.0.1/24 dev eth0");
    let status = host.agent.apply(&with_vlans()).unwrap();
    assert!(status.ready, "{}", status.error);
    let vms = [
        ("web", WEB_MAC, 10, "10.20.0.5"),
        ("db", DB_MAC, 10, "10.20.0.6"),
        ("plain", PLAIN_MAC, 0, "10.20.0.7"),
    ];
    let guests = vms.map(|(id, mac, vlan, address)| {
        let status = run_in(&mut host, (id, mac), vlan);
        assert_eq!(status.phase(), VmPhase::Running, "{}", status.error);
        let (guest, cable) = host.guest(id, mac);
        guest.run(&format!("ip addr add {address}/24 dev eth0"));
        (guest, cable)
    });
    let [(web, web_cable), (db, db_cable), (plain, plain_cable)] = &guests;
    let _servers = [
        world.serve("10.20.0.1:7000"),
        db.serve("10.20.0.6:7000"),
        plain.serve("10.20.0.7:7000"),
    ];
    let reached = || {
        let by_web = web.ask("10.20.0.6:7000");
        assert_eq!(by_web.as_deref(), Some("10.20.0.5"), "in VLAN 10");
        let by_plain = plain.ask("10.20.0.1:7000");
        assert_eq!(by_plain.as_deref(), Some("10.20.0.7"), "on the wire");
    };
    reached();
    assert_eq!(web.ask("10.20.0.7:7000"), None, "it is in no VLAN");
    assert_eq!(web.ask("10.20.0.1:7000"), None, "VLAN 10 is tagged there");
    let args = fs::read(format!("/proc/{}/cmdline", host.switch().pid)).unwrap();
    let args = String::from_utf8_lossy(&args).into_owned();
    assert!(args.contains("packet=up0,vlan=0,trunk=all"), "{args}");
    host.kill_switch();
    for cable in [web_cable, db_cable, plain_cable] {
        cable.await_connections(2);
    }
    reached();
    for (id, mac, vlan, _) in vms {
        let status = apply_in(&mut host, (id, mac), vlan, (2, Power::OffNow));
        assert_eq!(status.phase(), VmPhase::Stopped);
        host.remove(id, mac);
    }
    host.agent.delete("front").unwrap();
    host.agent.assert_clean();
}

#[test]
fn vlan_in_a_network_without_them_is_refused() {
    let mut host = Host::start();
    let mut spec = switched(NetworkKind::Isolated);
    let status = host.agent.apply(&spec).unwrap();
    assert!(status.ready, "{}", status.error);
    let failed = run_in(&mut host, ("web", WEB_MAC), 10);
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
    host.agent.delete("front").unwrap();
    host.agent.assert_clean();
}
