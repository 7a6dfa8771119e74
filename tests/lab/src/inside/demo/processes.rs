//! What the kernel knows about a VM's processes.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::unistd::{SysconfVar, sysconf};

use crate::job::Process;
use crate::memory;

const NAMES: [&str; 3] = ["device-blk", "device-net", "vmm-core"];

/// Reads memory and sandbox of a process from /proc.
pub(super) fn inspect(name: &str, pid: u32) -> Result<Process> {
    let (rss_kib, pss_kib) =
        memory::sets_kib(pid).with_context(|| format!("{name} is not running"))?;
    let mut sandbox = BTreeSet::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        sandbox.insert(confinement(&status));
    }
    // A process is as confined as its least confined thread.
    let sandbox = sandbox.into_iter().next().unwrap_or_default();
    Ok(Process {
        name: name.to_owned(),
        pid,
        rss_kib,
        pss_kib,
        sandbox,
    })
}

/// Exactly one of each kind, each without a way to more privileges and behind seccomp.
pub(super) fn expect_one_of_each(processes: &[Process]) -> Result<()> {
    let mut names: Vec<&str> = processes
        .iter()
        .map(|process| process.name.as_str())
        .collect();
    names.sort_unstable();
    ensure!(
        names == NAMES,
        "the VM's processes are {names:?}, not {NAMES:?}"
    );
    for process in processes {
        for needed in ["no_new_privs", "seccomp"] {
            ensure!(
                process.sandbox.iter().any(|found| found == needed),
                "{} (pid {}) runs without {needed}",
                process.name,
                process.pid
            );
        }
    }
    Ok(())
}

/// When a process was started, as time since boot.
pub(super) fn start_time(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let ticks_per_s = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")?;
    let ticks = start_ticks(&stat).context("/proc/PID/stat has no start time")?;
    Ok(Duration::from_millis(
        ticks * 1000 / ticks_per_s.cast_unsigned(),
    ))
}

/// Field 22 of proc(5)'s stat; the name in parentheses may contain anything.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

fn confinement(status: &str) -> Vec<String> {
    let field = |key: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(key));
        value.unwrap_or_default().trim()
    };
    let mut found = Vec::new();
    if field("NoNewPrivs:") == "1" {
        found.push("no_new_privs".to_owned());
    }
    // 2 is filter mode.
    if field("Seccomp:") == "2" {
        found.push("seccomp".to_owned());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_survives_a_strange_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 4242 0 0";
        assert_eq!(start_ticks(stat), Some(4242));
    }

    #[test]
    fn a_process_without_seccomp_is_refused() {
        let process = |name: &str, sandbox: &[&str]| Process {
            name: name.into(),
            sandbox: sandbox.iter().map(|name| (*name).to_owned()).collect(),
            ..Process::default()
        };
        let both = ["no_new_privs", "seccomp"];
        let mut all = vec![
            process("vmm-core", &both),
            process("device-net", &both),
            process("device-blk", &["no_new_privs"]),
        ];
        let error = expect_one_of_each(&all).unwrap_err();
        assert!(error.to_string().contains("device-blk"), "{error}");
        all[2] = process("device-blk", &both);
        assert!(expect_one_of_each(&all).is_ok());
        all.push(process("device-blk", &both));
        assert!(expect_one_of_each(&all).is_err());
    }
}
