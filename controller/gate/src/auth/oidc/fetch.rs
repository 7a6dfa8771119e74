//! Where a provider's keys come from: a file, or one HTTP GET. HTTPS needs a certificate that the
//! system's bundle, or one that is named, vouches for.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use jsonwebtoken::jwk::JwkSet;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::codegen::Bytes;
use tonic::codegen::http::{Request, StatusCode, Uri};

/// For the whole of it.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Large providers have a few KiB of keys.
const MAX_BYTES: usize = 1 << 20;
/// Where systems have the certificates of the authorities that they trust.
const BUNDLES: [&str; 3] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];

/// A JWKS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Read again now and then.
    File(PathBuf),
    /// `http://` or `https://`.
    Url {
        /// The whole of it.
        url: String,
        /// PEM; without it the system's.
        authorities: Option<PathBuf>,
    },
}

impl Source {
    /// A path, or a URL if it begins like one.
    pub fn new(text: &str, authorities: Option<PathBuf>) -> Self {
        if text.starts_with("http://") || text.starts_with("https://") {
            return Self::Url {
                url: text.to_owned(),
                authorities,
            };
        }
        Self::File(text.into())
    }

    /// Whether no network is between.
    pub fn is_file(&self) -> bool {
        matches!(self, Self::File(_))
    }
}

/// Gets the keys.
pub(super) async fn fetch(source: &Source) -> Result<JwkSet, FetchError> {
    let text = match source {
        Source::File(path) => std::fs::read(path).map_err(|source| FetchError::Read {
            path: path.clone(),
            source,
        })?,
        Source::Url { url, authorities } => {
            match tokio::time::timeout(TIMEOUT, get(url, authorities.as_deref())).await {
                Ok(answer) => answer?,
                Err(_) => return Err(FetchError::Timeout { url: url.clone() }),
            }
        }
    };
    serde_json::from_slice(&text).map_err(FetchError::Parse)
}

async fn get(url: &str, authorities: Option<&Path>) -> Result<Vec<u8>, FetchError> {
    let not_a_url = || FetchError::Url {
        url: url.to_owned(),
    };
    let uri: Uri = url.parse().map_err(|_| not_a_url())?;
    let host = uri.host().ok_or_else(not_a_url)?;
    let secure = uri.scheme_str() == Some("https");
    let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let failed = |source: io::Error| FetchError::Connect {
        url: url.to_owned(),
        source,
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((bare, port)).await.map_err(failed)?;
    if !secure {
        return exchange(url, &uri, stream).await;
    }
    let name = ServerName::try_from(bare.to_owned()).map_err(|_| not_a_url())?;
    let connector = TlsConnector::from(Arc::new(tls(authorities)?));
    let stream = connector.connect(name, stream).await.map_err(failed)?;
    exchange(url, &uri, stream).await
}

async fn exchange<S>(url: &str, uri: &Uri, stream: S) -> Result<Vec<u8>, FetchError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let failed = |source: hyper::Error| FetchError::Http {
        url: url.to_owned(),
        source,
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(failed)?;
    let connection = tokio::spawn(connection);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    let request = Request::get(path)
        .header("host", authority)
        .header("accept", "application/json")
        .body(Empty::<Bytes>::new())
        .map_err(|_| FetchError::Url {
            url: url.to_owned(),
        })?;
    let answer = sender.send_request(request).await.map_err(failed)?;
    if answer.status() != StatusCode::OK {
        return Err(FetchError::Status {
            url: url.to_owned(),
            status: answer.status().as_u16(),
        });
    }
    let body = Limited::new(answer.into_body(), MAX_BYTES).collect().await;
    let body = body.map_err(|_| FetchError::Body {
        url: url.to_owned(),
    })?;
    connection.abort();
    Ok(body.to_bytes().to_vec())
}

fn tls(authorities: Option<&Path>) -> Result<rustls::ClientConfig, FetchError> {
    let bundle = authorities.map(Path::to_owned).or_else(|| {
        BUNDLES
            .iter()
            .map(PathBuf::from)
            .find(|bundle| bundle.is_file())
    });
    let bundle = bundle.ok_or(FetchError::NoAuthorities)?;
    let text = std::fs::read(&bundle).map_err(|source| FetchError::Read {
        path: bundle.clone(),
        source,
    })?;
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&text).flatten() {
        // Bundles have a few that are not understood.
        let _ = roots.add(certificate);
    }
    if roots.is_empty() {
        return Err(FetchError::NoAuthorities);
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(FetchError::Tls)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}

/// Why there are no keys.
#[derive(Debug, Error)]
pub enum FetchError {
    /// A file is not there.
    #[error("cannot read {path}", path = path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Not of the form.
    #[error(r#"this is no JWKS, {{"keys": [...]}}"#)]
    Parse(#[source] serde_json::Error),
    /// Not a URL.
    #[error("{url:?} is no http or https URL")]
    Url {
        /// As given.
        url: String,
    },
    /// Nobody there, or not who it should be.
    #[error("cannot connect to {url}")]
    Connect {
        /// As given.
        url: String,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The exchange broke.
    #[error("{url} did not answer as HTTP")]
    Http {
        /// As given.
        url: String,
        /// The reason.
        #[source]
        source: hyper::Error,
    },
    /// No answer in time.
    #[error("{url} did not answer in time")]
    Timeout {
        /// As given.
        url: String,
    },
    /// Another answer than 200.
    #[error("{url} answered {status}")]
    Status {
        /// As given.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// Too much of it.
    #[error("what {url} answers is longer than 1 MiB or breaks off")]
    Body {
        /// As given.
        url: String,
    },
    /// No roots.
    #[error("no certificate authorities are known; name a PEM file with --oidc-ca")]
    NoAuthorities,
    /// Our own set-up.
    #[error("cannot set TLS up")]
    Tls(#[source] rustls::Error),
}
