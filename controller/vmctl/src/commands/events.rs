//! `vmctl events`

use std::io::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use api::controller as pb;
use api::controller::events_client::EventsClient;
use api::controller::watch_events_response::Message;
use tokio_stream::StreamExt as _;

use crate::cli::{EventsArgs, Format, Global};
use crate::{client, json, output, spec};

/// How long a controller that restarts may be away while its events are followed.
const AWAY_TIMEOUT: Duration = Duration::from_secs(60);
const RETRY_INTERVAL: Duration = Duration::from_millis(300);

/// Prints events; with `--follow` for ever, across restarts of the controller.
pub(crate) async fn run(global: &Global, args: EventsArgs) -> anyhow::Result<ExitCode> {
    let target = match &args.vm {
        Some(name) => spec::vm_name(name, &global.project)?.to_string(),
        None => String::new(),
    };
    let mut client = EventsClient::new(client::connect(global).await?);
    if !args.follow {
        return list(global, &mut client, args.after, &target).await;
    }
    let mut after = args.after;
    let mut heard = Instant::now();
    loop {
        let request = pb::WatchEventsRequest {
            after_revision: after,
            target: target.clone(),
        };
        let mut stream = match client.watch_events(request).await {
            Ok(stream) => stream.into_inner(),
            Err(status) if client::is_away(&status) && heard.elapsed() < AWAY_TIMEOUT => {
                tokio::time::sleep(RETRY_INTERVAL).await;
                continue;
            }
            Err(status) => return Err(client::failed(status)),
        };
        while let Some(message) = stream.next().await {
            let message = match message {
                Ok(message) => message,
                Err(status) if client::is_away(&status) => break,
                Err(status) => return Err(client::failed(status)),
            };
            heard = Instant::now();
            match message.message {
                Some(Message::Event(event)) => {
                    after = event.revision;
                    print(global, &event)?;
                }
                Some(Message::Bookmark(revision)) => after = after.max(revision),
                None => {}
            }
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

async fn list(
    global: &Global,
    client: &mut EventsClient<client::Channel>,
    after: u64,
    target: &str,
) -> anyhow::Result<ExitCode> {
    let mut page_token = String::new();
    loop {
        let request = pb::ListEventsRequest {
            page_size: super::PAGE_SIZE,
            page_token,
            target: target.to_owned(),
            ..Default::default()
        };
        let page = client
            .list_events(request)
            .await
            .map_err(client::failed)?
            .into_inner();
        for event in page.events.iter().filter(|event| event.revision > after) {
            print(global, event)?;
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// One line for people, one JSON object a line for programs.
fn print(global: &Global, event: &pb::Event) -> anyhow::Result<()> {
    match global.output {
        Format::Json => println!("{}", json::value("Event", event)?),
        Format::Table => {
            let mark = if event.warning { "!" } else { " " };
            let line = format!(
                "{}  {mark} {:20} {:24} {}",
                output::time(event.time),
                event.reason,
                event.target.trim_start_matches("projects/"),
                event.message
            );
            println!("{}", line.trim_end());
        }
    }
    std::io::stdout().flush()?;
    Ok(())
}
