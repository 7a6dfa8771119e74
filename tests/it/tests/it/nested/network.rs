//! Two VMs in a network that the controller made: what they reach, what reaches them, what they survive.

mod terminal;
mod world;

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use guest::exchange;
use guest::plan::{End, Job, Plan};
use guest::report::{Reached, Report};
use serde_json::Value;

use super::fleet::{Fleet, find, kill, wait_until};
use terminal::Terminal;
use world::{CABLE, HOST, WORLD, World};

const SEED: u64 = 0x2e7;
/// Both guests serve it; the group of `db` permits it.
const OPEN: u16 = 5000;
/// Both guests serve it; the group of `db` does not permit it.
const SHUT: u16 = 5001;
/// Both guests serve much there; the group of `db` permits it.
const LONG: u16 = 5002;
/// The host and the world serve it.
const ELSEWHERE: u16 = 6000;
/// The host's port that leads to [`OPEN`] of `db`.
const FORWARDED: u16 = 8080;
const BYTES: u64 = 256 << 10;
const LONG_BYTES: u64 = 8 << 20;
const DATAGRAMS: u64 = 50;

const GATEWAY: &str = "10.20.0.1";

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

/// One of the VMs, configured by DHCP.
struct Guest {
    name: &'static str,
    terminal: Terminal,
    ipv4: IpAddr,
    ipv6: IpAddr,
}

#[test]
fn two_vms_of_a_nat_network_reach_what_they_should_and_survive_kills_and_pulled_cables() {
    let fleet = Fleet::start();
    let world = World::start();
    let _findings = Findings(&fleet);
    make_network(&fleet);
    let mut guests = boot(&fleet);
    let [web, db] = &mut guests;

    knows(web, db);
    knows(db, web);
    exchanges_payloads_with(web, db);
    exchanges_payloads_with(db, web);
    host_and_world_are_reached(web, &world);
    the_world_reaches_a_forwarded_port(db, &world);
    a_group_blocks_what_it_should_and_only_that(&fleet, web, db);
    a_transfer_survives_kills_and_a_pulled_cable(&fleet, web, db);

    for guest in &mut guests {
        guest.terminal.power_off();
    }
    for guest in &guests {
        wait_until("the guest's shutdown", || {
            fleet.phase_of(guest.name).ends_with("stopped")
        });
        fleet.done(&["vm", "delete", guest.name]);
    }
    fleet.done(&["network", "delete", "lan"]);
    let tables = output_of("nft", &["list", "tables"]);
    assert!(!tables.contains("mortise"), "{tables}");
    let links = output_of("ip", &["-o", "link"]);
    assert!(!links.contains("mb-"), "{links}");
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
    let open = |protocol: &str, port: u16| format!("--rule=ingress,{protocol}:{port}");
    fleet.done(&[
        "security-group",
        "create",
        "served",
        &open("tcp", OPEN),
        &open("udp", OPEN),
        &open("tcp", LONG),
        "--rule=egress",
    ]);
}

fn boot(fleet: &Fleet) -> [Guest; 2] {
    let serve = |port, bytes| Job::Serve {
        port,
        seed: SEED,
        bytes,
    };
    let plan = Plan {
        jobs: vec![
            Job::Dhcp,
            Job::Ipv6,
            serve(OPEN, BYTES),
            serve(SHUT, BYTES),
            serve(LONG, LONG_BYTES),
        ],
        end: End::Obey,
        ..Plan::default()
    };
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
        let mut terminal = Terminal::attach(fleet, name);
        let reports = terminal.finish();
        let [
            Report::Lease {
                mac,
                address,
                router,
                name_server,
                ..
            },
            Report::Ipv6 { address: ipv6, .. },
            ..,
        ] = &reports[..]
        else {
            panic!("{name}: {reports:?}");
        };
        let (ipv4, prefix_len) = address.split_once('/').expect("a prefix length");
        let vm = fleet.json(&["vm", "show", name]);
        let known = |key| find(&vm, key).and_then(Value::as_str).unwrap_or_default();
        assert_eq!(
            ipv4,
            known("ipv4_address"),
            "the address that the controller gave"
        );
        assert_eq!(mac, known("mac"));
        assert_eq!((prefix_len, router.as_str()), ("24", GATEWAY));
        assert_eq!(name_server, GATEWAY);
        Guest {
            name,
            terminal,
            ipv4: ipv4.parse().expect("an address"),
            ipv6: ipv6.parse().expect("an address"),
        }
    })
}

fn knows(guest: &mut Guest, other: &Guest) {
    let name = format!("{}.lan.internal", other.name);
    let Report::Resolve { addresses, .. } = guest.terminal.ask(Job::Resolve { name }) else {
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

fn exchanges_payloads_with(guest: &mut Guest, other: &Guest) {
    guest.terminal.tell(vec![
        net(other.ipv4, OPEN, BYTES),
        net(other.ipv6, OPEN, BYTES),
        udp(other.ipv4, OPEN),
        udp(other.ipv6, OPEN),
    ]);
    other.terminal.expect_served(2);
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
    assert_eq!(reach(web, db, OPEN), Reached::Connected);
    assert_eq!(reach(web, db, SHUT), Reached::Nothing, "no rule permits it");
    assert_eq!(
        reach(db, web, SHUT),
        Reached::Connected,
        "no group is asked"
    );
    assert_eq!(echoes(web, db), 0, "no rule permits it");
    assert_eq!(echoes(db, web), 3, "answers to what was permitted pass");
    fleet.done(&[
        "security-group",
        "update",
        "served",
        &format!("--rule=ingress,tcp:{SHUT}"),
        &format!("--rule=ingress,tcp:{LONG}"),
        "--rule=egress",
    ]);
    wait_until("the new rules", || {
        reach(web, db, SHUT) == Reached::Connected
    });
    assert_eq!(reach(web, db, OPEN), Reached::Nothing, "its rule is gone");
}

/// Both daemons die while a payload is on its way, and a cable is pulled and plugged in again.
fn a_transfer_survives_kills_and_a_pulled_cable(fleet: &Fleet, web: &mut Guest, db: &mut Guest) {
    web.terminal.begin(vec![net(db.ipv4, LONG, LONG_BYTES)]);
    let begin = bytes_passed();
    // Both ways together it is twice the payload.
    for (step, name) in [(1, "web"), (2, "db"), (3, "web")] {
        wait_until("the transfer's progress", || {
            web.terminal.expect_same_life();
            db.terminal.expect_same_life();
            bytes_passed() - begin > step * LONG_BYTES / 3
        });
        let pid = device_net(fleet, name);
        kill(pid, libc::SIGKILL);
        wait_until("its successor", || {
            let processes = fleet.processes_of(name);
            let other =
                |(process, other): &(String, u64)| process == "device-net" && *other != pid as u64;
            processes.iter().any(other)
        });
    }
    fleet.done(&["nic", "link", "db", "nic0", "down"]);
    db.terminal.ask(Job::Carrier { up: false });
    fleet.done(&["nic", "link", "db", "nic0", "up"]);
    db.terminal.ask(Job::Carrier { up: true });
    web.terminal.finish();
    db.terminal.expect_served(4);
}

fn device_net(fleet: &Fleet, vm: &str) -> i32 {
    let processes = fleet.processes_of(vm);
    let found = processes.iter().find(|(name, _)| name == "device-net");
    found.expect("the VM has a NIC").1 as i32
}

/// What the taps of the network's bridge took from guests.
fn bytes_passed() -> u64 {
    let links = std::fs::read_dir("/sys/class/net").expect("sysfs");
    let taps = links
        .flatten()
        .map(|link| link.path())
        .filter(|link| link.join("tun_flags").exists());
    taps.filter_map(|tap| std::fs::read_to_string(tap.join("statistics/rx_bytes")).ok())
        .filter_map(|text| text.trim().parse::<u64>().ok())
        .sum()
}

fn net(peer: IpAddr, port: u16, bytes: u64) -> Job {
    Job::Net {
        peer: SocketAddr::new(peer, port),
        seed: SEED,
        bytes,
    }
}

fn udp(peer: IpAddr, port: u16) -> Job {
    Job::Udp {
        peer: SocketAddr::new(peer, port),
        seed: SEED,
        datagrams: DATAGRAMS,
    }
}

fn reach(guest: &mut Guest, other: &Guest, port: u16) -> Reached {
    let peer = SocketAddr::new(other.ipv4, port);
    match guest.terminal.ask(Job::Reach { peer }) {
        Report::Reach { outcome, .. } => outcome,
        report => panic!("{report:?}"),
    }
}

fn echoes(guest: &mut Guest, other: &Guest) -> u32 {
    match guest.terminal.ask(Job::Ping { peer: other.ipv4 }) {
        Report::Ping { echoes, .. } => echoes,
        report => panic!("{report:?}"),
    }
}

fn output_of(program: &str, arguments: &[&str]) -> String {
    let output = std::process::Command::new(program).args(arguments).output();
    let output = output.expect("it is in the nested host");
    assert!(output.status.success(), "{program} {arguments:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
