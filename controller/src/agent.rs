//! The node agent of a standalone controller: started beside it, in a session of its own, so that
//! it and its VMs outlive the controller. The next controller finds it by its socket and adopts it.
//! One that died is started again after a growing pause.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ::api::listen::{self, Address};
use thiserror::Error;

/// How often it is looked for.
const WATCH_INTERVAL: Duration = Duration::from_millis(500);
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
const MAX_BACKOFF: Duration = Duration::from_secs(15);
/// One that ran this long may be started again at once.
const STABLE_AFTER: Duration = Duration::from_secs(30);
/// How long a start may take until the socket answers.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// Where the agent is and what it is started with.
#[derive(Debug, Clone)]
pub struct Agent {
    program: PathBuf,
    socket: PathBuf,
    state_dir: PathBuf,
    run_dir: PathBuf,
    bin_dir: PathBuf,
    metrics_listen: Option<Address>,
    allow_faults: bool,
    log: PathBuf,
    pid_file: PathBuf,
}

impl Agent {
    /// The agent for these directories; `bin_dir` holds the programs.
    ///
    /// # Errors
    /// When the program is not there.
    pub fn new(state_dir: &Path, run_dir: &Path, bin_dir: &Path) -> Result<Self, AgentError> {
        let program = bin_dir.join("node-agent");
        if !program.is_file() {
            return Err(AgentError::NoProgram { program });
        }
        Ok(Self {
            program,
            socket: run_dir.join("node-agent.sock"),
            state_dir: state_dir.join("node"),
            run_dir: run_dir.to_owned(),
            bin_dir: bin_dir.to_owned(),
            metrics_listen: None,
            allow_faults: false,
            log: state_dir.join("node-agent.log"),
            pid_file: run_dir.join("node-agent.pid"),
        })
    }

    /// Has one that is started serve its metrics there. One that is adopted keeps what it had.
    #[must_use]
    pub fn with_metrics(mut self, address: Option<Address>) -> Self {
        self.metrics_listen = address;
        self
    }

    /// Lets one that is started do faults. One that is adopted keeps what it had.
    #[must_use]
    pub fn with_faults(mut self, allowed: bool) -> Self {
        self.allow_faults = allowed;
        self
    }

    /// Where it listens.
    pub fn address(&self) -> Address {
        Address::Unix(self.socket.clone())
    }

    /// Keeps one running, for ever. Cancelling leaves it running.
    pub async fn supervise(self) {
        let mut backoff = FIRST_BACKOFF;
        if listen::answers(&self.socket) {
            tracing::info!(socket = %self.socket.display(), "adopted the running node agent");
        }
        loop {
            if listen::answers(&self.socket) || self.is_there() {
                tokio::time::sleep(WATCH_INTERVAL).await;
                continue;
            }
            let begun = Instant::now();
            match self.start() {
                Ok(child) => self.watch(child).await,
                Err(error) => tracing::error!(
                    error = %crate::reconciler::with_source(&error),
                    "cannot start the node agent"
                ),
            }
            if begun.elapsed() > STABLE_AFTER {
                backoff = FIRST_BACKOFF;
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
    }

    /// One that was started here is being exchanged for another binary, or is about to end: its process is
    /// there, and does not listen.
    fn is_there(&self) -> bool {
        let Ok(pid) = std::fs::read_to_string(&self.pid_file) else {
            return false;
        };
        // That of a process that has ended is empty.
        let line = std::fs::read(format!("/proc/{}/cmdline", pid.trim())).unwrap_or_default();
        let address = self.address().to_string();
        line.split(|byte| *byte == 0)
            .any(|word| word == address.as_bytes())
    }

    fn start(&self) -> Result<tokio::process::Child, AgentError> {
        let failed = |source| AgentError::Start {
            program: self.program.clone(),
            source,
        };
        let log = open_log(&self.log).map_err(failed)?;
        let mut command = Command::new(&self.program);
        command
            .arg("--listen")
            .arg(self.address().to_string())
            .arg("--state-dir")
            .arg(&self.state_dir)
            .arg("--run-dir")
            .arg(&self.run_dir)
            .arg("--bin-dir")
            .arg(&self.bin_dir)
            .args(self.metrics_args())
            .args(self.allow_faults.then_some("--allow-faults"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(failed)?)
            .stderr(log);
        // SAFETY: setsid is async-signal-safe and touches no memory of this process.
        unsafe {
            command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from));
        }
        let child = tokio::process::Command::from(command)
            .spawn()
            .map_err(failed)?;
        if let Some(pid) = child.id() {
            tracing::info!(pid, log = %self.log.display(), "started the node agent");
            let _ = std::fs::write(&self.pid_file, format!("{pid}\n"));
        }
        Ok(child)
    }

    fn metrics_args(&self) -> Vec<String> {
        let address = self.metrics_listen.iter();
        address
            .flat_map(|address| ["--metrics-listen".to_owned(), address.to_string()])
            .collect()
    }

    /// Until it ends.
    async fn watch(&self, mut child: tokio::process::Child) {
        let answers = async {
            let deadline = Instant::now() + START_TIMEOUT;
            while !listen::answers(&self.socket) {
                if Instant::now() > deadline {
                    tracing::warn!(
                        log = %self.log.display(),
                        "the node agent was started and does not answer; see its log"
                    );
                    break;
                }
                tokio::time::sleep(WATCH_INTERVAL / 10).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            status = child.wait() => match status {
                Ok(status) => tracing::error!(
                    %status,
                    log = %self.log.display(),
                    said = last_line(&self.log),
                    "the node agent ended; it is started again"
                ),
                Err(error) => tracing::error!(%error, "cannot watch the node agent"),
            },
            () = answers => {}
        }
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// What a log ends with; its end is where the reason is.
fn last_line(log: &Path) -> String {
    const TAIL_BYTES: u64 = 4096;
    let tail = || -> io::Result<String> {
        let mut file = File::open(log)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = tail().unwrap_or_default();
    text.lines().next_back().unwrap_or_default().to_owned()
}

/// Why there is no agent.
#[derive(Debug, Error)]
pub enum AgentError {
    /// Not installed beside the controller.
    #[error(
        "{program} is not there; install node-agent beside controller or name its directory with --bin-dir",
        program = program.display()
    )]
    NoProgram {
        /// Where it should be.
        program: PathBuf,
    },
    /// It could not be executed.
    #[error("cannot start {program}", program = program.display())]
    Start {
        /// Which program.
        program: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}
