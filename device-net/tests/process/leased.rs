//! NICs that may pass frames until a moment.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use api::boottime;
use api::device::attach_request::{Device as DeviceConfig, Listener};
use api::device::leases_client::LeasesClient;
use api::device::{AllowIoRequest, AttachRequest, NetConfig, SwitchPort};
use tonic::{Code, Status};

use crate::control::{Manager, managed, reference, send};
use crate::daemon::{DEADLINE, Daemon, await_true};
use crate::frame;
use crate::guest::Guest;
use crate::host::{create_tap, open_tap};
use crate::traffic::{datagram, guest_address, host_socket};

const MACS: [[u8; 6]; 2] = [[0x52, 0x54, 0, 0, 0, 1], [0x52, 0x54, 0, 0, 0, 2]];

fn allow(manager: &Manager, daemon: &Daemon, ids: &[&str]) -> Result<u32, Status> {
    let request = AllowIoRequest {
        ids: ids.iter().map(ToString::to_string).collect(),
        until_boottime_ns: boottime::now_ns() + 4 * DEADLINE.as_nanos() as u64,
    };
    manager.runtime.block_on(async {
        let channel = api::connect::unix(&daemon.control(), DEADLINE)
            .await
            .unwrap();
        let answer = LeasesClient::new(channel).allow_io(request).await?;
        Ok(answer.into_inner().devices)
    })
}

/// Attaches a NIC `id` that listens in the daemon's directory, and connects a guest to it.
fn attach(daemon: &Daemon, manager: &mut Manager, id: &str, config: NetConfig) -> Guest {
    let socket = daemon.dir().join(format!("{id}.vu"));
    let listener: OwnedFd = UnixListener::bind(&socket).unwrap().into();
    send(daemon, id, &[listener]);
    let request = AttachRequest {
        id: id.to_owned(),
        listener: Some(Listener::SocketFd(reference(id))),
        device: Some(DeviceConfig::Net(config)),
    };
    manager.attach(request).unwrap();
    let mut guest = Guest::connect(&socket, 1);
    guest.supply(0, 64, 1536);
    guest
}

/// Waits until frames were dropped both ways because the lease is over.
fn await_drops(manager: &mut Manager, id: &str) {
    await_true("frames are dropped both ways", || {
        let stats = manager.get(id).net.unwrap();
        let late =
            |drops: &std::collections::BTreeMap<String, u64>| drops.contains_key("lease_ended");
        late(&stats.rx_drops_by_reason) && late(&stats.tx_drops_by_reason)
    });
}

fn ethernet(to: usize, from: usize, payload: &[u8]) -> Vec<u8> {
    [&MACS[to][..], &MACS[from], &[0x88, 0xb5], payload].concat()
}

#[track_caller]
fn next(guest: &mut Guest) -> Vec<u8> {
    let mut received = None;
    await_true("a frame comes", || {
        received = guest.try_receive(0);
        received.is_some()
    });
    received.unwrap().frame
}

#[test]
fn port_passes_nothing_from_its_lease_s_end_to_the_next_one() {
    let daemon = Daemon::start(tempfile::tempdir().unwrap(), &[]);
    let mut manager = Manager::of(&daemon);
    let port = |number: usize| NetConfig {
        mac: MACS[number].map(|octet| format!("{octet:02x}")).join(":"),
        switch_port: Some(SwitchPort {
            switch: "s0".to_owned(),
            ..SwitchPort::default()
        }),
        ..NetConfig::default()
    };
    let leased = NetConfig {
        leased: true,
        io_until_boottime_ns: boottime::now_ns() + 1_000_000_000,
        ..port(0)
    };
    let mut first = attach(&daemon, &mut manager, "leased", leased);
    let mut second = attach(&daemon, &mut manager, "free", port(1));
    await_true("the lease ends by the daemon's clock", || {
        manager.get("leased").io_stopped
    });
    assert!(!manager.get("free").io_stopped);
    first.send(0, &ethernet(1, 0, b"too late"));
    second.send(0, &ethernet(0, 1, b"too late"));
    await_drops(&mut manager, "leased");

    let refused = allow(&manager, &daemon, &["free"]).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let refused = allow(&manager, &daemon, &["leased", "none"]).unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused}");
    assert_eq!(allow(&manager, &daemon, &[]).unwrap(), 1);
    assert!(!manager.get("leased").io_stopped);
    first.send(0, &ethernet(1, 0, b"again"));
    assert_eq!(next(&mut second), ethernet(1, 0, b"again"));
    second.send(0, &ethernet(0, 1, b"again"));
    assert_eq!(next(&mut first), ethernet(0, 1, b"again"));
}

#[test]
fn tap_gets_and_gives_nothing_without_leave() {
    let Some((daemon, mut manager)) = managed() else {
        return;
    };
    create_tap("tap0", 1, 1500);
    send(&daemon, "tap", &open_tap("tap0", 1));
    let config = NetConfig {
        tap_fds: vec![reference("tap")],
        mac: "52:54:00:12:34:56".to_owned(),
        tap_name: "tap0".to_owned(),
        leased: true,
        ..NetConfig::default()
    };
    let mut guest = attach(&daemon, &mut manager, "leased", config);
    let host = host_socket();
    guest.send(0, &frame::arp_request());
    host.send_to(b"too late", guest_address()).unwrap();
    await_drops(&mut manager, "leased");
    assert_eq!(allow(&manager, &daemon, &["leased"]).unwrap(), 1);
    guest.find_host();
    host.send_to(b"again", guest_address()).unwrap();
    let (_, received) = guest.receive(datagram);
    assert!(received == b"again" || received == b"too late");
}
