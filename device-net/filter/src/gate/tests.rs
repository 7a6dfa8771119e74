//! Security rules, flows and fragments, from the outside.

mod flows;
mod hostile;
mod spoofing;

use super::*;
use crate::frames::*;
use crate::policy::{AntiSpoofing, Family, Protocol, Remote, Rule, Security};
use Direction::{Egress, Ingress};

const SECOND: u64 = 1_000_000_000;

/// A gate and the time.
struct Bench {
    gate: Gate,
    now_ns: u64,
}

impl Bench {
    fn new(policy: &Policy) -> Self {
        let gate = Gate::default();
        gate.set_policy(policy);
        Self {
            gate,
            now_ns: 1000 * SECOND,
        }
    }

    fn with_rules(rules: &[Rule]) -> Self {
        Self::new(&secured(rules))
    }

    #[track_caller]
    fn passes(&self, direction: Direction, frame: &[u8]) {
        let verdict = self.gate.check(&parsed(frame), direction, self.now_ns);
        assert_eq!(verdict, Verdict::Pass, "{direction:?} {frame:02x?}");
    }

    #[track_caller]
    fn drops(&self, direction: Direction, frame: &[u8], reason: DropReason) {
        let verdict = self.gate.check(&parsed(frame), direction, self.now_ns);
        assert_eq!(verdict, Verdict::Drop(reason), "{direction:?} {frame:02x?}");
    }

    /// Dropped for want of a rule.
    #[track_caller]
    fn refuses(&self, direction: Direction, frame: &[u8]) {
        self.drops(direction, frame, DropReason::NotPermitted);
    }

    fn later(&mut self, seconds: u64) {
        self.now_ns += seconds * SECOND;
    }

    fn states(&self) -> Vec<&'static str> {
        let flows = self.gate.flows(self.now_ns);
        flows.iter().map(|flow| flow.state.name()).collect()
    }
}

fn secured(rules: &[Rule]) -> Policy {
    Policy {
        security: Some(Security {
            rules: rules.to_vec(),
            ethertypes: vec![0x88cc],
        }),
        ..Policy::default()
    }
}

fn rule(direction: Direction, protocol: Protocol) -> Rule {
    Rule {
        direction,
        family: None,
        protocol,
        remote: Remote::Any,
        is_stateless: false,
    }
}

fn from(cidrs: &[&str], rule: Rule) -> Rule {
    let cidrs = cidrs.iter().map(|text| text.parse().unwrap()).collect();
    Rule {
        remote: Remote::In(cidrs),
        ..rule
    }
}

fn anything_out() -> Rule {
    rule(Egress, Protocol::Any)
}

#[test]
fn without_a_policy_everything_passes() {
    let bench = Bench::new(&Policy::default());
    bench.passes(Ingress, &tcp(PEER, 1, GUEST, 22, SYN));
    bench.passes(Egress, &[0; 14]);
    bench.passes(Egress, &ethernet(PEER_MAC, GUEST_MAC, 0x0800, &[0x45]));
    assert_eq!(bench.gate.num_flows(), 0);
}

#[test]
fn nothing_passes_without_a_rule_but_what_hosts_cannot_do_without() {
    let bench = Bench::with_rules(&[]);
    for (direction, one, other) in [(Ingress, PEER, GUEST), (Egress, GUEST, PEER)] {
        bench.refuses(direction, &tcp(one, 1024, other, 22, SYN));
        bench.refuses(direction, &tcp(one, 1024, other, 22, ACK));
        bench.refuses(direction, &udp(one, 1024, other, 53));
        bench.refuses(direction, &echo(one, other, false, 1));
        bench.refuses(direction, &echo(one, other, true, 1));
        bench.refuses(direction, &ip(one, other, 47, &[0; 8]));
        bench.passes(direction, &arp(PEER_MAC, 1, PEER_MAC, one, other));
        bench.drops(
            direction,
            &ethernet(PEER_MAC, GUEST_MAC, 0x8863, &[]),
            DropReason::Ethertype,
        );
        bench.passes(direction, &ethernet(PEER_MAC, GUEST_MAC, 0x88cc, &[]));
    }
    bench.refuses(Ingress, &tcp(PEER_V6, 1024, GUEST_V6, 22, SYN));
    for kind in [133, 135, 136] {
        bench.passes(
            Ingress,
            &neighbour("fe80::1", kind, PEER_V6, Some(PEER_MAC)),
        );
        bench.passes(Egress, &neighbour("fe80::1", kind, PEER_V6, Some(PEER_MAC)));
    }
    bench.passes(Egress, &udp("0.0.0.0", 68, "255.255.255.255", 67));
    bench.passes(Ingress, &udp("10.0.0.1", 67, GUEST, 68));
    bench.refuses(Ingress, &udp("10.0.0.1", 68, GUEST, 67));
    bench.passes(Egress, &udp("fe80::5", 546, "ff02::1:2", 547));
    bench.passes(Ingress, &udp("fe80::1", 547, "fe80::5", 546));
    bench.refuses(Ingress, &udp("fe80::1", 67, "fe80::5", 68));
    assert_eq!(bench.gate.num_flows(), 0);
}

#[test]
fn neighbour_discovery_from_beyond_the_link_needs_a_rule() {
    let bench = Bench::with_rules(&[]);
    let mut frame = neighbour("fe80::1", 136, PEER_V6, Some(PEER_MAC));
    frame[14 + 7] = 254;
    bench.refuses(Ingress, &frame);
}

#[test]
fn rule_permits_its_ports_its_remote_and_nothing_else() {
    let web = from(
        &["10.0.0.0/24", "2001:db8::/64"],
        rule(Ingress, Protocol::Ports(6, 80, 81)),
    );
    let bench = Bench::with_rules(&[web]);
    for port in [80, 81] {
        bench.passes(Ingress, &tcp(PEER, 1024, GUEST, port, SYN));
        bench.passes(Ingress, &tcp(PEER_V6, 1024, GUEST_V6, port, SYN));
    }
    bench.refuses(Ingress, &tcp(PEER, 1024, GUEST, 79, SYN));
    bench.refuses(Ingress, &tcp(PEER, 1024, GUEST, 82, SYN));
    bench.refuses(Ingress, &tcp(PEER, 80, GUEST, 1024, SYN));
    bench.refuses(Ingress, &udp(PEER, 1024, GUEST, 80));
    bench.refuses(Ingress, &tcp("10.0.1.9", 1024, GUEST, 80, SYN));
    bench.refuses(Ingress, &tcp("2001:db9::1", 1024, GUEST_V6, 80, SYN));
    bench.refuses(Egress, &tcp(GUEST, 1024, PEER, 80, SYN));
}

#[test]
fn rule_of_a_family_and_a_protocol_permits_no_other() {
    let v6 = Rule {
        family: Some(Family::Ipv6),
        ..rule(Ingress, Protocol::Number(47))
    };
    let bench = Bench::with_rules(&[v6]);
    bench.passes(Ingress, &ip(PEER_V6, GUEST_V6, 47, &[0; 4]));
    bench.refuses(Ingress, &ip(PEER, GUEST, 47, &[0; 4]));
    bench.refuses(Ingress, &ip(PEER_V6, GUEST_V6, 50, &[0; 8]));
}

#[test]
fn icmp_rule_means_both_versions_and_one_type() {
    let bench = Bench::with_rules(&[rule(Ingress, Protocol::Icmp(None))]);
    bench.passes(Ingress, &echo(PEER, GUEST, false, 1));
    bench.passes(Ingress, &echo(PEER_V6, GUEST_V6, false, 1));
    bench.passes(Egress, &echo(GUEST, PEER, true, 1));
    bench.refuses(Egress, &echo(GUEST, PEER, false, 1));
    bench.refuses(Ingress, &udp(PEER, 1, GUEST, 1));

    let bench = Bench::with_rules(&[rule(Ingress, Protocol::Icmp(Some((8, Some(0)))))]);
    bench.passes(Ingress, &echo(PEER, GUEST, false, 1));
    bench.refuses(Ingress, &echo(PEER, GUEST, true, 2));
    bench.refuses(Ingress, &echo(PEER_V6, GUEST_V6, false, 1));
}

#[test]
fn stateless_rule_permits_no_reply() {
    let stateless = Rule {
        is_stateless: true,
        ..anything_out()
    };
    let bench = Bench::with_rules(std::slice::from_ref(&stateless));
    bench.passes(Egress, &udp(GUEST, 1024, PEER, 53));
    bench.refuses(Ingress, &udp(PEER, 53, GUEST, 1024));
    let both = Bench::with_rules(&[stateless, anything_out()]);
    both.passes(Egress, &udp(GUEST, 1024, PEER, 53));
    both.passes(Ingress, &udp(PEER, 53, GUEST, 1024));
}

#[test]
fn flows_are_listed_with_what_they_carried() {
    let mut bench = Bench::new(&Policy {
        track_flows: true,
        ..Policy::default()
    });
    let request = tagged(&udp(GUEST, 1024, PEER, 53), 7);
    bench.passes(Egress, &request);
    bench.later(3);
    bench.passes(Ingress, &tagged(&udp(PEER, 53, GUEST, 1024), 7));
    bench.later(2);
    // Another VLAN is another network.
    bench.passes(Ingress, &udp(PEER, 53, GUEST, 1024));
    bench.passes(Ingress, &[0; 60]);
    let flows = bench.gate.flows(bench.now_ns);
    assert_eq!(flows.len(), 2);
    let flow = &flows[1];
    assert_eq!(
        (flow.local, flow.local_port),
        (GUEST.parse().unwrap(), 1024)
    );
    assert_eq!((flow.remote, flow.remote_port), (PEER.parse().unwrap(), 53));
    assert_eq!((flow.protocol, flow.vlans), (17, [7, 0]));
    assert_eq!((flow.origin, flow.state.name()), (Egress, "replied"));
    assert_eq!((flow.age_ns, flow.idle_ns), (5 * SECOND, 2 * SECOND));
    let bytes = request.len() as u64;
    for volume in [flow.ingress, flow.egress] {
        assert_eq!((volume.packets, volume.bytes), (1, bytes));
    }
    bench.gate.set_policy(&Policy::default());
    assert_eq!(bench.gate.num_flows(), 0);
}

#[test]
fn fragments_pass_with_their_first_one_and_not_before() {
    let dns = rule(Ingress, Protocol::Ports(17, 53, 53));
    let mut bench = Bench::with_rules(&[dns]);
    let first = |id| fragment(udp(PEER, 1024, GUEST, 53), id, 0, true);
    let later = |id| fragment(ip(PEER, GUEST, 17, &[0; 64]), id, 1480, false);
    bench.drops(Ingress, &later(1), DropReason::Fragment);
    bench.passes(Ingress, &first(1));
    bench.passes(Ingress, &later(1));
    bench.drops(Ingress, &later(2), DropReason::Fragment);
    bench.drops(Egress, &later(1), DropReason::Fragment);
    let refused = fragment(udp(PEER, 1024, GUEST, 54), 2, 0, true);
    bench.refuses(Ingress, &refused);
    bench.drops(Ingress, &later(2), DropReason::Fragment);
    bench.later(31);
    bench.drops(Ingress, &later(1), DropReason::Fragment);
}

#[test]
fn fragment_over_a_tcp_header_is_malformed() {
    let bench = Bench::with_rules(&[rule(Ingress, Protocol::Any)]);
    bench.passes(Ingress, &fragment(tcp(PEER, 1, GUEST, 2, SYN), 1, 0, true));
    for offset_bytes in [8, 16] {
        let over = fragment(ip(PEER, GUEST, 6, &[0; 32]), 1, offset_bytes, false);
        bench.drops(Ingress, &over, DropReason::Malformed);
    }
    bench.passes(
        Ingress,
        &fragment(ip(PEER, GUEST, 6, &[0; 32]), 1, 24, false),
    );
    // The first one has to have all ports and flags.
    let short = fragment(ip(PEER, GUEST, 6, &[0; 8]), 2, 0, true);
    bench.drops(Ingress, &short, DropReason::Malformed);
}
