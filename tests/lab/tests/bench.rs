//! `cargo lab bench` from its command line to its figures, for a moment: what it measures then
//! means nothing, but it has its shape.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn lab(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lab"))
        .args(args)
        .output()
        .unwrap()
}

/// Where the binaries of this build are.
fn bin_dir() -> &'static Path {
    let dir = Path::new(env!("CARGO_BIN_EXE_lab")).parent().unwrap();
    for name in ["device-blk", "bench"] {
        assert!(
            dir.join(name).is_file(),
            "build what is measured first: cargo build -p device-blk -p bench"
        );
    }
    dir
}

#[test]
fn a_short_bench_writes_rows_for_a_program() {
    let out = tempfile::tempdir().unwrap();
    let json = out.path().join("blk.json");
    let args = ["bench", "blk", "--quick", "--rounds", "2", "--seconds"];
    let more = ["0.05", "--case", "tmpfs/randread-4k/qd1*", "--case"];
    let paths = ["--json", json.to_str().unwrap(), "--bin-dir"];
    let rest = ["tmpfs/randread-4k/qd32/daemon-cpu/polling-adaptive"];
    let dir = [bin_dir().to_str().unwrap()];
    let output = lab(&[&args[..], &more, &rest, &paths, &dir].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.starts_with("CASE"), "{table}");
    assert!(table.contains("targets met"), "{table}");

    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(report["bench"], "blk");
    assert!(report["machine"].as_str().unwrap().contains("Linux"));
    let rows = report["rows"].as_array().unwrap();
    let cases: BTreeSet<&str> = rows
        .iter()
        .map(|row| row["case"].as_str().unwrap())
        .collect();
    let beside = "beside-qemu-storage-daemon";
    let expected = ["tmpfs/randread-4k/qd1", "tmpfs/randread-4k/qd128"]
        .into_iter()
        .flat_map(|case| {
            let busy = format!("{case}/busy-driver");
            [case.to_owned(), format!("{case}/{beside}"), busy]
        })
        .chain(["tmpfs/randread-4k/qd32/daemon-cpu/polling-adaptive".to_owned()])
        .collect::<Vec<_>>();
    assert_eq!(cases, expected.iter().map(String::as_str).collect());
    for row in rows {
        assert!(row.get("error").is_none(), "{row}");
        let ours = &row["ours"];
        let [min, median, max] = ["min", "median", "max"].map(|key| ours[key].as_f64().unwrap());
        assert!(0.0 < min && min <= median && median <= max, "{row}");
        assert!(row["ratio"]["qemu-storage-daemon"].as_f64().unwrap() > 0.0);
        assert!((0.0..=1.0).contains(&row["foreign_cpu"].as_f64().unwrap()));
        assert_eq!(row["info"].is_null(), row["met"].is_boolean(), "{row}");
    }
}

#[test]
fn cases_are_listed_without_measuring() {
    let output = lab(&["bench", "blk", "--list", "--case", "file-odirect/*/qd1"]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    let cases: Vec<&str> = text.lines().collect();
    assert!(cases.contains(&"file-odirect/randread-4k/qd1"), "{text}");
    assert!(
        cases.contains(&"file-odirect/qcow2/randread-4k/qd1"),
        "{text}"
    );
    assert!(!text.contains("tmpfs"), "{text}");
}

#[test]
fn cases_of_nics_are_listed_without_privileges() {
    let output = lab(&["bench", "net", "--list"]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    let cases: BTreeSet<&str> = text.lines().collect();
    for case in [
        "switch/64",
        "tap/tx-64",
        "tap/rx-64",
        "idle/100-taps/wake-ups",
    ] {
        assert!(cases.contains(case), "{case} is not in {text}");
    }
    assert_eq!(
        cases.len(),
        text.lines().count(),
        "a name stands twice: {text}"
    );
}

#[test]
fn cases_of_recovery_are_listed_without_privileges() {
    let output = lab(&["bench", "recovery", "--list"]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    let cases: BTreeSet<&str> = text.lines().collect();
    for case in [
        "kill/spare/256-mib/lost-or-wrong",
        "kill/cold/256-mib/fence-to-first-io/p99",
        "kill/spare/256-mib/packed/kill-to-first-io/p50",
        "upgrade/roll-back/stall/p99",
        "blast-radius/other-process/p99-storm-to-quiet",
        "net/kill/spare/tcp-gap/p99",
    ] {
        assert!(cases.contains(case), "{case} is not in {text}");
    }
    assert_eq!(
        cases.len(),
        text.lines().count(),
        "a name stands twice: {text}"
    );
}

#[test]
fn a_pattern_that_matches_nothing_is_an_error() {
    let dir = bin_dir().to_str().unwrap();
    let output = lab(&["bench", "blk", "--case", "nonsense", "--bin-dir", dir]);
    assert_ne!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("--list"), "{text}");
}
