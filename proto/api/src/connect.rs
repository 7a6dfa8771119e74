//! Channels to Mortise's servers. A channel reconnects by itself; connecting the first time either
//! succeeds within the deadline or says which address did not answer.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use crate::listen::Address;

/// Between two attempts within the deadline, at first and at most: a process that was just started
/// listens in milliseconds, and guests may be waiting for it.
const RETRY_INTERVALS: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);

/// Connects to either kind of address, trying again until `timeout` has passed.
///
/// # Errors
/// When nobody answered in time.
pub async fn address(address: &Address, timeout: Duration) -> Result<Channel, ConnectError> {
    match address {
        Address::Unix(path) => unix(path, timeout).await,
        Address::Tcp(addr) => tcp(addr, timeout).await,
    }
}

/// Connects to the Unix socket at `path`, which need not exist yet, trying again until `timeout`
/// has passed.
///
/// # Errors
/// When nobody answered in time.
pub async fn unix(path: &Path, timeout: Duration) -> Result<Channel, ConnectError> {
    // The authority is never looked at on a Unix socket, but HTTP/2 wants one.
    let endpoint = tuned(Endpoint::from_static("http://localhost"), timeout);
    let path = path.to_owned();
    retry(Address::Unix(path.clone()), timeout, || {
        let path = path.clone();
        endpoint.connect_with_connector(service_fn(move |_: Uri| connect_stream(path.clone())))
    })
    .await
}

/// Connects to `addr` (`HOST:PORT`), trying again until `timeout` has passed.
///
/// # Errors
/// When nobody answered in time, or `addr` is no address.
pub async fn tcp(addr: &str, timeout: Duration) -> Result<Channel, ConnectError> {
    let address = Address::Tcp(addr.to_owned());
    let endpoint =
        Endpoint::from_shared(format!("http://{addr}")).map_err(|source| ConnectError {
            address: address.clone(),
            source: Some(source),
        })?;
    let endpoint = tuned(endpoint, timeout);
    retry(address, timeout, || endpoint.connect()).await
}

async fn connect_stream(path: PathBuf) -> io::Result<TokioIo<UnixStream>> {
    UnixStream::connect(path).await.map(TokioIo::new)
}

fn tuned(endpoint: Endpoint, timeout: Duration) -> Endpoint {
    endpoint
        .connect_timeout(timeout)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_INTERVAL)
        .tcp_nodelay(true)
}

async fn retry<F>(
    address: Address,
    timeout: Duration,
    mut connect: impl FnMut() -> F,
) -> Result<Channel, ConnectError>
where
    F: Future<Output = Result<Channel, tonic::transport::Error>>,
{
    let deadline = Instant::now() + timeout;
    let mut last = None;
    let mut interval = RETRY_INTERVALS.0;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, connect()).await {
            Ok(Ok(channel)) => return Ok(channel),
            Ok(Err(error)) => last = Some(error),
            Err(_elapsed) => {}
        }
        if Instant::now() + interval >= deadline {
            return Err(ConnectError {
                address,
                source: last,
            });
        }
        tokio::time::sleep(interval).await;
        interval = (interval * 2).min(RETRY_INTERVALS.1);
    }
}

/// Nobody answered.
#[derive(Debug, Error)]
#[error("nothing answers at {address}")]
pub struct ConnectError {
    address: Address,
    #[source]
    source: Option<tonic::transport::Error>,
}
