//! The rules of a process: what is armed for how long, and which devices it concerns.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use crate::clock::monotonic_ns;
use crate::device::DeviceFaults;
use crate::rule::{ArmedRule, Rule, RuleStatus, as_ns};
use crate::trigger::scramble;

/// Armings of a process at most, and as many that ended are remembered.
pub const MAX_ARMINGS: usize = 64;
/// Rules of one arming at most.
pub const MAX_RULES: usize = 64;

/// What a process is, and so which faults it can bring about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A daemon of disks.
    Block,
    /// A daemon of NICs.
    Net,
    /// What daemons serve: the machine's end of their connections.
    Frontend,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Block => "a daemon of disks",
            Self::Net => "a daemon of NICs",
            Self::Frontend => "a frontend",
        })
    }
}

/// Why rules were not armed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArmError {
    /// By another request.
    #[error("{id:?} is armed with other rules; disarm it first or choose another id")]
    IdTaken {
        /// As given.
        id: String,
    },
    /// The rule is none for this process.
    #[error("rule {rule:?}: {kind} does not know {action}")]
    NotHere {
        /// Its name.
        rule: String,
        /// Its action's name.
        action: &'static str,
        /// This process.
        kind: Kind,
    },
    /// [`MAX_ARMINGS`] there are.
    #[error("{MAX_ARMINGS} sets of rules are armed already; disarm some first")]
    TooMany,
}

/// What has become of rules that were armed together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arming {
    /// The caller's.
    pub id: String,
    /// Whether it still is.
    pub state: ArmingState,
    /// As given.
    pub seed: u64,
    /// While armed.
    pub remaining: Duration,
    /// In the order given.
    pub rules: Vec<RuleStatus>,
}

/// Whether rules are armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArmingState {
    /// They are.
    Armed,
    /// Their time was over.
    Expired,
    /// Somebody ended them.
    Disarmed,
}

/// See the module's description.
pub struct Faults {
    kind: Kind,
    timer: Arc<Timer>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    armed: Vec<ArmedSet>,
    /// Oldest first.
    ended: VecDeque<ArmedSet>,
    devices: Vec<Weak<DeviceFaults>>,
}

struct ArmedSet {
    id: String,
    seed: u64,
    state: ArmingState,
    expires_ns: Arc<AtomicU64>,
    rules: Vec<Arc<ArmedRule>>,
}

impl Faults {
    /// Nothing is armed. The thread that ends what has expired runs for as long as this lives.
    ///
    /// # Errors
    /// No thread to be had.
    pub fn start(kind: Kind) -> io::Result<Arc<Self>> {
        let faults = Self::untimed(kind);
        let timer = Arc::clone(&faults.timer);
        let weak = Arc::downgrade(&faults);
        thread::Builder::new()
            .name("faults".to_owned())
            .spawn(move || {
                while let Some(faults) = weak.upgrade() {
                    faults.tick(monotonic_ns());
                    drop(faults);
                    timer.wait();
                }
            })?;
        Ok(faults)
    }

    fn untimed(kind: Kind) -> Arc<Self> {
        Arc::new(Self {
            kind,
            timer: Arc::default(),
            state: Mutex::default(),
        })
    }

    /// What concerns the device `id`, from its beginning on.
    pub fn device(&self, id: &str) -> Arc<DeviceFaults> {
        let device = Arc::new(DeviceFaults::new(id, Some(Arc::clone(&self.timer))));
        let mut state = self.state();
        device.set_rules(state.rules_of(id));
        state.devices.retain(|other| other.strong_count() > 0);
        state.devices.push(Arc::downgrade(&device));
        device
    }

    /// Arms all of `rules` for `ttl`, or renews that when they are armed.
    ///
    /// # Errors
    /// [`ArmError`]; nothing was armed.
    pub fn arm(
        &self,
        id: &str,
        rules: Vec<Rule>,
        ttl: Duration,
        seed: u64,
    ) -> Result<Arming, ArmError> {
        self.arm_at(id, rules, ttl, seed, monotonic_ns())
    }

    fn arm_at(
        &self,
        id: &str,
        rules: Vec<Rule>,
        ttl: Duration,
        seed: u64,
        now_ns: u64,
    ) -> Result<Arming, ArmError> {
        if let Some(rule) = rules.iter().find(|rule| !rule.action.is_for(self.kind)) {
            return Err(ArmError::NotHere {
                rule: rule.name.clone(),
                action: rule.action.name(),
                kind: self.kind,
            });
        }
        self.tick(now_ns);
        let expires_ns = now_ns.saturating_add(as_ns(ttl)).max(1);
        let mut state = self.state();
        let arming = match state.armed.iter().find(|set| set.id == id) {
            Some(set) if !set.is_of(&rules, seed) => {
                return Err(ArmError::IdTaken { id: id.to_owned() });
            }
            Some(set) => {
                set.expires_ns.store(expires_ns, Ordering::Relaxed);
                set.describe(now_ns)
            }
            None if state.armed.len() == MAX_ARMINGS => return Err(ArmError::TooMany),
            None => {
                let set = ArmedSet::new(id, rules, seed, now_ns, expires_ns);
                let arming = set.describe(now_ns);
                state.armed.push(set);
                arming
            }
        };
        let changed = state.distribute();
        drop(state);
        wake(&changed);
        self.timer.ring_at(0);
        Ok(arming)
    }

    /// Ends what was armed as `id`, or everything; returns what it was.
    pub fn disarm(&self, id: Option<&str>) -> Vec<Arming> {
        self.disarm_at(id, monotonic_ns())
    }

    fn disarm_at(&self, id: Option<&str>, now_ns: u64) -> Vec<Arming> {
        self.end(now_ns, |set| {
            id.is_none_or(|id| id == set.id)
                .then_some(ArmingState::Disarmed)
        })
    }

    /// What is armed, and what ended last.
    pub fn list(&self) -> Vec<Arming> {
        let now_ns = monotonic_ns();
        self.tick(now_ns);
        let state = self.state();
        let sets = state.ended.iter().chain(&state.armed);
        sets.map(|set| set.describe(now_ns)).collect()
    }

    /// Ends what has expired, and wakes whoever wanted to be woken by now.
    fn tick(&self, now_ns: u64) {
        self.end(now_ns, |set| {
            (set.expires_ns.load(Ordering::Relaxed) <= now_ns).then_some(ArmingState::Expired)
        });
        let state = self.state();
        let rules = state.armed.iter().flat_map(|set| &set.rules);
        let next_ns = rules.filter_map(|rule| rule.next_change_ns(now_ns)).min();
        let is_due = self.timer.take_due(now_ns);
        let devices = if is_due {
            state.devices.iter().filter_map(Weak::upgrade).collect()
        } else {
            Vec::new()
        };
        drop(state);
        wake(&devices);
        if let Some(next_ns) = next_ns {
            self.timer.ring_at(next_ns);
        }
    }

    fn end(&self, now_ns: u64, how: impl Fn(&ArmedSet) -> Option<ArmingState>) -> Vec<Arming> {
        let mut state = self.state();
        let mut ended = Vec::new();
        let mut index = 0;
        while index < state.armed.len() {
            let Some(end) = how(&state.armed[index]) else {
                index += 1;
                continue;
            };
            let mut set = state.armed.remove(index);
            set.state = end;
            // Those who hold something back because of it look at this.
            set.expires_ns.store(0, Ordering::Relaxed);
            ended.push(set.describe(now_ns));
            if state.ended.len() == MAX_ARMINGS {
                state.ended.pop_front();
            }
            state.ended.push_back(set);
        }
        if ended.is_empty() {
            return ended;
        }
        let changed = state.distribute();
        drop(state);
        wake(&changed);
        ended
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Faults {
    /// Lets the timer's thread see that nobody is left.
    fn drop(&mut self) {
        self.timer.ring_at(0);
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults")
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

impl State {
    fn rules_of(&self, device: &str) -> Vec<Arc<ArmedRule>> {
        let rules = self.armed.iter().flat_map(|set| &set.rules);
        rules
            .filter(|rule| rule.rule.selector.is_about_device(device))
            .cloned()
            .collect()
    }

    /// Gives each device the rules that concern it; returns those that have or had some.
    fn distribute(&mut self) -> Vec<Arc<DeviceFaults>> {
        self.devices.retain(|device| device.strong_count() > 0);
        let devices: Vec<_> = self.devices.iter().filter_map(Weak::upgrade).collect();
        devices
            .into_iter()
            .filter(|device| device.set_rules(self.rules_of(device.id())))
            .collect()
    }
}

/// Outside the lock: whoever is woken may ask for something.
fn wake(devices: &[Arc<DeviceFaults>]) {
    for device in devices {
        device.wake();
    }
}

impl ArmedSet {
    fn new(id: &str, rules: Vec<Rule>, seed: u64, now_ns: u64, expires_ns: u64) -> Self {
        let expires_ns = Arc::new(AtomicU64::new(expires_ns));
        let rules = (0..)
            .zip(rules)
            .map(|(index, rule)| {
                // Rules of one seed are to decide independently of one another.
                let seed = scramble(seed, index);
                Arc::new(ArmedRule::new(rule, seed, now_ns, Arc::clone(&expires_ns)))
            })
            .collect();
        Self {
            id: id.to_owned(),
            seed,
            state: ArmingState::Armed,
            expires_ns,
            rules,
        }
    }

    fn is_of(&self, rules: &[Rule], seed: u64) -> bool {
        self.seed == seed
            && self.rules.len() == rules.len()
            && self
                .rules
                .iter()
                .zip(rules)
                .all(|(armed, rule)| armed.rule == *rule)
    }

    fn describe(&self, now_ns: u64) -> Arming {
        let expires_ns = self.expires_ns.load(Ordering::Relaxed);
        Arming {
            id: self.id.clone(),
            state: self.state,
            seed: self.seed,
            remaining: Duration::from_nanos(expires_ns.saturating_sub(now_ns)),
            rules: self.rules.iter().map(|rule| rule.status()).collect(),
        }
    }
}

/// Times at which the thread looks again.
#[derive(Debug, Default)]
pub(crate) struct Timer {
    due: Mutex<BTreeSet<u64>>,
    changed: Condvar,
}

impl Timer {
    pub(crate) fn ring_at(&self, at_ns: u64) {
        self.due().insert(at_ns);
        self.changed.notify_one();
    }

    /// Forgets what is due; whether there was something.
    fn take_due(&self, now_ns: u64) -> bool {
        let mut due = self.due();
        let later = due.split_off(&now_ns.saturating_add(1));
        !std::mem::replace(&mut *due, later).is_empty()
    }

    fn wait(&self) {
        let mut due = self.due();
        loop {
            let now_ns = monotonic_ns();
            match due.first() {
                Some(&first_ns) if first_ns <= now_ns => return,
                Some(&first_ns) => {
                    let timeout = Duration::from_nanos(first_ns - now_ns);
                    due = self
                        .changed
                        .wait_timeout(due, timeout)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
                None => {
                    due = self
                        .changed
                        .wait(due)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn due(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
