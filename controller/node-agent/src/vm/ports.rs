//! What a VM's NICs are in the networks that they are in: which bridge a tap joins, and which NICs are
//! ports of a network's switch, whose daemon is not the VM's.

use std::path::Path;

use lease::Restart;

use super::{
    Env,
    daemon::{mac, socket},
    start::StartError,
};
use crate::{
    network::{NetworkError, Place, PortPlan},
    record::{Record, State},
    spec::{Nic, Spec},
};

/// The spec with what its NICs' networks say of them.
pub(super) async fn joined(env: &Env, spec: &Spec) -> Result<Spec, StartError> {
    let mut spec = spec.clone();
    for nic in &mut spec.nics {
        let Some(network) = &nic.network else {
            continue;
        };
        let place = env.networks.place(network, &spec.id, &nic.name).await;
        let place = place.map_err(|source| StartError::Network {
            nic: nic.name.clone(),
            source: Box::new(source),
        })?;
        let has_vlans = nic.vlan != 0 || !nic.trunk_vlans.is_empty();
        if has_vlans && !place.vlan_aware {
            let source = NetworkError::NoVlans {
                id: network.clone(),
                nic: nic.name.clone(),
            };
            return Err(StartError::Network {
                nic: nic.name.clone(),
                source: Box::new(source),
            });
        }
        join(nic, place);
    }
    Ok(spec)
}

/// As [`joined`], by what is known without waiting; what is not known is left out.
pub(super) fn joined_as_known(env: &Env, spec: &Spec) -> Spec {
    let mut spec = spec.clone();
    for nic in &mut spec.nics {
        let network = nic.network.as_deref();
        let place = network.and_then(|id| env.networks.known_place(id, &spec.id, &nic.name));
        if let Some(place) = place {
            join(nic, place);
        }
    }
    spec
}

/// Makes those NICs ports whose networks have switches.
pub(super) async fn attach(env: &Env, spec: &Spec, dir: &Path) -> Result<(), StartError> {
    for (network, nic) in switched(spec) {
        let attached = env
            .networks
            .attach(network, plan(env, spec, nic, dir))
            .await;
        attached.map_err(|source| StartError::Network {
            nic: nic.name.clone(),
            source: Box::new(source),
        })?;
    }
    Ok(())
}

/// Says what ports a VM has that an earlier agent left running.
pub(super) fn expect(env: &Env, record: &Record) {
    let (State::Running(assets) | State::Stopping(assets)) = &record.state else {
        return;
    };
    if assets.boot_id != env.boot_id {
        return;
    }
    let spec = joined_as_known(env, &record.spec);
    for (network, nic) in switched(&spec) {
        let plan = plan(env, &spec, nic, &env.vm_dir(&spec.id));
        env.networks.expect(network, plan);
    }
}

fn switched(spec: &Spec) -> impl Iterator<Item = (&str, &Nic)> {
    let nics = spec.nics.iter().filter(|nic| nic.switched);
    nics.filter_map(|nic| Some((nic.network.as_deref()?, nic)))
}

fn join(nic: &mut Nic, place: Place) {
    nic.switched = place.bridge.is_none();
    nic.bridge = place.bridge;
    nic.mtu = match nic.mtu {
        0 => place.mtu,
        mtu => mtu,
    };
}

fn plan(env: &Env, spec: &Spec, nic: &Nic, dir: &Path) -> PortPlan {
    PortPlan {
        vm: spec.id.clone(),
        nic: nic.name.clone(),
        socket: socket(dir, &nic.name),
        mac: mac(spec, nic),
        queue_pairs: nic.queue_pairs,
        mtu: nic.mtu,
        track_flows: nic.track_flows,
        vlan: nic.vlan,
        trunk_vlans: nic.trunk_vlans.clone(),
        tuning: nic.tuning,
        leases: (spec.restart == Restart::Anywhere).then(|| env.leases.clone()),
    }
}
