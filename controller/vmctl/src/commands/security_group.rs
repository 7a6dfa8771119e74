//! `vmctl security-group`

use std::process::ExitCode;

use api::controller as pb;
use api::controller::security_groups_client::SecurityGroupsClient;

use super::{PAGE_SIZE, parent};
use crate::cli::network::SecurityGroupCommand;
use crate::cli::{Format, Global};
use crate::security_rule::{self, RuleArg};
use crate::{client, json, output, spec};

/// Runs one command.
pub(crate) async fn run(
    global: &Global,
    command: SecurityGroupCommand,
) -> anyhow::Result<ExitCode> {
    let channel = client::connect(global).await?;
    let mut client = SecurityGroupsClient::new(channel);
    match command {
        SecurityGroupCommand::Create {
            name,
            description,
            rules,
        } => {
            let request = pb::CreateSecurityGroupRequest {
                parent: parent(global, false),
                security_group_id: name,
                security_group: Some(pb::SecurityGroup {
                    description: description.unwrap_or_default(),
                    rules: api_rules(rules, global),
                    ..Default::default()
                }),
            };
            let made = client
                .create_security_group(request)
                .await
                .map_err(client::failed)?;
            print(global, &made.into_inner())?;
        }
        SecurityGroupCommand::Update {
            name,
            description,
            rules,
            no_rules: _,
        } => {
            let name = spec::security_group_name(&name, &global.project)?;
            let request = pb::GetSecurityGroupRequest {
                name: name.to_string(),
            };
            let before = client
                .get_security_group(request)
                .await
                .map_err(client::failed)?;
            let before = before.into_inner();
            let request = pb::UpdateSecurityGroupRequest {
                security_group: Some(pb::SecurityGroup {
                    name: name.to_string(),
                    // What was described is kept only if nobody else changed it meanwhile.
                    etag: before.etag,
                    description: description.unwrap_or(before.description),
                    rules: api_rules(rules, global),
                    ..Default::default()
                }),
            };
            let changed = client
                .update_security_group(request)
                .await
                .map_err(client::failed)?;
            print(global, &changed.into_inner())?;
        }
        SecurityGroupCommand::Show { name } => {
            let name = spec::security_group_name(&name, &global.project)?;
            let request = pb::GetSecurityGroupRequest {
                name: name.to_string(),
            };
            let group = client
                .get_security_group(request)
                .await
                .map_err(client::failed)?;
            print(global, &group.into_inner())?;
        }
        SecurityGroupCommand::List { all_projects } => {
            let mut groups = Vec::new();
            let mut page_token = String::new();
            loop {
                let request = pb::ListSecurityGroupsRequest {
                    parent: parent(global, all_projects),
                    page_size: PAGE_SIZE,
                    page_token,
                    ..Default::default()
                };
                let answer = client.list_security_groups(request).await;
                let answer = answer.map_err(client::failed)?.into_inner();
                groups.extend(answer.security_groups);
                page_token = answer.next_page_token;
                if page_token.is_empty() {
                    break;
                }
            }
            print_list(global, &groups)?;
        }
        SecurityGroupCommand::Delete { name } => {
            let name = spec::security_group_name(&name, &global.project)?;
            let request = pb::DeleteSecurityGroupRequest {
                name: name.to_string(),
                ..Default::default()
            };
            client
                .delete_security_group(request)
                .await
                .map_err(client::failed)?;
            if !global.quiet && global.output == Format::Table {
                println!("security group {} is gone", name.id);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn api_rules(rules: Vec<RuleArg>, global: &Global) -> Vec<pb::SecurityRule> {
    rules
        .into_iter()
        .map(|rule| rule.into_api(&global.project))
        .collect()
}

fn print(global: &Global, group: &pb::SecurityGroup) -> anyhow::Result<()> {
    if global.output == Format::Json {
        json::print(&json::value("SecurityGroup", group)?);
        return Ok(());
    }
    output::fields(&[
        ("name", group.name.clone()),
        ("description", group.description.clone()),
        ("nics", group.members.join(", ")),
        ("created", output::time(group.create_time)),
        ("etag", group.etag.clone()),
    ]);
    for rule in &group.rules {
        println!("  {}", security_rule::shown(rule));
    }
    Ok(())
}

fn print_list(global: &Global, groups: &[pb::SecurityGroup]) -> anyhow::Result<()> {
    if global.output == Format::Json {
        let values: anyhow::Result<Vec<_>> = groups
            .iter()
            .map(|group| json::value("SecurityGroup", group))
            .collect();
        json::print(&values?.into());
        return Ok(());
    }
    let rows: Vec<Vec<String>> = groups
        .iter()
        .map(|group| {
            vec![
                output::id(&group.name),
                group.rules.len().to_string(),
                group.members.len().to_string(),
                output::age(group.create_time),
                output::or_dash(&group.description),
            ]
        })
        .collect();
    output::table(&["GROUP", "RULES", "NICS", "AGE", "DESCRIPTION"], &rows);
    Ok(())
}
