//! Runs a job where `/dev/kvm` is a real KVM: on this machine, or as a child of a nested host's
//! `/init`.

pub(crate) mod child;
mod demo;
mod neighbour;
pub(crate) mod test_run;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::job::{Event, Job};

/// Where events go.
pub(crate) struct Events<'a>(Box<dyn FnMut(&Event) + 'a>);

impl<'a> Events<'a> {
    /// Hands each event to a function.
    pub(crate) fn to(receiver: impl FnMut(&Event) + 'a) -> Self {
        Self(Box::new(receiver))
    }

    /// Writes each event as a line. A vanished listener doesn't stop the job.
    ///
    /// # Errors
    /// When the file can't be opened.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::options().append(true).open(path);
        let mut file = file.with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self::to(move |event| {
            let mut line = serde_json::to_string(event).unwrap_or_default();
            line.push('\n');
            let _ = file.write_all(line.as_bytes());
        }))
    }

    /// Tells people what comes next.
    pub(crate) fn step(&mut self, text: impl std::fmt::Display) {
        self.send(&Event::Step {
            text: text.to_string(),
        });
    }

    /// Sends one event.
    pub(crate) fn send(&mut self, event: &Event) {
        (self.0)(event);
    }
}

/// Runs the job and returns its exit code.
///
/// # Errors
/// When the job itself could not run.
pub(crate) fn run(job: &Job, events: &mut Events) -> Result<i32> {
    match job {
        Job::Command { argv } => command(argv),
        Job::Demo { site, by_hand } => demo::run(site, *by_hand, events),
        Job::Neighbour { site } => neighbour::run(site),
        Job::Tests {
            site,
            binary,
            filter,
            two_hosts,
            long,
            times,
            done,
        } => {
            let is_wanted =
                |name: &str| name.contains(filter) && test_run::needs_two_hosts(name) == *two_hosts;
            let times_left = |name: &str| match is_wanted(name) {
                true => times.saturating_sub(done.iter().filter(|ran| *ran == name).count() as u32),
                false => 0,
            };
            test_run::run(site, binary, times_left, *long, events)
        }
    }
}

fn command(argv: &[String]) -> Result<i32> {
    ensure!(!argv.is_empty(), "no command given");
    let status = Command::new(&argv[0])
        .args(&argv[1..])
        .status()
        .with_context(|| format!("cannot run {}", argv[0]))?;
    Ok(status.code().unwrap_or(1))
}
