//! A report as one page: style, tables and plots are in it, and it loads nothing.

use std::fmt::Write as _;

use api::controller as pb;

use super::junit::escape;
use super::{Parts, plots, short, state, summary, time, verdict};

/// Looks alike on paper, in the light and in the dark.
const STYLE: &str = include_str!("report.css");

/// The page.
pub(crate) fn html(report: &pb::FaultReport) -> String {
    let parts = Parts::of(report);
    let found = verdict(parts.status.verdict());
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\
         <title>{name}: {found}</title><style>{STYLE}</style></head><body><main>\n",
        name = escape(&parts.name),
    );
    head(&mut page, &parts);
    figures(&mut page, &parts);
    section(&mut page, "Checks", &checks(report));
    section(
        &mut page,
        "What guests saw, and when",
        &plots::timeline(report),
    );
    let what = match report.stalls_from.as_str() {
        "" => "How long requests stood still".to_owned(),
        from => format!("How long requests stood still, as told by {from}"),
    };
    section(&mut page, "Stalls", &plots::histogram(&parts.stalls, &what));
    section(&mut page, "Blast radius", &plots::matrix(report));
    section(&mut page, "Faults", &faults(&parts));
    if !report.guests.is_empty() {
        section(&mut page, "Guests' verifiers", &guests(report));
    }
    if !report.probes.is_empty() {
        section(&mut page, "Probes", &probes(report));
    }
    let source = escape_lines(&parts.spec.source);
    if !source.is_empty() {
        let _ = write!(
            page,
            "<details><summary>The campaign</summary><pre>{source}</pre></details>"
        );
    }
    let _ = writeln!(
        page,
        "<footer>Mortise {}, run of {}</footer></main></body></html>",
        escape(&report.controller_version),
        crate::output::time(parts.status.start_time),
    );
    page
}

fn head(page: &mut String, parts: &Parts) {
    let found = verdict(parts.status.verdict());
    let _ = write!(
        page,
        "<header><h1>{}</h1><span id=\"verdict\" class=\"badge {found}\">{found}</span>\
         <p>{}</p></header>",
        escape(&parts.name),
        escape(&parts.spec.description),
    );
    if !parts.status.progress.is_empty() {
        let _ = write!(
            page,
            "<p class=\"note\">{}</p>",
            escape(&parts.status.progress)
        );
    }
    let _ = write!(
        page,
        "<p class=\"replay\">The same again: <code>{}</code></p>",
        escape(&parts.report.replay)
    );
}

/// The few numbers that people look for first.
fn figures(page: &mut String, parts: &Parts) {
    let hits: u64 = parts.status.hits.iter().map(|hits| hits.hits).sum();
    let figure = |value: f64, count: u64| match count {
        0 => "\u{2013}".to_owned(),
        _ => time(value),
    };
    let stalls = &parts.stalls;
    let recoveries = &parts.recoveries;
    let cells = [
        ("hits", hits.to_string()),
        ("stall p50", figure(stalls.p50_ms, stalls.count)),
        ("stall p99", figure(stalls.p99_ms, stalls.count)),
        ("stall max", figure(stalls.max_ms, stalls.count)),
        ("recovery p99", figure(recoveries.p99_ms, recoveries.count)),
        ("lasted", time(f64::from(parts.status.elapsed_ms))),
        ("seed", parts.spec.seed.to_string()),
    ];
    page.push_str("<dl class=\"figures\">");
    for (name, value) in cells {
        let _ = write!(page, "<div><dt>{name}</dt><dd>{value}</dd></div>");
    }
    page.push_str("</dl>");
}

fn section(page: &mut String, title: &str, content: &str) {
    let _ = writeln!(page, "<section><h2>{title}</h2>{content}</section>");
}

fn checks(report: &pb::FaultReport) -> String {
    let rows = report.checks.iter().map(|check| {
        let word = verdict(check.verdict());
        format!(
            "<tr><td><span class=\"badge {word}\">{word}</span></td><td>{}</td><td>{}</td></tr>",
            escape(&check.name),
            escape(&check.detail)
        )
    });
    table("<th></th><th>check</th><th>found</th>", rows.collect())
}

fn faults(parts: &Parts) -> String {
    let rows = parts.status.hits.iter().map(|hits| {
        format!(
            "<tr><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td>{}</td></tr>",
            escape(&hits.id),
            hits.begun,
            hits.seen,
            hits.hits,
            escape(&hits.problem)
        )
    });
    let rows = rows.collect();
    let recoveries = escape(&summary(&parts.recoveries));
    let state = state(&parts.status);
    format!(
        "{}<p class=\"note\">State: {state}. Recoveries, from the loss of a daemon to the end of the replay: {recoveries}.</p>",
        table(
            "<th>fault</th><th class=\"n\">begun</th><th class=\"n\">seen</th><th class=\"n\">hits</th><th>problem</th>",
            rows
        )
    )
}

fn guests(report: &pb::FaultReport) -> String {
    let rows = report.guests.iter().map(|guest| {
        let wrong = guest.lost + guest.torn + guest.misplaced + guest.foreign + guest.unanswered;
        let findings: Vec<String> = guest.findings.iter().map(|words| escape(words)).collect();
        format!(
            "<tr><td>{}/{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>\
             <td class=\"n {}\">{wrong}</td><td class=\"n\">{}</td><td>{}</td></tr>",
            escape(short(&guest.vm)),
            escape(&guest.device),
            guest.writes,
            guest.flushes,
            guest.reads,
            if wrong > 0 { "bad" } else { "" },
            guest.errors,
            findings.join("<br>"),
        )
    });
    table(
        "<th>disk</th><th class=\"n\">writes</th><th class=\"n\">flushes</th><th class=\"n\">compared</th>\
         <th class=\"n\">wrong</th><th class=\"n\">errors</th><th>findings</th>",
        rows.collect(),
    )
}

fn probes(report: &pb::FaultReport) -> String {
    let rows = report.probes.iter().map(|look| {
        let (class, word) = match look.holds {
            true => ("pass", "holds"),
            false => ("fail", "does not hold"),
        };
        format!(
            "<tr><td class=\"n\">{}</td><td>{}</td><td><span class=\"badge {class}\">{word}</span></td><td>{}</td></tr>",
            time(look.at_ms),
            escape(&look.id),
            escape(&look.detail)
        )
    });
    table(
        "<th class=\"n\">at</th><th>probe</th><th></th><th>found</th>",
        rows.collect(),
    )
}

fn table(head: &str, rows: Vec<String>) -> String {
    format!(
        "<div class=\"wide\"><table><thead><tr>{head}</tr></thead><tbody>{}</tbody></table></div>",
        rows.concat()
    )
}

fn escape_lines(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(escape).collect();
    lines.join("\n")
}
