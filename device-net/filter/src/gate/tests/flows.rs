//! Connections and their ends.

use super::*;

fn ssh() -> Rule {
    rule(Ingress, Protocol::Ports(6, 22, 22))
}

/// From the peer to the guest's server, and back.
fn to_ssh(flags: u8) -> Vec<u8> {
    tcp(PEER, 1024, GUEST, 22, flags)
}

fn from_ssh(flags: u8) -> Vec<u8> {
    tcp(GUEST, 22, PEER, 1024, flags)
}

fn to_web(flags: u8) -> Vec<u8> {
    tcp(GUEST, 1024, PEER, 80, flags)
}

fn from_web(flags: u8) -> Vec<u8> {
    tcp(PEER, 80, GUEST, 1024, flags)
}

#[test]
fn replies_pass_without_a_rule_of_their_own() {
    let bench = Bench::with_rules(&[ssh()]);
    bench.refuses(Egress, &from_ssh(SYN | ACK));
    bench.passes(Ingress, &to_ssh(SYN));
    assert_eq!(bench.states(), ["syn-sent"]);
    bench.passes(Egress, &from_ssh(SYN | ACK));
    assert_eq!(bench.states(), ["syn-received"]);
    bench.passes(Ingress, &to_ssh(ACK));
    assert_eq!(bench.states(), ["established"]);
    bench.passes(Egress, &from_ssh(ACK));
    bench.refuses(Egress, &tcp(GUEST, 23, PEER, 1024, ACK));
    bench.refuses(Egress, &tcp(GUEST, 22, PEER, 1025, ACK));
    assert_eq!(bench.gate.num_flows(), 1);
}

#[test]
fn connection_ends_by_fin_of_both_sides_or_by_a_reset() {
    let mut bench = Bench::with_rules(&[anything_out()]);
    bench.passes(Egress, &to_web(SYN));
    bench.passes(Ingress, &from_web(SYN | ACK));
    bench.passes(Egress, &to_web(ACK));
    bench.passes(Egress, &to_web(FIN | ACK));
    assert_eq!(bench.states(), ["half-closed"]);
    bench.passes(Ingress, &from_web(FIN | ACK));
    assert_eq!(bench.states(), ["closing"]);
    bench.later(121);
    bench.refuses(Ingress, &from_web(ACK));

    bench.passes(Egress, &to_web(SYN));
    bench.passes(Ingress, &from_web(RST | ACK));
    assert_eq!(bench.states(), ["closed"]);
    bench.later(11);
    bench.refuses(Ingress, &from_web(ACK));
}

#[test]
fn reset_that_was_not_meant_does_not_end_what_goes_on() {
    let mut bench = Bench::with_rules(&[anything_out()]);
    bench.passes(Egress, &to_web(SYN));
    bench.passes(Ingress, &from_web(SYN | ACK));
    bench.passes(Egress, &to_web(ACK));
    bench.passes(Ingress, &from_web(RST));
    bench.passes(Egress, &to_web(ACK));
    assert_eq!(bench.states(), ["established"]);
    bench.later(3600);
    bench.passes(Ingress, &from_web(ACK));
}

#[test]
fn other_side_cannot_open_a_connection_over_one_that_it_answered() {
    let mut bench = Bench::with_rules(&[anything_out()]);
    bench.passes(Egress, &to_web(SYN));
    bench.passes(Ingress, &from_web(SYN | ACK));
    bench.passes(Egress, &to_web(ACK));
    bench.refuses(Ingress, &from_web(SYN));
    bench.passes(Ingress, &from_web(ACK));
    assert_eq!(bench.states(), ["established"]);
    // Nor over one that has ended; the guest can.
    bench.passes(Egress, &to_web(RST));
    bench.refuses(Ingress, &from_web(SYN));
    bench.passes(Egress, &to_web(SYN));
    assert_eq!(bench.states(), ["syn-sent"]);
    bench.later(1);
    assert_eq!(bench.gate.num_flows(), 1);
}

#[test]
fn both_sides_may_open_at_the_same_time() {
    let bench = Bench::with_rules(&[anything_out()]);
    bench.passes(Egress, &to_web(SYN));
    bench.passes(Ingress, &from_web(SYN));
    bench.passes(Egress, &to_web(SYN | ACK));
}

#[test]
fn connection_that_is_older_than_the_table_goes_on() {
    let bench = Bench::with_rules(&[anything_out()]);
    // The other side has to wait for who may open.
    bench.refuses(Ingress, &from_web(ACK));
    bench.passes(Egress, &to_web(ACK));
    bench.passes(Ingress, &from_web(ACK));
    assert_eq!(bench.states(), ["established"]);
}

#[test]
fn unanswered_flows_are_forgotten_sooner_than_answered_ones() {
    let mut bench = Bench::with_rules(&[anything_out()]);
    let answer = |port| udp(PEER, 53, GUEST, port);
    for port in [1, 2] {
        bench.passes(Egress, &udp(GUEST, port, PEER, 53));
    }
    bench.passes(Ingress, &answer(1));
    bench.later(31);
    bench.refuses(Ingress, &answer(2));
    bench.passes(Ingress, &answer(1));
    bench.later(179);
    bench.passes(Ingress, &answer(1));
    bench.later(181);
    bench.refuses(Ingress, &answer(1));
}

#[test]
fn echo_replies_need_their_request() {
    let bench = Bench::with_rules(&[anything_out()]);
    for (guest, peer) in [(GUEST, PEER), (GUEST_V6, PEER_V6)] {
        bench.refuses(Ingress, &echo(peer, guest, true, 5));
        bench.passes(Egress, &echo(guest, peer, false, 5));
        bench.passes(Ingress, &echo(peer, guest, true, 5));
        bench.refuses(Ingress, &echo(peer, guest, true, 6));
        // The same identifier does not let the other side ask.
        bench.refuses(Ingress, &echo(peer, guest, false, 5));
    }
    // And a reply of the guest's own opens nothing.
    bench.passes(Egress, &echo(GUEST, PEER, true, 7));
    bench.refuses(Ingress, &echo(PEER, GUEST, false, 7));
}

#[test]
fn errors_pass_that_are_about_a_flow() {
    let bench = Bench::with_rules(&[anything_out(), ssh()]);
    let router = "10.0.0.1";
    let syn = to_web(SYN);
    bench.refuses(Ingress, &unreachable(router, GUEST, &syn));
    bench.passes(Egress, &syn);
    bench.passes(Ingress, &unreachable(router, GUEST, &syn));
    bench.refuses(
        Ingress,
        &unreachable(router, GUEST, &tcp(GUEST, 1025, PEER, 80, SYN)),
    );
    // One that the peer is said to have sent.
    bench.refuses(Ingress, &unreachable(router, GUEST, &from_web(ACK)));

    let request = echo(GUEST, PEER, false, 9);
    bench.passes(Egress, &request);
    bench.passes(Ingress, &unreachable(router, GUEST, &request));
    bench.refuses(
        Ingress,
        &unreachable(router, GUEST, &echo(GUEST, PEER, true, 9)),
    );

    let syn = tcp(GUEST_V6, 1024, PEER_V6, 80, SYN);
    bench.refuses(Ingress, &unreachable("2001:db8::1", GUEST_V6, &syn));
    bench.passes(Egress, &syn);
    bench.passes(Ingress, &unreachable("2001:db8::1", GUEST_V6, &syn));
}

#[test]
fn guest_may_send_errors_about_what_it_was_sent() {
    let bench = Bench::with_rules(&[rule(Ingress, Protocol::Any)]);
    let query = udp(PEER, 1024, GUEST, 53);
    bench.refuses(Egress, &unreachable(GUEST, PEER, &query));
    bench.passes(Ingress, &query);
    bench.passes(Egress, &unreachable(GUEST, PEER, &query));
}

#[test]
fn change_of_the_policy_ends_what_it_does_not_permit_and_nothing_else() {
    let mut bench = Bench::with_rules(&[ssh(), anything_out()]);
    bench.passes(Ingress, &to_ssh(SYN));
    bench.passes(Egress, &from_ssh(SYN | ACK));
    bench.passes(Ingress, &to_ssh(ACK));
    bench.passes(Egress, &to_web(SYN));
    bench.passes(Ingress, &from_web(SYN | ACK));
    bench.passes(Egress, &to_web(ACK));

    bench.gate.set_policy(&secured(&[anything_out()]));
    bench.passes(Ingress, &from_web(ACK));
    bench.refuses(Ingress, &to_ssh(ACK));
    // Although the guest may open connections.
    bench.refuses(Egress, &from_ssh(ACK));
    bench.later(170);
    bench.refuses(Egress, &from_ssh(ACK));
    bench.later(170);
    bench.refuses(Egress, &from_ssh(ACK));

    // Permitted again, it goes on.
    bench.gate.set_policy(&secured(&[anything_out(), ssh()]));
    bench.passes(Egress, &from_ssh(ACK));
    bench.passes(Ingress, &to_ssh(ACK));
}

#[test]
fn revoked_flow_may_be_opened_anew_by_who_may() {
    let bench = Bench::with_rules(&[ssh()]);
    bench.passes(Ingress, &to_ssh(SYN));
    bench.gate.set_policy(&secured(&[anything_out()]));
    bench.refuses(Ingress, &to_ssh(ACK));
    bench.passes(Egress, &from_ssh(SYN));
    bench.passes(Ingress, &to_ssh(SYN | ACK));
}

#[test]
fn rules_that_come_later_hold_for_flows_that_were_only_tracked() {
    let bench = Bench::new(&Policy {
        track_flows: true,
        ..Policy::default()
    });
    bench.passes(Ingress, &to_ssh(SYN));
    bench.passes(Egress, &to_web(SYN));
    bench.gate.set_policy(&secured(&[anything_out()]));
    bench.refuses(Ingress, &to_ssh(ACK));
    bench.passes(Ingress, &from_web(SYN | ACK));
}
