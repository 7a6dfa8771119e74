//! An authority of our own. Of a request it takes the key and nothing else: names and purposes are its to
//! say.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData as _, SanType,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::Name;

/// How far clocks may be apart: certificates are valid from so long before they were made, or from a tenth
/// of their lifetime.
const CLOCK_SKEW: Duration = Duration::from_secs(300);
/// An authority lasts this long: ten years.
const AUTHORITY_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Makes certificates.
pub struct Authority {
    certificate: CertificateDer<'static>,
    key: KeyPair,
}

/// What is to be in a certificate.
#[derive(Debug, Clone)]
pub(crate) struct Wanted<'a> {
    name: &'a Name,
    hosts: &'a [String],
    lifetime: Duration,
    not_before: Option<SystemTime>,
}

impl Authority {
    /// A new one.
    ///
    /// # Errors
    /// When the system has no random numbers.
    pub fn new() -> Result<Self, IssueError> {
        let key = KeyPair::generate().map_err(IssueError::Key)?;
        let digest = Sha256::digest(key.public_key_raw());
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        // Authorities that follow one another must not have one name: theirs is looked for by it.
        let name = format!("Mortise authority {}", &hex(&digest)[..12]);
        params.distinguished_name.push(DnType::CommonName, name);
        let now = SystemTime::now();
        params.not_before = (now - CLOCK_SKEW).into();
        params.not_after = (now + AUTHORITY_LIFETIME).into();
        let certificate = params.self_signed(&key).map_err(IssueError::Sign)?;
        Ok(Self {
            certificate: certificate.der().clone(),
            key,
        })
    }

    /// One that was made before.
    ///
    /// # Errors
    /// When the key is no key.
    pub fn load(certificate: Vec<u8>, key_der: &[u8]) -> Result<Self, IssueError> {
        let key = KeyPair::try_from(key_der).map_err(IssueError::Key)?;
        Ok(Self {
            certificate: certificate.into(),
            key,
        })
    }

    /// What it is believed by.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// PKCS#8, DER: whoever has it makes certificates.
    pub fn key_der(&self) -> Vec<u8> {
        self.key.serialize_der()
    }

    /// A certificate for the key of a request: the chain to show, leaf first, authority last. `hosts` are
    /// names and addresses that others look for a server under. It is valid from some minutes before now,
    /// to be valid on hosts whose clock is late, but not before `not_before`.
    ///
    /// # Errors
    /// When whoever asks does not prove to have the key.
    pub fn issue(
        &self,
        request: &[u8],
        name: &Name,
        hosts: &[String],
        lifetime: Duration,
        not_before: Option<SystemTime>,
    ) -> Result<Vec<CertificateDer<'static>>, IssueError> {
        let request = CertificateSigningRequestDer::from(request);
        let request = CertificateSigningRequestParams::from_der(&request);
        let request = request.map_err(IssueError::Request)?;
        let wanted = Wanted {
            name,
            hosts,
            lifetime,
            not_before,
        };
        let params = wanted.params()?;
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key);
        let issuer = issuer.map_err(IssueError::Sign)?;
        let certificate = params.signed_by(&request.public_key, &issuer);
        let certificate = certificate.map_err(IssueError::Sign)?;
        Ok(vec![certificate.der().clone(), self.certificate.clone()])
    }

    /// What tells one key in requests from another.
    ///
    /// # Errors
    /// When whoever asks does not prove to have the key.
    pub fn key_of(request: &[u8]) -> Result<Vec<u8>, IssueError> {
        let request = CertificateSigningRequestDer::from(request);
        let request = CertificateSigningRequestParams::from_der(&request);
        let request = request.map_err(IssueError::Request)?;
        let key = request.public_key.subject_public_key_info();
        Ok(Sha256::digest(key).to_vec())
    }
}

impl Wanted<'_> {
    fn params(&self) -> Result<CertificateParams, IssueError> {
        let mut params = CertificateParams::new(self.hosts.to_vec()).map_err(IssueError::Name)?;
        let uri = self.name.to_string();
        let uri = uri.as_str().try_into().map_err(IssueError::Name)?;
        params.subject_alt_names.push(SanType::URI(uri));
        let now = SystemTime::now();
        let begins = now - CLOCK_SKEW.min(self.lifetime / 10);
        let begins = begins.max(self.not_before.unwrap_or(SystemTime::UNIX_EPOCH));
        params.not_before = begins.into();
        params.not_after = (now + self.lifetime).into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let (word, purposes) = match self.name {
            Name::User(user) => (user, vec![ExtendedKeyUsagePurpose::ClientAuth]),
            Name::Controller(id) | Name::Host(id) => (
                id,
                vec![
                    ExtendedKeyUsagePurpose::ServerAuth,
                    ExtendedKeyUsagePurpose::ClientAuth,
                ],
            ),
        };
        params.extended_key_usages = purposes;
        let word = word.split('?').next().unwrap_or_default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, word);
        Ok(params)
    }
}

/// Lower-case.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Why there is no certificate.
#[derive(Debug, Error)]
pub enum IssueError {
    /// Not made, not understood.
    #[error("there is no usable key")]
    Key(#[source] rcgen::Error),
    /// Of another form, or not signed with its key.
    #[error("this is no request for a certificate (PKCS#10, DER, signed with its key)")]
    Request(#[source] rcgen::Error),
    /// A name that no certificate can have.
    #[error("a name cannot be in a certificate")]
    Name(#[source] rcgen::Error),
    /// Any other.
    #[error("cannot make the certificate")]
    Sign(#[source] rcgen::Error),
}
