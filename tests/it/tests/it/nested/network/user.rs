//! A guest whose NIC is passt's: the host's own sockets, no privileges.

use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use guest::plan::Job;
use guest::report::Report;
use guest::{datagrams, exchange};

use super::lan::{SEED, serve};
use super::terminal::Terminal;
use super::world::{HOST, WORLD, World};
use crate::nested::fleet::{Fleet, wait_until};

const GUEST_PORT: u16 = 5000;
const FORWARDED: u16 = 8081;
const ELSEWHERE: u16 = 6000;
const BYTES: u64 = 256 << 10;
const DATAGRAMS: u64 = 50;
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_guest_of_a_user_network_reaches_the_world_and_is_reached_by_a_forwarded_port() {
    if !std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .any(|dir| dir.join("passt").exists())
    {
        println!("skipped: there is no passt that serves vhost-user");
        return;
    }
    let fleet = Fleet::start();
    let world = World::start();
    // passt gives the guest the address of the interface with the default route.
    super::world::ip(&format!("route add default via {WORLD}"));
    let plan = guest::plan::Plan {
        jobs: vec![Job::Dhcp, serve(GUEST_PORT, BYTES)],
        end: guest::plan::End::Obey,
        ..guest::plan::Plan::default()
    };
    let net = format!(
        "--net=user,port-forward=tcp:127.0.0.1:{FORWARDED}:{GUEST_PORT},port-forward=udp:127.0.0.1:{FORWARDED}:{GUEST_PORT}"
    );
    fleet.create_vm_named("web", &plan, &[&net]);
    fleet.done(&["vm", "start", "web"]);
    let mut terminal = Terminal::attach(&fleet, "web");
    let reports = terminal.finish();
    let Some(Report::Lease { address, .. }) = reports.first() else {
        panic!("{reports:?}");
    };
    assert_eq!(
        address.split('/').next(),
        Some(HOST.to_string().as_str()),
        "the guest has the host's address"
    );

    let in_world = world.inside(|| super::world::serve(ELSEWHERE, SEED, BYTES));
    terminal.tell(vec![
        super::lan::net(WORLD.into(), ELSEWHERE, BYTES),
        super::lan::udp(WORLD.into(), ELSEWHERE),
    ]);
    let seen = in_world.join().expect("no panic");
    assert_eq!(seen.ip(), HOST, "a socket of the host's connected");

    let to_guest = (Ipv4Addr::LOCALHOST, FORWARDED);
    let stream = TcpStream::connect(to_guest).expect("the port is forwarded");
    stream.set_read_timeout(Some(LIMIT)).expect("a socket");
    exchange::as_guest(stream, SEED, BYTES).expect("both payloads arrive");
    datagrams::ask(to_guest.into(), SEED, DATAGRAMS, LIMIT).expect("datagrams are answered");
    terminal.expect_served(1);

    terminal.power_off();
    wait_until("the guest's shutdown", || {
        fleet.phase().ends_with("stopped")
    });
    fleet.done(&["vm", "delete", "web"]);
}
