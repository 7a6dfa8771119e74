//! `cargo lab demo`: the main job with progress, a summary and a file of measurements.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};

use crate::artifacts::Artifacts;
use crate::initramfs::{self, Tool};
use crate::job::{DemoReport, Event, Job};
use crate::kvm::Ground;
use crate::nested::{RunDir, die_with_this_process};
use crate::progress::step;
use crate::runner::{Kit, Run};
use crate::workspace::{self, Binary};
use crate::wrappers;

/// What the demo of two hosts is made of.
const PROGRAMS: [&str; 6] = [
    "controller",
    "node-agent",
    "vmm-core",
    "device-blk",
    "device-net",
    "failover",
];
/// Of these, what hosts have.
const ON_HOSTS: [&str; 5] = [
    "node-agent",
    "vmm-core",
    "device-blk",
    "device-net",
    "failover",
];
/// Room for a host's files and two guests.
const HOST_MEMORY_MIB: u32 = 2048;

/// The demo's command line.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Write the measurements to FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Start device-blk, device-net and vmm-core one by one, without a controller.
    #[arg(long)]
    by_hand: bool,
    /// Use a nested host even where hardware KVM is there.
    #[arg(long)]
    nested: bool,
    /// With 2: two nested hosts on one network, a 3-member etcd and two controllers. One host is killed
    /// without warning; its VM runs again on the other one, once, with its disk intact; the dead host
    /// returns and is kept from what it lost.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=2), conflicts_with_all = ["by_hand", "nested"])]
    hosts: u32,
    /// Show the nested host's console.
    #[arg(long, short)]
    verbose: bool,
}

impl Demo {
    /// Exit code 0 only if all was verified.
    pub(crate) fn run(self) -> Result<i32> {
        if self.hosts == 2 {
            return self.lose_a_host();
        }
        let kit = Kit::prepare()?;
        let ground = Ground::choose(self.nested);
        match &ground {
            Ground::Direct => step("hardware KVM is here: running directly"),
            Ground::Nested(why) => step(format_args!("booting a nested host: {why}")),
        }
        let run = Run {
            ground: &ground,
            extra_tools: Vec::new(),
            extra_files: Vec::new(),
            third_parties: false,
            memory_mib: 2048,
            timeout: Duration::from_secs(600),
            show_console: self.verbose,
            log_name: "demo",
            neighbour: false,
        };
        let mut report = None;
        let by_hand = self.by_hand;
        let code = run.job(
            &kit,
            |site| Job::Demo { site, by_hand },
            |event| match event {
                Event::Step { text } => step(text),
                Event::Demo(measured) => report = Some(measured.clone()),
                _ => {}
            },
        )?;
        let report = report.context("the demo ended without a report")?;
        print_summary(&report, &ground);
        if let Some(file) = &self.json {
            fs::write(
                file,
                serde_json::to_string_pretty(&to_json(&report, &ground)?)? + "\n",
            )
            .with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(code)
    }
}

impl Demo {
    /// What is done and measured is the program's: `tests/failover`.
    fn lose_a_host(&self) -> Result<i32> {
        let artifacts = Artifacts::obtain()?;
        step("building the fleet");
        let mut build = vec!["build"];
        for program in PROGRAMS {
            build.extend(["--package", program]);
        }
        let binaries = workspace::build(&build)?;
        let failover = binaries.iter().find(|binary| binary.name == "failover");
        let failover = &failover.context("cargo built no failover")?.file;
        let bin_dir = failover.parent().context("failover is in no directory")?;
        let on_host = |name: &&str| {
            Tool::of_binary(&Binary {
                name: (*name).to_owned(),
                file: bin_dir.join(name),
            })
        };
        let tools: Vec<Tool> = ON_HOSTS.iter().map(on_host).collect::<Result<_>>()?;
        let run_dir = RunDir::create()?;
        let initrd = run_dir.0.join("host.cpio");
        let job = Job::Command {
            argv: vec!["/usr/bin/failover".to_owned(), "host".to_owned()],
        };
        initramfs::nested_host(&initrd, &artifacts, &tools, &[], &job)?;
        wrappers::network_tools(&artifacts)?;
        let settings = run_dir.0.join("settings.json");
        let content = json!({
            "bin_dir": bin_dir,
            "qemu": wrappers::qemu(&artifacts)?,
            "mke2fs": artifacts.mke2fs,
            "kernel": artifacts.kernel.vmlinux,
            "initrd": initrd,
            "memory_mib": HOST_MEMORY_MIB,
            "log_dir": workspace::lab_subdir("logs")?,
        });
        fs::write(&settings, serde_json::to_vec(&content)?)?;
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::iter::once(wrappers::dir()).chain(std::env::split_paths(&path));
        let mut command = Command::new(failover);
        command
            .arg("nested")
            .arg("--settings")
            .arg(&settings)
            .env("PATH", std::env::join_paths(dirs)?)
            .envs([wrappers::etcd(&artifacts)?]);
        if let Some(file) = &self.json {
            command.arg("--json").arg(file);
        }
        die_with_this_process(&mut command);
        let status = command
            .status()
            .with_context(|| format!("cannot start {}", failover.display()))?;
        Ok(status.code().unwrap_or(1))
    }
}

fn to_json(report: &DemoReport, ground: &Ground) -> Result<Value> {
    let mut value = serde_json::to_value(report)?;
    value["kvm"] = json!(ground.name());
    Ok(value)
}

fn print_summary(report: &DemoReport, ground: &Ground) {
    let verdict = |verified: bool| if verified { "verified" } else { "NOT VERIFIED" };
    println!();
    println!("KVM             {}", ground.name());
    println!("guest kernel    {}", report.guest_kernel);
    println!(
        "boot            {} ms from exec of vmm-core to userspace",
        report.boot_ms
    );
    println!("CPUs            {} running at once", report.vcpus_used);
    println!(
        "disk            {} bytes, {}",
        report.disk_bytes,
        verdict(report.disk_verified)
    );
    println!(
        "network         {} bytes, {}",
        report.net_bytes,
        verdict(report.net_verified)
    );
    println!(
        "clean shutdown  {}",
        if report.clean_shutdown { "yes" } else { "NO" }
    );
    for process in &report.processes {
        println!(
            "{:<15} pid {}, rss {} KiB, pss {} KiB without guest RAM; {}",
            process.name,
            process.pid,
            process.rss_kib,
            process.pss_kib,
            process.sandbox.join(", ")
        );
    }
    for problem in &report.problems {
        println!("PROBLEM         {problem}");
    }
}
