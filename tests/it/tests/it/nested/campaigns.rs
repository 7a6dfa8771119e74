//! Fault campaigns on a VM whose guest verifies every block: those in the box, each with the verdict of a
//! sound system, one on the VM's masters, and one that shows nothing.

use std::process::Command;

use guest::plan::{End, Job, Plan};
use serde_json::Value;

use super::fleet::{Fleet, LogsOfFailure, wait_until};
use crate::process::Process;
use crate::site;

const SEED: u64 = 0xca3b;
const LEN_BYTES: u64 = 4 << 20;

/// A guest that verifies its disk for so long.
fn verifying(seconds: u64) -> Plan {
    Plan {
        jobs: vec![Job::Oracle {
            device: "vda".into(),
            seed: SEED,
            bytes: LEN_BYTES,
            seconds,
        }],
        end: End::Wait,
        ..Plan::default()
    }
}

fn fleet_that_breaks_things() -> Fleet {
    Fleet::start_with(vec!["--standalone".into(), "--allow-faults".into()])
}

fn boot(fleet: &Fleet, seconds: u64) {
    fleet.done(&["volume", "create", "data", "--size", "16M"]);
    fleet.create_vm(&verifying(seconds), &["--disk", "volume=data,name=data"]);
    fleet.done(&["vm", "start", "web"]);
    fleet.wait_for_console("\"job\":\"oracle\"");
}

/// Runs a campaign; its exit status and its report.
fn run(fleet: &Fleet, arguments: &[&str]) -> (Option<i32>, Value) {
    let output = fleet.vmctl(&[&["fault", "run"], arguments, &["-o", "json"]].concat());
    let text = String::from_utf8_lossy(&output.stdout);
    let report = serde_json::from_str(&text).unwrap_or_else(|error| {
        let errors = String::from_utf8_lossy(&output.stderr);
        panic!("{arguments:?}: {error}: {text}{errors}")
    });
    (output.status.code(), report)
}

/// A campaign of this test's own, in a file.
fn campaign(fleet: &Fleet, name: &str, text: &str) -> String {
    let file = fleet.dir.path().join(format!("{name}.yaml"));
    std::fs::write(&file, text).expect("a file");
    file.to_str().expect("UTF-8").to_owned()
}

fn checks(report: &Value) -> String {
    format!("{:#}", report["checks"])
}

fn hits(report: &Value, fault: &str) -> u64 {
    let all = report["experiment"]["status"]["hits"].as_array();
    let found = all
        .expect("hits are told")
        .iter()
        .find(|hits| hits["id"] == fault);
    found.expect("the fault has hits")["hits"]
        .as_u64()
        .expect("a number")
}

fn verdict_of<'a>(report: &'a Value, check: &str) -> &'a Value {
    let all = report["checks"].as_array().expect("checks are told");
    let found = all.iter().find(|found| found["name"] == check);
    &found.unwrap_or_else(|| panic!("no {check}: {}", checks(report)))["verdict"]
}

#[test]
fn a_storm_passes_and_a_campaign_that_hits_nothing_does_not() {
    let fleet = fleet_that_breaks_things();
    boot(&fleet, 45);

    // No request ever touches the disk's last sectors.
    let nothing = "name: nothing\nduration: 1s\ntarget: {vm: web, device: data}\nfaults:\n  \
                   - {id: slow, kind: latency, delay: 1ms, target: {lba: 32760-32767}}\n";
    let nothing = campaign(&fleet, "nothing", nothing);
    let (status, report) = run(&fleet, &[&nothing]);
    assert_eq!(status, Some(3), "{}", checks(&report));
    assert_eq!(hits(&report, "slow"), 0);
    assert_eq!(verdict_of(&report, "hits"), "FAULT_VERDICT_INCONCLUSIVE");

    let page = fleet.dir.path().join("storm.html");
    let page_file = page.to_str().expect("UTF-8");
    let storm = [
        "crash-storm",
        "--vm=web",
        "--duration=12s",
        "--html",
        page_file,
    ];
    let (status, report) = run(&fleet, &storm);
    assert_eq!(status, Some(0), "{}", checks(&report));
    assert!(
        hits(&report, "kill") >= 2,
        "{}",
        report["experiment"]["status"]
    );
    assert_eq!(verdict_of(&report, "oracle"), "FAULT_VERDICT_PASS");
    let stalls = &report["stalls"];
    assert!(stalls["count"].as_u64() >= Some(2), "{stalls}");
    let html = std::fs::read_to_string(&page).expect("the page");
    assert!(html.contains("<svg id=\"timeline\"") && html.contains("class=\"outage\""));
    wait_until("both runs in the list", || {
        let list = fleet.done(&["fault", "list"]);
        list.contains("nothing-1") && list.contains("crash-storm-1")
    });
}

#[test]
#[ignore = "long: half a minute of verified writes"]
fn a_disk_that_lies_is_found_out() {
    let fleet = fleet_that_breaks_things();
    boot(&fleet, 25);
    let (status, report) = run(&fleet, &["lying-disk", "--vm=web", "--duration=10s"]);
    assert_eq!(status, Some(1), "{}", checks(&report));
    assert!(
        hits(&report, "lost-write") > 0,
        "{}",
        report["experiment"]["status"]
    );
    assert_eq!(verdict_of(&report, "oracle"), "FAULT_VERDICT_FAIL");
}

#[test]
#[ignore = "long: a minute of verified writes"]
fn hung_daemons_are_found_out_and_slow_stores_are_not_hung() {
    passes("hung-daemon", 60, &["freeze", "hang", "slow-store"]);
}

#[test]
#[ignore = "long: half a minute of verified writes"]
fn lost_kicks_and_calls_are_made_good() {
    passes("lost-kick", 24, &["kick", "call", "stall"]);
}

#[test]
#[ignore = "long: half a minute of verified writes"]
fn daemons_are_upgraded_under_load() {
    passes("upgrade-under-load", 24, &["upgrade"]);
}

#[test]
#[ignore = "long: two minutes of verified writes"]
fn everything_at_once_passes() {
    let faults = [
        "kill",
        "freeze",
        "slow",
        "lost-call",
        "disconnect",
        "out-of-order",
        "slow-start",
        "deaf-host",
        "no-agent",
    ];
    passes("everything-at-once", 120, &faults);
}

#[test]
#[ignore = "long: half a minute of verified writes"]
fn kills_of_the_agent_beside_those_of_a_daemon_pass() {
    let fleet = fleet_that_breaks_things();
    boot(&fleet, 40);
    let text = "name: masterless\nduration: 20s\nsettle: 60s\ntarget: {vm: web}\nfaults:\n  \
                - {id: agent, kind: kill, target: {process: agent}, schedule: {after: 1s, every: 9s}}\n  \
                - {id: daemon, kind: kill, schedule: {after: 6s, every: 9s}}\nprobes:\n  \
                - {id: runs, check: vm-running, at: [start, end]}\n  \
                - {id: right, check: guest-verifies, at: [start, end]}\n\
                expect: {oracle: true, guest-errors: 0}\n";
    let (status, report) = run(&fleet, &[&campaign(&fleet, "masterless", text)]);
    assert_eq!(status, Some(0), "{}", checks(&report));
    for fault in ["agent", "daemon"] {
        assert!(hits(&report, fault) >= 1, "{fault}: {}", checks(&report));
    }
}

/// Only here: the clock is the whole machine's.
#[test]
#[ignore = "long: half a minute of verified writes"]
fn a_clock_that_jumps_disturbs_nobody() {
    let dir = tempfile::tempdir().expect("a folder");
    let _logs = LogsOfFailure(dir.path());
    let path = |name: &str| dir.path().join(name);
    let address = format!("unix:{}", path("agent.sock").display());
    let mut agent = Process::spawn(
        dir.path(),
        "node-agent",
        Command::new(site::program("node-agent"))
            .args(["--listen", &address, "--allow-faults=clock"])
            .arg("--state-dir")
            .arg(path("state"))
            .arg("--run-dir")
            .arg(path("run")),
    );
    agent.wait_for_socket(&path("agent.sock"));
    let fleet = Fleet::start_with(vec!["--node".into(), address, "--allow-faults".into()]);
    boot(&fleet, 40);
    let text = "name: clocks\nduration: 20s\nsettle: 60s\ntarget: {vm: web}\nfaults:\n  \
                - {id: ahead, kind: clock-step, offset: 1h, length: 6s, schedule: {after: 1s}}\n  \
                - {id: kill, kind: kill, schedule: {after: 4s, every: 7s}}\nprobes:\n  \
                - {id: runs, check: vm-running, at: [start, end]}\n  \
                - {id: right, check: guest-verifies, at: [start, end]}\n\
                expect: {oracle: true, guest-errors: 0}\n";
    let (status, report) = run(&fleet, &[&campaign(&fleet, "clocks", text)]);
    assert_eq!(status, Some(0), "{}", checks(&report));
    assert_eq!(hits(&report, "ahead"), 1);
    assert!(hits(&report, "kill") >= 2, "{}", checks(&report));
}

/// Runs a campaign that is in the box; each of these faults must hit.
fn passes(campaign: &str, seconds: u64, faults: &[&str]) {
    let fleet = fleet_that_breaks_things();
    boot(&fleet, seconds + 12);
    let duration = format!("--duration={seconds}s");
    let (status, report) = run(&fleet, &[campaign, "--vm=web", &duration]);
    assert_eq!(
        status,
        Some(0),
        "{}\n{}",
        checks(&report),
        report["experiment"]["status"]
    );
    assert_eq!(verdict_of(&report, "oracle"), "FAULT_VERDICT_PASS");
    for fault in faults {
        assert!(hits(&report, fault) > 0, "{fault}: {}", checks(&report));
    }
    println!("| {campaign} | stalls {} |", report["stalls"]);
}
