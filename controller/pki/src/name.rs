//! Whom a certificate is about.

use std::fmt;

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;

const SCHEME: &str = "mortise://";

/// The one SAN URI of the scheme `mortise`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Name {
    /// `mortise://controllers/NAME`
    Controller(String),
    /// `mortise://hosts/ID`
    Host(String),
    /// `mortise://users/NAME?roles=...`: all after the second slash.
    User(String),
}

impl Name {
    /// That of a certificate, if it has exactly one.
    pub fn of(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let names = certificate.subject_alternative_name().ok()??;
        let mut ours = names
            .value
            .general_names
            .iter()
            .filter_map(|name| match name {
                GeneralName::URI(uri) => uri.strip_prefix(SCHEME),
                _ => None,
            });
        let (only, other) = (ours.next()?, ours.next());
        let (kind, rest) = only.split_once('/')?;
        let rest = Some(rest.to_owned()).filter(|rest| !rest.is_empty() && other.is_none())?;
        match kind {
            "controllers" => Some(Self::Controller(rest)),
            "hosts" => Some(Self::Host(rest)),
            "users" => Some(Self::User(rest)),
            _ => None,
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, rest) = match self {
            Self::Controller(rest) => ("controllers", rest),
            Self::Host(rest) => ("hosts", rest),
            Self::User(rest) => ("users", rest),
        };
        write!(formatter, "{SCHEME}{kind}/{rest}")
    }
}
