//! How the machine tells its vCPU threads what to do, and learns that they all do it.
//!
//! There is one order at a time, numbered. A thread acknowledges an order once it holds for it:
//! `Park` after it has left the guest and its pending I/O is complete, `PowerOn` when its
//! registers are set, `Run` and `Exit` at once.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::boot::Entry;

/// What vCPU threads are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Stay out of the guest.
    Park,
    /// Take on the power-on state, the boot vCPU with this entry, and stay out of the guest.
    PowerOn(Entry),
    /// Run the guest.
    Run,
    /// End the thread.
    Exit,
}

/// An order and its number.
#[derive(Clone, Copy, Debug)]
pub struct Numbered {
    /// Counts up with each order.
    pub serial: u64,
    /// What to do.
    pub order: Order,
}

/// The order of the day, shared by the machine and all vCPU threads.
pub struct Gate {
    threads: usize,
    /// Mirrors `Current::numbered.serial`, to be read between any two exits without the lock.
    serial: AtomicU64,
    current: Mutex<Current>,
    changed: Condvar,
}

struct Current {
    numbered: Numbered,
    acknowledged: usize,
    failure: Option<String>,
}

/// Why an order was not carried out by all vCPUs.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// Some vCPU did not acknowledge in time.
    #[error("{missing} of {threads} vCPUs did not answer within {waited_ms} ms")]
    Timeout {
        /// vCPUs without an answer.
        missing: usize,
        /// All vCPUs.
        threads: usize,
        /// How long they were given.
        waited_ms: u128,
    },
    /// A vCPU could not carry it out.
    #[error("{0}")]
    Failed(String),
}

impl Gate {
    /// For `threads` threads, which find the order `Park`.
    pub fn new(threads: usize) -> Self {
        let numbered = Numbered {
            serial: 0,
            order: Order::Park,
        };
        Self {
            threads,
            serial: AtomicU64::new(0),
            current: Mutex::new(Current {
                numbered,
                acknowledged: 0,
                failure: None,
            }),
            changed: Condvar::new(),
        }
    }

    /// Gives `order` and waits until all threads hold for it, calling `kick` now and then to get
    /// them out of the guest.
    ///
    /// # Errors
    /// Some thread failed, or did not answer by the deadline.
    pub fn command(
        &self,
        order: Order,
        deadline: Duration,
        kick: impl Fn(),
    ) -> Result<(), GateError> {
        const KICK_INTERVAL: Duration = Duration::from_millis(20);
        let started = Instant::now();
        let mut current = self.lock();
        current.numbered = Numbered {
            serial: current.numbered.serial + 1,
            order,
        };
        current.acknowledged = 0;
        current.failure = None;
        self.serial.store(current.numbered.serial, Ordering::SeqCst);
        self.changed.notify_all();
        kick();
        loop {
            if current.acknowledged == self.threads {
                return current
                    .failure
                    .take()
                    .map_or(Ok(()), |failure| Err(GateError::Failed(failure)));
            }
            if started.elapsed() >= deadline {
                let missing = self.threads - current.acknowledged;
                return Err(GateError::Timeout {
                    missing,
                    threads: self.threads,
                    waited_ms: deadline.as_millis(),
                });
            }
            let (guard, timeout) = self
                .changed
                .wait_timeout(current, KICK_INTERVAL)
                .expect("no panic while locked");
            current = guard;
            if timeout.timed_out() {
                kick();
            }
        }
    }

    /// The number of the current order.
    pub fn serial(&self) -> u64 {
        self.serial.load(Ordering::SeqCst)
    }

    /// Waits for an order that is newer than `last`.
    pub fn wait_for_newer(&self, last: u64) -> Numbered {
        let current = self.lock();
        let idle = |current: &mut Current| current.numbered.serial <= last;
        self.changed
            .wait_while(current, idle)
            .expect("no panic while locked")
            .numbered
    }

    /// Says that one thread holds for the order `serial`, or why it cannot.
    pub fn acknowledge(&self, serial: u64, result: Result<(), String>) {
        let mut current = self.lock();
        if current.numbered.serial == serial {
            current.acknowledged += 1;
            if let Err(failure) = result {
                current.failure.get_or_insert(failure);
            }
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        self.current.lock().expect("no panic while locked")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(5);

    #[test]
    fn command_returns_when_all_threads_acknowledged() {
        let gate = Arc::new(Gate::new(3));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let gate = gate.clone();
                thread::spawn(move || {
                    let first = gate.wait_for_newer(0);
                    gate.acknowledge(first.serial, Ok(()));
                    let second = gate.wait_for_newer(first.serial);
                    gate.acknowledge(second.serial, Ok(()));
                    [first.order, second.order]
                })
            })
            .collect();
        gate.command(Order::Run, DEADLINE, || {}).unwrap();
        gate.command(Order::Exit, DEADLINE, || {}).unwrap();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), [Order::Run, Order::Exit]);
        }
    }

    #[test]
    fn silent_thread_is_reported_after_the_deadline() {
        let gate = Gate::new(2);
        gate.acknowledge(0, Ok(()));
        let err = gate
            .command(Order::Park, Duration::from_millis(30), || {})
            .unwrap_err();
        assert!(
            matches!(
                err,
                GateError::Timeout {
                    missing: 2,
                    threads: 2,
                    ..
                }
            ),
            "{err}"
        );
    }

    #[test]
    fn failure_of_one_thread_fails_the_command() {
        let gate = Gate::new(1);
        let result = thread::scope(|scope| {
            scope.spawn(|| {
                let order = gate.wait_for_newer(0);
                gate.acknowledge(order.serial, Err("no registers".into()));
            });
            gate.command(Order::Park, DEADLINE, || {})
        });
        assert_eq!(result.unwrap_err().to_string(), "no registers");
    }
}
