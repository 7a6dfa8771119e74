//! Commands on networks.

use std::net::Ipv4Addr;

use api::controller as pb;
use api::names::Name;
use ipnet::{IpNet, Ipv4Net};
use prost::Message;

use super::{CommandError, RequestKey, check_etag, quota, validated, with_retry};
use crate::model::{self, NetworkRecord, VmRecord, claim, key, prefix, short};
use crate::plan::{Desired, Fleet, Layout, Stored, network_status_now};
use crate::reconciler::decode;
use crate::store::{Range, SharedStore, Transaction};

/// Where networks without a subnet of their own get one: away from what routers at home and container
/// engines take.
const AUTOMATIC: (Ipv4Addr, u32) = (Ipv4Addr::new(10, 64, 0, 0), 1 << 14);

/// One network.
///
/// # Errors
/// When there is none of that name.
pub async fn get_network(
    store: &SharedStore,
    name: &Name,
) -> Result<Stored<NetworkRecord>, CommandError> {
    let item = store.get(&key(name)).await?;
    let item = item.ok_or_else(|| CommandError::NotFound { what: short(name) })?;
    Ok(Stored {
        record: decode(&item.key, &item.value)?,
        revision: item.revision,
    })
}

/// Wants a network.
///
/// # Errors
/// When the name, the subnet or the VNI is taken.
pub async fn create_network(
    store: &SharedStore,
    name: &Name,
    spec: &pb::NetworkSpec,
    request: &RequestKey,
    validate_only: bool,
) -> Result<pb::Operation, CommandError> {
    with_retry(|| async {
        if let Some(earlier) = request.earlier(store).await? {
            return Ok(earlier);
        }
        if store.get(&key(name)).await?.is_some() {
            return request
                .earlier(store)
                .await?
                .ok_or_else(|| CommandError::AlreadyExists { what: short(name) });
        }
        let layout = store.get(claim::LAYOUT).await?;
        let mut spec = spec.clone();
        complete(store, name, &mut spec).await?;
        let mut operation = model::new_operation(pb::OperationKind::CreateNetwork, name, 1);
        if validate_only {
            return Ok(validated(operation));
        }
        let uid = model::new_uid();
        let node_id = model::node_id(name, &uid);
        let record = NetworkRecord {
            network: pb::Network {
                name: name.to_string(),
                uid: uid.clone(),
                generation: 1,
                create_time: Some(model::now()),
                spec: Some(spec),
                ..Default::default()
            },
            node_id: node_id.clone(),
            hosts: Vec::new(),
        };
        let event = model::new_event(&name.to_string(), "NETWORK_CREATED", "");
        let node_id = model::node_id_key(name, &node_id);
        // Two that come at once must see each other's subnets.
        let transaction = match layout {
            Some(item) => Transaction::new().if_unchanged(claim::LAYOUT, item.revision),
            None => Transaction::new().if_absent(claim::LAYOUT),
        };
        let more = pb::QuotaUsage {
            networks: 1,
            ..Default::default()
        };
        let transaction = quota::admit(store, &name.project, &more, transaction).await?;
        let transaction = request
            .begin(transaction, &mut operation)
            .put(claim::LAYOUT, uid.into_bytes())
            .if_absent(key(name))
            .if_absent(node_id.clone())
            .put(key(name), record.encode_to_vec())
            .put(node_id, name.to_string().into_bytes())
            .put(event.name.clone(), event.encode_to_vec());
        store.commit(transaction).await?;
        Ok(operation)
    })
    .await
}

/// Changes a network.
///
/// # Errors
/// When it does not exist, changed, or is being deleted.
pub async fn update_network(
    store: &SharedStore,
    name: &Name,
    etag: &str,
    request: &RequestKey,
    validate_only: bool,
    change: impl Fn(&mut pb::NetworkSpec),
) -> Result<pb::Operation, CommandError> {
    with_retry(|| async {
        if let Some(earlier) = request.earlier(store).await? {
            return Ok(earlier);
        }
        let Stored {
            mut record,
            revision,
        } = get_network(store, name).await?;
        check_etag(name, &record.network.uid, record.network.generation, etag)?;
        if record.network.deleting {
            return Err(CommandError::Deleting { what: short(name) });
        }
        change(record.network.spec.get_or_insert_default());
        record.network.generation += 1;
        let generation = record.network.generation;
        let kind = pb::OperationKind::UpdateNetwork;
        let mut operation = model::new_operation(kind, name, generation);
        if validate_only {
            return Ok(validated(operation));
        }
        let transaction = request
            .begin(Transaction::new(), &mut operation)
            .if_unchanged(key(name), revision)
            .put(key(name), record.encode_to_vec());
        store.commit(transaction).await?;
        Ok(operation)
    })
    .await
}

/// Wants a network to be gone.
///
/// # Errors
/// When it does not exist, changed, or a VM's spec names it.
pub async fn delete_network(
    store: &SharedStore,
    name: &Name,
    etag: &str,
    request: &RequestKey,
) -> Result<pb::Operation, CommandError> {
    with_retry(|| async {
        if let Some(earlier) = request.earlier(store).await? {
            return Ok(earlier);
        }
        // Creating a VM compares its networks' revisions, as it does with volumes.
        let Stored {
            mut record,
            revision,
        } = get_network(store, name).await?;
        check_etag(name, &record.network.uid, record.network.generation, etag)?;
        let users = vms_in(store, name).await?;
        if !users.is_empty() {
            return Err(CommandError::NetworkInUse {
                network: name.id.clone(),
                vms: users.join(", "),
            });
        }
        record.network.deleting = true;
        record.network.generation += 1;
        let mut operation = model::new_operation(pb::OperationKind::DeleteNetwork, name, 1);
        let transaction = request
            .begin(Transaction::new(), &mut operation)
            .if_unchanged(key(name), revision)
            .put(key(name), record.encode_to_vec());
        store.commit(transaction).await?;
        Ok(operation)
    })
    .await
}

/// What users see of a network: as stored, with what was seen last. `desired` is all that is wanted.
pub fn visible_network(
    record: &NetworkRecord,
    (desired, layout): (&Desired, &Layout),
    fleet: &Fleet,
) -> pb::Network {
    let mut network = record.network.clone();
    network.etag = model::etag(&network.uid, network.generation);
    let stored = network.status.take().unwrap_or_default();
    let mut status = network_status_now(record, (desired, layout), fleet).unwrap_or(stored);
    if status.phase() == pb::NetworkPhase::Unspecified {
        status.phase = pb::NetworkPhase::Pending as i32;
    }
    let vms = layout.vms(&network.name);
    let nics = vms
        .iter()
        .flat_map(|vm| vm.vm.spec.iter().flat_map(|spec| &spec.nics));
    let used = nics.filter(|nic| nic.network == network.name && !nic.ipv4_address.is_empty());
    let used = used.count() as u64;
    status.vms = vms.iter().map(|vm| vm.node_id.clone()).collect();
    let spec = network.spec.clone().unwrap_or_default();
    status.ipv4_addresses_used = used;
    status.ipv4_addresses_free = model::ipv4_pool(&spec).map_or(0, |(first, last)| {
        let gateway = spec.ipv4_gateway.parse::<Ipv4Addr>().map(u32::from);
        let gateway = gateway.is_ok_and(|gateway| (first..=last).contains(&gateway));
        (u64::from(last - first) + 1).saturating_sub(used + u64::from(gateway))
    });
    let hosts = layout.hosts(&network.name);
    status.stale = hosts.iter().any(|host| !fleet.of(host).connected);
    network.status = Some(status);
    network
}

async fn vms_in(store: &SharedStore, name: &Name) -> Result<Vec<String>, CommandError> {
    let wanted = name.to_string();
    let mut users = Vec::new();
    let range = Range::all(format!("{}{}/", prefix::VMS, name.project));
    for item in store.list(range).await?.items {
        let record: VmRecord = decode(&item.key, &item.value)?;
        let spec = record.vm.spec.unwrap_or_default();
        if spec.nics.iter().any(|nic| nic.network == wanted)
            && let Ok(vm) = Name::parse_vm(&record.vm.name)
        {
            users.push(short(&vm));
        }
    }
    Ok(users)
}

/// Fills in what the spec leaves out and refuses what another network has.
async fn complete(
    store: &SharedStore,
    name: &Name,
    spec: &mut pb::NetworkSpec,
) -> Result<(), CommandError> {
    let mut others = Vec::new();
    for item in store.list(Range::all(prefix::NETWORKS)).await?.items {
        let record: NetworkRecord = decode(&item.key, &item.value)?;
        let spec = record.network.spec.unwrap_or_default();
        others.push((record.network.name, spec));
    }
    let has_host = model::has_host(spec.kind());
    if has_host && spec.ipv4_cidr.is_empty() {
        spec.ipv4_cidr = free_subnet(&others)?.to_string();
    }
    let subnets = [
        ("network.spec.ipv4_cidr", &spec.ipv4_cidr),
        ("network.spec.ipv6_prefix", &spec.ipv6_prefix),
    ];
    for (field, text) in subnets {
        // Only where the host has an address do others' subnets matter to it.
        let Some(net) = text.parse::<IpNet>().ok().filter(|_| has_host) else {
            continue;
        };
        for (other_name, other) in &others {
            let theirs = [&other.ipv4_cidr, &other.ipv6_prefix];
            let clash = model::has_host(other.kind())
                && theirs.into_iter().any(|text| {
                    text.parse::<IpNet>().is_ok_and(|other| {
                        net.contains(&other.network()) || other.contains(&net.network())
                    })
                });
            if clash {
                return Err(CommandError::Taken {
                    field: field.to_owned(),
                    value: text.clone(),
                    owner: other_name.clone(),
                });
            }
        }
    }
    if let Some(overlay) = &spec.overlay {
        let same = |other: &pb::NetworkSpec| {
            other
                .overlay
                .as_ref()
                .is_some_and(|other| other.vni == overlay.vni)
        };
        if let Some((owner, _)) = others.iter().find(|(_, other)| same(other)) {
            return Err(CommandError::Taken {
                field: "network.spec.overlay.vni".to_owned(),
                value: overlay.vni.to_string(),
                owner: owner.clone(),
            });
        }
    }
    if has_host
        && spec.ipv4_gateway.is_empty()
        && let Some(subnet) = model::ipv4_subnet(spec)
    {
        spec.ipv4_gateway = Ipv4Addr::from(u32::from(subnet.network()) + 1).to_string();
    }
    spec.dhcp = Some(spec.dhcp.unwrap_or(has_host));
    spec.dns = Some(spec.dns.unwrap_or(has_host));
    if spec.dns_domain.is_empty() {
        spec.dns_domain = format!("{}.internal", name.id);
    }
    Ok(())
}

fn free_subnet(others: &[(String, pb::NetworkSpec)]) -> Result<Ipv4Net, CommandError> {
    let (first, count) = AUTOMATIC;
    let taken: Vec<Ipv4Net> = others
        .iter()
        .filter_map(|(_, spec)| model::ipv4_subnet(spec))
        .collect();
    let candidates = (0..count).filter_map(|index| {
        let network = Ipv4Addr::from(u32::from(first) + (index << 8));
        Ipv4Net::new(network, 24).ok()
    });
    let overlaps = |a: &Ipv4Net, b: &Ipv4Net| a.contains(&b.network()) || b.contains(&a.network());
    candidates
        .into_iter()
        .find(|candidate| !taken.iter().any(|other| overlaps(candidate, other)))
        .ok_or(CommandError::NoSubnet)
}
