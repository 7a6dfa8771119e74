//! The hosts, seen from outside: QEMU processes.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::ground;
use super::host::{Invitation, Order, Seen};
use super::{Ended, Settings};

const STATE_BYTES: u64 = 192 << 20;

/// One host; it is killed when dropped.
pub struct Machine {
    number: usize,
    settings: Settings,
    dir: PathBuf,
    /// Boots so far.
    boots: u32,
    qemu: Option<Child>,
}

impl Machine {
    /// One that is off, with an empty state disk and a tap.
    ///
    /// # Errors
    /// When these cannot be made.
    pub fn new(settings: &Settings, dir: &Path, number: usize) -> Result<Self> {
        let machine = Self {
            number,
            settings: settings.clone(),
            dir: dir.to_owned(),
            boots: 0,
            qemu: None,
        };
        let disk = machine.state_disk();
        File::create(&disk)?.set_len(STATE_BYTES)?;
        let made = Command::new(&settings.mke2fs)
            .args(["-q", "-F", "-t", "ext4"])
            .arg(&disk)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot run {}", settings.mke2fs.display()))?;
        ensure!(
            made.status.success(),
            "no file system for a host's state: {}",
            String::from_utf8_lossy(&made.stderr).trim()
        );
        ground::add_tap(&machine.tap())?;
        Ok(machine)
    }

    /// Its address on the network.
    pub fn address(&self) -> String {
        format!("10.77.0.{}", self.number + 2)
    }

    fn tap(&self) -> String {
        format!("tap{}", self.number)
    }

    fn state_disk(&self) -> PathBuf {
        self.dir.join(format!("host{}.img", self.number))
    }

    fn events(&self) -> PathBuf {
        let name = format!("host{}-boot{}.events", self.number, self.boots);
        self.dir.join(name)
    }

    /// Switches it on, to join or with a disk to try; see [`Order`].
    ///
    /// # Errors
    /// When QEMU cannot be started.
    pub fn start(&mut self, invitation: Option<Invitation>, stale: Option<String>) -> Result<()> {
        self.boots += 1;
        let order = Order {
            address: self.address(),
            invitation,
            stale,
        };
        let log_name = format!("demo-host{}-boot{}.log", self.number, self.boots);
        let log = File::create(self.settings.log_dir.join(log_name))?;
        let mut command = Command::new(&self.settings.qemu);
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-no-reboot", "-cpu", "max", "-smp", "2"])
            .args(["-accel", "tcg,thread=multi,tb-size=512"])
            .args(["-m", &self.settings.memory_mib.to_string()])
            .arg("-kernel")
            .arg(&self.settings.kernel)
            .arg("-initrd")
            .arg(&self.settings.initrd)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 quiet loglevel=4 reboot=t panic=-1 mitigations=off {order}"
            ))
            .args(["-serial", "stdio", "-serial"])
            .arg(format!("file:{}", self.events().display()))
            .arg("-netdev")
            .arg(format!(
                "tap,id=net,ifname={},script=no,downscript=no",
                self.tap()
            ))
            .arg("-device")
            .arg(format!(
                "virtio-net-pci,netdev=net,mac=52:54:00:77:00:{:02x},romfile=",
                self.number + 2
            ))
            .arg("-drive")
            // What it wrote outlives it: this machine goes on.
            .arg(format!(
                "file={},format=raw,if=none,id=state,cache=unsafe",
                self.state_disk().display()
            ))
            .args(["-device", "virtio-blk-pci,drive=state"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        // SAFETY: prctl is async-signal-safe and touches no memory of this process.
        unsafe {
            command.pre_exec(|| {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from)
            });
        }
        let qemu = command
            .spawn()
            .with_context(|| format!("cannot start {}", self.settings.qemu.display()))?;
        self.qemu = Some(qemu);
        Ok(())
    }

    /// Takes its power away.
    pub fn kill(&mut self) {
        if let Some(mut qemu) = self.qemu.take() {
            let _ = qemu.kill();
            let _ = qemu.wait();
        }
    }

    /// What it says runs there; nothing does while it is off or has not said anything.
    ///
    /// # Errors
    /// When it ended by itself.
    pub fn seen(&mut self) -> Result<Seen> {
        let Some(qemu) = &mut self.qemu else {
            return Ok(Seen::default());
        };
        if let Some(status) = qemu.try_wait()? {
            let host = self.number;
            return Err(Ended { host, status }.into());
        }
        let text = fs::read(self.events()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        // The last line may not be whole yet.
        let mut lines = text.lines().rev();
        Ok(lines.find_map(Seen::from_line).unwrap_or_default())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
    }
}
