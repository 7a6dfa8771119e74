//! One network on two hosts.

use api::node::{NetworkKind, NetworkSpec, Overlay, OverlayPeer};

use crate::{
    agent::{Agent, WEB_MAC, network},
    namespace::Namespace,
};

const DB_MAC: &str = "52:54:00:12:34:06";

fn shared(own: u8, other: u8, mac: &str) -> NetworkSpec {
    let mut spec = network("wide", NetworkKind::HostOnly);
    spec.overlay = Some(Overlay {
        vni: 4711,
        underlay_address: format!("192.0.2.{own}"),
        port: 0,
        peers: vec![OverlayPeer {
            underlay_address: format!("192.0.2.{other}"),
            macs: vec![mac.into()],
        }],
    });
    spec
}

#[test]
fn guests_on_two_hosts_are_in_one_network() {
    let (first, second) = (Namespace::new(), Namespace::new());
    first.connect("up0", &second, "up0");
    first.run("ip addr add 192.0.2.1/24 dev up0");
    second.run("ip addr add 192.0.2.2/24 dev up0");
    let (mut first, mut second) = (Agent::start(first), Agent::start(second));
    first.apply(&shared(1, 2, DB_MAC)).unwrap();
    second.apply(&shared(2, 1, WEB_MAC)).unwrap();
    let web = first.guest("mb-wide", "g0", WEB_MAC);
    let db = second.guest("mb-wide", "g0", DB_MAC);
    for (guest, last) in [(&web, 5), (&db, 6)] {
        guest.run(&format!("ip addr add 10.20.0.{last}/24 dev eth0"));
        guest.run("ip link set eth0 mtu 1450");
    }
    let _server = db.serve("10.20.0.6:7000");
    assert_eq!(web.ask("10.20.0.6:7000").as_deref(), Some("10.20.0.5"));
    // Both hosts have the gateway's address; each guest finds its own host's.
    let _on_first = first.host.serve("10.20.0.1:7000");
    assert_eq!(web.ask("10.20.0.1:7000").as_deref(), Some("10.20.0.5"));
    assert_eq!(db.ask("10.20.0.1:7000"), None, "the other host's own");

    let entries = |agent: &Agent| agent.host.run("bridge fdb show dev mx-wide");
    let fed = entries(&first);
    assert!(fed.contains("52:54:00:12:34:06 dst 192.0.2.2"), "{fed}");
    assert!(fed.contains("00:00:00:00:00:00 dst 192.0.2.2"), "{fed}");
    let mut moved = shared(1, 3, DB_MAC);
    moved.overlay.as_mut().unwrap().peers.push(OverlayPeer {
        underlay_address: "192.0.2.4".into(),
        macs: vec![],
    });
    first.apply(&moved).unwrap();
    let fed = entries(&first);
    assert!(fed.contains("52:54:00:12:34:06 dst 192.0.2.3"), "{fed}");
    assert!(!fed.contains("192.0.2.2"), "{fed}");
    assert!(fed.contains("00:00:00:00:00:00 dst 192.0.2.4"), "{fed}");

    first.host.run("ip link del g0");
    first.delete("wide").unwrap();
    first.assert_clean();
}

#[test]
fn host_that_nobody_named_an_address_of_refuses_overlays() {
    let mut agent = Agent::start(Namespace::new());
    let mut spec = shared(1, 2, DB_MAC);
    spec.overlay.as_mut().unwrap().underlay_address.clear();
    let refused = agent.apply(&spec).unwrap_err();
    assert!(
        refused.message().contains("--underlay-address"),
        "{}",
        refused.message()
    );
    agent.assert_clean();
}
