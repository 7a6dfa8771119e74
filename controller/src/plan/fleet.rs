//! What was seen, on each host.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::node;

use super::is_job_over;

/// Everything that was seen on one host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Observed {
    /// The host, once it answered.
    pub host: Option<node::HostStatus>,
    /// By node id.
    pub vms: BTreeMap<String, node::VmStatus>,
    /// By node id.
    pub volumes: BTreeMap<String, node::VolumeStatus>,
    /// By node id.
    pub networks: BTreeMap<String, node::NetworkStatus>,
    /// By id.
    pub jobs: BTreeMap<String, node::Job>,
    /// It answered the last time it was asked.
    pub connected: bool,
    /// When it answered last.
    pub last_seen: Option<prost_types::Timestamp>,
}

/// Of a host that nobody heard of.
static NOTHING: Observed = Observed {
    host: None,
    vms: BTreeMap::new(),
    volumes: BTreeMap::new(),
    networks: BTreeMap::new(),
    jobs: BTreeMap::new(),
    connected: false,
    last_seen: None,
};

impl Observed {
    /// The host's resource name; empty if it never answered.
    pub fn host_name(&self) -> String {
        self.host
            .as_ref()
            .map(|host| format!("hosts/{}", host.host_id))
            .unwrap_or_default()
    }

    /// Something goes on there that says nothing by itself.
    pub fn is_moving(&self) -> bool {
        self.volumes.values().any(|volume| volume.creating)
            || self.jobs.values().any(|job| !is_job_over(job))
    }
}

/// Everything that was seen, by the hosts' ids.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fleet {
    /// Of hosts that there is a connection to. Whoever looks takes a copy, which costs a count for each.
    pub hosts: BTreeMap<Arc<str>, Arc<Observed>>,
}

impl Fleet {
    /// One host's; nothing, and not connected, of one that is not known.
    pub fn of(&self, host: &str) -> &Observed {
        self.hosts.get(host).map_or(&NOTHING, Arc::as_ref)
    }

    /// Hosts that answer.
    pub fn connected(&self) -> impl Iterator<Item = (&str, &Observed)> {
        let hosts = self.hosts.iter().filter(|(_, seen)| seen.connected);
        hosts.map(|(id, seen)| (id.as_ref(), seen.as_ref()))
    }

    /// The job of this id and the host that does it.
    pub fn job(&self, job_id: &str) -> Option<&node::Job> {
        self.hosts.values().find_map(|seen| seen.jobs.get(job_id))
    }
}

impl From<Observed> for Fleet {
    /// A fleet of one host.
    fn from(observed: Observed) -> Self {
        let id = observed.host.as_ref().map(|host| host.host_id.clone());
        Self {
            hosts: [(id.unwrap_or_default().into(), Arc::new(observed))].into(),
        }
    }
}
