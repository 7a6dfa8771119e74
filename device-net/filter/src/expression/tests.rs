use super::*;
use crate::frames::*;

fn expression(text: &str) -> Expression {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[track_caller]
fn matches(text: &str, frame: &[u8]) -> bool {
    expression(text).matches(&parsed(frame))
}

#[test]
fn terms_match_what_they_name() {
    let ssh = tcp(PEER, 1024, GUEST, 22, SYN);
    let dns = udp(GUEST_V6, 1024, PEER_V6, 53);
    let ask = arp(PEER_MAC, 1, PEER_MAC, PEER, GUEST);
    for (text, frame, expected) in [
        ("", &ssh, true),
        ("tcp", &ssh, true),
        ("udp", &ssh, false),
        ("ip", &ssh, true),
        ("ip6", &ssh, false),
        ("ip proto 6", &ssh, true),
        ("ip6 proto 6", &ssh, false),
        ("proto tcp", &ssh, true),
        ("ip proto \\tcp", &ssh, true),
        ("host 10.0.0.9", &ssh, true),
        ("10.0.0.9", &ssh, true),
        ("src host 10.0.0.5", &ssh, false),
        ("dst 10.0.0.5", &ssh, true),
        ("src and dst net 10.0.0.0/24", &ssh, true),
        ("src and dst host 10.0.0.9", &ssh, false),
        ("src or dst host 10.0.0.9", &ssh, true),
        ("net 10.0.0.0/8", &ssh, true),
        ("net 10.0.1.0/24", &ssh, false),
        ("port 22", &ssh, true),
        ("dst port 22", &ssh, true),
        ("src port 22", &ssh, false),
        ("udp port 22", &ssh, false),
        ("tcp dst portrange 20-30", &ssh, true),
        ("ether src 52:54:00:00:00:02", &ssh, true),
        ("ether host 52:54:00:00:00:03", &ssh, false),
        ("ether proto 0x0800", &ssh, true),
        ("less 54", &ssh, true),
        ("less 53", &ssh, false),
        ("greater 54", &ssh, true),
        ("ip6 and udp port 53", &dns, true),
        ("net 2001:db8::/32", &dns, true),
        ("ip host 10.0.0.5", &dns, false),
        ("arp", &ask, true),
        ("host 10.0.0.9", &ask, true),
        ("arp host 10.0.0.5", &ask, true),
        ("ip host 10.0.0.5", &ask, false),
        ("broadcast", &ask, true),
        ("ether multicast", &ask, true),
        ("ip multicast", &ask, false),
        ("tcp", &ask, false),
    ] {
        assert_eq!(matches(text, frame), expected, "{text}");
    }
}

#[test]
fn vlans_match_by_any_tag_and_change_nothing_else() {
    let plain = udp(GUEST, 1024, PEER, 53);
    let twice = tagged(&tagged(&plain, 20), 10);
    for (text, expected) in [
        ("vlan", true),
        ("vlan 10", true),
        ("vlan 20 and udp port 53", true),
        ("vlan 30", false),
        ("not vlan", false),
        ("ip", true),
    ] {
        assert_eq!(matches(text, &twice), expected, "{text}");
    }
    assert!(!matches("vlan", &plain));
}

#[test]
fn and_and_or_go_from_left_to_right() {
    let frame = udp(GUEST, 1024, PEER, 53);
    // As in tcpdump: (udp or tcp) and port 80.
    assert!(!matches("udp or tcp and port 80", &frame));
    assert!(matches("udp or (tcp and port 80)", &frame));
    assert!(matches("not tcp and port 53", &frame));
    assert!(!matches("not (udp and port 53)", &frame));
    assert!(matches("! tcp && (port 53||port 80)", &frame));
    assert!(matches("not not udp", &frame));
}

#[test]
fn value_takes_the_words_of_the_one_before() {
    let frame = udp(GUEST, 1024, PEER, 53);
    assert!(matches("dst port 80 or 53", &frame));
    assert!(!matches("src port 80 or 53", &frame));
    assert!(matches(
        "host 10.0.0.1 or 10.0.0.9 and not 10.0.0.2",
        &frame
    ));
}

#[test]
fn mistakes_are_named_with_their_place() {
    for (text, named, place) in [
        ("prot 80", "unknown word", "\"prot\" (character 1)"),
        (
            "tcp port http",
            "a value is missing",
            "\"http\" (character 10)",
        ),
        ("port 65536", "0 to 65535", "\"65536\""),
        ("portrange 30-20", "8000-8080", "\"30-20\""),
        (
            "host 10.0.0.1/8",
            "did you mean 10.0.0.0/8",
            "\"10.0.0.1/8\"",
        ),
        ("host 10.0.0.0/8", "goes with net", "\"10.0.0.0/8\""),
        (
            "tcp host 10.0.0.1",
            "tcp does not go with host",
            "\"10.0.0.1\"",
        ),
        ("ether host 10.0.0.1", "no MAC address", "\"10.0.0.1\""),
        ("ether proto nothing.", "an ethertype is", "\"nothing.\""),
        ("(tcp or udp", "not closed", "at the end"),
        ("tcp)", "\"and\" or \"or\"", "\")\" (character 4)"),
        ("tcp udp", "\"and\" or \"or\"", "\"udp\" (character 5)"),
        ("tcp and", "a term is missing", "at the end"),
        ("vlan 4096", "0 to 4095", "\"4096\""),
        ("less than 5", "a number of bytes", "\"than\""),
        ("arp broadcast", "goes with ether", "\"broadcast\""),
        ("host", "a value is missing", "at the end"),
        ("ü or port 1", "unknown word", "(character 1)"),
        ("grö or tcp", "unknown word", "\"grö\" (character 1)"),
        ("tcp || grö | udp", "unknown word", "\"grö\" (character 8)"),
    ] {
        let error = text.parse::<Expression>().unwrap_err().to_string();
        assert!(
            error.contains(named) && error.contains(place),
            "{text}: {error}"
        );
    }
}

#[test]
fn excess_is_refused() {
    let long = "tcp or ".repeat(1000);
    assert_eq!(long.parse::<Expression>(), Err(ParseError::TooLong));
    let many = format!("ip{}", " or ip".repeat(300));
    assert_eq!(many.parse::<Expression>(), Err(ParseError::TooLong));
    for deep in ["(".repeat(1000) + "ip", "!".repeat(1000) + "ip"] {
        let error = deep.parse::<Expression>().unwrap_err().to_string();
        assert!(error.contains("within one another"), "{error}");
    }
}

#[test]
fn flows_match_as_their_first_frame() {
    let gate = crate::gate::Gate::default();
    gate.set_policy(&crate::policy::Policy {
        track_flows: true,
        ..Default::default()
    });
    let _ = gate.check(
        &parsed(&tcp(PEER, 1024, GUEST, 22, SYN)),
        Direction::Ingress,
        1,
    );
    let flow = &gate.flows(1)[0];
    for (text, expected) in [
        ("", true),
        ("src host 10.0.0.9 and dst port 22", true),
        ("src port 22", false),
        ("tcp and not udp", true),
        ("ip6", false),
        ("vlan", false),
        ("ether host 52:54:00:00:00:01", false),
        ("greater 1", false),
    ] {
        assert_eq!(expression(text).matches_flow(flow), expected, "{text}");
    }
}

mod arbitrary {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn text_is_parsed_or_refused_without_a_fault(
            words in prop::collection::vec(
                prop_oneof![
                    prop::sample::select(vec![
                        "host", "net", "port", "portrange", "src", "dst", "ether", "ip", "ip6",
                        "arp", "tcp", "udp", "icmp6", "vlan", "less", "and", "or", "not", "(", ")",
                        "!", "&&", "||", "10.0.0.1", "10.0.0.0/8", "::1", "22", "1-2", "proto",
                        "multicast", "52:54:00:00:00:01",
                    ]).prop_map(str::to_owned),
                    "\\PC{0,6}",
                ],
                0..12,
            ),
        ) {
            let text = words.join(" ");
            if let Ok(expression) = text.parse::<Expression>() {
                let _ = expression.matches(&parsed(&udp(GUEST, 1, PEER, 2)));
            }
        }
    }
}
