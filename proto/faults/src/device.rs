//! The rules that concern one device, as its hooks see them.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use crate::action::{Action, Point};
use crate::clock::monotonic_ns;
use crate::event::Event;
use crate::process::Timer;
use crate::rule::ArmedRule;

/// An event was hit.
#[derive(Clone, Debug)]
pub struct Strike {
    /// What to do to it.
    pub action: Action,
    /// To decide about details with; follows from the seed.
    pub random: u64,
    pub(crate) rule: Arc<ArmedRule>,
}

impl Strike {
    /// `CLOCK_MONOTONIC`: whatever is held back goes on then at the latest. Earlier when the rule is
    /// disarmed meanwhile, which [`Wake`] tells.
    pub fn ends_ns(&self) -> u64 {
        self.rule.ends_ns()
    }

    /// Whether nothing is to be held back any more.
    pub fn is_over(&self) -> bool {
        self.ends_ns() <= monotonic_ns()
    }
}

/// Somebody who holds something back because of a rule.
pub trait Wake: Send + Sync {
    /// Rules changed, or a time has come that was asked for: look again. Does not block.
    fn wake(&self);
}

/// See the module's description. Outlives the device's sessions.
pub struct DeviceFaults {
    id: String,
    /// Of the rules below.
    armed_points: AtomicU32,
    rules: RwLock<Arc<[Arc<ArmedRule>]>>,
    wakers: Mutex<Vec<Weak<dyn Wake>>>,
    timer: Option<Arc<Timer>>,
    disconnect: AtomicBool,
}

impl DeviceFaults {
    pub(crate) fn new(id: &str, timer: Option<Arc<Timer>>) -> Self {
        Self {
            id: id.to_owned(),
            armed_points: AtomicU32::new(0),
            rules: RwLock::new(Arc::new([])),
            wakers: Mutex::default(),
            timer,
            disconnect: AtomicBool::new(false),
        }
    }

    /// Those of a device to which nothing ever happens.
    pub fn none() -> Arc<Self> {
        Arc::new(Self::new("", None))
    }

    /// Whether anything can be armed.
    pub fn is_possible(&self) -> bool {
        self.timer.is_some()
    }

    /// The device.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whether there are rules that are asked for at `point`.
    #[inline]
    pub fn is_armed(&self, point: Point) -> bool {
        self.armed_points.load(Ordering::Relaxed) & point.bit() != 0
    }

    /// The points at which there are rules, as a set of [`Point::bit`]s.
    #[inline]
    pub fn armed_points(&self) -> u32 {
        self.armed_points.load(Ordering::Relaxed)
    }

    /// Whether there are rules at all.
    #[inline]
    pub fn is_any_armed(&self) -> bool {
        self.armed_points.load(Ordering::Relaxed) != 0
    }

    /// Shows an event to all rules, in their order; returns what those say that hit it.
    #[cold]
    pub fn strike(&self, event: &Event<'_>) -> Vec<Strike> {
        self.strike_at(event, monotonic_ns())
    }

    /// As [`strike`](Self::strike), at a time of the caller's.
    pub fn strike_at(&self, event: &Event<'_>, now_ns: u64) -> Vec<Strike> {
        let rules = self.rules();
        rules
            .iter()
            .filter_map(|rule| {
                let random = rule.strike(&self.id, event, now_ns)?;
                Some(Strike {
                    action: rule.rule.action.clone(),
                    random,
                    rule: Arc::clone(rule),
                })
            })
            .collect()
    }

    /// Strikes with an action that `pick` recognizes; the first of them.
    pub fn strike_first<T>(
        &self,
        event: &Event<'_>,
        pick: impl Fn(&Action) -> Option<T>,
    ) -> Option<(T, Strike)> {
        self.strike(event)
            .into_iter()
            .find_map(|strike| Some((pick(&strike.action)?, strike)))
    }

    /// The session of this device is to end, because of an event that its connection does not see.
    pub fn ask_for_disconnect(&self) {
        self.disconnect.store(true, Ordering::Release);
        self.wake();
    }

    /// Whether somebody asked, since the last time.
    pub fn take_disconnect(&self) -> bool {
        self.disconnect.swap(false, Ordering::AcqRel)
    }

    /// Hears of changes from now on, until `waker` is dropped.
    pub fn add_waker(&self, waker: &Arc<dyn Wake>) {
        let mut wakers = self.wakers();
        wakers.retain(|other| other.strong_count() > 0);
        wakers.push(Arc::downgrade(waker));
    }

    /// Wakes all that hear of this device at `at_ns`.
    pub fn wake_at(&self, at_ns: u64) {
        if let Some(timer) = &self.timer {
            timer.ring_at(at_ns);
        }
    }

    /// Goes over to other rules; true when something was or is armed.
    pub(crate) fn set_rules(&self, rules: Vec<Arc<ArmedRule>>) -> bool {
        let points = rules.iter().fold(0, |set, rule| set | rule.point.bit());
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = rules.into();
        self.armed_points.swap(points, Ordering::Relaxed) | points != 0
    }

    pub(crate) fn wake(&self) {
        let wakers: Vec<_> = self.wakers().iter().filter_map(Weak::upgrade).collect();
        for waker in wakers {
            waker.wake();
        }
    }

    fn rules(&self) -> Arc<[Arc<ArmedRule>]> {
        Arc::clone(&self.rules.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn wakers(&self) -> MutexGuard<'_, Vec<Weak<dyn Wake>>> {
        self.wakers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for DeviceFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceFaults")
            .field("id", &self.id)
            .field("armed_points", &self.armed_points)
            .finish_non_exhaustive()
    }
}
