//! A `GET /metrics` responder for Prometheus: HTTP/1.1, one answer a connection, bounded in
//! connections, time and request size.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Semaphore;

use crate::listen::Listener;

/// Scrapes answered at one time. A second Prometheus and a person with curl fit.
const MAX_CONNECTIONS: usize = 16;
/// For reading the request and for writing the answer, together.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);
/// A scrape's request line and headers are a few hundred bytes.
const MAX_REQUEST_BYTES: usize = 8192;

const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Answers `GET /metrics` with what `render` returns, for ever. Spawn it; abort it to end it.
///
/// # Errors
/// When the listener itself fails; a failing connection only ends that connection.
pub async fn serve_http<F>(listener: Listener, render: F) -> std::io::Result<()>
where
    F: Fn() -> String + Send + Sync + 'static,
{
    let render = Arc::new(render);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    match listener {
        Listener::Unix(listener, _file) => {
            listener.set_nonblocking(true)?;
            let listener = tokio::net::UnixListener::from_std(listener)?;
            loop {
                let slot = slots.clone().acquire_owned().await.expect("never closed");
                match listener.accept().await {
                    Ok((stream, _)) => spawn_answer(stream, render.clone(), slot),
                    Err(error) => pause_after(&error).await,
                }
            }
        }
        Listener::Tcp(listener) => {
            listener.set_nonblocking(true)?;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            loop {
                let slot = slots.clone().acquire_owned().await.expect("never closed");
                match listener.accept().await {
                    Ok((stream, _)) => spawn_answer(stream, render.clone(), slot),
                    Err(error) => pause_after(&error).await,
                }
            }
        }
        Listener::Tls(_) => Err(std::io::Error::new(
            std::io::ErrorKind::Unsupported,
            "metrics are served without TLS: name HOST:PORT or unix:PATH",
        )),
    }
}

/// Out of descriptors, most likely: accepting again at once would spin.
async fn pause_after(error: &std::io::Error) {
    tracing::warn!(%error, "metrics: cannot accept a connection");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

fn spawn_answer<S, F>(stream: S, render: Arc<F>, slot: tokio::sync::OwnedSemaphorePermit)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Fn() -> String + Send + Sync + 'static,
{
    tokio::spawn(async move {
        let _slot = slot;
        // A peer that hangs up or is slow is its own problem.
        let _ = tokio::time::timeout(CONNECTION_TIMEOUT, answer(stream, &*render)).await;
    });
}

async fn answer<S>(mut stream: S, render: &(dyn Fn() -> String + Sync)) -> std::io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let request = read_head(&mut stream).await?;
    let (status, body) = match request.as_deref().map(request_line) {
        Some(Some(("GET", "/metrics"))) => ("200 OK", render()),
        Some(Some(("GET", _))) => ("404 Not Found", "only /metrics is here\n".to_owned()),
        Some(Some(_)) => (
            "405 Method Not Allowed",
            "only GET is understood\n".to_owned(),
        ),
        Some(None) | None => ("400 Bad Request", "not an HTTP request\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {TEXT_FORMAT}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

/// Bytes up to the empty line; `None` if there are too many.
async fn read_head<S: AsyncRead + Unpin>(stream: &mut S) -> std::io::Result<Option<Vec<u8>>> {
    let mut head = Vec::new();
    let mut chunk = [0; 1024];
    loop {
        let len = stream.read(&mut chunk).await?;
        head.extend_from_slice(&chunk[..len]);
        if head.windows(4).any(|end| end == b"\r\n\r\n") || len == 0 {
            return Ok(Some(head));
        }
        if head.len() > MAX_REQUEST_BYTES {
            return Ok(None);
        }
    }
}

fn request_line(head: &[u8]) -> Option<(&str, &str)> {
    let line = head.split(|&byte| byte == b'\r').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let path = target.split('?').next()?;
    version.starts_with("HTTP/1.").then_some((method, path))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpStream;

    use super::*;
    use crate::listen;

    async fn ask(request: &[u8]) -> String {
        let listener = listen::tcp("127.0.0.1:0").unwrap();
        let addr = listener.address().to_string();
        let server = tokio::spawn(serve_http(listener, || "disks 3\n".to_owned()));
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        server.abort();
        answer
    }

    #[tokio::test]
    async fn scrape_gets_what_render_returns() {
        let answer = ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.ends_with("\r\n\r\ndisks 3\n"), "{answer}");
    }

    #[tokio::test]
    async fn other_paths_methods_and_noise_are_refused() {
        assert!(
            ask(b"GET / HTTP/1.1\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 404")
        );
        assert!(
            ask(b"POST /metrics HTTP/1.1\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 405")
        );
        assert!(
            ask(b"\x16\x03\x01\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 400")
        );
    }

    #[tokio::test]
    async fn endless_header_is_cut_off() {
        let mut request = b"GET /metrics HTTP/1.1\r\n".to_vec();
        request.resize(MAX_REQUEST_BYTES + 1, b'x');
        assert!(ask(&request).await.starts_with("HTTP/1.1 400"));
    }
}
