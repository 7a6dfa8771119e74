//! `cargo lab contract`: what others build on. The `.proto` files keep buf's rules and break nothing of the
//! last release, and the client examples in Rust and Python do what they say against a real controller.
//!
//! buf and Python's gRPC come by pip into a virtual environment under `target/lab`.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::progress::step;
use crate::{tool, workspace};

/// Pinned, so that a new rule of theirs fails nobody's change.
const PACKAGES: [&str; 4] = [
    "buf-bin==1.75.0",
    "grpcio",
    "grpcio-tools",
    "googleapis-common-protos",
];
/// The descriptors of the last release.
const RELEASE: &str = "release/v0.1.0.binpb";
/// For a process to end after SIGTERM.
const END_TIMEOUT: Duration = Duration::from_secs(20);
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The command line.
#[derive(Debug, Args)]
pub(crate) struct Contract {
    /// Only look at the .proto files.
    #[arg(long)]
    no_examples: bool,
}

impl Contract {
    /// Exit code 0 only if all of it holds.
    pub(crate) fn run(self) -> Result<i32> {
        let python = Python::obtain()?;
        let api = workspace::root().join("proto/api");
        step("buf lint");
        let mut lint = Command::new(python.program("buf"));
        let lint = passed(lint.arg("lint").current_dir(&api))?;
        step("buf breaking");
        let mut breaking = Command::new(python.program("buf"));
        breaking.args(["breaking", "--against", RELEASE]);
        let breaking = passed(breaking.current_dir(&api))?;
        if !lint || !breaking {
            return Ok(1);
        }
        if !self.no_examples {
            examples(&python, &api)?;
        }
        step("the contract holds");
        Ok(0)
    }
}

fn examples(python: &Python, api: &Path) -> Result<()> {
    step("building the controller and the example in Rust");
    workspace::build_always(&[
        "build",
        "--package",
        "controller",
        "--package",
        "node-agent",
        "--package",
        "device-blk",
        "--package",
        "device-net",
        "--package",
        "vmm-core",
    ])?;
    let built = workspace::build_always(&["build", "--package", "api", "--example", "client"])?;
    let client = built
        .iter()
        .find(|binary| binary.name == "client")
        .context("cargo built no example")?;
    let bin_dir = client
        .file
        .parent()
        .and_then(Path::parent)
        .context("the example is in no directory")?;
    let dir = workspace::lab_subdir(&format!("contract-{}", std::process::id()))?;
    let controller = Controller::start(bin_dir, &dir)?;
    step("the example in Rust");
    let ran = passed(Command::new(&client.file).arg(&controller.address))?;
    ensure!(ran, "the example in Rust failed; see above");
    step("the example in Python");
    let stubs = python.stubs(api)?;
    let mut example = Command::new(python.program("python"));
    example
        .arg(api.join("examples/client.py"))
        .arg(&controller.address)
        .env("PYTHONPATH", stubs);
    let ran = passed(&mut example)?;
    ensure!(ran, "the example in Python failed; see above");
    drop(controller);
    let _ = fs::remove_dir_all(dir);
    Ok(())
}

/// A virtual environment.
struct Python {
    dir: PathBuf,
}

impl Python {
    /// The one that is there, or a new one.
    fn obtain() -> Result<Self> {
        let dir = workspace::lab_subdir("python")?;
        let lock = fs::File::create(dir.join("lock"))?;
        lock.lock().context("cannot lock target/lab/python/lock")?;
        let stamp = dir.join("stamp");
        let wanted = PACKAGES.join("\n");
        let python = Self {
            dir: dir.join("venv"),
        };
        if fs::read_to_string(&stamp).is_ok_and(|there| there == wanted) {
            return Ok(python);
        }
        step("fetching buf and Python's gRPC");
        let _ = fs::remove_dir_all(&python.dir);
        let mut venv = Command::new("python3");
        venv.args(["-m", "venv"]).arg(&python.dir);
        tool::output(&mut venv)
            .context("cannot make a virtual environment; apt-get install python3-venv")?;
        let mut pip = Command::new(python.program("python"));
        pip.args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]);
        tool::output(pip.args(PACKAGES)).context("cannot fetch buf and Python's gRPC by pip")?;
        fs::write(stamp, wanted)?;
        Ok(python)
    }

    fn program(&self, name: &str) -> PathBuf {
        self.dir.join("bin").join(name)
    }

    /// The modules that grpcio-tools makes of the `.proto` files.
    fn stubs(&self, api: &Path) -> Result<PathBuf> {
        let dir = workspace::lab_subdir("python/stubs")?;
        let protos = api.join("proto");
        let mut files = Vec::new();
        proto_files(&protos, &mut files)?;
        let mut protoc = Command::new(self.program("python"));
        protoc.args(["-m", "grpc_tools.protoc", "-I"]).arg(&protos);
        for option in ["--python_out=", "--grpc_python_out="] {
            protoc.arg(format!("{option}{}", dir.display()));
        }
        tool::output(protoc.args(files))?;
        Ok(dir)
    }
}

fn proto_files(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            proto_files(&path, files)?;
        } else if path.extension() == Some(OsStr::new("proto")) {
            files.push(path);
        }
    }
    Ok(())
}

/// Runs a command with its output shown.
fn passed(command: &mut Command) -> Result<bool> {
    let name = command.get_program().to_owned();
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {}", name.display()))?;
    Ok(status.success())
}

/// A standalone controller; it and its agent end with this.
struct Controller {
    child: Child,
    address: String,
    dir: PathBuf,
}

impl Controller {
    fn start(bin_dir: &Path, dir: &Path) -> Result<Self> {
        let mut child = Command::new(bin_dir.join("controller"))
            .args(["--standalone", "--listen", "127.0.0.1:0"])
            .arg("--state-dir")
            .arg(dir.join("state"))
            .arg("--run-dir")
            .arg(dir.join("run"))
            .arg("--bin-dir")
            .arg(bin_dir)
            .env("MORTISE_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the controller")?;
        let mut line = String::new();
        let stdout = child.stdout.take().context("no pipe to the controller")?;
        BufReader::new(stdout).read_line(&mut line)?;
        let started = Self {
            address: line
                .trim()
                .strip_prefix("listening on ")
                .unwrap_or_default()
                .to_owned(),
            child,
            dir: dir.to_owned(),
        };
        if started.address.is_empty() {
            bail!("the controller did not say where it listens: {line:?}");
        }
        Ok(started)
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let agent = fs::read_to_string(self.dir.join("run/node-agent.pid"));
        let agent = agent.ok().and_then(|pid| pid.trim().parse::<i32>().ok());
        for pid in [Some(self.child.id() as i32), agent].into_iter().flatten() {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        }
        let deadline = Instant::now() + END_TIMEOUT;
        while Instant::now() < deadline {
            if let Ok(Some(_)) = self.child.try_wait() {
                return;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
