//! What of everything is looked at.

use std::collections::BTreeSet;

use super::{Desired, Index};

/// A part of everything. Networks and the work of operations are always looked at.
#[derive(Debug, Clone, Default)]
pub struct Part {
    /// VMs and volumes, by name.
    pub names: BTreeSet<String>,
    /// Hosts whose own state, and what they have that is not theirs, is looked at; by id.
    pub hosts: BTreeSet<String>,
    /// Operations, by name.
    pub operations: BTreeSet<String>,
}

impl Part {
    /// Everything.
    pub fn all(desired: &Desired) -> Self {
        let names = desired.vms.keys().chain(desired.volumes.keys());
        Self {
            names: names.cloned().collect(),
            hosts: desired.hosts.keys().cloned().collect(),
            operations: desired.pending.keys().cloned().collect(),
        }
    }

    /// Adds the operations that may be over by what is looked at.
    pub fn with_operations(mut self, index: &Index) -> Self {
        let asked = self.names.iter().flat_map(|name| index.asked(name));
        let operations = asked.chain(index.others()).map(str::to_owned);
        self.operations.extend(operations);
        self
    }
}
