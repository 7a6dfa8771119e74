//! Runs the integration tests that need a KVM, each in its own process under a deadline.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Events;
use super::child::Guarded;
use crate::job::{Event, Outcome, Site, TestResult};
use crate::nested::RunDir;
use crate::tool;

/// Tests that need a KVM live in the module of this name.
pub(crate) const PREFIX: &str = "nested::";
/// Those of them that need a second host.
const TWO_HOSTS_PREFIX: &str = "nested::network::overlay::";
/// Several boots of an emulated guest on a busy machine.
const TEST_LIMIT: Duration = Duration::from_secs(240);
/// For tests marked `#[ignore]`, the long tier.
const LONG_TEST_LIMIT: Duration = Duration::from_secs(1800);
/// What a failed test printed last.
const OUTPUT_LEN: u64 = 16 << 10;

/// Emulated SVM loses a processor's state at a switch between worlds now and then: the nested
/// host's kernel dies of it (see [`crate::nested::HostLost`]), or a guest does, at any time and
/// without a word. What is our own doing happens again, so a test may have other tries.
const EMULATION_FAILED: &str =
    "a guest ran into a triple fault, as guests of emulated SVM do now and then";

/// Of tests that failed of it, in one boot of the nested host.
const MAX_REPETITIONS: u32 = 6;

/// Of tests that failed otherwise on an emulated host, in one boot: what lost a processor's state
/// did to the host or a guest need not be a triple fault. The first failure is shown all the same.
const MAX_SECOND_TRIES: u32 = 2;

/// What tests start, and the beginnings of what `node-agent` calls its interfaces.
const LEFT_PROGRAMS: &[&str] = &[
    "controller",
    "node-agent",
    "vmm-core",
    "device-blk",
    "device-net",
    "dnsmasq",
    "passt",
    "passt.avx2",
];
const LEFT_INTERFACES: &[&str] = &["mt-", "mb-", "mu-", "mx-"];

/// Whether a test needs a neighbour.
pub(crate) fn needs_two_hosts(name: &str) -> bool {
    name.starts_with(TWO_HOSTS_PREFIX)
}

/// A host that ran a test would have given it up, and told, some time ago.
pub(crate) fn longest_silence(long: bool) -> Duration {
    let limit = if long { LONG_TEST_LIMIT } else { TEST_LIMIT };
    limit + Duration::from_secs(120)
}

/// Runs each test `times_left` times or until it fails; the long ones only if asked.
pub(super) fn run(
    site: &Site,
    binary: &Path,
    times_left: impl Fn(&str) -> u32,
    long: bool,
    events: &mut Events,
) -> Result<i32> {
    let all = list(binary, &[])?;
    let ignored = list(binary, &["--ignored"])?;
    let mut failed = false;
    let mut tries = Tries::of_host();
    let mut failing = None;
    for name in all
        .iter()
        .flat_map(|name| (0..times_left(name)).map(move |_| name))
    {
        if failing == Some(name) {
            continue;
        }
        let is_long = ignored.contains(name);
        let result = if is_long && !long {
            TestResult {
                name: name.clone(),
                outcome: Outcome::Skipped,
                elapsed_ms: 0,
                output: String::new(),
            }
        } else {
            let limit = if is_long { LONG_TEST_LIMIT } else { TEST_LIMIT };
            let mut result = run_one(site, binary, name, limit)?;
            while result.outcome == Outcome::Failed
                && let Some(why) = tries.another(name, &result.output)
            {
                let text = format!("{name}: {why}; it runs once more");
                events.send(&Event::Step { text });
                clear_away();
                result = run_one(site, binary, name, limit)?;
            }
            result
        };
        if result.outcome == Outcome::Failed {
            failing = Some(name);
            failed = true;
        }
        events.send(&Event::Test(result));
    }
    Ok(i32::from(failed))
}

/// What failed tests may still have, on a nested host that is emulated.
#[derive(Default)]
struct Tries {
    repetitions: u32,
    second: u32,
    had_second: Option<String>,
}

impl Tries {
    fn of_host() -> Tries {
        match is_emulated() {
            true => Tries {
                repetitions: MAX_REPETITIONS,
                second: MAX_SECOND_TRIES,
                had_second: None,
            },
            false => Tries::default(),
        }
    }

    /// Why a test that failed runs again; None if it does not.
    fn another(&mut self, name: &str, output: &str) -> Option<String> {
        if emulation_failed(output) {
            self.repetitions = self.repetitions.checked_sub(1)?;
            return Some(EMULATION_FAILED.to_owned());
        }
        if self.had_second.as_deref() == Some(name) {
            return None;
        }
        self.second = self.second.checked_sub(1)?;
        self.had_second = Some(name.to_owned());
        Some(format!("it FAILED on an emulated host:\n{output}\n{name}"))
    }
}

/// Ends what a failed test left on an emulated host, which is there for tests alone: its next try
/// would meet networks of its own name.
fn clear_away() {
    let entries = |dir| std::fs::read_dir(dir).into_iter().flatten().flatten();
    for process in entries("/proc") {
        let comm = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        let pid = process.file_name().to_string_lossy().parse::<i32>();
        if let (true, Ok(pid)) = (LEFT_PROGRAMS.contains(&comm.trim()), pid) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    for interface in entries("/sys/class/net") {
        let name = interface.file_name();
        if LEFT_INTERFACES
            .iter()
            .any(|prefix| name.to_string_lossy().starts_with(prefix))
        {
            let _ = Command::new("ip").args(["link", "del"]).arg(&name).status();
        }
    }
    let _ = Command::new("nft").args(["flush", "ruleset"]).status();
}

/// Whether this is a nested host without hardware virtualization.
fn is_emulated() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("QEMU TCG CPU"))
}

/// Whether a test's output has what `vmm-core` says of such a guest.
fn emulation_failed(output: &str) -> bool {
    output
        .lines()
        .any(|line| line.contains("triple fault on vCPU"))
}

fn list(binary: &Path, args: &[&str]) -> Result<Vec<String>> {
    let text = tool::output(
        Command::new(binary)
            .args(["--list", "--format", "terse"])
            .args(args),
    )?;
    Ok(parse_list(&text))
}

/// `NAME: test`, one a line.
fn parse_list(text: &str) -> Vec<String> {
    let names = text.lines().filter_map(|line| line.strip_suffix(": test"));
    names
        .filter(|name| name.starts_with(PREFIX))
        .map(str::to_owned)
        .collect()
}

fn run_one(site: &Site, binary: &Path, name: &str, limit: Duration) -> Result<TestResult> {
    let dir = RunDir::create_in(Path::new("/tmp"))?;
    let log = dir.0.join("log");
    let file = File::create(&log).context("cannot create the test's log")?;
    let started = Instant::now();
    let mut test = Guarded::spawn(
        Command::new(binary)
            .args([
                "--exact",
                name,
                "--include-ignored",
                "--nocapture",
                "--test-threads=1",
            ])
            .envs(site.variables())
            .env("TMPDIR", &dir.0)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file),
    )?;
    let (outcome, why) = match test.wait_until(started + limit) {
        Ok(status) if status.success() => (Outcome::Passed, String::new()),
        Ok(status) => (Outcome::Failed, format!("\nended with {status}")),
        Err(error) => (Outcome::Failed, format!("\n{error:#}; killed")),
    };
    drop(test);
    let output = match outcome {
        Outcome::Failed => tail(&log)? + &why,
        _ => tables(&tail(&log)?),
    };
    let elapsed_ms = started.elapsed().as_millis() as u64;
    Ok(TestResult {
        name: name.to_owned(),
        outcome,
        elapsed_ms,
        output,
    })
}

/// What a test that passed measured.
fn tables(output: &str) -> String {
    let rows = output.lines().filter(|line| line.starts_with('|'));
    rows.map(|row| format!("{row}\n")).collect()
}

fn tail(log: &Path) -> Result<String> {
    let mut file = File::open(log)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(OUTPUT_LEN)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_triple_fault_is_known_again() {
        let at_boot = "vmm-core: error: the guest crashed (triple fault on vCPU 0) before it wrote anything to its console";
        assert!(emulation_failed(&format!("started\n{at_boot}: is ..\n")));
        let later = "WARN the guest ran into a triple fault on vCPU 1 and is reset withheld=0";
        assert!(emulation_failed(&format!("assertion failed\n{later}\n")));
        assert!(!emulation_failed("the guest came up 2 times"));
    }

    #[test]
    fn a_test_runs_again_after_triple_faults_and_once_after_anything_else() {
        let triple_fault = "triple fault on vCPU 0";
        let mut tries = Tries {
            repetitions: 2,
            second: 2,
            had_second: None,
        };
        assert!(tries.another("a", triple_fault).is_some());
        assert!(tries.another("a", "wrong data").is_some());
        assert_eq!(tries.another("a", "wrong data"), None);
        assert!(tries.another("a", triple_fault).is_some());
        assert_eq!(tries.another("a", triple_fault), None);
        assert!(tries.another("b", "wrong data").is_some());
        assert_eq!(tries.another("c", "wrong data"), None);
        assert_eq!(Tries::default().another("d", triple_fault), None);
    }

    #[test]
    fn tables_of_tests_that_passed_are_shown() {
        let output = "running 1 test\n| pairing | kills |\n|---|---|\n| ours | 10 |\nok\n";
        assert_eq!(
            tables(output),
            "| pairing | kills |\n|---|---|\n| ours | 10 |\n"
        );
    }

    #[test]
    fn only_tests_that_need_a_kvm_are_listed() {
        let text = "layering::edges: test\nnested::boot::elf: test\nnested::bench: benchmark\n";
        assert_eq!(parse_list(text), ["nested::boot::elf"]);
    }
}
