//! A fresh key, and the request for its certificate. The key never leaves whoever made it.

use rcgen::{CertificateParams, DistinguishedName, KeyPair};

use crate::IssueError;

/// See the module.
#[derive(Debug)]
pub struct Request {
    /// PKCS#8, PEM: for its owner alone.
    pub key_pem: String,
    /// PKCS#10, DER: proves that whoever asks has the key. It names nobody; the authority knows whom it is
    /// dealing with.
    pub der: Vec<u8>,
}

impl Request {
    /// With a key that is made now (ECDSA, P-256).
    ///
    /// # Errors
    /// When the system has no random numbers.
    pub fn new() -> Result<Self, IssueError> {
        Self::with(&KeyPair::generate().map_err(IssueError::Key)?)
    }

    /// For a key that was made before.
    ///
    /// # Errors
    /// When it is no key.
    pub fn again(key_pem: &str) -> Result<Self, IssueError> {
        Self::with(&KeyPair::from_pem(key_pem).map_err(IssueError::Key)?)
    }

    fn with(key: &KeyPair) -> Result<Self, IssueError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(key).map_err(IssueError::Sign)?;
        Ok(Self {
            key_pem: key.serialize_pem(),
            der: request.der().to_vec(),
        })
    }
}
