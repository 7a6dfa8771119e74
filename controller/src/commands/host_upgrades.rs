//! Commands on rolling upgrades of hosts. What they begin is done by [`crate::host_upgrades`].

use std::collections::BTreeMap;

use api::controller as pb;
use api::names::DEFAULT_PROJECT;
use api::validate::HostSelection;
use prost::Message as _;

use super::{CommandError, RequestKey, get_host, validated, with_retry};
use crate::model::{self, HOST_UPGRADE, HostProgress, HostRecord, HostUpgradeRecord};
use crate::reconciler::decode;
use crate::store::{Range, SharedStore, Transaction};

/// How far each is, is in one value of the store; etcd takes 1.5 MiB.
const MAX_HOSTS: usize = 1_000;

/// Wants agents and daemons of hosts exchanged.
///
/// # Errors
/// When there is no such host, there are too many, or another upgrade is under way.
pub async fn upgrade_hosts(
    store: &SharedStore,
    selection: &HostSelection,
    request: &pb::UpgradeHostsRequest,
) -> Result<pb::Operation, CommandError> {
    let method = "UpgradeHosts";
    let key = RequestKey::new(DEFAULT_PROJECT, &request.request_id, method, request);
    with_retry(|| async {
        if let Some(earlier) = key.earlier(store).await? {
            return Ok(earlier);
        }
        if let Some(item) = store.get(HOST_UPGRADE).await? {
            let record: HostUpgradeRecord = decode(&item.key, &item.value)?;
            return Err(CommandError::UpgradeUnderWay {
                operation: record.operation,
            });
        }
        let ids = selected_hosts(store, selection).await?;
        few_enough(&ids)?;
        let mut operation = new_operation(&ids);
        let transaction = key.begin(Transaction::new(), &mut operation);
        let hosts = ids.into_iter().map(|host| HostProgress {
            host,
            ..Default::default()
        });
        let record = HostUpgradeRecord {
            operation: operation.name.clone(),
            agent_binary: request.agent_binary.clone(),
            device_blk: request.device_blk.clone(),
            device_net: request.device_net.clone(),
            max_unavailable: request.max_unavailable.max(1),
            max_devices_unavailable: request.max_devices_unavailable.max(1),
            confirm_ms: request.confirm_ms,
            hosts: hosts.collect(),
            cancel: false,
        };
        let transaction = transaction
            .if_absent(HOST_UPGRADE)
            .put(HOST_UPGRADE, record.encode_to_vec());
        store.commit(transaction).await?;
        Ok(operation)
    })
    .await
}

/// The ids of the hosts that are meant, in the order in which they are taken.
///
/// # Errors
/// When one is not there, or there is none.
pub async fn selected_hosts(
    store: &SharedStore,
    selection: &HostSelection,
) -> Result<Vec<String>, CommandError> {
    let wanted = match selection {
        HostSelection::Named(ids) => {
            for id in ids {
                get_host(store, id).await?;
            }
            return Ok(ids.clone());
        }
        HostSelection::Labelled(labels) => labels.clone(),
        HostSelection::All => BTreeMap::new(),
    };
    let mut ids = Vec::new();
    for item in store.list(Range::all(model::HOSTS)).await?.items {
        let record: HostRecord = decode(&item.key, &item.value)?;
        if has_labels(&record, &wanted) {
            ids.push(record.id().to_owned());
        }
    }
    match ids.is_empty() {
        true => Err(CommandError::NotFound {
            what: "a host of these labels".to_owned(),
        }),
        false => Ok(ids),
    }
}

fn few_enough(ids: &[String]) -> Result<(), CommandError> {
    match ids.len() {
        0..=MAX_HOSTS => Ok(()),
        found => Err(CommandError::TooManyHosts {
            found,
            most: MAX_HOSTS,
        }),
    }
}

/// The answer to a request that hosts only checked.
pub fn checked_upgrade(
    ids: &[String],
    findings: Vec<String>,
    refusals: &[String],
) -> pb::Operation {
    let mut operation = new_operation(ids);
    operation.metadata.get_or_insert_default().findings = findings;
    operation.error = (!refusals.is_empty()).then(|| pb::OperationError {
        code: tonic::Code::FailedPrecondition as i32,
        message: refusals.join("; "),
        reason: "HOST_REFUSED".to_owned(),
    });
    validated(operation)
}

/// Has no further host begin.
pub(super) async fn cancel_host_upgrade(
    store: &SharedStore,
    operation: &str,
) -> Result<(), CommandError> {
    let Some(item) = store.get(HOST_UPGRADE).await? else {
        return Ok(());
    };
    let mut record: HostUpgradeRecord = decode(&item.key, &item.value)?;
    if record.operation != operation || record.cancel {
        return Ok(());
    }
    record.cancel = true;
    let transaction = Transaction::new()
        .if_unchanged(HOST_UPGRADE, item.revision)
        .put(HOST_UPGRADE, record.encode_to_vec());
    store.commit(transaction).await?;
    Ok(())
}

fn new_operation(ids: &[String]) -> pb::Operation {
    let target = match ids {
        [only] => model::host_name(only),
        _ => model::host_name("-"),
    };
    model::new_operation(pb::OperationKind::UpgradeHosts, &target, 0)
}

/// What people decided comes before what the agent says.
fn has_labels(record: &HostRecord, wanted: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| {
        let reported = record.inventory.as_ref();
        let reported = reported.and_then(|inventory| inventory.labels.get(key));
        record.spec.labels.get(key).or(reported) == Some(value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upgrade_is_of_as_many_hosts_as_one_value_holds() {
        let hosts = vec!["h".to_owned(); MAX_HOSTS + 1];
        assert!(few_enough(&hosts[1..]).is_ok());
        let refused = few_enough(&hosts).unwrap_err().to_string();
        assert!(
            refused.contains("1001 hosts are more than the 1000"),
            "{refused}"
        );
    }
}
