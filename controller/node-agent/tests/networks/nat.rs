//! A NAT network from a guest's and from the world's point of view, and its end.

use api::node::{NetworkKind, PortForward};
use nix::{sys::signal::Signal, unistd::Pid};

use crate::{
    agent::{Agent, WEB_IPV6, WEB_MAC, dhcp, network},
    namespace::{Namespace, busybox, poll},
};

/// A host whose default route leads to `world`, which knows nothing of the host's networks.
fn host_and_world() -> (Agent, Namespace) {
    let (host, world) = (Namespace::new(), Namespace::new());
    host.connect("up0", &world, "eth0");
    for (machine, interface, last) in [(&host, "up0", 1), (&world, "eth0", 2)] {
        machine.run(&format!("ip addr add 192.0.2.{last}/24 dev {interface}"));
        machine.run(&format!(
            "ip addr add fd00:99::{last}/64 dev {interface} nodad"
        ));
    }
    host.run("ip route add default via 192.0.2.2");
    host.run("ip -6 route add default via fd00:99::2");
    (Agent::start(host), world)
}

fn forward(host_port: u32, guest_port: u32) -> PortForward {
    PortForward {
        protocol: "tcp".into(),
        host_address: String::new(),
        host_port,
        guest_port,
    }
}

#[test]
fn guest_gets_address_and_names_and_reaches_the_world_by_the_hosts_address() {
    let (mut agent, world) = host_and_world();
    let status = agent.apply(&network("front", NetworkKind::Nat)).unwrap();
    assert!(status.ready, "{}", status.error);
    let guest = agent.guest("mb-front", "g0", WEB_MAC);
    let [address, router, dns, hostname] = dhcp(&guest);
    assert_eq!(
        [&*address, &*router, &*dns],
        ["10.20.0.5", "10.20.0.1", "10.20.0.1"]
    );
    assert_eq!(hostname, "web");
    let lease = &agent.network("front").unwrap().leases[0];
    assert_eq!(
        (lease.mac.as_str(), lease.address.as_str()),
        (WEB_MAC, "10.20.0.5")
    );

    let asked = guest
        .command(busybox())
        .args(["nslookup", "web.front.internal", "10.20.0.1"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&asked.stdout);
    assert!(said.contains("10.20.0.5"), "{said}");

    let _server = world.serve("192.0.2.2:7000");
    assert_eq!(guest.ask("192.0.2.2:7000").as_deref(), Some("192.0.2.1"));
    let _on_host = agent.host.serve("10.20.0.1:7000");
    assert_eq!(guest.ask("10.20.0.1:7000").as_deref(), Some("10.20.0.5"));
}

#[test]
fn guest_makes_its_ipv6_address_of_the_prefix_that_is_advertised() {
    let (mut agent, world) = host_and_world();
    agent.apply(&network("front", NetworkKind::Nat)).unwrap();
    let guest = agent.guest("mb-front", "g0", WEB_MAC);
    poll("an address and a router", || {
        let addresses = guest.run("ip -6 addr show dev eth0");
        let routes = guest.run("ip -6 route");
        let settled = addresses.contains(WEB_IPV6) && !addresses.contains("tentative");
        (settled && routes.contains("default")).then_some(())
    });
    let _server = world.serve("[fd00:99::2]:7000");
    assert_eq!(
        guest.ask("[fd00:99::2]:7000").as_deref(),
        Some("fd00:99::1")
    );
}

#[test]
fn world_reaches_guests_by_forwarded_ports_alone() {
    let (mut agent, world) = host_and_world();
    let mut spec = network("front", NetworkKind::Nat);
    spec.endpoints[0].port_forwards = vec![forward(8080, 80)];
    agent.apply(&spec).unwrap();
    let guest = agent.guest("mb-front", "g0", WEB_MAC);
    dhcp(&guest);
    let _web = guest.serve("10.20.0.5:80");
    assert_eq!(world.ask("192.0.2.1:8080").as_deref(), Some("192.0.2.2"));
    assert!(
        agent.host.ask("127.0.0.1:8080").is_some(),
        "from the host itself"
    );
    assert!(
        agent.host.ask("192.0.2.1:8080").is_some(),
        "by its own address"
    );
    let neighbour = agent.guest("mb-front", "g1", "52:54:00:12:34:06");
    neighbour.run("ip addr add 10.20.0.6/24 dev eth0");
    neighbour.run("ip route add default via 10.20.0.1");
    let seen = neighbour.ask("192.0.2.1:8080");
    assert!(seen.is_some(), "from its own network");
    world.run("ip route add 10.20.0.0/24 via 192.0.2.1");
    assert_eq!(world.ask("10.20.0.5:80"), None, "not forwarded");
    // The forward moves without the network's end.
    spec.endpoints[0].port_forwards = vec![forward(8081, 80)];
    spec.revision = "2".into();
    assert_eq!(agent.apply(&spec).unwrap().observed_revision, "2");
    assert_eq!(world.ask("192.0.2.1:8080"), None);
    assert_eq!(world.ask("192.0.2.1:8081").as_deref(), Some("192.0.2.2"));
}

#[test]
fn host_that_drops_what_it_forwards_needs_the_rules_that_the_manual_has() {
    let (mut agent, world) = host_and_world();
    let mut spec = network("front", NetworkKind::Nat);
    spec.endpoints[0].port_forwards = vec![forward(8080, 80)];
    agent.apply(&spec).unwrap();
    let guest = agent.guest("mb-front", "g0", WEB_MAC);
    dhcp(&guest);
    let _server = world.serve("192.0.2.2:7000");
    let _web = guest.serve("10.20.0.5:80");
    let reached = || {
        let out = guest.ask("192.0.2.2:7000").is_some();
        (out, world.ask("192.0.2.1:8080").is_some())
    };
    // As Docker leaves it.
    let nft = |line: &str| agent.host.run(&format!("nft {line}"));
    nft("add table ip filter");
    nft("add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }");
    assert_eq!(reached(), (false, false));
    nft("add rule ip filter FORWARD iifname mb-front accept");
    nft("add rule ip filter FORWARD oifname mb-front ct state established,related accept");
    nft("add rule ip filter FORWARD oifname mb-front ct status dnat accept");
    assert_eq!(reached(), (true, true));
}

#[test]
fn servers_and_agents_may_die_and_nothing_is_left_in_the_end() {
    let (mut agent, _world) = host_and_world();
    agent.host.run("sysctl -qw net.ipv4.conf.up0.forwarding=0");
    agent.apply(&network("front", NetworkKind::Nat)).unwrap();
    let forwards = |agent: &Agent| agent.host.run("cat /proc/sys/net/ipv4/conf/up0/forwarding");
    assert_eq!(forwards(&agent), "1\n");
    let first = agent.network("front").unwrap().dhcp_pid;
    nix::sys::signal::kill(Pid::from_raw(first as i32), Signal::SIGKILL).unwrap();
    let second = poll("another dnsmasq", || {
        let status = agent.network("front")?;
        (status.dhcp_restarts == 1 && status.dhcp_pid != 0).then_some(status.dhcp_pid)
    });
    assert_ne!(first, second);

    agent.replace();
    let adopted = poll("the adopted network", || {
        agent.network("front").filter(|network| network.ready)
    });
    assert_eq!(adopted.dhcp_pid, second, "kept, not started again");
    let guest = agent.guest("mb-front", "g0", WEB_MAC);
    assert_eq!(dhcp(&guest)[0], "10.20.0.5");

    let refused = agent.delete("front").unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(refused.message().contains("g0"), "{}", refused.message());
    agent.host.run("ip link del g0");
    agent.delete("front").unwrap();
    agent.delete("front").unwrap();
    agent.assert_clean();
    assert_eq!(forwards(&agent), "0\n", "as it was before");
}
