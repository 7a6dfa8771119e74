//! Experiments, their reports and the switch in the store.

use api::controller::{FaultExperiment, FaultReport};
use api::names::Name;
use prost::Message as _;

use crate::model::{self, prefix};
use crate::reconciler::decode;
use crate::store::{Item, Range, SharedStore, StoreError, Transaction};

/// There while faults are switched off.
const SWITCH_OFF: &str = "fault-switch-off";

/// Key of an experiment.
pub(crate) fn key(name: &Name) -> String {
    model::key(name)
}

fn report_key(name: &Name) -> String {
    format!("fault-reports/{}/{}", name.project, name.id)
}

/// Stores a new experiment.
///
/// # Errors
/// [`StoreError::Conflict`] when the name is taken.
pub(crate) async fn create(
    store: &SharedStore,
    name: &Name,
    experiment: &FaultExperiment,
) -> Result<(), StoreError> {
    let event = model::new_event(&name.to_string(), "FAULT_EXPERIMENT_BEGUN", "");
    let transaction = Transaction::new()
        .if_absent(key(name))
        .put(key(name), experiment.encode_to_vec())
        .put(event.name.clone(), event.encode_to_vec());
    store.commit(transaction).await.map(drop)
}

/// Stores what is known of a run; `over` tells of its end, too.
pub(crate) async fn save(
    store: &SharedStore,
    experiment: &FaultExperiment,
    report: &FaultReport,
    over: bool,
) -> Result<(), StoreError> {
    let Ok(name) = Name::parse_fault_experiment(&experiment.name) else {
        return Ok(());
    };
    let mut transaction = Transaction::new()
        .put(key(&name), experiment.encode_to_vec())
        .put(report_key(&name), report.encode_to_vec());
    if over {
        let status = experiment.status.clone().unwrap_or_default();
        let verdict = status.verdict().as_str_name();
        let verdict = verdict.trim_start_matches("FAULT_VERDICT_").to_lowercase();
        let mut event = model::new_event(&experiment.name, "FAULT_EXPERIMENT_ENDED", verdict);
        event.warning = status.verdict() == api::controller::FaultVerdict::Fail;
        transaction = transaction.put(event.name.clone(), event.encode_to_vec());
    }
    store.commit(transaction).await.map(drop)
}

/// An experiment as stored.
pub(crate) async fn get(
    store: &SharedStore,
    name: &Name,
) -> Result<Option<FaultExperiment>, StoreError> {
    let item = store.get(&key(name)).await?;
    item.map(|item| decode(&item.key, &item.value)).transpose()
}

/// Its report as stored last; empty before the first look.
pub(crate) async fn report(store: &SharedStore, name: &Name) -> Result<FaultReport, StoreError> {
    let item = store.get(&report_key(name)).await?;
    let report = item
        .map(|item| decode(&item.key, &item.value))
        .transpose()?;
    Ok(report.unwrap_or_default())
}

/// Removes an experiment with its report.
pub(crate) async fn delete(store: &SharedStore, name: &Name) -> Result<(), StoreError> {
    let transaction = Transaction::new()
        .delete(key(name))
        .delete(report_key(name));
    store.commit(transaction).await.map(drop)
}

/// All experiments.
pub(crate) async fn all(store: &SharedStore) -> Result<Vec<FaultExperiment>, StoreError> {
    let listing = store.list(Range::all(prefix::FAULT_EXPERIMENTS)).await?;
    let decode = |item: &Item| decode(&item.key, &item.value);
    listing.items.iter().map(decode).collect()
}

/// Whether faults are switched on.
pub(crate) async fn is_on(store: &SharedStore) -> Result<bool, StoreError> {
    Ok(store.get(SWITCH_OFF).await?.is_none())
}

/// Turns the switch.
pub(crate) async fn switch(store: &SharedStore, on: bool) -> Result<(), StoreError> {
    let transaction = match on {
        true => Transaction::new().delete(SWITCH_OFF),
        false => Transaction::new().put(SWITCH_OFF, vec![]),
    };
    store.commit(transaction).await.map(drop)
}
