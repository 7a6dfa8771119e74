//! Faults that other parts of the agent bring about when they look at them.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Cheap to clone; all clones are the same. By default nothing is wrong.
#[derive(Clone, Debug, Default)]
pub(crate) struct Knobs {
    inner: Arc<Mutex<Inner>>,
    allows_faults: bool,
}

#[derive(Debug, Default)]
struct Inner {
    starts: Vec<Start>,
    store_lost_until: Option<Instant>,
    partitioned_until: Option<Instant>,
}

/// How daemons are started.
#[derive(Debug)]
struct Start {
    /// Of the fault.
    key: String,
    vm: String,
    device: String,
    delay: Duration,
    program: Option<PathBuf>,
    hits: Arc<AtomicU64>,
}

/// What is wrong with a start.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct StartFault {
    /// It takes so much longer.
    pub(crate) delay: Duration,
    /// It is of this program.
    pub(crate) program: Option<PathBuf>,
}

/// As far as command lines go.
impl PartialEq for Knobs {
    fn eq(&self, other: &Self) -> bool {
        self.allows_faults == other.allows_faults
    }
}

impl Eq for Knobs {}

impl Knobs {
    pub(crate) fn new(allows_faults: bool) -> Self {
        Self {
            inner: Arc::default(),
            allows_faults,
        }
    }

    /// What daemons and vmm-core are told on their command lines.
    pub(crate) fn daemon_args(&self) -> Option<&'static str> {
        self.allows_faults.then_some("--allow-faults")
    }

    /// A daemon that serves `devices` of `vm` is about to be started.
    pub(crate) fn at_start<'a>(
        &self,
        vm: &str,
        devices: impl Iterator<Item = &'a str> + Clone,
    ) -> StartFault {
        let mut fault = StartFault::default();
        for start in &self.inner().starts {
            let is_meant = (start.vm.is_empty() || start.vm == vm)
                && (start.device.is_empty()
                    || devices.clone().any(|device| device == start.device));
            if is_meant {
                start.hits.fetch_add(1, Ordering::Relaxed);
                fault.delay = fault.delay.max(start.delay);
                fault.program = start.program.clone().or(fault.program);
            }
        }
        fault
    }

    /// Whether records cannot be written.
    pub(crate) fn is_store_lost(&self) -> bool {
        self.allows_faults && is_before(self.inner().store_lost_until)
    }

    /// Whether nobody is answered.
    pub(crate) fn is_partitioned(&self) -> bool {
        self.allows_faults && is_before(self.inner().partitioned_until)
    }

    /// From now on daemons of these devices (empty: all) start like this; how often one did.
    pub(super) fn spoil_starts(
        &self,
        key: &str,
        vm: &str,
        device: &str,
        fault: StartFault,
    ) -> Arc<AtomicU64> {
        let hits = Arc::new(AtomicU64::new(0));
        self.inner().starts.push(Start {
            key: key.to_owned(),
            vm: vm.to_owned(),
            device: device.to_owned(),
            delay: fault.delay,
            program: fault.program,
            hits: Arc::clone(&hits),
        });
        hits
    }

    pub(super) fn restore_starts(&self, key: &str) {
        self.inner().starts.retain(|start| start.key != key);
    }

    pub(super) fn lose_store_until(&self, until: Option<Instant>) {
        self.inner().store_lost_until = until;
    }

    pub(super) fn partition_until(&self, until: Option<Instant>) {
        self.inner().partitioned_until = until;
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_before(until: Option<Instant>) -> bool {
    until.is_some_and(|until| Instant::now() < until)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_starts_that_are_meant_are_spoilt_and_counted() {
        let knobs = Knobs::new(true);
        let fault = |millis| StartFault {
            delay: Duration::from_millis(millis),
            program: None,
        };
        let hits = knobs.spoil_starts("a", "web", "root", fault(10));
        let delay = |vm, devices: &[&'static str]| {
            knobs
                .at_start(vm, devices.iter().copied())
                .delay
                .as_millis()
        };
        assert_eq!(delay("web", &["root", "data"]), 10);
        assert_eq!(delay("web", &["data"]), 0);
        assert_eq!(delay("db", &["root"]), 0);
        assert_eq!(hits.load(Ordering::Relaxed), 1);
        knobs.restore_starts("a");
        assert_eq!(delay("web", &["root"]), 0);
    }

    #[test]
    fn losses_end_by_themselves() {
        let knobs = Knobs::new(true);
        assert!(!knobs.is_store_lost() && !knobs.is_partitioned());
        knobs.lose_store_until(Some(Instant::now() + Duration::from_secs(60)));
        assert!(knobs.is_store_lost());
        knobs.lose_store_until(Some(Instant::now()));
        assert!(!knobs.is_store_lost());
    }
}
