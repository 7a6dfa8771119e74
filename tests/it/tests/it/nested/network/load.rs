//! Two guests send much to each other, while somebody listens, daemons die and a cable is pulled.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;

use guest::plan::{Job, Plan, Protocol};
use guest::report::Report;
use serde_json::Value;

use super::Findings;
use super::lan::{Guest, net, plan, serve};
use crate::nested::fleet::{Fleet, find, kill, wait_until};
use crate::site;

/// Both guests serve little there.
const SHORT: u16 = 5000;
/// Both guests serve much there.
const LONG: u16 = 5002;
const IPERF: u16 = 5201;
const SHORT_BYTES: u64 = 64 << 10;
const LONG_BYTES: u64 = 8 << 20;
const IPERF_SECONDS: u32 = 3;

const USER_DATA: &str = "#cloud-config\nhostname: web\n";
const NETWORK_CONFIG: &str = "version: 2\nethernets: {eth0: {dhcp4: true}}\n";

#[test]
fn two_vms_read_their_seed_send_by_iperf3_are_captured_and_survive_kills_and_pulled_cables() {
    let fleet = Fleet::start();
    let _findings = Findings(&fleet);
    fleet.done(&[
        "network",
        "create",
        "lan",
        "--kind=host-only",
        "--subnet=10.21.0.0/24",
        "--ipv6-prefix=fd00:21::/64",
    ]);
    let mut guests = boot(&fleet);
    let [web, db] = &mut guests;

    the_seed_says_what_was_asked_for(web);
    a_capture_is_read_by_tshark(&fleet, web, db);
    iperf3_sends(web, db, Protocol::Tcp);
    iperf3_sends(db, web, Protocol::Udp);
    a_transfer_survives_kills_and_a_pulled_cable(&fleet, web, db);
    super::lan::take_apart(&fleet, &mut guests, "lan");
}

fn boot(fleet: &Fleet) -> [Guest; 2] {
    let jobs = || {
        vec![
            serve(SHORT, SHORT_BYTES),
            serve(LONG, LONG_BYTES),
            Job::IperfServer { port: IPERF },
        ]
    };
    let seed =
        [("user-data", USER_DATA), ("network-config", NETWORK_CONFIG)].map(|(name, text)| {
            let file = fleet.dir.path().join(name);
            std::fs::write(&file, text).expect("a file");
            format!("--{name}={}", file.display())
        });
    let on_disk = |plan: Plan| Plan {
        root: Some("vda".into()),
        ..plan
    };
    let with_seed = on_disk(plan([jobs(), vec![Job::Seed]].concat()));
    let disk = root_disk(fleet, "web");
    fleet.create_vm_named("web", &with_seed, &["--net=lan", &disk, &seed[0], &seed[1]]);
    let disk = root_disk(fleet, "db");
    fleet.create_vm_named("db", &on_disk(plan(jobs())), &["--net=lan", &disk]);
    let names = ["web", "db"];
    for name in names {
        fleet.done(&["vm", "start", name]);
    }
    names.map(|name| Guest::attach(fleet, name))
}

/// iperf3 is on it.
fn root_disk(fleet: &Fleet, name: &str) -> String {
    let disk = fleet.dir.path().join(format!("{name}.raw"));
    std::fs::copy(site::path("GUEST_ROOTFS"), &disk).expect("a root disk can be copied");
    format!("--disk={}", disk.display())
}

fn the_seed_says_what_was_asked_for(web: &Guest) {
    let Some(Report::Seed {
        user_data,
        meta_data,
        network_config,
        ..
    }) = web.reports.last()
    else {
        panic!("{:?}", web.reports);
    };
    assert_eq!(user_data, USER_DATA);
    assert_eq!(network_config, NETWORK_CONFIG);
    assert!(meta_data.contains("instance-id"), "{meta_data}");
    assert!(meta_data.contains("web"), "{meta_data}");
}

/// What a guest really sent, told by another program than ours.
fn a_capture_is_read_by_tshark(fleet: &Fleet, web: &mut Guest, db: &mut Guest) {
    let file = fleet.dir.path().join("web.pcap");
    let path = file.to_str().expect("UTF-8");
    let mut capture = fleet
        .command(&["nic", "capture", "web", "nic0", "-w", path])
        .args(["--filter", &format!("tcp port {SHORT}"), "--seconds", "60"])
        .spawn()
        .expect("vmctl runs");
    wait_until("a capture", || {
        let nic = fleet.json(&["nic", "show", "web", "nic0"]);
        find(&nic, "captures").and_then(Value::as_u64) == Some(1)
    });
    web.exchanges_payloads_with(db, SHORT, SHORT_BYTES);
    // By IPv4 and by IPv6, both ways.
    let whole = 4 * SHORT_BYTES;
    wait_until("the frames", || {
        std::fs::metadata(&file).is_ok_and(|file| file.len() > whole)
    });
    kill(capture.id() as i32, libc::SIGINT);
    let status = capture.wait().expect("a child can be waited for");
    assert!(status.success(), "{status}");

    let frames = tshark(&file);
    assert!(frames.iter().all(|frame| frame.ports.contains(&SHORT)));
    let payload_from = |address: IpAddr| -> u64 {
        let own = frames.iter().filter(|frame| frame.source == address);
        own.map(|frame| frame.payload_bytes).sum()
    };
    for address in [web.ipv4, web.ipv6, db.ipv4, db.ipv6] {
        // And a hash; more if something was sent again.
        let sent = payload_from(address);
        assert!(
            (SHORT_BYTES..2 * SHORT_BYTES).contains(&sent),
            "tshark sees {sent} bytes from {address}, which sent {SHORT_BYTES} and their hash"
        );
    }
}

/// One frame as tshark tells it.
struct Seen {
    source: IpAddr,
    ports: [u16; 2],
    payload_bytes: u64,
}

fn tshark(file: &Path) -> Vec<Seen> {
    const FIELDS: [&str; 5] = [
        "ip.src",
        "ipv6.src",
        "tcp.srcport",
        "tcp.dstport",
        "tcp.len",
    ];
    let mut command = Command::new("tshark");
    command.arg("-r").arg(file).args(["-T", "fields"]);
    for field in FIELDS {
        command.args(["-e", field]);
    }
    let output = command.output().expect("tshark is in the nested host");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let frame = |line: &str| -> Option<Seen> {
        let words: Vec<&str> = line.split('\t').collect();
        let &[v4, v6, from, to, len] = &words[..] else {
            return None;
        };
        Some(Seen {
            source: [v4, v6].concat().parse().ok()?,
            ports: [from.parse().ok()?, to.parse().ok()?],
            payload_bytes: len.parse().ok()?,
        })
    };
    text.lines()
        .map(|line| frame(line).unwrap_or_else(|| panic!("tshark says {line:?}")))
        .collect()
}

fn iperf3_sends(from: &mut Guest, to: &Guest, protocol: Protocol) {
    let report = from.terminal.ask(Job::Iperf {
        peer: SocketAddr::new(to.ipv4, IPERF),
        protocol,
        seconds: IPERF_SECONDS,
    });
    let Report::Iperf {
        sent_bytes,
        received_bytes,
        ..
    } = report
    else {
        panic!("{report:?}");
    };
    assert!(received_bytes > 0, "{protocol:?}: {report:?}");
    // Datagrams may be lost; of a stream the last bytes may be counted by one end only.
    assert!(
        received_bytes <= sent_bytes && received_bytes >= sent_bytes / 2,
        "{protocol:?}: {report:?}"
    );
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
    db.terminal.expect_served(3);
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
