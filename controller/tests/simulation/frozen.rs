//! SIGSTOP of a process, for what it does: while it is stopped nothing of it is polled, so that its timers
//! fire late, and what it was about to do it does long after it decided to.

use std::pin::pin;

use tokio::sync::watch;

/// Runs `work` while nothing holds it; `freezes` says how many faults do.
pub(crate) async fn while_thawed<F: Future>(
    work: F,
    mut freezes: watch::Receiver<u32>,
) -> F::Output {
    let mut work = pin!(work);
    loop {
        let _ = freezes.wait_for(|count| *count == 0).await;
        tokio::select! {
            biased;
            true = async { freezes.wait_for(|count| *count > 0).await.is_ok() } => {}
            output = &mut work => return output,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn timers_of_what_is_stopped_fire_late() {
        let freezes = watch::Sender::new(0);
        let count = Arc::new(AtomicU32::new(0));
        let counted = count.clone();
        let work = async move {
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
                counted.fetch_add(1, Ordering::Relaxed);
            }
        };
        tokio::spawn(while_thawed(work, freezes.subscribe()));
        let pass = |millis| tokio::time::sleep(Duration::from_millis(millis));
        pass(3_500).await;
        assert_eq!(count.load(Ordering::Relaxed), 3);
        freezes.send_replace(1);
        pass(60_000).await;
        assert_eq!(count.load(Ordering::Relaxed), 3);
        freezes.send_replace(0);
        pass(1).await;
        assert_eq!(count.load(Ordering::Relaxed), 4, "once, and at once");
    }
}
