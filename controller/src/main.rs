//! The controller's program: see the library.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use api::listen::{Address, Listener};
use api::serve;
use clap::Parser as _;

use controller::agent::Agent;
use controller::api::Api;
use controller::faults::Experiments;
use controller::metrics;
use controller::node::Node;
use controller::options::{self, Options, StateDir};
use controller::reconciler::{self, Reconciler};
use controller::store::SharedStore;
use controller::store::embedded::EmbeddedStore;

fn main() -> ExitCode {
    let options = Options::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("MORTISE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
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
    if !options.listen.is_local() {
        tracing::warn!(
            "the API is open to everybody who reaches {}: there is no authentication yet",
            options.listen
        );
    }

    let node_address = match (&agent, &options.node) {
        (Some(agent), _) => agent.address(),
        (None, Some(node)) => node.clone(),
        (None, None) => anyhow::bail!("give --standalone or --node"),
    };
    let node = Node::new(node_address);
    if let Some(agent) = agent {
        tokio::spawn(agent.supervise());
    }
    tokio::spawn(node.clone().run());
    tokio::spawn(Reconciler::new(store.clone(), node.clone()).run());
    let experiments = Experiments::new(store.clone(), node.clone(), options.allow_faults);
    experiments
        .recover()
        .await
        .context("cannot end fault experiments of an earlier run")?;
    if let Some(listener) = metrics_listener {
        serve_metrics(listener, store.clone(), node.clone());
    }
    let terminated = serve::terminated();
    announce(&listener.address());
    serve::on(
        listener,
        Api::new(store, node, experiments).services(),
        terminated,
    )
    .await?;
    tracing::info!("stopped; VMs and the node agent run on");
    Ok(())
}

/// The address on stdout, for whoever started this with port 0.
fn announce(address: &Address) {
    let mut stdout = std::io::stdout();
    let _ = writeln!(stdout, "listening on {address}").and_then(|()| stdout.flush());
    tracing::info!(%address, "serving");
}

fn serve_metrics(listener: Listener, store: SharedStore, node: Node) {
    let runtime = tokio::runtime::Handle::current();
    let render = move || {
        let observed = node.observed().borrow().clone();
        let desired = tokio::task::block_in_place(|| runtime.block_on(reconciler::load(&store)));
        desired
            .map(|desired| metrics::render(&desired, &observed))
            .unwrap_or_default()
    };
    tokio::spawn(async move {
        if let Err(error) = api::metrics::serve_http(listener, render).await {
            tracing::error!(%error, "metrics are no longer served");
        }
    });
}
