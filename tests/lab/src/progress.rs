//! What a person watching `cargo lab` sees: one line a step, with the time since the start.

use std::sync::OnceLock;
use std::time::Instant;

static START: OnceLock<Instant> = OnceLock::new();

/// Starts the clock of [`step`].
pub(crate) fn start() {
    START.get_or_init(Instant::now);
}

/// Prints one step. Standard output stays free for results.
pub(crate) fn step(text: impl std::fmt::Display) {
    let elapsed = START.get_or_init(Instant::now).elapsed().as_secs_f64();
    eprintln!("lab [{elapsed:6.1} s] {text}");
}
