//! What is stored about certificates.
//!
//! ```text
//! authorities/{number}       AuthorityRecord; numbers rise
//! hostTokens/{token}         HostTokenRecord
//! withdrawn/{host}           Timestamp: certificates of the host from before count no more; it was
//!                            deleted, or has joined again
//! ```

use api::controller as pb;
use prost::Message;

/// Key prefix of authorities.
pub(super) const AUTHORITIES: &str = "authorities/";
/// Key prefix of tokens.
pub(super) const HOST_TOKENS: &str = "hostTokens/";

/// An authority as stored.
#[derive(Clone, PartialEq, Message)]
pub(super) struct AuthorityRecord {
    /// Higher than those before.
    #[prost(uint64, tag = "1")]
    pub(super) number: u64,
    /// DER.
    #[prost(bytes = "vec", tag = "2")]
    pub(super) certificate: Vec<u8>,
    /// PKCS#8, sealed.
    #[prost(bytes = "vec", tag = "3")]
    pub(super) sealed_key: Vec<u8>,
    /// When it was made.
    #[prost(message, optional, tag = "4")]
    pub(super) create_time: Option<prost_types::Timestamp>,
}

impl AuthorityRecord {
    pub(super) fn sha256(&self) -> String {
        pki::fingerprint(&self.certificate)
    }

    pub(super) fn visible(&self, active: bool) -> pb::Authority {
        pb::Authority {
            name: authority_key(self.number),
            sha256: self.sha256(),
            certificate: pki::pem([&self.certificate.clone().into()]),
            create_time: self.create_time,
            active,
            hosts: 0,
        }
    }
}

/// A token as stored.
#[derive(Clone, PartialEq, Message)]
pub(super) struct HostTokenRecord {
    /// What users see.
    #[prost(message, required, tag = "1")]
    pub(super) token: pb::HostToken,
    /// SHA-256 of its secret.
    #[prost(bytes = "vec", tag = "2")]
    pub(super) digest: Vec<u8>,
    /// SHA-256 of the key of the host that joined with it.
    #[prost(bytes = "vec", tag = "3")]
    pub(super) key: Vec<u8>,
}

/// Key and name of an authority; in order of their numbers.
pub(super) fn authority_key(number: u64) -> String {
    format!("{AUTHORITIES}{number:08}")
}

/// Key that says from when on certificates of a host count.
pub fn withdrawn_key(host: &str) -> String {
    format!("withdrawn/{host}")
}
