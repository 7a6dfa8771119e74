//! What every store must do. Each implementation's tests call [`run_all`] with a way to make an
//! empty store.

use std::sync::Arc;
use std::time::Duration;

use super::{Range, Store, StoreError, Transaction, Watch};

const PATIENCE: Duration = Duration::from_secs(30);
/// The shortest that etcd grants.
const LEASE: Duration = Duration::from_secs(2);

/// Runs every check, each on a store of its own.
pub(crate) async fn run_all<S: Store>(mut empty: impl AsyncFnMut() -> Arc<S>) {
    put_get_delete(&*empty().await).await;
    failed_comparison_changes_nothing(&*empty().await).await;
    lists_are_ordered_paged_and_bounded_by_prefix(&*empty().await).await;
    lists_backwards(&*empty().await).await;
    watch_resumes_after_a_revision(&*empty().await).await;
    watch_delivers_more_than_one_batch(empty().await).await;
    concurrent_increments_are_not_lost(empty().await).await;
    watch_after_what_is_yet_to_come_is_refused(&*empty().await).await;
    last_write_of_a_key_counts(&*empty().await).await;
    keys_go_with_their_lease(&*empty().await).await;
    put_without_a_lease_keeps_the_key(&*empty().await).await;
    lease_that_is_kept_alive_lasts(&*empty().await).await;
}

async fn put_get_delete(store: &dyn Store) {
    assert!(store.get("a").await.unwrap().is_none());
    let first = put(store, "a", "1").await;
    let second = put(store, "a", "2").await;
    assert!(second > first, "revisions rise");
    let item = store.get("a").await.unwrap().unwrap();
    assert_eq!((item.value.as_slice(), item.revision), (&b"2"[..], second));
    store
        .commit(Transaction::new().delete("a").delete("never-there"))
        .await
        .unwrap();
    assert!(store.get("a").await.unwrap().is_none());
}

async fn failed_comparison_changes_nothing(store: &dyn Store) {
    let revision = put(store, "a", "1").await;
    for transaction in [
        Transaction::new().if_absent("a"),
        Transaction::new().if_unchanged("a", revision + 1),
        Transaction::new().if_unchanged("b", revision),
        Transaction::new().if_absent("b").if_absent("a"),
    ] {
        let result = store
            .commit(transaction.put("b", b"x".to_vec()).delete("a"))
            .await;
        assert!(
            matches!(result, Err(StoreError::Conflict { .. })),
            "{result:?}"
        );
    }
    assert!(store.get("b").await.unwrap().is_none());
    assert_eq!(store.get("a").await.unwrap().unwrap().revision, revision);
    assert_eq!(*store.revision().borrow(), revision, "nothing happened");
    let held = Transaction::new()
        .if_unchanged("a", revision)
        .if_absent("b");
    store.commit(held.put("b", b"y".to_vec())).await.unwrap();
    assert!(store.get("b").await.unwrap().is_some());
}

async fn lists_are_ordered_paged_and_bounded_by_prefix(store: &dyn Store) {
    for key in ["vms/b", "vms/a", "vms/c", "vm", "vmsx", "volumes/a"] {
        put(store, key, key).await;
    }
    let all = store.list(Range::all("vms/")).await.unwrap();
    assert_eq!(keys(&all), ["vms/a", "vms/b", "vms/c"]);
    assert!(!all.more);
    assert_eq!(all.revision, *store.revision().borrow());
    let page = |after: Option<&str>| Range {
        prefix: "vms/".into(),
        after: after.map(str::to_owned),
        limit: 2,
        reverse: false,
    };
    let first = store.list(page(None)).await.unwrap();
    assert_eq!((keys(&first), first.more), (vec!["vms/a", "vms/b"], true));
    let last = store.list(page(Some("vms/b"))).await.unwrap();
    assert_eq!((keys(&last), last.more), (vec!["vms/c"], false));
    let gone = store.list(page(Some("vms/aa"))).await.unwrap();
    assert_eq!(
        keys(&gone),
        ["vms/b", "vms/c"],
        "the key to go on from may be gone"
    );
}

async fn lists_backwards(store: &dyn Store) {
    for key in ["op/1", "op/2", "op/3", "oq"] {
        put(store, key, key).await;
    }
    let newest = |after: Option<&str>| Range {
        prefix: "op/".into(),
        after: after.map(str::to_owned),
        limit: 2,
        reverse: true,
    };
    let first = store.list(newest(None)).await.unwrap();
    assert_eq!((keys(&first), first.more), (vec!["op/3", "op/2"], true));
    let last = store.list(newest(Some("op/2"))).await.unwrap();
    assert_eq!((keys(&last), last.more), (vec!["op/1"], false));
}

async fn watch_resumes_after_a_revision(store: &dyn Store) {
    put(store, "a/1", "old").await;
    let seen = put(store, "a/2", "old").await;
    let two = Transaction::new()
        .put("a/3", b"x".to_vec())
        .put("b/1", b"x".to_vec())
        .delete("a/1");
    let both = store.commit(two).await.unwrap();
    let mut watch = store.watch("a/", seen).await.unwrap();
    let put_change = next(&mut watch).await;
    assert_eq!(
        (put_change.key.as_str(), put_change.revision),
        ("a/3", both)
    );
    let deleted = next(&mut watch).await;
    assert_eq!((deleted.key.as_str(), deleted.value), ("a/1", None));
    put(store, "b/2", "other prefix").await;
    put(store, "a/4", "live").await;
    assert_eq!(
        next(&mut watch).await.key,
        "a/4",
        "what comes later arrives too"
    );
}

async fn watch_delivers_more_than_one_batch<S: Store>(store: Arc<S>) {
    const COUNT: usize = 500;
    let mut watch = store.watch("k/", 0).await.unwrap();
    for n in 0..COUNT {
        put(&*store, &format!("k/{n}"), "x").await;
        put(&*store, "noise", "x").await;
    }
    for n in 0..COUNT {
        assert_eq!(next(&mut watch).await.key, format!("k/{n}"));
    }
}

async fn concurrent_increments_are_not_lost<S: Store>(store: Arc<S>) {
    const TASKS: usize = 8;
    const EACH: usize = 10;
    put(&*store, "n", "0").await;
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                for _ in 0..EACH {
                    increment(&*store).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let value = store.get("n").await.unwrap().unwrap().value;
    assert_eq!(
        String::from_utf8(value).unwrap(),
        (TASKS * EACH).to_string()
    );
}

async fn increment(store: &dyn Store) {
    loop {
        let item = store.get("n").await.unwrap().unwrap();
        let count: usize = String::from_utf8(item.value).unwrap().parse().unwrap();
        let next = (count + 1).to_string().into_bytes();
        let transaction = Transaction::new()
            .if_unchanged("n", item.revision)
            .put("n", next);
        match store.commit(transaction).await {
            Ok(_) => return,
            Err(StoreError::Conflict { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

async fn last_write_of_a_key_counts(store: &dyn Store) {
    let twice = Transaction::new()
        .put("a", b"1".to_vec())
        .put("a", b"2".to_vec())
        .put("b", b"1".to_vec())
        .delete("b")
        .delete("c")
        .put("c", b"3".to_vec());
    store.commit(twice).await.unwrap();
    let all = store.list(Range::all("")).await.unwrap();
    assert_eq!(keys(&all), ["a", "c"]);
    assert_eq!(all.items[0].value, b"2");
}

async fn keys_go_with_their_lease(store: &dyn Store) {
    let lease = store.grant(LEASE).await.unwrap();
    let leased = Transaction::new()
        .put_leased("l/a", b"1".to_vec(), lease)
        .put_leased("l/b", b"1".to_vec(), lease)
        .put("l/c", b"1".to_vec());
    let revision = store.commit(leased).await.unwrap();
    let mut watch = store.watch("l/", revision).await.unwrap();
    let mut gone = [next(&mut watch).await, next(&mut watch).await];
    gone.sort_by(|a, b| a.key.cmp(&b.key));
    assert_eq!((gone[0].key.as_str(), &gone[0].value), ("l/a", &None));
    assert_eq!((gone[1].key.as_str(), &gone[1].value), ("l/b", &None));
    let left = store.list(Range::all("l/")).await.unwrap();
    assert_eq!(keys(&left), ["l/c"]);
    let error = store.keep_alive(lease).await.unwrap_err();
    assert!(matches!(error, StoreError::LeaseGone { .. }), "{error}");
    let late = Transaction::new().put_leased("l/d", vec![], lease);
    let error = store.commit(late).await.unwrap_err();
    assert!(matches!(error, StoreError::LeaseGone { .. }), "{error}");
    store.revoke(lease).await.unwrap();
}

async fn put_without_a_lease_keeps_the_key(store: &dyn Store) {
    let lease = store.grant(Duration::from_secs(600)).await.unwrap();
    let leased = Transaction::new()
        .put_leased("a", b"1".to_vec(), lease)
        .put_leased("b", b"1".to_vec(), lease);
    store.commit(leased).await.unwrap();
    put(store, "a", "2").await;
    store.revoke(lease).await.unwrap();
    let left = store.list(Range::all("")).await.unwrap();
    assert_eq!(keys(&left), ["a"]);
}

async fn lease_that_is_kept_alive_lasts(store: &dyn Store) {
    let lease = store.grant(LEASE).await.unwrap();
    let leased = Transaction::new().put_leased("a", b"1".to_vec(), lease);
    store.commit(leased).await.unwrap();
    let began = tokio::time::Instant::now();
    while began.elapsed() < LEASE * 2 {
        let lasts = store.keep_alive(lease).await.unwrap();
        assert!(lasts >= LEASE, "{lasts:?}");
        tokio::time::sleep(LEASE / 10).await;
    }
    assert!(store.get("a").await.unwrap().is_some());
}

async fn watch_after_what_is_yet_to_come_is_refused(store: &dyn Store) {
    let revision = put(store, "a", "1").await;
    let error = store.watch("a", revision + 1000).await.unwrap_err();
    assert!(matches!(error, StoreError::Compacted { .. }), "{error}");
}

async fn put(store: &dyn Store, key: &str, value: &str) -> u64 {
    store
        .commit(Transaction::new().put(key, value.as_bytes().to_vec()))
        .await
        .unwrap()
}

async fn next(watch: &mut Watch) -> super::Change {
    tokio::time::timeout(PATIENCE, watch.recv())
        .await
        .expect("in time")
        .unwrap()
        .unwrap()
}

fn keys(listing: &super::Listing) -> Vec<&str> {
    listing.items.iter().map(|item| item.key.as_str()).collect()
}
