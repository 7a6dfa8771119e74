//! Connections that last no longer than what was believed when they were made: they are cut when the other
//! end's certificate ends, when whoever made it is trusted no more, and when it was withdrawn. Without this,
//! a stream that was opened in time would go on for years.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};
use tonic::transport::server::Connected;

use super::{Look, Withdrawn};

/// For a look that says it need not be repeated soon.
const MAX_INTERVAL: Duration = Duration::from_secs(60);
/// However soon a look wants to be repeated.
const MIN_INTERVAL: Duration = Duration::from_millis(10);

/// A connection whose peer is looked at again and again.
pub(crate) struct Lasting<S> {
    stream: S,
    watched: Option<Watched>,
    withdrawn: Option<Withdrawn>,
    /// Why it is cut, once it is.
    over: Option<String>,
}

struct Watched {
    look: Look,
    next: Pin<Box<Sleep>>,
}

impl<S> Lasting<S> {
    /// With a first look at once.
    pub(crate) fn new(stream: S, look: Option<Look>, withdrawn: Option<Withdrawn>) -> Self {
        let next = || Box::pin(tokio::time::sleep(Duration::ZERO));
        Self {
            stream,
            watched: look.map(|look| Watched { look, next: next() }),
            withdrawn,
            over: None,
        }
    }

    /// The error that a cut connection ends with. The task is woken when there is one.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Option<io::Error> {
        if self.over.is_none() {
            self.over = self.why_over(cx);
            if let Some(why) = &self.over {
                tracing::warn!(why, "cut a connection");
            }
        }
        self.error()
    }

    fn error(&self) -> Option<io::Error> {
        let why = self.over.clone()?;
        Some(io::Error::new(io::ErrorKind::ConnectionAborted, why))
    }

    fn why_over(&mut self, cx: &mut Context<'_>) -> Option<String> {
        if let Some(withdrawn) = &mut self.withdrawn
            && withdrawn.as_mut().poll(cx).is_ready()
        {
            self.withdrawn = None;
            return Some("what was believed of the other end counts no more".to_owned());
        }
        let watched = self.watched.as_mut()?;
        while watched.next.as_mut().poll(cx).is_ready() {
            match (watched.look)() {
                Ok(interval) => {
                    let interval = interval.clamp(MIN_INTERVAL, MAX_INTERVAL);
                    watched.next.as_mut().reset(Instant::now() + interval);
                }
                Err(why) => return Some(why),
            }
        }
        None
    }
}

impl<S: Connected> Connected for Lasting<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Lasting<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // HTTP/2 always waits for something to read, so this is where a connection in rest is woken.
        match self.poll_over(cx) {
            Some(error) => Poll::Ready(Err(error)),
            None => Pin::new(&mut self.stream).poll_read(cx, buffer),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Lasting<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.error() {
            Some(error) => Poll::Ready(Err(error)),
            None => Pin::new(&mut self.stream).poll_write(cx, bytes),
        }
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
        match self.error() {
            Some(error) => Poll::Ready(Err(error)),
            None => Pin::new(&mut self.stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn reader_at_rest_is_woken_when_the_peer_is_believed_no_more() {
        let (stream, _peer) = tokio::io::duplex(64);
        let mut looks = 0;
        let look: Look = Box::new(move || {
            looks += 1;
            match looks {
                1..=3 => Ok(Duration::from_millis(20)),
                _ => Err("it has expired".to_owned()),
            }
        });
        let begun = Instant::now();
        let mut lasting = Lasting::new(stream, Some(look), None);
        let error = lasting.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.to_string(), "it has expired");
        assert!(
            begun.elapsed() >= Duration::from_millis(60),
            "three looks were well"
        );
        assert!(
            lasting.write(&[1]).await.is_err(),
            "nothing goes out any more"
        );
    }

    #[tokio::test]
    async fn withdrawal_cuts_at_once_and_what_is_not_withdrawn_goes_on() {
        let (stream, mut peer) = tokio::io::duplex(64);
        let (held, mut receiver) = tokio::sync::watch::channel(());
        let withdrawn: Withdrawn =
            Box::pin(async move { while receiver.changed().await.is_ok() {} });
        let mut lasting = Lasting::new(stream, None, Some(withdrawn));
        peer.write_all(b"a").await.unwrap();
        assert_eq!(lasting.read_u8().await.unwrap(), b'a');
        drop(held);
        let error = lasting.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    }
}
