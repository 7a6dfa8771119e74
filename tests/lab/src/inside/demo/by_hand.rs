//! The VM without a controller: each process started as README shows it.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::console::Console;
use super::{CPUS, DISK_MIB, MEMORY_MIB, Order, processes};
use crate::inside::child::{Guarded, poll};
use crate::job::{Process, Site};
use crate::tool;

const START_LIMIT: Duration = Duration::from_secs(20);
const STOP_LIMIT: Duration = Duration::from_secs(10);

pub(super) struct Machine {
    dir: PathBuf,
    vmm: Guarded,
    blk: Guarded,
    net: Guarded,
    tap: String,
}

impl Machine {
    pub(super) fn launch(order: &Order) -> Result<Self> {
        let dir = order.dir;
        let at = |name: &str| dir.join(name).display().to_string();
        File::create(dir.join("disk.raw"))?.set_len(DISK_MIB << 20)?;
        let blk = Guarded::spawn(
            program(order.site, dir, "device-blk")?
                .args(["--control-socket", &at("blk.sock")])
                .arg("--disk")
                .arg(format!(
                    "id=disk0,path={},socket={}",
                    at("disk.raw"),
                    at("disk0.vu")
                )),
        )?;
        let tap = format!("mt{:08x}", rand::random::<u32>());
        let mut net = Guarded::spawn(
            program(order.site, dir, "device-net")?
                .args(["--control-socket", &at("net.sock")])
                .arg("--nic")
                .arg(format!("id=nic0,tap={tap},socket={}", at("nic0.vu"))),
        )?;
        poll(&format!("creation of the tap {tap}"), START_LIMIT, || {
            net.expect_running().context("see its log above")?;
            Ok(fs::exists(format!("/sys/class/net/{tap}"))?.then_some(()))
        })?;
        ip(order.site, &["addr", "add", order.host_cidr, "dev", &tap])?;
        ip(order.site, &["link", "set", &tap, "up"])?;
        let vmm = Guarded::spawn(
            program(order.site, dir, "vmm-core")?
                .args([
                    "--control-socket",
                    &at("vmm.sock"),
                    "--exit-file",
                    &at("exit.json"),
                ])
                .arg("--kernel")
                .arg(&order.site.kernel)
                .arg("--initramfs")
                .arg(&order.site.initrd)
                .args([
                    "--cpus",
                    &CPUS.to_string(),
                    "--memory",
                    &format!("{MEMORY_MIB}M"),
                ])
                .args(["--cmdline", order.cmdline, "--console", "stdio"])
                .args([
                    "--device",
                    &format!("tag=disk0,type=blk,socket={}", at("disk0.vu")),
                ])
                .args([
                    "--device",
                    &format!("tag=nic0,type=net,socket={}", at("nic0.vu")),
                ])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped()),
        )?;
        Ok(Self {
            dir: dir.to_owned(),
            vmm,
            blk,
            net,
            tap,
        })
    }
}

impl super::Machine for Machine {
    fn console(&mut self) -> Result<Console> {
        let stdout = self
            .vmm
            .child()
            .stdout
            .take()
            .context("vmm-core has no console pipe")?;
        Ok(Console::follow(stdout))
    }

    fn processes(&mut self) -> Result<Vec<Process>> {
        [
            ("vmm-core", &self.vmm),
            ("device-blk", &self.blk),
            ("device-net", &self.net),
        ]
        .map(|(name, process)| processes::inspect(name, process.pid()))
        .into_iter()
        .collect()
    }

    fn ask_to_power_off(&mut self) -> Result<()> {
        let mut stdin = self
            .vmm
            .child()
            .stdin
            .take()
            .context("vmm-core has no console pipe")?;
        stdin
            .write_all(b"exit\n")
            .context("vmm-core does not read its console")
    }

    fn wait_until_off(&mut self, deadline: Instant) -> Result<()> {
        let status = self.vmm.wait_until(deadline)?;
        ensure!(status.success(), "vmm-core ended with {status}");
        let exit = fs::read_to_string(self.dir.join("exit.json"))
            .context("vmm-core wrote no exit file")?;
        ensure!(
            exit.contains("guest-shutdown"),
            "the guest did not power off by itself: {exit}"
        );
        Ok(())
    }

    fn image(&self) -> PathBuf {
        self.dir.join("disk.raw")
    }

    fn remove(self: Box<Self>) -> Result<()> {
        let Self {
            vmm, blk, net, tap, ..
        } = *self;
        drop(vmm);
        blk.terminate(STOP_LIMIT)?;
        net.terminate(STOP_LIMIT)?;
        poll(&format!("removal of the tap {tap}"), STOP_LIMIT, || {
            Ok((!fs::exists(format!("/sys/class/net/{tap}"))?).then_some(()))
        })
    }
}

fn program(site: &Site, dir: &Path, name: &str) -> Result<Command> {
    let log = File::create(dir.join(format!("{name}.log")))?;
    let mut command = Command::new(site.bin_dir.join(name));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    Ok(command)
}

fn ip(site: &Site, args: &[&str]) -> Result<()> {
    tool::output(Command::new(&site.busybox).arg("ip").args(args)).map(drop)
}
