//! A report as text.

use std::fmt::Write as _;

use api::controller as pb;

use super::{Parts, short, state, summary, time, verdict};

/// For a terminal.
pub(crate) fn terminal(report: &pb::FaultReport, colours: bool) -> String {
    let parts = Parts::of(report);
    let mut text = String::new();
    let found = parts.status.verdict();
    let _ = writeln!(
        text,
        "{}: {} ({}, {})",
        parts.name,
        paint(verdict(found).to_uppercase().as_str(), found, colours),
        state(&parts.status),
        time(f64::from(parts.status.elapsed_ms)),
    );
    for (name, value) in [
        ("seed", parts.spec.seed.to_string()),
        ("again", report.replay.clone()),
        (
            "stalls",
            format!("{} ({})", summary(&parts.stalls), from(report)),
        ),
        ("recoveries", summary(&parts.recoveries)),
    ] {
        let _ = writeln!(text, "  {name:<11}{value}");
    }
    let _ = writeln!(text, "\nCHECKS");
    for check in &report.checks {
        let word = format!("{:<13}", verdict(check.verdict()));
        let word = paint(&word, check.verdict(), colours);
        let _ = writeln!(text, "  {word}{:<14}{}", check.name, check.detail);
    }
    let _ = writeln!(text, "\nDEVICES");
    for device in &report.devices {
        let stalls: Vec<f64> = device
            .outages
            .iter()
            .filter(|outage| outage.ended_ms > 0.0)
            .map(|outage| outage.ended_ms - outage.began_ms)
            .collect();
        let longest = stalls.iter().copied().fold(0.0, f64::max);
        let role = match (device.targeted, device.touched.is_empty()) {
            (true, _) => "target",
            (false, true) => "untouched",
            (false, false) => "TOUCHED",
        };
        let _ = writeln!(
            text,
            "  {:<24}{role:<11}{} outages, longest {}, {} errors, {} restarts",
            format!("{}/{}", short(&device.vm), device.device),
            device.outages.len(),
            time(longest),
            device.errors,
            device.restarts
        );
    }
    if !report.guests.is_empty() {
        let _ = writeln!(text, "\nGUESTS' VERIFIERS");
    }
    for guest in &report.guests {
        let bad = guest.lost + guest.torn + guest.misplaced + guest.foreign + guest.unanswered;
        let _ = writeln!(
            text,
            "  {:<24}{} writes, {} flushes, {} blocks compared: {bad} wrong, {} errors{}",
            format!("{}/{}", short(&guest.vm), guest.device),
            guest.writes,
            guest.flushes,
            guest.reads,
            guest.errors,
            if guest.finished { "" } else { "; not done" },
        );
        for finding in guest.findings.iter().take(3) {
            let _ = writeln!(text, "      {finding}");
        }
    }
    text
}

fn from(report: &pb::FaultReport) -> String {
    match report.stalls_from.as_str() {
        "" => "not known".to_owned(),
        from => format!("by {from}"),
    }
}

fn paint(text: &str, found: pb::FaultVerdict, colours: bool) -> String {
    let code = match found {
        pb::FaultVerdict::Pass => 32,
        pb::FaultVerdict::Fail => 31,
        _ => 33,
    };
    match colours {
        true => format!("\x1b[{code}m{text}\x1b[0m"),
        false => text.to_owned(),
    }
}
