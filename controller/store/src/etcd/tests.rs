//! With a real cluster; each test has one of its own.

use etcd::{Cluster, Options, Tls};
use etcd_client::Client;
use nix::sys::signal::Signal;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};

use super::*;
use crate::conformance;

const PATIENCE: Duration = Duration::from_secs(60);

fn options(cluster: &Cluster, prefix: &str) -> EtcdOptions {
    EtcdOptions {
        endpoints: cluster.endpoints(),
        prefix: prefix.to_owned(),
        ..EtcdOptions::default()
    }
}

fn put(key: &str, value: &[u8]) -> Transaction {
    Transaction::new().put(key, value.to_vec())
}

/// Commits until it works: the cluster may be without a leader for a moment. What is in doubt is done
/// again, so `transaction` must allow that.
async fn commit(store: &EtcdStore, transaction: Transaction) -> u64 {
    let attempts = async {
        loop {
            match store.commit(transaction.clone()).await {
                Ok(revision) => return revision,
                Err(StoreError::Unavailable(_) | StoreError::InDoubt(_)) => {}
                Err(error) => panic!("{}", error.with_causes()),
            }
        }
    };
    tokio::time::timeout(PATIENCE, attempts)
        .await
        .expect("a majority in time")
}

async fn next(watch: &mut Watch) -> Result<crate::Change, StoreError> {
    let change = tokio::time::timeout(PATIENCE, watch.recv()).await;
    change
        .expect("a change in time")
        .expect("the watch goes on")
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_store_conforms() {
    let Some(cluster) = Cluster::start(1) else {
        return;
    };
    let mut count = 0;
    conformance::run_all(async || {
        count += 1;
        let options = options(&cluster, &format!("conformance-{count}/"));
        Arc::new(EtcdStore::connect(&options).await.unwrap())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stores_below_different_prefixes_do_not_meet() {
    let Some(cluster) = Cluster::start(1) else {
        return;
    };
    let a = EtcdStore::connect(&options(&cluster, "a/")).await.unwrap();
    let b = EtcdStore::connect(&options(&cluster, "b/")).await.unwrap();
    let revision = a.commit(put("k", b"a")).await.unwrap();
    b.commit(put("k", b"b").if_absent("k")).await.unwrap();
    let all = a.list(Range::all("")).await.unwrap();
    assert_eq!(all.items.len(), 1);
    assert_eq!(all.items[0].value, b"a");
    let mut watch = b.watch("", revision).await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap().value.unwrap(), b"b");
}

#[tokio::test(flavor = "multi_thread")]
async fn long_listings_are_of_one_revision() {
    let Some(cluster) = Cluster::start(1) else {
        return;
    };
    let store = EtcdStore::connect(&options(&cluster, "p/")).await.unwrap();
    let count = PAGE * 2 + 7;
    for first in (0..count).step_by(100) {
        let mut transaction = Transaction::new();
        for n in first..count.min(first + 100) {
            transaction = transaction.put(format!("k/{n:05}"), vec![1]);
        }
        store.commit(transaction).await.unwrap();
    }
    let forwards = store.list(Range::all("k/")).await.unwrap();
    assert_eq!(forwards.items.len(), count);
    assert!(forwards.items.is_sorted_by(|a, b| a.key < b.key));
    let backwards = Range {
        reverse: true,
        limit: PAGE + 1,
        ..Range::all("k/")
    };
    let backwards = store.list(backwards).await.unwrap();
    assert_eq!((backwards.items.len(), backwards.more), (PAGE + 1, true));
    assert_eq!(backwards.items[0].key, format!("k/{:05}", count - 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn forgotten_history_is_told() {
    let Some(cluster) = Cluster::start(1) else {
        return;
    };
    let store = EtcdStore::connect(&options(&cluster, "p/")).await.unwrap();
    let first = store.commit(put("k", b"1")).await.unwrap();
    let live = store.watch("k", first).await.unwrap();
    store.commit(put("k", b"2")).await.unwrap();
    let third = store.commit(put("k", b"3")).await.unwrap();
    let mut client = Client::connect(cluster.endpoints(), None).await.unwrap();
    client.compact(third as i64, None).await.unwrap();
    let error = store.watch("k", first).await.unwrap_err();
    let StoreError::Compacted { after, oldest } = error else {
        panic!("{error}")
    };
    assert_eq!((after, oldest), (first, third));
    // One that was begun before has what it needs.
    let mut live = live;
    assert_eq!(next(&mut live).await.unwrap().value.unwrap(), b"2");
    assert_eq!(next(&mut live).await.unwrap().value.unwrap(), b"3");
    store.commit(put("k", b"4")).await.unwrap();
    assert_eq!(next(&mut live).await.unwrap().value.unwrap(), b"4");
    let mut late = store.watch("k", oldest).await.unwrap();
    assert_eq!(next(&mut late).await.unwrap().value.unwrap(), b"4");
    let error = store.watch("k", third + 1000).await.unwrap_err();
    assert!(
        matches!(error, StoreError::Compacted { .. }),
        "of another store: {error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn death_of_a_member_costs_no_change() {
    let Some(mut cluster) = Cluster::start(3) else {
        return;
    };
    let store = EtcdStore::connect(&options(&cluster, "p/")).await.unwrap();
    let revision = commit(&store, put("k/0", b"x")).await;
    let mut watch = store.watch("k/", revision).await.unwrap();
    let lease = store.grant(Duration::from_secs(60)).await.unwrap();
    // The store asks the first one first.
    for (dead, key) in [(0, "k/1"), (1, "k/2")] {
        cluster.kill(dead);
        commit(&store, put(key, b"x")).await;
        assert_eq!(next(&mut watch).await.unwrap().key, key);
        assert_eq!(store.get(key).await.unwrap().unwrap().value, b"x");
        store.keep_alive(lease).await.unwrap();
        cluster.restart(dead);
        assert!(cluster.wait_until_healthy(), "the member comes back");
    }
    // One that hangs is left for another.
    cluster.signal(2, Signal::SIGSTOP);
    commit(&store, put("k/3", b"x")).await;
    assert_eq!(next(&mut watch).await.unwrap().key, "k/3");
    cluster.signal(2, Signal::SIGCONT);
    // Without a majority nothing is changed, and nothing hangs.
    cluster.kill(0);
    cluster.kill(1);
    let error = store.commit(put("k/4", b"x")).await.unwrap_err();
    assert!(
        matches!(error, StoreError::Unavailable(_) | StoreError::InDoubt(_)),
        "{error}"
    );
    cluster.restart(0);
    cluster.restart(1);
    commit(&store, put("k/5", b"x")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_cluster_refuses_changes_and_answers_reads() {
    let Some(cluster) = Cluster::start_with(Options {
        quota_bytes: 4 << 20,
        ..Options::default()
    }) else {
        return;
    };
    let store = EtcdStore::connect(&options(&cluster, "p/")).await.unwrap();
    let big = vec![7; 256 << 10];
    let mut filled = Ok(0);
    for n in 0..64 {
        filled = store.commit(put(&format!("k/{n}"), &big)).await;
        if filled.is_err() {
            break;
        }
    }
    let error = filled.unwrap_err();
    assert!(
        matches!(error, StoreError::Full(_)),
        "{}",
        error.with_causes()
    );
    assert_eq!(store.get("k/0").await.unwrap().unwrap().value, big);
    let gone = Transaction::new().delete("k/0");
    store
        .commit(gone)
        .await
        .expect("removing is what makes space");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let addresses = etcd::free_addresses(1);
    let authority_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = params.self_signed(&authority_key).unwrap();
    let issuer = Issuer::new(params, authority_key);
    std::fs::write(path("ca.pem"), authority.pem()).unwrap();
    for (name, sans) in [
        ("member", vec![SanType::IpAddress(addresses[0].into())]),
        (
            "client",
            vec![SanType::DnsName("controller".try_into().unwrap())],
        ),
    ] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.subject_alt_names = sans;
        let signed = params.signed_by(&key, &issuer).unwrap();
        std::fs::write(path(&format!("{name}.pem")), signed.pem()).unwrap();
        std::fs::write(path(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }
    let Some(cluster) = Cluster::start_with(Options {
        tls: Some(Tls {
            certificate: path("member.pem"),
            key: path("member.key"),
            client_ca: path("ca.pem"),
        }),
        addresses,
        ..Options::default()
    }) else {
        return;
    };
    let with = EtcdOptions {
        tls: TlsFiles {
            ca: Some(path("ca.pem")),
            identity: Some((path("client.pem"), path("client.key"))),
        },
        ..options(&cluster, "p/")
    };
    let store = EtcdStore::connect(&with).await;
    let store = store.unwrap_or_else(|error| panic!("{}", error.with_causes()));
    commit(&store, put("k", b"x")).await;
    let without = EtcdOptions {
        tls: TlsFiles {
            ca: with.tls.ca,
            identity: None,
        },
        ..options(&cluster, "p/")
    };
    let refused = EtcdStore::connect(&without).await;
    assert!(refused.is_err(), "a client must show a certificate");
}
