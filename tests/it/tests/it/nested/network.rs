//! Real guests in networks that the controller made: what they reach, what reaches them, what they
//! survive.

mod lan;
mod load;
mod overlay;
mod switch;
mod terminal;
mod user;
mod world;

use std::net::{IpAddr, TcpStream};
use std::time::Duration;

use guest::exchange;
use guest::report::Reached;
use serde_json::Value;

use super::fleet::{Fleet, find, wait_until};
use lan::{Guest, SEED, net, serve, udp};
use world::{CABLE, HOST, WORLD, World};

/// Both guests serve it; the group of `db` permits it.
const OPEN: u16 = 5000;
/// Both guests serve it; the group of `db` does not permit it.
const SHUT: u16 = 5001;
/// The host and the world serve it.
const ELSEWHERE: u16 = 6000;
/// The host's port that leads to [`OPEN`] of `db`.
const FORWARDED: u16 = 8080;
const BYTES: u64 = 256 << 10;
const DATAGRAMS: u64 = 50;

const GATEWAY: &str = "10.20.0.1";
const DOMAIN: &str = "lan.internal";

/// Says what the host knows of the network when a check fails.
struct Findings<'a>(&'a Fleet);

impl Drop for Findings<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for vm in ["web", "db"] {
            let nic = self.0.vmctl(&["nic", "show", vm, "nic0", "-o", "json"]);
            let nic: Value = serde_json::from_slice(&nic.stdout).unwrap_or_default();
            let status = find(&nic, "status").unwrap_or(&Value::Null);
            eprintln!("{vm}: nic0: {status}");
            self.0.vmctl(&["vm", "stop", vm, "--force"]);
        }
        eprintln!("{}", output_of("nft", &["list", "ruleset"]));
        for link in std::fs::read_dir("/sys/class/net")
            .into_iter()
            .flatten()
            .flatten()
        {
            let count = |name: &str| {
                let text = std::fs::read_to_string(link.path().join("statistics").join(name));
                text.unwrap_or_default().trim().to_owned()
            };
            let counters = ["rx_packets", "rx_dropped", "tx_packets", "tx_dropped"];
            let counts = counters.map(|name| format!(" {name} {}", count(name)));
            eprintln!("{}:{}", link.file_name().display(), counts.concat());
        }
    }
}

#[test]
fn two_vms_of_a_nat_network_reach_what_they_should_and_only_that() {
    let fleet = Fleet::start();
    let world = World::start();
    let _findings = Findings(&fleet);
    make_network(&fleet);
    let mut guests = boot(&fleet);
    let [web, db] = &mut guests;

    web.knows(db, DOMAIN);
    db.knows(web, DOMAIN);
    web.exchanges_payloads_with(db, OPEN, BYTES);
    db.exchanges_payloads_with(web, OPEN, BYTES);
    host_and_world_are_reached(web, &world);
    the_world_reaches_a_forwarded_port(db, &world);
    a_group_blocks_what_it_should_and_only_that(&fleet, web, db);
    lan::take_apart(&fleet, &mut guests, "lan");
}

fn make_network(fleet: &Fleet) {
    fleet.done(&[
        "network",
        "create",
        "lan",
        "--kind=nat",
        "--subnet=10.20.0.0/24",
        "--ipv6-prefix=fd00:20::/64",
        &format!("--uplink={CABLE}"),
    ]);
    let open = |protocol: &str| format!("--rule=ingress,{protocol}:{OPEN}");
    fleet.done(&[
        "security-group",
        "create",
        "served",
        &open("tcp"),
        &open("udp"),
        "--rule=egress",
    ]);
}

fn boot(fleet: &Fleet) -> [Guest; 2] {
    let plan = lan::plan(vec![serve(OPEN, BYTES), serve(SHUT, BYTES)]);
    fleet.create_vm_named("web", &plan, &["--net=lan"]);
    let net = format!(
        "--net=lan,sg=served,port-forward=tcp:{FORWARDED}:{OPEN},port-forward=udp:{FORWARDED}:{OPEN}"
    );
    fleet.create_vm_named("db", &plan, &[&net]);
    let names = ["web", "db"];
    for name in names {
        fleet.done(&["vm", "start", name]);
    }
    names.map(|name| {
        let guest = Guest::attach(fleet, name);
        assert_eq!(guest.router, GATEWAY);
        assert_eq!(guest.name_server, GATEWAY);
        guest
    })
}

fn host_and_world_are_reached(web: &mut Guest, world: &World) {
    let gateway: IpAddr = GATEWAY.parse().expect("an address");
    let on_host = world::serve(ELSEWHERE, SEED, BYTES);
    let in_world = world.inside(|| world::serve(ELSEWHERE, SEED, BYTES));
    web.terminal.tell(vec![
        net(gateway, ELSEWHERE, BYTES),
        udp(gateway, ELSEWHERE),
        net(WORLD.into(), ELSEWHERE, BYTES),
        udp(WORLD.into(), ELSEWHERE),
    ]);
    let seen_by_host = on_host.join().expect("no panic");
    assert_eq!(seen_by_host.ip(), web.ipv4);
    let seen_by_world = in_world.join().expect("no panic");
    assert_eq!(
        seen_by_world.ip(),
        IpAddr::from(HOST),
        "NAT hides the guest"
    );
}

fn the_world_reaches_a_forwarded_port(db: &Guest, world: &World) {
    world.inside(|| {
        let stream = TcpStream::connect((HOST, FORWARDED)).expect("the port is forwarded");
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .expect("a socket");
        exchange::as_guest(stream, SEED, BYTES).expect("both payloads arrive");
        let peer = (HOST, FORWARDED).into();
        guest::datagrams::ask(peer, SEED, DATAGRAMS, Duration::from_secs(60))
            .expect("datagrams are answered");
    });
    db.terminal.expect_served(3);
}

fn a_group_blocks_what_it_should_and_only_that(fleet: &Fleet, web: &mut Guest, db: &mut Guest) {
    assert_eq!(web.reach(db, OPEN), Reached::Connected);
    assert_eq!(web.reach(db, SHUT), Reached::Nothing, "no rule permits it");
    assert_eq!(db.reach(web, SHUT), Reached::Connected, "no group is asked");
    assert_eq!(web.echoes(db), 0, "no rule permits it");
    assert_eq!(db.echoes(web), 3, "answers to what was permitted pass");
    fleet.done(&[
        "security-group",
        "update",
        "served",
        &format!("--rule=ingress,tcp:{SHUT}"),
        "--rule=egress",
    ]);
    wait_until("the new rules", || {
        web.reach(db, SHUT) == Reached::Connected
    });
    assert_eq!(web.reach(db, OPEN), Reached::Nothing, "its rule is gone");
}

fn output_of(program: &str, arguments: &[&str]) -> String {
    let output = std::process::Command::new(program).args(arguments).output();
    let output = output.expect("it is in the nested host");
    assert!(output.status.success(), "{program} {arguments:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
