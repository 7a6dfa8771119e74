//! The program `bench` as `cargo lab bench` calls it.

use std::path::Path;
use std::process::{Command, Output};

use bench::load::Outcome;

fn bench(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(args)
        .output()
        .unwrap()
}

fn file(bytes: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn outcome_is_one_line_of_json() {
    let file = file(1 << 20);
    let args = ["io-uring", "--file", name(file.path()), "--depth", "4"];
    let more = ["--seconds", "0.05", "--warm-up", "0", "--json", "-"];
    let output = bench(&[&args[..], &more].concat());
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    let outcome: Outcome = serde_json::from_str(&text).unwrap();
    assert!(outcome.ios > 0 && outcome.seconds >= 0.05, "{outcome:?}");
    assert!(outcome.driver_cpu_seconds > 0.0, "{outcome:?}");
}

#[test]
fn outcome_is_readable_by_people() {
    let file = file(1 << 20);
    let output = bench(&["io-uring", "--file", name(file.path()), "--seconds", "0.05"]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("requests/s"), "{text}");
}

#[test]
fn missing_disk_is_named() {
    for args in [
        ["io-uring", "--file", "/nonexistent/disk"],
        ["blk-load", "--socket", "/nonexistent/disk"],
        ["blk-hold", "--socket", "/nonexistent/disk"],
    ] {
        let output = bench(&args);
        assert!(!output.status.success(), "{args:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("/nonexistent/disk"), "{args:?}: {text}");
    }
}
