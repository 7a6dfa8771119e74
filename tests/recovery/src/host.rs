//! What a host's agent does for one disk: it holds the listening socket, opens the image for each
//! incarnation of the daemon, keeps a warm spare, and passes descriptors on.
//!
//! The agent of the product is asynchronous and does much more; this one takes the same steps in
//! the same order, and can be made to skip the fence: see [`Fencing`].

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use api::device::attach_request::{Device as DeviceConfig, Listener};
use api::device::device_daemon_client::DeviceDaemonClient;
use api::device::{AttachRequest, BlkConfig, DetachRequest, FdRef, NetConfig};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tonic::transport::Channel;

/// For everything that takes milliseconds on an idle machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Whether a process waits for the daemon's death, ready but for its devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// A warm spare does.
    Spare,
    /// The next one is started then.
    Cold,
}

/// Whether the next incarnation waits until the requests of the last one are over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fencing {
    /// Each gets an open file description of its own, whose lock tells.
    On,
    /// All get the same one, so that the lock is theirs already.
    Off,
}

/// One disk.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Where its bytes are.
    pub image: PathBuf,
    /// Rings.
    pub queues: u16,
    /// Everything else; image and queues are filled in.
    pub config: BlkConfig,
}

impl Disk {
    /// A raw image.
    pub fn raw(image: &Path, queues: u16) -> Self {
        Self {
            image: image.to_owned(),
            queues,
            config: BlkConfig::default(),
        }
    }
}

/// See the module's description.
#[derive(Debug)]
pub struct Host {
    program: PathBuf,
    disks: Vec<Served>,
    readiness: Readiness,
    fencing: Fencing,
    spare: Option<Daemon>,
    runtime: Runtime,
    started: u32,
    dir: TempDir,
}

#[derive(Debug)]
struct Served {
    disk: Disk,
    listener: UnixListener,
    socket: PathBuf,
    /// What all incarnations share when there is no fence.
    shared: File,
}

impl Host {
    /// For disks that one process of `program` (device-blk) serves; for none, of any daemon.
    ///
    /// # Errors
    /// Sockets cannot be bound, or images opened.
    pub fn new(
        program: &Path,
        disks: &[Disk],
        readiness: Readiness,
        fencing: Fencing,
    ) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let serve = |(index, disk): (usize, &Disk)| {
            let socket = dir.path().join(format!("disk-{index}.vu"));
            anyhow::Ok(Served {
                listener: UnixListener::bind(&socket)?,
                socket,
                shared: open(disk)?,
                disk: disk.clone(),
            })
        };
        let disks = disks.iter().enumerate().map(serve);
        Ok(Self {
            program: program.to_owned(),
            disks: disks.collect::<Result<_>>()?,
            readiness,
            fencing,
            spare: None,
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?,
            started: 0,
            dir,
        })
    }

    /// Where the disk's frontend connects.
    pub fn socket(&self, disk: usize) -> &Path {
        &self.disks[disk].socket
    }

    /// Lets a process serve the disks; the spare if there is one.
    ///
    /// # Errors
    /// It does not start, or refuses.
    pub fn serve(&mut self) -> Result<Daemon> {
        let mut daemon = self.process()?;
        for index in 0..self.disks.len() {
            self.attach(&mut daemon, index)?;
        }
        Ok(daemon)
    }

    /// A process without disks; the spare if there is one.
    ///
    /// # Errors
    /// It does not start.
    pub fn process(&mut self) -> Result<Daemon> {
        match self.spare.take() {
            Some(spare) => Ok(spare),
            None => self.start(),
        }
    }

    /// Lets a process serve a NIC.
    ///
    /// # Errors
    /// It refuses.
    pub fn attach_nic(
        &self,
        daemon: &mut Daemon,
        listener: &UnixListener,
        tap: &File,
        tap_name: &str,
    ) -> Result<()> {
        let reference = |what: &str| FdRef {
            token: what.to_owned(),
        };
        for (what, fd) in [("tap", tap.as_fd()), ("socket", listener.as_fd())] {
            api::fds::send(&daemon.fds, what, &[fd], PATIENCE)?;
        }
        let mac = crate::nic::MAC.map(|byte| format!("{byte:02x}")).join(":");
        self.ask(
            daemon,
            AttachRequest {
                id: "nic".to_owned(),
                listener: Some(Listener::SocketFd(reference("socket"))),
                device: Some(DeviceConfig::Net(NetConfig {
                    tap_fds: vec![reference("tap")],
                    tap_name: tap_name.to_owned(),
                    mac,
                    ..NetConfig::default()
                })),
            },
        )
    }

    /// Has a spare ready, where one is wanted.
    ///
    /// # Errors
    /// It does not start.
    pub fn prepare(&mut self) -> Result<()> {
        if self.readiness == Readiness::Spare && self.spare.is_none() {
            self.spare = Some(self.start()?);
        }
        Ok(())
    }

    /// Lets `next` serve the disks that `serving` serves, when what is in flight has completed.
    /// `serving` stays, without disks.
    ///
    /// # Errors
    /// Requests do not complete, or `next` refuses.
    pub fn hand_over(&self, serving: &mut Daemon, next: &mut Daemon) -> Result<()> {
        for index in 0..self.disks.len() {
            self.detach(serving, index, Duration::ZERO)?;
            self.attach(next, index)?;
        }
        Ok(())
    }

    /// Lets `serving` serve a disk no longer, when what is in flight has completed; it has `drain` for
    /// that, or what it usually has if that is nothing.
    ///
    /// # Errors
    /// Requests do not complete.
    pub fn detach(&self, serving: &mut Daemon, index: usize, drain: Duration) -> Result<()> {
        let client = serving.client.as_mut().context("it is connected to")?;
        let detached = self.runtime.block_on(client.detach(DetachRequest {
            id: disk_id(index),
            drain_ms: drain.as_millis() as u32,
        }));
        match detached {
            Ok(_) => Ok(()),
            Err(status) => bail!("detach: {}; {}", status.message(), serving.log()),
        }
    }

    /// Starts a process without disks and connects to it.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(&mut self) -> Result<Daemon> {
        self.started += 1;
        let path = |name: &str| self.dir.path().join(format!("{}.{name}", self.started));
        let (control, fds, log) = (path("ctl"), path("fds"), path("log"));
        let mut command = Command::new(&self.program);
        command
            .arg("--control-socket")
            .arg(&control)
            .arg("--fd-socket")
            .arg(&fds)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?);
        let child = command
            .spawn()
            .with_context(|| format!("cannot run {}", self.program.display()))?;
        let mut daemon = Daemon::of(child, fds, log)?;
        let give_up = Instant::now() + PATIENCE;
        // Its own retries are for people's patience.
        while std::os::unix::net::UnixStream::connect(&control).is_err() {
            daemon.expect_running()?;
            ensure!(Instant::now() < give_up, "the daemon does not listen");
            std::thread::sleep(Duration::from_micros(500));
        }
        let channel = self
            .runtime
            .block_on(api::connect::unix(&control, PATIENCE))?;
        let mut client = DeviceDaemonClient::new(channel);
        // The first call on a channel takes longest.
        let hello = client.get_daemon(api::device::GetDaemonRequest {});
        self.runtime.block_on(hello)?;
        daemon.client = Some(client);
        Ok(daemon)
    }

    fn attach(&self, daemon: &mut Daemon, index: usize) -> Result<()> {
        let served = &self.disks[index];
        let image = match self.fencing {
            Fencing::On => open(&served.disk)?,
            Fencing::Off => served.shared.try_clone()?,
        };
        let token = |what: &str| format!("{what}-{index}");
        for (what, fd) in [
            ("image", image.as_fd()),
            ("socket", served.listener.as_fd()),
        ] {
            api::fds::send(&daemon.fds, &token(what), &[fd], PATIENCE)?;
        }
        drop(image);
        let reference = |what| FdRef { token: token(what) };
        let request = AttachRequest {
            id: disk_id(index),
            listener: Some(Listener::SocketFd(reference("socket"))),
            device: Some(DeviceConfig::Blk(BlkConfig {
                image_fd: Some(reference("image")),
                image_name: served.disk.image.display().to_string(),
                num_queues: u32::from(served.disk.queues),
                ..served.disk.config.clone()
            })),
        };
        self.ask(daemon, request)
    }

    fn ask(&self, daemon: &mut Daemon, request: AttachRequest) -> Result<()> {
        let client = daemon.client.as_mut().context("it is connected to")?;
        let attached = self.runtime.block_on(client.attach(request));
        if let Err(status) = attached {
            bail!("attach: {}; {}", status.message(), daemon.last_words());
        }
        Ok(())
    }
}

fn disk_id(index: usize) -> String {
    format!("disk-{index}")
}

fn open(disk: &Disk) -> Result<File> {
    File::options()
        .read(true)
        .write(!disk.config.read_only)
        .open(&disk.image)
        .with_context(|| format!("cannot open {}", disk.image.display()))
}

/// A daemon's process; killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    pidfd: OwnedFd,
    fds: PathBuf,
    log: PathBuf,
    client: Option<DeviceDaemonClient<Channel>>,
}

impl Daemon {
    fn of(child: Child, fds: PathBuf, log: PathBuf) -> Result<Self> {
        let pid = child.id() as libc::pid_t;
        // SAFETY: pidfd_open takes integers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        ensure!(fd >= 0, "pidfd_open: {}", std::io::Error::last_os_error());
        // SAFETY: just returned by the kernel and owned by nobody else.
        let pidfd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Ok(Self {
            child,
            pidfd,
            fds,
            log,
            client: None,
        })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(nix::sys::signal::kill(
            Pid::from_raw(self.child.id() as i32),
            signal,
        )?)
    }

    /// Waits until the process has ended.
    ///
    /// # Errors
    /// It has not in time.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        let mut polls = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(PATIENCE)?;
        ensure!(
            poll(&mut polls, timeout)? == 1,
            "process {} does not end",
            self.child.id()
        );
        Ok(self.child.wait()?)
    }

    /// The whole log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn expect_running(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the daemon ended with {status}: {}", self.last_words()),
        }
    }

    fn last_words(&self) -> String {
        let log = self.log();
        log.lines().last().unwrap_or("it said nothing").to_owned()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
