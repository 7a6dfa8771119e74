//! Guests of one network: how they come up in it, and what they have each other do.

use std::net::{IpAddr, SocketAddr};

use guest::plan::{End, Job, Plan};
use guest::report::{Reached, Report};
use serde_json::Value;

use super::terminal::Terminal;
use crate::nested::fleet::{Fleet, find};

pub(super) const SEED: u64 = 0x2e7;
const DATAGRAMS: u64 = 50;

/// A VM that was configured by DHCP and obeys its console.
pub(super) struct Guest {
    pub(super) name: &'static str,
    pub(super) terminal: Terminal,
    pub(super) ipv4: IpAddr,
    pub(super) ipv6: IpAddr,
    pub(super) router: String,
    pub(super) name_server: String,
    pub(super) mtu: u32,
    /// What else it was to do at its start.
    pub(super) reports: Vec<Report>,
}

/// A plan for [`Guest::attach`].
pub(super) fn plan(jobs: Vec<Job>) -> Plan {
    Plan {
        jobs: [vec![Job::Dhcp, Job::Ipv6], jobs].concat(),
        end: End::Obey,
        ..Plan::default()
    }
}

impl Guest {
    /// Waits until a started VM has done its [`plan`]; its addresses are those that the controller gave.
    pub(super) fn attach(fleet: &Fleet, name: &'static str) -> Self {
        let mut terminal = Terminal::attach(fleet, name);
        let mut reports = terminal.finish();
        let others = reports.split_off(2);
        let [
            Report::Lease {
                mac,
                address,
                router,
                name_server,
                mtu,
                ..
            },
            Report::Ipv6 { address: ipv6, .. },
        ] = &reports[..]
        else {
            panic!("{name}: {reports:?}");
        };
        let (ipv4, _) = address.split_once('/').expect("a prefix length");
        let vm = fleet.json(&["vm", "show", name]);
        let known = |key| find(&vm, key).and_then(Value::as_str).unwrap_or_default();
        assert_eq!(
            ipv4,
            known("ipv4_address"),
            "the address that the controller gave"
        );
        assert_eq!(mac, known("mac"));
        Self {
            name,
            terminal,
            ipv4: ipv4.parse().expect("an address"),
            ipv6: ipv6.parse().expect("an address"),
            router: router.clone(),
            name_server: name_server.clone(),
            mtu: *mtu,
            reports: others,
        }
    }

    /// The name server knows `other` by both its addresses.
    pub(super) fn knows(&mut self, other: &Guest, domain: &str) {
        let name = format!("{}.{domain}", other.name);
        let Report::Resolve { addresses, .. } = self.terminal.ask(Job::Resolve { name }) else {
            panic!("another report");
        };
        for address in [other.ipv4, other.ipv6] {
            assert!(
                addresses.contains(&address.to_string()),
                "{} is known as {addresses:?}, not as {address}",
                other.name
            );
        }
    }

    /// By TCP and UDP, of both families; the other one serves `bytes` there.
    pub(super) fn exchanges_payloads_with(&mut self, other: &Guest, port: u16, bytes: u64) {
        self.terminal.tell(vec![
            net(other.ipv4, port, bytes),
            net(other.ipv6, port, bytes),
            udp(other.ipv4, port),
            udp(other.ipv6, port),
        ]);
        other.terminal.expect_served(2);
    }

    pub(super) fn reach(&mut self, other: &Guest, port: u16) -> Reached {
        let peer = SocketAddr::new(other.ipv4, port);
        match self.terminal.ask(Job::Reach { peer }) {
            Report::Reach { outcome, .. } => outcome,
            report => panic!("{report:?}"),
        }
    }

    pub(super) fn echoes(&mut self, other: &Guest) -> u32 {
        match self.terminal.ask(Job::Ping { peer: other.ipv4 }) {
            Report::Ping { echoes, .. } => echoes,
            report => panic!("{report:?}"),
        }
    }
}

pub(super) fn serve(port: u16, bytes: u64) -> Job {
    Job::Serve {
        port,
        seed: SEED,
        bytes,
    }
}

pub(super) fn net(peer: IpAddr, port: u16, bytes: u64) -> Job {
    Job::Net {
        peer: SocketAddr::new(peer, port),
        seed: SEED,
        bytes,
    }
}

pub(super) fn udp(peer: IpAddr, port: u16) -> Job {
    Job::Udp {
        peer: SocketAddr::new(peer, port),
        seed: SEED,
        datagrams: DATAGRAMS,
    }
}

/// Switches guests off by themselves, and takes them and their network away; nothing is left on the host.
pub(super) fn take_apart(fleet: &Fleet, guests: &mut [Guest], network: &str) {
    for guest in &mut *guests {
        guest.terminal.power_off();
    }
    for guest in &*guests {
        fleet.wait_until_stopped(guest.name);
        fleet.done(&["vm", "delete", guest.name]);
    }
    fleet.done(&["network", "delete", network]);
    let tables = super::output_of("nft", &["list", "tables"]);
    assert!(!tables.contains(&format!("mortise-{network}")), "{tables}");
    let links = super::output_of("ip", &["-o", "link"]);
    assert!(!links.contains(&format!("mb-{network}")), "{links}");
}
