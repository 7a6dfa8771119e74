//! `cargo lab demo`: the main job with progress, a summary and a file of measurements.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};

use crate::job::{DemoReport, Event, Job};
use crate::kvm::Ground;
use crate::progress::step;
use crate::runner::{Kit, Run};
use crate::workspace;

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
    /// With 2: lose one of two hosts, and show that its VM runs again on the other one, once, with its
    /// disk intact. Hosts are network namespaces of this machine, guests a few instructions on its KVM.
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
        step("building the fleet");
        let mut build = vec!["build"];
        for package in [
            "controller",
            "node-agent",
            "vmm-core",
            "device-blk",
            "failover",
        ] {
            build.extend(["--package", package]);
        }
        let binaries = workspace::build(&build)?;
        let failover = binaries.iter().find(|binary| binary.name == "failover");
        let failover = &failover.context("cargo built no failover")?.file;
        let mut command = Command::new(failover);
        if let Some(file) = &self.json {
            command.arg("--json").arg(file);
        }
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
