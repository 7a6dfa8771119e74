//! Floods, and bytes that are no frames.

use proptest::prelude::*;

use super::*;

const MAX_FLOWS: usize = 800;

fn flooded(policy: &Policy) -> Bench {
    let gate = Gate::new(MAX_FLOWS);
    gate.set_policy(policy);
    Bench {
        gate,
        now_ns: 1000 * SECOND,
    }
}

#[test]
fn flood_of_half_open_connections_leaves_the_others_alone() {
    let web = rule(Ingress, Protocol::Ports(6, 80, 80));
    let mut bench = flooded(&secured(&[web]));
    let settled = 0..50;
    for port in settled.clone() {
        bench.passes(Ingress, &tcp(PEER, port, GUEST, 80, SYN));
        bench.passes(Egress, &tcp(GUEST, 80, PEER, port, SYN | ACK));
        bench.passes(Ingress, &tcp(PEER, port, GUEST, 80, ACK));
    }
    for number in 0..20 * MAX_FLOWS as u32 {
        let source = std::net::Ipv4Addr::from(0xc0a8_0000 + number).to_string();
        bench.passes(Ingress, &tcp(&source, 1, GUEST, 80, SYN));
        bench.now_ns += SECOND / 1000;
    }
    assert!(
        bench.gate.num_flows() <= MAX_FLOWS,
        "{}",
        bench.gate.num_flows()
    );
    assert!(bench.gate.num_evicted() > 15 * MAX_FLOWS as u64);
    for port in settled {
        // Without the flow there is no rule for this.
        bench.passes(Egress, &tcp(GUEST, 80, PEER, port, ACK));
    }
}

#[test]
fn flood_of_finished_flows_replaces_the_least_recently_used() {
    let mut bench = flooded(&secured(&[anything_out()]));
    let keep = (udp(GUEST, 9, PEER, 9), udp(PEER, 9, GUEST, 9));
    bench.passes(Egress, &keep.0);
    for number in 0..5 * MAX_FLOWS as u32 {
        let peer = std::net::Ipv4Addr::from(0xc0a8_0000 + number).to_string();
        bench.passes(Egress, &udp(GUEST, 1, &peer, 53));
        bench.passes(Ingress, &udp(&peer, 53, GUEST, 1));
        bench.now_ns += SECOND / 100;
        bench.passes(Ingress, &keep.1);
    }
    assert!(bench.gate.num_flows() <= MAX_FLOWS);
}

#[test]
fn expired_flows_are_taken_away_as_new_ones_come() {
    let mut bench = flooded(&secured(&[anything_out()]));
    for port in 0..200 {
        bench.passes(Egress, &udp(GUEST, port, PEER, 53));
    }
    bench.later(60);
    for port in 1000..1200 {
        bench.passes(Egress, &udp(GUEST, port, PEER, 53));
    }
    assert!(bench.gate.num_flows() <= 210, "{}", bench.gate.num_flows());
    assert_eq!(bench.gate.num_evicted(), 0);
    assert_eq!(bench.gate.flows(bench.now_ns).len(), 200);
}

/// Frames that mostly look like some protocol.
fn frames() -> impl Strategy<Value = Vec<u8>> {
    let ethertype = prop_oneof![
        3 => Just(0x0800_u16),
        3 => Just(0x86dd_u16),
        1 => Just(0x0806_u16),
        1 => Just(0x8100_u16),
        1 => any::<u16>(),
    ];
    let protocol = prop::sample::select(vec![0_u8, 1, 2, 6, 17, 43, 44, 51, 58, 60, 132]);
    let payload = prop::collection::vec(any::<u8>(), 0..300);
    let shape = (
        ethertype,
        protocol,
        0_u8..=16,
        any::<bool>(),
        any::<[u8; 12]>(),
    );
    (shape, payload).prop_map(
        |((ethertype, protocol, words, is_sound, macs), mut payload)| {
            if is_sound && payload.len() >= 40 {
                let len = payload.len() as u16;
                match ethertype {
                    0x0800 => {
                        payload[0] = 0x40 | words.max(5) & 0xf;
                        payload[2..4].copy_from_slice(&len.to_be_bytes());
                        payload[6] = 0;
                        payload[7] = 0;
                        payload[9] = protocol;
                    }
                    0x86dd => {
                        payload[0] = 0x60;
                        payload[4..6].copy_from_slice(&(len - 40).to_be_bytes());
                        payload[6] = protocol;
                    }
                    _ => {}
                }
            }
            [&macs[..], &ethertype.to_be_bytes(), &payload].concat()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn arbitrary_bytes_are_judged_without_a_fault(
        frames in prop::collection::vec((frames(), any::<bool>()), 1..20),
    ) {
        let identity = AntiSpoofing {
            macs: vec![GUEST_MAC.parse().unwrap()],
            addresses: Some(vec!["0.0.0.0/1".parse().unwrap(), "::/1".parse().unwrap()]),
            ..AntiSpoofing::default()
        };
        let rules = [rule(Ingress, Protocol::Icmp(None)), anything_out()];
        for policy in [secured(&rules), Policy {
            anti_spoofing: Some(identity),
            ..secured(&rules)
        }] {
            let gate = Gate::new(16);
            gate.set_policy(&policy);
            for (frame, is_ingress) in &frames {
                let direction = if *is_ingress { Ingress } else { Egress };
                let _ = gate.check(&parsed(frame), direction, 1);
            }
            prop_assert!(gate.num_flows() <= 16);
            gate.flows(1);
        }
    }

    #[test]
    fn cut_off_frames_are_read_without_a_fault(frame in frames(), cut in 0_usize..300) {
        let head = &frame[..cut.min(frame.len())];
        for len_bytes in [head.len(), frame.len(), 65535] {
            let _ = Packet::parse(head, len_bytes);
        }
    }

    /// Whatever a guest sends, its answer can only come back along the same flow.
    #[test]
    fn answers_of_others_do_not_pass(
        ports in prop::collection::vec((1_u16..50, 1_u16..50), 1..40),
        probe in (1_u16..50, 1_u16..50),
    ) {
        let bench = Bench::with_rules(&[anything_out()]);
        for &(local, remote) in &ports {
            bench.passes(Egress, &udp(GUEST, local, PEER, remote));
        }
        let answer = udp(PEER, probe.1, GUEST, probe.0);
        if ports.contains(&probe) {
            bench.passes(Ingress, &answer);
        } else {
            bench.refuses(Ingress, &answer);
        }
    }
}
