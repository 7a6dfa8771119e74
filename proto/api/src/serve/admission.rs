//! Accepting no more connections than a server can hold. Those beyond wait in the backlog, and a
//! process that runs out of descriptors pauses instead of spinning.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use crate::tls::{self, Lasting};

/// Connections that one server holds: a host's controllers, people and their consoles.
pub(super) const MAX_CONNECTIONS: usize = 256;
/// After a failed accept; the cause, most likely missing descriptors, does not go away at once.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// For both ends to show who they are.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection by TLS, for as long as the client's certificate is believed.
pub(super) type Secured = Lasting<TlsStream<Admitted<TcpStream>>>;

/// What connections come from.
pub(super) trait Accept {
    /// One connection.
    type Stream;
    /// Waits for the next.
    fn accept_one(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Accept for UnixListener {
    type Stream = UnixStream;

    async fn accept_one(&self) -> io::Result<UnixStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    async fn accept_one(&self) -> io::Result<TcpStream> {
        let (stream, _) = self.accept().await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// Passes connections on, at most [`MAX_CONNECTIONS`] at one time. Ends when nobody takes them any
/// more.
pub(super) async fn admit<L: Accept>(
    listener: L,
    admitted: mpsc::Sender<io::Result<Admitted<L::Stream>>>,
) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let slot = slots.clone().acquire_owned().await.expect("never closed");
        match listener.accept_one().await {
            Ok(stream) => {
                let connection = Admitted {
                    stream,
                    _slot: slot,
                };
                if admitted.send(Ok(connection)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        }
    }
}

/// Speaks TLS on connections, which many may begin at one time, and passes those on whose peers are
/// believed. Ends when nobody takes them any more.
pub(super) async fn secure(
    mut connections: mpsc::Receiver<io::Result<Admitted<TcpStream>>>,
    tls: tls::Server,
    admitted: mpsc::Sender<io::Result<Secured>>,
) {
    let mut handshakes = JoinSet::new();
    loop {
        tokio::select! {
            connection = connections.recv() => {
                let Some(Ok(connection)) = connection else { return };
                handshakes.spawn(shake_hands(connection, tls.clone(), admitted.clone()));
            }
            Some(_) = handshakes.join_next() => {}
        }
    }
}

async fn shake_hands(
    connection: Admitted<TcpStream>,
    tls: tls::Server,
    admitted: mpsc::Sender<io::Result<Secured>>,
) {
    let peer = connection.stream.peer_addr();
    let peer = peer.map(|peer| peer.to_string()).unwrap_or_default();
    let config = match tls.config() {
        Ok(config) => config,
        Err(error) => {
            tracing::error!(peer, %error, "cannot speak TLS");
            return;
        }
    };
    let handshake = TlsAcceptor::from(config).accept(connection);
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
        Ok(Ok(stream)) => {
            let look = tls.look(stream.get_ref().1.peer_certificates());
            drop(admitted.send(Ok(Lasting::new(stream, look, None))).await);
        }
        Ok(Err(error)) => {
            let why = tls::distrust(&error).unwrap_or_else(|| error.to_string());
            tracing::warn!(peer, why, "refused a connection");
        }
        Err(_) => tracing::warn!(peer, "a connection that began no TLS in time was closed"),
    }
}

/// A connection that counts until it is closed.
#[derive(Debug)]
pub(super) struct Admitted<S> {
    stream: S,
    _slot: OwnedSemaphorePermit,
}

impl<S: Connected> Connected for Admitted<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Admitted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Admitted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
