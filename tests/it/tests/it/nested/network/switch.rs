//! A network whose frames go from guest to guest by a switch in one `device-net`.

use serde_json::Value;

use super::Findings;
use super::lan::{self, Guest, net, serve};
use crate::nested::fleet::{Fleet, find, kill, wait_until};

/// Both guests serve little there.
const SHORT: u16 = 5000;
/// Both guests serve much there.
const LONG: u16 = 5002;
const SHORT_BYTES: u64 = 256 << 10;
const LONG_BYTES: u64 = 8 << 20;
const KILLS: u32 = 2;

#[test]
fn two_vms_of_a_switched_network_exchange_payloads_and_survive_kills_of_the_switch() {
    let fleet = Fleet::start();
    let _findings = Findings(&fleet);
    fleet.done(&[
        "network",
        "create",
        "fast",
        "--kind=host-only",
        "--datapath=switch",
        "--subnet=10.22.0.0/24",
        "--ipv6-prefix=fd00:22::/64",
    ]);
    let plan = lan::plan(vec![serve(SHORT, SHORT_BYTES), serve(LONG, LONG_BYTES)]);
    let names = ["web", "db"];
    for name in names {
        fleet.create_vm_named(name, &plan, &["--net=fast"]);
        fleet.done(&["vm", "start", name]);
    }
    let mut guests = names.map(|name| Guest::attach(&fleet, name));
    let [web, db] = &mut guests;

    web.knows(db, "fast.internal");
    web.exchanges_payloads_with(db, SHORT, SHORT_BYTES);
    db.exchanges_payloads_with(web, SHORT, SHORT_BYTES);

    web.terminal.begin(vec![net(db.ipv4, LONG, LONG_BYTES)]);
    for _ in 0..KILLS {
        wait_until("the transfer's progress", || {
            web.terminal.expect_same_life();
            db.terminal.expect_same_life();
            // Each switch counts from zero.
            passed_bytes(&fleet, "web") > LONG_BYTES / 8
        });
        let pid = switch(&fleet).expect("a switch");
        kill(pid as i32, libc::SIGKILL);
        wait_until("its successor", || {
            switch(&fleet).is_some_and(|other| other != pid)
        });
    }
    web.terminal.finish();
    db.terminal.expect_served(3);
    lan::take_apart(&fleet, &mut guests, "fast");
}

/// The process that serves the NICs of both guests.
fn switch(fleet: &Fleet) -> Option<u64> {
    let network = fleet.json(&["network", "show", "fast"]);
    let processes = find(&network, "processes")?.as_array()?;
    processes.iter().find_map(|process| process["pid"].as_u64())
}

/// Both ways together; of twice the payload.
fn passed_bytes(fleet: &Fleet, vm: &str) -> u64 {
    let nic = fleet.json(&["nic", "show", vm, "nic0"]);
    let bytes = |key| find(&nic, key).and_then(Value::as_u64).unwrap_or(0);
    bytes("rx_bytes") + bytes("tx_bytes")
}
