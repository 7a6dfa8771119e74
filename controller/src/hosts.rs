//! All hosts: one connection to each, kept as long as the host is in the store, and what was seen on
//! each last.
//!
//! ```text
//! command line --> Node --answers--> hosts/{id} is stored --watched--> Node of that id
//! token, join  ---------------------^
//! ```
//!
//! Every replica has connections of its own: consoles and figures come from any of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, SystemTime};

use api::listen::Address;
use api::node::HostStatus;
use pki::Expect;
use prost::Message;
use tokio::sync::{Mutex, OwnedMutexGuard, watch};
use tokio::task::JoinHandle;
use tonic::{Code, Status};

use crate::certificates::{self, Certificates};
use crate::leader::Epoch;
use crate::model::{self, HostRecord, ReservationRecord};
use crate::node::Node;
use crate::plan::{Fleet, Observed, Stored};
use crate::reconciler::{decode, with_source};
use crate::scheduler::{self, Candidate, Request, Verdict};
use crate::store::{Range, SharedStore, StoreError, Transaction};

/// A failing store is given this long before the next attempt.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// Between two looks for a host that does not answer.
const REGISTER_RETRY: Duration = Duration::from_millis(100);

/// Of a host that has no such record.
const NOTHING_RESERVED: Stored<ReservationRecord> = Stored {
    record: ReservationRecord {
        vcpus: 0,
        memory_bytes: 0,
        vms: 0,
        labels: BTreeMap::new(),
        daemons: BTreeMap::new(),
        daemon_labels: BTreeMap::new(),
        repels: BTreeMap::new(),
        bounds: BTreeMap::new(),
    },
    revision: 0,
};

/// All hosts. Cheap to clone.
#[derive(Clone)]
pub struct Hosts {
    known: Arc<RwLock<Known>>,
    /// Rises with everything that is seen anywhere.
    changed: watch::Sender<u64>,
    /// Has connections of its own.
    connects: bool,
    /// What commands carry.
    epoch: Epoch,
    /// What is shown and believed where TLS is spoken.
    certificates: Option<Certificates>,
}

#[derive(Default)]
struct Known {
    /// In no order.
    entries: Vec<Entry>,
    /// Where each is among these, by its id.
    indices: HashMap<String, usize>,
    fleet: Arc<Fleet>,
}

/// All that is known of a host.
struct Entry {
    id: String,
    record: HostRecord,
    reserved: Stored<ReservationRecord>,
    /// One at a time places something there.
    placing: Arc<Mutex<()>>,
    connected: bool,
    connection: Option<Connection>,
}

struct Connection {
    node: Node,
    /// Certificates from before count no more.
    certificates_after: SystemTime,
    /// Ends with the connection.
    _task: Arc<OwnTask>,
    /// What goes over it is cut when this is dropped.
    _held: watch::Sender<()>,
}

impl Known {
    fn get(&self, id: &str) -> Option<&Entry> {
        self.indices.get(id).map(|index| &self.entries[*index])
    }

    fn get_mut(&mut self, id: &str) -> Option<&mut Entry> {
        let index = self.indices.get(id).copied()?;
        self.entries.get_mut(index)
    }

    fn remove(&mut self, id: &str) -> Option<Entry> {
        let index = self.indices.remove(id)?;
        let entry = self.entries.swap_remove(index);
        if let Some(moved) = self.entries.get(index) {
            self.indices.insert(moved.id.clone(), index);
        }
        Some(entry)
    }

    fn candidate(&self, index: usize) -> Candidate<'_> {
        let entry = &self.entries[index];
        Candidate {
            id: &entry.id,
            record: &entry.record,
            reserved: &entry.reserved.record,
            connected: entry.connected,
        }
    }
}

/// A task that ends when nobody wants it any more.
struct OwnTask(JoinHandle<()>);

impl Drop for OwnTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Default for Hosts {
    fn default() -> Self {
        Self::new()
    }
}

impl Hosts {
    /// None yet.
    pub fn new() -> Self {
        Self {
            known: Arc::default(),
            changed: watch::Sender::new(0),
            connects: true,
            epoch: Epoch::none(),
            certificates: None,
        }
    }

    /// The same hosts, for commands of this epoch.
    #[must_use]
    pub fn with_epoch(&self, epoch: Epoch) -> Self {
        Self {
            epoch,
            ..self.clone()
        }
    }

    /// The same hosts, some of which are reached by TLS.
    #[must_use]
    pub fn with_certificates(self, certificates: Option<Certificates>) -> Self {
        Self {
            certificates,
            ..self
        }
    }

    /// None yet, and what is seen is told by [`Hosts::saw`] alone.
    pub fn unconnected() -> Self {
        Self {
            connects: false,
            ..Self::new()
        }
    }

    /// All that are stored, by their ids.
    pub fn ids(&self) -> Vec<String> {
        let known = self.known();
        known.entries.iter().map(|entry| entry.id.clone()).collect()
    }

    fn known(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().expect("nobody panics with it")
    }

    fn known_mut(&self) -> RwLockWriteGuard<'_, Known> {
        self.known.write().expect("nobody panics with it")
    }

    /// The connection to a host, by its id.
    pub fn get(&self, host: &str) -> Option<Node> {
        let known = self.known();
        let connection = known.get(host)?.connection.as_ref();
        connection.map(|connection| connection.node.clone().with_epoch(self.epoch.clone()))
    }

    /// The connection to a host, by its id.
    ///
    /// # Errors
    /// When no such host is known, in words for whoever asked for something that is there.
    pub fn reach(&self, host: &str) -> Result<Node, Status> {
        self.get(host).ok_or_else(|| match host {
            "" => Status::unavailable("no host has it yet"),
            host => Status::unavailable(format!("hosts/{host} is not known")),
        })
    }

    /// All connections, by the hosts' ids.
    pub fn all(&self) -> Vec<(String, Node)> {
        let known = self.known();
        let connections = known.entries.iter();
        connections
            .filter_map(|entry| {
                let connection = entry.connection.as_ref()?;
                let node = connection.node.clone().with_epoch(self.epoch.clone());
                Some((entry.id.clone(), node))
            })
            .collect()
    }

    /// The only host's id, if there is one alone.
    pub fn only(&self) -> Option<String> {
        match &self.known().entries[..] {
            [only] => Some(only.id.clone()),
            _ => None,
        }
    }

    /// The best host for something, by its id.
    ///
    /// # Errors
    /// When there is none, what all of them say.
    pub fn choose(&self, request: &Request) -> Result<String, Vec<Verdict>> {
        let known = self.known();
        let len = known.entries.len();
        let chosen = scheduler::choose(request, len, |index| known.candidate(index))?;
        Ok(known.entries[chosen].id.clone())
    }

    /// What every host says to something.
    pub fn explain(&self, request: &Request) -> Vec<Verdict> {
        let known = self.known();
        let len = known.entries.len();
        scheduler::explain(request, len, |index| known.candidate(index))
    }

    /// What was promised of a host, as known here, if it can have something on top of that. The guard
    /// keeps others in this process from promising at the same time; those elsewhere are noticed when
    /// the transaction compares.
    pub async fn hold(
        &self,
        host: &str,
        request: &Request,
    ) -> Option<(OwnedMutexGuard<()>, Stored<ReservationRecord>)> {
        let placing = self.known().get(host)?.placing.clone();
        let guard = placing.lock_owned().await;
        let known = self.known();
        let index = known.indices.get(host).copied()?;
        scheduler::still_fits(request, &known.candidate(index))
            .then(|| (guard, known.entries[index].reserved.clone()))
    }

    /// What was promised of a host, as known here.
    pub fn reserved(&self, host: &str) -> ReservationRecord {
        let known = self.known();
        let entry = known.get(host);
        entry.map_or_else(Default::default, |entry| entry.reserved.record.clone())
    }

    /// What was promised of a host changed.
    pub fn promised(&self, host: &str, reserved: Stored<ReservationRecord>) {
        if let Some(entry) = self.known_mut().get_mut(host)
            && entry.reserved.revision < reserved.revision
        {
            entry.reserved = reserved;
        }
    }

    /// Looks what was promised of a host: somebody else changed it.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn look_up(&self, store: &SharedStore, host: &str) -> Result<(), StoreError> {
        let item = store.get(&model::reservation_key(host)).await?;
        let reserved = match item {
            Some(item) => Stored {
                record: decode(&item.key, &item.value)?,
                revision: item.revision,
            },
            None => NOTHING_RESERVED,
        };
        if let Some(entry) = self.known_mut().get_mut(host) {
            entry.reserved = reserved;
        }
        Ok(())
    }

    /// What was seen last, everywhere.
    pub fn fleet(&self) -> Arc<Fleet> {
        self.known().fleet.clone()
    }

    /// What was seen last on one host; nothing if it is not known.
    pub fn observed(&self, host: &str) -> Arc<Observed> {
        let known = self.known();
        known.fleet.hosts.get(host).cloned().unwrap_or_default()
    }

    /// Changes with what is seen anywhere.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// As if these hosts answered, once they were read from the store.
    #[cfg(test)]
    pub(crate) async fn pretend_connected(&self, ids: &[&str]) {
        loop {
            if ids.iter().all(|id| self.known().get(id).is_some()) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let mut known = self.known_mut();
        for id in ids {
            let entry = known.get_mut(id).expect("it was just there");
            // Its connection would say otherwise.
            entry.connection = None;
            entry.connected = true;
        }
    }

    /// Keeps connections to all hosts that are stored, for ever.
    pub async fn run(self, store: SharedStore) {
        loop {
            match self.follow(&store).await {
                Ok(()) | Err(StoreError::Compacted { .. }) => {}
                Err(error) => {
                    tracing::error!(error = %with_source(&error), "cannot read the hosts");
                    tokio::time::sleep(STORE_RETRY).await;
                }
            }
        }
    }

    /// Reads them all, then follows changes until the store has them no more.
    async fn follow(&self, store: &SharedStore) -> Result<(), StoreError> {
        let listing = store.list(Range::all(model::HOSTS)).await?;
        let mut hosts = store.watch(model::HOSTS, listing.revision).await?;
        let mut stored = BTreeSet::new();
        for item in &listing.items {
            let record: HostRecord = decode(&item.key, &item.value)?;
            stored.insert(record.id().to_owned());
            self.know(record);
        }
        let gone: Vec<String> = {
            let known = self.known();
            let ids = known.entries.iter().map(|entry| entry.id.clone());
            ids.filter(|id| !stored.contains(id)).collect()
        };
        gone.iter().for_each(|id| self.forget(id));
        let listing = store.list(Range::all(model::RESERVATIONS)).await?;
        let mut reservations = store.watch(model::RESERVATIONS, listing.revision).await?;
        let ids = listing.items.iter();
        let ids = ids.map(|item| item.key.trim_start_matches(model::RESERVATIONS).to_owned());
        self.unlearn(&ids.collect(), listing.revision);
        for item in listing.items {
            self.learn(&item.key, Some(&item.value), item.revision)?;
        }
        loop {
            tokio::select! {
                change = hosts.recv() => {
                    let Some(change) = change.transpose()? else { return Ok(()) };
                    match change.value {
                        Some(value) => self.know(decode(&change.key, &value)?),
                        None => self.forget(model::host_id(&change.key)),
                    }
                }
                change = reservations.recv() => {
                    let Some(change) = change.transpose()? else { return Ok(()) };
                    self.learn(&change.key, change.value.as_deref(), change.revision)?;
                }
            }
        }
    }

    /// A reservation as somebody stored it, or removed it.
    fn learn(&self, key: &str, value: Option<&[u8]>, revision: u64) -> Result<(), StoreError> {
        let host = key.trim_start_matches(model::RESERVATIONS);
        if let Some(value) = value {
            let record = decode(key, value)?;
            self.promised(host, Stored { record, revision });
        } else if let Some(entry) = self.known_mut().get_mut(host)
            && entry.reserved.revision < revision
        {
            // The next transaction must find it absent, not as the removal left it.
            entry.reserved = NOTHING_RESERVED;
        }
        Ok(())
    }

    /// Reservations that are not among the `stored` ones were removed, by `revision`.
    fn unlearn(&self, stored: &BTreeSet<String>, revision: u64) {
        for entry in &mut self.known_mut().entries {
            if !stored.contains(&entry.id) && entry.reserved.revision <= revision {
                entry.reserved = NOTHING_RESERVED;
            }
        }
    }

    /// Notes a host, and has a connection to where it is: the one that there is or a new one.
    fn know(&self, record: HostRecord) {
        let Ok(address) = record.address.parse::<Address>() else {
            tracing::error!(
                host = record.name,
                address = record.address,
                "is no address"
            );
            return;
        };
        let id = record.id().to_owned();
        let known = &mut *self.known_mut();
        let entry = match known.indices.get(&id) {
            Some(index) => &mut known.entries[*index],
            None => {
                known.indices.insert(id.clone(), known.entries.len());
                known.entries.push(Entry {
                    id: id.clone(),
                    record: HostRecord::default(),
                    reserved: NOTHING_RESERVED,
                    placing: Arc::default(),
                    connected: false,
                    connection: None,
                });
                known.entries.last_mut().expect("it was just put there")
            }
        };
        let after = record.certificates_after;
        let after = after.and_then(|after| SystemTime::try_from(after).ok());
        let after = after.unwrap_or(SystemTime::UNIX_EPOCH);
        entry.record = record;
        let connection = entry.connection.as_ref();
        let is_new = connection.is_none_or(|connection| {
            *connection.node.address() != address || connection.certificates_after != after
        });
        if is_new && self.connects {
            let certificates = self.certificates.as_ref();
            let expect = Expect::Host(id.clone(), after);
            // Streams that others opened end with the connection, too: consoles, captures.
            let (held, holds) = watch::channel(());
            let tls = certificates.map(|certificates| certificates.client(expect));
            let tls = tls.map(|tls| tls.while_held(holds));
            let node = Node::new(address).with_tls(tls);
            entry.connection = Some(self.connect(&id, node, after, held));
        }
    }

    fn connect(
        &self,
        id: &str,
        node: Node,
        certificates_after: SystemTime,
        held: watch::Sender<()>,
    ) -> Connection {
        let (hosts, host, of) = (self.clone(), id.to_owned(), node.clone());
        let told = (self.clone(), id.to_owned());
        node.tell_at_once(move |seen| told.0.saw(&told.1, seen));
        let task = tokio::spawn(async move {
            let mut observed = of.observed();
            let following = async {
                loop {
                    let seen = observed.borrow_and_update().clone();
                    hosts.saw(&host, seen);
                    if observed.changed().await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! {
                () = of.clone().run() => {}
                () = following => {}
            }
        });
        Connection {
            node,
            certificates_after,
            _task: Arc::new(OwnTask(task)),
            _held: held,
        }
    }

    fn forget(&self, id: &str) {
        let mut known = self.known_mut();
        known.remove(id);
        Arc::make_mut(&mut known.fleet).hosts.remove(id);
        drop(known);
        self.changed.send_modify(|count| *count += 1);
    }

    /// News from a host. Those of another one that has come to its address are not believed.
    pub fn saw(&self, id: &str, seen: Arc<Observed>) {
        let foreign = seen.host.as_ref().is_some_and(|host| host.host_id != id);
        let seen = match foreign {
            true => Arc::default(),
            false => seen,
        };
        let mut known = self.known_mut();
        let Some(entry) = known.get_mut(id) else {
            return;
        };
        if self.connects && entry.connection.is_none() {
            return;
        }
        entry.connected = seen.connected;
        if foreign {
            let address = entry.record.address.clone();
            tracing::warn!(host = id, address, "another host answers there");
        }
        let last = known.fleet.hosts.get(id);
        if last.is_some_and(|last| Arc::ptr_eq(last, &seen)) {
            return;
        }
        let fleet = Arc::make_mut(&mut known.fleet);
        fleet.hosts.insert(id.into(), seen);
        drop(known);
        self.changed.send_modify(|count| *count += 1);
    }

    /// Stores the host that answers at `address` as soon as it does: for hosts that the command line
    /// names.
    pub async fn register(self, store: SharedStore, address: Address) {
        let mut said = String::new();
        loop {
            match self.identify(&store, &address).await {
                Ok(host) => match register(&store, &host, &address).await {
                    Ok(()) => return,
                    Err(StoreError::Conflict { .. }) => {}
                    Err(error) => {
                        let error = with_source(&error);
                        tracing::error!(%address, %error, "cannot store a host");
                    }
                },
                Err(status)
                    if status.code() == Code::PermissionDenied && said != status.message() =>
                {
                    tracing::warn!(%address, why = status.message(), "a host is not believed");
                    said = status.message().to_owned();
                }
                Err(status) => tracing::debug!(%address, %status, "no node agent answers"),
            }
            tokio::time::sleep(REGISTER_RETRY).await;
        }
    }
}

impl Hosts {
    /// Who answers at an address; by TLS, who can prove it.
    async fn identify(&self, store: &SharedStore, address: &Address) -> Result<HostStatus, Status> {
        let Some(certificates) = self.certificates.as_ref().filter(|_| address.is_tls()) else {
            return Node::identify(address, None).await;
        };
        let seen = Arc::default();
        let any = certificates.client(Expect::AnyHost(Arc::clone(&seen)));
        let host = Node::identify(address, Some(&any)).await?;
        let proved = seen.get().map_or("", String::as_str);
        if host.host_id != proved {
            let named = &host.host_id;
            let message = format!(
                "calls itself hosts/{named}, and its certificate is that of hosts/{proved}"
            );
            return Err(Status::permission_denied(message));
        }
        let withdrawn = certificates::withdrawn(store, proved).await;
        let withdrawn = withdrawn.map_err(|error| Status::unavailable(with_source(&error)))?;
        if let Some(withdrawn) = withdrawn {
            let later = certificates.client(Expect::Host(proved.to_owned(), withdrawn));
            return Node::identify(address, Some(&later)).await;
        }
        Ok(host)
    }
}

/// Stores a host, or where it is now.
async fn register(
    store: &SharedStore,
    host: &HostStatus,
    address: &Address,
) -> Result<(), StoreError> {
    let key = model::host_name(&host.host_id);
    let address = address.to_string();
    let transaction = match store.get(&key).await? {
        Some(item) => {
            let mut record: HostRecord = decode(&item.key, &item.value)?;
            if record.address == address {
                return Ok(());
            }
            record.address = address;
            Transaction::new()
                .if_unchanged(&key, item.revision)
                .put(&key, record.encode_to_vec())
        }
        None => {
            let record = HostRecord {
                name: key.clone(),
                address,
                create_time: Some(model::now()),
                generation: 1,
                inventory: Some(model::inventory(host)),
                ..Default::default()
            };
            let event = model::new_event(&key, "HOST_REGISTERED", record.address.clone());
            Transaction::new()
                .if_absent(&key)
                .put(&key, record.encode_to_vec())
                .put(event.name.clone(), event.encode_to_vec())
        }
    };
    store.commit(transaction).await.map(drop)
}
