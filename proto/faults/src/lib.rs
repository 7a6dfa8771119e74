//! Rules of fault injection: which events of a process are hit, how often, for how long. What is
//! then done is the business of whoever asked.
//!
//! ```text
//!  control socket ── arm, disarm, list ──► Faults ── armed points ──► DeviceFaults ◄── is_armed, strike ── hooks
//!                                            │  ▲                         │
//!                                   timer thread: ends what has expired   └─ wakers: look again, something changed
//! ```
//!
//! A hook asks [`DeviceFaults::is_armed`] first, one relaxed load that says no in every process where
//! nothing is armed for that device, and only then describes the [`Event`] to
//! [`DeviceFaults::strike`].
//!
//! The n-th event that a rule sees is hit or not by the seed and n alone, so that a seed repeats what it did
//! as far as the events repeat. Time is `CLOCK_MONOTONIC` and handed in by the caller.

mod action;
mod clock;
mod device;
mod event;
mod process;
mod rule;
mod trigger;

pub use action::{Action, Point, TornEnd};
pub use clock::{crash, hang, monotonic_ns, wait};
pub use device::{DeviceFaults, Strike, Wake};
pub use event::{Event, Op, Selector};
pub use process::{ArmError, Arming, ArmingState, Faults, Kind, MAX_ARMINGS, MAX_RULES};
pub use rule::{Hit, LAST_HITS, Rule, RuleStatus};
pub use trigger::{Trigger, scramble};
