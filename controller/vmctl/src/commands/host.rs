//! `vmctl host`

use std::process::ExitCode;

use api::controller as pb;
use api::controller::hosts_client::HostsClient;

use crate::cli::{Format, Global, HostCommand};
use crate::{client, json, output};

/// Runs one command.
pub(crate) async fn run(global: &Global, command: HostCommand) -> anyhow::Result<ExitCode> {
    let HostCommand::List = command;
    let mut client = HostsClient::new(client::connect(global).await?);
    let answer = client.list_hosts(pb::ListHostsRequest::default()).await;
    let hosts = answer.map_err(client::failed)?.into_inner().hosts;
    if global.output == Format::Json {
        let hosts: anyhow::Result<Vec<_>> =
            hosts.iter().map(|host| json::value("Host", host)).collect();
        json::print(&hosts?.into());
        return Ok(ExitCode::SUCCESS);
    }
    let rows: Vec<Vec<String>> = hosts
        .iter()
        .map(|host| {
            vec![
                output::id(&host.name),
                if host.connected {
                    "connected"
                } else {
                    "unreachable"
                }
                .to_owned(),
                host.hostname.clone(),
                host.cpus.to_string(),
                output::size(host.memory_bytes),
                output::or_dash(&host.kvm),
                host.vms_running.to_string(),
                host.version.clone(),
                output::or_dash(&host.problem),
            ]
        })
        .collect();
    let header = [
        "HOST", "AGENT", "HOSTNAME", "CPUS", "MEMORY", "KVM", "RUNNING", "VERSION", "PROBLEM",
    ];
    output::table(&header, &rows);
    Ok(ExitCode::SUCCESS)
}
