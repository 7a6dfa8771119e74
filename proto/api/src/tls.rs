//! TLS as a transport: who makes a connection asks for the configuration as it is at that moment, so that
//! certificates and authorities change without anybody being started again. What is in them is the crate
//! `pki`'s to say.

mod lasting;

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{AlertDescription, CertificateError, ClientConfig, ServerConfig};
use tokio::sync::watch;

pub(crate) use lasting::Lasting;

/// Whether the other end of a connection is still believed: after how long to look again, or why it is not.
pub type Look = Box<dyn FnMut() -> Result<Duration, String> + Send>;

/// Completes when a connection is to be cut.
pub(crate) type Withdrawn = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The certificates that the other end showed, its own first.
pub type Chain = Vec<CertificateDer<'static>>;

type Watch<P> = Option<Arc<dyn Fn(P) -> Look + Send + Sync>>;

/// What a server shows and asks for, as it is now.
#[derive(Clone)]
pub struct Server {
    config: Arc<dyn Fn() -> io::Result<Arc<ServerConfig>> + Send + Sync>,
    watch: Watch<Chain>,
}

/// What a client shows and believes, as it is now.
#[derive(Clone)]
pub struct Client {
    config: Arc<dyn Fn() -> io::Result<Arc<ClientConfig>> + Send + Sync>,
    watch: Watch<(Chain, ServerName<'static>)>,
    held: Option<watch::Receiver<()>>,
}

impl Server {
    /// Asks `config` for each connection.
    pub fn new(config: impl Fn() -> io::Result<Arc<ServerConfig>> + Send + Sync + 'static) -> Self {
        Self {
            config: Arc::new(config),
            watch: None,
        }
    }

    /// Connections of clients that show a certificate last as long as what `watch` makes of it says.
    #[must_use]
    pub fn watching(self, watch: impl Fn(Chain) -> Look + Send + Sync + 'static) -> Self {
        Self {
            watch: Some(Arc::new(watch)),
            ..self
        }
    }

    /// For one connection.
    ///
    /// # Errors
    /// When there is nothing to show.
    pub fn config(&self) -> io::Result<Arc<ServerConfig>> {
        (self.config)()
    }

    /// What looks at a peer that showed these from now on.
    pub(crate) fn look(&self, shown: Option<&[CertificateDer<'static>]>) -> Option<Look> {
        let watch = self.watch.as_ref()?;
        shown.map(|chain| watch(chain.to_vec()))
    }
}

impl Client {
    /// Asks `config` for each connection.
    pub fn new(config: impl Fn() -> io::Result<Arc<ClientConfig>> + Send + Sync + 'static) -> Self {
        Self {
            config: Arc::new(config),
            watch: None,
            held: None,
        }
    }

    /// Connections last as long as what `watch` makes of the server's certificates, and of the name that was
    /// asked for, says.
    #[must_use]
    pub fn watching(
        self,
        watch: impl Fn((Chain, ServerName<'static>)) -> Look + Send + Sync + 'static,
    ) -> Self {
        Self {
            watch: Some(Arc::new(watch)),
            ..self
        }
    }

    /// Connections end when the sender of this is dropped.
    #[must_use]
    pub fn while_held(self, held: watch::Receiver<()>) -> Self {
        Self {
            held: Some(held),
            ..self
        }
    }

    /// For one connection.
    ///
    /// # Errors
    /// When nobody can be believed.
    pub fn config(&self) -> io::Result<Arc<ClientConfig>> {
        (self.config)()
    }

    /// What looks at a server that showed these from now on.
    pub(crate) fn look(
        &self,
        shown: Option<&[CertificateDer<'static>]>,
        asked: ServerName<'static>,
    ) -> Option<Look> {
        let watch = self.watch.as_ref()?;
        shown.map(|chain| watch((chain.to_vec(), asked)))
    }

    /// What ends a connection besides.
    pub(crate) fn withdrawn(&self) -> Option<Withdrawn> {
        let mut held = self.held.clone()?;
        Some(Box::pin(
            async move { while held.changed().await.is_ok() {} },
        ))
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("tls::Server")
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("tls::Client")
    }
}

/// Why the ends of a connection did not trust each other, if that is what an error is about.
pub fn distrust(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return Some(explain(tls));
        }
        // An error of the system has another one inside, which is not its source.
        let inner = error.downcast_ref::<io::Error>();
        let inner = inner.and_then(io::Error::get_ref);
        if let Some(inner) = inner.and_then(|inner| distrust(inner)) {
            return Some(inner);
        }
        next = error.source();
    }
    None
}

/// What went wrong in a handshake, in words.
pub fn explain(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(other)) => other.to_string(),
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "its certificate is not of an authority that is trusted here".to_owned()
        }
        rustls::Error::InvalidCertificate(
            CertificateError::ExpiredContext { .. } | CertificateError::Expired,
        ) => "its certificate has expired".to_owned(),
        rustls::Error::InvalidCertificate(error) => format!("its certificate is bad: {error}"),
        rustls::Error::AlertReceived(alert) => format!("it refused: {}", refusal(*alert)),
        rustls::Error::NoCertificatesPresented => "it showed no certificate".to_owned(),
        rustls::Error::InvalidMessage(_) => "it does not speak TLS".to_owned(),
        error => error.to_string(),
    }
}

fn refusal(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::UnknownCA => {
            "the certificate that was shown is not of an authority that it trusts".to_owned()
        }
        AlertDescription::CertificateExpired => {
            "the certificate that was shown has expired".to_owned()
        }
        AlertDescription::CertificateRequired => "it asks for a certificate".to_owned(),
        AlertDescription::AccessDenied | AlertDescription::CertificateUnknown => {
            "the certificate that was shown is not one that may connect".to_owned()
        }
        alert => format!("{alert:?}"),
    }
}
