//! How long a worker looks for work by itself before it sleeps.
//!
//! Waking a thread costs more than a short request takes on a fast disk, so a worker that has run
//! out of work looks for more a while. That pays only when work comes that soon, and nobody else
//! needs the CPU:
//!
//! - the gap before each piece of work is measured, slept through or not. Gaps that were short
//!   lately make the worker look for twice as long as they were; long ones make it sleep at once;
//! - a look that takes long itself was interrupted, and when the kernel says that another thread
//!   had the CPU, the worker does not look for a while;
//! - no more than half of the process's CPUs are used for looking at the same time.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Whether a worker looks for work by itself before it sleeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Polling {
    /// Sleeps as soon as there is nothing to do.
    #[default]
    Never,
    /// Looks as long as experience says that it pays; an idle ring sleeps.
    Adaptive,
    /// Never sleeps.
    Always,
}

/// Looking for longer than this costs more than it can win: some four times what a wake-up takes.
const MAX_WINDOW: Duration = Duration::from_micros(200);
/// Whoever looks at all does so for as long as work takes to come back from a driver.
const MIN_WINDOW: Duration = Duration::from_micros(10);
/// A gap that was slept through is longer by the wake-up.
const MAX_SHORT_GAP: Duration = Duration::from_micros(300);
/// Between two looks, when nobody takes the CPU away; interrupts may take as long.
const MAX_LOOK: Duration = Duration::from_micros(50);
/// How long others are left the CPU that they needed.
const PAUSE: Duration = Duration::from_millis(20);
/// Experience, from none to this: a short gap adds one, a long one takes four away.
const MAX_CONFIDENCE: u32 = 16;
const LONG_GAP_COST: u32 = 4;
/// Confidence from which on the worker looks.
const CONFIDENT: u32 = 4;

/// Workers of this process that are looking.
static LOOKING: AtomicUsize = AtomicUsize::new(0);

/// One worker's experience.
#[derive(Debug)]
pub(super) struct Poller {
    /// Smoothed length of short gaps.
    gap: Duration,
    confidence: u32,
    paused_until: Option<Instant>,
    /// How often the thread had to let others have the CPU, when last asked.
    preemptions: i64,
}

impl Default for Poller {
    fn default() -> Self {
        Self {
            gap: MIN_WINDOW,
            confidence: 0,
            paused_until: None,
            preemptions: 0,
        }
    }
}

/// How a look ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    Found,
    Nothing,
}

impl Poller {
    /// There was no work between `idle_since` and `found_at`.
    pub(super) fn note_gap(&mut self, idle_since: Instant, found_at: Instant) {
        let gap = found_at.saturating_duration_since(idle_since);
        if gap <= MAX_SHORT_GAP {
            self.gap = (self.gap * 7 + gap) / 8;
            self.confidence = (self.confidence + 1).min(MAX_CONFIDENCE);
        } else {
            self.confidence = self.confidence.saturating_sub(LONG_GAP_COST);
        }
    }

    /// Looks with `has_work` until it says so, or looking no longer pays.
    pub(super) fn look(
        &mut self,
        polling: Polling,
        started: Instant,
        mut has_work: impl FnMut() -> bool,
    ) -> Look {
        let Some(window) = self.window(polling, started) else {
            return Look::Nothing;
        };
        let Some(_turn) = Turn::take(polling) else {
            return Look::Nothing;
        };
        let mut last = started;
        loop {
            if has_work() {
                return Look::Found;
            }
            let now = Instant::now();
            if now.duration_since(started) >= window {
                return Look::Nothing;
            }
            let is_adaptive = polling == Polling::Adaptive;
            if is_adaptive && now.duration_since(last) > MAX_LOOK && self.was_preempted() {
                self.paused_until = Some(now + PAUSE);
                return Look::Nothing;
            }
            last = now;
            std::hint::spin_loop();
        }
    }

    /// Whether another thread took the CPU since this was last asked.
    #[cold]
    fn was_preempted(&mut self) -> bool {
        let preemptions = preemptions();
        preemptions > std::mem::replace(&mut self.preemptions, preemptions)
    }

    /// How long to look; `None` for not at all.
    fn window(&mut self, polling: Polling, now: Instant) -> Option<Duration> {
        match polling {
            Polling::Never => None,
            // Commands are seen in between; this lets the mode be changed.
            Polling::Always => Some(Duration::MAX),
            Polling::Adaptive => {
                if self.paused_until.is_some_and(|until| now < until) {
                    return None;
                }
                self.paused_until = None;
                let is_confident = self.confidence >= CONFIDENT;
                is_confident.then(|| (self.gap * 2).clamp(MIN_WINDOW, MAX_WINDOW))
            }
        }
    }
}

/// Leave to look, given back on drop.
struct Turn;

impl Turn {
    fn take(polling: Polling) -> Option<Turn> {
        static MAX_LOOKING: OnceLock<usize> = OnceLock::new();
        let max = *MAX_LOOKING.get_or_init(|| {
            let cpus = thread::available_parallelism().map_or(1, usize::from);
            (cpus / 2).max(1)
        });
        let before = LOOKING.fetch_add(1, Ordering::Relaxed);
        let turn = Turn;
        // Who is told to look always does; dropping gives the place back.
        (before < max || polling == Polling::Always).then_some(turn)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        LOOKING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How often the calling thread had to let another have the CPU.
fn preemptions() -> i64 {
    // SAFETY: `rusage` is plain data, for which all zeroes is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is a valid buffer for the call, which fails for other reasons never.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
    usage.ru_nivcsw
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after_gaps(gaps: &[Duration]) -> Poller {
        let mut poller = Poller::default();
        let start = Instant::now();
        for &gap in gaps {
            poller.note_gap(start, start + gap);
        }
        poller
    }

    #[test]
    fn short_gaps_make_it_look_and_long_ones_make_it_sleep() {
        let now = Instant::now();
        let short = Duration::from_micros(50);
        let mut poller = after_gaps(&[short; 40]);
        let window = poller.window(Polling::Adaptive, now).unwrap();
        assert!(window > short && window <= MAX_WINDOW, "{window:?}");
        for _ in 0..MAX_CONFIDENCE / LONG_GAP_COST {
            poller.note_gap(now, now + Duration::from_secs(1));
        }
        assert_eq!(poller.window(Polling::Adaptive, now), None);
        assert_eq!(after_gaps(&[]).window(Polling::Adaptive, now), None);
    }

    #[test]
    fn never_and_always_do_not_go_by_experience() {
        let now = Instant::now();
        let mut poller = after_gaps(&[Duration::from_micros(5); 40]);
        assert_eq!(poller.window(Polling::Never, now), None);
        let mut poller = after_gaps(&[]);
        assert!(poller.window(Polling::Always, now).is_some());
    }

    #[test]
    fn look_that_another_thread_interrupted_is_not_repeated_soon() {
        let mut poller = after_gaps(&[MAX_WINDOW; 40]);
        let deadline = Instant::now() + Duration::from_secs(20);
        // Somebody else needs the CPU that this thread is on.
        let rival_ends = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        // SAFETY: a CPU set is plain data; the calls take it with its size.
        let rival = unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(libc::sched_getcpu() as usize, &mut set);
            assert_eq!(libc::sched_setaffinity(0, size_of_val(&set), &set), 0);
            let rival_ends = std::sync::Arc::clone(&rival_ends);
            thread::spawn(move || while !rival_ends.load(Ordering::Relaxed) {})
        };
        while poller.paused_until.is_none() {
            assert!(Instant::now() < deadline, "the rival is never noticed");
            poller.look(Polling::Adaptive, Instant::now(), || false);
        }
        rival_ends.store(true, Ordering::Relaxed);
        rival.join().unwrap();
        let paused_until = poller.paused_until.unwrap();
        assert_eq!(
            poller.window(Polling::Adaptive, paused_until - PAUSE / 2),
            None
        );
        assert!(
            poller
                .window(Polling::Adaptive, paused_until + PAUSE)
                .is_some()
        );
    }
}
