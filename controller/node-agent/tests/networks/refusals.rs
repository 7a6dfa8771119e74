//! Networks that cannot be: one clear error each, and nothing half-made.

use api::node::{NetworkKind, NetworkSpec};
use tonic::Code;

use crate::{
    agent::{Agent, network},
    namespace::Namespace,
};

#[test]
fn each_obstacle_has_its_error_and_leaves_nothing() {
    let mut agent = Agent::start(Namespace::new());
    agent
        .host
        .run("ip link add dummy0 type veth peer name dummy1");
    agent.host.run("ip addr add 10.30.0.1/16 dev dummy0");
    let nat = |change: fn(&mut NetworkSpec)| {
        let mut spec = network("front", NetworkKind::Nat);
        change(&mut spec);
        spec
    };
    let bridged = |bridge: &str| {
        let mut spec = network("front", NetworkKind::Bridged);
        spec.bridge = bridge.into();
        spec
    };
    let cases = [
        (
            bridged("br7"),
            Code::NotFound,
            "ip link add br7 type bridge",
        ),
        (bridged("dummy0"), Code::InvalidArgument, "is no bridge"),
        (
            nat(|spec| spec.uplink = "wan0".into()),
            Code::NotFound,
            "wan0 does not exist",
        ),
        (
            nat(|spec| spec.ipv4_gateway = "10.30.5.1/24".into()),
            Code::FailedPrecondition,
            "overlaps 10.30.0.1/16 of interface dummy0",
        ),
    ];
    for (spec, code, words) in cases {
        let refused = agent.apply(&spec).unwrap_err();
        assert_eq!(refused.code(), code, "{}", refused.message());
        assert!(refused.message().contains(words), "{}", refused.message());
        let seen = agent.network("front").unwrap();
        assert!(!seen.ready && seen.error == refused.message());
        agent.delete("front").unwrap();
        agent.assert_clean();
    }
    agent
        .host
        .run("ip link add mb-front type veth peer name mb0");
    let refused = agent
        .apply(&network("front", NetworkKind::Nat))
        .unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists);
    agent.host.run("ip link del mb-front");
    agent.apply(&network("front", NetworkKind::Nat)).unwrap();
}

#[test]
fn server_that_cannot_serve_is_told_with_its_words_and_undone() {
    let mut agent = Agent::start(Namespace::new());
    let _taken = agent.host.serve("[::]:53");
    let refused = agent
        .apply(&network("front", NetworkKind::Nat))
        .unwrap_err();
    assert!(
        refused.message().contains("dnsmasq") && refused.message().contains("in use"),
        "{}",
        refused.message()
    );
    agent.assert_clean();
}

#[test]
fn bridged_network_uses_a_bridge_and_leaves_it() {
    let mut agent = Agent::start(Namespace::new());
    agent.host.run("ip link add br7 type bridge");
    let mut spec = network("lan", NetworkKind::Bridged);
    spec.bridge = "br7".into();
    let status = agent.apply(&spec).unwrap();
    assert!(status.ready && status.bridge == "br7", "{status:?}");
    agent.delete("lan").unwrap();
    agent.host.run("ip link show br7");
    agent.assert_clean();
}
