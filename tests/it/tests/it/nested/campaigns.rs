//! Fault campaigns on a VM whose guest verifies every block: one that must pass, one that must fail
//! because the disk lies, one that shows nothing.

use guest::plan::{End, Job, Plan};
use serde_json::Value;

use super::fleet::{Fleet, wait_until};

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
#[ignore = "long: a minute of verified writes"]
fn a_storm_passes_and_a_campaign_that_hits_nothing_does_not() {
    let fleet = fleet_that_breaks_things();
    boot(&fleet, 45);

    // No request ever touches the disk's last sectors.
    let nothing = fleet.dir.path().join("nothing.yaml");
    let text = "name: nothing\nduration: 1s\ntarget: {vm: web, device: data}\nfaults:\n  \
                - {id: slow, kind: latency, delay: 1ms, target: {lba: 32760-32767}}\n";
    std::fs::write(&nothing, text).expect("a file");
    let (status, report) = run(&fleet, &[nothing.to_str().expect("UTF-8")]);
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
#[ignore = "long: a minute of verified writes"]
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
