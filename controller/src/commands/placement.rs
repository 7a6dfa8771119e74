//! Placing: a host is chosen, and what it promises is written in the transaction that says so. Whoever
//! else promised something of the same host in between makes that transaction fail, and it is tried again
//! with what is true then.

use std::collections::BTreeSet;

use api::controller as pb;
use api::names::Name;
use api::validate::LOCAL_POOL;
use prost::Message;
use tokio::sync::OwnedMutexGuard;

use super::{CommandError, get_network, get_volume};
use crate::hosts::Hosts;
use crate::model::{self, ReservationRecord, VmRecord, VolumeRecord, host_id, host_name};
use crate::plan::Stored;
use crate::reconciler::decode;
use crate::scheduler::{self, Request, Verdict};
use crate::store::{SharedStore, StoreError, Transaction};

/// Hosts that fill up between being chosen and being asked, one after the other.
const MAX_CHOICES: usize = 64;

/// A host that was chosen, as long as the transaction lasts.
pub struct Place {
    host: String,
    promised: ReservationRecord,
    next: ReservationRecord,
    revision: u64,
    /// Nobody else of this process promises anything of this host meanwhile.
    _alone: Option<OwnedMutexGuard<()>>,
}

impl Place {
    /// The host's id.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Notes it in a VM's record.
    pub fn note(&self, record: &mut VmRecord) {
        record.host = self.host.clone();
        record.placements += 1;
        record.unplaced.clear();
        record.promised = Some((&self.promised).into());
    }

    /// Adds the promise to a transaction.
    #[must_use]
    pub fn promise(&self, transaction: Transaction) -> Transaction {
        put_reservation(transaction, &self.host, &self.next, self.revision)
    }

    /// Ends with the transaction, which was done, or was not.
    ///
    /// # Errors
    /// What the transaction ended with.
    pub async fn settle(
        self,
        store: &SharedStore,
        hosts: &Hosts,
        done: Result<u64, StoreError>,
    ) -> Result<u64, StoreError> {
        match &done {
            Ok(revision) => {
                let (record, revision) = (self.next.clone(), *revision);
                hosts.promised(&self.host, Stored { record, revision });
            }
            Err(_) => hosts.look_up(store, &self.host).await?,
        }
        done
    }
}

/// What became of the search for a host.
pub enum Placing {
    /// One was found.
    Found(Box<Place>),
    /// None was; all of them say why.
    None(Vec<Verdict>),
}

/// Looks for a host.
///
/// # Errors
/// When hosts fill up faster than they are found.
pub async fn place(hosts: &Hosts, request: &Request) -> Result<Placing, StoreError> {
    for _ in 0..MAX_CHOICES {
        let host = match hosts.choose(request) {
            Ok(host) => host,
            Err(verdicts) => return Ok(Placing::None(verdicts)),
        };
        if let Some((alone, reserved)) = hosts.hold(&host, request).await {
            return Ok(Placing::Found(Box::new(Place {
                host,
                promised: request.demand.clone(),
                next: reserved.record.plus(&request.demand),
                revision: reserved.revision,
                _alone: Some(alone),
            })));
        }
    }
    let key = model::RESERVATIONS.to_owned();
    Err(StoreError::Conflict { key })
}

/// Promises what a VM takes on the host where it was found: it is there, whatever was promised.
///
/// # Errors
/// When the store fails.
pub async fn place_at(
    store: &SharedStore,
    host: &str,
    request: &Request,
) -> Result<Place, StoreError> {
    let reserved = reservation(store, host).await?;
    Ok(Place {
        host: host.to_owned(),
        promised: request.demand.clone(),
        next: reserved.record.plus(&request.demand),
        revision: reserved.revision,
        _alone: None,
    })
}

/// Gives back what a VM's host had promised it.
///
/// # Errors
/// When the store fails.
pub async fn release(
    store: &SharedStore,
    record: &VmRecord,
    transaction: Transaction,
) -> Result<Transaction, StoreError> {
    let Some(promised) = record.promised.as_ref().filter(|_| !record.host.is_empty()) else {
        return Ok(transaction);
    };
    let reserved = reservation(store, &record.host).await?;
    let next = reserved.record.minus(&promised.into());
    Ok(put_reservation(
        transaction,
        &record.host,
        &next,
        reserved.revision,
    ))
}

/// Takes a VM from its host: another one is chosen for it. What the host may still have of it goes before
/// the host gets anything of that VM again. `record` has yet to be put.
///
/// # Errors
/// When the store fails.
pub async fn unplace(
    store: &SharedStore,
    record: &mut VmRecord,
    transaction: Transaction,
) -> Result<Transaction, StoreError> {
    let transaction = release(store, record, transaction).await?;
    let key = model::eviction_key(&record.host, &record.node_id);
    record.host.clear();
    record.promised = None;
    Ok(transaction.put(key, Vec::new()))
}

async fn reservation(
    store: &SharedStore,
    host: &str,
) -> Result<Stored<ReservationRecord>, StoreError> {
    let item = store.get(&model::reservation_key(host)).await?;
    Ok(match item {
        Some(item) => Stored {
            record: decode(&item.key, &item.value)?,
            revision: item.revision,
        },
        None => Stored {
            record: ReservationRecord::default(),
            revision: 0,
        },
    })
}

fn put_reservation(
    transaction: Transaction,
    host: &str,
    next: &ReservationRecord,
    revision: u64,
) -> Transaction {
    let key = model::reservation_key(host);
    let transaction = match revision {
        0 => transaction.if_absent(key.clone()),
        revision => transaction.if_unchanged(key.clone(), revision),
    };
    transaction.put(key, next.encode_to_vec())
}

/// What a VM asks of a host. `None`: a volume of it has no host yet, so nobody knows.
///
/// # Errors
/// When the store fails, or what the spec names is not there.
pub async fn vm_request(
    store: &SharedStore,
    name: &Name,
    spec: &pb::VmSpec,
) -> Result<Option<Request>, CommandError> {
    let mut switched = BTreeSet::new();
    for nic in &spec.nics {
        let Ok(network) = Name::parse_network(&nic.network) else {
            continue;
        };
        let record = get_network(store, &network).await?.record;
        let datapath = record.network.spec.unwrap_or_default().datapath();
        if datapath == pb::Datapath::Switch {
            switched.insert(nic.network.clone());
        }
    }
    let mut request = Request::of_vm(&name.project, &name.to_string(), spec, &switched);
    for disk in &spec.disks {
        let Some(pb::disk::Source::Volume(volume)) = &disk.source else {
            continue;
        };
        let Ok(volume) = Name::parse_volume(volume) else {
            continue;
        };
        let record = get_volume(store, &volume).await?.record;
        if !is_local(&record) {
            continue;
        }
        if record.host.is_empty() {
            return Ok(None);
        }
        request.bound.push((model::short(&volume), record.host));
    }
    Ok(Some(request))
}

/// It is in the pool of one host, and can be used there alone.
pub fn is_local(record: &VolumeRecord) -> bool {
    record.shared().is_none()
}

/// Chooses the host whose pool gets a volume, by its id; empty while there is none that could.
///
/// # Errors
/// When the volume it is based on is not there, or no host can have it.
pub async fn place_volume(
    store: &SharedStore,
    hosts: &Hosts,
    name: &Name,
    spec: &pb::VolumeSpec,
) -> Result<String, CommandError> {
    // In a pool that hosts share, it is of no host.
    if !matches!(spec.pool.strip_prefix("pools/"), None | Some(LOCAL_POOL)) {
        return Ok(String::new());
    }
    let mut request = Request::of_volume(&name.to_string(), &spec.host);
    if let Ok(base) = Name::parse_volume(&spec.base) {
        match get_volume(store, &base).await {
            Ok(stored) if stored.record.shared().is_some() => {
                return Err(CommandError::SharedVolume { volume: base.id });
            }
            Ok(stored) if !stored.record.host.is_empty() => {
                let bound = (model::short(&base), stored.record.host);
                request.bound.push(bound);
            }
            Ok(_) => return Ok(String::new()),
            // Whoever stores the volume says so.
            Err(CommandError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let upload = spec.import.as_ref().map(|import| import.upload.as_str());
    if let Ok(upload) = Name::parse_upload(upload.unwrap_or_default())
        && let Some(host) = upload_host(store, &upload).await?
    {
        request.bound.push((format!("upload {}", upload.id), host));
    }
    match hosts.choose(&request) {
        Ok(host) => Ok(host),
        Err(verdicts) if scheduler::may_pass(&verdicts) => Ok(String::new()),
        Err(verdicts) => Err(no_host(&model::short(name), verdicts)),
    }
}

/// The host that has an upload's files, by its id.
///
/// # Errors
/// When the store fails.
pub async fn upload_host(store: &SharedStore, upload: &Name) -> Result<Option<String>, StoreError> {
    let item = store.get(&model::upload_host_key(upload)).await?;
    Ok(item.map(|item| String::from_utf8_lossy(&item.value).into_owned()))
}

/// Chooses the host that gets an upload's files, by its id, and notes it: the one that has it already, or
/// the one that is named.
///
/// # Errors
/// When no host can have them.
pub async fn place_upload(
    store: &SharedStore,
    hosts: &Hosts,
    upload: &Name,
    host: &str,
) -> Result<String, CommandError> {
    if let Some(host) = upload_host(store, upload).await? {
        return Ok(host);
    }
    let request = Request::of_volume(&upload.to_string(), host);
    let chosen = hosts.choose(&request);
    let chosen = chosen.map_err(|verdicts| no_host(&format!("upload {}", upload.id), verdicts))?;
    let transaction =
        Transaction::new().put(model::upload_host_key(upload), chosen.clone().into_bytes());
    store.commit(transaction).await?;
    Ok(chosen)
}

/// The refusal that says what every host said.
pub fn no_host(what: &str, verdicts: Vec<Verdict>) -> CommandError {
    CommandError::NoHost {
        what: what.to_owned(),
        hosts: scheduler::words(&verdicts),
        verdicts,
    }
}

/// A host that is known, by the name that users give.
///
/// # Errors
/// When there is none of that name.
pub async fn get_host(
    store: &SharedStore,
    name: &str,
) -> Result<Stored<model::HostRecord>, CommandError> {
    let item = store.get(&host_name(host_id(name))).await?;
    let item = item.ok_or_else(|| CommandError::NotFound {
        what: format!("host {}", host_id(name)),
    })?;
    Ok(Stored {
        record: decode(&item.key, &item.value)?,
        revision: item.revision,
    })
}

#[cfg(test)]
mod tests;
