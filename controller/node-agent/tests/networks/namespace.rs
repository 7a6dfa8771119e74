//! A machine: a network namespace with a view of /sys of its own, as long as its holder lives.

use std::{
    fs::File,
    io,
    net::SocketAddr,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

/// No test waits longer for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// What does not answer within this is taken as unreachable: all ends are on one machine.
const UNREACHABLE_AFTER: Duration = Duration::from_millis(700);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// See the module.
pub(crate) struct Namespace {
    holder: Child,
}

impl Namespace {
    /// A machine with a loopback and nothing else.
    pub(crate) fn new() -> Self {
        let mut command = Command::new("sleep");
        command.arg("600").stdin(Stdio::null());
        // SAFETY: unshare, mount and prctl are async-signal-safe system calls.
        unsafe {
            command.pre_exec(|| {
                nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
                unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
                let none: Option<&str> = None;
                mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
                mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none)?;
                Ok(())
            });
        }
        let holder = command.spawn().expect("these tests need root");
        let namespace = Self { holder };
        namespace.run("ip link set lo up");
        namespace
    }

    pub(crate) fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// A command that runs in here.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let open = |kind: &str| File::open(format!("/proc/{}/ns/{kind}", self.pid())).unwrap();
        let (net, mnt) = (open("net"), open("mnt"));
        let dir = std::env::current_dir().unwrap();
        // SAFETY: setns and chdir are async-signal-safe system calls; what they use was made before.
        unsafe {
            command.pre_exec(move || {
                setns(&net, CloneFlags::CLONE_NEWNET)?;
                setns(&mnt, CloneFlags::CLONE_NEWNS)?;
                nix::unistd::chdir(&dir)?;
                Ok(())
            });
        }
        command
    }

    /// Runs words separated by blanks; whether they succeeded and what they said.
    pub(crate) fn try_run(&self, line: &str) -> Output {
        let mut words = line.split_ascii_whitespace();
        self.command(words.next().unwrap())
            .args(words)
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    /// As [`Namespace::try_run`], and it succeeds.
    pub(crate) fn run(&self, line: &str) -> String {
        let output = self.try_run(line);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs `work` on a thread in this network.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let net = File::open(format!("/proc/{}/ns/net", self.pid())).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(&net, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Joins two machines by a cable, whose ends are named so.
    pub(crate) fn connect(&self, own: &str, other: &Self, others: &str) {
        self.run(&format!(
            "ip link add {own} type veth peer name {others} netns {}",
            other.pid()
        ));
        self.run(&format!("ip link set {own} up"));
        other.run(&format!("ip link set {others} up"));
    }

    /// A server that tells each client its address.
    pub(crate) fn serve(&self, address: &str) -> Server {
        let address: SocketAddr = address.parse().unwrap();
        let listener = self.inside(move || std::net::TcpListener::bind(address).unwrap());
        let ending = listener.try_clone().unwrap();
        let thread = std::thread::spawn(move || {
            while let Ok((mut client, peer)) = listener.accept() {
                let _ = io::Write::write_all(&mut client, peer.ip().to_string().as_bytes());
            }
        });
        Server {
            listener: ending,
            thread: Some(thread),
        }
    }

    /// The address that a [`Server`] sees this machine by; `None` when it is not reached.
    pub(crate) fn ask(&self, server: &str) -> Option<String> {
        let server: SocketAddr = server.parse().unwrap();
        self.inside(move || {
            let mut stream =
                std::net::TcpStream::connect_timeout(&server, UNREACHABLE_AFTER).ok()?;
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut text = String::new();
            io::Read::read_to_string(&mut stream, &mut text).ok()?;
            Some(text)
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// See [`Namespace::serve`].
pub(crate) struct Server {
    listener: std::net::TcpListener,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = nix::sys::socket::shutdown(
            std::os::fd::AsRawFd::as_raw_fd(&self.listener),
            nix::sys::socket::Shutdown::Both,
        );
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Asks again until there is an answer.
pub(crate) fn poll<T>(what: &str, mut question: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = question() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// A static busybox, which the lab names.
pub(crate) fn busybox() -> PathBuf {
    std::env::var_os("BUSYBOX")
        .expect("BUSYBOX names no busybox; run by cargo lab test, or see cargo lab env")
        .into()
}
