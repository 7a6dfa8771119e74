//! The real controller as a process, and what it takes.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::transport::Channel;

/// For anything that is waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// How a controller is started, again and again with the same state.
pub(crate) struct Setup {
    pub(crate) program: PathBuf,
    pub(crate) dir: PathBuf,
    /// Where etcd is; nowhere: the embedded store.
    pub(crate) etcd: Vec<String>,
    pub(crate) hosts: Vec<String>,
}

/// A running controller, killed when dropped.
pub(crate) struct Controller {
    child: Child,
    address: String,
}

impl Setup {
    /// Starts one and waits until it serves.
    pub(crate) fn start(&self) -> Result<Controller> {
        let mut command = Command::new(&self.program);
        command
            .args(["--listen", "127.0.0.1:0"])
            .arg("--state-dir")
            .arg(self.dir.join("state"))
            .arg("--run-dir")
            .arg(self.dir.join("run"));
        if !self.etcd.is_empty() {
            command.args(["--etcd", &self.etcd.join(",")]);
        }
        for host in &self.hosts {
            command.args(["--node", host]);
        }
        let log = std::fs::File::create(self.dir.join("controller.log"))?;
        let mut child = command
            .env("MORTISE_LOG", "error")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        let stdout = child.stdout.take().context("no pipe to the controller")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let address = line.trim().strip_prefix("listening on ").map(str::to_owned);
        let controller = Controller {
            child,
            address: address.unwrap_or_default(),
        };
        ensure!(
            !controller.address.is_empty(),
            "the controller did not say where it listens; see {}",
            self.dir.join("controller.log").display()
        );
        Ok(controller)
    }
}

impl Controller {
    /// A connection of its own.
    pub(crate) async fn connect(&self) -> Result<Channel> {
        Ok(api::connect::tcp(&self.address, PATIENCE).await?)
    }

    /// Ends it as a person would, and waits.
    pub(crate) fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM)?;
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "the controller does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Memory that is its own and no file's: heap and stacks.
    pub(crate) fn anonymous_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(proc_file(self.child.id(), "status"))?;
        let line = status.lines().find(|line| line.starts_with("RssAnon:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        let kib: u64 = kib.context("no RssAnon")?.parse()?;
        Ok(kib << 10)
    }

    /// CPU time that it has used.
    pub(crate) fn cpu_seconds(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(proc_file(self.child.id(), "stat"))?;
        let (_, rest) = stat.rsplit_once(')').context("no name in stat")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let ticks = |index: usize| {
            fields
                .get(index)
                .and_then(|field| field.parse::<f64>().ok())
        };
        let ticks = ticks(11).context("no utime")? + ticks(12).context("no stime")?;
        // USER_HZ is 100 on every Linux there is.
        Ok(ticks / 100.0)
    }
}

fn proc_file(pid: u32, name: &str) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join(name)
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
