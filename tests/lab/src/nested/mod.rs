//! The nested host: Debian's kernel in an emulated AMD machine with SVM, where `/dev/kvm` is a
//! real KVM.
//!
//! ```text
//!  this process                      QEMU (TCG)
//!  --------------                    ----------------------------------------------
//!  initramfs: lab, tools, job  --->  /init = lab: mounts, modules, then the job
//!  console log, shown if asked <---  ttyS0
//!  events, one JSON a line     <---  ttyS1
//! ```

pub(crate) mod init;

use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::artifacts::Artifacts;
use crate::initramfs::{self, Tool};
use crate::inside::test_run;
use crate::job::{Event, Job};
use crate::workspace;

/// How a nested host is made.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) timeout: Duration,
    /// Show the console on standard output.
    pub(crate) show_console: bool,
    pub(crate) tools: Vec<Tool>,
    /// (file here, path there)
    pub(crate) files: Vec<(PathBuf, String)>,
    /// Of the log in `target/lab/logs`.
    pub(crate) log_name: String,
    /// To another nested host.
    pub(crate) cable: Option<Cable>,
}

/// One end of a cable between two nested hosts: eth0 of each. What is sent while the other one is off
/// is lost, as it should be.
#[derive(Clone, Debug)]
pub(crate) struct Cable {
    pub(crate) own_socket: PathBuf,
    pub(crate) other_socket: PathBuf,
    pub(crate) mac: &'static str,
}

impl Cable {
    /// Both ends, with their sockets in `dir`.
    pub(crate) fn pair(dir: &Path) -> [Self; 2] {
        let [first, second] = ["cable-1", "cable-2"].map(|name| dir.join(name));
        [
            Self {
                own_socket: first.clone(),
                other_socket: second.clone(),
                mac: "52:54:00:00:00:01",
            },
            Self {
                own_socket: second,
                other_socket: first,
                mac: "52:54:00:00:00:02",
            },
        ]
    }
}

/// Boots a nested host, runs the job and hands each event to `on_event`; returns the job's exit
/// code.
///
/// # Errors
/// When the host can't be started, dies, or is not done in time. It is gone in every case.
pub(crate) fn run(
    artifacts: &Artifacts,
    options: &Options,
    job: &Job,
    mut on_event: impl FnMut(&Event),
) -> Result<i32> {
    let run_dir = RunDir::create()?;
    let initrd = run_dir.0.join("initrd.cpio");
    initramfs::nested_host(&initrd, artifacts, &options.tools, &options.files, job)?;
    let log = workspace::lab_subdir("logs")?.join(format!("{}.log", options.log_name));
    // A socket path may have 107 bytes, which a deep checkout exceeds; so it lies in /tmp.
    let socket_dir = RunDir::create_in(&std::env::temp_dir())?;
    let socket = socket_dir.0.join("events");
    let listener = UnixListener::bind(&socket)
        .with_context(|| format!("cannot listen on {}", socket.display()))?;
    let mut machine = Machine::start(artifacts, options, &initrd, Some(&socket))?;
    let console = machine.console(&log, options.show_console)?;
    let deadline = Instant::now() + options.timeout;
    let longest_silence = match job {
        Job::Tests { long, .. } => test_run::longest_silence(*long),
        _ => options.timeout,
    };
    let outcome = follow(
        listener,
        &mut machine,
        deadline,
        longest_silence,
        &mut on_event,
    );
    if matches!(outcome, Ok(Some(_))) {
        // Normally it powers itself off right after the last event.
        machine.wait_until(Instant::now() + Duration::from_secs(10));
    }
    drop(machine);
    let _ = console.join();
    let (extension, how) = match outcome {
        Ok(Some(code)) => return Ok(code),
        Ok(None) => ("silent.log", "stands still"),
        Err(_) if shows_panic(&log) => ("panicked.log", "had a panic of its own kernel"),
        Err(error) => {
            return Err(error.context(format!("nested host; its console: {}", log.display())));
        }
    };
    let console = log.with_extension(extension);
    fs::rename(&log, &console)?;
    Err(HostLost { how, console }.into())
}

/// The nested host itself failed, which no program in it can be blamed for: emulated SVM does not
/// always restore a processor's state. Seen: a vCPU thread that took a page fault without the
/// kernel's GS base, and a host that stood still, its tests' deadlines with it.
#[derive(Debug)]
pub(crate) struct HostLost {
    how: &'static str,
    console: PathBuf,
}

impl fmt::Display for HostLost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { how, console } = self;
        write!(
            f,
            "the nested host {how}; its console: {}",
            console.display()
        )
    }
}

impl std::error::Error for HostLost {}

fn shows_panic(console: &Path) -> bool {
    fs::read(console).is_ok_and(|text| {
        String::from_utf8_lossy(&text)
            .lines()
            // Guests' consoles are not on the host's.
            .any(|line| line.contains("Kernel panic - not syncing"))
    })
}

/// A second nested host, with a job that does not end; it ends when dropped.
pub(crate) struct Neighbour {
    machine: Option<Machine>,
    console: Option<thread::JoinHandle<()>>,
    _run_dir: RunDir,
}

impl Neighbour {
    /// Boots it, without waiting for anything.
    ///
    /// # Errors
    /// It cannot be made.
    pub(crate) fn start(artifacts: &Artifacts, options: &Options, job: &Job) -> Result<Self> {
        let run_dir = RunDir::create()?;
        let initrd = run_dir.0.join("initrd.cpio");
        initramfs::nested_host(&initrd, artifacts, &options.tools, &options.files, job)?;
        let log = workspace::lab_subdir("logs")?.join(format!("{}.log", options.log_name));
        let mut machine = Machine::start(artifacts, options, &initrd, None)?;
        let console = machine.console(&log, options.show_console)?;
        Ok(Self {
            machine: Some(machine),
            console: Some(console),
            _run_dir: run_dir,
        })
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        drop(self.machine.take());
        if let Some(console) = self.console.take() {
            let _ = console.join();
        }
    }
}

/// The job's exit code; None when nothing was heard for `longest_silence`.
fn follow(
    listener: UnixListener,
    machine: &mut Machine,
    deadline: Instant,
    longest_silence: Duration,
    on_event: &mut impl FnMut(&Event),
) -> Result<Option<i32>> {
    let (sender, events) = mpsc::sync_channel(64);
    thread::spawn(move || {
        let Ok((stream, _)) = listener.accept() else {
            return;
        };
        for line in BufReader::new(stream).lines() {
            let Ok(line) = line else { return };
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let mut last_heard = Instant::now();
    loop {
        match events.recv_timeout(Duration::from_millis(200)) {
            Ok(line) => {
                last_heard = Instant::now();
                let Ok(event) = serde_json::from_str::<Event>(line.trim()) else {
                    continue;
                };
                on_event(&event);
                if let Event::End { code, error } = event {
                    return match error {
                        Some(error) => bail!("{error}"),
                        None => Ok(Some(code)),
                    };
                }
            }
            Err(RecvTimeoutError::Timeout) if Instant::now() > deadline => {
                bail!("not done in time; killed")
            }
            Err(RecvTimeoutError::Timeout) if last_heard.elapsed() > longest_silence => {
                return Ok(None);
            }
            Err(RecvTimeoutError::Timeout) if machine.is_running() => {}
            Err(_) => bail!("it ended before the job did"),
        }
    }
}

impl Cable {
    fn args(&self) -> [String; 4] {
        [
            "-netdev".to_owned(),
            format!(
                "dgram,id=cable,local.type=unix,local.path={},remote.type=unix,remote.path={}",
                self.own_socket.display(),
                self.other_socket.display()
            ),
            "-device".to_owned(),
            format!("virtio-net-pci,netdev=cable,mac={},romfile=", self.mac),
        ]
    }
}

/// A running QEMU; killed on drop.
struct Machine(Child);

impl Machine {
    fn start(
        artifacts: &Artifacts,
        options: &Options,
        initrd: &Path,
        events: Option<&Path>,
    ) -> Result<Self> {
        let mut command = artifacts.qemu.command();
        // The ELF kernel boots by PVH and spares the emulator the decompressor.
        command
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args(["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max"])
            .args([
                "-m",
                &options.memory_mib.to_string(),
                "-smp",
                &options.cpus.to_string(),
            ])
            .arg("-kernel")
            .arg(&artifacts.kernel.vmlinux)
            .arg("-initrd")
            .arg(initrd)
            .args([
                "-append",
                "console=ttyS0 quiet loglevel=4 reboot=t panic=-1 mitigations=off",
            ])
            .args(["-serial", "stdio"])
            .arg("-chardev")
            .arg(match events {
                Some(socket) => format!("socket,id=events,path={}", socket.display()),
                None => "null,id=events".to_owned(),
            })
            .args(["-serial", "chardev:events"])
            .args(options.cable.iter().flat_map(Cable::args))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        die_with_this_process(&mut command);
        let child = command
            .spawn()
            .with_context(|| format!("cannot run {}", artifacts.qemu.program.file.display()))?;
        Ok(Self(child))
    }

    /// Copies the console to the log, and to standard output if wanted, until the machine ends.
    fn console(&mut self, log: &Path, show: bool) -> Result<thread::JoinHandle<()>> {
        let stdout = self.0.stdout.take().context("no pipe from the machine")?;
        let mut log =
            File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        Ok(thread::spawn(move || {
            let mut reader = BufReader::new(stdout);
            while let Ok(chunk) = reader.fill_buf() {
                if chunk.is_empty() {
                    return;
                }
                // A full disk or a closed terminal must not stop the machine.
                let _ = log.write_all(chunk);
                if show {
                    let _ = std::io::stdout().write_all(chunk);
                    let _ = std::io::stdout().flush();
                }
                let len = chunk.len();
                reader.consume(len);
            }
        }))
    }

    fn is_running(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }

    fn wait_until(&mut self, deadline: Instant) {
        while self.is_running() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Lets the kernel kill the child when the lab dies, however that happens.
pub(crate) fn die_with_this_process(command: &mut Command) {
    // SAFETY: prctl is async-signal-safe and touches no memory of ours.
    unsafe {
        command.pre_exec(
            || match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            },
        );
    }
}

/// The owner's pid follows.
const RUN_DIR_PREFIX: &str = "mortise-lab-";

/// A directory of one run; removed on drop.
pub(crate) struct RunDir(pub(crate) PathBuf);

impl RunDir {
    pub(crate) fn create() -> Result<Self> {
        Self::create_in(&workspace::lab_subdir("runs")?)
    }

    pub(crate) fn create_in(parent: &Path) -> Result<Self> {
        remove_stale(parent);
        let path = parent.join(format!(
            "{RUN_DIR_PREFIX}{}-{:08x}",
            std::process::id(),
            rand::random::<u32>()
        ));
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }
}

/// Removes what labs left that were killed; an initramfs alone has 100 MB.
fn remove_stale(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix(RUN_DIR_PREFIX)?.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
