use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::Range;
use crate::embedded::EmbeddedStore;

#[derive(Default)]
struct Counted(AtomicU32);

#[tonic::async_trait]
impl Migration for Counted {
    fn from(&self) -> u32 {
        1
    }

    async fn run(&self, store: &SharedStore) -> Result<(), StoreError> {
        if self.0.fetch_add(1, Ordering::Relaxed) == 0 {
            return Err(StoreError::Unavailable("cut off".into()));
        }
        store
            .commit(Transaction::new().put("migrated", vec![]))
            .await?;
        Ok(())
    }
}

fn store() -> SharedStore {
    Arc::new(EmbeddedStore::in_memory())
}

#[tokio::test]
async fn older_state_is_brought_up_to_date_once() {
    let store = store();
    store
        .commit(Transaction::new().put("vms/a/b", vec![]))
        .await
        .unwrap();
    let step = Counted::default();
    assert!(bring_up_to_date(&store, &[&step]).await.is_err());
    for _ in 0..2 {
        bring_up_to_date(&store, &[&step]).await.unwrap();
    }
    assert_eq!(
        step.0.load(Ordering::Relaxed),
        2,
        "again after the failure, then no more"
    );
    assert!(store.get("migrated").await.unwrap().is_some());
    assert_eq!(
        of(&store.list(Range::all("")).await.unwrap().items),
        CURRENT
    );
}

#[tokio::test]
async fn newer_state_is_refused() {
    let store = store();
    let record = SchemaRecord {
        version: 9,
        oldest_reader: 8,
        program: "7.0".into(),
    };
    let put = Transaction::new().put(KEY, record.encode_to_vec());
    store.commit(put).await.unwrap();
    for result in [
        check_usable(&store).await,
        bring_up_to_date(&store, &[]).await,
    ] {
        let error = result.unwrap_err().to_string();
        assert!(
            error.contains("7.0") && error.contains("schema 9"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn newer_state_that_this_program_understands_is_served_and_kept() {
    let store = store();
    let record = SchemaRecord {
        version: CURRENT + 1,
        oldest_reader: CURRENT,
        program: "7.0".into(),
    };
    let put = Transaction::new().put(KEY, record.encode_to_vec());
    let revision = store.commit(put).await.unwrap();
    bring_up_to_date(&store, &[]).await.unwrap();
    assert_eq!(store.get(KEY).await.unwrap().unwrap().revision, revision);
}
