//! Options about callers: who they are, how often they may ask, and where traces of what they ask go.

use std::path::PathBuf;

use clap::Args;
use gate::auth::oidc::{OidcError, Provider, Source};
use gate::auth::tokens::TokensError;
use gate::auth::{Authenticator, Oidc, Tokens};
use gate::{Audit, Gate, Rate};
use thiserror::Error;

use crate::model;
use crate::store::{SharedStore, StoreError, Transaction};

/// See the module.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Callers")]
pub struct Access {
    /// Callers need a token of this JSON file, which holds their digests and roles; read again when it
    /// changes
    #[arg(long, value_name = "FILE")]
    pub tokens: Option<PathBuf>,
    /// Callers may have JWTs of this OIDC provider: the claim iss
    #[arg(long, value_name = "URL", requires_all = ["oidc_audience", "oidc_jwks"])]
    pub oidc_issuer: Option<String>,
    /// Whom the provider's JWTs must be for: the claim aud
    #[arg(long, value_name = "TEXT", requires = "oidc_issuer")]
    pub oidc_audience: Option<String>,
    /// The provider's keys, a JWKS; looked at again all the time
    #[arg(long, value_name = "FILE|URL", requires = "oidc_issuer")]
    pub oidc_jwks: Option<String>,
    /// Who vouches for the server of the keys, PEM [default: the system's authorities]
    #[arg(long, value_name = "FILE", requires = "oidc_issuer")]
    pub oidc_ca: Option<PathBuf>,
    /// Claim with a caller's name
    #[arg(long, value_name = "CLAIM", default_value = "sub")]
    pub oidc_name_claim: String,
    /// Claim with a caller's roles; a.b is b in a
    #[arg(long, value_name = "CLAIM", default_value = "mortise_roles")]
    pub oidc_roles_claim: String,
    /// Claim with a caller's projects; a token without it is for all
    #[arg(long, value_name = "CLAIM", default_value = "mortise_projects")]
    pub oidc_projects_claim: String,
    /// Requests of each caller that are taken, on average; 0 for any number. Local users have no limit
    #[arg(long, value_name = "NUMBER", default_value_t = 500)]
    pub requests_per_second: u32,
    /// Send traces to this OpenTelemetry collector (OTLP over gRPC)
    #[arg(long, value_name = "http://HOST:PORT", env = "MORTISE_OTLP")]
    pub otlp: Option<String>,
}

impl Access {
    /// Whether a token is asked for.
    pub fn is_on(&self) -> bool {
        self.tokens.is_some() || self.oidc_issuer.is_some()
    }

    /// What requests pass; `certificates` takes those of clients that TLS has verified.
    ///
    /// # Errors
    /// When tokens or keys cannot be read, or the store fails.
    pub async fn gate(&self, store: &SharedStore, certificates: bool) -> Result<Gate, AccessError> {
        let mut authenticator = Authenticator::off();
        if let Some(file) = &self.tokens {
            authenticator = authenticator.with_tokens(Tokens::open(file)?);
        }
        if let Some(provider) = self.provider() {
            authenticator = authenticator.with_oidc(Oidc::start(provider).await?);
        }
        if certificates {
            authenticator = authenticator.with_certificates();
        }
        // A quota that a new name gets around is none.
        let marker = model::EXPLICIT_PROJECTS;
        match (authenticator.is_on(), store.get(marker).await?.is_some()) {
            (true, false) => {
                store.commit(Transaction::new().put(marker, vec![])).await?;
            }
            (false, true) => {
                store.commit(Transaction::new().delete(marker)).await?;
            }
            _ => {}
        }
        let rate = Rate::new(self.requests_per_second);
        Ok(Gate::new(authenticator, rate, Audit::start(store.clone())))
    }

    fn provider(&self) -> Option<Provider> {
        Some(Provider {
            issuer: self.oidc_issuer.clone()?,
            audience: self.oidc_audience.clone()?,
            keys: Source::new(self.oidc_jwks.as_deref()?, self.oidc_ca.clone()),
            name_claim: self.oidc_name_claim.clone(),
            roles_claim: self.oidc_roles_claim.clone(),
            projects_claim: self.oidc_projects_claim.clone(),
        })
    }
}

/// Why callers cannot be told apart.
#[derive(Debug, Error)]
pub enum AccessError {
    /// The file of tokens.
    #[error(transparent)]
    Tokens(#[from] TokensError),
    /// The provider.
    #[error(transparent)]
    Oidc(#[from] OidcError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}
