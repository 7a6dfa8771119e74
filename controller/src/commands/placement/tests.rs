//! Two controllers on one store: whatever they do at the same time, no host is promised more than it has.

use std::sync::Arc;

use api::node::HostStatus;

use super::*;
use crate::commands::{RequestKey, create_vm};
use crate::model::{HostRecord, prefix};
use crate::store::Range;
use crate::store::embedded::EmbeddedStore;

const GIB: u64 = 1 << 30;

/// SplitMix64: the same choices for the same seed.
struct Choices(u64);

impl Choices {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

async fn add_host(store: &SharedStore, id: &str, cpus: u32, memory_bytes: u64) {
    let record = HostRecord {
        name: host_name(id),
        // Nobody listens there; the hosts' agents are not what this is about.
        address: format!("unix:/nonexistent/{id}.sock"),
        spec: pb::HostSpec {
            cpu_overcommit: 1.5,
            memory_overcommit: 1.0,
            ..Default::default()
        },
        inventory: Some(HostStatus {
            host_id: id.into(),
            cpus,
            memory_bytes,
            ..Default::default()
        }),
        generation: 1,
        ..Default::default()
    };
    let put = Transaction::new().put(record.name.clone(), record.encode_to_vec());
    store.commit(put).await.unwrap();
}

/// Deletes a VM as the reconciler does once its host has nothing of it.
async fn forget(store: &SharedStore, name: &Name) {
    loop {
        let Ok(stored) = super::super::get_vm(store, name).await else {
            return;
        };
        let key = model::key(name);
        let node_id = model::node_id_key(name, &stored.record.node_id);
        let transaction = Transaction::new()
            .if_unchanged(key.clone(), stored.revision)
            .delete(key)
            .delete(node_id);
        let transaction = release(store, &stored.record, transaction).await.unwrap();
        match store.commit(transaction).await {
            Err(StoreError::Conflict { .. }) => {}
            done => {
                done.unwrap();
                return;
            }
        }
    }
}

async fn work(store: SharedStore, hosts: Hosts, worker: u64, seed: u64) {
    let mut choices = Choices(seed ^ (worker << 32));
    for step in 0..24 {
        let name = Name::vm("default", &format!("vm-{worker}-{step}"));
        let spec = pb::VmSpec {
            vcpus: 1 + choices.below(3) as u32,
            memory_bytes: GIB * (1 + choices.below(3)),
            ..Default::default()
        };
        let request = RequestKey::new("default", "", "Test", &pb::GetVmRequest::default());
        match create_vm(&store, &hosts, &name, &spec, &request, false).await {
            Ok(_) | Err(CommandError::NoHost { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        if choices.below(3) == 0 {
            let earlier = choices.below(step + 1);
            let name = Name::vm("default", &format!("vm-{worker}-{earlier}"));
            forget(&store, &name).await;
        }
    }
}

/// No host has more than it may, and what was promised is the sum of what is there.
async fn check(store: &SharedStore, seed: u64) -> u64 {
    let vms = store.list(Range::all(prefix::VMS)).await.unwrap().items;
    let vms: Vec<VmRecord> = vms
        .iter()
        .map(|item| decode(&item.key, &item.value).unwrap())
        .collect();
    let hosts = store.list(Range::all(model::HOSTS)).await.unwrap().items;
    for item in &hosts {
        let record: HostRecord = decode(&item.key, &item.value).unwrap();
        let there = vms.iter().filter(|vm| vm.host == record.id());
        let sum = there.fold(ReservationRecord::default(), |sum, vm| {
            sum.plus(&vm.promised.as_ref().unwrap().into())
        });
        let promised = reservation(store, record.id()).await.unwrap().record;
        assert_eq!(promised, sum, "seed {seed}, {}", record.name);
        let has = record.inventory.unwrap();
        let limit = (f64::from(has.cpus) * record.spec.cpu_overcommit) as u64;
        assert!(promised.vcpus <= limit, "seed {seed}: {promised:?}");
        assert!(promised.memory_bytes <= has.memory_bytes, "seed {seed}");
    }
    vms.iter().filter(|vm| !vm.host.is_empty()).count() as u64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_controllers_never_promise_more_than_there_is() {
    for seed in 1..=6 {
        let store: SharedStore = Arc::new(EmbeddedStore::in_memory());
        for (id, cpus, memory) in [("a", 4, 6 * GIB), ("b", 8, 10 * GIB), ("c", 2, 3 * GIB)] {
            add_host(&store, id, cpus, memory).await;
        }
        let mut workers = tokio::task::JoinSet::new();
        for controller in 0..2 {
            let hosts = Hosts::new();
            tokio::spawn(hosts.clone().run(store.clone()));
            hosts.pretend_connected(&["a", "b", "c"]).await;
            for worker in 0..3 {
                let (store, hosts) = (store.clone(), hosts.clone());
                workers.spawn(work(store, hosts, controller * 3 + worker, seed));
            }
        }
        while let Some(done) = workers.join_next().await {
            done.unwrap();
        }
        assert!(
            check(&store, seed).await > 0,
            "seed {seed}: something was placed"
        );
    }
}

#[tokio::test]
async fn what_is_taken_from_a_host_is_given_back_and_marked_there() {
    let store: SharedStore = Arc::new(EmbeddedStore::in_memory());
    add_host(&store, "a", 4, 8 * GIB).await;
    let spec = pb::VmSpec {
        vcpus: 2,
        memory_bytes: GIB,
        ..Default::default()
    };
    let name = Name::vm("default", "web");
    let request = vm_request(&store, &name, &spec).await.unwrap().unwrap();
    let place = place_at(&store, "a", &request).await.unwrap();
    let mut record = VmRecord {
        node_id: "web".into(),
        ..Default::default()
    };
    place.note(&mut record);
    let promise = place.promise(Transaction::new());
    let done = store.commit(promise).await;
    place.settle(&store, &Hosts::new(), done).await.unwrap();
    assert_eq!(reservation(&store, "a").await.unwrap().record.vcpus, 2);
    assert_eq!((record.host.as_str(), record.placements), ("a", 1));
    let transaction = unplace(&store, &mut record, Transaction::new())
        .await
        .unwrap();
    store.commit(transaction).await.unwrap();
    let left = reservation(&store, "a").await.unwrap().record;
    assert_eq!(left, ReservationRecord::default());
    assert!(record.host.is_empty());
    let key = model::eviction_key("a", "web");
    assert!(store.get(&key).await.unwrap().is_some());
}

async fn placed(store: &SharedStore, hosts: &Hosts, id: &str) {
    let spec = pb::VmSpec {
        vcpus: 1,
        memory_bytes: GIB,
        ..Default::default()
    };
    let name = Name::vm("default", id);
    let request = RequestKey::new("default", "", "Test", &pb::GetVmRequest::default());
    let created = create_vm(store, hosts, &name, &spec, &request, false).await;
    created.unwrap();
    let stored = super::super::get_vm(store, &name).await.unwrap();
    assert_eq!(stored.record.host, "a");
}

#[tokio::test]
async fn host_whose_reservation_was_removed_is_promised_anew() {
    let store: SharedStore = Arc::new(EmbeddedStore::in_memory());
    add_host(&store, "a", 4, 8 * GIB).await;
    let hosts = Hosts::new();
    tokio::spawn(hosts.clone().run(store.clone()));
    hosts.pretend_connected(&["a"]).await;
    placed(&store, &hosts, "one").await;
    let key = model::reservation_key("a");
    let removed = Transaction::new().delete(key.clone());
    store.commit(removed).await.unwrap();
    // Whether the removal was heard of or not.
    placed(&store, &hosts, "two").await;
    let removed = Transaction::new().delete(key);
    store.commit(removed).await.unwrap();
    let heard = async {
        while hosts.reserved("a") != ReservationRecord::default() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    let patience = std::time::Duration::from_secs(30);
    tokio::time::timeout(patience, heard).await.unwrap();
    placed(&store, &hosts, "three").await;
    assert_eq!(reservation(&store, "a").await.unwrap().record.vms, 1);
}
