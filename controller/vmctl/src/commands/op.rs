//! `vmctl op`

use std::process::ExitCode;
use std::time::Duration;

use api::controller as pb;
use api::controller::operations_client::OperationsClient;

use crate::cli::{Format, Global, OpCommand};
use crate::{client, json, output, spec};

/// Runs one command.
pub(crate) async fn run(global: &Global, command: OpCommand) -> anyhow::Result<ExitCode> {
    match command {
        OpCommand::List { vm, limit } => list(global, vm.as_deref(), limit).await?,
        OpCommand::Wait { name, timeout } => wait(global, &name, timeout).await?,
        OpCommand::Cancel { name } => {
            let mut client = OperationsClient::new(client::connect(global).await?);
            let request = pb::CancelOperationRequest { name: full(&name) };
            let answer = client
                .cancel_operation(request)
                .await
                .map_err(client::failed)?;
            print(global, &answer.into_inner())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(global: &Global, vm: Option<&str>, limit: u32) -> anyhow::Result<()> {
    let target = match vm {
        Some(name) => spec::vm_name(name, &global.project)?.to_string(),
        None => String::new(),
    };
    let mut client = OperationsClient::new(client::connect(global).await?);
    let limit = limit as usize;
    let mut operations = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = pb::ListOperationsRequest {
            page_size: super::PAGE_SIZE,
            page_token,
            target: target.clone(),
            ..Default::default()
        };
        let page = client
            .list_operations(request)
            .await
            .map_err(client::failed)?
            .into_inner();
        operations.extend(page.operations);
        page_token = page.next_page_token;
        if page_token.is_empty() || operations.len() >= limit {
            break;
        }
    }
    operations.truncate(limit);
    if global.output == Format::Json {
        let operations: anyhow::Result<Vec<_>> = operations
            .iter()
            .map(|operation| json::value("Operation", operation))
            .collect();
        json::print(&operations?.into());
        return Ok(());
    }
    let rows: Vec<Vec<String>> = operations
        .iter()
        .map(|operation| {
            let metadata = operation.metadata.clone().unwrap_or_default();
            let note = match &operation.error {
                Some(error) => error.message.clone(),
                None if metadata.done_bytes > 0 && !operation.done => {
                    let (done, total) = (metadata.done_bytes, metadata.total_bytes);
                    format!("{}: {}", metadata.progress, output::share(done, total))
                }
                None if operation.done => metadata.findings.join("; "),
                None => metadata.progress.clone(),
            };
            vec![
                output::id(&operation.name),
                output::word(metadata.kind().as_str_name(), "OPERATION_KIND_"),
                output::id(&metadata.target),
                state(operation).to_owned(),
                output::age(operation.create_time),
                output::or_dash(&note),
            ]
        })
        .collect();
    output::table(
        &["OPERATION", "KIND", "TARGET", "STATE", "AGE", "NOTE"],
        &rows,
    );
    Ok(())
}

fn state(operation: &pb::Operation) -> &'static str {
    match (operation.done, &operation.error) {
        (false, _) if is_ready(operation) => "ready",
        (false, _) => "pending",
        (true, None) => "done",
        (true, Some(_)) => "failed",
    }
}

fn is_ready(operation: &pb::Operation) -> bool {
    operation
        .metadata
        .as_ref()
        .is_some_and(|metadata| metadata.ready)
}

async fn wait(global: &Global, name: &str, timeout: Option<u64>) -> anyhow::Result<()> {
    let channel = client::connect(global).await?;
    let name = full(name);
    let request = pb::GetOperationRequest { name: name.clone() };
    let answer = OperationsClient::new(channel.clone())
        .get_operation(request)
        .await;
    let operation = answer.map_err(client::failed)?.into_inner();
    let timeout = timeout.map(Duration::from_secs);
    let operation = client::wait(global, &channel, operation, &name, timeout).await?;
    print(global, &operation)
}

pub(super) fn print(global: &Global, operation: &pb::Operation) -> anyhow::Result<()> {
    match global.output {
        Format::Json => json::print(&json::value("Operation", operation)?),
        Format::Table => {
            println!("{} is {}", operation.name, state(operation));
            for finding in operation
                .metadata
                .iter()
                .flat_map(|metadata| &metadata.findings)
            {
                println!("{finding}");
            }
        }
    }
    Ok(())
}

pub(super) fn full(name: &str) -> String {
    if name.contains('/') {
        name.to_owned()
    } else {
        format!("operations/{name}")
    }
}
