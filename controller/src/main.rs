//! The controller's program: see the library.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use api::listen::{Address, Listener};
use api::serve;
use clap::Parser as _;

use controller::agent::Agent;
use controller::api::Api;
use controller::faults::Experiments;
use controller::hosts::Hosts;
use controller::leases::Leases;
use controller::metrics;
use controller::options::{self, Options, StateDir};
use controller::reconciler::{self, Reconciler};
use controller::store::SharedStore;
use controller::store::embedded::EmbeddedStore;

fn main() -> ExitCode {
    let options = Options::parse();
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("controller: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(options: Options) -> anyhow::Result<()> {
    let telemetry = telemetry::init("controller", options.access.otlp.as_deref())?;
    let state_dir = StateDir::lock(&options.state_dir)?;
    let agent = if options.standalone {
        options::create_dir(&options.run_dir)?;
        let bin_dir = options
            .bin_dir()
            .context("cannot find this program's directory")?;
        let agent = Agent::new(&options.state_dir, &options.run_dir, &bin_dir)?;
        let agent = agent.with_metrics(options.agent_metrics_listen.clone());
        Some(agent.with_faults(options.allow_faults))
    } else {
        None
    };
    let store_file = state_dir.store_file();
    let store: SharedStore = Arc::new(EmbeddedStore::open(&store_file).with_context(|| {
        format!(
            "cannot open {}; move it away to begin anew",
            store_file.display()
        )
    })?);
    let listener = Listener::bind(&options.listen)?;
    let metrics_listener = options
        .metrics_listen
        .as_ref()
        .map(Listener::bind)
        .transpose()?;
    let gate = options.access.gate(&store, false).await?;
    if !options.listen.is_local() && !gate.authenticates() {
        tracing::warn!(
            "the API is open to everybody who reaches {}; have callers say who they are: --tokens or --oidc-issuer",
            options.listen
        );
    }

    let hosts = Hosts::new();
    let mut named = options.nodes.clone();
    if let Some(agent) = agent {
        named.push(agent.address());
        tokio::spawn(agent.supervise());
    }
    for address in named {
        tokio::spawn(hosts.clone().register(store.clone(), address));
    }
    tokio::spawn(hosts.clone().run(store.clone()));
    let leases = Leases::new(options.lease_terms());
    tokio::spawn(
        leases
            .clone()
            .run(store.clone(), hosts.clone(), Arc::new(hosts.clone())),
    );
    tokio::spawn(
        Reconciler::new(store.clone(), hosts.clone())
            .with_leases(leases)
            .run(),
    );
    let experiments = Experiments::new(store.clone(), hosts.clone(), options.allow_faults);
    experiments
        .recover()
        .await
        .context("cannot end fault experiments of an earlier run")?;
    if let Some(listener) = metrics_listener {
        serve_metrics(listener, store.clone(), hosts.clone());
    }
    let terminated = serve::terminated();
    announce(&listener.address());
    serve::on(
        listener,
        Api::new(store, hosts, experiments).services(&gate),
        terminated,
    )
    .await?;
    tracing::info!("stopped; VMs and the node agent run on");
    tokio::task::block_in_place(|| telemetry.shutdown());
    Ok(())
}

/// The address on stdout, for whoever started this with port 0.
fn announce(address: &Address) {
    let mut stdout = std::io::stdout();
    let _ = writeln!(stdout, "listening on {address}").and_then(|()| stdout.flush());
    tracing::info!(%address, "serving");
}

fn serve_metrics(listener: Listener, store: SharedStore, hosts: Hosts) {
    let runtime = tokio::runtime::Handle::current();
    let render = move || {
        let fleet = hosts.fleet();
        let desired = tokio::task::block_in_place(|| runtime.block_on(reconciler::load(&store)));
        desired
            .map(|desired| metrics::render(&desired, &fleet))
            .unwrap_or_default()
    };
    tokio::spawn(async move {
        if let Err(error) = api::metrics::serve_http(listener, render).await {
            tracing::error!(%error, "metrics are no longer served");
        }
    });
}
