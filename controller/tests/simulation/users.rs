//! Users of the API's commands, and what they did.

use std::sync::Arc;
use std::time::Duration;

use api::controller as pb;
use api::names::Name;
use controller::commands::{self, CommandError, RequestKey};
use controller::hosts::Hosts;
use controller::store::{SharedStore, StoreError};
use tokio::time::Instant;

use crate::linear::{Did, Event};
use crate::world::World;

/// VMs of every world.
pub(crate) const VMS: [&str; 2] = ["a", "b"];

pub(crate) fn name(vm: &str) -> Name {
    Name::vm("default", vm)
}

fn spec(vm: &str) -> pb::VmSpec {
    let mut spec = pb::VmSpec {
        vcpus: 1,
        memory_bytes: 1 << 30,
        kernel: "/kernel".to_owned(),
        disks: vec![pb::Disk {
            name: "root".to_owned(),
            nbd: Some(pb::NbdSource {
                address: "unix:/disks".to_owned(),
                export: vm.to_owned(),
                generation: 1,
                ..Default::default()
            }),
            ..Default::default()
        }],
        ..Default::default()
    };
    spec.set_restart_policy(pb::RestartPolicy::Anywhere);
    spec
}

/// Makes the VMs, and wants them to run.
pub(crate) async fn begin(store: &SharedStore, hosts: &Hosts) {
    for vm in VMS {
        let request = RequestKey::new("default", "", "create", &pb::CreateVmRequest::default());
        let created =
            commands::create_vm(store, hosts, &name(vm), &spec(vm), &request, false).await;
        created.expect("nothing is broken yet");
    }
}

/// One user of one VM: reads it, starts and stops it.
pub(crate) async fn use_vm(world: Arc<World>, store: SharedStore, vm: usize, until: Instant) {
    let mut turn = 0_u64;
    while Instant::now() < until {
        tokio::time::sleep(world.random.millis(1_500, 12_000)).await;
        turn += 1;
        let begun = Instant::now();
        let name = name(VMS[vm]);
        let reads = world.random.one_of(2);
        let patience = Duration::from_secs(20);
        let did = if reads {
            let read = tokio::time::timeout(patience, commands::get_vm(&store, &name)).await;
            match read {
                Ok(Ok(stored)) => Some(Did::Read(stored.record.vm.generation)),
                _ => None,
            }
        } else {
            let on = !world.random.one_of(3);
            let changed = tokio::time::timeout(patience, power(&store, &name, on)).await;
            match changed {
                Ok(Ok(operation)) => {
                    let metadata = operation.metadata.unwrap_or_default();
                    Some(Did::Changed(metadata.generation))
                }
                // These did not happen.
                Ok(Err(CommandError::Store(
                    StoreError::Unavailable(_) | StoreError::Full(_) | StoreError::Conflict { .. },
                ))) => None,
                Ok(Err(_)) | Err(_) => Some(Did::MayHaveChanged),
            }
        };
        let Some(did) = did else { continue };
        let is_known = !matches!(did, Did::MayHaveChanged);
        world.log(|| format!("user of {}: {did:?} ({turn})", VMS[vm]));
        world.history[vm].lock().unwrap().push(Event {
            begun,
            ended: is_known.then(Instant::now),
            did,
        });
    }
}

pub(crate) async fn power(
    store: &SharedStore,
    name: &Name,
    on: bool,
) -> Result<pb::Operation, CommandError> {
    let request = RequestKey::new("default", "", "power", &pb::StartVmRequest::default());
    match on {
        true => commands::start_vm(store, name, "", &request).await,
        false => commands::stop_vm(store, name, "", &request, true).await,
    }
}
