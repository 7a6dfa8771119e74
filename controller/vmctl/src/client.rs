//! The connection to the controller, what went wrong in words, and waiting for operations.

use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use api::connect::ConnectError;
use api::controller as pb;
use api::controller::operations_client::OperationsClient;
use api::controller::vms_client::VmsClient;
use api::tls;
use pki::{Credentials, Expect, Files};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::{Code, Request, Status};

use crate::cli::Global;

/// For a controller that should be there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// One call of WaitOperation; in between, progress is shown and a lost controller is noticed.
const WAIT_SLICE_MS: u32 = 1_000;
/// How long a controller that restarts may be away while an operation is waited for.
const AWAY_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two looks for a controller that is away.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);

/// The connection to the controller, with the caller's token in each request.
pub(crate) type Channel = InterceptedService<tonic::transport::Channel, Bearer>;

/// Says who asks.
#[derive(Clone, Default)]
pub(crate) struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            let metadata = request.metadata_mut();
            metadata.insert("authorization", token.clone());
        }
        Ok(request)
    }
}

impl Bearer {
    fn read(file: Option<&Path>) -> anyhow::Result<Self> {
        let Some(file) = file else {
            return Ok(Self(None));
        };
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read the token in {}", file.display()))?;
        let token = text.lines().next().unwrap_or_default().trim();
        let value = format!("Bearer {token}")
            .parse::<MetadataValue<Ascii>>()
            .ok();
        let Some(mut value) = value.filter(|_| !token.is_empty()) else {
            bail!("{} has no token in its first line", file.display());
        };
        value.set_sensitive(true);
        Ok(Self(Some(value)))
    }
}

/// Connects to the controller.
///
/// # Errors
/// When none answers, saying how to start one.
pub(crate) async fn connect(global: &Global) -> anyhow::Result<Channel> {
    // What cannot be read is no reason to look for another controller.
    Bearer::read(global.token_file.as_deref())?;
    let tls = tls(global)?;
    let endpoint = &global.endpoint;
    if endpoint.is_tls() && tls.is_none() {
        bail!(
            "{endpoint}: name who vouches for the controller with --ca or MORTISE_CA; `vmctl ca show --pem` on its machine prints it"
        );
    }
    if global.token_file.is_some() && !endpoint.is_private() && !global.insecure {
        bail!(
            "the token would go to {endpoint} for everybody on the way to read; write --endpoint https://... with --ca, or add --insecure"
        );
    }
    try_connect(global, CONNECT_TIMEOUT).await.map_err(|error| match error.is_distrust() {
        true => anyhow!("{error}"),
        false => anyhow!(
            "{error}; start a controller with `controller --standalone`, or name another address with --endpoint or MORTISE_ENDPOINT"
        ),
    })
}

/// Connects to the controller, if there is one.
///
/// # Errors
/// When none answers in time.
pub(crate) async fn try_connect(
    global: &Global,
    timeout: Duration,
) -> Result<Channel, ConnectError> {
    let tls = tls(global).unwrap_or_default();
    let channel = api::connect::secured(&global.endpoint, tls.as_ref(), timeout).await?;
    let bearer = Bearer::read(global.token_file.as_deref()).unwrap_or_default();
    Ok(InterceptedService::new(channel, bearer))
}

/// What is shown and believed, if somebody is named who vouches for controllers.
fn tls(global: &Global) -> anyhow::Result<Option<tls::Client>> {
    let Some(authorities) = &global.ca else {
        return Ok(None);
    };
    let identity = global.tls_cert.clone().zip(global.tls_key.clone());
    let credentials = Credentials::of_files(Files {
        identity,
        authorities: authorities.clone(),
    })?;
    Ok(Some(tls::Client::new(move || {
        credentials.client(Expect::Controller)
    })))
}

/// An answer of the API in words.
pub(crate) fn failed(status: Status) -> anyhow::Error {
    if let Some(why) = tls::distrust(&status) {
        return anyhow!("no trust between here and the controller: {why}");
    }
    let text = api::errors::explain(&status);
    match status.code() {
        Code::Unavailable if api::errors::reason(&status).is_none() => {
            anyhow!("the controller does not answer: {text}")
        }
        Code::Unimplemented => {
            anyhow!("the controller does not know this; it may be older than vmctl ({text})")
        }
        _ => anyhow!(text),
    }
}

/// Waits for an operation, showing progress unless `quiet`.
///
/// # Errors
/// When it failed, `timeout` has passed, or the controller is gone for good.
pub(crate) async fn wait(
    global: &Global,
    channel: &Channel,
    operation: pb::Operation,
    what: &str,
    timeout: Option<Duration>,
) -> anyhow::Result<pb::Operation> {
    wait_until(global, channel, operation, what, timeout, |_| false).await
}

/// As [`wait`], and also back as soon as `enough` says so.
///
/// # Errors
/// As [`wait`].
pub(crate) async fn wait_until(
    global: &Global,
    channel: &Channel,
    operation: pb::Operation,
    what: &str,
    timeout: Option<Duration>,
    enough: impl Fn(&pb::Operation) -> bool,
) -> anyhow::Result<pb::Operation> {
    let mut client = OperationsClient::new(channel.clone());
    let mut progress = Progress::new(global.quiet, what);
    let begun = Instant::now();
    let mut answered = Instant::now();
    let mut operation = operation;
    while !operation.done && !enough(&operation) {
        if timeout.is_some_and(|timeout| begun.elapsed() >= timeout) {
            let name = operation.name;
            return Err(anyhow!(
                "{what}: not done in time; wait on with `vmctl op wait {name}`"
            ));
        }
        let request = pb::WaitOperationRequest {
            name: operation.name.clone(),
            timeout_ms: WAIT_SLICE_MS,
        };
        match client.wait_operation(request).await {
            Ok(answer) => {
                operation = answer.into_inner();
                answered = Instant::now();
            }
            // Operations survive a controller's restart; so does waiting.
            Err(status) if is_away(&status) && answered.elapsed() < AWAY_TIMEOUT => {
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
            Err(status) => return Err(failed(status)),
        }
        let metadata = operation.metadata.clone().unwrap_or_default();
        match metadata.total_bytes {
            0 => progress.show(&metadata.progress),
            total => progress.show_bytes(&metadata.progress, metadata.done_bytes, total),
        }
    }
    drop(progress);
    match &operation.error {
        None => Ok(operation),
        Some(error) => Err(anyhow!("{what}: {}", error.message)),
    }
}

/// Whether the answer means that nobody is there at the moment.
pub(crate) fn is_away(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::Cancelled | Code::Unknown
    )
}

/// One VM.
///
/// # Errors
/// When there is none, or the controller does not answer.
pub(crate) async fn get_vm(channel: &Channel, name: &str) -> Result<pb::Vm, Status> {
    let request = pb::GetVmRequest {
        name: name.to_owned(),
    };
    VmsClient::new(channel.clone())
        .get_vm(request)
        .await
        .map(tonic::Response::into_inner)
}

/// What goes on, on stderr: one line that changes if that is a terminal, else a line for each change
/// once it takes longer than [`PATIENCE`].
pub(crate) struct Progress {
    quiet: bool,
    terminal: bool,
    what: String,
    detail: String,
    begun: Instant,
}

/// What is done sooner needs no words in a log.
const PATIENCE: Duration = Duration::from_secs(5);

impl Progress {
    /// Nothing shown yet.
    pub(crate) fn new(quiet: bool, what: &str) -> Self {
        Self {
            quiet,
            terminal: std::io::stderr().is_terminal(),
            what: what.to_owned(),
            detail: String::new(),
            begun: Instant::now(),
        }
    }

    /// Shows `detail` as what is waited for now.
    pub(crate) fn show(&mut self, detail: &str) {
        if self.quiet {
            return;
        }
        let seconds = self.begun.elapsed().as_secs();
        if self.terminal {
            let colon = if detail.is_empty() { "" } else { ": " };
            eprint!("\r\x1b[K{} ({seconds}s){colon}{detail}", self.what);
            let _ = std::io::stderr().flush();
        } else if self.begun.elapsed() >= PATIENCE && self.detail != detail {
            eprintln!("{} ({seconds}s): {detail}", self.what);
            self.detail = detail.to_owned();
        }
    }

    /// Shows how far something is, as a bar where that can be seen.
    pub(crate) fn show_bytes(&mut self, stage: &str, done: u64, total: u64) {
        let share = crate::output::share(done, total);
        if self.terminal {
            let filled = (u128::from(done) * BAR_CELLS as u128).checked_div(u128::from(total));
            let filled = filled.unwrap_or(0).min(BAR_CELLS as u128) as usize;
            let bar = "#".repeat(filled) + &"-".repeat(BAR_CELLS - filled);
            self.show(&format!("{stage} [{bar}] {share}"));
        } else {
            // A line for each tenth, not for each answer.
            let tenth = (u128::from(done) * 10).checked_div(u128::from(total));
            let percent = tenth.unwrap_or(0) * 10;
            self.show(&format!(
                "{stage} {percent} % of {}",
                crate::output::size(total)
            ));
        }
    }
}

/// Of a progress bar.
const BAR_CELLS: usize = 24;

impl Drop for Progress {
    fn drop(&mut self) {
        if self.terminal && !self.quiet {
            eprint!("\r\x1b[K");
            let _ = std::io::stderr().flush();
        }
    }
}

/// A fresh id for a request that may be repeated.
pub(crate) fn request_id(given: Option<String>) -> String {
    given.unwrap_or_else(|| uuid::Uuid::new_v4().to_string())
}
