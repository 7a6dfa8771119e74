//! `vmctl fault`

use std::io::Read as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::client::Channel;
use anyhow::Context as _;
use api::controller as pb;
use api::controller::fault_experiments_client::FaultExperimentsClient;
use tonic::Code;

use super::{PAGE_SIZE, parent};
use crate::campaign::{self, Campaign, Overrides, kinds, library};
use crate::cli::fault::{ChoiceArgs, FaultCommand, ReportFiles, RunArgs, SwitchState};
use crate::cli::{Format, Global};
use crate::client::{self, Progress};
use crate::{fault_report, json, output, spec};

/// Between two looks at a run.
const LOOK_INTERVAL: Duration = Duration::from_millis(300);
/// How long a controller that restarts may be away while a run is waited for.
const AWAY_TIMEOUT: Duration = Duration::from_secs(30);
/// Nothing was shown: neither a success nor a failure.
const INCONCLUSIVE: u8 = 3;
/// Names that are tried for a run without one.
const MAX_NUMBER: u32 = 10_000;

type Client = FaultExperimentsClient<Channel>;

/// Runs one command.
pub(crate) async fn run(global: &Global, command: FaultCommand) -> anyhow::Result<ExitCode> {
    match command {
        FaultCommand::Library { name: None } => print_library(global),
        FaultCommand::Library { name: Some(name) } => {
            let entry = library::find(&name).with_context(|| {
                format!("the library has no campaign {name:?}; see `vmctl fault library`")
            })?;
            print!("{}", entry.text);
        }
        FaultCommand::Kinds => print_kinds(),
        FaultCommand::Validate { campaign, choice } => {
            let campaign = read_campaign(global, &campaign, &choice)?;
            if !global.quiet {
                println!("campaign {} is sound", campaign.name);
            }
        }
        command => return with_controller(global, command).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn with_controller(global: &Global, command: FaultCommand) -> anyhow::Result<ExitCode> {
    let mut client = connect(global).await?;
    match command {
        FaultCommand::Run(args) => return run_campaign(global, client, *args).await,
        FaultCommand::List { all_projects } => list(global, &mut client, all_projects).await?,
        FaultCommand::Show { name } => {
            let name = run_name(global, &name)?;
            let found = get(&mut client, &name).await.map_err(client::failed)?;
            show(global, &found)?;
        }
        FaultCommand::Stop { name } => {
            let name = run_name(global, &name)?;
            let request = pb::StopFaultExperimentRequest { name };
            let stopped = client.stop_fault_experiment(request).await;
            show(global, &stopped.map_err(client::failed)?.into_inner())?;
        }
        FaultCommand::Report { name, files } => {
            let name = run_name(global, &name)?;
            let report = get_report(&mut client, name).await?;
            deliver(global, &report, &files)?;
        }
        FaultCommand::Delete { name } => {
            let name = run_name(global, &name)?;
            let request = pb::DeleteFaultExperimentRequest { name: name.clone() };
            let deleted = client.delete_fault_experiment(request).await;
            deleted.map_err(client::failed)?;
            if !global.quiet && global.output == Format::Table {
                println!("fault experiment {} is gone", output::id(&name));
            }
        }
        FaultCommand::Switch { state } => {
            let switch = match state {
                None => client.get_fault_switch(pb::GetFaultSwitchRequest {}).await,
                Some(state) => {
                    let on = state == SwitchState::On;
                    client
                        .set_fault_switch(pb::SetFaultSwitchRequest { on })
                        .await
                }
            };
            let switch = switch.map_err(client::failed)?.into_inner();
            match global.output {
                Format::Json => json::print(&json::value("FaultSwitch", &switch)?),
                Format::Table => println!(
                    "faults are {}",
                    match (switch.allowed, switch.on) {
                        (false, _) =>
                            "not allowed: the controller was started without --allow-faults",
                        (true, true) => "on",
                        (true, false) => "off",
                    }
                ),
            }
        }
        FaultCommand::Library { .. } | FaultCommand::Kinds | FaultCommand::Validate { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

async fn connect(global: &Global) -> anyhow::Result<Client> {
    let channel = client::connect(global).await?;
    // A report with all its samples.
    Ok(Client::new(channel).max_decoding_message_size(64 << 20))
}

fn run_name(global: &Global, text: &str) -> anyhow::Result<String> {
    Ok(spec::fault_experiment_name(text, &global.project)?.to_string())
}

fn read_campaign(global: &Global, campaign: &str, choice: &ChoiceArgs) -> anyhow::Result<Campaign> {
    let (text, file) = match (campaign, library::find(campaign)) {
        ("-", _) => {
            let mut text = String::new();
            std::io::stdin()
                .take(api::validate::MAX_CAMPAIGN_BYTES as u64 + 1)
                .read_to_string(&mut text)
                .context("cannot read the campaign from stdin")?;
            (text, "stdin")
        }
        (name, Some(entry)) => (entry.text.to_owned(), name),
        (path, None) => {
            let text = std::fs::read_to_string(path).with_context(|| {
                format!("cannot read {path}; give a file, or a name from `vmctl fault library`")
            })?;
            (text, path)
        }
    };
    parse(global, &text, file, choice)
}

fn parse(global: &Global, text: &str, file: &str, choice: &ChoiceArgs) -> anyhow::Result<Campaign> {
    let overrides = Overrides {
        vm: choice.vm.clone(),
        device: choice.device.clone(),
        seed: choice.seed,
        duration: choice.duration.clone(),
        binary: choice.binary.clone(),
    };
    campaign::parse(text, file, &global.project, &overrides)
        .map_err(|complaint| anyhow::anyhow!("the campaign is not sound:\n{complaint}"))
}

async fn run_campaign(
    global: &Global,
    mut client: Client,
    args: RunArgs,
) -> anyhow::Result<ExitCode> {
    let campaign = match (&args.campaign, &args.again) {
        (Some(campaign), _) => read_campaign(global, campaign, &args.choice)?,
        (None, Some(earlier)) => again(global, &mut client, earlier, &args.choice).await?,
        (None, None) => anyhow::bail!("give a campaign, or --again RUN"),
    };
    let begun = begin(global, &mut client, campaign, &args).await?;
    if args.dry_run {
        if !global.quiet {
            println!("the campaign is sound, and could be run now");
        }
        return Ok(ExitCode::SUCCESS);
    }
    if args.detach {
        show(global, &begun)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut looking = client.clone();
    let ended = tokio::select! {
        ended = follow(global, &mut looking, begun.clone()) => ended?,
        _ = tokio::signal::ctrl_c() => {
            let request = pb::StopFaultExperimentRequest { name: begun.name };
            let stopped = client.stop_fault_experiment(request).await;
            stopped.map_err(client::failed)?.into_inner()
        }
    };
    let report = get_report(&mut client, ended.name.clone()).await?;
    deliver(global, &report, &args.files)?;
    let status = ended.status.unwrap_or_default();
    if let Some(error) = status.error {
        anyhow::bail!("the campaign could not be carried out: {}", error.message);
    }
    Ok(match status.verdict() {
        pb::FaultVerdict::Pass => ExitCode::SUCCESS,
        pb::FaultVerdict::Fail => ExitCode::FAILURE,
        _ => ExitCode::from(INCONCLUSIVE),
    })
}

/// The campaign of an earlier run, as it was run: what the command line said then is in it.
async fn again(
    global: &Global,
    client: &mut Client,
    earlier: &str,
    choice: &ChoiceArgs,
) -> anyhow::Result<Campaign> {
    let name = run_name(global, earlier)?;
    let earlier = get(client, &name).await.map_err(client::failed)?;
    let mut spec = earlier.spec.unwrap_or_default();
    spec.seed = choice.seed.unwrap_or(spec.seed);
    if choice.vm.is_some() || choice.device.is_some() || choice.binary.is_some() {
        anyhow::bail!(
            "--again runs what was run; --vm, --device and --binary need the campaign's file"
        );
    }
    if choice.duration.is_some() {
        anyhow::bail!("--again runs as long as it ran; --duration needs the campaign's file");
    }
    let id = output::id(&name);
    let stem = id.trim_end_matches(|c: char| c.is_ascii_digit() || c == '-');
    Ok(Campaign {
        name: if stem.is_empty() {
            id.clone()
        } else {
            stem.to_owned()
        },
        spec,
    })
}

/// Begins a run under the name given, or under the first that is free.
async fn begin(
    global: &Global,
    client: &mut Client,
    campaign: Campaign,
    args: &RunArgs,
) -> anyhow::Result<pb::FaultExperiment> {
    let request_id = client::request_id(None);
    let mut number = 1;
    loop {
        let id = args.name.clone();
        let id = id.unwrap_or_else(|| format!("{}-{number}", campaign.name));
        let request = pb::CreateFaultExperimentRequest {
            parent: parent(global, false),
            experiment_id: id,
            experiment: Some(pb::FaultExperiment {
                spec: Some(campaign.spec.clone()),
                ..Default::default()
            }),
            request_id: request_id.clone(),
            validate_only: args.dry_run,
        };
        match client.create_fault_experiment(request).await {
            Ok(begun) => return Ok(begun.into_inner()),
            Err(status)
                if status.code() == Code::AlreadyExists
                    && args.name.is_none()
                    && number < MAX_NUMBER =>
            {
                number += 1;
            }
            Err(status) => return Err(client::failed(status)),
        }
    }
}

/// Shows how it goes until it is over.
async fn follow(
    global: &Global,
    client: &mut Client,
    begun: pb::FaultExperiment,
) -> anyhow::Result<pb::FaultExperiment> {
    let id = output::id(&begun.name);
    let seed = begun.spec.as_ref().map_or(0, |spec| spec.seed);
    if !global.quiet {
        eprintln!("{id} runs with seed {seed}; `vmctl fault stop {id}` ends it");
    }
    let mut progress = Progress::new(global.quiet, &id);
    let mut answered = Instant::now();
    loop {
        match get(client, &begun.name).await {
            Ok(seen) => {
                answered = Instant::now();
                let status = seen.status.clone().unwrap_or_default();
                if fault_report::is_over(&status) {
                    return Ok(seen);
                }
                progress.show(&in_words(&status));
            }
            Err(status) if client::is_away(&status) && answered.elapsed() < AWAY_TIMEOUT => {}
            Err(status) => return Err(client::failed(status)),
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

fn in_words(status: &pb::FaultExperimentStatus) -> String {
    let hits: Vec<String> = status
        .hits
        .iter()
        .map(|hits| format!("{} {}", hits.id, hits.hits))
        .collect();
    let state = fault_report::state(status);
    match hits.is_empty() {
        true => format!("{state}: {}", status.progress),
        false => format!("{state}: {}; hits: {}", status.progress, hits.join(", ")),
    }
}

async fn get(client: &mut Client, name: &str) -> Result<pb::FaultExperiment, tonic::Status> {
    let request = pb::GetFaultExperimentRequest {
        name: name.to_owned(),
    };
    let found = client.get_fault_experiment(request).await;
    found.map(tonic::Response::into_inner)
}

async fn get_report(client: &mut Client, name: String) -> anyhow::Result<pb::FaultReport> {
    let report = client
        .get_fault_report(pb::GetFaultReportRequest { name })
        .await;
    Ok(report.map_err(client::failed)?.into_inner())
}

/// Prints a report and writes its files.
fn deliver(global: &Global, report: &pb::FaultReport, files: &ReportFiles) -> anyhow::Result<()> {
    let write = |file: &Option<std::path::PathBuf>, text: &dyn Fn() -> anyhow::Result<String>| {
        let Some(file) = file else {
            return anyhow::Ok(());
        };
        std::fs::write(file, text()?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        if !global.quiet {
            eprintln!("wrote {}", file.display());
        }
        Ok(())
    };
    write(&files.html, &|| Ok(fault_report::html(report)))?;
    write(&files.junit, &|| Ok(fault_report::junit(report)))?;
    write(&files.json, &|| {
        Ok(format!("{:#}\n", json::value("FaultReport", report)?))
    })?;
    match global.output {
        Format::Json => json::print(&json::value("FaultReport", report)?),
        Format::Table => print!("{}", fault_report::terminal(report, output::colours())),
    }
    Ok(())
}

async fn list(global: &Global, client: &mut Client, all_projects: bool) -> anyhow::Result<()> {
    let mut experiments = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = pb::ListFaultExperimentsRequest {
            parent: parent(global, all_projects),
            page_size: PAGE_SIZE,
            page_token,
            ..Default::default()
        };
        let answer = client.list_fault_experiments(request).await;
        let answer = answer.map_err(client::failed)?.into_inner();
        experiments.extend(answer.experiments);
        page_token = answer.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    if global.output == Format::Json {
        let values: anyhow::Result<Vec<_>> = experiments
            .iter()
            .map(|experiment| json::value("FaultExperiment", experiment))
            .collect();
        json::print(&values?.into());
        return Ok(());
    }
    let rows: Vec<Vec<String>> = experiments
        .iter()
        .map(|experiment| {
            let status = experiment.status.clone().unwrap_or_default();
            let hits: u64 = status.hits.iter().map(|hits| hits.hits).sum();
            vec![
                output::id(&experiment.name),
                fault_report::state(&status),
                fault_report::verdict(status.verdict()).to_owned(),
                hits.to_string(),
                output::age(experiment.create_time),
            ]
        })
        .collect();
    output::table(&["RUN", "STATE", "VERDICT", "HITS", "AGE"], &rows);
    Ok(())
}

fn show(global: &Global, experiment: &pb::FaultExperiment) -> anyhow::Result<()> {
    if global.output == Format::Json {
        json::print(&json::value("FaultExperiment", experiment)?);
        return Ok(());
    }
    let status = experiment.status.clone().unwrap_or_default();
    let spec = experiment.spec.clone().unwrap_or_default();
    output::fields(&[
        ("name", experiment.name.clone()),
        ("description", spec.description.clone()),
        ("state", fault_report::state(&status)),
        (
            "verdict",
            fault_report::verdict(status.verdict()).to_owned(),
        ),
        ("seed", spec.seed.to_string()),
        ("progress", status.progress.clone()),
        (
            "error",
            status
                .error
                .clone()
                .map_or(String::new(), |error| error.message),
        ),
        ("created", output::time(experiment.create_time)),
    ]);
    let rows: Vec<Vec<String>> = status
        .hits
        .iter()
        .map(|hits| {
            vec![
                hits.id.clone(),
                hits.begun.to_string(),
                hits.hits.to_string(),
                output::or_dash(&hits.problem),
            ]
        })
        .collect();
    if !rows.is_empty() {
        output::table(&["FAULT", "BEGUN", "HITS", "PROBLEM"], &rows);
    }
    Ok(())
}

fn print_library(global: &Global) {
    let overrides = Overrides {
        vm: Some("any".to_owned()),
        ..Overrides::default()
    };
    let rows: Vec<Vec<String>> = library::ENTRIES
        .iter()
        .map(|entry| {
            let read = campaign::parse(entry.text, entry.name, &global.project, &overrides);
            let spec = read.map(|campaign| campaign.spec).unwrap_or_default();
            let first = spec
                .description
                .split(['.', ':'])
                .next()
                .unwrap_or_default();
            vec![
                entry.name.to_owned(),
                format!("{} s", spec.duration_ms / 1000),
                first.trim().to_owned(),
            ]
        })
        .collect();
    output::table(&["CAMPAIGN", "LASTS", "WHAT IT DOES"], &rows);
}

fn print_kinds() {
    let rows: Vec<Vec<String>> = kinds::KINDS
        .iter()
        .map(|kind| {
            let optional = kind.optional.iter().map(|name| format!("[{name}]"));
            let required = kind.required.iter().map(|name| (*name).to_owned());
            let parameters: Vec<String> = required.chain(optional).collect();
            vec![
                kind.name.to_owned(),
                kind.group.to_owned(),
                output::or_dash(&parameters.join(" ")),
                kind.about.to_owned(),
            ]
        })
        .collect();
    output::table(&["KIND", "AT", "PARAMETERS", "WHAT HAPPENS"], &rows);
}
