//! Who reaches whom in host-only and isolated networks.

use api::node::NetworkKind;

use crate::{
    agent::{Agent, WEB_MAC, dhcp, network},
    namespace::Namespace,
};

const DB_MAC: &str = "52:54:00:12:34:06";

fn host() -> (Agent, Namespace) {
    let (host, world) = (Namespace::new(), Namespace::new());
    host.connect("up0", &world, "eth0");
    host.run("ip addr add 192.0.2.1/24 dev up0");
    world.run("ip addr add 192.0.2.2/24 dev eth0");
    world.run("ip route add default via 192.0.2.1");
    // The worst case: a host that is a router already.
    host.run("sysctl -qw net.ipv4.ip_forward=1");
    (Agent::start(host), world)
}

#[test]
fn host_only_network_reaches_the_host_and_nobody_else() {
    let (mut agent, world) = host();
    agent
        .apply(&network("inner", NetworkKind::HostOnly))
        .unwrap();
    let mut other = network("other", NetworkKind::HostOnly);
    other.ipv4_gateway = "10.21.0.1/24".into();
    other.ipv6_gateway = String::new();
    other.endpoints.clear();
    agent.apply(&other).unwrap();
    let guest = agent.guest("mb-inner", "g0", WEB_MAC);
    let [address, router, ..] = dhcp(&guest);
    assert_eq!((address.as_str(), router.as_str()), ("10.20.0.5", ""));
    let _on_host = agent.host.serve("0.0.0.0:7000");
    let _world = world.serve("0.0.0.0:7000");
    assert_eq!(guest.ask("10.20.0.1:7000").as_deref(), Some("10.20.0.5"));
    guest.run("ip route add default via 10.20.0.1");
    assert_eq!(guest.ask("192.0.2.2:7000"), None, "the world");
    let _guest = guest.serve("10.20.0.5:7000");
    assert_eq!(world.ask("10.20.0.5:7000"), None, "from the world");
    let neighbour = agent.guest("mb-other", "g1", DB_MAC);
    neighbour.run("ip addr add 10.21.0.5/24 dev eth0");
    neighbour.run("ip route add default via 10.21.0.1");
    assert_eq!(neighbour.ask("10.20.0.5:7000"), None, "another network");
}

#[test]
fn isolated_network_reaches_its_members_only() {
    let (mut agent, _world) = host();
    agent
        .apply(&network("alone", NetworkKind::Isolated))
        .unwrap();
    let guests = [("g0", WEB_MAC, 5), ("g1", DB_MAC, 6)].map(|(port, mac, last)| {
        let guest = agent.guest("mb-alone", port, mac);
        guest.run(&format!("ip addr add 10.20.0.{last}/24 dev eth0"));
        guest
    });
    let _server = guests[1].serve("10.20.0.6:7000");
    assert_eq!(
        guests[0].ask("10.20.0.6:7000").as_deref(),
        Some("10.20.0.5")
    );
    // The host answers nothing, not even who has its addresses.
    let _on_host = agent.host.serve("0.0.0.0:7000");
    guests[0].run("ip route add 192.0.2.0/24 dev eth0");
    assert_eq!(guests[0].ask("192.0.2.1:7000"), None);
    let neighbours = guests[0].run("ip neigh show to 192.0.2.1");
    assert!(!neighbours.contains("lladdr"), "{neighbours}");
    for port in ["g0", "g1"] {
        agent.host.run(&format!("ip link del {port}"));
    }
    agent.delete("alone").unwrap();
    agent.assert_clean();
}
