//! `vmctl host`

use std::process::ExitCode;

use api::controller as pb;
use api::controller::certificates_client::CertificatesClient;
use api::controller::hosts_client::HostsClient;

use crate::cli::host::{HostCommand, HostSetArgs, TokenCommand};
use crate::cli::{Format, Global};
use crate::client::Channel;
use crate::placement::{host_name, pair};
use crate::{client, json, output};

mod upgrade;

/// Runs one command.
pub(crate) async fn run(global: &Global, command: HostCommand) -> anyhow::Result<ExitCode> {
    let channel = client::connect(global).await?;
    let mut client = HostsClient::new(channel.clone());
    match command {
        HostCommand::List => list(global, &mut client).await?,
        HostCommand::Show { host } => {
            let name = host_name(&host);
            let host = client.get_host(pb::GetHostRequest { name }).await;
            show(global, &host.map_err(client::failed)?.into_inner())?;
        }
        HostCommand::Set(args) => {
            let host = set(&mut client, args).await?;
            changed(global, &host, "is changed")?;
        }
        HostCommand::Cordon { host } => {
            let name = host_name(&host);
            let host = client.cordon_host(pb::CordonHostRequest { name }).await;
            let host = host.map_err(client::failed)?.into_inner();
            changed(global, &host, "gets nothing more")?;
        }
        HostCommand::Uncordon { host } => {
            let name = host_name(&host);
            let host = client.uncordon_host(pb::UncordonHostRequest { name }).await;
            let host = host.map_err(client::failed)?.into_inner();
            changed(global, &host, "may get VMs again")?;
        }
        HostCommand::Drain { host, wait } => {
            let request = pb::DrainHostRequest {
                name: host_name(&host),
                request_id: client::request_id(None),
            };
            let answer = client.drain_host(request).await;
            let operation = answer.map_err(client::failed)?.into_inner();
            drained(global, &channel, operation, wait.no_wait, &host).await?;
        }
        HostCommand::Upgrade(args) => upgrade::run(global, &channel, args).await?,
        HostCommand::Token { command } => token(global, &channel, command).await?,
        HostCommand::Delete { host, force } => {
            let request = pb::DeleteHostRequest {
                name: host_name(&host),
                etag: String::new(),
                force,
            };
            client.delete_host(request).await.map_err(client::failed)?;
            if !global.quiet {
                println!("host {host} is forgotten");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(global: &Global, client: &mut HostsClient<Channel>) -> anyhow::Result<()> {
    let mut hosts = Vec::new();
    let mut request = pb::ListHostsRequest {
        page_size: 1_000,
        ..Default::default()
    };
    loop {
        let page = client.list_hosts(request.clone()).await;
        let page = page.map_err(client::failed)?.into_inner();
        hosts.extend(page.hosts);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    if global.output == Format::Json {
        let hosts: anyhow::Result<Vec<_>> =
            hosts.iter().map(|host| json::value("Host", host)).collect();
        json::print(&hosts?.into());
        return Ok(());
    }
    let header = [
        "HOST", "AGENT", "HOSTNAME", "CPUS", "MEMORY", "KVM", "RUNNING", "VERSION", "PLACED",
        "PROBLEM",
    ];
    output::table(&header, &hosts.iter().map(row).collect::<Vec<_>>());
    Ok(())
}

fn row(host: &pb::Host) -> Vec<String> {
    let cordoned = host.spec.as_ref().is_some_and(|spec| spec.cordoned);
    let reserved = host.reserved.unwrap_or_default();
    vec![
        output::id(&host.name),
        match (host.connected, cordoned) {
            (true, false) => "connected",
            (true, true) => "cordoned",
            (false, _) => "unreachable",
        }
        .to_owned(),
        host.hostname.clone(),
        host.cpus.to_string(),
        output::size(host.memory_bytes),
        output::or_dash(&host.kvm),
        host.vms_running.to_string(),
        host.version.clone(),
        reserved.vms.to_string(),
        output::or_dash(&host.problem),
    ]
}

fn show(global: &Global, host: &pb::Host) -> anyhow::Result<()> {
    if global.output == Format::Json {
        json::print(&json::value("Host", host)?);
        return Ok(());
    }
    let spec = host.spec.clone().unwrap_or_default();
    let seen = host.inventory.clone().unwrap_or_default();
    let reserved = host.reserved.unwrap_or_default();
    let mut labels = seen.labels.clone();
    labels.extend(spec.labels.clone());
    let labels = labels.iter().map(|(key, value)| format!("{key}={value}"));
    let taints = spec.taints.iter();
    let taints = taints.map(|taint| format!("{}={}", taint.key, taint.value));
    let programs = seen.programs.iter();
    let programs = programs.map(|program| format!("{} {}", program.name, program.version));
    let nodes = seen.numa_nodes.iter();
    let nodes = nodes.map(|node| {
        let memory = output::size(node.memory_bytes);
        format!("{}: CPUs {}, {memory}", node.node, node.cpus)
    });
    let pages = seen.huge_pages.iter().filter(|size| size.pages > 0);
    let pages = pages.map(|size| {
        let each = output::size(size.page_bytes);
        format!("{} of {each}, {} free", size.pages, size.free_pages)
    });
    let zone = match spec.zone.as_str() {
        "" => seen.zone.clone(),
        zone => zone.to_owned(),
    };
    let joined = |words: Vec<String>| words.join(", ");
    let ratio = |ratio: f64| match ratio > 0.0 {
        true => format!("{ratio}"),
        false => "no limit".to_owned(),
    };
    output::fields(&[
        ("host", output::id(&host.name)),
        ("agent", row(host)[1].clone()),
        ("address", host.address.clone()),
        ("hostname", host.hostname.clone()),
        ("version", host.version.clone()),
        ("programs", joined(programs.collect())),
        ("zone", zone),
        ("labels", joined(labels.collect())),
        ("taints", joined(taints.collect())),
        ("CPUs", host.cpus.to_string()),
        ("CPU", seen.cpu_model.clone()),
        ("memory", output::size(host.memory_bytes)),
        ("NUMA nodes", nodes.collect::<Vec<_>>().join("; ")),
        ("huge pages", joined(pages.collect())),
        ("KVM", host.kvm.clone()),
        ("pool", pool(&seen)),
        ("VMs placed", reserved.vms.to_string()),
        ("vCPUs promised", reserved.vcpus.to_string()),
        ("memory promised", output::size(reserved.memory_bytes)),
        ("CPU overcommit", ratio(spec.cpu_overcommit)),
        ("memory overcommit", ratio(spec.memory_overcommit)),
        ("underlay", host.underlay_address.clone()),
        ("problem", host.problem.clone()),
    ]);
    Ok(())
}

fn pool(seen: &api::node::HostStatus) -> String {
    let (all, free) = (seen.pool_bytes, seen.pool_free_bytes);
    match all {
        0 => String::new(),
        _ => format!("{} of {} free", output::size(free), output::size(all)),
    }
}

async fn set(client: &mut HostsClient<Channel>, args: HostSetArgs) -> anyhow::Result<pb::Host> {
    let name = host_name(&args.host);
    let host = client.get_host(pb::GetHostRequest { name }).await;
    let mut host = host.map_err(client::failed)?.into_inner();
    let spec = host.spec.get_or_insert_default();
    let mut paths = Vec::new();
    for label in &args.labels {
        match label.strip_suffix('-').filter(|key| !key.contains('=')) {
            Some(key) => drop(spec.labels.remove(key)),
            None => {
                let (key, value) = pair("--label", label)?;
                spec.labels.insert(key, value);
            }
        }
        paths.push("spec.labels".to_owned());
    }
    for taint in &args.taints {
        match taint.strip_suffix('-').filter(|key| !key.contains('=')) {
            Some(key) => spec.taints.retain(|own| own.key != key),
            None => {
                let (key, value) = pair("--taint", taint)?;
                spec.taints.retain(|own| own.key != key);
                spec.taints.push(pb::Taint { key, value });
            }
        }
        paths.push("spec.taints".to_owned());
    }
    if let Some(zone) = args.zone {
        spec.zone = zone;
        paths.push("spec.zone".to_owned());
    }
    if let Some(ratio) = args.cpu_overcommit {
        spec.cpu_overcommit = ratio;
        paths.push("spec.cpu_overcommit".to_owned());
    }
    if let Some(ratio) = args.memory_overcommit {
        spec.memory_overcommit = ratio;
        paths.push("spec.memory_overcommit".to_owned());
    }
    let request = pb::UpdateHostRequest {
        host: Some(host),
        update_mask: Some(prost_types::FieldMask { paths }),
    };
    let changed = client.update_host(request).await;
    Ok(changed.map_err(client::failed)?.into_inner())
}

async fn token(global: &Global, channel: &Channel, command: TokenCommand) -> anyhow::Result<()> {
    let mut client = CertificatesClient::new(channel.clone());
    match command {
        TokenCommand::Create { host, ttl } => {
            let request = pb::CreateHostTokenRequest {
                host: host.as_deref().map(host_name).unwrap_or_default(),
                ttl_s: ttl,
            };
            let made = client.create_host_token(request).await;
            let made = made.map_err(client::failed)?.into_inner();
            if global.output == Format::Json {
                json::print(&json::value("CreateHostTokenResponse", &made)?);
                return Ok(());
            }
            let (secret, hash) = (&made.secret, &made.ca_hash);
            println!("node-agent join --token {secret} \\\n  --ca-hash {hash} \\");
            println!(
                "  --controller https://CONTROLLER:PORT --address https://HOST:PORT --state-dir DIR"
            );
        }
        TokenCommand::List => {
            let listed = client.list_host_tokens(pb::ListHostTokensRequest {}).await;
            let listed = listed.map_err(client::failed)?.into_inner();
            if global.output == Format::Json {
                json::print(&json::value("ListHostTokensResponse", &listed)?);
                return Ok(());
            }
            let header = ["TOKEN", "HOST", "AGE", "EXPIRES", "CREATOR", "USED BY"];
            let rows = listed.host_tokens.iter().map(|token| {
                vec![
                    output::id(&token.name),
                    output::or_dash(&output::id(&token.host)),
                    output::age(token.create_time),
                    output::time(token.expire_time),
                    token.creator.clone(),
                    output::or_dash(&output::id(&token.used_by)),
                ]
            });
            output::table(&header, &rows.collect::<Vec<_>>());
        }
        TokenCommand::Delete { token } => {
            let name = match token.contains('/') {
                true => token.clone(),
                false => format!("hostTokens/{token}"),
            };
            let deleted = client.delete_host_token(pb::DeleteHostTokenRequest { name });
            deleted.await.map_err(client::failed)?;
            if !global.quiet {
                println!("token {token} is good for nothing any more");
            }
        }
    }
    Ok(())
}

fn changed(global: &Global, host: &pb::Host, what: &str) -> anyhow::Result<()> {
    match global.output {
        Format::Json => json::print(&json::value("Host", host)?),
        Format::Table if global.quiet => {}
        Format::Table => println!("host {} {what}", output::id(&host.name)),
    }
    Ok(())
}

async fn drained(
    global: &Global,
    channel: &Channel,
    operation: pb::Operation,
    no_wait: bool,
    host: &str,
) -> anyhow::Result<()> {
    let operation = match no_wait {
        true => operation,
        false => client::wait(global, channel, operation, "drain", None).await?,
    };
    match global.output {
        Format::Json => json::print(&json::value("Operation", &operation)?),
        Format::Table if no_wait => println!("{}", operation.name),
        Format::Table if global.quiet => {}
        Format::Table => {
            let findings = operation.metadata.unwrap_or_default().findings;
            match findings.is_empty() {
                true => println!("nothing is left on host {host}"),
                false => findings.iter().for_each(|finding| println!("{finding}")),
            }
        }
    }
    Ok(())
}
