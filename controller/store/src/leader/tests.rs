use std::sync::Mutex;

use super::*;
use crate::embedded::EmbeddedStore;

const PERIOD: Duration = Duration::from_secs(4);

/// Epochs in which work was begun, and how much of it goes on.
#[derive(Clone, Default)]
struct Log {
    begun: Arc<Mutex<Vec<(&'static str, u64)>>>,
    running: Arc<()>,
}

impl Log {
    fn candidate(&self, store: &SharedStore, name: &'static str) -> JoinHandle<()> {
        let log = self.clone();
        let candidate = Candidate::new(store.clone(), name.to_owned(), PERIOD);
        tokio::spawn(candidate.run(move |term| {
            let epoch = term.epoch.number().unwrap();
            log.begun.lock().unwrap().push((name, epoch));
            let alive = log.running.clone();
            async move {
                let _alive = alive;
                std::future::pending().await
            }
        }))
    }

    async fn wait_for(&self, count: usize) -> Vec<(&'static str, u64)> {
        let begun = || self.begun.lock().unwrap().clone();
        let all = async {
            while begun().len() < count {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            begun()
        };
        tokio::time::timeout(PERIOD * 4, all)
            .await
            .expect("a leader in time")
    }

    /// Besides the log's own.
    fn running(&self) -> usize {
        Arc::strong_count(&self.running)
    }
}

fn store() -> SharedStore {
    Arc::new(EmbeddedStore::in_memory())
}

#[tokio::test(start_paused = true)]
async fn one_leads_and_the_other_follows_within_two_periods() {
    let (store, log) = (store(), Log::default());
    let first = log.candidate(&store, "a");
    let begun = log.wait_for(1).await;
    let second = log.candidate(&store, "b");
    tokio::time::sleep(PERIOD * 5).await;
    assert_eq!(log.wait_for(1).await, begun, "the lease is kept");
    first.abort();
    let died = Instant::now();
    let both = log.wait_for(2).await;
    assert!(died.elapsed() <= PERIOD * 2, "{:?}", died.elapsed());
    assert_eq!(both[1].0, "b");
    assert!(both[1].1 > both[0].1, "epochs rise: {both:?}");
    second.abort();
}

#[tokio::test(start_paused = true)]
async fn work_ends_when_the_key_is_taken_away() {
    let (store, log) = (store(), Log::default());
    let idle = log.running();
    let task = log.candidate(&store, "a");
    log.wait_for(1).await;
    store.commit(Transaction::new().delete(KEY)).await.unwrap();
    let begun = log.wait_for(2).await;
    assert!(begun[1].1 > begun[0].1, "{begun:?}");
    // The task's own handle on the log, and one leader's work.
    assert_eq!(log.running(), idle + 2, "the first one's work is over");
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn followers_name_the_leaders_epoch() {
    let (store, log) = (store(), Log::default());
    let leader = log.candidate(&store, "a");
    let epoch = log.wait_for(1).await[0].1;
    let follower = Candidate::new(store.clone(), "b".into(), PERIOD);
    let (mut seen, mut follows) = (follower.leader(), follower.epoch());
    let task = tokio::spawn(follower.run(|_| std::future::pending()));
    let found = seen
        .wait_for(Option::is_some)
        .await
        .unwrap()
        .clone()
        .unwrap();
    assert_eq!((found.epoch, found.here), (epoch, false));
    assert_eq!(found.record.address, "a");
    let request = follows.call(tonic::Request::new(())).unwrap();
    let metadata = request.metadata().get(EPOCH_METADATA).unwrap();
    assert_eq!(metadata.to_str().unwrap(), epoch.to_string());
    leader.abort();
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn epochs_of_a_restored_store_begin_past_those_before() {
    let (store, log) = (store(), Log::default());
    let base = Transaction::new().put(EPOCH_BASE_KEY, b"1000000".to_vec());
    store.commit(base).await.unwrap();
    let task = log.candidate(&store, "a");
    assert!(log.wait_for(1).await[0].1 > 1_000_000);
    task.abort();
}
