//! NICs of a user network: no privileges, so none of what taps can.

use std::net::IpAddr;

use super::machine::Machine;
use super::*;

/// More than this has a network of its own.
const MAX_PORT_FORWARDS: usize = 64;

struct Forward<'a> {
    protocol: &'a str,
    host_address: &'a str,
    host_port: u32,
    guest_port: u32,
}

pub(super) fn controller(
    machine: &mut Machine<'_>,
    at: &str,
    nic: &controller::Nic,
    user: &controller::UserNetwork,
) {
    let other = [&nic.tap, &nic.bridge, &nic.host_cidr, &nic.network];
    alone(machine, at, &other, nic.queue_pairs);
    let forwards = nic.port_forwards.iter().map(|forward| Forward {
        protocol: &forward.protocol,
        host_address: &forward.host_address,
        host_port: forward.host_port,
        guest_port: match forward.guest_port {
            0 => forward.host_port,
            port => port,
        },
    });
    network(
        machine,
        at,
        &forwards.collect::<Vec<_>>(),
        &user.host_loopback,
    );
}

pub(super) fn node(
    machine: &mut Machine<'_>,
    at: &str,
    nic: &node::NicSpec,
    user: &node::UserNetwork,
) {
    let other = [&nic.tap, &nic.bridge, &nic.host_cidr, &nic.network];
    alone(machine, at, &other, nic.queue_pairs);
    let forwards = user.port_forwards.iter().map(|forward| Forward {
        protocol: &forward.protocol,
        host_address: &forward.host_address,
        host_port: forward.host_port,
        guest_port: forward.guest_port,
    });
    network(
        machine,
        at,
        &forwards.collect::<Vec<_>>(),
        &user.host_loopback,
    );
}

fn alone(machine: &mut Machine<'_>, at: &str, other: &[&String], queue_pairs: u32) {
    let alone = other.iter().all(|field| field.is_empty());
    machine.found.require(alone, &format!("{at}.user"), || {
        "is a network by itself: leave out tap, bridge, host_cidr and network, or user".into()
    });
    let field = format!("{at}.queue_pairs");
    machine.found.require(queue_pairs <= 1, &field, || {
        format!("passt serves one queue pair, not {queue_pairs}")
    });
}

fn network(machine: &mut Machine<'_>, at: &str, forwards: &[Forward<'_>], host_loopback: &str) {
    let found = &mut *machine.found;
    let is_address = |text: &str| text.parse::<IpAddr>().is_ok();
    let field = format!("{at}.user.host_loopback");
    let fits = host_loopback.is_empty() || is_address(host_loopback);
    found.require(fits, &field, || {
        format!("{host_loopback:?} must be an IP address")
    });
    let count = forwards.len();
    let field = format!("{at}.port_forwards");
    found.require(count <= MAX_PORT_FORWARDS, &field, || {
        format!("has {count} ports, at most {MAX_PORT_FORWARDS} fit")
    });
    let mut seen = std::collections::HashSet::new();
    for (index, forward) in forwards.iter().enumerate() {
        let field = format!("{field}[{index}]");
        let protocol = matches!(forward.protocol, "tcp" | "udp");
        found.require(protocol, &format!("{field}.protocol"), || {
            format!("{:?} must be tcp or udp", forward.protocol)
        });
        let address = forward.host_address;
        let fits = address.is_empty() || is_address(address);
        found.require(fits, &format!("{field}.host_address"), || {
            format!("{address:?} must be an IP address")
        });
        for (name, port) in [
            ("host_port", forward.host_port),
            ("guest_port", forward.guest_port),
        ] {
            let fits = (1..=0xffff).contains(&port);
            found.require(fits, &format!("{field}.{name}"), || {
                format!("must be 1 to 65535, not {port}")
            });
        }
        let first = seen.insert((forward.protocol, address, forward.host_port));
        found.require(first, &format!("{field}.host_port"), || {
            format!(
                "{} port {} is forwarded twice",
                forward.protocol, forward.host_port
            )
        });
    }
}
