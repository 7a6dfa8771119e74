//! A child process that does not outlive its test, and waiting with a deadline.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A running process whose output goes to a log file; killed when dropped.
pub(crate) struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts `command`; both outputs are written to `DIR/NAME.log`.
    pub(crate) fn spawn(dir: &Path, name: &str, command: &mut Command) -> Process {
        Self::spawn_with(dir, name, command, Stdio::null())
    }

    /// The same, for one that is [told](Self::tell) something later.
    pub(crate) fn spawn_listening(dir: &Path, name: &str, command: &mut Command) -> Process {
        Self::spawn_with(dir, name, command, Stdio::piped())
    }

    fn spawn_with(dir: &Path, name: &str, command: &mut Command, input: Stdio) -> Process {
        let log = dir.join(format!("{name}.log"));
        let output = File::create(&log).expect("the log can be created");
        let child = command
            .stdin(input)
            .stdout(output.try_clone().expect("a second descriptor"))
            .stderr(output)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
        Process {
            child,
            name: name.to_owned(),
            log,
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes a line to its standard input.
    pub(crate) fn tell(&mut self, line: &str) {
        let input = self.child.stdin.as_mut().expect("it listens");
        writeln!(input, "{line}").expect("it takes its input");
    }

    /// All that it printed until now.
    pub(crate) fn output(&self) -> String {
        let mut bytes = Vec::new();
        let file = File::open(&self.log).and_then(|mut file| file.read_to_end(&mut bytes));
        file.expect("the log can be read");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "{} did not end in {limit:?}:\n{}",
                self.name,
                self.output()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Asks it to stop; it must end with success.
    pub(crate) fn terminate(&mut self, limit: Duration) {
        // SAFETY: sends a signal to a child that was not reaped yet.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        let status = self.wait(limit);
        assert!(
            status.success(),
            "{}: {status}\n{}",
            self.name,
            self.output()
        );
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
    }

    /// Waits until its Unix socket takes connections. Not for sockets that serve one session.
    pub(crate) fn wait_for_socket(&mut self, socket: &Path) {
        self.wait_until("its socket answers", || UnixStream::connect(socket).is_ok());
    }

    /// Waits until a condition holds, while it runs.
    pub(crate) fn wait_until(&mut self, what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !condition() {
            let ended = self.child.try_wait().expect("a child can be waited for");
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "{}: waited until {what}; ended: {ended:?}\n{}",
                self.name,
                self.output()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
