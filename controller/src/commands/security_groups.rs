//! Commands on security groups. Nothing happens on hosts by itself: what they permit is part of what
//! hosts are told about networks.

use std::collections::HashMap;

use api::controller as pb;
use api::names::Name;
use prost::Message;

use super::{CommandError, check_etag, quota, with_retry};
use crate::model::{self, SecurityGroupRecord, VmRecord, key, prefix, short};
use crate::plan::Stored;
use crate::reconciler::decode;
use crate::store::{Range, SharedStore, Transaction};

/// One security group.
///
/// # Errors
/// When there is none of that name.
pub async fn get_security_group(
    store: &SharedStore,
    name: &Name,
) -> Result<Stored<SecurityGroupRecord>, CommandError> {
    let item = store.get(&key(name)).await?;
    let item = item.ok_or_else(|| CommandError::NotFound { what: short(name) })?;
    Ok(Stored {
        record: decode(&item.key, &item.value)?,
        revision: item.revision,
    })
}

/// Stores a security group.
///
/// # Errors
/// When the name is taken, or a rule names a group that is not there.
pub async fn create_security_group(
    store: &SharedStore,
    name: &Name,
    group: &pb::SecurityGroup,
) -> Result<pb::SecurityGroup, CommandError> {
    with_retry(|| async {
        if store.get(&key(name)).await?.is_some() {
            return Err(CommandError::AlreadyExists { what: short(name) });
        }
        let record = SecurityGroupRecord {
            group: pb::SecurityGroup {
                name: name.to_string(),
                uid: model::new_uid(),
                generation: 1,
                create_time: Some(model::now()),
                description: group.description.clone(),
                rules: group.rules.clone(),
                ..Default::default()
            },
        };
        let event = model::new_event(&name.to_string(), "SECURITY_GROUP_CREATED", "");
        let none = pb::QuotaUsage::default();
        let transaction = quota::admit(store, &name.project, &none, Transaction::new()).await?;
        let transaction = require_groups(store, name, &group.rules, transaction)
            .await?
            .if_absent(key(name))
            .put(key(name), record.encode_to_vec())
            .put(event.name.clone(), event.encode_to_vec());
        store.commit(transaction).await?;
        visible_security_group(store, record).await
    })
    .await
}

/// Replaces a group's rules.
///
/// # Errors
/// When it does not exist, changed, or a rule names a group that is not there.
pub async fn update_security_group(
    store: &SharedStore,
    name: &Name,
    group: &pb::SecurityGroup,
) -> Result<pb::SecurityGroup, CommandError> {
    with_retry(|| async {
        let Stored {
            mut record,
            revision,
        } = get_security_group(store, name).await?;
        check_etag(
            name,
            &record.group.uid,
            record.group.generation,
            &group.etag,
        )?;
        record.group.description = group.description.clone();
        record.group.rules = group.rules.clone();
        record.group.generation += 1;
        let event = model::new_event(&name.to_string(), "SECURITY_GROUP_UPDATED", "");
        let transaction = require_groups(store, name, &group.rules, Transaction::new())
            .await?
            .if_unchanged(key(name), revision)
            .put(key(name), record.encode_to_vec())
            .put(event.name.clone(), event.encode_to_vec());
        store.commit(transaction).await?;
        visible_security_group(store, record).await
    })
    .await
}

/// Removes a group.
///
/// # Errors
/// When it does not exist, changed, or a NIC or another group's rule names it.
pub async fn delete_security_group(
    store: &SharedStore,
    name: &Name,
    etag: &str,
) -> Result<(), CommandError> {
    with_retry(|| async {
        // Whoever comes to name it compares this revision, so nobody can between here and the commit.
        let Stored { record, revision } = get_security_group(store, name).await?;
        check_etag(name, &record.group.uid, record.group.generation, etag)?;
        let vms = format!("{}{}/", prefix::VMS, name.project);
        let mut members = members_of_groups(store, &vms).await?;
        let mut users = members.remove(&name.to_string()).unwrap_or_default();
        let wanted = name.to_string();
        let range = Range::all(format!("{}{}/", prefix::SECURITY_GROUPS, name.project));
        for item in store.list(range).await?.items {
            let other: SecurityGroupRecord = decode(&item.key, &item.value)?;
            let names = other
                .group
                .rules
                .iter()
                .any(|rule| rule.security_group == wanted);
            if names && other.group.name != wanted {
                users.push(other.group.name);
            }
        }
        if !users.is_empty() {
            return Err(CommandError::GroupInUse {
                group: name.id.clone(),
                users: users.join(", "),
            });
        }
        let event = model::new_event(&wanted, "SECURITY_GROUP_DELETED", "");
        let transaction = Transaction::new()
            .if_unchanged(key(name), revision)
            .delete(key(name))
            .put(event.name.clone(), event.encode_to_vec());
        store.commit(transaction).await?;
        Ok(())
    })
    .await
}

/// What users see of a group: as stored, with the NICs that are in it.
///
/// # Errors
/// When the store fails.
pub async fn visible_security_group(
    store: &SharedStore,
    record: SecurityGroupRecord,
) -> Result<pb::SecurityGroup, CommandError> {
    let members = match Name::parse_security_group(&record.group.name) {
        Ok(name) => members_of_groups(store, &format!("{}{}/", prefix::VMS, name.project)).await?,
        Err(_) => Members::new(),
    };
    Ok(security_group_with(record, &members))
}

/// `{vm}/{nic}` of each NIC in a group, by the groups' names.
pub type Members = HashMap<String, Vec<String>>;

/// What users see of a security group.
pub fn security_group_with(record: SecurityGroupRecord, members: &Members) -> pb::SecurityGroup {
    let mut group = record.group;
    group.etag = model::etag(&group.uid, group.generation);
    group.members = members.get(&group.name).cloned().unwrap_or_default();
    group
}

/// Which NICs of the VMs below a prefix are in which groups.
///
/// # Errors
/// When the store fails.
pub async fn members_of_groups(store: &SharedStore, vms: &str) -> Result<Members, CommandError> {
    let mut members = Members::new();
    for item in store.list(Range::all(vms)).await?.items {
        let record: VmRecord = decode(&item.key, &item.value)?;
        let vm = Name::parse_vm(&record.vm.name).map(|name| name.id);
        for nic in record.vm.spec.unwrap_or_default().nics {
            for group in nic.security_groups {
                let member = format!("{}/{}", vm.as_deref().unwrap_or_default(), nic.name);
                members.entry(group).or_default().push(member);
            }
        }
    }
    Ok(members)
}

async fn require_groups(
    store: &SharedStore,
    own: &Name,
    rules: &[pb::SecurityRule],
    mut transaction: Transaction,
) -> Result<Transaction, CommandError> {
    for (index, rule) in rules.iter().enumerate() {
        let named = &rule.security_group;
        if named.is_empty() || *named == own.to_string() {
            continue;
        }
        let name = Name::parse_security_group(named).ok();
        let name = name.filter(|name| name.project == own.project);
        let item = match &name {
            Some(name) => store.get(&key(name)).await?,
            None => None,
        };
        let (Some(name), Some(item)) = (name, item) else {
            return Err(CommandError::NoSuchGroup {
                field: format!("security_group.rules[{index}].security_group"),
                group: named.clone(),
            });
        };
        transaction = transaction.if_unchanged(key(&name), item.revision);
    }
    Ok(transaction)
}
