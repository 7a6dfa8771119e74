//! One-time tokens. `mt-{id}-{secret}`: the id finds the record, which has the secret's digest alone.

use std::time::{Duration, SystemTime};

use api::controller as pb;
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use super::records::{HOST_TOKENS, HostTokenRecord};
use super::secret::{hex, random};
use super::{CertificateError, Certificates};
use crate::model;
use crate::plan::Stored;
use crate::reconciler::decode;
use crate::store::{Range, Transaction};

const SCHEME: &str = "mt-";
const DEFAULT_TTL_S: u32 = 3_600;
const MAX_TTL_S: u32 = 604_800;
/// What became of a token can be looked up for so long after its end.
const KEPT: Duration = Duration::from_secs(7 * 86_400);
/// Old ones that go in one transaction.
const MAX_COLLECTED: usize = 50;

impl Certificates {
    /// Makes a token.
    ///
    /// # Errors
    /// When the host's name is none, or the store fails.
    pub async fn create_token(
        &self,
        host: &str,
        ttl_s: u32,
        creator: &str,
    ) -> Result<pb::CreateHostTokenResponse, CertificateError> {
        let oldest = self.authorities().await?.into_iter().next();
        let oldest = oldest.ok_or(CertificateError::NoAuthority)?;
        let ttl_s = match ttl_s {
            0 => DEFAULT_TTL_S,
            given => given.min(MAX_TTL_S),
        };
        let (id, secret) = (hex(&random::<8>()?), hex(&random::<32>()?));
        let now = SystemTime::now();
        let token = pb::HostToken {
            name: format!("{HOST_TOKENS}{id}"),
            host: host.to_owned(),
            create_time: Some(now.into()),
            expire_time: Some((now + Duration::from_secs(ttl_s.into())).into()),
            creator: creator.to_owned(),
            ..Default::default()
        };
        let record = HostTokenRecord {
            token: token.clone(),
            digest: Sha256::digest(&secret).to_vec(),
            key: vec![],
        };
        let mut transaction = Transaction::new().put(&token.name, record.encode_to_vec());
        for old in self.old_tokens(now).await? {
            transaction = transaction.delete(old);
        }
        self.0.store.commit(transaction).await?;
        Ok(pb::CreateHostTokenResponse {
            host_token: Some(token),
            secret: format!("{SCHEME}{id}-{secret}"),
            ca_hash: oldest.sha256,
        })
    }

    async fn old_tokens(&self, now: SystemTime) -> Result<Vec<String>, CertificateError> {
        let mut old = Vec::new();
        for token in self.tokens().await? {
            let ended = token
                .expire_time
                .and_then(|end| SystemTime::try_from(end).ok());
            if ended.is_none_or(|end| end + KEPT < now) {
                old.push(token.name);
            }
        }
        old.truncate(MAX_COLLECTED);
        Ok(old)
    }

    /// All that there are.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn tokens(&self) -> Result<Vec<pb::HostToken>, CertificateError> {
        let mut tokens = Vec::new();
        for item in self.0.store.list(Range::all(HOST_TOKENS)).await?.items {
            tokens.push(decode::<HostTokenRecord>(&item.key, &item.value)?.token);
        }
        Ok(tokens)
    }

    /// It cannot be used any more.
    ///
    /// # Errors
    /// When there is none of that name.
    pub async fn delete_token(&self, name: &str) -> Result<(), CertificateError> {
        let is_token = name.starts_with(HOST_TOKENS);
        let found = match is_token {
            true => self.0.store.get(name).await?,
            false => None,
        };
        let item = found.ok_or_else(|| CertificateError::NoSuch(name.to_owned()))?;
        let event = model::new_event(name, "HOST_TOKEN_DELETED", "");
        let transaction = Transaction::new()
            .if_unchanged(name, item.revision)
            .delete(name)
            .put(event.name.clone(), event.encode_to_vec());
        self.0.store.commit(transaction).await?;
        Ok(())
    }

    /// The record of what a host shows; nothing is told to whoever does not know the secret.
    pub(super) async fn token(
        &self,
        shown: &str,
    ) -> Result<Stored<HostTokenRecord>, CertificateError> {
        let parts = shown
            .strip_prefix(SCHEME)
            .and_then(|rest| rest.split_once('-'));
        let (id, secret) = parts.ok_or(CertificateError::UnknownToken)?;
        let plain = id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !plain {
            return Err(CertificateError::UnknownToken);
        }
        let item = self.0.store.get(&format!("{HOST_TOKENS}{id}")).await?;
        let item = item.ok_or(CertificateError::UnknownToken)?;
        let record: HostTokenRecord = decode(&item.key, &item.value)?;
        // Digests are compared, whose bytes tell nothing about the secret's.
        if record.digest != Sha256::digest(secret).to_vec() {
            return Err(CertificateError::UnknownToken);
        }
        Ok(Stored {
            record,
            revision: item.revision,
        })
    }
}
