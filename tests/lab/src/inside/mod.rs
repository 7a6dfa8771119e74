//! Runs a job where `/dev/kvm` is a real KVM: on this machine, or as a child of a nested host's
//! `/init`.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::job::{Event, Job};

/// Where events go.
pub(crate) struct Events(File);

impl Events {
    /// # Errors
    /// When the file can't be opened.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::options().append(true).open(path);
        Ok(Self(file.with_context(|| {
            format!("cannot open {}", path.display())
        })?))
    }

    /// Sends one event. A vanished listener doesn't stop the job.
    pub(crate) fn send(&mut self, event: &Event) {
        let mut line = serde_json::to_string(event).unwrap_or_default();
        line.push('\n');
        let _ = self.0.write_all(line.as_bytes());
    }
}

/// Runs the job and reports its end.
pub(crate) fn run(job: &Job, events: &mut Events) {
    let end = match execute(job) {
        Ok(code) => Event::End { code, error: None },
        Err(error) => Event::End {
            code: 1,
            error: Some(format!("{error:#}")),
        },
    };
    events.send(&end);
}

fn execute(job: &Job) -> Result<i32> {
    match job {
        Job::Command { argv } => command(argv),
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
