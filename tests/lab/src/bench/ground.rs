//! Where a bench happens: programs, scratch directories, and what machine this is.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ::bench::meter::Snapshot;
use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use rand::RngCore;

use super::process::LoadProgram;
use super::{Effort, interrupt};
use crate::artifacts::{Artifacts, Program};
use crate::inside::child;
use crate::nested::RunDir;
use crate::tool;
use crate::workspace;

/// Where memory is a file system.
const RAM_DIR: &str = "/dev/shm";
/// What a full bench may take, and some.
const LONGEST_BENCH: Duration = Duration::from_secs(30 * 60);

/// Everything that a bench uses and leaves nothing of.
pub(super) struct Ground {
    bin_dir: PathBuf,
    artifacts: Artifacts,
    load_program: PathBuf,
    disk_dir: RunDir,
    ram_dir: RunDir,
    /// Held as long as this bench runs.
    _lock: File,
}

/// A kind of storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Medium {
    /// A file on disk, past the page cache.
    FileDirect,
    /// A file in memory.
    Tmpfs,
}

impl Medium {
    pub(super) const ALL: [Self; 2] = [Self::FileDirect, Self::Tmpfs];

    /// What names of cases start with.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::FileDirect => "file-odirect",
            Self::Tmpfs => "tmpfs",
        }
    }

    pub(super) fn is_direct(self) -> bool {
        self == Self::FileDirect
    }
}

impl Ground {
    pub(super) fn prepare(
        artifacts: Artifacts,
        bin_dir: &Path,
        dir: Option<&Path>,
    ) -> Result<Self> {
        let own_dir = workspace::lab_subdir("bench")?;
        let lock = File::create(own_dir.join("lock"))?;
        await_lock(&lock)?;
        let dir = dir.unwrap_or(&own_dir);
        Ok(Self {
            load_program: program_in(bin_dir, "bench")?,
            bin_dir: bin_dir.to_owned(),
            artifacts,
            disk_dir: RunDir::create_in(dir)?,
            ram_dir: RunDir::create_in(Path::new(RAM_DIR))?,
            _lock: lock,
        })
    }

    /// One of the workspace's programs.
    pub(super) fn program(&self, name: &str) -> Result<PathBuf> {
        program_in(&self.bin_dir, name)
    }

    pub(super) fn storage_daemon(&self) -> &Program {
        &self.artifacts.storage_daemon
    }

    /// One of QEMU's tools for images.
    pub(super) fn image_tool(&self, name: &str) -> Result<&Program> {
        let mut found = self.artifacts.qemu_utils.iter();
        let program = found.find(|program| program.name() == name);
        program.with_context(|| format!("there is no {name}; install qemu-utils"))
    }

    /// The program that makes the load, as a file.
    pub(super) fn load_program(&self) -> &Path {
        &self.load_program
    }

    /// The program that makes the load.
    pub(super) fn load(&self, effort: &Effort) -> LoadProgram {
        LoadProgram {
            file: self.load_program.clone(),
            seconds: effort.seconds,
            warm_up_seconds: effort.warm_up_seconds,
        }
    }

    /// For images on a medium.
    pub(super) fn dir(&self, medium: Medium) -> &Path {
        match medium {
            Medium::FileDirect => &self.disk_dir.0,
            Medium::Tmpfs => &self.ram_dir.0,
        }
    }

    /// For sockets and logs: its name is short enough.
    pub(super) fn run_dir(&self) -> &Path {
        &self.ram_dir.0
    }

    /// Kernel, processors, memory, and the file system of images on disk.
    pub(super) fn machine(&self) -> String {
        let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
        let release = read("/proc/sys/kernel/osrelease");
        let memory_gib = first_number(&read("/proc/meminfo")).unwrap_or(0) / (1 << 20);
        let model = field(&read("/proc/cpuinfo"), "model name").unwrap_or("unknown CPU".into());
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let filesystem = filesystem_of(&self.disk_dir.0).unwrap_or("unknown".into());
        format!(
            "Linux {}, {cpus} x {model}, {memory_gib} GiB, {filesystem}",
            release.trim()
        )
    }

    /// Whether files there can be read past the page cache; tmpfs lets itself be asked since
    /// Linux 6.6.
    pub(super) fn allows_direct(&self, medium: Medium) -> bool {
        let probe = self.dir(medium).join("probe");
        let opened = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .custom_flags(libc::O_DIRECT)
            .open(&probe);
        let _ = fs::remove_file(&probe);
        opened.is_ok()
    }
}

fn program_in(dir: &Path, name: &str) -> Result<PathBuf> {
    let file = dir.join(name);
    ensure!(file.is_file(), "{} has no {name}", dir.display());
    // Daemons are started with other working directories than this.
    fs::canonicalize(&file).with_context(|| format!("cannot use {}", file.display()))
}

/// Two benches at once would measure one another.
fn await_lock(lock: &File) -> Result<()> {
    child::poll("the end of another bench", LONGEST_BENCH, || {
        interrupt::check()?;
        Ok(lock.try_lock().is_ok().then_some(()))
    })
}

/// The share of all CPUs' time that others take while the bench does nothing.
pub(super) fn foreign_cpu() -> Result<f64> {
    const LOOK: Duration = Duration::from_secs(1);
    let before = Snapshot::take(&[], &[])?;
    std::thread::sleep(LOOK);
    Ok(before.usage_until(&Snapshot::take(&[], &[])?).foreign_cpu)
}

/// Writes a file of random bytes and takes it out of the page cache.
pub(super) fn fill(file_name: &Path, bytes: u64) -> Result<()> {
    let mut file = File::create(file_name)
        .with_context(|| format!("cannot create {}", file_name.display()))?;
    let mut block = vec![0; 1 << 20];
    rand::rng().fill_bytes(&mut block);
    let mut left = bytes;
    while left > 0 {
        interrupt::check()?;
        let len = left.min(block.len() as u64);
        // Blocks differ, in case something below looks for equal ones.
        block[..8].copy_from_slice(&left.to_le_bytes());
        file.write_all(&block[..usize::try_from(len)?])
            .with_context(|| format!("cannot fill {}", file_name.display()))?;
        left -= len;
    }
    forget(&file)
}

/// Brings a file to its medium and drops its pages.
pub(super) fn forget(file: &File) -> Result<()> {
    file.sync_all()?;
    let whole = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    posix_fadvise(file, 0, 0, whole)?;
    Ok(())
}

/// What is checked out; `+` for changes on top.
pub(super) fn commit() -> String {
    let git = |args: &[&str]| {
        let mut command = Command::new("git");
        tool::output(command.current_dir(workspace::root()).args(args)).ok()
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".into();
    };
    let changes = git(&["status", "--porcelain", "--untracked-files=no"]);
    let is_clean = changes.is_some_and(|changes| changes.trim().is_empty());
    format!("{}{}", commit.trim(), if is_clean { "" } else { "+" })
}

fn field(text: &str, key: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn first_number(text: &str) -> Option<u64> {
    text.split_whitespace().find_map(|word| word.parse().ok())
}

/// Type and device of the file system that a directory is on.
fn filesystem_of(dir: &Path) -> Option<String> {
    let dir = fs::canonicalize(dir).ok()?;
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (device, point, kind) = (words.next()?, words.next()?, words.next()?);
            let is_above = dir.starts_with(point);
            is_above.then(|| (point.len(), format!("{kind} on {device}")))
        })
        .max_by_key(|(depth, _)| *depth)
        .map(|(_, text)| text)
}

/// Runs a tool of QEMU's.
pub(super) fn run_tool(program: &Program, args: &[&str]) -> Result<()> {
    interrupt::check()?;
    tool::output(program.command().args(args))?;
    Ok(())
}

/// Feeds commands to a tool of QEMU's, one a line.
pub(super) fn feed_tool(program: &Program, args: &[&str], lines: &str) -> Result<()> {
    interrupt::check()?;
    let mut child = program
        .command()
        .args(args)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run {}", program.name()))?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(lines.as_bytes())?;
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{} failed ({status})", program.name());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_is_described_from_procs_texts() {
        let cpuinfo = "processor\t: 0\nmodel name\t: AMD EPYC\nmodel name\t: other\n";
        assert_eq!(field(cpuinfo, "model name").as_deref(), Some("AMD EPYC"));
        assert_eq!(
            first_number("MemTotal:       24684096 kB\n"),
            Some(24_684_096)
        );
        assert!(filesystem_of(Path::new("/proc/self")).is_some_and(|text| text.contains("proc")));
    }
}
