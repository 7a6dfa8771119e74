//! What came of a fault experiment, for people and programs.
//!
//! ```text
//! terminal  text          junit  XML for CI
//! html      one page that needs nothing else; plots: its pictures
//! ```

use api::controller as pb;

mod html;
mod junit;
mod plots;
mod terminal;

pub(crate) use html::html;
pub(crate) use junit::junit;
pub(crate) use terminal::terminal;

/// Whether nothing more will become of it.
pub(crate) fn is_over(status: &pb::FaultExperimentStatus) -> bool {
    matches!(
        status.state(),
        pb::FaultExperimentState::Done
            | pb::FaultExperimentState::Stopped
            | pb::FaultExperimentState::Failed
    )
}

/// Its state in a word.
pub(crate) fn state(status: &pb::FaultExperimentStatus) -> String {
    crate::output::word(status.state().as_str_name(), "FAULT_EXPERIMENT_STATE_")
}

/// A verdict in a word.
pub(crate) fn verdict(verdict: pb::FaultVerdict) -> &'static str {
    match verdict {
        pb::FaultVerdict::Unspecified => "-",
        pb::FaultVerdict::Pass => "pass",
        pb::FaultVerdict::Fail => "fail",
        pb::FaultVerdict::Inconclusive => "inconclusive",
    }
}

/// `12 ms`, `1.2 s`, `250 us`
fn time(ms: f64) -> String {
    match ms {
        0.0 => "0".to_owned(),
        ms if ms < 1.0 => format!("{:.0} us", ms * 1000.0),
        ms if ms < 10.0 => format!("{ms:.1} ms"),
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        ms if ms < 10_000.0 => format!("{:.2} s", ms / 1000.0),
        ms => format!("{:.0} s", ms / 1000.0),
    }
}

/// Parts of a report that every form shows, unset ones as empty.
struct Parts<'a> {
    report: &'a pb::FaultReport,
    name: String,
    spec: pb::FaultExperimentSpec,
    status: pb::FaultExperimentStatus,
    stalls: pb::StallSummary,
    recoveries: pb::StallSummary,
}

impl<'a> Parts<'a> {
    fn of(report: &'a pb::FaultReport) -> Self {
        let experiment = report.experiment.clone().unwrap_or_default();
        Self {
            report,
            name: crate::output::id(&experiment.name),
            spec: experiment.spec.unwrap_or_default(),
            status: experiment.status.unwrap_or_default(),
            stalls: report.stalls.clone().unwrap_or_default(),
            recoveries: report.recoveries.clone().unwrap_or_default(),
        }
    }
}

/// `p50 12 ms, p99 80 ms, max 95 ms of 14`
fn summary(summary: &pb::StallSummary) -> String {
    match summary.count {
        0 => "none".to_owned(),
        count => format!(
            "p50 {}, p99 {}, max {} of {count}",
            time(summary.p50_ms),
            time(summary.p99_ms),
            time(summary.max_ms)
        ),
    }
}

/// The last part of a VM's name.
fn short(vm: &str) -> &str {
    vm.rsplit('/').next().unwrap_or(vm)
}

#[cfg(test)]
mod tests;
