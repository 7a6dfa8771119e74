//! What is checked of the other end: that an authority made its certificate, that this is valid, and whom
//! it names.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
};

use crate::Name;
use crate::material::{begins, fingerprint};

/// Whom a client wants to talk to.
#[derive(Debug, Clone)]
pub enum Expect {
    /// Any controller; of another authority than ours, a server of the name that was asked for.
    Controller,
    /// A controller whose authority has this SHA-256, whoever else is believed; the authority is left in the
    /// cell.
    Pinned(String, Arc<OnceLock<CertificateDer<'static>>>),
    /// This host, with a certificate of a later time than that.
    Host(String, SystemTime),
    /// Any host; its id is left in the cell.
    AnyHost(Arc<OnceLock<String>>),
}

/// A client's look at servers.
#[derive(Debug)]
pub(crate) struct Servers {
    roots: RootCertStore,
    expect: Expect,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Servers {
    pub(crate) fn new(roots: RootCertStore, expect: Expect) -> Self {
        Self {
            roots,
            expect,
            algorithms: crate::provider().signature_verification_algorithms,
        }
    }

    fn signed(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        roots: &RootCertStore,
        now: UnixTime,
    ) -> Result<(), Error> {
        let leaf = ParsedCertificate::try_from(leaf)?;
        let algorithms = self.algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&leaf, roots, others, now, algorithms)
    }
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        asked: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Expect::Pinned(hash, found) = &self.expect {
            let pinned = others.iter().find(|other| fingerprint(other) == *hash);
            let pinned = pinned.ok_or_else(|| {
                let shown = others.last().map(|last| fingerprint(last));
                let shown = shown.unwrap_or_else(|| "none".to_owned());
                refused(format!(
                    "its authority has the SHA-256 {shown}, and not the one that --ca-hash names"
                ))
            })?;
            let pinned = pinned.clone().into_owned();
            let mut roots = RootCertStore::empty();
            roots.add(pinned.clone())?;
            self.signed(leaf, others, &roots, now)?;
            let _ = found.set(pinned);
        } else {
            self.signed(leaf, others, &self.roots, now)?;
        }
        let name = Name::of(leaf);
        let others = || match &name {
            Some(name) => format!("its certificate is that of {name}"),
            None => "its certificate names nobody (mortise://...)".to_owned(),
        };
        match (&self.expect, &name) {
            (Expect::Controller | Expect::Pinned(..), Some(Name::Controller(_))) => {}
            (Expect::Controller, None) => {
                verify_server_name(&ParsedCertificate::try_from(leaf)?, asked)?;
            }
            (Expect::Controller | Expect::Pinned(..), _) => {
                return Err(refused(format!("{}, which is no controller", others())));
            }
            (Expect::Host(id, after), Some(Name::Host(named))) if id == named => {
                if begins(leaf).is_none_or(|begins| begins <= *after) {
                    return Err(refused(format!(
                        "its certificate of hosts/{id} was withdrawn when the host was deleted or joined again; have it join again"
                    )));
                }
            }
            (Expect::Host(id, _), _) => {
                return Err(refused(format!("{}, not that of hosts/{id}", others())));
            }
            (Expect::AnyHost(found), Some(Name::Host(id))) => {
                let _ = found.set(id.clone());
            }
            (Expect::AnyHost(_), _) => {
                return Err(refused(format!("{}, which is no host", others())));
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// A host's look at whoever connects: controllers may.
#[derive(Debug)]
pub(crate) struct OnlyControllers(pub(crate) Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for OnlyControllers {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.0.verify_client_cert(leaf, others, now)?;
        match Name::of(leaf) {
            Some(Name::Controller(_)) => Ok(verified),
            Some(name) => Err(refused(format!(
                "its certificate is that of {name}, which is no controller"
            ))),
            None => Err(refused(
                "its certificate names no controller (mortise://controllers/NAME)".to_owned(),
            )),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

fn refused(why: String) -> Error {
    let why = OtherError(Arc::new(Refused(why)));
    Error::InvalidCertificate(CertificateError::Other(why))
}

#[derive(Debug)]
struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}
