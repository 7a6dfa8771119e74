//! TLS settings of both ends, from PEM.
//!
//! TLS 1.2 and 1.3 by rustls with ring; no system certificates are consulted: whom to trust is
//! what the PEM says. An NBD server has no other protection, so there is no way to skip
//! verification.

use std::fmt;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

/// More than any chain of certificates and a key take.
pub const MAX_PEM_BYTES: usize = 1 << 20;

/// Why PEM is of no use.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// No block of PEM, or a broken one.
    #[error("TLS: the {what} cannot be read as PEM")]
    Pem {
        /// What was looked for.
        what: &'static str,
        /// Where it broke.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// Something is not there at all.
    #[error("TLS: the PEM has no {what}")]
    Missing {
        /// What was looked for.
        what: &'static str,
    },
    /// rustls does not take it.
    #[error("TLS: the {what} cannot be used")]
    Unusable {
        /// What was looked at.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Neither a DNS name nor an IP address.
    #[error("TLS: {0:?} is no name that a certificate can bear; give the server's host name")]
    HostName(String),
}

/// What a client needs: whom it trusts, and what it shows.
#[derive(Clone)]
pub struct TlsClient {
    config: Arc<ClientConfig>,
    host: ServerName<'static>,
}

impl TlsClient {
    /// `pem`: the CA certificates, then optionally the client's certificate chain and its key.
    ///
    /// The client's chain are the certificates that stand directly before the key; a CA may
    /// issue both. `host` is the name (or IP address) that the server's certificate must bear.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn from_pem(pem: &[u8], host: &str) -> Result<Self, TlsError> {
        let host_name = ServerName::try_from(host.to_owned())
            .map_err(|_| TlsError::HostName(host.to_owned()))?;
        let sections = Sections::read(pem)?;
        let builder = config_builder(ClientConfig::builder_with_provider(provider()))?
            .with_root_certificates(roots(&sections.authorities)?);
        let config = match sections.own {
            Some((chain, key)) => builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| unusable("client's certificate or key", error))?,
            None => builder.with_no_client_auth(),
        };
        Ok(Self {
            config: Arc::new(config),
            host: host_name,
        })
    }

    pub(crate) fn connection(&self) -> Result<ClientConnection, rustls::Error> {
        ClientConnection::new(Arc::clone(&self.config), self.host.clone())
    }
}

impl fmt::Debug for TlsClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Keys are in the configuration.
        f.debug_struct("TlsClient")
            .field("host", &self.host)
            .finish_non_exhaustive()
    }
}

/// What a server needs: what it shows, and which clients it trusts.
#[derive(Clone)]
pub struct TlsServer {
    config: Arc<ServerConfig>,
}

impl TlsServer {
    /// `pem`: the CA certificates that clients must be issued by (none: any client may come),
    /// then the server's certificate chain and its key.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn from_pem(pem: &[u8]) -> Result<Self, TlsError> {
        let sections = Sections::read(pem)?;
        let (chain, key) = sections.own.ok_or(TlsError::Missing {
            what: "server's certificate and key",
        })?;
        let builder = config_builder(ServerConfig::builder_with_provider(provider()))?;
        let builder = if sections.authorities.is_empty() {
            builder.with_no_client_auth()
        } else {
            let roots = Arc::new(roots(&sections.authorities)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
                .build()
                .map_err(|error| unusable("clients' CA", error))?;
            builder.with_client_cert_verifier(verifier)
        };
        let config = builder
            .with_single_cert(chain, key)
            .map_err(|error| unusable("server's certificate or key", error))?;
        Ok(Self {
            config: Arc::new(config),
        })
    }

    pub(crate) fn connection(&self) -> Result<ServerConnection, rustls::Error> {
        ServerConnection::new(Arc::clone(&self.config))
    }
}

impl fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsServer").finish_non_exhaustive()
    }
}

type Chain = Vec<CertificateDer<'static>>;

/// A PEM file, taken apart.
struct Sections {
    authorities: Chain,
    own: Option<(Chain, PrivateKeyDer<'static>)>,
}

impl Sections {
    /// What comes before the key is the owner's chain, from its first certificate that is no
    /// CA on; all before that are authorities.
    fn read(pem: &[u8]) -> Result<Self, TlsError> {
        let what = "certificates";
        let certificates = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<Chain, _>>()
            .map_err(|source| TlsError::Pem { what, source })?;
        let key = match PrivateKeyDer::from_pem_slice(pem) {
            Ok(key) => key,
            Err(rustls::pki_types::pem::Error::NoItemsFound) => {
                return Ok(Self {
                    authorities: certificates,
                    own: None,
                });
            }
            Err(source) => {
                return Err(TlsError::Pem {
                    what: "key",
                    source,
                });
            }
        };
        let mut authorities = certificates;
        let first_own = authorities
            .iter()
            .position(|certificate| !is_authority(certificate))
            .unwrap_or_else(|| authorities.len().saturating_sub(1));
        let chain = authorities.split_off(first_own);
        if chain.is_empty() {
            return Err(TlsError::Missing {
                what: "certificate that belongs to the key",
            });
        }
        Ok(Self {
            authorities,
            own: Some((chain, key)),
        })
    }
}

/// Whether the certificate says of itself that it may issue others: the extension
/// basicConstraints (2.5.29.19) with cA TRUE, as DER has it (RFC 5280 section 4.2.1.9).
///
/// Only sorts the sections of our own PEM file; nothing is trusted because of it.
fn is_authority(certificate: &CertificateDer<'_>) -> bool {
    const BASIC_CONSTRAINTS: &[u8] = &[0x06, 0x03, 0x55, 0x1d, 0x13];
    const CA_TRUE: &[u8] = &[0x01, 0x01, 0xff];
    let bytes = certificate.as_ref();
    let Some(at) = bytes
        .windows(BASIC_CONSTRAINTS.len())
        .position(|window| window == BASIC_CONSTRAINTS)
    else {
        return false;
    };
    // Optionally `critical`, itself the BOOLEAN TRUE; then OCTET STRING { SEQUENCE { cA ... } }.
    let mut rest = &bytes[at + BASIC_CONSTRAINTS.len()..];
    rest = rest.strip_prefix(CA_TRUE).unwrap_or(rest);
    matches!(rest, [0x04, _, 0x30, _, tail @ ..] if tail.starts_with(CA_TRUE))
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn config_builder<S: rustls::ConfigSide>(
    builder: rustls::ConfigBuilder<S, rustls::WantsVersions>,
) -> Result<rustls::ConfigBuilder<S, rustls::WantsVerifier>, TlsError> {
    builder
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable("set of protocol versions", error))
}

fn roots(authorities: &[CertificateDer<'static>]) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    if authorities.is_empty() {
        return Err(TlsError::Missing {
            what: "CA certificate",
        });
    }
    for authority in authorities {
        store
            .add(authority.clone())
            .map_err(|error| unusable("CA certificate", error))?;
    }
    Ok(store)
}

fn unusable(what: &'static str, error: impl std::error::Error + Send + Sync + 'static) -> TlsError {
    TlsError::Unusable {
        what,
        source: Box::new(error),
    }
}
