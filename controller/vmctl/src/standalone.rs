//! Starting a controller for somebody who has none: detached, logging to a file, found beside this
//! program.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::client::Channel;
use anyhow::{Context as _, anyhow, bail};
use api::controller as pb;
use api::controller::hosts_client::HostsClient;

use crate::cli::{Global, RunArgs};
use crate::client;

/// For a controller that may not be there.
const PROBE_TIMEOUT: Duration = Duration::from_millis(300);
/// For one that was just started; under emulation a process takes seconds to start.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Connects to the controller, starting one on this machine if none answers.
///
/// # Errors
/// When it is missing or does not come up, with the end of its log.
pub(crate) async fn connect_or_start(global: &Global, args: &RunArgs) -> anyhow::Result<Channel> {
    if let Ok(channel) = client::try_connect(global, PROBE_TIMEOUT).await {
        return Ok(channel);
    }
    if !global.endpoint.is_local() {
        return client::connect(global).await;
    }
    let log = log_path(args)?;
    let mut child = start(global, args, &log)?;
    if !global.quiet {
        eprintln!(
            "started a controller at {}; its log is {}",
            global.endpoint,
            log.display()
        );
    }
    let deadline = Instant::now() + START_TIMEOUT;
    let channel = loop {
        if let Some(status) = child.try_wait().context("cannot watch the controller")? {
            bail!("the controller ended ({status}):\n{}", last_line(&log));
        }
        match client::try_connect(global, PROBE_TIMEOUT).await {
            Ok(channel) => break channel,
            Err(error) if Instant::now() > deadline => {
                return Err(anyhow!(
                    "{error} in time; the controller's log is {}",
                    log.display()
                ));
            }
            Err(_) => {}
        }
    };
    wait_for_host(&channel, deadline, &log).await?;
    Ok(channel)
}

fn log_path(args: &RunArgs) -> anyhow::Result<PathBuf> {
    let state_dir = args
        .state_dir
        .clone()
        .unwrap_or_else(api::dirs::default_state_dir);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&state_dir)
        .with_context(|| {
            format!(
                "cannot create {}; choose another directory with --state-dir",
                state_dir.display()
            )
        })?;
    Ok(state_dir.join("controller.log"))
}

fn start(global: &Global, args: &RunArgs, log: &Path) -> anyhow::Result<Child> {
    let exe = std::env::current_exe().context("cannot find this program's directory")?;
    let program = exe.parent().unwrap_or(Path::new("/")).join("controller");
    if !program.is_file() {
        bail!(
            "nothing answers at {}, and {} is not there to be started; install it beside vmctl",
            global.endpoint,
            program.display()
        );
    }
    let failed = || format!("cannot start {}", program.display());
    let output = OpenOptions::new().create(true).append(true).open(log);
    let output = output.with_context(|| format!("cannot write {}", log.display()))?;
    let mut command = Command::new(&program);
    command
        .arg("--standalone")
        .arg("--listen")
        .arg(global.endpoint.to_string());
    if let Some(dir) = &args.state_dir {
        command.arg("--state-dir").arg(dir);
    }
    if let Some(dir) = &args.run_dir {
        command.arg("--run-dir").arg(dir);
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(output);
    // Ctrl-C and a closed terminal are not for it.
    // SAFETY: setsid is async-signal-safe and touches no memory of this process.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from));
    }
    command.spawn().with_context(failed)
}

/// VMs can only be placed once the host's agent has answered.
async fn wait_for_host(channel: &Channel, deadline: Instant, log: &Path) -> anyhow::Result<()> {
    let mut client = HostsClient::new(channel.clone());
    loop {
        let answer = client.list_hosts(pb::ListHostsRequest::default()).await;
        let hosts = answer.map_err(client::failed)?.into_inner().hosts;
        if hosts.iter().any(|host| host.connected) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let agent = log.with_file_name("node-agent.log");
            bail!("the node agent did not start:\n{}", last_line(&agent));
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

/// What a program that ended said last.
fn last_line(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let line = text.lines().rev().find(|line| !line.trim().is_empty());
    line.map_or_else(|| format!("see {}", log.display()), str::to_owned)
}
