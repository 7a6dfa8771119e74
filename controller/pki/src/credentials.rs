//! What both ends of a connection are configured with, made anew for each connection: what changed since
//! the last one counts, and no earlier session is taken up again past its certificate's end.

use std::fmt;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use rustls::client::ResolvesClientCert;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SignatureScheme};

use crate::material::{Reread, ends};
use crate::verify::{OnlyControllers, Servers};
use crate::{Expect, Files, Material, MaterialError};

/// HTTP/2: gRPC speaks nothing else.
const PROTOCOL: &[u8] = b"h2";
/// How long a peer stays believed at most after its authority is not.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Says after how long to look again, or why a peer is believed no more.
pub type Look = Box<dyn FnMut() -> Result<Duration, String> + Send>;

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
        let verifier = believed(&material, clients)?;
        let mut config = ServerConfig::builder_with_provider(crate::provider())
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(shown(&material)?));
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Arc::new(config))
    }

    /// What tells whether a client that showed these certificates is still believed, and after how long to
    /// look again: it is not when its certificate has ended or is not of an authority any more.
    pub fn watch_client(&self, clients: Clients, chain: Vec<CertificateDer<'static>>) -> Look {
        let verify = move |material: &Material, chain: &[CertificateDer<'static>]| {
            let (leaf, others) = split(chain)?;
            let verifier = believed(material, clients).map_err(|error| error.to_string())?;
            let verified = verifier.verify_client_cert(leaf, others, UnixTime::now());
            verified.map(drop).map_err(|error| error.to_string())
        };
        self.watch(chain, verify)
    }

    /// The same of a server that was asked for by this name.
    pub fn watch_server(
        &self,
        expect: Expect,
        chain: Vec<CertificateDer<'static>>,
        asked: ServerName<'static>,
    ) -> Look {
        let verify = move |material: &Material, chain: &[CertificateDer<'static>]| {
            let (leaf, others) = split(chain)?;
            let verifier = Servers::new(roots(material), expect.clone());
            let now = UnixTime::now();
            let verified = verifier.verify_server_cert(leaf, others, &asked, &[], now);
            verified.map(drop).map_err(|error| error.to_string())
        };
        self.watch(chain, verify)
    }

    /// `verify` costs a signature, so it is called when authorities changed.
    fn watch(
        &self,
        chain: Vec<CertificateDer<'static>>,
        verify: impl Fn(&Material, &[CertificateDer<'static>]) -> Result<(), String> + Send + 'static,
    ) -> Look {
        let credentials = self.clone();
        let ends = chain.first().and_then(|leaf| ends(leaf));
        let mut seen = self.now();
        Box::new(move || {
            let ends = ends.ok_or("its certificate does not say when it ends")?;
            let left = ends.duration_since(SystemTime::now()).unwrap_or_default();
            if left.is_zero() {
                return Err("its certificate has expired".to_owned());
            }
            let now = credentials.now();
            if !Arc::ptr_eq(&seen, &now) {
                if seen.authorities != now.authorities {
                    verify(&now, &chain)?;
                }
                seen = now;
            }
            Ok(left.min(LOOK_INTERVAL))
        })
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

/// Which clients are let in.
fn believed(material: &Material, clients: Clients) -> io::Result<Arc<dyn ClientCertVerifier>> {
    let roots = roots(material).into();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, crate::provider());
    let verifier = match clients {
        Clients::Anybody => verifier.allow_unauthenticated(),
        Clients::Controllers => verifier,
    };
    let verifier = verifier.build().map_err(io::Error::other)?;
    Ok(match clients {
        Clients::Anybody => verifier,
        Clients::Controllers => Arc::new(OnlyControllers(verifier)),
    })
}

/// The peer's own certificate, and what leads to its authority.
fn split<'a>(
    chain: &'a [CertificateDer<'static>],
) -> Result<(&'a CertificateDer<'static>, &'a [CertificateDer<'static>]), String> {
    chain
        .split_first()
        .ok_or_else(|| "it showed no certificate".to_owned())
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
