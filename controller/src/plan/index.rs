//! Where things are among everything that is wanted, kept up with each record: so that a look at what
//! changed does not read all the rest.

use std::collections::{BTreeSet, HashMap};

use api::controller as pb;

use super::Desired;
use crate::model::{VmRecord, VolumeRecord};

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Index {
    /// VMs by their ids on hosts.
    vms: HashMap<String, Home>,
    /// The same of volumes.
    volumes: HashMap<String, String>,
    /// Names of VMs and volumes by their hosts' ids; those that have none are below the empty id.
    placed: HashMap<String, BTreeSet<String>>,
    /// Operations that are not done by the VM or volume whose state ends them.
    asked: HashMap<String, BTreeSet<String>>,
    /// Those that anything else may end.
    others: BTreeSet<String>,
}

/// Which VM it is, and where it is to be.
#[derive(Debug, Clone)]
struct Home {
    name: String,
    /// Id of the host that was chosen for it last; `None` if none ever was.
    host: Option<String>,
}

impl Home {
    fn of(name: &str, record: &VmRecord) -> Self {
        Self {
            name: name.to_owned(),
            host: (record.placements > 0).then(|| record.host.clone()),
        }
    }
}

impl Index {
    /// Of everything.
    pub fn of(desired: &Desired) -> Self {
        let mut index = Self::default();
        for (name, stored) in &desired.vms {
            index.vm(name, None, Some(&stored.record));
        }
        for (name, stored) in &desired.volumes {
            index.volume(name, None, Some(&stored.record));
        }
        for operation in desired.pending.values() {
            index.operation(None, Some(operation));
        }
        index
    }

    /// A VM's record changed.
    pub fn vm<'a>(
        &mut self,
        name: &str,
        before: Option<&'a VmRecord>,
        after: Option<&'a VmRecord>,
    ) {
        let of = |record: &'a VmRecord| (&record.node_id, &record.host, record.placements > 0);
        if before.map(of) == after.map(of) {
            return;
        }
        if let Some(record) = before {
            self.vms.remove(&record.node_id);
            leave(&mut self.placed, &record.host, name);
        }
        if let Some(record) = after {
            self.vms
                .insert(record.node_id.clone(), Home::of(name, record));
            let placed = self.placed.entry(record.host.clone()).or_default();
            placed.insert(name.to_owned());
        }
    }

    /// A volume's record changed.
    pub fn volume(
        &mut self,
        name: &str,
        before: Option<&VolumeRecord>,
        after: Option<&VolumeRecord>,
    ) {
        let of = |record: &VolumeRecord| (record.node_id.clone(), record.host.clone());
        let (before, after) = (before.map(of), after.map(of));
        if before == after {
            return;
        }
        if let Some((node_id, host)) = before {
            self.volumes.remove(&node_id);
            leave(&mut self.placed, &host, name);
        }
        if let Some((node_id, host)) = after {
            self.volumes.insert(node_id, name.to_owned());
            self.placed.entry(host).or_default().insert(name.to_owned());
        }
    }

    /// An operation began, or is done.
    pub fn operation(&mut self, before: Option<&pb::Operation>, after: Option<&pb::Operation>) {
        if let Some(operation) = before {
            match target(operation) {
                Some(target) => leave(&mut self.asked, target, &operation.name),
                None => drop(self.others.remove(&operation.name)),
            }
        }
        if let Some(operation) = after {
            let name = operation.name.clone();
            match target(operation) {
                Some(target) => {
                    let asked = self.asked.entry(target.to_owned()).or_default();
                    asked.insert(name);
                }
                None => drop(self.others.insert(name)),
            }
        }
    }

    /// The VM of this id on hosts.
    pub fn vm_of(&self, node_id: &str) -> Option<&str> {
        self.vms.get(node_id).map(|home| home.name.as_str())
    }

    /// Id of the host where the VM of this id on hosts is to be, empty if on none; `None` if nothing was
    /// ever chosen for it.
    pub fn home_of(&self, node_id: &str) -> Option<&str> {
        self.vms.get(node_id)?.host.as_deref()
    }

    /// The volume of this id on hosts.
    pub fn volume_of(&self, node_id: &str) -> Option<&str> {
        self.volumes.get(node_id).map(String::as_str)
    }

    /// VMs and volumes of a host, by its id; of no host if that is empty.
    pub fn placed(&self, host: &str) -> impl Iterator<Item = &str> {
        let placed = self.placed.get(host).into_iter().flatten();
        placed.map(String::as_str)
    }

    /// Operations that this VM or volume ends.
    pub fn asked(&self, name: &str) -> impl Iterator<Item = &str> {
        let asked = self.asked.get(name).into_iter().flatten();
        asked.map(String::as_str)
    }

    /// Operations that anything else may end.
    pub fn others(&self) -> impl Iterator<Item = &str> {
        self.others.iter().map(String::as_str)
    }
}

/// Whose state alone ends an operation.
fn target(operation: &pb::Operation) -> Option<&str> {
    let metadata = operation.metadata.as_ref()?;
    let alone = matches!(
        metadata.kind(),
        pb::OperationKind::CreateVm
            | pb::OperationKind::StartVm
            | pb::OperationKind::StopVm
            | pb::OperationKind::DeleteVm
            | pb::OperationKind::CreateVolume
            | pb::OperationKind::DeleteVolume
    );
    alone.then_some(metadata.target.as_str())
}

fn leave(sets: &mut HashMap<String, BTreeSet<String>>, key: &str, member: &str) {
    if let Some(set) = sets.get_mut(key) {
        set.remove(member);
        if set.is_empty() {
            sets.remove(key);
        }
    }
}
