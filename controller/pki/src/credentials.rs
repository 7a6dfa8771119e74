//! What both ends of a connection are configured with, made anew for each connection: what changed since
//! the last one counts, and no earlier session is taken up again past its certificate's end.

use std::fmt;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SignatureScheme};

use crate::material::Reread;
use crate::verify::{OnlyControllers, Servers};
use crate::{Expect, Files, Material, MaterialError};

/// HTTP/2: gRPC speaks nothing else.
const PROTOCOL: &[u8] = b"h2";

/// What an end shows and believes, as it is now. Cheap to clone.
#[derive(Clone)]
pub struct Credentials(Arc<dyn Fn() -> Arc<Material> + Send + Sync>);

/// Whom a server lets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clients {
    /// Everybody; those that show a certificate must have one of an authority.
    Anybody,
    /// Controllers alone.
    Controllers,
}

/// Material that is held in memory and can be exchanged.
#[derive(Debug, Clone, Default)]
pub struct Held(Arc<RwLock<Arc<Material>>>);

impl Held {
    /// From now on.
    pub fn replace(&self, material: Material) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(material);
    }

    /// As it is now.
    pub fn now(&self) -> Arc<Material> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// For connections.
    pub fn credentials(&self) -> Credentials {
        let held = self.clone();
        Credentials(Arc::new(move || held.now()))
    }
}

impl Credentials {
    /// Of files, looked at again for each connection.
    ///
    /// # Errors
    /// When they cannot be read now.
    pub fn of_files(files: Files) -> Result<Self, MaterialError> {
        let files = Reread::open(files)?;
        Ok(Self(Arc::new(move || files.now())))
    }

    /// As they are now.
    pub fn now(&self) -> Arc<Material> {
        (self.0)()
    }

    /// A server's end.
    ///
    /// # Errors
    /// When there is nothing to show or nobody to believe.
    pub fn server(&self, clients: Clients) -> io::Result<Arc<ServerConfig>> {
        let material = self.now();
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots(&material).into(), crate::provider());
        let verifier = match clients {
            Clients::Anybody => verifier.allow_unauthenticated(),
            Clients::Controllers => verifier,
        };
        let verifier = verifier.build().map_err(io::Error::other)?;
        let verifier = match clients {
            Clients::Anybody => verifier,
            Clients::Controllers => Arc::new(OnlyControllers(verifier)),
        };
        let mut config = ServerConfig::builder_with_provider(crate::provider())
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(shown(&material)?));
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Arc::new(config))
    }

    /// A client's end.
    ///
    /// # Errors
    /// When rustls refuses the configuration.
    pub fn client(&self, expect: Expect) -> io::Result<Arc<ClientConfig>> {
        let material = self.now();
        let verifier = Servers::new(roots(&material), expect);
        let builder = ClientConfig::builder_with_provider(crate::provider())
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match material.identity {
            Some(_) => builder.with_client_cert_resolver(Arc::new(shown(&material)?)),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Arc::new(config))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Credentials")
    }
}

fn roots(material: &Material) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(material.authorities.iter().cloned());
    roots
}

fn shown(material: &Material) -> io::Result<Shown> {
    let identity = material.identity.as_ref();
    let identity = identity.ok_or_else(|| io::Error::other("there is no certificate to show"))?;
    Ok(Shown(identity.key()))
}

/// The one certificate there is.
#[derive(Debug)]
struct Shown(Arc<CertifiedKey>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
