//! How often one caller may ask: a bucket of tokens each, which fills at the rate and holds twice what
//! a second allows.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Callers remembered; beyond that those whose buckets are full are forgotten, which changes nothing
/// for them.
const MAX_CALLERS: usize = 10_000;

/// The rate, and each caller's bucket.
#[derive(Debug)]
pub struct Rate {
    per_second: u32,
    buckets: Mutex<HashMap<String, Bucket>>,
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    filled: Instant,
}

impl Rate {
    /// So many requests a second of each caller; 0 for no limit.
    pub fn new(per_second: u32) -> Self {
        Self {
            per_second,
            buckets: Mutex::default(),
        }
    }

    /// As it was made.
    pub fn per_second(&self) -> u32 {
        self.per_second
    }

    /// Takes one request of `caller`.
    ///
    /// # Errors
    /// How long until there will be room for one.
    pub fn take(&self, caller: &str, now: Instant) -> Result<(), Duration> {
        if self.per_second == 0 {
            return Ok(());
        }
        let rate = f64::from(self.per_second);
        let full = rate * 2.0;
        let level = |bucket: &Bucket| {
            let passed = now.saturating_duration_since(bucket.filled).as_secs_f64();
            (bucket.tokens + passed * rate).min(full)
        };
        let mut buckets = self
            .buckets
            .lock()
            .expect("nothing panics while it is held");
        if buckets.len() >= MAX_CALLERS && !buckets.contains_key(caller) {
            buckets.retain(|_, bucket| level(bucket) < full);
            if buckets.len() >= MAX_CALLERS {
                // All of them are busy: this one waits as they do.
                return Err(Duration::from_secs(1));
            }
        }
        let bucket = buckets.entry(caller.to_owned()).or_insert(Bucket {
            tokens: full,
            filled: now,
        });
        bucket.tokens = level(bucket);
        bucket.filled = now;
        if bucket.tokens < 1.0 {
            let missing = (1.0 - bucket.tokens) / rate;
            return Err(Duration::from_secs_f64(missing).max(Duration::from_millis(1)));
        }
        bucket.tokens -= 1.0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_caller_has_a_bucket_of_its_own() {
        let rate = Rate::new(10);
        let begin = Instant::now();
        for _ in 0..20 {
            rate.take("a", begin).unwrap();
        }
        let wait = rate.take("a", begin).unwrap_err();
        assert!(wait <= Duration::from_millis(101), "{wait:?}");
        rate.take("b", begin).unwrap();
        rate.take("a", begin + wait).unwrap();
        assert!(rate.take("a", begin + wait).is_err());
        // Rest fills it, and no further than to its brim.
        let later = begin + Duration::from_secs(3600);
        let taken = (0..100).filter(|_| rate.take("a", later).is_ok()).count();
        assert_eq!(taken, 20);
    }

    #[test]
    fn callers_are_bounded() {
        let rate = Rate::new(1);
        let begin = Instant::now();
        for caller in 0..MAX_CALLERS {
            rate.take(&caller.to_string(), begin).unwrap();
        }
        assert!(rate.take("one more", begin).is_err());
        let later = begin + Duration::from_secs(10);
        rate.take("one more", later).unwrap();
        assert_eq!(rate.buckets.lock().unwrap().len(), 1);
    }
}
