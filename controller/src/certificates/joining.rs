//! Hosts that join with a token, and renew with the certificate they got.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use api::controller as pb;
use api::listen::Address;
use pki::{Authority, Name};
use prost::Message as _;

use super::records::withdrawn_key;
use super::{CertificateError, Certificates, MAX_ATTEMPTS};
use crate::model::{self, HostRecord};
use crate::reconciler::decode;
use crate::store::{SharedStore, StoreError, Transaction};

/// Ids are in keys and certificates.
const MAX_ID_BYTES: usize = 63;
/// Certificates tell whole seconds: one that begins so long after what was withdrawn is a later one.
const NEXT_BEGINS: Duration = Duration::from_secs(1);

impl Certificates {
    /// Lets a host in: its record, its certificate, and the token's end are one transaction.
    ///
    /// # Errors
    /// When the token is not good for it.
    pub async fn join(
        &self,
        request: &pb::JoinHostRequest,
    ) -> Result<pb::JoinHostResponse, CertificateError> {
        for _ in 1..MAX_ATTEMPTS {
            match self.try_join(request).await {
                Err(CertificateError::Store(StoreError::Conflict { .. })) => {}
                done => return done,
            }
        }
        self.try_join(request).await
    }

    async fn try_join(
        &self,
        request: &pb::JoinHostRequest,
    ) -> Result<pb::JoinHostResponse, CertificateError> {
        let lifetime = self.own_authority()?.lifetime;
        let mut token = self.token(&request.token).await?;
        let key = Authority::key_of(&request.request)?;
        let told = &token.record.token;
        let named = model::host_id(&told.host).to_owned();
        let id = match named.is_empty() || !request.fresh {
            true => request.host_id.clone(),
            false => named.clone(),
        };
        let name = host_name(&id)?;
        let repeated = told.used_by == name && token.record.key == key;
        if !told.used_by.is_empty() && !repeated {
            return Err(CertificateError::UsedToken {
                host: told.used_by.clone(),
                time: told
                    .use_time
                    .map(|time| time.to_string())
                    .unwrap_or_default(),
            });
        }
        let end = told
            .expire_time
            .and_then(|end| SystemTime::try_from(end).ok());
        if end.is_none_or(|end| end < SystemTime::now()) {
            let time = told.expire_time.map(|time| time.to_string());
            let time = time.unwrap_or_default();
            return Err(CertificateError::ExpiredToken { time });
        }
        if !named.is_empty() && named != id {
            let wanted = told.host.clone();
            return Err(CertificateError::ForeignToken { wanted, host: name });
        }
        let address = request.address.parse::<Address>().ok();
        if !address.is_some_and(|address| address.is_tls()) {
            return Err(CertificateError::BadHost(format!(
                "{:?} is no address to reach the host at: https://HOST:PORT",
                request.address
            )));
        }

        let store = &self.0.store;
        let stored = store.get(&name).await?;
        let mut withdrawn = withdrawn(store, &id).await?;
        let may_be_there = !named.is_empty() || repeated;
        if (stored.is_some() || withdrawn.is_some()) && !may_be_there {
            return Err(CertificateError::Known { host: name });
        }
        let joins_again = stored.is_some() && !repeated;
        if joins_again {
            // What it had may be in other hands, which is why hosts join again.
            let last_begins = withdrawn.map(|withdrawn| withdrawn + NEXT_BEGINS);
            withdrawn = Some(last_begins.unwrap_or(UNIX_EPOCH).max(SystemTime::now()));
        }
        let not_before = withdrawn.map(|withdrawn| withdrawn + NEXT_BEGINS);
        let asked = &request.request;
        let (certificate, authority) =
            self.issue(asked, &Name::Host(id.clone()), lifetime, not_before)?;
        let mut transaction = Transaction::new().if_unchanged(told.name.clone(), token.revision);
        let mut record = match &stored {
            Some(item) => {
                transaction = transaction.if_unchanged(&name, item.revision);
                decode(&item.key, &item.value)?
            }
            None => {
                transaction = transaction.if_absent(&name);
                HostRecord {
                    name: name.clone(),
                    create_time: Some(model::now()),
                    generation: 1,
                    ..Default::default()
                }
            }
        };
        record.address.clone_from(&request.address);
        record.authority = authority;
        record.certificates_after = withdrawn.map(Into::into);
        token.record.token.used_by.clone_from(&name);
        token.record.token.use_time = Some(model::now());
        token.record.key = key;
        let event = model::new_event(&name, "HOST_JOINED", record.address.clone());
        if let Some(withdrawn) = withdrawn.filter(|_| joins_again) {
            let time = prost_types::Timestamp::from(withdrawn);
            transaction = transaction.put(withdrawn_key(&id), time.encode_to_vec());
        }
        let transaction = transaction
            .put(&name, record.encode_to_vec())
            .put(
                token.record.token.name.clone(),
                token.record.encode_to_vec(),
            )
            .put(event.name.clone(), event.encode_to_vec());
        store.commit(transaction).await?;
        Ok(pb::JoinHostResponse {
            host: name,
            certificate: Some(certificate),
        })
    }

    /// The next certificate of a host; `shown` is its present one, which TLS has verified.
    ///
    /// # Errors
    /// When it is no host's, or the host was deleted.
    pub async fn renew_host(
        &self,
        shown: Option<&[u8]>,
        request: &[u8],
    ) -> Result<pb::IssuedCertificate, CertificateError> {
        let Some(Name::Host(id)) = shown.and_then(Name::of) else {
            return Err(CertificateError::NoHostCertificate);
        };
        let lifetime = self.own_authority()?.lifetime;
        let store = &self.0.store;
        let host = host_name(&id)?;
        let item = store.get(&host).await?;
        let Some(item) = item else {
            return Err(CertificateError::Withdrawn { host });
        };
        let mut record: HostRecord = decode(&item.key, &item.value)?;
        let after = record.certificates_after;
        let after = after.and_then(|after| SystemTime::try_from(after).ok());
        let begins = shown.and_then(pki::begins);
        if after.is_some() && begins <= after {
            return Err(CertificateError::Withdrawn { host });
        }
        let not_before = after.map(|after| after + NEXT_BEGINS);
        let (certificate, authority) =
            self.issue(request, &Name::Host(id), lifetime, not_before)?;
        if record.authority != authority {
            record.authority = authority;
            let transaction = Transaction::new()
                .if_unchanged(&host, item.revision)
                .put(&host, record.encode_to_vec());
            match store.commit(transaction).await {
                // It is noted at the next time.
                Ok(_) | Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(certificate)
    }
}

/// Since when certificates of a host count, if it was deleted or joined again.
///
/// # Errors
/// When the store fails.
pub async fn withdrawn(store: &SharedStore, host: &str) -> Result<Option<SystemTime>, StoreError> {
    let Some(item) = store.get(&withdrawn_key(host)).await? else {
        return Ok(None);
    };
    let time: prost_types::Timestamp = decode(&item.key, &item.value)?;
    Ok(SystemTime::try_from(time).ok())
}

fn host_name(id: &str) -> Result<String, CertificateError> {
    let good = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    if id.is_empty() || id.len() > MAX_ID_BYTES || !id.bytes().all(good) {
        return Err(CertificateError::BadHost(format!(
            "{id:?} is no host's id: up to {MAX_ID_BYTES} of a-z, 0-9 and hyphen"
        )));
    }
    Ok(model::host_name(id))
}
