//! JSON web tokens of an OIDC provider. Keys come from its JWKS, a file or a URL, and are fetched again
//! when they change; `jsonwebtoken` checks the claims, ring the signatures.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde_json::Value;
use thiserror::Error;

use super::{AuthError, Principal, Role};

mod fetch;
mod signatures;

pub use fetch::{FetchError, Source};

/// How often keys are looked for again; providers announce new ones days before they sign with them.
const REFRESH_INTERVAL: Duration = Duration::from_secs(300);
/// After a failure.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);
/// Clocks differ.
const LEEWAY_SECONDS: u64 = 30;
/// What anybody may sign, and read: no symmetric ones, whose key would be published.
const ALGORITHMS: [Algorithm; 6] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];
/// Nobody's token is longer, and every request carries it.
const MAX_TOKEN_BYTES: usize = 16 << 10;

/// What is known of the provider.
#[derive(Debug, Clone)]
pub struct Provider {
    /// The claim `iss` must be this.
    pub issuer: String,
    /// The claim `aud` must have this.
    pub audience: String,
    /// Where its keys are.
    pub keys: Source,
    /// Claim with the caller's name, such as `sub` or `email`.
    pub name_claim: String,
    /// Claim with the roles: an array or words with blanks between; `a.b` looks inside `a`.
    pub roles_claim: String,
    /// Claim with the projects, likewise; a token without it may see all.
    pub projects_claim: String,
}

/// A provider and its keys.
pub struct Oidc {
    provider: Provider,
    keys: Arc<RwLock<JwkSet>>,
}

impl fmt::Debug for Oidc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Oidc")
            .field("provider", &self.provider)
            .finish_non_exhaustive()
    }
}

impl Oidc {
    /// Fetches the keys and keeps them fresh, on the runtime that this is called on.
    ///
    /// # Errors
    /// When a file of keys cannot be read. A provider that does not answer yet is asked again.
    pub async fn start(provider: Provider) -> Result<Self, OidcError> {
        signatures::install();
        let first = fetch::fetch(&provider.keys).await;
        let set = match first {
            Ok(set) => set,
            Err(error) if provider.keys.is_file() => return Err(OidcError::Keys(error)),
            Err(error) => {
                let error = crate::with_source(&error);
                tracing::warn!(%error, "no OIDC keys yet; its tokens are refused until they come");
                JwkSet { keys: vec![] }
            }
        };
        let empty = set.keys.is_empty();
        let keys = Arc::new(RwLock::new(set));
        tokio::spawn(refresh(provider.keys.clone(), Arc::downgrade(&keys), empty));
        Ok(Self { provider, keys })
    }

    /// Whose token it is.
    ///
    /// # Errors
    /// When it is not the provider's, not for here, or not valid now.
    pub fn verify(&self, token: &str) -> Result<Principal, AuthError> {
        let bad = |reason: String| AuthError::BadToken { reason };
        if token.len() > MAX_TOKEN_BYTES {
            return Err(bad(format!("it is longer than {MAX_TOKEN_BYTES} bytes")));
        }
        let header =
            jsonwebtoken::decode_header(token).map_err(|_| bad("it is no JWT".to_owned()))?;
        if !ALGORITHMS.contains(&header.alg) {
            return Err(bad(format!("{:?} signatures are not accepted", header.alg)));
        }
        let mut validation = Validation::new(header.alg);
        validation.leeway = LEEWAY_SECONDS;
        validation.validate_nbf = true;
        validation.set_audience(&[&self.provider.audience]);
        validation.set_issuer(&[&self.provider.issuer]);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        let keys = self.keys.read().expect("nothing panics while it is held");
        let candidates = keys.keys.iter().filter(|key| {
            header.kid.is_none() || key.common.key_id.is_none() || key.common.key_id == header.kid
        });
        let mut refused = bad(match &header.kid {
            Some(kid) => format!("the provider has no key {kid:?}"),
            None => "the provider has no keys".to_owned(),
        });
        for jwk in candidates {
            let Ok(key) = DecodingKey::from_jwk(jwk) else {
                continue;
            };
            match jsonwebtoken::decode::<Value>(token, &key, &validation) {
                Ok(data) => return self.principal(&data.claims),
                Err(error) => refused = bad(self.words(error.kind())),
            }
        }
        Err(refused)
    }

    fn principal(&self, claims: &Value) -> Result<Principal, AuthError> {
        let name = claim(claims, &self.provider.name_claim)
            .and_then(Value::as_str)
            .filter(|name| !name.is_empty())
            .ok_or_else(|| AuthError::BadToken {
                reason: format!("it has no claim {}", self.provider.name_claim),
            })?;
        // Roles of others are no mistake: providers put those of all their applications there.
        let roles: BTreeSet<Role> = claim(claims, &self.provider.roles_claim)
            .map(words)
            .unwrap_or_default()
            .iter()
            .filter_map(|word| word.parse().ok())
            .collect();
        let projects = claim(claims, &self.provider.projects_claim);
        Ok(Principal {
            name: name.to_owned(),
            roles,
            projects: projects.map(|value| words(value).into_iter().collect()),
        })
    }

    fn words(&self, kind: &ErrorKind) -> String {
        match kind {
            ErrorKind::ExpiredSignature => "it has expired".to_owned(),
            ErrorKind::ImmatureSignature => "it is not valid yet".to_owned(),
            ErrorKind::InvalidIssuer => format!("its issuer is not {}", self.provider.issuer),
            ErrorKind::InvalidAudience => {
                format!("its audience is not {}", self.provider.audience)
            }
            ErrorKind::InvalidSignature => "its signature is not the provider's".to_owned(),
            ErrorKind::MissingRequiredClaim(claim) => format!("it has no claim {claim}"),
            other => format!("{other:?}"),
        }
    }
}

/// Whether it looks like a JWT: three parts.
pub fn is_jwt(token: &str) -> bool {
    token.bytes().filter(|byte| *byte == b'.').count() == 2
}

/// `a.b` is `b` in `a`, unless there is a claim of that very name.
fn claim<'a>(claims: &'a Value, path: &str) -> Option<&'a Value> {
    claims.get(path).or_else(|| {
        path.split('.')
            .try_fold(claims, |inside, part| inside.get(part))
    })
}

fn words(value: &Value) -> Vec<String> {
    match value {
        Value::String(text) => text.split_whitespace().map(str::to_owned).collect(),
        Value::Array(values) => values
            .iter()
            .filter_map(|value| value.as_str().map(str::to_owned))
            .collect(),
        _ => vec![],
    }
}

/// Until the authenticator is gone.
async fn refresh(source: Source, keys: std::sync::Weak<RwLock<JwkSet>>, mut failed: bool) {
    loop {
        let pause = if failed {
            RETRY_INTERVAL
        } else {
            REFRESH_INTERVAL
        };
        // A file is cheap to look at.
        let pause = if source.is_file() {
            RETRY_INTERVAL
        } else {
            pause
        };
        tokio::time::sleep(pause).await;
        let Some(keys) = keys.upgrade() else {
            return;
        };
        match fetch::fetch(&source).await {
            Ok(set) => {
                failed = false;
                *keys.write().expect("nothing panics while it is held") = set;
            }
            Err(error) => {
                failed = true;
                let error = crate::with_source(&error);
                tracing::warn!(%error, "cannot look for new OIDC keys; those known stay valid");
            }
        }
    }
}

/// Why OIDC cannot be used.
#[derive(Debug, Error)]
pub enum OidcError {
    /// No keys.
    #[error("cannot get the OIDC provider's keys")]
    Keys(#[source] FetchError),
}

#[cfg(test)]
mod tests;
