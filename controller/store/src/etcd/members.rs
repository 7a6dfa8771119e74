//! Which member is asked, how long, and what its errors mean.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{
    Certificate, Channel, Client, ConnectOptions, Error as EtcdError, Identity, TlsOptions,
};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tonic::transport::Endpoint;
use tonic::{Code, ConnectError, Status};

use super::EtcdOptions;
use crate::StoreError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// For one member's answer; another is asked then.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// For a transaction's answer, which cannot be asked of another. etcd itself gives up after 7 s.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(8);
/// For all attempts. An election among the members takes some seconds.
const DEADLINE: Duration = Duration::from_secs(10);
/// Between attempts.
const PAUSE: Duration = Duration::from_millis(100);
/// Connections without an answer to this are given up.
const PING_INTERVAL: Duration = Duration::from_secs(2);
const PING_TIMEOUT: Duration = Duration::from_secs(3);
/// The largest answer: a page of the largest values etcd takes.
const MAX_ANSWER_BYTES: usize = 512 << 20;

/// Connections to the members.
pub(super) struct Members {
    members: Vec<Member>,
    options: ConnectOptions,
    /// The one that answered last.
    current: AtomicUsize,
}

struct Member {
    endpoint: Endpoint,
    client: Mutex<Option<Client>>,
}

/// What etcd's errors mean.
#[derive(Debug)]
pub(super) enum Failure {
    /// It was not reached: it may be tried again, here or elsewhere.
    NotDone(BoxError),
    /// Nobody knows.
    InDoubt(BoxError),
    /// The revision is no longer kept.
    Compacted,
    /// The revision is yet to come.
    Future,
    NoLease,
    Full(BoxError),
    Other(BoxError),
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl Members {
    pub(super) fn new(options: &EtcdOptions) -> Result<Self, StoreError> {
        let mut members = Vec::new();
        for address in &options.endpoints {
            let wrong = |error: BoxError| {
                StoreError::Backend(format!("etcd endpoint {address}: {error}").into())
            };
            let mut endpoint = Endpoint::from_shared(address.clone())
                .map_err(|error| wrong(error.into()))?
                .connect_timeout(CONNECT_TIMEOUT)
                .http2_keep_alive_interval(PING_INTERVAL)
                .keep_alive_timeout(PING_TIMEOUT)
                .keep_alive_while_idle(true)
                .tcp_nodelay(true);
            if address.starts_with("https://") {
                let tls = tls(options).map_err(wrong)?;
                endpoint = endpoint
                    .tls_config(tls)
                    .map_err(|error| wrong(error.into()))?;
            }
            members.push(Member {
                endpoint,
                client: Mutex::default(),
            });
        }
        if members.is_empty() {
            return Err(StoreError::Backend("no etcd endpoint is given".into()));
        }
        // A member that lost the majority must say so, and not be believed.
        let mut connect = ConnectOptions::new().with_require_leader(true);
        if let Some((name, password)) = &options.user {
            connect = connect
                .with_user(name, password)
                .with_auto_token_refresh(true);
        }
        Ok(Self {
            members,
            options: connect,
            current: AtomicUsize::new(0),
        })
    }

    /// What may be asked twice.
    pub(super) async fn read<T, F>(&self, ask: impl Fn(Client) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, EtcdError>>,
    {
        self.attempt(ask, ANSWER_TIMEOUT, true).await
    }

    /// What must not happen twice.
    pub(super) async fn write<T, F>(&self, ask: impl Fn(Client) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, EtcdError>>,
    {
        self.attempt(ask, COMMIT_TIMEOUT, false).await
    }

    async fn attempt<T, F>(
        &self,
        ask: impl Fn(Client) -> F,
        patience: Duration,
        repeatable: bool,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, EtcdError>>,
    {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let index = self.current.load(Ordering::Relaxed);
            let failure = match self.client(index).await {
                Ok(client) => match tokio::time::timeout(patience, ask(client)).await {
                    Ok(Ok(answer)) => return Ok(answer),
                    Ok(Err(error)) => classify(error),
                    Err(_) => Failure::InDoubt("it did not answer in time".into()),
                },
                Err(failure) => failure,
            };
            let again = match failure {
                Failure::NotDone(_) => true,
                Failure::InDoubt(_) => repeatable,
                _ => return Err(failure),
            };
            self.leave(index).await;
            if !again || Instant::now() + PAUSE >= deadline {
                return Err(failure);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// As [`Self::leave`], for the one that is asked now.
    pub(super) async fn leave_current(&self) {
        self.leave(self.current.load(Ordering::Relaxed)).await;
    }

    /// A client of the member that answered last.
    pub(super) async fn any(&self) -> Result<(usize, Client), Failure> {
        let index = self.current.load(Ordering::Relaxed);
        let client = self.client(index).await?;
        Ok((index, client))
    }

    async fn client(&self, index: usize) -> Result<Client, Failure> {
        let member = &self.members[index % self.members.len()];
        let mut kept = member.client.lock().await;
        if let Some(client) = &*kept {
            return Ok(client.clone());
        }
        let not_done = |error: BoxError| {
            let text = format!("{}: {}", member.endpoint.uri(), causes(&*error));
            Failure::NotDone(text.into())
        };
        let connect = async {
            let channel = member.endpoint.connect().await;
            let channel = Channel::Tonic(channel.map_err(|error| not_done(error.into()))?);
            let client = Client::from_channel(channel, Some(self.options.clone()));
            client.await.map_err(classify)
        };
        let client = match tokio::time::timeout(CONNECT_TIMEOUT + ANSWER_TIMEOUT, connect).await {
            Ok(client) => client?,
            Err(_) => return Err(not_done("it did not answer in time".into())),
        };
        Ok(kept.insert(client).clone())
    }

    /// Asks another member from now on, and connects anew to this one when its turn comes.
    pub(super) async fn leave(&self, index: usize) {
        *self.members[index % self.members.len()].client.lock().await = None;
        let next = (index + 1) % self.members.len();
        // Somebody else may have gone on already.
        let _ = self
            .current
            .compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// The clients for what has large answers.
pub(super) fn roomy(client: &Client) -> (etcd_client::KvClient, etcd_client::WatchClient) {
    (
        client
            .kv_client()
            .max_decoding_message_size(MAX_ANSWER_BYTES),
        client
            .watch_client()
            .max_decoding_message_size(MAX_ANSWER_BYTES),
    )
}

fn tls(options: &EtcdOptions) -> Result<TlsOptions, BoxError> {
    let read = |path: &std::path::Path| {
        std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
    };
    let mut tls = TlsOptions::new();
    if let Some(ca) = &options.tls.ca {
        tls = tls.ca_certificate(Certificate::from_pem(read(ca)?));
    }
    if let Some((certificate, key)) = &options.tls.identity {
        tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    Ok(tls)
}

/// What an error of the client means. etcd tells some apart by their text alone.
pub(super) fn classify(error: EtcdError) -> Failure {
    let status = match error {
        EtcdError::GRpcStatus(status) => status,
        EtcdError::LeaseKeepAliveError(text) if text.contains("not found") => {
            return Failure::NoLease;
        }
        EtcdError::TransportError(error) => return Failure::NotDone(error.into()),
        EtcdError::InvalidArgs(_) | EtcdError::InvalidUri(_) => {
            return Failure::Other(error.into());
        }
        error => return Failure::InDoubt(error.into()),
    };
    let text = status.message();
    match status.code() {
        _ if text.contains("has been compacted") => Failure::Compacted,
        _ if text.contains("future revision") => Failure::Future,
        _ if text.contains("lease not found") => Failure::NoLease,
        _ if text.contains("space exceeded") => Failure::Full(status.into()),
        // Both are said before anything is proposed to the members.
        _ if text.contains("too many requests") || text.ends_with("no leader") => {
            Failure::NotDone(status.into())
        }
        Code::Unavailable if is_unconnected(&status) => Failure::NotDone(status.into()),
        Code::Unavailable
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::Cancelled
        | Code::Internal
        | Code::Aborted => Failure::InDoubt(status.into()),
        _ => Failure::Other(status.into()),
    }
}

/// There was no connection to send it on.
fn is_unconnected(status: &Status) -> bool {
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        if cause.is::<ConnectError>() {
            return true;
        }
        source = cause.source();
    }
    false
}

fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

impl Failure {
    pub(super) fn into_error(self) -> StoreError {
        match self {
            Self::NotDone(error) => StoreError::Unavailable(error),
            Self::InDoubt(error) => StoreError::InDoubt(error),
            Self::Full(error) => StoreError::Full(error),
            Self::Other(error) => StoreError::Backend(error),
            Self::Compacted => StoreError::Backend("its history is forgotten too soon".into()),
            Self::Future => StoreError::Backend("it is asked for a revision to come".into()),
            Self::NoLease => StoreError::Backend("it has no such lease".into()),
        }
    }
}
