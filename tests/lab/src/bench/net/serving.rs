//! How each contender is started, and how it is loaded.
//!
//! A contender gets one CPU and its frontend the other.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use super::super::ground::Ground;
use super::super::interrupt;
use super::super::process::Daemon;
use super::testpmd::{Cores, Testpmd};
use crate::artifacts::dpdk::Dpdk;
use crate::inside::child::{self, Guarded};

/// For what takes less than a second on a quiet machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Descriptors of each virtqueue, unless a case says otherwise.
pub(super) const QUEUE_SIZE: usize = 1024;
/// Buffers of a backend.
const BACKEND_BUFFERS: usize = 32_768;
/// Buffers of a frontend, beside those in its rings: what DPDK's core keeps at hand. All together must be in fewer
/// pages than a CPU has in its TLB, for those that are given back may go round through all of them.
const SPARE_BUFFERS: usize = 1024;

/// What contenders are made with.
pub(super) struct Bay<'a> {
    pub(super) ground: &'a Ground,
    pub(super) dpdk: Dpdk,
    pub(super) cpus: Cpus,
}

/// The two CPUs of a bench: one party on each, whoever it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cpus {
    pub(super) frontend: usize,
    pub(super) daemon: usize,
}

impl Cpus {
    /// The first two that this process may use.
    pub(super) fn choose() -> Result<Self> {
        let allowed = sched_getaffinity(Pid::from_raw(0))?;
        let cpus: Vec<usize> = (0..CpuSet::count())
            .filter(|&cpu| allowed.is_set(cpu).unwrap_or(false))
            .take(2)
            .collect();
        ensure!(cpus.len() == 2, "the bench of NICs needs two CPUs");
        Ok(Self {
            frontend: cpus[0],
            daemon: cpus[1],
        })
    }
}

impl Bay<'_> {
    /// One process of ours with these `--nic`s.
    pub(super) fn device_net(
        &self,
        name: &str,
        nics: &[String],
        sockets: &[PathBuf],
    ) -> Result<Daemon> {
        let mut command = self.pinned(&self.ground.program("device-net")?, self.cpus.daemon);
        let dir = self.ground.run_dir();
        command
            .arg("--control-socket")
            .arg(dir.join(format!("{name}.ctl")))
            .stdin(Stdio::null());
        for nic in nics {
            command.args(["--nic", nic]);
        }
        Daemon::start_with(name, &mut command, sockets.to_vec(), dir)
    }

    /// DPDK's vhost PMD, polling, with whatever else is to be forwarded to.
    pub(super) fn vhost_pmd(
        &self,
        name: &str,
        sockets: &[PathBuf],
        further: &[String],
        mode: &str,
    ) -> Result<Daemon> {
        let ports = sockets
            .iter()
            .enumerate()
            .map(|(index, socket)| format!("net_vhost{index},iface={},queues=1", socket.display()));
        let devices: Vec<String> = ports.chain(further.iter().cloned()).collect();
        let cores = Cores {
            forwarding: self.cpus.daemon,
            other: self.cpus.frontend,
        };
        let options = [
            format!("--forward-mode={mode}"),
            format!("--total-num-mbufs={BACKEND_BUFFERS}"),
        ];
        let dir = self.ground.run_dir();
        let mut testpmd = Testpmd::start(
            &self.dpdk,
            dir,
            name,
            cores,
            &devices,
            &options,
            sockets.to_vec(),
        )?;
        testpmd.tell("start")?;
        Ok(testpmd.process)
    }

    /// The frontend: virtio NICs on these sockets, and a forwarding mode. It does not begin yet.
    pub(super) fn frontend(
        &self,
        name: &str,
        sockets: &[PathBuf],
        options: &[String],
    ) -> Result<Testpmd> {
        self.frontend_with(name, sockets, QUEUE_SIZE, &[], options)
    }

    /// The frontend with queues of another size, and further devices after those NICs.
    pub(super) fn frontend_with(
        &self,
        name: &str,
        sockets: &[PathBuf],
        queue_size: usize,
        further: &[String],
        options: &[String],
    ) -> Result<Testpmd> {
        let nics = sockets.iter().enumerate().map(|(index, socket)| {
            format!(
                "net_virtio_user{index},path={},queues=1,queue_size={queue_size},mac={}",
                socket.display(),
                mac(index)
            )
        });
        let devices: Vec<String> = nics.chain(further.iter().cloned()).collect();
        let cores = Cores {
            forwarding: self.cpus.frontend,
            other: self.cpus.daemon,
        };
        // Left to itself, testpmd gives buffers back a thousand at a time, which then go round through all that it
        // has: too many for the caches. Whether it comes to that depends on who is faster by a little, and makes a
        // threefold difference whatever is measured.
        let given_back_early = queue_size - queue_size / 16;
        let buffers = sockets.len() * queue_size * 3 / 2 + SPARE_BUFFERS;
        let own = [
            format!("--txfreet={given_back_early}"),
            "--mbcache=512".to_owned(),
            format!("--total-num-mbufs={buffers}"),
        ];
        // What is said last holds.
        let options: Vec<String> = own.iter().chain(options).cloned().collect();
        let dir = self.ground.run_dir();
        Testpmd::start(&self.dpdk, dir, name, cores, &devices, &options, Vec::new())
    }

    /// A part of the load program, on the daemon's CPU or the frontend's.
    pub(super) fn load(&self, name: &str, cpu: usize, args: &[&str]) -> Result<Daemon> {
        let mut command = self.pinned(self.ground.load_program(), cpu);
        command.args(args).stdin(Stdio::null());
        Daemon::start_with(name, &mut command, Vec::new(), self.ground.run_dir())
    }

    /// A part of the load program that ends by itself, on the daemon's CPU.
    pub(super) fn load_once(&self, args: &[&str]) -> Result<()> {
        let mut command = self.pinned(self.ground.load_program(), self.cpus.daemon);
        command
            .args(args)
            .stdin(Stdio::null())
            .stderr(Stdio::piped());
        let mut load = Guarded::spawn(&mut command)?;
        let status = child::poll("the end of the load", PATIENCE, || {
            interrupt::check()?;
            Ok(load.child().try_wait()?)
        })?;
        let mut words = String::new();
        if let Some(stderr) = &mut load.child().stderr {
            stderr.read_to_string(&mut words)?;
        }
        ensure!(status.success(), "{}", words.trim_end());
        Ok(())
    }

    /// A path at which nothing is yet.
    pub(super) fn socket(&self, name: &str) -> PathBuf {
        let socket = self.ground.run_dir().join(format!("{name}.vu"));
        // Of a contender before; only its absence tells when the next one listens.
        let _ = std::fs::remove_file(&socket);
        socket
    }

    /// DPDK's processes bind themselves; everybody else is bound alike.
    fn pinned(&self, program: &Path, cpu: usize) -> Command {
        let mut command = Command::new(program);
        pin(&mut command, cpu);
        command
    }
}

/// The address of a frontend's port.
pub(super) fn mac(port: usize) -> String {
    format!("52:54:00:00:00:{:02x}", port + 1)
}

/// Options of a frontend that sends packets as fast as it can.
pub(super) fn sending(len: usize) -> [String; 2] {
    [
        "--forward-mode=txonly".to_owned(),
        format!("--txpkts={len}"),
    ]
}

fn pin(command: &mut Command, cpu: usize) {
    use std::os::unix::process::CommandExt;
    let bind = move || {
        let mut set = CpuSet::new();
        set.set(cpu)?;
        nix::sched::sched_setaffinity(Pid::from_raw(0), &set)?;
        Ok(())
    };
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(bind) };
}
