//! Samples over time, bounded: a long run has coarser ones, not more.

use api::controller::{DeviceSample, GuestSample};

/// Of one line in a plot; a screen has fewer columns.
const MAX_SAMPLES: usize = 2_400;

/// A sample that can be put together with the one after it.
pub(crate) trait Sample: Clone {
    /// Both, as one at the time of `next`.
    fn merged(&self, next: &Self) -> Self;
}

/// Samples in the order of their times.
#[derive(Debug, Clone)]
pub(crate) struct Series<T> {
    samples: Vec<T>,
    /// As many as one sample stands for.
    stride: usize,
    /// Those of the next one, so far.
    open: Option<(T, usize)>,
}

impl<T> Default for Series<T> {
    fn default() -> Self {
        Self {
            samples: Vec::new(),
            stride: 1,
            open: None,
        }
    }
}

impl<T: Sample> Series<T> {
    pub(crate) fn push(&mut self, sample: T) {
        let (merged, count) = match self.open.take() {
            Some((open, count)) => (open.merged(&sample), count + 1),
            None => (sample, 1),
        };
        if count < self.stride {
            self.open = Some((merged, count));
            return;
        }
        self.samples.push(merged);
        if self.samples.len() == MAX_SAMPLES {
            self.samples = self
                .samples
                .chunks(2)
                .map(|pair| match pair {
                    [one, next] => one.merged(next),
                    _ => pair[0].clone(),
                })
                .collect();
            self.stride *= 2;
        }
    }

    pub(crate) fn to_vec(&self) -> Vec<T> {
        let open = self.open.iter().map(|(open, _)| open.clone());
        self.samples.iter().cloned().chain(open).collect()
    }

    pub(crate) fn last(&self) -> Option<&T> {
        self.open
            .as_ref()
            .map(|(open, _)| open)
            .or_else(|| self.samples.last())
    }
}

impl Sample for DeviceSample {
    fn merged(&self, next: &Self) -> Self {
        Self {
            at_ms: next.at_ms,
            completed: self.completed + next.completed,
            // Not exact, and never better than it was.
            latency_p50_us: self.latency_p50_us.max(next.latency_p50_us),
            latency_p99_us: self.latency_p99_us.max(next.latency_p99_us),
            latency_max_us: self.latency_max_us.max(next.latency_max_us),
            connected: self.connected && next.connected,
            inflight: self.inflight.max(next.inflight),
        }
    }
}

impl Sample for GuestSample {
    fn merged(&self, next: &Self) -> Self {
        Self {
            at_ms: next.at_ms,
            completed: self.completed.saturating_add(next.completed),
            latency_p50_us: self.latency_p50_us.max(next.latency_p50_us),
            latency_p99_us: self.latency_p99_us.max(next.latency_p99_us),
            latency_max_us: self.latency_max_us.max(next.latency_max_us),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_series_gets_coarser_and_loses_nothing_high() {
        let mut series = Series::default();
        for index in 0..100_000 {
            series.push(DeviceSample {
                at_ms: f64::from(index),
                completed: 1,
                latency_max_us: if index == 777 { 1e6 } else { 1.0 },
                connected: index != 5_000,
                ..Default::default()
            });
        }
        let samples = series.to_vec();
        assert!(samples.len() <= MAX_SAMPLES, "{}", samples.len());
        let completed: u64 = samples.iter().map(|sample| sample.completed).sum();
        assert_eq!(completed, 100_000);
        assert!(samples.iter().any(|sample| sample.latency_max_us == 1e6));
        assert!(samples.iter().any(|sample| !sample.connected));
        assert!(samples.is_sorted_by(|a, b| a.at_ms < b.at_ms));
        assert_eq!(samples.last().unwrap().at_ms, 99_999.0);
    }
}
