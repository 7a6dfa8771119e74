//! VMs that are restarted elsewhere: when they are taken from their host, and how.
//!
//! ```text
//! host lost, or its agent stopped the VM for want of a lease, or in a boot
//!        └─▶ one transaction: no host, what the host promised is given back, the attachments of its
//!            volumes are counted up; then the scheduler places it like any other
//! ```

use std::collections::BTreeSet;

use api::controller as pb;
use api::node;
use prost::Message;

use crate::commands;
use crate::model::{self, VmRecord};
use crate::plan::{Desired, Stored};
use crate::store::{SharedStore, StoreError, Transaction};

/// Stop reasons of a host that could not go on with a VM.
const HOST_GAVE_UP: [&str; 2] = ["lease-lost", "host-reboot"];

/// It is to run, and where does not matter.
pub fn roams(record: &VmRecord) -> bool {
    let spec = record.vm.spec.as_ref();
    let policy = spec.map(pb::VmSpec::restart_policy).unwrap_or_default();
    policy == pb::RestartPolicy::Anywhere
        && record.vm.desired_power() == pb::DesiredPower::On
        && !record.vm.deleting
}

/// Why a VM is taken from its host, if it is. `seen` is what a host that answers says of it.
pub fn taken(
    record: &VmRecord,
    desired: &Desired,
    lost: &BTreeSet<String>,
    seen: Option<&node::VmStatus>,
) -> Option<String> {
    if !roams(record) || record.host.is_empty() || is_bound(record, desired) {
        return None;
    }
    if lost.contains(&record.host) {
        return Some(format!("hosts/{} is lost", record.host));
    }
    let seen = seen.filter(|seen| {
        seen.phase() == node::VmPhase::Stopped
            && HOST_GAVE_UP.contains(&seen.stop_reason.as_str())
            && seen.observed_generation >= record.vm.generation
    })?;
    Some(format!(
        "hosts/{} stopped it: {}",
        record.host, seen.stop_reason
    ))
}

/// The host's agent gave the VM up; that is no end that anybody wished.
pub fn is_given_up(record: &VmRecord, seen: &node::VmStatus) -> bool {
    roams(record) && HOST_GAVE_UP.contains(&seen.stop_reason.as_str())
}

/// A volume of it is in the pool of its host.
fn is_bound(record: &VmRecord, desired: &Desired) -> bool {
    volumes(record).any(|volume| {
        let stored = desired.volumes.get(volume);
        stored.is_some_and(|stored| !stored.record.host.is_empty())
    })
}

fn volumes(record: &VmRecord) -> impl Iterator<Item = &str> {
    let disks = record.vm.spec.iter().flat_map(|spec| &spec.disks);
    disks.filter_map(|disk| match &disk.source {
        Some(pb::disk::Source::Volume(volume)) => Some(volume.as_str()),
        _ => None,
    })
}

/// Takes a VM from its host, which surely runs it no more.
///
/// # Errors
/// When the store fails, or somebody else changed the VM.
pub async fn take_vm(
    store: &SharedStore,
    stored: &Stored<VmRecord>,
    why: &str,
) -> Result<(), StoreError> {
    let mut record = stored.record.clone();
    let name = record.vm.name.clone();
    let mut parts = name.split('/').skip(1).step_by(2);
    let (project, id) = (
        parts.next().unwrap_or_default(),
        parts.next().unwrap_or_default(),
    );
    let key = model::key(&api::names::Name::vm(project, id));
    let mut event = model::new_event(&name, "VM_TAKEN", why);
    event.warning = true;
    let transaction = Transaction::new().if_unchanged(key.clone(), stored.revision);
    let transaction = commands::unplace(store, &mut record, transaction).await?;
    let transaction = transaction
        .put(key, record.encode_to_vec())
        .put(event.name.clone(), event.encode_to_vec());
    store.commit(transaction).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::VolumeRecord;

    fn vm(policy: pb::RestartPolicy) -> VmRecord {
        let mut spec = pb::VmSpec::default();
        spec.set_restart_policy(policy);
        let mut vm = pb::Vm {
            name: "projects/default/vms/a".into(),
            generation: 3,
            spec: Some(spec),
            ..Default::default()
        };
        vm.set_desired_power(pb::DesiredPower::On);
        VmRecord {
            vm,
            host: "h1".into(),
            ..Default::default()
        }
    }

    fn stopped(reason: &str) -> node::VmStatus {
        let mut seen = node::VmStatus {
            observed_generation: 3,
            stop_reason: reason.into(),
            ..Default::default()
        };
        seen.set_phase(node::VmPhase::Stopped);
        seen
    }

    #[test]
    fn only_vms_that_may_run_anywhere_are_taken_from_a_lost_host() {
        let (desired, lost) = (Desired::default(), BTreeSet::from(["h1".to_owned()]));
        let taken = |record: &VmRecord| taken(record, &desired, &lost, None);
        assert!(taken(&vm(pb::RestartPolicy::Anywhere)).is_some());
        assert_eq!(taken(&vm(pb::RestartPolicy::SameHost)), None);
        assert_eq!(taken(&vm(pb::RestartPolicy::Unspecified)), None);
        let mut off = vm(pb::RestartPolicy::Anywhere);
        off.vm.set_desired_power(pb::DesiredPower::Off);
        assert_eq!(taken(&off), None);
        let mut elsewhere = vm(pb::RestartPolicy::Anywhere);
        elsewhere.host = "h2".into();
        assert_eq!(taken(&elsewhere), None);
    }

    #[test]
    fn volume_of_the_lost_host_keeps_its_vm_there() {
        let mut record = vm(pb::RestartPolicy::Anywhere);
        let volume = "projects/default/volumes/v";
        record.vm.spec.as_mut().unwrap().disks.push(pb::Disk {
            source: Some(pb::disk::Source::Volume(volume.into())),
            ..Default::default()
        });
        let mut desired = Desired::default();
        let stored = Stored {
            record: VolumeRecord {
                host: "h1".into(),
                ..Default::default()
            },
            revision: 1,
        };
        desired.volumes.insert(volume.into(), stored);
        let lost = BTreeSet::from(["h1".to_owned()]);
        assert_eq!(taken(&record, &desired, &lost, None), None);
    }

    #[test]
    fn what_its_host_gave_up_is_taken_and_what_its_guest_ended_is_not() {
        let (desired, lost) = (Desired::default(), BTreeSet::new());
        let record = vm(pb::RestartPolicy::Anywhere);
        let taken = |seen: &node::VmStatus| taken(&record, &desired, &lost, Some(seen));
        assert!(taken(&stopped("lease-lost")).is_some());
        assert!(taken(&stopped("host-reboot")).is_some());
        assert_eq!(taken(&stopped("guest-shutdown")), None);
        // It is about to be told something newer.
        let mut old = stopped("lease-lost");
        old.observed_generation = 2;
        assert_eq!(taken(&old), None);
    }
}
