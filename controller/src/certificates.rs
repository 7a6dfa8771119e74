//! What this controller shows and whom it believes.
//!
//! By default certificates come from an authority of the installation's own. It is in the store, so all replicas have
//! the same one and none has to be set up: the certificate as it is, the key sealed with a secret that is in a
//! file of each controller ([`secret`]). Whoever reads the store, a backup of it or etcd's disks makes no
//! certificates. The controller's own key is never stored; its certificate is made at each start and in time
//! before it ends.
//!
//! Several authorities are believed at a time while one follows the other. The newest makes the certificates of
//! hosts and users; controllers show one that the oldest made, which everybody knows, until that is deleted.
//!
//! ```text
//! records   what is stored of authorities, tokens and withdrawn certificates
//! secret    what keys are sealed with
//! tokens    one-time tokens; joining: hosts that come with them, and renew
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use api::controller as pb;
use api::tls;
use pki::{
    Authority, Clients, Credentials, Expect, Files, Held, Identity, Material, Name, Request,
};
use prost::Message as _;
use rustls::pki_types::CertificateDer;
use thiserror::Error;

use crate::model::{self, HostRecord};
use crate::reconciler::{decode, with_source};
use crate::store::{Range, SharedStore, StoreError, Transaction};

mod joining;
mod records;
mod secret;
mod tokens;

pub use joining::withdrawn;
pub use records::withdrawn_key;
pub use secret::{Secret, SecretError};

use records::{AUTHORITIES, AuthorityRecord, authority_key};

/// Between two looks at the own certificate's end and at the store, if that cannot be watched.
const LOOK_INTERVAL: Duration = Duration::from_secs(30);
/// A part of a lifetime, out of 100, after which a certificate is replaced.
const RENEW_AFTER: u32 = 50;
/// Authorities that follow each other at the same time are tried again.
const MAX_ATTEMPTS: u32 = 8;

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct Certificates(Arc<Inner>);

struct Inner {
    store: SharedStore,
    credentials: Credentials,
    own: Option<Own>,
}

/// The installation's own authorities.
struct Own {
    secret: Secret,
    held: Held,
    /// By number: the oldest first.
    known: RwLock<BTreeMap<u64, Arc<Known>>>,
    name: Name,
    hosts: Vec<String>,
    lifetime: Duration,
}

/// An authority.
struct Known {
    record: AuthorityRecord,
    authority: Authority,
}

impl Certificates {
    /// Of the installation's own authority, which is made if there is none. `hosts` are names and
    /// addresses that this controller is reached at.
    ///
    /// # Errors
    /// When the store fails, or its authority was sealed with another secret.
    pub async fn own(
        store: SharedStore,
        secret: &Path,
        hosts: Vec<String>,
        lifetime: Duration,
    ) -> Result<Self, CertificateError> {
        let listing = store.list(Range::all(AUTHORITIES)).await?;
        let secret = match listing.items.is_empty() {
            true => Secret::open_or_make(secret)?,
            false => Secret::open(secret)?,
        };
        let held = Held::default();
        let own = Own {
            secret,
            held: held.clone(),
            known: RwLock::default(),
            name: Name::Controller(model::new_uid()),
            hosts,
            lifetime,
        };
        let certificates = Self(Arc::new(Inner {
            store,
            credentials: held.credentials(),
            own: Some(own),
        }));
        if listing.items.is_empty() {
            match certificates.add_authority(1).await {
                // Another replica was first.
                Ok(_) | Err(CertificateError::Store(StoreError::Conflict { .. })) => {}
                Err(error) => return Err(error),
            }
        }
        certificates.reload().await?;
        Ok(certificates)
    }

    /// Of files that somebody else's authority filled.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn of_files(store: SharedStore, files: Files) -> Result<Self, CertificateError> {
        let credentials = Credentials::of_files(files)?;
        Ok(Self(Arc::new(Inner {
            store,
            credentials,
            own: None,
        })))
    }

    /// For servers of the API.
    pub fn server(&self) -> tls::Server {
        let credentials = self.0.credentials.clone();
        let known = credentials.clone();
        tls::Server::new(move || credentials.server(Clients::Anybody))
            .watching(move |chain| known.watch_client(Clients::Anybody, chain))
    }

    /// For calls to hosts.
    pub fn client(&self, expect: Expect) -> tls::Client {
        let credentials = self.0.credentials.clone();
        let (known, expected) = (credentials.clone(), expect.clone());
        tls::Client::new(move || credentials.client(expect.clone()))
            .watching(move |(chain, asked)| known.watch_server(expected.clone(), chain, asked))
    }

    /// Follows the authorities in the store and renews the own certificate, for ever.
    pub async fn keep(self) {
        if self.0.own.is_none() {
            return;
        }
        loop {
            if let Err(error) = self.follow().await {
                tracing::error!(error = %with_source(&error), "cannot keep certificates up to date");
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        }
    }

    async fn follow(&self) -> Result<(), CertificateError> {
        let revision = self.reload().await?;
        let mut changes = self.0.store.watch(AUTHORITIES, revision).await?;
        loop {
            let identity = self.0.credentials.now().identity.clone();
            let due = identity.map(|identity| identity.after(RENEW_AFTER));
            let left = due.and_then(|due| due.duration_since(SystemTime::now()).ok());
            let left = left.unwrap_or_default().min(LOOK_INTERVAL);
            match tokio::time::timeout(left, changes.recv()).await {
                Ok(Some(Ok(_))) => drop(self.reload().await?),
                Ok(Some(Err(StoreError::Compacted { .. })) | None) => return Ok(()),
                Ok(Some(Err(error))) => return Err(error.into()),
                Err(_) if due.is_none_or(|due| due <= SystemTime::now()) => self.renew()?,
                Err(_) => {}
            }
        }
    }

    /// Reads the authorities, and shows a certificate of the oldest. Answers the revision.
    async fn reload(&self) -> Result<u64, CertificateError> {
        let own = self.own_authority()?;
        let listing = self.0.store.list(Range::all(AUTHORITIES)).await?;
        let mut known = BTreeMap::new();
        for item in &listing.items {
            let record: AuthorityRecord = decode(&item.key, &item.value)?;
            let key = own.secret.unseal(&record.sealed_key, &item.key)?;
            let authority = Authority::load(record.certificate.clone(), &key)?;
            known.insert(record.number, Arc::new(Known { record, authority }));
        }
        let oldest = |known: &BTreeMap<u64, Arc<Known>>| known.keys().next().copied();
        let believed =
            |known: &BTreeMap<u64, Arc<Known>>| known.keys().copied().collect::<Vec<_>>();
        let (before, after) = {
            let mut guard = own.known.write().unwrap_or_else(PoisonError::into_inner);
            let before = std::mem::replace(&mut *guard, known);
            (before, guard.clone())
        };
        if believed(&before) != believed(&after) || oldest(&before) != oldest(&after) {
            self.renew()?;
        }
        Ok(listing.revision)
    }

    /// A fresh key and certificate for this controller.
    fn renew(&self) -> Result<(), CertificateError> {
        let own = self.own_authority()?;
        let known = own.all();
        let oldest = known.first().ok_or(CertificateError::NoAuthority)?;
        let request = Request::new()?;
        let issuer = &oldest.authority;
        let chain = issuer.issue(&request.der, &own.name, &own.hosts, own.lifetime, None)?;
        let identity = Identity::from_pem(pki::pem(&chain).as_bytes(), request.key_pem.as_bytes())?;
        tracing::info!(name = %own.name, "shows a new certificate");
        own.held.replace(Material {
            identity: Some(identity),
            authorities: own.believed(),
        });
        Ok(())
    }

    async fn add_authority(&self, number: u64) -> Result<AuthorityRecord, CertificateError> {
        let own = self.own_authority()?;
        let authority = Authority::new()?;
        let key = authority_key(number);
        let record = AuthorityRecord {
            number,
            certificate: authority.certificate().to_vec(),
            sealed_key: own.secret.seal(&authority.key_der(), &key)?,
            create_time: Some(model::now()),
        };
        let event = model::new_event(&key, "AUTHORITY_CREATED", record.sha256());
        let transaction = Transaction::new()
            .if_absent(&key)
            .put(&key, record.encode_to_vec())
            .put(event.name.clone(), event.encode_to_vec());
        self.0.store.commit(transaction).await?;
        Ok(record)
    }

    fn own_authority(&self) -> Result<&Own, CertificateError> {
        self.0.own.as_ref().ok_or(CertificateError::NotOurs)
    }

    /// All that are believed, oldest first.
    ///
    /// # Errors
    /// When authorities are somebody else's, or the store fails.
    pub async fn authorities(&self) -> Result<Vec<pb::Authority>, CertificateError> {
        let known = self.own_authority()?.all();
        let hosts = self.0.store.list(Range::all(model::HOSTS)).await?;
        let mut counts: BTreeMap<String, u32> = BTreeMap::new();
        for item in &hosts.items {
            let record: HostRecord = decode(&item.key, &item.value)?;
            *counts.entry(record.authority).or_default() += 1;
        }
        let newest = known.last().map(|known| known.record.number);
        let visible = known.iter().map(|known| {
            let mut visible = known.record.visible(Some(known.record.number) == newest);
            visible.hosts = counts.get(&visible.sha256).copied().unwrap_or_default();
            visible
        });
        Ok(visible.collect())
    }

    /// Adds one, which makes certificates from now on.
    ///
    /// # Errors
    /// As [`Certificates::authorities`].
    pub async fn rotate(&self) -> Result<pb::Authority, CertificateError> {
        for _ in 0..MAX_ATTEMPTS {
            self.reload().await?;
            let newest = self.own_authority()?.all();
            let number = newest.last().map_or(1, |known| known.record.number + 1);
            match self.add_authority(number).await {
                Err(CertificateError::Store(StoreError::Conflict { .. })) => {}
                Err(error) => return Err(error),
                Ok(record) => {
                    self.reload().await?;
                    return Ok(record.visible(true));
                }
            }
        }
        Err(CertificateError::NoAuthority)
    }

    /// Its certificates count no more.
    ///
    /// # Errors
    /// When it is the newest, or hosts have certificates of it, unless `force`.
    pub async fn delete_authority(&self, name: &str, force: bool) -> Result<(), CertificateError> {
        let all = self.authorities().await?;
        let found = all.iter().find(|authority| authority.name == name);
        let found = found.ok_or_else(|| CertificateError::NoSuch(name.to_owned()))?;
        if found.active {
            return Err(CertificateError::Active(name.to_owned()));
        }
        if found.hosts > 0 && !force {
            let hosts = found.hosts;
            return Err(CertificateError::InUse(name.to_owned(), hosts));
        }
        let event = model::new_event(name, "AUTHORITY_DELETED", found.sha256.clone());
        let transaction = Transaction::new()
            .delete(name)
            .put(event.name.clone(), event.encode_to_vec());
        self.0.store.commit(transaction).await?;
        self.reload().await.map(drop)
    }

    /// A certificate by the newest authority.
    fn issue(
        &self,
        request: &[u8],
        name: &Name,
        lifetime: Duration,
        not_before: Option<SystemTime>,
    ) -> Result<(pb::IssuedCertificate, String), CertificateError> {
        let own = self.own_authority()?;
        let known = own.all();
        let newest = known.last().ok_or(CertificateError::NoAuthority)?;
        let issuer = &newest.authority;
        let chain = issuer.issue(request, name, &[], lifetime, not_before)?;
        let issued = pb::IssuedCertificate {
            chain: pki::pem(&chain),
            authorities: pki::pem(&own.believed()),
            expire_time: Some((SystemTime::now() + lifetime).into()),
        };
        Ok((issued, newest.record.sha256()))
    }

    /// A user's certificate.
    ///
    /// # Errors
    /// When name or roles are not right, or the request is none.
    pub fn issue_user(
        &self,
        request: &pb::IssueUserCertificateRequest,
    ) -> Result<pb::IssuedCertificate, CertificateError> {
        let user = user_name(request)?;
        let lifetime_s = match request.lifetime_s {
            0 => 30 * 86_400,
            given => given,
        };
        let lifetime = Duration::from_secs(lifetime_s.into());
        Ok(self
            .issue(&request.request, &Name::User(user), lifetime, None)?
            .0)
    }
}

impl Own {
    fn all(&self) -> Vec<Arc<Known>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.values().cloned().collect()
    }

    fn believed(&self) -> Vec<CertificateDer<'static>> {
        let known = self.all();
        let certificates = known
            .iter()
            .map(|known| known.authority.certificate().clone());
        certificates.collect()
    }
}

/// `NAME?roles=...&projects=...`
fn user_name(request: &pb::IssueUserCertificateRequest) -> Result<String, CertificateError> {
    let plain = |text: &str| {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b".-_@".contains(&byte);
        (1..=128).contains(&text.len()) && text.bytes().all(good)
    };
    let words = std::iter::once(&request.user)
        .chain(&request.roles)
        .chain(&request.projects);
    if let Some(bad) = words.into_iter().find(|word| !plain(word)) {
        return Err(CertificateError::BadUser(format!(
            "{bad:?} cannot be in a certificate: letters, digits, '.', '-', '_' and '@' can"
        )));
    }
    for role in &request.roles {
        let known = role.parse::<gate::auth::Role>();
        known.map_err(|error| CertificateError::BadUser(error.to_string()))?;
    }
    let mut name = format!("{}?roles={}", request.user, request.roles.join(","));
    if !request.projects.is_empty() {
        name.push_str(&format!("&projects={}", request.projects.join(",")));
    }
    Ok(name)
}

/// Why there is no certificate.
#[derive(Debug, Error)]
pub enum CertificateError {
    /// Somebody else makes them.
    #[error(
        "certificates are not made here: the controller has --tls-cert and --client-ca. Have that authority make one for mortise://hosts/ID, start the agent with it and name it with controller --node https://HOST:PORT"
    )]
    NotOurs,
    /// All were deleted, or too many change it.
    #[error("there is no authority at the moment; try again")]
    NoAuthority,
    /// Of that name.
    #[error("{0} is not there")]
    NoSuch(String),
    /// The newest.
    #[error(
        "{0} makes the certificates; rotate first, and delete it when hosts have renewed theirs"
    )]
    Active(String),
    /// By hosts.
    #[error("{1} hosts show certificates of {0}; they renew them by themselves: wait, or force")]
    InUse(String, u32),
    /// A user's name or role.
    #[error("{0}")]
    BadUser(String),
    /// What a host is named by a token, or names itself.
    #[error("{0}")]
    BadHost(String),
    /// Guessed, mistyped, deleted.
    #[error(
        "this token is not known here: it was mistyped or deleted, or is another installation's; make one with `vmctl host token create`"
    )]
    UnknownToken,
    /// One-time tokens are good once.
    #[error(
        "this token was used by {host} at {time}, and is good for one host once; make another with `vmctl host token create`"
    )]
    UsedToken {
        /// Who.
        host: String,
        /// When.
        time: String,
    },
    /// Too late.
    #[error("this token expired at {time}; make another with `vmctl host token create`")]
    ExpiredToken {
        /// When.
        time: String,
    },
    /// For somebody else.
    #[error("this token is for {wanted}, and this is {host}; make one with `vmctl host token create --host {id}`", id = host.trim_start_matches("hosts/"))]
    ForeignToken {
        /// Whom it is for.
        wanted: String,
        /// Who came.
        host: String,
    },
    /// A token for new hosts is none for one that is there.
    #[error("{host} was here before, so it needs a token of its own: `vmctl host token create --host {id}`", id = host.trim_start_matches("hosts/"))]
    Known {
        /// Who.
        host: String,
    },
    /// It was deleted, or joined again.
    #[error("{host} was deleted or joined again, and its certificate counts no more; to have it back, `vmctl host token create --host {id}` and join again", id = host.trim_start_matches("hosts/"))]
    Withdrawn {
        /// Who.
        host: String,
    },
    /// Not a host's.
    #[error("hosts renew with their present certificate, and this caller showed none of a host")]
    NoHostCertificate,
    /// The secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The files.
    #[error(transparent)]
    Material(#[from] pki::MaterialError),
    /// The request.
    #[error(transparent)]
    Issue(#[from] pki::IssueError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}
