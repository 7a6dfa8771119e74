//! `node-agent`: one per host. Owns listening vhost-user sockets, images and taps, runs each VM as
//! a set of processes, restarts daemons that die, reports, and cleans up.
//!
//! [`service`] translates gRPC; [`agent`] knows all VMs; one task in [`vm`] owns each. What must
//! survive the agent is in [`record`].

mod agent;
mod autostart;
mod certificate;
mod cli;
mod cloud_init;
mod console;
mod epoch;
mod faults;
mod host;
mod image;
mod import;
mod inventory;
mod jobs;
mod leases;
mod metrics;
mod network;
mod process;
mod promised;
mod record;
mod service;
mod spec;
mod successor;
mod tap;
mod usage;
mod versions;
mod vm;
mod volumes;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use api::{
    listen::Listener,
    metrics::serve_http,
    node::{
        agents_server::AgentsServer, devices_server::DevicesServer, faults_server::FaultsServer,
        leases_server::LeasesServer, nics_server::NicsServer, node_agent_server::NodeAgentServer,
    },
    serve,
};
use clap::Parser;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;

use crate::{
    agent::{Agent, Dirs},
    cli::{Cli, JoinArgs},
    epoch::Epochs,
    faults::Partitioned,
    service::{AgentsService, Service},
    successor::Successor,
};

/// What still blocks a thread when the agent ends: storage that does not answer, for instance. VMs
/// and the next agent do not wait for it.
const END_WITHIN: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    if let Some(failed) = import::confine::enter_if_asked() {
        return failed;
    }
    // These have none of the agent's own options, which are required.
    let word = std::env::args_os().nth(1).unwrap_or_default();
    let done = match word.to_str() {
        Some("join") => {
            let args = JoinArgs::parse_from(std::env::args_os().skip(1));
            to_end(certificate::join(&args))
        }
        Some(successor::PROBE) => successor::probe::run(std::env::args_os().skip(2)),
        Some(successor::GUARD) => return successor::guard::run(std::env::args_os().skip(2)),
        _ => serve_host(Cli::parse()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("node-agent: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Until the agent ends, or another binary takes its place.
fn serve_host(cli: Cli) -> anyhow::Result<()> {
    let dirs = directories(&cli)?;
    let state_dir = dirs.state.clone();
    let left = to_end(run(cli, dirs))?;
    match left {
        Left::Ended => Ok(()),
        Left::Replaced => make_room(&state_dir),
    }
}

/// Returns only if the next program cannot be executed.
fn make_room(state_dir: &Path) -> anyhow::Result<()> {
    let error = successor::make_room(state_dir);
    Err(error).context("executing the guard of the new agent")
}

/// Why an agent serves no more.
enum Left {
    /// Somebody told it to end.
    Ended,
    /// Another binary is to take its place.
    Replaced,
}

/// Dropping a runtime waits for whatever blocks one of its threads, however long; this does not.
fn to_end<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = Runtime::new().context("starting threads")?;
    let ended = runtime.block_on(work);
    runtime.shutdown_timeout(END_WITHIN);
    ended
}

async fn run(cli: Cli, dirs: Dirs) -> anyhow::Result<Left> {
    let telemetry = telemetry::init("node-agent", cli.otlp.as_deref())?;
    api::limits::raise_open_files();
    // Bound first: an agent that cannot serve must not touch VMs.
    let listener = Listener::bind(&cli.listen)?;
    let address = listener.address();
    let metrics_listener = cli
        .metrics_listen
        .as_ref()
        .map(Listener::bind)
        .transpose()?;
    let tls = certificate::serve(&cli, &dirs.state)?;
    let agent = Arc::new(Agent::open(&dirs, cli.underlay_address)?);
    let successor = Successor::open(&dirs.state, &dirs.bin, cli.trial_fd);
    if let Some(listener) = metrics_listener {
        let (agent, runtime) = (agent.clone(), Handle::current());
        let render =
            move || tokio::task::block_in_place(|| runtime.block_on(metrics::collect(&agent)));
        tokio::spawn(serve_http(listener, render));
    }
    tracing::info!(%address, state = %dirs.state.display(), run = %dirs.run.display(), "serving");
    tokio::spawn(faults::run(agent.clone()));
    tokio::spawn(agent.env.leases.clone().run(agent.clone()));
    let knobs = agent.env.knobs.clone();
    let epochs = Epochs::open(&dirs.state).context("reading whose commands to obey")?;
    let agents = AgentsService::new(agent.clone(), successor.clone());
    let service = Service::new(agent);
    let services = serve::Services::new()
        .with(telemetry::serve(
            epochs.guard(Partitioned::new(AgentsServer::new(agents), &knobs)),
        ))
        .with(telemetry::serve(epochs.guard(Partitioned::new(
            DevicesServer::new(service.clone()),
            &knobs,
        ))))
        .with(telemetry::serve(epochs.guard(Partitioned::new(
            FaultsServer::new(service.clone()),
            &knobs,
        ))))
        .with(telemetry::serve(epochs.guard(Partitioned::new(
            LeasesServer::new(service.clone()),
            &knobs,
        ))))
        .with(telemetry::serve(epochs.guard(Partitioned::new(
            NicsServer::new(service.clone()),
            &knobs,
        ))))
        .with(telemetry::serve(epochs.guard(Partitioned::new(
            NodeAgentServer::new(service),
            &knobs,
        ))));
    let told_to_end = told_to_end();
    let leaving = async {
        let mut told_to_end = told_to_end.clone();
        tokio::select! {
            _ = told_to_end.wait_for(|told| *told) => {}
            () = successor.leaving() => {}
        }
    };
    serve::on_all(vec![listener], tls, services, leaving).await?;
    // Whoever stops the service while the agent is exchanged wants no other agent.
    let left = match successor.is_leaving() && !*told_to_end.borrow() {
        true => Left::Replaced,
        false => Left::Ended,
    };
    match left {
        Left::Ended => tracing::info!("ending; VMs go on running"),
        Left::Replaced => tracing::info!("making room for another agent; VMs go on running"),
    }
    tokio::task::block_in_place(|| telemetry.shutdown());
    Ok(left)
}

/// True as soon as somebody tells this process to end, however late that is.
fn told_to_end() -> watch::Receiver<bool> {
    let (sender, told) = watch::channel(false);
    let terminated = serve::terminated();
    tokio::spawn(async move {
        terminated.await;
        sender.send_replace(true);
    });
    told
}

/// Absolute: records and other processes' command lines name files in them.
fn directories(cli: &Cli) -> anyhow::Result<Dirs> {
    let absolute = |path: &PathBuf| {
        std::path::absolute(path).with_context(|| format!("finding {}", path.display()))
    };
    let bin = match &cli.bin_dir {
        Some(dir) => absolute(dir)?,
        None => std::env::current_exe()
            .context("finding this program's directory; name it with --bin-dir")?
            .parent()
            .map(PathBuf::from)
            .context("this program is in no directory; name one with --bin-dir")?,
    };
    Ok(Dirs {
        state: absolute(&cli.state_dir)?,
        run: absolute(&cli.run_dir)?,
        passt: cli.passt.as_ref().map(absolute).transpose()?,
        warm_spares: cli.warm_spares,
        zone: cli.zone.clone().unwrap_or_default(),
        labels: cli.labels.iter().cloned().collect(),
        hang_after: Duration::from_secs(cli.hang_after),
        allowed: cli.allowed_faults(),
        qemu_img: match &cli.qemu_img {
            Some(program) => Some(absolute(program)?),
            None => import::find_qemu_img(&bin),
        },
        bin,
    })
}
