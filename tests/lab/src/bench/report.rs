//! What a bench found: rows for people and for programs.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::rounds::{RowSpec, Verdict};

/// A round in which others took a larger share of the CPUs is not quiet.
pub(super) const NOISE: f64 = 0.05;

/// All rows of a bench.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    bench: String,
    commit: String,
    machine: String,
    /// Share of all CPUs' time that went elsewhere before anything was measured.
    pub(super) foreign_before: f64,
    pub(super) rows: Vec<Row>,
    /// What rows were made of, where that is worth keeping: each kill of a storm.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    events: BTreeMap<String, Vec<serde_json::Value>>,
}

/// One figure, ours and the others'.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Row {
    pub(super) case: String,
    unit: &'static str,
    better: Better,
    ours: Option<Spread>,
    peers: BTreeMap<String, Spread>,
    /// Median over rounds of ours divided by the peer's in the same round.
    ratio: BTreeMap<String, f64>,
    /// Median over rounds of the share of all CPUs' time that neither contender nor load took.
    foreign_cpu: f64,
    rounds: usize,
    /// Rounds in which others took more than [`NOISE`].
    noisy_rounds: usize,
    #[serde(flatten)]
    judgement: Judgement,
    /// Why there are no figures.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
enum Judgement {
    Target {
        target: f64,
        target_peer: Option<String>,
        met: bool,
    },
    Info {
        info: bool,
    },
}

/// Which direction is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Better {
    Higher,
    Lower,
}

/// Over rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Spread {
    min: f64,
    pub(super) median: f64,
    max: f64,
}

/// The figures of one contender, round by round.
#[derive(Debug)]
pub(super) struct Series {
    pub(super) name: String,
    pub(super) values: Vec<f64>,
}

impl Report {
    pub(super) fn new(bench: &str, machine: Option<String>) -> Self {
        Self {
            bench: bench.to_owned(),
            commit: super::ground::commit(),
            machine: machine.unwrap_or_default(),
            foreign_before: 0.0,
            rows: Vec::new(),
            events: BTreeMap::new(),
        }
    }

    /// Keeps what the rows of `name` were made of.
    pub(super) fn add_events(&mut self, name: &str, events: Vec<serde_json::Value>) {
        self.events.insert(name.to_owned(), events);
    }
}

impl Row {
    /// From ours, the peers' and the others' share, each round by round.
    pub(super) fn new(spec: &RowSpec, ours: &[f64], peers: &[Series], foreign: &[f64]) -> Self {
        let ratio: BTreeMap<_, _> = peers
            .iter()
            .filter_map(|peer| {
                let ratios: Vec<f64> = ours.iter().zip(&peer.values).map(|(a, b)| a / b).collect();
                Some((peer.name.clone(), rounded(median(&ratios)?)))
            })
            .collect();
        let ours = Spread::of(ours);
        let judgement = match &spec.verdict {
            Verdict::Info => Judgement::Info { info: true },
            Verdict::Target { value, peer } => {
                let held = match peer {
                    None => ours.map(|ours| ours.median),
                    Some(peer) => ratio.get(peer.as_str()).copied(),
                };
                Judgement::Target {
                    target: *value,
                    target_peer: peer.clone(),
                    met: held.is_some_and(|held| spec.better.reaches(held, *value)),
                }
            }
        };
        let peers = peers
            .iter()
            .filter_map(|peer| Some((peer.name.clone(), Spread::of(&peer.values)?)))
            .collect();
        Self {
            case: spec.case.clone(),
            unit: spec.unit,
            better: spec.better,
            ours,
            peers,
            ratio,
            foreign_cpu: rounded(median(foreign).unwrap_or(0.0)),
            rounds: foreign.len(),
            noisy_rounds: foreign.iter().filter(|&&share| share > NOISE).count(),
            judgement,
            error: None,
        }
    }

    /// Of a case that could not be measured: a target is not met.
    pub(super) fn failed(spec: &RowSpec, error: &str) -> Self {
        Self {
            error: Some(error.to_owned()),
            ..Self::new(spec, &[], &[], &[])
        }
    }

    /// One line, for whoever watches.
    pub(super) fn summary(&self) -> String {
        if let Some(error) = &self.error {
            return format!("{}: FAILED: {error}", self.case);
        }
        let ours = self.ours.map_or(f64::NAN, |ours| ours.median);
        let ratios: Vec<String> = self
            .ratio
            .iter()
            .map(|(peer, ratio)| format!("{ratio:.2} of {peer}"))
            .collect();
        let ratios = if ratios.is_empty() {
            String::new()
        } else {
            format!(", {}", ratios.join(", "))
        };
        let (figure, unit) = (figure(ours), self.unit);
        format!("{}: {figure} {unit}{ratios}{}", self.case, self.noise())
    }

    fn noise(&self) -> String {
        match self.noisy_rounds {
            0 => String::new(),
            count => format!(" ({count} of {} rounds not quiet)", self.rounds),
        }
    }

    /// The row's lines in the table: one for each peer that matters to it.
    fn cells(&self) -> Vec<[String; COLUMNS.len()]> {
        let text = |spread: Option<&Spread>, value: fn(&Spread) -> f64| {
            spread.map_or("-".to_owned(), |spread| figure(value(spread)))
        };
        let (target, target_peer) = match &self.judgement {
            Judgement::Target {
                target,
                target_peer,
                met,
            } => {
                let (sign, verdict) = (self.better.sign(), if *met { "yes" } else { "NO" });
                (
                    [format!("{sign} {target}"), verdict.to_owned()],
                    target_peer.as_deref(),
                )
            }
            Judgement::Info { .. } => (["-".to_owned(), "-".to_owned()], None),
        };
        let is_info = matches!(self.judgement, Judgement::Info { .. });
        let shown: Vec<Option<&str>> = match (is_info, target_peer) {
            (_, Some(peer)) => vec![Some(peer)],
            (true, None) if !self.peers.is_empty() => {
                self.peers.keys().map(|peer| Some(peer.as_str())).collect()
            }
            _ => vec![None],
        };
        let mut lines = Vec::new();
        for peer in shown {
            let spread = peer.and_then(|peer| self.peers.get(peer));
            let ratio = peer.and_then(|peer| self.ratio.get(peer));
            let is_first = lines.is_empty();
            let once = |text: String| if is_first { text } else { String::new() };
            lines.push([
                once(self.case.clone()),
                once(self.unit.to_owned()),
                once(text(self.ours.as_ref(), |ours| ours.min)),
                once(text(self.ours.as_ref(), |ours| ours.median)),
                once(text(self.ours.as_ref(), |ours| ours.max)),
                peer.unwrap_or("-").to_owned(),
                text(spread, |spread| spread.min),
                text(spread, |spread| spread.median),
                text(spread, |spread| spread.max),
                ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}")),
                once(target[0].clone()),
                once(target[1].clone()),
                once(format!("{:.1} %", self.foreign_cpu * 100.0)),
                once(format!("{}/{}", self.noisy_rounds, self.rounds)),
            ]);
        }
        lines
    }
}

const COLUMNS: [&str; 14] = [
    "CASE", "UNIT", "MIN", "MEDIAN", "MAX", "PEER", "MIN", "MEDIAN", "MAX", "RATIO", "TARGET",
    "MET", "FOREIGN", "NOISY",
];

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = vec![COLUMNS.map(str::to_owned)];
        lines.extend(self.rows.iter().flat_map(Row::cells));
        let mut widths = [0; COLUMNS.len()];
        for line in &lines {
            for (width, cell) in widths.iter_mut().zip(line) {
                *width = cell.chars().count().max(*width);
            }
        }
        for line in &lines {
            let cells: Vec<String> = line
                .iter()
                .zip(widths)
                .map(|(cell, width)| format!("{cell:<width$}"))
                .collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
        }
        for row in &self.rows {
            if let Some(error) = &row.error {
                writeln!(f, "{} failed: {error}", row.case)?;
            }
        }
        let (met, judged) =
            self.rows
                .iter()
                .fold((0, 0), |(met, judged), row| match row.judgement {
                    Judgement::Target { met: is_met, .. } => {
                        (met + usize::from(is_met), judged + 1)
                    }
                    Judgement::Info { .. } => (met, judged),
                });
        let noisy = self.rows.iter().filter(|row| row.noisy_rounds > 0).count();
        writeln!(
            f,
            "{met} of {judged} targets met at {} on {}",
            self.commit, self.machine
        )?;
        if self.foreign_before > NOISE {
            let share = self.foreign_before * 100.0;
            writeln!(
                f,
                "the machine was not quiet to begin with: others took {share:.0} % of the CPUs"
            )?;
        }
        if noisy > 0 {
            let share = NOISE * 100.0;
            writeln!(
                f,
                "{noisy} rows have rounds that were not quiet (others took more than {share:.0} % \
                 of the CPUs): where both contenders want a CPU of their own, such a round says little"
            )?;
        }
        Ok(())
    }
}

impl Better {
    fn reaches(self, value: f64, target: f64) -> bool {
        match self {
            Self::Higher => value >= target,
            Self::Lower => value <= target,
        }
    }

    fn sign(self) -> &'static str {
        match self {
            Self::Higher => ">=",
            Self::Lower => "<=",
        }
    }
}

impl Spread {
    fn of(values: &[f64]) -> Option<Self> {
        Some(Self {
            min: rounded(values.iter().copied().min_by(f64::total_cmp)?),
            median: rounded(median(values)?),
            max: rounded(values.iter().copied().max_by(f64::total_cmp)?),
        })
    }
}

/// Of an even number of values, the mean of the middle two.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    Some((sorted[sorted.len() / 2 - 1] + upper) / 2.0)
}

/// To four significant digits after the point at most: more is noise.
fn rounded(value: f64) -> f64 {
    if value.abs() >= 1000.0 {
        value.round()
    } else {
        (value * 1e4).round() / 1e4
    }
}

fn figure(value: f64) -> String {
    if value.abs() >= 1e6 {
        format!("{:.2}M", value / 1e6)
    } else if value.abs() >= 1000.0 {
        format!("{:.1}k", value / 1000.0)
    } else if value.abs() >= 100.0 || value.fract() == 0.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests;
