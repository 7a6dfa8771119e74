//! Tables, colours and figures for people.

use std::io::IsTerminal as _;
use std::time::{Duration, SystemTime};

use api::controller as pb;
use prost_types::Timestamp;

/// Prints rows under `header`, each column as wide as its widest cell.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) {
    print!("{}", render(header, rows, colours()));
}

fn render(header: &[&str], rows: &[Vec<String>], colours: bool) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let head: Vec<String> = header.iter().map(|cell| (*cell).to_owned()).collect();
    let mut text = line(&head, &widths, false);
    for row in rows {
        text.push_str(&line(row, &widths, colours));
    }
    text
}

fn line(row: &[String], widths: &[usize], colours: bool) -> String {
    let mut text = String::new();
    for (index, (cell, width)) in row.iter().zip(widths).enumerate() {
        let padding = if index + 1 == row.len() {
            0
        } else {
            width - cell.chars().count() + 2
        };
        text.push_str(&if colours { paint(cell) } else { cell.clone() });
        text.extend(std::iter::repeat_n(' ', padding));
    }
    text.push('\n');
    text
}

/// Words that say how something is; others stay as they are.
fn paint(word: &str) -> String {
    let code = match word {
        "running" | "ready" | "done" | "connected" | "served" => 32,
        "starting" | "stopping" | "pending" | "creating" | "paused" => 33,
        "failed" | "unreachable" => 31,
        _ => return word.to_owned(),
    };
    format!("\x1b[{code}m{word}\x1b[0m")
}

/// Only on a terminal, and not when NO_COLOR (no-color.org) is set.
pub(crate) fn colours() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty())
}

/// Prints `name: value` lines, aligned; empty values are left out.
pub(crate) fn fields(fields: &[(&str, String)]) {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    for (name, value) in fields {
        if !value.is_empty() {
            let value = if colours() {
                paint(value)
            } else {
                value.clone()
            };
            println!("{:width$} {value}", format!("{name}:"));
        }
    }
}

/// `VM_PHASE_RUNNING` as `running`.
pub(crate) fn word(name: &str, prefix: &str) -> String {
    name.trim_start_matches(prefix)
        .to_lowercase()
        .replace('_', "-")
}

/// A VM's phase.
pub(crate) fn phase(status: &pb::VmStatus) -> String {
    word(status.phase().as_str_name(), "VM_PHASE_")
}

/// `512 MiB`
pub(crate) fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = 0;
    let mut scaled = bytes as f64;
    while scaled >= 1024.0 && unit + 1 < units.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    if scaled.fract() < 0.05 {
        format!("{scaled:.0} {}", units[unit])
    } else {
        format!("{scaled:.1} {}", units[unit])
    }
}

/// `43 % of 10 GiB`
pub(crate) fn share(done: u64, total: u64) -> String {
    match (u128::from(done) * 100).checked_div(u128::from(total)) {
        Some(percent) => format!("{percent} % of {}", size(total)),
        None => size(done),
    }
}

/// How long ago, in its largest unit: `3m`.
pub(crate) fn age(time: Option<Timestamp>) -> String {
    let Some(time) = time.and_then(|time| SystemTime::try_from(time).ok()) else {
        return "-".to_owned();
    };
    duration(SystemTime::now().duration_since(time).unwrap_or_default())
}

fn duration(length: Duration) -> String {
    match length.as_secs() {
        seconds @ 0..60 => format!("{seconds}s"),
        seconds @ 60..3600 => format!("{}m", seconds / 60),
        seconds @ 3600..86_400 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

/// `2026-01-31T23:59:59Z`, or a hyphen.
pub(crate) fn time(time: Option<Timestamp>) -> String {
    time.map_or_else(
        || "-".to_owned(),
        |time| Timestamp { nanos: 0, ..time }.to_string(),
    )
}

/// The last part of a resource name.
pub(crate) fn id(name: &str) -> String {
    name.rsplit('/').next().unwrap_or_default().to_owned()
}

/// `text`, or a hyphen for nothing.
pub(crate) fn or_dash(text: &str) -> String {
    if text.is_empty() {
        "-".to_owned()
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_without_trailing_blanks() {
        let rows = vec![
            vec!["a".into(), "running".into()],
            vec!["longer".into(), "x".into()],
        ];
        assert_eq!(
            render(&["NAME", "PHASE"], &rows, false),
            "NAME    PHASE\na       running\nlonger  x\n"
        );
    }

    #[test]
    fn colours_do_not_move_columns() {
        let rows = vec![vec!["running".into(), "x".into()]];
        assert_eq!(
            render(&["PHASE", "Y"], &rows, true),
            "PHASE    Y\n\x1b[32mrunning\x1b[0m  x\n"
        );
    }

    #[test]
    fn figures_read_well() {
        assert_eq!(size(512 << 20), "512 MiB");
        assert_eq!(size(1_610_612_736), "1.5 GiB");
        assert_eq!(size(0), "0 B");
        assert_eq!(duration(Duration::from_secs(3 * 3600 + 5)), "3h");
        assert_eq!(
            time(Some(Timestamp {
                seconds: 0,
                nanos: 5
            })),
            "1970-01-01T00:00:00Z"
        );
    }
}
