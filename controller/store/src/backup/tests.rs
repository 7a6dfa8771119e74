use std::sync::Arc;

use super::*;
use crate::embedded::EmbeddedStore;
use crate::schema::SchemaError;

fn store() -> SharedStore {
    Arc::new(EmbeddedStore::in_memory())
}

async fn filled(count: usize) -> SharedStore {
    let store = store();
    for n in 0..count {
        let put = Transaction::new().put(format!("k/{n:05}"), vec![n as u8; 3000]);
        store.commit(put).await.unwrap();
    }
    store
}

async fn bytes(store: &SharedStore) -> Vec<u8> {
    take(store).await.unwrap().flatten().collect()
}

fn read(bytes: &[u8]) -> Result<Backup, BackupError> {
    let mut reader = Reader::default();
    for piece in bytes.chunks(777) {
        reader.feed(piece)?;
    }
    reader.finish()
}

async fn contents(store: &SharedStore) -> Vec<(String, Vec<u8>)> {
    let items = store.list(Range::all("")).await.unwrap().items;
    let kept = items.into_iter().filter(|item| !is_transient(&item.key));
    kept.map(|item| (item.key, item.value)).collect()
}

#[tokio::test]
async fn what_was_backed_up_comes_back() {
    let from = filled(1000).await;
    let backup = read(&bytes(&from).await).unwrap();
    assert_eq!(backup.len(), 1000);
    let to = store();
    restore(&to, &backup, false).await.unwrap();
    assert_eq!(contents(&to).await, contents(&from).await);
    assert!(
        to.get(leader::KEY).await.unwrap().is_none(),
        "somebody may lead"
    );
    schema::check_usable(&to).await.unwrap();
}

#[tokio::test]
async fn restore_replaces_only_when_told_to() {
    let backup = read(&bytes(&filled(3).await).await).unwrap();
    let to = store();
    let other = Transaction::new()
        .put("other", vec![1])
        .put("k/00001", vec![1]);
    to.commit(other).await.unwrap();
    let error = restore(&to, &backup, false).await.unwrap_err();
    assert!(
        matches!(error, BackupError::NotEmpty { found: 2 }),
        "{error}"
    );
    restore(&to, &backup, true).await.unwrap();
    assert_eq!(contents(&to).await, contents(&filled(3).await).await);
}

#[tokio::test]
async fn epochs_rise_with_every_restore() {
    let backup = read(&bytes(&filled(3).await).await).unwrap();
    let mut last = 0;
    for _ in 0..3 {
        let to = store();
        restore(&to, &backup, false).await.unwrap();
        let base = leader::epoch_base(&to).await.unwrap();
        assert!(base > last, "{base} after {last}");
        last = base;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn leader_is_deposed_by_a_restore() {
    let to = store();
    let lead = Transaction::new().put(leader::KEY, b"somebody".to_vec());
    let term = to.commit(lead).await.unwrap();
    let theirs = FencedStore::new(to.clone(), leader::KEY, term);
    let backup = read(&bytes(&filled(3).await).await).unwrap();
    restore(&to, &backup, false).await.unwrap();
    let late = theirs.commit(Transaction::new().delete("k/00001")).await;
    assert!(matches!(late, Err(StoreError::Deposed)), "{late:?}");
}

#[tokio::test]
async fn damage_is_found_before_anything_is_written() {
    let whole = bytes(&filled(20).await).await;
    assert!(matches!(
        read(&whole[..whole.len() - 1]),
        Err(BackupError::CutOff)
    ));
    assert!(matches!(read(&[]), Err(BackupError::CutOff)));
    assert!(matches!(
        read(b"hello, this is not one"),
        Err(BackupError::NotABackup)
    ));
    let mut newer = whole.clone();
    newer[MAGIC_STEM.len()] = b'2';
    assert!(matches!(read(&newer), Err(BackupError::Newer { .. })));
    for at in [MAGIC.len() + 10, whole.len() / 2, whole.len() - 5] {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        assert!(read(&damaged).is_err(), "byte {at}");
    }
    let mut longer = whole.clone();
    longer.extend_from_slice(b"more");
    assert!(read(&longer).is_err());
}

#[tokio::test]
async fn interrupted_restore_keeps_leaders_away_and_may_be_repeated() {
    let to = store();
    let half = Transaction::new()
        .put(RESTORING_KEY, vec![])
        .put("k/9", vec![1]);
    to.commit(half).await.unwrap();
    let error = schema::check_usable(&to).await.unwrap_err();
    assert!(matches!(error, SchemaError::HalfRestored), "{error}");
    let backup = read(&bytes(&filled(3).await).await).unwrap();
    restore(&to, &backup, false).await.unwrap();
    schema::check_usable(&to).await.unwrap();
    assert_eq!(contents(&to).await.len(), 3);
}

#[tokio::test]
async fn migration_leaves_a_note_behind() {
    let (from, to) = (filled(7).await, store());
    assert_eq!(migrate(&from, &to, "etcd at x", false).await.unwrap(), 7);
    assert_eq!(contents(&to).await.len(), 7);
    let error = schema::check_usable(&from).await.unwrap_err();
    assert!(error.to_string().contains("etcd at x"), "{error}");
    schema::check_usable(&to).await.unwrap();
    let again = migrate(&from, &store(), "y", false).await;
    assert!(again.is_err(), "it is elsewhere by now");
}

/// As a program of format 1 wrote it, and as every later one must read it.
#[test]
fn first_format_is_read_for_ever() {
    let golden = include_bytes!("golden-1.bin");
    let backup = read(golden).unwrap();
    assert_eq!((backup.len(), backup.header.revision), (2, 2));
    assert_eq!(backup.entries[1].key, "vms/default/b");
}
