//! Who asks, and what they may do.
//!
//! A caller is told by, in this order, a bearer token (one of a file's, or an OIDC provider's JWT), the
//! client's certificate, or being this very user on this machine's Unix socket. Where none of these is
//! set up nobody has to say anything, and everybody is [`Principal::local`].
//!
//! ```text
//! methods       which role each method needs
//! tokens        the file of tokens; oidc: JWTs and the provider's keys
//! certificate   names and roles in certificates
//! ```

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use thiserror::Error;

pub mod certificate;
pub mod methods;
pub mod oidc;
pub mod tokens;

pub use oidc::Oidc;
pub use tokens::Tokens;

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Looks at everything but secrets.
    Viewer,
    /// Makes, changes and removes what is in projects.
    Operator,
    /// Also projects, quotas and hosts.
    Admin,
    /// Breaks things on purpose; an admin may not, unless also this.
    FaultInjector,
}

impl Role {
    /// All there are.
    pub const ALL: [Self; 4] = [
        Self::Viewer,
        Self::Operator,
        Self::Admin,
        Self::FaultInjector,
    ];

    /// As tokens and certificates write it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
            Self::FaultInjector => "fault-injector",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for Role {
    type Err = UnknownRole;

    fn from_str(word: &str) -> Result<Self, UnknownRole> {
        Self::ALL
            .into_iter()
            .find(|role| role.word() == word)
            .ok_or_else(|| UnknownRole {
                word: word.to_owned(),
            })
    }
}

/// No such role.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{word:?} is no role; there are viewer, operator, admin and fault-injector")]
pub struct UnknownRole {
    word: String,
}

/// A caller, in the extensions of every request that got past the gate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// As the token or certificate has it; `local` where nobody has to say who they are.
    pub name: String,
    /// What it may do.
    pub roles: BTreeSet<Role>,
    /// The only projects it may see and change; `None` for all, and for what is in no project.
    pub projects: Option<BTreeSet<String>>,
}

impl Principal {
    /// Who may do everything: the user of this machine.
    pub fn local() -> Self {
        Self {
            name: "local".to_owned(),
            roles: Role::ALL.into(),
            projects: None,
        }
    }

    /// Whether one of its roles is `needed` or contains it.
    pub fn has(&self, needed: Role) -> bool {
        self.roles.iter().any(|held| match (held, needed) {
            (held, needed) if *held == needed => true,
            // Who may break things may look at what comes of it.
            (_, Role::Viewer) => true,
            (Role::Admin, Role::Operator) => true,
            _ => false,
        })
    }

    /// Whether a resource (`projects/p/vms/v`, `projects/-`, `hosts/h`, nothing) is among those that it
    /// may see. What is in no project belongs to nobody in particular.
    pub fn may_see(&self, resource: &str) -> bool {
        let Some(projects) = &self.projects else {
            return true;
        };
        match resource.strip_prefix("projects/") {
            Some(rest) => projects.contains(rest.split('/').next().unwrap_or_default()),
            None => true,
        }
    }

    /// `viewer, operator`, for messages.
    pub fn roles_in_words(&self) -> String {
        let words: Vec<&str> = self.roles.iter().map(|role| role.word()).collect();
        match words.is_empty() {
            true => "no role".to_owned(),
            false => words.join(", "),
        }
    }
}

/// Why a caller is not known.
#[derive(Debug, Error)]
pub enum AuthError {
    /// Nothing was given.
    #[error(
        "who asks? Give a token (vmctl --token-file, or metadata `authorization: Bearer ...`) or a client certificate"
    )]
    Nothing,
    /// The header is not of the form that tokens have.
    #[error("the metadata `authorization` is not `Bearer TOKEN`")]
    NotBearer,
    /// No file and no provider knows it.
    #[error(
        "this token is not known here; it may have been withdrawn, or is another installation's"
    )]
    UnknownToken,
    /// A JWT that is not right.
    #[error("this token is not accepted: {reason}")]
    BadToken {
        /// Expired, of another issuer ...
        reason: String,
    },
    /// A certificate that names no user.
    #[error(
        "the client certificate names no user; it needs a SAN URI such as mortise://users/NAME?roles=operator"
    )]
    NoUser,
    /// A certificate or token with something in it that is not understood.
    #[error("the credentials of {name} are not understood")]
    BadRole {
        /// Whose they are.
        name: String,
        /// What is wrong.
        #[source]
        source: UnknownRole,
    },
}

/// How callers are told apart.
#[derive(Debug, Default)]
pub struct Authenticator {
    tokens: Option<Tokens>,
    oidc: Option<Oidc>,
    certificates: bool,
}

/// What a request brings along.
#[derive(Debug, Default, Clone)]
pub struct Credentials {
    /// Metadata `authorization`.
    pub authorization: Option<String>,
    /// DER of the client's certificate, verified by TLS.
    pub certificate: Option<Vec<u8>>,
    /// The user at the other end of a Unix socket.
    pub unix_uid: Option<u32>,
}

impl Authenticator {
    /// Nobody has to say who they are.
    pub fn off() -> Self {
        Self::default()
    }

    /// Takes the tokens of a file.
    #[must_use]
    pub fn with_tokens(mut self, tokens: Tokens) -> Self {
        self.tokens = Some(tokens);
        self
    }

    /// Takes a provider's JWTs.
    #[must_use]
    pub fn with_oidc(mut self, oidc: Oidc) -> Self {
        self.oidc = Some(oidc);
        self
    }

    /// Takes client certificates that TLS has verified.
    #[must_use]
    pub fn with_certificates(mut self) -> Self {
        self.certificates = true;
        self
    }

    /// Whether callers have to say who they are.
    pub fn is_on(&self) -> bool {
        self.tokens.is_some() || self.oidc.is_some() || self.certificates
    }

    /// Who asks.
    ///
    /// # Errors
    /// When that cannot be told.
    pub fn authenticate(&self, credentials: &Credentials) -> Result<Principal, AuthError> {
        if !self.is_on() {
            return Ok(Principal::local());
        }
        if let Some(authorization) = &credentials.authorization {
            let token = authorization
                .split_once(' ')
                .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
                .map(|(_, token)| token.trim())
                .ok_or(AuthError::NotBearer)?;
            if let Some(principal) = self.tokens.as_ref().and_then(|tokens| tokens.find(token)) {
                return Ok(principal);
            }
            return match &self.oidc {
                Some(oidc) if oidc::is_jwt(token) => oidc.verify(token),
                _ => Err(AuthError::UnknownToken),
            };
        }
        if let Some(certificate) = credentials
            .certificate
            .as_ref()
            .filter(|_| self.certificates)
        {
            return certificate::principal(certificate);
        }
        // The socket is this user's alone; root gets everywhere anyway.
        let own = nix::unistd::geteuid().as_raw();
        match credentials.unix_uid {
            Some(uid) if uid == own || uid == 0 => Ok(Principal::local()),
            _ => Err(AuthError::Nothing),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn principal(roles: &[Role], projects: Option<&[&str]>) -> Principal {
        Principal {
            name: "a".into(),
            roles: roles.iter().copied().collect(),
            projects: projects.map(|projects| projects.iter().map(|p| (*p).to_owned()).collect()),
        }
    }

    #[test]
    fn roles_contain_one_another_but_faults_are_apart() {
        let admin = principal(&[Role::Admin], None);
        assert!(admin.has(Role::Operator) && admin.has(Role::Viewer));
        assert!(
            !admin.has(Role::FaultInjector),
            "breaking things is a role of its own"
        );
        let injector = principal(&[Role::FaultInjector], None);
        assert!(injector.has(Role::Viewer) && !injector.has(Role::Operator));
        assert!(!principal(&[Role::Viewer], None).has(Role::Operator));
        assert!(!principal(&[], None).has(Role::Viewer));
    }

    #[test]
    fn projects_bound_what_is_seen() {
        let bound = principal(&[Role::Viewer], Some(&["p"]));
        assert!(bound.may_see("projects/p/vms/v") && bound.may_see("projects/p"));
        assert!(!bound.may_see("projects/q/vms/v") && !bound.may_see("projects/-"));
        assert!(!bound.may_see("projects/"));
        assert!(principal(&[Role::Viewer], None).may_see("projects/-"));
    }

    #[test]
    fn without_credentials_only_this_user_gets_in() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens.json");
        std::fs::write(&file, "[]").unwrap();
        let on = Authenticator::off().with_tokens(Tokens::open(&file).unwrap());
        let none = Credentials::default();
        assert!(matches!(on.authenticate(&none), Err(AuthError::Nothing)));
        let local = Credentials {
            unix_uid: Some(nix::unistd::geteuid().as_raw()),
            ..none.clone()
        };
        assert_eq!(on.authenticate(&local).unwrap(), Principal::local());
        let stranger = Credentials {
            unix_uid: Some(nix::unistd::geteuid().as_raw() + 4711),
            ..none.clone()
        };
        assert!(on.authenticate(&stranger).is_err());
        let basic = Credentials {
            authorization: Some("Basic YTpi".into()),
            ..none.clone()
        };
        assert!(matches!(on.authenticate(&basic), Err(AuthError::NotBearer)));
        assert_eq!(
            Authenticator::off().authenticate(&none).unwrap(),
            Principal::local()
        );
    }
}
