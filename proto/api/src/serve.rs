//! Every gRPC server of Mortise is built here, so that all of them answer health checks and
//! reflection and end in the same way: at shutdown no new call is accepted, calls in progress get
//! [`DRAIN_TIMEOUT`], then open streams are cut.

mod admission;

use std::convert::Infallible;
use std::future::Future;
use std::path::Path;
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use nix::sys::signal::{SigSet, Signal};
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::ServingStatus;

use crate::FILE_DESCRIPTOR_SET;
use crate::listen::{self, ListenError, Listener};
use crate::tls;
use admission::{admit, secure};

/// How long calls in progress may take to finish once shutdown was asked for. Watches and consoles
/// never finish by themselves.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// Calls and streams that one connection may have open.
const MAX_STREAMS_PER_CONNECTION: u32 = 256;

/// A peer that went away without a word is noticed after this and [`KEEPALIVE_TIMEOUT`].
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// The services of one server.
#[derive(Debug, Default)]
pub struct Services {
    routes: Routes,
    names: Vec<&'static str>,
}

impl Services {
    /// No services yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a generated `*Server`.
    #[must_use]
    pub fn with<S>(mut self, service: S) -> Self
    where
        S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        self.routes = self.routes.add_service(service);
        self.names.push(S::NAME);
        self
    }

    /// Adds health and reflection (v1, and v1alpha for older clients) for what was added before.
    async fn with_standard_services(self) -> Result<Routes, ServeError> {
        let (health, health_server) = tonic_health::server::health_reporter();
        for name in &self.names {
            health
                .set_service_status(name, ServingStatus::Serving)
                .await;
        }
        let reflection = || {
            let mut builder = tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .with_service_name("grpc.health.v1.Health");
            for name in &self.names {
                builder = builder.with_service_name(*name);
            }
            builder
        };
        let v1 = reflection()
            .with_service_name("grpc.reflection.v1.ServerReflection")
            .build_v1();
        let v1alpha = reflection()
            .with_service_name("grpc.reflection.v1alpha.ServerReflection")
            .build_v1alpha();
        Ok(self
            .routes
            .add_service(health_server)
            .add_service(v1.map_err(ServeError::Reflection)?)
            .add_service(v1alpha.map_err(ServeError::Reflection)?))
    }
}

/// Binds the Unix socket `path` and serves on it until `shutdown` completes.
///
/// # Errors
/// When the socket cannot be bound; see [`listen::unix`].
pub async fn unix(
    path: &Path,
    services: Services,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    on(listen::unix(path)?, services, shutdown).await
}

/// Binds `addr` (`HOST:PORT`) and serves on it until `shutdown` completes.
///
/// # Errors
/// When the address cannot be bound; see [`listen::tcp`].
pub async fn tcp(
    addr: &str,
    services: Services,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    on(listen::tcp(addr)?, services, shutdown).await
}

/// Serves on a socket that was bound before: by a process that locked itself in since, or that had
/// to know the port.
///
/// # Errors
/// When the socket fails.
pub async fn on(
    listener: Listener,
    services: Services,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    on_all(vec![listener], None, services, shutdown).await
}

/// Serves the same on several sockets; `tls` is for those where it is spoken.
///
/// # Errors
/// When a socket fails, or TLS is to be spoken and `tls` is not there.
pub async fn on_all(
    listeners: Vec<Listener>,
    tls: Option<tls::Server>,
    services: Services,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    let routes = services.with_standard_services().await?;
    let (stop, stopped) = watch::channel(false);
    let mut serving = FuturesUnordered::new();
    for listener in listeners {
        serving.push(one(listener, tls.clone(), routes.clone(), stopped.clone()));
    }
    let cut = async {
        shutdown.await;
        let _ = stop.send(true);
        tokio::time::sleep(DRAIN_TIMEOUT).await;
    };
    let all = async {
        while let Some(served) = serving.next().await {
            served?;
        }
        Ok(())
    };
    tokio::select! {
        served = all => served,
        () = cut => Ok(()),
    }
}

async fn one(
    listener: Listener,
    tls: Option<tls::Server>,
    routes: Routes,
    mut stopped: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    let server = Server::builder()
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_routes(routes);
    let stop_accepting = async move {
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    match listener {
        Listener::Unix(listener, _file) => {
            listener.set_nonblocking(true).map_err(ServeError::Socket)?;
            let listener = tokio::net::UnixListener::from_std(listener);
            let (admitted, incoming) = mpsc::channel(1);
            let accepting = admit(listener.map_err(ServeError::Socket)?, admitted);
            let incoming = ReceiverStream::new(incoming);
            tokio::select! {
                served = server.serve_with_incoming_shutdown(incoming, stop_accepting) => served,
                () = never_again(accepting) => Ok(()),
            }
        }
        Listener::Tcp(listener) => {
            let (admitted, incoming) = mpsc::channel(1);
            let accepting = admit(tcp_listener(listener)?, admitted);
            let incoming = ReceiverStream::new(incoming);
            tokio::select! {
                served = server.serve_with_incoming_shutdown(incoming, stop_accepting) => served,
                () = never_again(accepting) => Ok(()),
            }
        }
        Listener::Tls(listener) => {
            let tls = tls.ok_or(ServeError::NoCertificate)?;
            let (accepted, connections) = mpsc::channel(1);
            let (admitted, incoming) = mpsc::channel(1);
            let accepting = admit(tcp_listener(listener)?, accepted);
            let securing = secure(connections, tls, admitted);
            let accepting = async { tokio::join!(accepting, securing) };
            let incoming = ReceiverStream::new(incoming);
            tokio::select! {
                served = server.serve_with_incoming_shutdown(incoming, stop_accepting) => served,
                () = never_again(async { accepting.await; }) => Ok(()),
            }
        }
    }
    .map_err(ServeError::Transport)
}

fn tcp_listener(listener: std::net::TcpListener) -> Result<tokio::net::TcpListener, ServeError> {
    listener.set_nonblocking(true).map_err(ServeError::Socket)?;
    tokio::net::TcpListener::from_std(listener).map_err(ServeError::Socket)
}

/// Accepting ends before serving does: connections in progress go on.
async fn never_again(accepting: impl Future<Output = ()>) {
    accepting.await;
    std::future::pending().await
}

/// Makes SIGTERM and SIGINT wait until [`terminated`] listens for them; otherwise one that comes
/// while a process starts up kills it. For a process that serves guests before it serves its
/// control socket. Call it on the thread that will await [`terminated`], before it starts others.
pub fn hold_termination() {
    // Fails for invalid arguments only.
    let _ = termination_signals().thread_block();
}

/// Completes at the first SIGTERM or SIGINT: the `shutdown` of every daemon. From the call on, not
/// only from the first poll, these no longer kill the process: call it before telling anybody that
/// the process is ready.
///
/// # Panics
/// Outside a tokio runtime, or when signal handlers cannot be installed.
pub fn terminated() -> impl Future<Output = ()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).expect("SIGTERM can be handled");
    let mut interrupt = signal(SignalKind::interrupt()).expect("SIGINT can be handled");
    // One that was held is delivered now.
    let _ = termination_signals().thread_unblock();
    async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}

fn termination_signals() -> SigSet {
    SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT])
}

/// Why a server could not run.
#[derive(Debug, Error)]
pub enum ServeError {
    /// Its socket could not be bound.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Its socket could not be used.
    #[error("cannot serve on the socket")]
    Socket(#[source] std::io::Error),
    /// TLS is to be spoken.
    #[error("cannot speak TLS: there is no certificate to show")]
    NoCertificate,
    /// The compiled-in descriptors are damaged.
    #[error("cannot build the reflection service")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// HTTP/2 failed.
    #[error("the gRPC server failed")]
    Transport(#[source] tonic::transport::Error),
}

#[cfg(test)]
mod tests;
