//! `vmctl host upgrade`

use anyhow::bail;
use api::controller as pb;
use api::controller::host_upgrades_client::HostUpgradesClient;

use crate::cli::host::HostUpgradeArgs;
use crate::cli::{Format, Global};
use crate::client::Channel;
use crate::placement::{host_name, pair};
use crate::{client, json, output};

pub(super) async fn run(
    global: &Global,
    channel: &Channel,
    args: HostUpgradeArgs,
) -> anyhow::Result<()> {
    let selector: anyhow::Result<_> = args
        .selector
        .iter()
        .map(|label| pair("--selector", label))
        .collect();
    let request = pb::UpgradeHostsRequest {
        hosts: args.hosts.iter().map(|host| host_name(host)).collect(),
        selector: selector?,
        all: args.all,
        agent_binary: args.agent_binary.unwrap_or_default(),
        device_blk: args.device_blk.unwrap_or_default(),
        device_net: args.device_net.unwrap_or_default(),
        max_unavailable: args.max_unavailable,
        max_devices_unavailable: args.max_devices_unavailable,
        confirm_ms: args.confirm.unwrap_or_default().saturating_mul(1_000),
        request_id: client::request_id(None),
        validate_only: args.validate_only,
    };
    let answer = HostUpgradesClient::new(channel.clone())
        .upgrade_hosts(request)
        .await;
    let operation = answer.map_err(client::failed)?.into_inner();
    if args.validate_only {
        print(global, &operation)?;
        return match &operation.error {
            Some(error) => bail!("{}", error.message),
            None => Ok(()),
        };
    }
    if args.wait.no_wait {
        match global.output {
            Format::Json => json::print(&json::value("Operation", &operation)?),
            Format::Table => println!("{}", operation.name),
        }
        return Ok(());
    }
    let operation = client::wait(global, channel, operation, "upgrade", None).await?;
    print(global, &operation)
}

fn print(global: &Global, operation: &pb::Operation) -> anyhow::Result<()> {
    match global.output {
        Format::Json => json::print(&json::value("Operation", operation)?),
        Format::Table if global.quiet => {}
        Format::Table => output::table(&["HOST", "RESULT"], &rows(operation)),
    }
    Ok(())
}

/// A finding is `HOST: what was done`.
fn rows(operation: &pb::Operation) -> Vec<Vec<String>> {
    let metadata = operation.metadata.as_ref();
    let findings = metadata.iter().flat_map(|metadata| &metadata.findings);
    findings
        .map(|finding| {
            let (host, result) = finding.split_once(": ").unwrap_or(("-", finding));
            vec![host.to_owned(), result.to_owned()]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_host_has_its_row() {
        let mut operation = pb::Operation::default();
        operation.metadata.get_or_insert_default().findings =
            vec!["h1: node-agent 2 (/x: y) in place of 1".into()];
        let wanted = ["h1", "node-agent 2 (/x: y) in place of 1"].map(str::to_owned);
        assert_eq!(rows(&operation), [wanted.to_vec()]);
    }
}
