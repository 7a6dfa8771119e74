use faultfs::{Effect, Fault, FaultFs, Op};

use super::super::conformance;
use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn embedded_store_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let mut count = 0;
    conformance::run_all(async || {
        count += 1;
        Arc::new(EmbeddedStore::open(&dir.path().join(format!("{count}.redb"))).unwrap())
    })
    .await;
}

#[tokio::test]
async fn everything_survives_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.redb");
    let revision = {
        let store = EmbeddedStore::open(&path).unwrap();
        store
            .commit(Transaction::new().put("a", b"1".to_vec()))
            .await
            .unwrap()
    };
    let store = EmbeddedStore::open(&path).unwrap();
    assert_eq!(*store.revision().borrow(), revision);
    assert_eq!(store.get("a").await.unwrap().unwrap().value, b"1");
    let mut watch = store.watch("", 0).await.unwrap();
    assert_eq!(watch.recv().await.unwrap().unwrap().key, "a");
}

#[tokio::test]
async fn log_is_bounded_and_late_watchers_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open_with_log(&dir.path().join("s.redb"), 3).unwrap();
    for n in 0..5u8 {
        store
            .commit(Transaction::new().put("k", vec![n]))
            .await
            .unwrap();
    }
    let error = store.watch("", 1).await.unwrap_err();
    assert!(
        matches!(
            error,
            StoreError::Compacted {
                after: 1,
                oldest: 2
            }
        ),
        "{error}"
    );
    let mut watch = store.watch("", 2).await.unwrap();
    for n in 2..5u8 {
        assert_eq!(watch.recv().await.unwrap().unwrap().value, Some(vec![n]));
    }
}

#[tokio::test]
async fn second_opener_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.redb");
    let _first = EmbeddedStore::open(&path).unwrap();
    assert!(EmbeddedStore::open(&path).is_err());
}

#[tokio::test]
async fn store_in_memory_conforms() {
    conformance::run_all(async || Arc::new(EmbeddedStore::in_memory())).await;
}

#[tokio::test]
async fn leases_have_their_time_again_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.redb");
    let store = EmbeddedStore::open(&path).unwrap();
    let lease = store.grant(Duration::from_secs(1)).await.unwrap();
    let leased = Transaction::new().put_leased("a", vec![1], lease);
    store.commit(leased).await.unwrap();
    drop(store);
    let store = EmbeddedStore::open(&path).unwrap();
    store.keep_alive(lease).await.unwrap();
    let revision = *store.revision().borrow();
    let mut watch = store.watch("a", revision).await.unwrap();
    let change = tokio::time::timeout(Duration::from_secs(20), watch.recv()).await;
    assert_eq!(
        change.unwrap().unwrap().unwrap().value,
        None,
        "it ends at last"
    );
}

fn mounted() -> Option<FaultFs> {
    match FaultFs::mount() {
        Ok(fs) => Some(fs),
        Err(error) => {
            eprintln!("skipped: no FUSE here: {error}");
            None
        }
    }
}

fn big(n: usize) -> Transaction {
    Transaction::new().put(format!("big/{n:04}"), vec![7; 256 << 10])
}

#[tokio::test]
async fn full_disk_refuses_changes_and_nothing_else() {
    let Some(fs) = mounted() else { return };
    let store = EmbeddedStore::open(&fs.path("s.redb")).unwrap();
    let full = fs.inject(Fault::new(Op::Allocate, Effect::Fail(nix::libc::ENOSPC)));
    let mut kept = 0;
    let error = loop {
        match store.commit(big(kept)).await {
            Ok(_) => kept += 1,
            Err(error) => break error,
        }
        assert!(kept < 1000, "the file grows without space");
    };
    assert!(
        matches!(error, StoreError::Full(_)),
        "{}",
        error.with_causes()
    );
    let found = store.list(Range::all("big/")).await.unwrap();
    assert_eq!(found.items.len(), kept, "what was acknowledged is read");
    fs.lift(full);
    store.commit(big(kept)).await.unwrap();
    let found = store.list(Range::all("big/")).await.unwrap();
    assert_eq!(found.items.len(), kept + 1);
    drop(store);
    let store = EmbeddedStore::open(&fs.path("s.redb")).unwrap();
    let found = store.list(Range::all("big/")).await.unwrap();
    assert_eq!(found.items.len(), kept + 1, "and after a restart");
}

#[tokio::test]
async fn failed_sync_is_answered_by_what_is_there_afterwards() {
    let Some(fs) = mounted() else { return };
    let store = EmbeddedStore::open(&fs.path("s.redb")).unwrap();
    for n in 0..4 {
        fs.inject(Fault::new(Op::Sync, Effect::Fail(nix::libc::EIO)).times(1));
        let done = store.commit(big(n)).await;
        let key = format!("big/{n:04}");
        let found = store.get(&key).await.unwrap();
        match done {
            Ok(revision) => assert_eq!(found.unwrap().revision, revision),
            Err(StoreError::InDoubt(_)) => {}
            Err(_) => assert!(found.is_none(), "refused, and {key} is there"),
        }
    }
    store.commit(big(9)).await.unwrap();
}

/// The file need not grow for it.
fn small(n: usize) -> Transaction {
    Transaction::new().put(format!("small/{n:04}"), vec![7])
}

#[tokio::test]
async fn what_cannot_be_looked_at_is_in_doubt() {
    let Some(fs) = mounted() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.redb");
    let link = || std::os::unix::fs::symlink(fs.path("s.redb"), &path).unwrap();
    link();
    let store = Arc::new(EmbeddedStore::open(&path).unwrap());
    // It cannot be opened anew.
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    fs.inject(Fault::new(Op::Sync, Effect::Fail(nix::libc::EIO)).times(1));
    let mut commits = tokio::task::JoinSet::new();
    for n in 0..16 {
        let store = store.clone();
        commits.spawn(async move { (n, store.commit(small(n)).await) });
    }
    let mut results = Vec::new();
    while let Some(done) = commits.join_next().await {
        results.push(done.unwrap());
    }
    std::fs::remove_dir(&path).unwrap();
    link();
    // The first attempt opens it.
    let mut attempts = 0;
    while let Err(error) = store.commit(small(99)).await {
        attempts += 1;
        assert!(attempts < 3, "{}", error.with_causes());
    }
    let mut doubts = 0;
    for (n, result) in results {
        let found = store.get(&format!("small/{n:04}")).await.unwrap();
        match result {
            Ok(_) => assert!(found.is_some(), "acknowledged, and {n} is not there"),
            Err(StoreError::InDoubt(_)) => doubts += 1,
            Err(error) => assert!(found.is_none(), "{error}, and {n} is there"),
        }
    }
    assert!(doubts > 0, "the failed transaction cannot be known");
}
