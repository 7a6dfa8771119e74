//! A certificate with its key, and authorities that are believed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use sha2::{Digest as _, Sha256};
use thiserror::Error;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;

use crate::Name;
use crate::authority::hex;

/// Larger files hold no certificates.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// What one end shows and believes.
#[derive(Debug, Clone, Default)]
pub struct Material {
    /// What it shows; a client may have nothing.
    pub identity: Option<Identity>,
    /// Whom it believes.
    pub authorities: Vec<CertificateDer<'static>>,
}

/// A certificate, what leads to its authority, and its key.
#[derive(Debug, Clone)]
pub struct Identity {
    key: Arc<CertifiedKey>,
    begins: SystemTime,
    ends: SystemTime,
}

impl Identity {
    /// Of a chain, leaf first.
    ///
    /// # Errors
    /// When the key is not the certificate's.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, MaterialError> {
        let leaf = chain.first().ok_or(MaterialError::NoCertificate)?;
        let (begins, ends) = validity(leaf).ok_or(MaterialError::NoCertificate)?;
        let key = CertifiedKey::from_der(chain, key, &crate::provider());
        Ok(Self {
            key: Arc::new(key.map_err(MaterialError::Mismatch)?),
            begins,
            ends,
        })
    }

    /// Of PEM.
    ///
    /// # Errors
    /// When there is no certificate or no key, or they do not belong together.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, MaterialError> {
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| MaterialError::NoKey)?;
        Self::new(certificates(chain)?, key)
    }

    /// Whom it is about.
    pub fn name(&self) -> Option<Name> {
        Name::of(self.key.cert.first()?)
    }

    /// From when on and until when it is valid.
    pub fn validity(&self) -> (SystemTime, SystemTime) {
        (self.begins, self.ends)
    }

    /// When a part of its lifetime, out of 100, has passed.
    pub fn after(&self, percent: u32) -> SystemTime {
        let lifetime = self.ends.duration_since(self.begins).unwrap_or_default();
        self.begins + lifetime * percent / 100
    }

    pub(crate) fn key(&self) -> Arc<CertifiedKey> {
        self.key.clone()
    }
}

/// Where an end has its material: PEM.
#[derive(Debug, Clone)]
pub struct Files {
    /// Its certificate and what leads to the authority, and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Authorities.
    pub authorities: PathBuf,
}

impl Files {
    /// As they are now.
    ///
    /// # Errors
    /// When one cannot be read or holds something else.
    pub fn read(&self) -> Result<Material, MaterialError> {
        let identity = match &self.identity {
            None => None,
            Some((chain, key)) => {
                let identity = Identity::from_pem(&read(chain)?, &read(key)?);
                Some(identity.map_err(|error| error.in_file(chain))?)
            }
        };
        let authorities = certificates(&read(&self.authorities)?);
        Ok(Material {
            identity,
            authorities: authorities.map_err(|error| error.in_file(&self.authorities))?,
        })
    }
}

/// Material in files, read again for each connection. What cannot be read, because somebody is just writing it,
/// leaves what was read before.
#[derive(Debug)]
pub(crate) struct Reread {
    files: Files,
    last: Mutex<Arc<Material>>,
}

impl Reread {
    pub(crate) fn open(files: Files) -> Result<Self, MaterialError> {
        let last = Mutex::new(Arc::new(files.read()?));
        Ok(Self { files, last })
    }

    pub(crate) fn now(&self) -> Arc<Material> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match self.files.read() {
            Ok(material) => *last = Arc::new(material),
            Err(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(%error, source, "certificates read before stay in use");
            }
        }
        last.clone()
    }
}

/// The certificates in a PEM file.
pub(crate) fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(MaterialError::NoCertificate),
    }
}

/// Certificates as PEM.
pub fn pem<'a>(certificates: impl IntoIterator<Item = &'a CertificateDer<'static>>) -> String {
    const LINE: usize = 48;
    let mut text = String::new();
    for certificate in certificates {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        for line in certificate.chunks(LINE) {
            text.push_str(&base64(line));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

/// 48 bytes are 64 characters; only the last line is shorter.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(64);
    for group in bytes.chunks(3) {
        let mut word = [0; 3];
        word[..group.len()].copy_from_slice(group);
        let bits = u32::from_be_bytes([0, word[0], word[1], word[2]]);
        for place in 0..4 {
            if place > group.len() {
                text.push('=');
            } else {
                let index = (bits >> (18 - 6 * place)) & 63;
                text.push(char::from(ALPHABET[index as usize]));
            }
        }
    }
    text
}

/// SHA-256 of a certificate, in hexadecimal digits: what `--ca-hash` takes.
pub fn fingerprint(certificate: &[u8]) -> String {
    hex(&Sha256::digest(certificate))
}

fn validity(der: &[u8]) -> Option<(SystemTime, SystemTime)> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let validity = certificate.validity();
    let time = |seconds: i64| {
        let since = Duration::from_secs(seconds.try_into().ok()?);
        SystemTime::UNIX_EPOCH.checked_add(since)
    };
    Some((
        time(validity.not_before.timestamp())?,
        time(validity.not_after.timestamp())?,
    ))
}

/// Until when a certificate is valid.
pub(crate) fn ends(der: &[u8]) -> Option<SystemTime> {
    validity(der).map(|(_, ends)| ends)
}

/// From when on a certificate is valid.
pub fn begins(der: &[u8]) -> Option<SystemTime> {
    validity(der).map(|(begins, _)| begins)
}

fn read(path: &Path) -> Result<Vec<u8>, MaterialError> {
    let failed = |source| MaterialError::Read {
        path: path.to_owned(),
        source,
    };
    if fs::metadata(path).map_err(failed)?.len() > MAX_FILE_BYTES {
        return Err(failed(io::Error::other("too large for certificates")));
    }
    fs::read(path).map_err(failed)
}

/// Why there is nothing to show or nobody to believe.
#[derive(Debug, Error)]
pub enum MaterialError {
    /// Not there, no permission.
    #[error("cannot read {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Of another form.
    #[error("there is no certificate (PEM)")]
    NoCertificate,
    /// Of another form.
    #[error("there is no private key (PEM)")]
    NoKey,
    /// Of another certificate.
    #[error("key and certificate do not belong together")]
    Mismatch(#[source] rustls::Error),
    /// One of these, in a file.
    #[error("{path} is not what it should be", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: Box<MaterialError>,
    },
}

impl MaterialError {
    fn in_file(self, path: &Path) -> Self {
        Self::File {
            path: path.to_owned(),
            source: Box::new(self),
        }
    }
}
