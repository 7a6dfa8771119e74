//! Changing a part of a VM's spec, such as a disk or a NIC: what is the same around all such commands.

use api::controller as pb;
use api::names::Name;
use prost::Message;

use super::{CommandError, RequestKey, check_etag, get_vm, validated};
use crate::model::{self, VmRecord, key, short};
use crate::plan::Stored;
use crate::store::{SharedStore, Transaction};

/// A change that may be made.
pub(super) struct Change {
    record: VmRecord,
    revision: u64,
}

/// What became of a wish to change a VM.
pub(super) enum Begun {
    /// The same request came before; this is what it was answered.
    Before(Box<pb::Operation>),
    Now(Box<Change>),
}

impl Change {
    /// Reads the VM.
    ///
    /// # Errors
    /// When it does not exist, is not as `etag` says, or is being deleted.
    pub(super) async fn begin(
        store: &SharedStore,
        vm: &Name,
        etag: &str,
        request: &RequestKey,
    ) -> Result<Begun, CommandError> {
        if let Some(earlier) = request.earlier(store).await? {
            return Ok(Begun::Before(Box::new(earlier)));
        }
        let Stored { record, revision } = get_vm(store, vm).await?;
        check_etag(vm, &record.vm.uid, record.vm.generation, etag)?;
        if record.vm.deleting {
            return Err(CommandError::Deleting { what: short(vm) });
        }
        Ok(Begun::Now(Box::new(Self { record, revision })))
    }

    /// What is wanted, to be changed.
    pub(super) fn spec(&mut self) -> &mut pb::VmSpec {
        self.record.vm.spec.get_or_insert_default()
    }

    /// Stores it, together with what `transaction` holds already; `part` is such as `nics/nic0`.
    ///
    /// # Errors
    /// When the store does not take it, somebody else's change in between among others.
    pub(super) async fn commit(
        mut self,
        store: &SharedStore,
        (vm, part): (&Name, &str),
        kind: pb::OperationKind,
        request: &RequestKey,
        validate_only: bool,
        transaction: Transaction,
    ) -> Result<pb::Operation, CommandError> {
        self.record.vm.generation += 1;
        let generation = self.record.vm.generation;
        let mut operation = model::new_operation(kind, &format!("{vm}/{part}"), generation);
        if validate_only {
            return Ok(validated(operation));
        }
        let transaction = request
            .begin(transaction, &mut operation)
            .if_unchanged(key(vm), self.revision)
            .put(key(vm), self.record.encode_to_vec());
        store.commit(transaction).await?;
        Ok(operation)
    }
}

/// The names of parts that there are, for people.
pub(super) fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    match names.is_empty() {
        true => "none".to_owned(),
        false => names.join(", "),
    }
}
