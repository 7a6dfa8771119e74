//! The VM as a user gets it: a controller, and `vmctl` for everything.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::console::Console;
use super::{CPUS, DISK_MIB, MEMORY_MIB, Order, processes};
use crate::inside::child::{Guarded, poll};
use crate::job::Process;
use crate::tool;

const START_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(20);
const VM: &str = "demo";
const VOLUME: &str = "demo-disk";

pub(super) struct Machine {
    vmctl: Vmctl,
    image: PathBuf,
    console: Option<Guarded>,
    controller: Guarded,
    /// Of the VM, as last seen.
    pids: Vec<u32>,
}

impl Machine {
    pub(super) fn launch(order: &Order) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let log = File::create(order.dir.join("controller.log"))?;
        let mut controller = Guarded::spawn(
            Command::new(order.site.bin_dir.join("controller"))
                .args(["--standalone", "--listen", &format!("127.0.0.1:{port}")])
                .arg("--state-dir")
                .arg(order.dir.join("state"))
                .arg("--run-dir")
                .arg(order.dir.join("run"))
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log),
        )?;
        let vmctl = Vmctl {
            program: order.site.bin_dir.join("vmctl"),
            endpoint: format!("http://127.0.0.1:{port}"),
        };
        poll("start of the controller", START_LIMIT, || {
            controller.expect_running()?;
            Ok(vmctl
                .json(&["host", "list"])
                .is_ok_and(|hosts| is_connected(&hosts))
                .then_some(()))
        })?;
        vmctl.run(&[
            "volume",
            "create",
            VOLUME,
            "--size",
            &format!("{DISK_MIB}M"),
        ])?;
        let volume = vmctl.json(&["volume", "show", VOLUME])?;
        let image = text(&volume, "path")
            .context("the volume shows no path")?
            .into();
        vmctl.run(&[
            "vm",
            "create",
            VM,
            "--cpus",
            &CPUS.to_string(),
            "--memory",
            &format!("{MEMORY_MIB}M"),
            "--kernel",
            path(&order.site.kernel)?,
            "--initramfs",
            path(&order.site.initrd)?,
            "--cmdline",
            order.cmdline,
            "--disk",
            &format!("volume={VOLUME}"),
            "--net",
            &format!("host-cidr={}", order.host_cidr),
        ])?;
        vmctl.run(&["vm", "start", VM])?;
        Ok(Self {
            vmctl,
            image,
            console: None,
            controller,
            pids: Vec::new(),
        })
    }

    fn show(&self) -> Result<Value> {
        self.vmctl.json(&["vm", "show", VM])
    }
}

impl super::Machine for Machine {
    fn console(&mut self) -> Result<Console> {
        let mut follower = Guarded::spawn(
            self.vmctl
                .command(&["vm", "console", VM])
                // An open pipe: the end of input would end the session.
                .stdin(Stdio::piped())
                .stdout(Stdio::piped()),
        )?;
        let stdout = follower
            .child()
            .stdout
            .take()
            .context("vmctl has no console pipe")?;
        self.console = Some(follower);
        Ok(Console::follow(stdout))
    }

    fn processes(&mut self) -> Result<Vec<Process>> {
        let vm = self.show()?;
        let list = find(&vm, "processes").and_then(Value::as_array);
        let list = list.context("vmctl vm show lists no processes")?;
        let mut found = Vec::new();
        for entry in list {
            let name = text(entry, "name").context("a process without a name")?;
            let pid = find(entry, "pid")
                .and_then(number)
                .context("a process without a pid")?;
            // The kernel's word decides; what the process says of itself comes in addition.
            let mut process = processes::inspect(name, pid as u32)?;
            process.rss_kib = find(entry, "rss_kib")
                .and_then(number)
                .context("no rss_kib")?;
            process.pss_kib = find(entry, "pss_kib")
                .and_then(number)
                .context("no pss_kib")?;
            for own in find(entry, "sandbox")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
            {
                let own = own.as_str().unwrap_or_default().to_owned();
                if !process.sandbox.contains(&own) {
                    process.sandbox.push(own);
                }
            }
            found.push(process);
        }
        self.pids = found.iter().map(|process| process.pid).collect();
        Ok(found)
    }

    fn ask_to_power_off(&mut self) -> Result<()> {
        self.vmctl.run(&["vm", "stop", VM])
    }

    fn wait_until_off(&mut self, deadline: Instant) -> Result<()> {
        let limit = deadline.saturating_duration_since(Instant::now());
        let vm = poll("the end of the VM", limit, || {
            let vm = self.show()?;
            let phase = text(&vm, "phase").unwrap_or_default().to_lowercase();
            Ok(["stopped", "failed"]
                .iter()
                .any(|end| phase.ends_with(end))
                .then_some(vm))
        })?;
        let reason = text(&vm, "stop_reason").unwrap_or_default();
        ensure!(
            reason == "guest-shutdown",
            "the guest did not power off by itself: {reason}"
        );
        Ok(())
    }

    fn image(&self) -> PathBuf {
        self.image.clone()
    }

    fn remove(mut self: Box<Self>) -> Result<()> {
        drop(self.console.take());
        self.vmctl.run(&["vm", "delete", VM])?;
        self.vmctl.run(&["volume", "delete", VOLUME])?;
        ensure!(
            !self.image.exists(),
            "the deleted volume's image is still there"
        );
        self.controller.terminate(STOP_LIMIT)?;
        for pid in self.pids {
            ensure!(
                !Path::new(&format!("/proc/{pid}")).exists(),
                "process {pid} is left over"
            );
        }
        Ok(())
    }
}

struct Vmctl {
    program: PathBuf,
    endpoint: String,
}

impl Vmctl {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["--endpoint", &self.endpoint]).args(args);
        command
    }

    fn run(&self, args: &[&str]) -> Result<()> {
        tool::output(&mut self.command(args)).map(drop)
    }

    fn json(&self, args: &[&str]) -> Result<Value> {
        let output = tool::output(self.command(args).args(["-o", "json"]))?;
        serde_json::from_str(&output)
            .with_context(|| format!("vmctl {} printed no JSON", args.join(" ")))
    }
}

fn is_connected(hosts: &Value) -> bool {
    find(hosts, "connected").and_then(Value::as_bool) == Some(true)
}

/// The first field of that name, at any depth: the demo depends on names, not on nesting.
fn find<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Object(fields) => fields
            .get(key)
            .or_else(|| fields.values().find_map(|field| find(field, key))),
        Value::Array(items) => items.iter().find_map(|item| find(item, key)),
        _ => None,
    }
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    find(value, key)?.as_str()
}

/// Protobuf's JSON writes 64-bit numbers as strings.
fn number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

fn path(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}
