//! NICs of user networks: a real passt where there is one that can (the variable PASST names it), and
//! what is said where there is none.

use std::{
    net::{TcpStream, UdpSocket},
    path::PathBuf,
    time::Duration,
};

use api::node::{NicSpec, PortForward, Power, UserNetwork, VmPhase};
use nix::sys::signal::Signal;

use crate::{
    guest,
    harness::{Agent, gone, kill_hard, pid, spec},
};

fn nic(name: &str, forwards: &[(&str, u16)]) -> NicSpec {
    let forward = |(protocol, port): &(&str, u16)| PortForward {
        protocol: (*protocol).into(),
        host_address: "127.0.0.1".into(),
        host_port: (*port).into(),
        guest_port: 7,
    };
    NicSpec {
        name: name.into(),
        user: Some(UserNetwork {
            port_forwards: forwards.iter().map(forward).collect(),
            host_loopback: String::new(),
        }),
        ..NicSpec::default()
    }
}

/// An agent that knows a passt; `None`, with the reason printed, where none is named.
async fn agent() -> Option<Agent> {
    let Some(passt) = std::env::var_os("PASST").map(PathBuf::from) else {
        println!("skipped: PASST names no passt that serves vhost-user");
        return None;
    };
    Some(Agent::start_with("passt", &format!("exec '{}' \"$@\"", passt.display())).await)
}

/// A TCP port and a UDP port that were free just now.
fn free_ports() -> (u16, u16) {
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    (
        tcp.local_addr().unwrap().port(),
        udp.local_addr().unwrap().port(),
    )
}

fn is_forwarded(port: u16) -> bool {
    let address = ([127, 0, 0, 1], port).into();
    TcpStream::connect_timeout(&address, Duration::from_secs(5)).is_ok()
}

#[tokio::test]
async fn passt_serves_a_nic_is_restarted_adopted_and_ended() {
    let Some(mut agent) = agent().await else {
        return;
    };
    let (tcp, udp) = free_ports();
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.nics = vec![nic("eth0", &[("tcp", tcp), ("udp", udp)]), nic("eth1", &[])];
    let status = agent.run(&vm).await;
    let served = |name: &str, incarnations: u64| {
        let name = name.to_owned();
        move |status: &api::node::VmStatus| {
            status.devices.iter().any(|device| {
                device.name == name && device.connected && device.incarnations == incarnations
            })
        }
    };
    assert!(
        served("eth0", 1)(&status) && served("eth1", 1)(&status),
        "{status:#?}"
    );
    let passts = || {
        status
            .processes
            .iter()
            .filter(|process| process.name == "passt")
    };
    assert_eq!(passts().count(), 2);
    assert!(
        passts().all(|passt| passt.sandbox.contains(&"seccomp".into())),
        "{status:#?}"
    );
    assert!(
        !status
            .processes
            .iter()
            .any(|process| process.name == "device-net")
    );
    assert!(is_forwarded(tcp), "port {tcp} is open");
    UdpSocket::bind(("127.0.0.1", udp)).expect_err("the UDP port is taken");

    let first = pid(&status, "passt");
    kill_hard(first);
    let status = agent.until("web", "served again", served("eth0", 2)).await;
    assert!(
        served("eth1", 1)(&status),
        "the other NIC's passt lives: {status:#?}"
    );
    assert!(is_forwarded(tcp), "port {tcp} is open again");

    let before = pid(&status, "passt");
    agent.end(Signal::SIGKILL);
    agent.start_again().await;
    let status = agent.until("web", "adopted", served("eth0", 2)).await;
    assert_eq!(pid(&status, "passt"), before, "it was adopted");
    kill_hard(before);
    let status = agent.until("web", "served", served("eth0", 3)).await;

    let last = pid(&status, "passt");
    agent.power(&mut vm, Power::OffNow).await;
    agent
        .until("web", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    gone(last).await;
    assert!(!is_forwarded(tcp), "port {tcp} is free");
    agent.delete("web").await.unwrap();
    agent.assert_nothing_left("web");
}

#[tokio::test]
async fn port_that_is_taken_is_one_clear_error() {
    let Some(mut agent) = agent().await else {
        return;
    };
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.nics = vec![nic("eth0", &[("tcp", port)])];
    agent.apply(&vm).await.unwrap();
    let status = agent
        .until("web", "failed", |status| status.phase() == VmPhase::Failed)
        .await;
    assert!(
        status.error.starts_with("passt exited with status")
            && status.error.contains(&port.to_string()),
        "{}",
        status.error
    );
    agent.delete("web").await.unwrap();
    agent.assert_nothing_left("web");
}

#[tokio::test]
async fn passt_that_cannot_serve_vhost_user_is_refused_before_anything_is_made() {
    let mut agent = Agent::start_with("passt", "echo usage: passt [--socket PATH]").await;
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.nics = vec![nic("eth0", &[])];
    agent.apply(&vm).await.unwrap();
    let status = agent
        .until("web", "failed", |status| status.phase() == VmPhase::Failed)
        .await;
    assert!(status.error.contains("Debian 13"), "{}", status.error);
    agent.delete("web").await.unwrap();
    agent.assert_nothing_left("web");
}
