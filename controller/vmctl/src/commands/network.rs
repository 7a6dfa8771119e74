//! `vmctl network`

use std::process::ExitCode;

use crate::client::Channel;
use api::controller as pb;
use api::controller::networks_client::NetworksClient;
use prost_types::FieldMask;

use super::{PAGE_SIZE, conclude, parent};
use crate::cli::network::{
    Datapath, NetworkCommand, NetworkCreateArgs, NetworkKind, NetworkUpdateArgs, Switch,
};
use crate::cli::{Format, Global};
use crate::{client, json, output, spec};

/// Runs one command.
pub(crate) async fn run(global: &Global, command: NetworkCommand) -> anyhow::Result<ExitCode> {
    match command {
        NetworkCommand::Create(args) => create(global, *args).await?,
        NetworkCommand::List { all_projects } => list(global, all_projects).await?,
        NetworkCommand::Show { name } => {
            let name = spec::network_name(&name, &global.project)?;
            let channel = client::connect(global).await?;
            let network = get(&channel, name.to_string()).await?;
            match global.output {
                Format::Json => json::print(&json::value("Network", &network)?),
                Format::Table => show(&network),
            }
        }
        NetworkCommand::Update(args) => update(global, args).await?,
        NetworkCommand::Delete { name, wait } => {
            let name = spec::network_name(&name, &global.project)?;
            let channel = client::connect(global).await?;
            let request = pb::DeleteNetworkRequest {
                name: name.to_string(),
                request_id: client::request_id(None),
                ..Default::default()
            };
            let answer = NetworksClient::new(channel.clone())
                .delete_network(request)
                .await;
            let operation = answer.map_err(client::failed)?.into_inner();
            let doing = format!("deleting network {}", name.id);
            let done = format!("network {} is gone", name.id);
            conclude(global, &channel, operation, wait, &doing, &done).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(global: &Global, args: NetworkCreateArgs) -> anyhow::Result<()> {
    let kind = match args.kind {
        NetworkKind::Nat => pb::NetworkKind::Nat,
        NetworkKind::Bridged => pb::NetworkKind::Bridged,
        NetworkKind::HostOnly => pb::NetworkKind::HostOnly,
        NetworkKind::Isolated => pb::NetworkKind::Isolated,
    };
    let (first, last) = args.pool.unwrap_or_default();
    let overlay = args.vni.map(|vni| pb::Overlay {
        vni,
        underlay_address: args.underlay.map(|ip| ip.to_string()).unwrap_or_default(),
        port: args.vxlan_port.map_or(0, u32::from),
        peers: args.peers.into_iter().map(|peer| peer.0).collect(),
    });
    let spec = pb::NetworkSpec {
        kind: kind as i32,
        ipv4_cidr: args.subnet.unwrap_or_default(),
        ipv4_gateway: args.gateway.map(|ip| ip.to_string()).unwrap_or_default(),
        ipv4_pool_first: first,
        ipv4_pool_last: last,
        ipv6_prefix: args.ipv6_prefix.unwrap_or_default(),
        dhcp: args.no_dhcp.then_some(false),
        dns: args.no_dns.then_some(false),
        dns_servers: args.dns_servers.iter().map(ToString::to_string).collect(),
        dns_domain: args.domain.unwrap_or_default(),
        mtu: args.mtu.unwrap_or(0),
        bridge: args.bridge.unwrap_or_default(),
        uplink: args.uplink.unwrap_or_default(),
        overlay,
        datapath: match args.datapath {
            Datapath::Kernel => pb::Datapath::Kernel,
            Datapath::Switch => pb::Datapath::Switch,
        } as i32,
        vlan_aware: args.vlan_aware,
    };
    let channel = client::connect(global).await?;
    let request = pb::CreateNetworkRequest {
        parent: parent(global, false),
        network_id: args.name.clone(),
        network: Some(pb::Network {
            spec: Some(spec),
            ..Default::default()
        }),
        request_id: client::request_id(args.request_id),
        ..Default::default()
    };
    let answer = NetworksClient::new(channel.clone())
        .create_network(request)
        .await;
    let operation = answer.map_err(client::failed)?.into_inner();
    let doing = format!("creating network {}", args.name);
    let done = format!("network {} is ready", args.name);
    conclude(global, &channel, operation, args.wait, &doing, &done).await
}

async fn update(global: &Global, args: NetworkUpdateArgs) -> anyhow::Result<()> {
    let name = spec::network_name(&args.name, &global.project)?;
    let on = |switch: Switch| switch == Switch::On;
    let mut paths = Vec::new();
    let mut spec = pb::NetworkSpec::default();
    if let Some(dhcp) = args.dhcp {
        spec.dhcp = Some(on(dhcp));
        paths.push("spec.dhcp");
    }
    if let Some(dns) = args.dns {
        spec.dns = Some(on(dns));
        paths.push("spec.dns");
    }
    if !args.dns_servers.is_empty() {
        spec.dns_servers = args.dns_servers.iter().map(ToString::to_string).collect();
        paths.push("spec.dns_servers");
    }
    if let Some(mtu) = args.mtu {
        spec.mtu = mtu;
        paths.push("spec.mtu");
    }
    if !args.peers.is_empty() {
        spec.overlay = Some(pb::Overlay {
            peers: args.peers.into_iter().map(|peer| peer.0).collect(),
            ..Default::default()
        });
        paths.push("spec.overlay.peers");
    }
    let channel = client::connect(global).await?;
    let request = pb::UpdateNetworkRequest {
        network: Some(pb::Network {
            name: name.to_string(),
            spec: Some(spec),
            ..Default::default()
        }),
        update_mask: Some(FieldMask {
            paths: paths.into_iter().map(str::to_owned).collect(),
        }),
        request_id: client::request_id(None),
        ..Default::default()
    };
    let answer = NetworksClient::new(channel.clone())
        .update_network(request)
        .await;
    let operation = answer.map_err(client::failed)?.into_inner();
    let doing = format!("changing network {}", name.id);
    let done = format!("network {} is ready", name.id);
    conclude(global, &channel, operation, args.wait, &doing, &done).await
}

async fn get(channel: &Channel, name: String) -> anyhow::Result<pb::Network> {
    let answer = NetworksClient::new(channel.clone())
        .get_network(pb::GetNetworkRequest { name })
        .await;
    Ok(answer.map_err(client::failed)?.into_inner())
}

async fn list(global: &Global, all_projects: bool) -> anyhow::Result<()> {
    let mut client = NetworksClient::new(client::connect(global).await?);
    let mut networks = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = pb::ListNetworksRequest {
            parent: parent(global, all_projects),
            page_size: PAGE_SIZE,
            page_token,
            ..Default::default()
        };
        let answer = client
            .list_networks(request)
            .await
            .map_err(client::failed)?;
        let answer = answer.into_inner();
        networks.extend(answer.networks);
        page_token = answer.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    if global.output == Format::Json {
        let values: anyhow::Result<Vec<_>> = networks
            .iter()
            .map(|network| json::value("Network", network))
            .collect();
        json::print(&values?.into());
        return Ok(());
    }
    let rows: Vec<Vec<String>> = networks.iter().map(row).collect();
    let header = [
        "NETWORK", "KIND", "PHASE", "IPV4", "IPV6", "VMS", "BRIDGE", "AGE",
    ];
    output::table(&header, &rows);
    Ok(())
}

fn row(network: &pb::Network) -> Vec<String> {
    let spec = network.spec.clone().unwrap_or_default();
    let status = network.status.clone().unwrap_or_default();
    vec![
        output::id(&network.name),
        output::word(spec.kind().as_str_name(), "NETWORK_KIND_"),
        output::word(status.phase().as_str_name(), "NETWORK_PHASE_"),
        output::or_dash(&spec.ipv4_cidr),
        output::or_dash(&spec.ipv6_prefix),
        status.vms.len().to_string(),
        output::or_dash(&status.bridge),
        output::age(network.create_time),
    ]
}

fn show(network: &pb::Network) {
    let spec = network.spec.clone().unwrap_or_default();
    let status = network.status.clone().unwrap_or_default();
    let flag = |on: bool| if on { "on" } else { "off" }.to_owned();
    let overlay = spec.overlay.as_ref().map(|overlay| {
        let peers: Vec<&str> = overlay
            .peers
            .iter()
            .map(|peer| peer.underlay_address.as_str())
            .collect();
        format!(
            "vni {} to {}",
            overlay.vni,
            output::or_dash(&peers.join(", "))
        )
    });
    let pool = match status.ipv4_addresses_used + status.ipv4_addresses_free {
        0 => String::new(),
        _ => format!(
            "{} used, {} free",
            status.ipv4_addresses_used, status.ipv4_addresses_free
        ),
    };
    output::fields(&[
        ("name", network.name.clone()),
        (
            "kind",
            output::word(spec.kind().as_str_name(), "NETWORK_KIND_"),
        ),
        (
            "phase",
            output::word(status.phase().as_str_name(), "NETWORK_PHASE_"),
        ),
        ("error", status.error.clone().unwrap_or_default().message),
        ("host", output::id(&status.host)),
        ("bridge", status.bridge.clone()),
        ("uplink", spec.uplink.clone()),
        (
            "datapath",
            output::word(spec.datapath().as_str_name(), "DATAPATH_"),
        ),
        (
            "vlans",
            if spec.vlan_aware { "kept apart" } else { "" }.to_owned(),
        ),
        ("ipv4", spec.ipv4_cidr.clone()),
        ("gateway", spec.ipv4_gateway.clone()),
        ("addresses", pool),
        ("ipv6", spec.ipv6_prefix.clone()),
        ("dhcp", flag(spec.dhcp())),
        ("dns", flag(spec.dns())),
        ("dns servers", spec.dns_servers.join(", ")),
        ("domain", spec.dns_domain.clone()),
        (
            "mtu",
            if spec.mtu == 0 {
                String::new()
            } else {
                spec.mtu.to_string()
            },
        ),
        ("overlay", overlay.unwrap_or_default()),
        ("vms", status.vms.join(", ")),
        ("created", output::time(network.create_time)),
        ("etag", network.etag.clone()),
    ]);
    show_processes(&status.processes);
    if !status.leases.is_empty() {
        println!();
        let rows: Vec<Vec<String>> = status
            .leases
            .iter()
            .map(|lease| {
                vec![
                    lease.address.clone(),
                    output::or_dash(&lease.mac),
                    output::or_dash(&lease.hostname),
                    output::time(lease.expire_time),
                ]
            })
            .collect();
        output::table(&["LEASE", "MAC", "HOSTNAME", "UNTIL"], &rows);
    }
}

fn show_processes(processes: &[pb::NetworkProcess]) {
    if processes.is_empty() {
        return;
    }
    let rows: Vec<Vec<String>> = processes
        .iter()
        .map(|process| {
            vec![
                process.name.clone(),
                process.pid.to_string(),
                process.restarts.to_string(),
                output::or_dash(&process.nics.join(",")),
                output::or_dash(&process.sandbox.join(",")),
                output::or_dash(&process.last_error),
            ]
        })
        .collect();
    println!();
    let header = [
        "PROCESS",
        "PID",
        "RESTARTS",
        "NICS",
        "SANDBOX",
        "LAST ERROR",
    ];
    output::table(&header, &rows);
}
