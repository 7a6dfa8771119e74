//! What NICs in networks get for themselves: MACs, addresses and ports of the host. Each is claimed
//! by a key in the transaction that stores the VM, so two VMs never get the same, and given back in
//! the transaction that forgets it.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use api::controller as pb;
use api::names::Name;
use ipnet::Ipv6Net;

use super::{CommandError, get_network};
use crate::model::{self, NetworkRecord, claim, key, short};
use crate::plan::Stored;
use crate::store::{Range, SharedStore, Transaction};

/// Adds to `transaction` that `spec`'s NICs have what they name and what they leave to us, and fills
/// the latter in. Devices must have their names. `uid` is the VM's.
pub(super) async fn claim(
    store: &SharedStore,
    vm: &Name,
    uid: &str,
    spec: &mut pb::VmSpec,
    mut transaction: Transaction,
) -> Result<Transaction, CommandError> {
    let mut taken = BTreeSet::new();
    for (index, nic) in spec.nics.iter_mut().enumerate() {
        let at = format!("vm.spec.nics[{index}]");
        // Free when it was chosen: if somebody took it since, the transaction fails and is tried
        // again with another one.
        let mut chosen = BTreeSet::new();
        if !nic.network.is_empty() {
            let (name, network) = network_of(store, vm, &at, &nic.network).await?;
            transaction = transaction.if_unchanged(key(&name), network.revision);
            choose_mac(store, uid, nic, &taken, &mut chosen).await?;
            let spec = network.record.network.spec.unwrap_or_default();
            choose_ipv4(store, &at, &name, &spec, nic, &taken, &mut chosen).await?;
            choose_ipv6(&at, &spec, nic)?;
            if !nic.port_forwards.is_empty() && spec.kind() != pb::NetworkKind::Nat {
                return Err(CommandError::NoForwards {
                    field: format!("{at}.port_forwards"),
                    network: name.id,
                });
            }
            let has_vlans = nic.vlan != 0 || !nic.trunk_vlans.is_empty();
            if has_vlans && !spec.vlan_aware {
                let named = if nic.vlan == 0 { "trunk_vlans" } else { "vlan" };
                return Err(CommandError::NoVlans {
                    field: format!("{at}.{named}"),
                    network: name.id,
                });
            }
            transaction = require_groups(store, vm, &at, nic, transaction).await?;
        }
        for wanted in claim::all_of(nic) {
            if !chosen.contains(&wanted) {
                require_free(store, &at, nic, &wanted, &taken).await?;
            }
            taken.insert(wanted.clone());
            let owner = format!("{}, NIC {}", short(vm), nic.name);
            transaction = transaction
                .if_absent(wanted.clone())
                .put(wanted, owner.into_bytes());
        }
    }
    Ok(transaction)
}

/// A transaction that gives a NIC what it has after a change and takes what it had before. Its
/// addresses stay.
pub(super) async fn reclaim(
    store: &SharedStore,
    vm: &Name,
    before: &pb::Nic,
    after: &pb::Nic,
) -> Result<Transaction, CommandError> {
    let at = "nic.spec";
    let mut transaction = Transaction::new();
    if after.port_forwards != before.port_forwards && !after.port_forwards.is_empty() {
        let (name, network) = network_of(store, vm, at, &after.network).await?;
        let spec = network.record.network.spec.unwrap_or_default();
        if spec.kind() != pb::NetworkKind::Nat {
            return Err(CommandError::NoForwards {
                field: format!("{at}.port_forwards"),
                network: name.id,
            });
        }
    }
    if after.security_groups != before.security_groups {
        transaction = require_groups(store, vm, at, after, transaction).await?;
    }
    let had: BTreeSet<String> = claim::all_of(before).into_iter().collect();
    let has: BTreeSet<String> = claim::all_of(after).into_iter().collect();
    for key in had.difference(&has) {
        transaction = transaction.delete(key);
    }
    for wanted in has.difference(&had) {
        require_free(store, at, after, wanted, &BTreeSet::new()).await?;
        let owner = format!("{}, NIC {}", short(vm), after.name);
        transaction = transaction
            .if_absent(wanted)
            .put(wanted, owner.into_bytes());
    }
    Ok(transaction)
}

async fn network_of(
    store: &SharedStore,
    vm: &Name,
    at: &str,
    network: &str,
) -> Result<(Name, Stored<NetworkRecord>), CommandError> {
    let field = format!("{at}.network");
    let name = Name::parse_network(network)
        .ok()
        .filter(|name| name.project == vm.project)
        .ok_or_else(|| CommandError::ForeignNetwork {
            field: field.clone(),
            network: network.to_owned(),
        })?;
    match get_network(store, &name).await {
        Ok(stored) if stored.record.network.deleting => {
            Err(CommandError::Deleting { what: short(&name) })
        }
        Ok(stored) => Ok((name, stored)),
        Err(CommandError::NotFound { .. }) => Err(CommandError::NoSuchNetwork {
            field,
            network: name.id,
        }),
        Err(error) => Err(error),
    }
}

/// Made of the uid, so that it is another one for the next VM of the same name.
async fn choose_mac(
    store: &SharedStore,
    uid: &str,
    nic: &mut pb::Nic,
    taken: &BTreeSet<String>,
    chosen: &mut BTreeSet<String>,
) -> Result<(), CommandError> {
    if !nic.mac.is_empty() {
        nic.mac = nic.mac.to_ascii_lowercase();
        return Ok(());
    }
    for attempt in 0..u32::MAX {
        let seed = format!("{uid}/{}/{attempt}", nic.name);
        let hash = model::fnv1a(seed.as_bytes()).to_be_bytes();
        let mac = format!(
            "52:54:{:02x}:{:02x}:{:02x}:{:02x}",
            hash[0], hash[1], hash[2], hash[3]
        );
        let wanted = claim::mac(&mac);
        if !taken.contains(&wanted) && store.get(&wanted).await?.is_none() {
            nic.mac = mac;
            chosen.insert(wanted);
            break;
        }
    }
    Ok(())
}

async fn choose_ipv4(
    store: &SharedStore,
    at: &str,
    network: &Name,
    spec: &pb::NetworkSpec,
    nic: &mut pb::Nic,
    taken: &BTreeSet<String>,
    chosen: &mut BTreeSet<String>,
) -> Result<(), CommandError> {
    let Some(subnet) = model::ipv4_subnet(spec) else {
        return Ok(());
    };
    let gateway: Option<Ipv4Addr> = spec.ipv4_gateway.parse().ok();
    if let Ok(address) = nic.ipv4_address.parse::<Ipv4Addr>() {
        let is_host = subnet.contains(&address)
            && address != subnet.network()
            && address != subnet.broadcast();
        if !is_host || Some(address) == gateway {
            return Err(CommandError::AddressOutside {
                field: format!("{at}.ipv4_address"),
                address: address.to_string(),
                subnet: spec.ipv4_cidr.clone(),
                gateway: spec.ipv4_gateway.clone(),
            });
        }
        return Ok(());
    }
    let prefix = claim::ipv4_prefix(network);
    let listed = store.list(Range::all(prefix)).await?.items;
    let used: BTreeSet<u32> = listed
        .iter()
        .map(|item| item.key.as_str())
        .chain(taken.iter().map(String::as_str))
        .filter(|key| key.starts_with(&claim::ipv4_prefix(network)))
        .filter_map(claim::ipv4_of)
        .chain(gateway)
        .map(u32::from)
        .collect();
    let (first, last) = model::ipv4_pool(spec).expect("there is a subnet");
    let Some(free) = (first..=last).find(|address| !used.contains(address)) else {
        return Err(CommandError::PoolExhausted {
            field: format!("{at}.network"),
            network: network.id.clone(),
            first: Ipv4Addr::from(first).to_string(),
            last: Ipv4Addr::from(last).to_string(),
        });
    };
    let address = Ipv4Addr::from(free);
    nic.ipv4_address = address.to_string();
    chosen.insert(claim::ipv4(network, address));
    Ok(())
}

fn choose_ipv6(at: &str, spec: &pb::NetworkSpec, nic: &mut pb::Nic) -> Result<(), CommandError> {
    let Ok(prefix) = spec.ipv6_prefix.parse::<Ipv6Net>() else {
        return Ok(());
    };
    let Ok(address) = nic.ipv6_address.parse::<Ipv6Addr>() else {
        let made = model::eui64(prefix, &nic.mac);
        nic.ipv6_address = made.map(|address| address.to_string()).unwrap_or_default();
        return Ok(());
    };
    let gateway = Ipv6Addr::from(u128::from(prefix.network()) | 1);
    if !prefix.contains(&address) || address == gateway || address == prefix.network() {
        return Err(CommandError::AddressOutside {
            field: format!("{at}.ipv6_address"),
            address: address.to_string(),
            subnet: spec.ipv6_prefix.clone(),
            gateway: gateway.to_string(),
        });
    }
    // As everybody writes it.
    nic.ipv6_address = address.to_string();
    Ok(())
}

/// Whoever has it is named.
async fn require_free(
    store: &SharedStore,
    at: &str,
    nic: &pb::Nic,
    wanted: &str,
    taken: &BTreeSet<String>,
) -> Result<(), CommandError> {
    let owner = match store.get(wanted).await? {
        Some(item) => String::from_utf8_lossy(&item.value).into_owned(),
        None if taken.contains(wanted) => "another NIC of this VM".to_owned(),
        None => return Ok(()),
    };
    let what = |field: &str, value: &str| CommandError::Taken {
        field: format!("{at}.{field}"),
        value: value.to_owned(),
        owner: owner.clone(),
    };
    let kind = wanted.split('/').nth(1).unwrap_or_default();
    Err(match kind {
        "mac" => what("mac", &nic.mac),
        "ipv4" => what("ipv4_address", &nic.ipv4_address),
        "ipv6" => what("ipv6_address", &nic.ipv6_address),
        _ => what("port_forwards", &wanted.replace("claims/port/", "port ")),
    })
}

/// Each group is there and stays there.
async fn require_groups(
    store: &SharedStore,
    vm: &Name,
    at: &str,
    nic: &pb::Nic,
    mut transaction: Transaction,
) -> Result<Transaction, CommandError> {
    for (index, group) in nic.security_groups.iter().enumerate() {
        let field = format!("{at}.security_groups[{index}]");
        let name = Name::parse_security_group(group).ok();
        let name = name.filter(|name| name.project == vm.project);
        let item = match &name {
            Some(name) => store.get(&key(name)).await?,
            None => None,
        };
        let (Some(name), Some(item)) = (name, item) else {
            return Err(CommandError::NoSuchGroup {
                field,
                group: group.clone(),
            });
        };
        transaction = transaction.if_unchanged(key(&name), item.revision);
    }
    Ok(transaction)
}
