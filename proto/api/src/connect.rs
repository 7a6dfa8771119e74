//! Channels to Mortise's servers. A channel reconnects by itself; connecting the first time either
//! succeeds within the deadline or says which address did not answer.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use crate::listen::Address;
use crate::tls::{self, Lasting};

/// Between two attempts within the deadline, at first and at most: a process that was just started
/// listens in milliseconds, and guests may be waiting for it.
const RETRY_INTERVALS: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);

/// Connects to an address where no TLS is spoken, trying again until `timeout` has passed.
///
/// # Errors
/// When nobody answered in time.
pub async fn address(address: &Address, timeout: Duration) -> Result<Channel, ConnectError> {
    secured(address, None, timeout).await
}

/// Connects to any kind of address, trying again until `timeout` has passed; `tls` is for those where it
/// is spoken.
///
/// # Errors
/// When nobody answered in time, or one end does not trust the other.
pub async fn secured(
    address: &Address,
    tls: Option<&tls::Client>,
    timeout: Duration,
) -> Result<Channel, ConnectError> {
    match (address, tls) {
        (Address::Unix(path), _) => unix(path, timeout).await,
        (Address::Tcp(addr), _) => tcp(addr, timeout).await,
        (Address::Tls(addr), Some(tls)) => over_tls(addr, tls, timeout).await,
        (Address::Tls(_), None) => Err(ConnectError {
            address: address.clone(),
            distrust: Some("no authority was named that vouches for it".to_owned()),
            source: None,
        }),
    }
}

async fn over_tls(
    addr: &str,
    tls: &tls::Client,
    timeout: Duration,
) -> Result<Channel, ConnectError> {
    let address = Address::Tls(addr.to_owned());
    // TLS is the connector's: to the channel the stream is a plain one.
    let endpoint = endpoint(addr, &address)?;
    let endpoint = tuned(endpoint, timeout);
    retry(address, timeout, || {
        let (addr, tls) = (addr.to_owned(), tls.clone());
        endpoint.connect_with_connector(service_fn(move |_: Uri| {
            connect_tls(addr.clone(), tls.clone())
        }))
    })
    .await
}

async fn connect_tls(
    addr: String,
    tls: tls::Client,
) -> io::Result<TokioIo<Lasting<TlsStream<TcpStream>>>> {
    let host = addr
        .rsplit_once(':')
        .map_or(addr.as_str(), |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let config = tls.config()?;
    let stream = TcpStream::connect(&addr).await?;
    stream.set_nodelay(true)?;
    let connecting = TlsConnector::from(config).connect(name.clone(), stream);
    let stream = connecting.await?;
    let look = tls.look(stream.get_ref().1.peer_certificates(), name);
    let withdrawn = tls.withdrawn();
    Ok(TokioIo::new(Lasting::new(stream, look, withdrawn)))
}

fn endpoint(addr: &str, address: &Address) -> Result<Endpoint, ConnectError> {
    Endpoint::from_shared(format!("http://{addr}")).map_err(|source| ConnectError {
        address: address.clone(),
        distrust: None,
        source: Some(source),
    })
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
    let endpoint = tuned(endpoint(addr, &address)?, timeout);
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
            Ok(Err(error)) => {
                // Waiting does not make anybody trusted.
                if let Some(distrust) = tls::distrust(&error) {
                    return Err(ConnectError {
                        address,
                        distrust: Some(distrust),
                        source: None,
                    });
                }
                last = Some(error);
            }
            Err(_elapsed) => {}
        }
        if Instant::now() + interval >= deadline {
            return Err(ConnectError {
                address,
                distrust: None,
                source: last,
            });
        }
        tokio::time::sleep(interval).await;
        interval = (interval * 2).min(RETRY_INTERVALS.1);
    }
}

/// Nobody answered, or nobody who is trusted.
#[derive(Debug, Error)]
#[error("{}", self.words())]
pub struct ConnectError {
    address: Address,
    distrust: Option<String>,
    #[source]
    source: Option<tonic::transport::Error>,
}

impl ConnectError {
    /// Somebody answers, and one end does not trust the other.
    pub fn is_distrust(&self) -> bool {
        self.distrust.is_some()
    }

    fn words(&self) -> String {
        match &self.distrust {
            Some(why) => format!("no trust between here and {}: {why}", self.address),
            None => format!("nothing answers at {}", self.address),
        }
    }
}
