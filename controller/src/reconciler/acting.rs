//! Each action that is not a call to a host, carried out.

use api::controller as pb;

use super::Reconciler;
use super::ends::{advance_job, finish, forget};
use super::placing::{place_vm, place_volume};
use super::records::{note_network, record_host, record_network, record_vm, record_volume};
use crate::commands;
use crate::failover;
use crate::model;
use crate::moving;
use crate::plan::{Action, Desired, Stored};
use crate::store::{StoreError, Transaction};

impl Reconciler {
    /// Stores what one action is about; somebody else may have been faster.
    pub(super) async fn act(&self, desired: &Desired, action: Action) -> Result<(), StoreError> {
        let store = &self.store;
        match action {
            // Hosts are told beside this.
            Action::Call { .. } => Ok(()),
            Action::PlaceVm { name, found } => {
                place_vm(store, &self.hosts, &desired.vms[&name], found).await
            }
            Action::TakeVm { name, why } => {
                let stored = &desired.vms[&name];
                self.taking().insert(name, stored.revision);
                failover::take_vm(store, stored, &why).await
            }
            Action::PlaceVolume { name, found } => {
                place_volume(store, &self.hosts, &desired.volumes[&name], found).await
            }
            Action::NoteStays { name, drain, why } => {
                moving::note_stays(store, &desired.vms[&name], &drain, &why).await
            }
            Action::StopToMove { name, drain } => {
                moving::stop_to_move(store, &self.hosts, &desired.vms[&name], &drain).await
            }
            Action::MoveVm { name, drain } => {
                moving::move_vm(store, &self.hosts, &desired.vms[&name], &drain).await
            }
            Action::AdvanceJob { name, host } => advance_job(store, &name, &host).await,
            Action::NoteEvicted { host, node_id } => {
                let key = model::eviction_key(&host, &node_id);
                store.commit(Transaction::new().delete(key)).await.map(drop)
            }
            Action::RecordHost { host, inventory } => {
                record_host(store, &desired.hosts[&host], *inventory).await
            }
            Action::RecordVm {
                name,
                status,
                ended,
            } => record_vm(store, &desired.vms[&name], &status, ended).await,
            Action::RecordVolume {
                name,
                status,
                based,
            } => record_volume(store, &desired.volumes[&name], &status, based).await,
            Action::RecordNetwork { name, status } => {
                record_network(store, &desired.networks[&name], &status).await
            }
            Action::NoteNetwork { name, hosts } => {
                note_network(store, &desired.networks[&name], hosts).await
            }
            Action::ForgetVm { name } => {
                let Stored { record, revision } = &*desired.vms[&name];
                if self.calls.is_busy(&record.host, &name) {
                    return Ok(());
                }
                let given_back = commands::release(store, record, Transaction::new()).await?;
                let node_id = &record.node_id;
                forget(
                    store,
                    &self.asked(&name, desired),
                    &name,
                    node_id,
                    *revision,
                    given_back,
                )
                .await
            }
            Action::ForgetVolume { name } => {
                let Stored { record, revision } = &desired.volumes[&name];
                if self.calls.is_busy(&record.host, &name) {
                    return Ok(());
                }
                let node_id = &record.node_id;
                let transaction =
                    commands::release_export(store, record, Transaction::new()).await?;
                forget(
                    store,
                    &self.asked(&name, desired),
                    &name,
                    node_id,
                    *revision,
                    transaction,
                )
                .await
            }
            Action::ForgetNetwork { name } => {
                if self.calls.is_busy_anywhere(&name) {
                    return Ok(());
                }
                let Stored { record, revision } = &desired.networks[&name];
                let (node_id, transaction) = (&record.node_id, Transaction::new());
                forget(
                    store,
                    &self.asked(&name, desired),
                    &name,
                    node_id,
                    *revision,
                    transaction,
                )
                .await
            }
            Action::FinishOperation {
                name,
                error,
                findings,
            } => finish(store, &name, error, &findings).await,
        }
    }

    /// Operations that are not done and whose target is `name`.
    fn asked<'a>(&self, name: &str, desired: &'a Desired) -> Vec<&'a pb::Operation> {
        let index = self.cache.index();
        let asked = index.asked(name).chain(index.others());
        let asked = asked.filter_map(|operation| desired.pending.get(operation));
        let target = |operation: &&pb::Operation| {
            let metadata = operation.metadata.as_ref();
            metadata.is_some_and(|metadata| metadata.target == name)
        };
        asked.filter(target).collect()
    }
}
