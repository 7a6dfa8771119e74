//! `vmctl audit`

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use api::controller as pb;
use api::controller::audit_log_client::AuditLogClient;
use tokio_stream::StreamExt as _;
use tonic::Code;

use crate::cli::project::AuditCommand;
use crate::cli::{Format, Global};
use crate::{client, json, output};

/// How long a controller that restarts may be away while its log is followed.
const AWAY_TIMEOUT: Duration = Duration::from_secs(60);
const RETRY_INTERVAL: Duration = Duration::from_millis(300);

/// Runs one command.
pub(crate) async fn run(global: &Global, command: AuditCommand) -> anyhow::Result<ExitCode> {
    let mut client = AuditLogClient::new(client::connect(global).await?);
    match command {
        AuditCommand::List { filter, limit } => {
            let (entries, _) = list(&mut client, filter.as_deref().unwrap_or_default()).await?;
            let skip = entries.len().saturating_sub(limit);
            print_all(global, &entries[skip..])?;
        }
        AuditCommand::Watch { filter } => {
            watch(global, &mut client, filter.as_deref().unwrap_or_default()).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// All entries, and where to go on.
async fn list(
    client: &mut AuditLogClient<client::Channel>,
    filter: &str,
) -> anyhow::Result<(Vec<pb::AuditEntry>, String)> {
    let mut entries = Vec::new();
    let mut page_token = String::new();
    let mut resume_token = String::new();
    loop {
        let request = pb::ListAuditEntriesRequest {
            page_size: super::PAGE_SIZE,
            page_token,
            filter: filter.to_owned(),
            ..Default::default()
        };
        let page = client.list_audit_entries(request).await;
        let page = page.map_err(client::failed)?.into_inner();
        entries.extend(page.entries);
        if resume_token.is_empty() {
            resume_token = page.resume_token;
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok((entries, resume_token));
        }
    }
}

/// For ever, across restarts of the controller.
async fn watch(
    global: &Global,
    client: &mut AuditLogClient<client::Channel>,
    filter: &str,
) -> anyhow::Result<()> {
    let mut resume_token = String::new();
    let mut answered = Instant::now();
    loop {
        let request = pb::WatchAuditEntriesRequest {
            resume_token: resume_token.clone(),
            filter: filter.to_owned(),
        };
        let status = match client.watch_audit_entries(request).await {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                loop {
                    match stream.next().await {
                        Some(Ok(message)) => {
                            answered = Instant::now();
                            resume_token = message.resume_token;
                            if let Some(entry) = message.entry {
                                print_line(global, &entry)?;
                            }
                        }
                        Some(Err(status)) => break status,
                        None => break tonic::Status::unavailable("the stream ended"),
                    }
                }
            }
            Err(status) => status,
        };
        if status.code() == Code::OutOfRange {
            return Err(anyhow!(
                "entries were removed before they could be shown; begin anew: vmctl audit list"
            ));
        }
        if !client::is_away(&status) || answered.elapsed() > AWAY_TIMEOUT {
            return Err(client::failed(status));
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

fn print_line(global: &Global, entry: &pb::AuditEntry) -> anyhow::Result<()> {
    match global.output {
        Format::Json => println!("{}", json::value("AuditEntry", entry)?),
        Format::Table => println!("{}", row(entry).join("  ")),
    }
    Ok(())
}

fn print_all(global: &Global, entries: &[pb::AuditEntry]) -> anyhow::Result<()> {
    if global.output == Format::Json {
        let values: anyhow::Result<Vec<_>> = entries
            .iter()
            .map(|entry| json::value("AuditEntry", entry))
            .collect();
        json::print(&values?.into());
        return Ok(());
    }
    let rows: Vec<Vec<String>> = entries.iter().map(row).collect();
    let header = ["TIME", "CALLER", "METHOD", "RESOURCE", "OUTCOME", "REQUEST"];
    output::table(&header, &rows);
    Ok(())
}

fn row(entry: &pb::AuditEntry) -> Vec<String> {
    let outcome = match (entry.code, entry.reason.as_str()) {
        (0, _) => "ok".to_owned(),
        (code, "") => format!("{:?}", Code::from_i32(code)),
        (_, reason) => reason.to_owned(),
    };
    vec![
        output::time(entry.time),
        output::or_dash(&entry.caller),
        entry
            .method
            .trim_start_matches("mortise.controller.v1.")
            .to_owned(),
        output::or_dash(&entry.resource),
        outcome,
        entry.request_id.clone(),
    ]
}
