//! Hosts: how they are stored, and what was promised of each.
//!
//! ```text
//! hosts/{host}                 HostRecord
//! reservations/{host}          ReservationRecord; every placement compares it
//! evictions/{host}/{node id}   nothing: what the host may still have of a VM that was taken from it
//! upload-hosts/{project}/{id}  id of the host that has the files
//! ```

use std::collections::BTreeMap;

use api::controller as pb;
use api::names::Name;
use api::node;
use prost::Message;

/// Collection of hosts in resource names.
pub const HOSTS: &str = "hosts/";
/// Key prefix of what was promised.
pub const RESERVATIONS: &str = "reservations/";
/// Key prefix of what is to go from hosts.
pub const EVICTIONS: &str = "evictions/";

/// A host as stored.
#[derive(Clone, PartialEq, Message)]
pub struct HostRecord {
    /// `hosts/{host}`
    #[prost(string, tag = "1")]
    pub name: String,
    /// What people decided.
    #[prost(message, required, tag = "2")]
    pub spec: pb::HostSpec,
    /// Where its agent is reached, as command lines write it.
    #[prost(string, tag = "3")]
    pub address: String,
    /// When it came.
    #[prost(message, optional, tag = "4")]
    pub create_time: Option<prost_types::Timestamp>,
    /// Rises with every change of `spec`, from 1.
    #[prost(uint64, tag = "5")]
    pub generation: u64,
    /// What its agent reported last, without what changes all the time: a controller that was just
    /// started can place VMs.
    #[prost(message, optional, tag = "6")]
    pub inventory: Option<node::HostStatus>,
    /// The operation that is to move away from it what can be moved; empty for none.
    #[prost(string, tag = "7")]
    pub drain: String,
    /// SHA-256 of the authority that made its certificate; empty if ours did not.
    #[prost(string, tag = "20")]
    pub authority: String,
    /// Certificates of it that were valid at this time already count no more: it was deleted then, or
    /// joined again.
    #[prost(message, optional, tag = "21")]
    pub certificates_after: Option<prost_types::Timestamp>,
}

impl HostRecord {
    /// Its id.
    pub fn id(&self) -> &str {
        self.name.trim_start_matches(HOSTS)
    }

    /// Its etag.
    pub fn etag(&self) -> String {
        super::etag(self.id(), self.generation)
    }
}

/// The sum of what VMs that were placed on a host were promised. A transaction that places a VM compares
/// this record's revision and puts the next sum, so two controllers never promise the same twice.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ReservationRecord {
    /// CPUs of guests.
    #[prost(uint64, tag = "1")]
    pub vcpus: u64,
    /// RAM of guests.
    #[prost(uint64, tag = "2")]
    pub memory_bytes: u64,
    /// How many.
    #[prost(uint64, tag = "3")]
    pub vms: u64,
    /// How many VMs have each set of labels, written as [`labelled`] does.
    #[prost(btree_map = "string, uint64", tag = "4")]
    pub labels: BTreeMap<String, u64>,
    /// How many VMs each device daemon serves that is no VM's own, by its name.
    #[prost(btree_map = "string, uint64", tag = "5")]
    pub daemons: BTreeMap<String, u64>,
    /// The same for each set of labels, written `DAEMON|SET`.
    #[prost(btree_map = "string, uint64", tag = "6")]
    pub daemon_labels: BTreeMap<String, u64>,
    /// How many VMs keep away from those that have a set of labels.
    #[prost(btree_map = "string, uint64", tag = "7")]
    pub repels: BTreeMap<String, u64>,
    /// How many VMs bear no more than so many on a daemon, written `DAEMON|BOUND`.
    #[prost(btree_map = "string, uint64", tag = "8")]
    pub bounds: BTreeMap<String, u64>,
}

/// What a host promised to one VM: stored as a [`ReservationRecord`] is, and without a tree's room for what
/// there is one of.
#[derive(Clone, PartialEq, Message)]
pub struct PromiseRecord {
    /// CPUs of the guest.
    #[prost(uint64, tag = "1")]
    pub vcpus: u64,
    /// Its RAM.
    #[prost(uint64, tag = "2")]
    pub memory_bytes: u64,
    /// One.
    #[prost(uint64, tag = "3")]
    pub vms: u64,
    /// As in [`ReservationRecord`], and so on.
    #[prost(message, repeated, tag = "4")]
    pub labels: Vec<Counted>,
    /// Device daemons.
    #[prost(message, repeated, tag = "5")]
    pub daemons: Vec<Counted>,
    /// The same for its set of labels.
    #[prost(message, repeated, tag = "6")]
    pub daemon_labels: Vec<Counted>,
    /// Sets of labels that it keeps away from.
    #[prost(message, repeated, tag = "7")]
    pub repels: Vec<Counted>,
    /// Bounds on daemons.
    #[prost(message, repeated, tag = "8")]
    pub bounds: Vec<Counted>,
}

/// An entry of a map, as protobuf writes it.
#[derive(Clone, PartialEq, Message)]
pub struct Counted {
    /// What is counted.
    #[prost(string, tag = "1")]
    pub key: String,
    /// How many.
    #[prost(uint64, tag = "2")]
    pub count: u64,
}

impl From<&ReservationRecord> for PromiseRecord {
    fn from(record: &ReservationRecord) -> Self {
        let counted = |counts: &Counts| {
            let entries = counts.iter().map(|(key, count)| Counted {
                key: key.clone(),
                count: *count,
            });
            entries.collect()
        };
        Self {
            vcpus: record.vcpus,
            memory_bytes: record.memory_bytes,
            vms: record.vms,
            labels: counted(&record.labels),
            daemons: counted(&record.daemons),
            daemon_labels: counted(&record.daemon_labels),
            repels: counted(&record.repels),
            bounds: counted(&record.bounds),
        }
    }
}

impl From<&PromiseRecord> for ReservationRecord {
    fn from(record: &PromiseRecord) -> Self {
        let counts = |counted: &[Counted]| {
            let entries = counted.iter().map(|entry| (entry.key.clone(), entry.count));
            entries.collect()
        };
        Self {
            vcpus: record.vcpus,
            memory_bytes: record.memory_bytes,
            vms: record.vms,
            labels: counts(&record.labels),
            daemons: counts(&record.daemons),
            daemon_labels: counts(&record.daemon_labels),
            repels: counts(&record.repels),
            bounds: counts(&record.bounds),
        }
    }
}

type Counts = BTreeMap<String, u64>;

impl ReservationRecord {
    /// With what one more VM was promised.
    #[must_use]
    pub fn plus(mut self, one: &Self) -> Self {
        self.vcpus = self.vcpus.saturating_add(one.vcpus);
        self.memory_bytes = self.memory_bytes.saturating_add(one.memory_bytes);
        self.vms = self.vms.saturating_add(one.vms);
        for (own, others) in self.counts(one) {
            for (key, count) in others {
                let own = own.entry(key.clone()).or_default();
                *own = own.saturating_add(*count);
            }
        }
        self
    }

    /// Without what a VM was promised that is there no more.
    #[must_use]
    pub fn minus(mut self, one: &Self) -> Self {
        self.vcpus = self.vcpus.saturating_sub(one.vcpus);
        self.memory_bytes = self.memory_bytes.saturating_sub(one.memory_bytes);
        self.vms = self.vms.saturating_sub(one.vms);
        for (own, others) in self.counts(one) {
            for (key, count) in others {
                if let Some(own) = own.get_mut(key) {
                    *own = own.saturating_sub(*count);
                }
            }
            own.retain(|_, count| *count > 0);
        }
        self
    }

    /// The maps of counts, each beside the one of the other record.
    fn counts<'a>(&'a mut self, other: &'a Self) -> [(&'a mut Counts, &'a Counts); 5] {
        [
            (&mut self.labels, &other.labels),
            (&mut self.daemons, &other.daemons),
            (&mut self.daemon_labels, &other.daemon_labels),
            (&mut self.repels, &other.repels),
            (&mut self.bounds, &other.bounds),
        ]
    }
}

/// A set of labels of a project as one word: `p:a=1,b=2`, in order.
pub fn labelled(project: &str, labels: &BTreeMap<String, String>) -> String {
    let labels = labels.iter().map(|(key, value)| format!("{key}={value}"));
    format!("{project}:{}", labels.collect::<Vec<_>>().join(","))
}

/// Whether a set of labels, as one word, has all of another one of the same project.
pub fn has_labels(set: &str, wanted: &str) -> bool {
    let parts = |set: &str| {
        let (project, labels) = set.split_once(':')?;
        let labels = labels.split(',').filter(|label| !label.is_empty());
        Some((
            project.to_owned(),
            labels.map(str::to_owned).collect::<Vec<_>>(),
        ))
    };
    match (parts(set), parts(wanted)) {
        (Some((own, labels)), Some((project, wanted))) => {
            own == project && wanted.iter().all(|label| labels.contains(label))
        }
        _ => false,
    }
}

/// `hosts/{id}`, which is its key as well.
pub fn host_name(id: &str) -> String {
    format!("{HOSTS}{id}")
}

/// The id of `hosts/{id}`.
pub fn host_id(name: &str) -> &str {
    name.trim_start_matches(HOSTS)
}

/// Key of a host's promises.
pub fn reservation_key(host: &str) -> String {
    format!("{RESERVATIONS}{host}")
}

/// Key of an order to end and forget a VM's leftovers.
pub fn eviction_key(host: &str, node_id: &str) -> String {
    format!("{EVICTIONS}{host}/{node_id}")
}

/// Key of the place of an upload.
pub fn upload_host_key(upload: &Name) -> String {
    format!("upload-hosts/{}/{}", upload.project, upload.id)
}

/// Of what an agent reports, what does not change all the time.
pub fn inventory(seen: &node::HostStatus) -> node::HostStatus {
    let mut inventory = node::HostStatus {
        vms_running: 0,
        pool_free_bytes: 0,
        ..seen.clone()
    };
    for size in &mut inventory.huge_pages {
        size.free_pages = 0;
    }
    inventory
}

/// What users are told about a host.
pub fn host(
    record: &HostRecord,
    reserved: &ReservationRecord,
    observed: &crate::plan::Observed,
) -> pb::Host {
    let stored = record.inventory.clone().unwrap_or_default();
    let seen = observed.host.as_ref().unwrap_or(&stored);
    pb::Host {
        name: record.name.clone(),
        hostname: seen.hostname.clone(),
        version: seen.version.clone(),
        cpus: seen.cpus,
        memory_bytes: seen.memory_bytes,
        kvm: seen.kvm.clone(),
        problem: seen.problem.clone(),
        vms_running: seen.vms_running,
        connected: observed.connected,
        last_seen: observed.last_seen,
        underlay_address: seen.underlay_address.clone(),
        spec: Some(record.spec.clone()),
        etag: record.etag(),
        create_time: record.create_time,
        address: record.address.clone(),
        inventory: Some(seen.clone()),
        reserved: Some(pb::HostReservation {
            vcpus: reserved.vcpus,
            memory_bytes: reserved.memory_bytes,
            vms: reserved.vms,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promise_to_one_vm_is_stored_as_a_reservation_is() {
        let one = ReservationRecord {
            vcpus: 2,
            memory_bytes: 1 << 30,
            vms: 1,
            labels: [("p:app=web".to_owned(), 1)].into(),
            daemons: [("network m".to_owned(), 1), ("network n".to_owned(), 1)].into(),
            daemon_labels: [("network n|p:app=web".to_owned(), 1)].into(),
            repels: [("p:app=db".to_owned(), 1)].into(),
            bounds: [("network n|4".to_owned(), 1)].into(),
        };
        let promise = PromiseRecord::from(&one);
        assert_eq!(promise.encode_to_vec(), one.encode_to_vec());
        let read = PromiseRecord::decode(one.encode_to_vec().as_slice()).unwrap();
        assert_eq!(ReservationRecord::from(&read), one);
    }

    #[test]
    fn what_is_given_back_leaves_nothing() {
        let one = ReservationRecord {
            vcpus: 2,
            memory_bytes: 1 << 30,
            vms: 1,
            labels: [("p:app=web".to_owned(), 1)].into(),
            daemons: [("network n".to_owned(), 1)].into(),
            ..Default::default()
        };
        let both = ReservationRecord::default().plus(&one).plus(&one);
        assert_eq!((both.vcpus, both.vms, both.labels["p:app=web"]), (4, 2, 2));
        assert_eq!(both.minus(&one).minus(&one), ReservationRecord::default());
    }

    #[test]
    fn labels_match_within_their_project() {
        let set = |labels: &[(&str, &str)]| {
            let labels = labels.iter();
            let labels = labels.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
            labels.collect::<BTreeMap<_, _>>()
        };
        let own = labelled("p", &set(&[("app", "web"), ("tier", "1")]));
        assert!(has_labels(&own, &labelled("p", &set(&[("tier", "1")]))));
        assert!(!has_labels(&own, &labelled("p", &set(&[("tier", "2")]))));
        assert!(!has_labels(&own, &labelled("q", &set(&[("tier", "1")]))));
    }
}
