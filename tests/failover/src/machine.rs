//! A machine: a network namespace that lives as long as its holder.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// See the module. All that runs in it ends with it.
pub struct Machine {
    holder: Child,
}

impl Machine {
    /// One with a loopback and nothing else.
    ///
    /// # Errors
    /// Without the right to make namespaces.
    pub fn new() -> Result<Self> {
        let mut command = Command::new("sleep");
        command.arg("900").stdin(Stdio::null());
        // SAFETY: prctl and unshare are async-signal-safe system calls.
        unsafe {
            command.pre_exec(|| {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                unshare(CloneFlags::CLONE_NEWNET)?;
                Ok(())
            });
        }
        let holder = command
            .spawn()
            .context("making a network namespace needs root")?;
        let machine = Self { holder };
        machine.run("ip link set lo up")?;
        Ok(machine)
    }

    fn net(&self) -> Result<File> {
        let path = format!("/proc/{}/ns/net", self.holder.id());
        File::open(&path).with_context(|| format!("cannot open {path}"))
    }

    /// A command that runs in here, and ends with this process.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let net = self.net()?;
        let mut command = Command::new(program);
        // SAFETY: setns is an async-signal-safe system call; what it uses was made before.
        unsafe {
            command.pre_exec(move || {
                setns(&net, CloneFlags::CLONE_NEWNET)?;
                Ok(())
            });
        }
        Ok(command)
    }

    /// Runs words that blanks separate.
    ///
    /// # Errors
    /// When they fail.
    pub fn run(&self, line: &str) -> Result<()> {
        let mut words = line.split_ascii_whitespace();
        let output = self
            .command(words.next().unwrap_or_default())?
            .args(words)
            .stdin(Stdio::null())
            .output()
            .with_context(|| line.to_owned())?;
        if !output.status.success() {
            bail!("{line}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Runs `work` on a thread in this network.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let net = self.net()?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(&net, CloneFlags::CLONE_NEWNET)?;
                anyhow::Ok(work())
            });
            match thread.join() {
                Ok(done) => done,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Gives it a cable to a port of `other`'s bridge, and an address.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn plug(&self, other: &Self, port: &str, address: &str) -> Result<()> {
        let holder = other.holder.id();
        self.run(&format!(
            "ip link add eth0 type veth peer name {port} netns {holder}"
        ))?;
        other.run(&format!("ip link set {port} master br0 up"))?;
        self.run(&format!("ip address add {address}/24 dev eth0"))?;
        self.run("ip link set eth0 up")
    }

    /// Pids of all processes in here but its holder.
    pub fn processes(&self) -> Vec<i32> {
        let own = std::fs::read_link(format!("/proc/{}/ns/net", self.holder.id())).ok();
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| *pid as u32 != self.holder.id())
            .filter(|pid| {
                let net = std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
                net.is_some() && net == own
            })
            .collect()
    }

    /// Ends everything that runs in here, at once.
    pub fn kill_all(&self) {
        for pid in self.processes() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill_all();
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
