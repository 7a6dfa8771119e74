//! `vmctl port-forward`

use std::process::ExitCode;

use crate::client::Channel;
use api::controller as pb;
use api::controller::nics_client::NicsClient;
use api::controller::vms_client::VmsClient;
use prost_types::FieldMask;

use super::{PAGE_SIZE, conclude, parent};
use crate::cli::network::PortForwardCommand;
use crate::cli::{Format, Global, WaitArgs};
use crate::{client, json, output, spec};

/// Runs one command.
pub(crate) async fn run(global: &Global, command: PortForwardCommand) -> anyhow::Result<ExitCode> {
    let channel = client::connect(global).await?;
    match command {
        PortForwardCommand::List { all_projects } => list(global, &channel, all_projects).await?,
        PortForwardCommand::Add {
            vm,
            forward,
            nic,
            wait,
        } => {
            let add = |forwards: &mut Vec<pb::PortForward>| {
                forwards.push(forward.clone());
                Ok(())
            };
            change(global, &channel, &vm, nic, wait, add).await?;
        }
        PortForwardCommand::Remove {
            vm,
            forward,
            nic,
            wait,
        } => {
            let remove = |forwards: &mut Vec<pb::PortForward>| {
                let before = forwards.len();
                forwards.retain(|other| {
                    (&other.protocol, other.host_port) != (&forward.protocol, forward.host_port)
                });
                anyhow::ensure!(
                    forwards.len() < before,
                    "{} port {} of the host is not forwarded to vm {vm}",
                    forward.protocol,
                    forward.host_port
                );
                Ok(())
            };
            change(global, &channel, &vm, nic, wait, remove).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn change(
    global: &Global,
    channel: &Channel,
    vm: &str,
    nic: Option<String>,
    wait: WaitArgs,
    change: impl Fn(&mut Vec<pb::PortForward>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let name = spec::vm_name(vm, &global.project)?;
    let found = client::get_vm(channel, &name.to_string()).await;
    let found = found.map_err(client::failed)?;
    let nics = found.spec.unwrap_or_default().nics;
    let mut in_networks = nics.into_iter().filter(|nic| !nic.network.is_empty());
    let chosen = match &nic {
        Some(wanted) => in_networks.find(|nic| nic.name == *wanted),
        None => in_networks.next(),
    };
    let Some(mut chosen) = chosen else {
        anyhow::bail!(
            "vm {vm} has no {}; vmctl vm show {vm} lists what it has",
            match nic {
                Some(nic) => format!("NIC {nic} in a network"),
                None => "NIC in a network".to_owned(),
            }
        );
    };
    change(&mut chosen.port_forwards)?;
    let request = pb::UpdateNicRequest {
        nic: Some(pb::VmNic {
            name: format!("{name}/nics/{}", chosen.name),
            // Nobody else's change in between is undone.
            etag: found.etag,
            spec: Some(chosen),
            ..Default::default()
        }),
        update_mask: Some(FieldMask {
            paths: vec!["spec.port_forwards".to_owned()],
        }),
        request_id: client::request_id(None),
        ..Default::default()
    };
    let answer = NicsClient::new(channel.clone()).update_nic(request).await;
    let operation = answer.map_err(client::failed)?.into_inner();
    let doing = format!("changing the port forwards of vm {vm}");
    let done = format!("the port forwards of vm {vm} are changed");
    conclude(global, channel, operation, wait, &doing, &done).await
}

async fn list(global: &Global, channel: &Channel, all_projects: bool) -> anyhow::Result<()> {
    let mut client = VmsClient::new(channel.clone());
    let mut rows = Vec::new();
    let mut values = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = pb::ListVmsRequest {
            parent: parent(global, all_projects),
            page_size: PAGE_SIZE,
            page_token,
            ..Default::default()
        };
        let answer = client.list_vms(request).await.map_err(client::failed)?;
        let answer = answer.into_inner();
        for vm in answer.vms {
            for nic in vm.spec.clone().unwrap_or_default().nics {
                for forward in &nic.port_forwards {
                    values.push(json::value("PortForward", forward)?);
                    rows.push(row(&vm.name, &nic, forward));
                }
            }
        }
        page_token = answer.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    match global.output {
        Format::Json => json::print(&values.into()),
        Format::Table => {
            output::table(&["PROTOCOL", "HOST", "VM", "NIC", "GUEST"], &rows);
        }
    }
    Ok(())
}

fn row(vm: &str, nic: &pb::Nic, forward: &pb::PortForward) -> Vec<String> {
    let at = |address: &str, port: u32| match address {
        "" => format!("*:{port}"),
        address if address.contains(':') => format!("[{address}]:{port}"),
        address => format!("{address}:{port}"),
    };
    let guest = match nic.ipv4_address.as_str() {
        "" => &nic.ipv6_address,
        address => address,
    };
    let guest_port = match forward.guest_port {
        0 => forward.host_port,
        port => port,
    };
    vec![
        forward.protocol.clone(),
        at(&forward.host_address, forward.host_port),
        output::id(vm),
        nic.name.clone(),
        at(guest, guest_port),
    ]
}
