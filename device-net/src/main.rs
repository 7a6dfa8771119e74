//! `device-net`: serves virtio-net devices over vhost-user, each backed by a tap.
//!
//! The process opens what its command line names, confines itself, and only then talks to a
//! frontend. Further NICs come over the control socket, as descriptors.

mod cli;
mod confinement;
mod guard;
mod kernel;
mod leases;
mod nic;
mod nics;
mod switch;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use api::daemon::{self, DeviceTable};
use api::device::leases_server::LeasesServer;
use api::device::nics_server::NicsServer;
use api::fds::Inbox;
use api::listen::{self, Sweeper};
use api::serve::Services;
use clap::Parser;
use cli::OpenNic;
use faults::{Faults, Kind};
use leases::{Clock, LeaseService};
use nics::NicService;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let args = cli::Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_env("MORTISE_LOG").unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("device-net: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(args: cli::Args) -> anyhow::Result<()> {
    sandbox::close_other_fds(&args.inherited_fds()?)?;
    api::limits::raise_open_files();
    let control = listen::unix(&args.control_socket)?;
    let fd_socket = args
        .fd_socket
        .as_deref()
        .map(listen::unix_socket)
        .transpose()?;
    let metrics = args
        .metrics_listen
        .as_deref()
        .map(listen::tcp)
        .transpose()?;
    let nics = args.open_nics()?;
    let uplinks = args
        .uplinks
        .iter()
        .map(|uplink| Ok((uplink.port.clone(), uplink.open()?)))
        .collect::<anyhow::Result<Vec<_>>>()?;

    let socket_files = nics.iter().filter_map(|nic| nic.socket_file.as_ref());
    let socket_files = socket_files
        .chain(control.socket_file())
        .chain(fd_socket.as_ref().map(|(_, file)| file));
    let sweeper = Sweeper::start(socket_files).context("cannot prepare for a failure")?;
    let achieved = confinement::enter()?;
    kernel::uring::start_maker()?;
    confinement::forbid_new_rings()?;
    // Guests are served before the control socket is: a SIGTERM must drain them, not kill.
    api::serve::hold_termination();
    for missing in achieved.missing_names() {
        tracing::warn!("sandbox: {missing}");
    }
    tracing::info!(sandbox = achieved.names().join(" "), "confined");

    let inbox = fd_socket
        .map(|(listener, file)| Inbox::on(listener, file))
        .transpose()?;
    let faults = args
        .allow_faults
        .then(|| Faults::start(Kind::Net))
        .transpose()?;
    let faults_of_nics = faults.clone();
    let clock = Arc::<Clock>::default();
    let clock_of_nics = Arc::clone(&clock);
    let table = DeviceTable::new("device-net", achieved.into_names(), inbox, move |parts| {
        nic::attach(parts, faults_of_nics.as_ref(), &clock_of_nics)
    });
    for (port, interface) in uplinks {
        switch::connect_uplink(&port, interface)
            .with_context(|| format!("uplink of switch {:?}", port.switch))?;
    }
    let mut socket_files = Vec::new();
    for OpenNic { parts, socket_file } in nics {
        let id = parts.request.id.clone();
        table
            .attach(parts)
            .map_err(|status| anyhow!("NIC {id:?}: {}", status.message()))?;
        socket_files.extend(socket_file);
    }
    sweeper.dismiss();
    let nics = NicsServer::new(NicService::new(table.clone()));
    let leases = LeasesServer::new(LeaseService {
        table: table.clone(),
        clock,
    });
    Ok(daemon::run(
        &table,
        Services::new()
            .with(nics)
            .with(leases)
            .with(api::fault_control::service(faults)),
        control,
        metrics,
    )?)
}
