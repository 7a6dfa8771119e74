//! Real Linux guests in `vmm-core`, on a real KVM.

mod boot;
mod campaigns;
mod control;
mod fleet;
mod managed;
mod network;
mod outage;
mod side_by_side;
mod third_party;

use std::path::{Path, PathBuf};
use std::process::Command;

use guest::plan::{End, Job, Plan};

use crate::process::Process;
use crate::site;

/// What a test guest's kernel is told besides its plan.
const CMDLINE: &str = "console=ttyS0 quiet reboot=t panic=-1";

/// A `vmm-core` to be started by hand, without agent or controller.
struct Vmm {
    kernel: PathBuf,
    memory: &'static str,
    cpus: u32,
    devices: Vec<String>,
    more: Vec<String>,
}

impl Default for Vmm {
    fn default() -> Vmm {
        Vmm {
            kernel: site::path("GUEST_KERNEL"),
            memory: "256M",
            cpus: 1,
            devices: Vec::new(),
            more: Vec::new(),
        }
    }
}

impl Vmm {
    /// Starts it, with its console in the process's output.
    fn spawn(&self, dir: &Path, plan: &Plan) -> Process {
        Process::spawn(dir, "vmm-core", &mut self.command(dir, plan))
    }

    /// The same, for a guest that is told something later.
    fn spawn_listening(&self, dir: &Path, plan: &Plan) -> Process {
        Process::spawn_listening(dir, "vmm-core", &mut self.command(dir, plan))
    }

    fn command(&self, dir: &Path, plan: &Plan) -> Command {
        let mut command = Command::new(site::program("vmm-core"));
        command
            .arg("--kernel")
            .arg(&self.kernel)
            .arg("--initramfs")
            .arg(site::path("GUEST_INITRD"))
            .args([
                "--console",
                "stdio",
                "--memory",
                self.memory,
                "--cpus",
                &self.cpus.to_string(),
            ])
            .args(["--cmdline", &format!("{CMDLINE} {plan}")])
            .arg("--control-socket")
            .arg(dir.join("vmm.sock"));
        for device in &self.devices {
            command.args(["--device", device]);
        }
        command.args(&self.more);
        command
    }
}

/// A fresh sparse image.
fn image(dir: &Path, name: &str, len_bytes: u64) -> PathBuf {
    let path = dir.join(name);
    let file = std::fs::File::create(&path).expect("an image can be created");
    file.set_len(len_bytes).expect("an image can be extended");
    path
}

/// A `device-blk` that serves one image at `DIR/disk.vu`.
fn device_blk(dir: &Path, image: &Path) -> Process {
    let mut daemon = Process::spawn(
        dir,
        "device-blk",
        Command::new(site::program("device-blk"))
            .arg("--control-socket")
            .arg(dir.join("blk.sock"))
            .args([
                "--disk",
                &format!(
                    "id=disk,path={},socket={}",
                    image.display(),
                    disk_socket(dir).display()
                ),
            ]),
    );
    daemon.wait_for_socket(&dir.join("blk.sock"));
    daemon
}

/// Fills and verifies the first disk.
fn disk_plan(seed: u64, bytes: u64, end: End) -> Plan {
    Plan {
        jobs: vec![Job::Disk {
            device: "vda".into(),
            seed,
            bytes,
        }],
        end,
        ..Plan::default()
    }
}

fn disk_socket(dir: &Path) -> PathBuf {
    dir.join("disk.vu")
}

fn disk_device(dir: &Path) -> String {
    format!("tag=disk,type=blk,socket={}", disk_socket(dir).display())
}
