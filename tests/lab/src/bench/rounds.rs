//! Contenders take turns in short rounds, so that whatever else the machine does hits them alike.

use anyhow::{Context, Result};
use serde::Deserialize;

use super::interrupt;
use super::report::{Better, Row, Series};

/// What is measured in turn: a daemon's disk, or a file.
pub(super) struct Contender<'a> {
    pub(super) name: &'static str,
    measure: Box<dyn Fn() -> Result<Sample> + 'a>,
}

/// What the load program reports of one run.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Sample {
    /// Requests or packets.
    pub(super) ios: u64,
    /// Of them, in a second.
    pub(super) iops: f64,
    pub(super) daemon_cpu_seconds: Option<f64>,
    pub(super) foreign_cpu: f64,
}

/// A row to be made from samples.
#[derive(Clone, Debug)]
pub(super) struct RowSpec {
    pub(super) case: String,
    pub(super) unit: &'static str,
    pub(super) better: Better,
    pub(super) metric: Metric,
    /// The contender that the row is about.
    pub(super) ours: &'static str,
    pub(super) peers: Vec<&'static str>,
    pub(super) verdict: Verdict,
}

/// Which figure of a sample counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Metric {
    Iops,
    /// CPU seconds of the daemon per million requests.
    CpuPerMillion,
}

/// What is demanded of a row.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Verdict {
    Info,
    /// The ratio to `peer`, or our median without one.
    Target {
        value: f64,
        peer: Option<String>,
    },
}

/// Of all contenders, round by round.
#[derive(Debug)]
pub(super) struct Samples {
    names: Vec<&'static str>,
    rounds: Vec<Vec<Sample>>,
}

impl Default for RowSpec {
    fn default() -> Self {
        Self {
            case: String::new(),
            unit: "iops",
            better: Better::Higher,
            metric: Metric::Iops,
            ours: "ours",
            peers: Vec::new(),
            verdict: Verdict::Info,
        }
    }
}

impl<'a> Contender<'a> {
    pub(super) fn new(name: &'static str, measure: impl Fn() -> Result<Sample> + 'a) -> Self {
        Self {
            name,
            measure: Box::new(measure),
        }
    }
}

impl Samples {
    /// Lets the contenders run, `rounds` times in turn, and in each round another one first.
    ///
    /// # Errors
    /// When a run fails, or somebody wants the end.
    pub(super) fn take(contenders: &[Contender], rounds: u32) -> Result<Self> {
        let mut taken = Vec::new();
        for round in 0..rounds as usize {
            let mut samples: Vec<Option<Sample>> = vec![None; contenders.len()];
            for turn in 0..contenders.len() {
                interrupt::check()?;
                let index = (round + turn) % contenders.len();
                let contender = &contenders[index];
                let sample = (contender.measure)().with_context(|| contender.name.to_owned())?;
                samples[index] = Some(sample);
            }
            taken.push(samples.into_iter().flatten().collect());
        }
        Ok(Self {
            names: contenders.iter().map(|contender| contender.name).collect(),
            rounds: taken,
        })
    }

    pub(super) fn row(&self, spec: &RowSpec) -> Row {
        let peers: Vec<Series> = spec
            .peers
            .iter()
            .map(|&name| Series {
                name: name.to_owned(),
                values: self.values(name, spec.metric),
            })
            .collect();
        let ours = self.values(spec.ours, spec.metric);
        Row::new(spec, &ours, &peers, &self.foreign(spec))
    }

    fn values(&self, name: &str, metric: Metric) -> Vec<f64> {
        let samples = self.rounds.iter().flat_map(|round| {
            let named = self.names.iter().zip(round);
            named.filter(|(found, _)| **found == name)
        });
        samples
            .map(|(_, sample)| match metric {
                Metric::Iops => sample.iops,
                Metric::CpuPerMillion => {
                    sample.daemon_cpu_seconds.unwrap_or(f64::NAN) * 1e6 / sample.ios.max(1) as f64
                }
            })
            .collect()
    }

    /// The worst share in each round: one disturbed contender makes the round's ratio wrong.
    fn foreign(&self, spec: &RowSpec) -> Vec<f64> {
        let counts = |name: &str| name == spec.ours || spec.peers.contains(&name);
        self.rounds
            .iter()
            .map(|round| {
                let named = self.names.iter().zip(round);
                named
                    .filter(|(name, _)| counts(name))
                    .map(|(_, sample)| sample.foreign_cpu)
                    .fold(0.0, f64::max)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn sample(iops: f64, foreign_cpu: f64) -> Sample {
        Sample {
            ios: iops as u64,
            iops,
            daemon_cpu_seconds: Some(0.5),
            foreign_cpu,
        }
    }

    #[test]
    fn contenders_take_turns() {
        let order = RefCell::new(Vec::new());
        let contender = |name, iops| {
            let order = &order;
            Contender::new(name, move || {
                order.borrow_mut().push(name);
                Ok(sample(iops, 0.0))
            })
        };
        let contenders = [contender("ours", 2e5), contender("limit", 1e5)];
        let samples = Samples::take(&contenders, 3).unwrap();
        let expected = ["ours", "limit", "limit", "ours", "ours", "limit"];
        assert_eq!(*order.borrow(), expected);
        assert_eq!(samples.values("limit", Metric::Iops), [1e5; 3]);
        assert_eq!(samples.values("ours", Metric::CpuPerMillion), [2.5; 3]);
    }

    #[test]
    fn the_most_disturbed_contender_counts() {
        let contenders = [
            Contender::new("ours", || Ok(sample(1.0, 0.01))),
            Contender::new("limit", || Ok(sample(1.0, 0.3))),
            Contender::new("other", || Ok(sample(1.0, 0.9))),
        ];
        let samples = Samples::take(&contenders, 1).unwrap();
        let spec = RowSpec {
            peers: vec!["limit"],
            ..RowSpec::default()
        };
        assert_eq!(samples.foreign(&spec), [0.3]);
    }

    #[test]
    fn a_failing_contender_is_named() {
        let contenders = [Contender::new("ours", || anyhow::bail!("no disk"))];
        let error = Samples::take(&contenders, 1).unwrap_err();
        assert_eq!(format!("{error:#}"), "ours: no disk");
    }

    #[test]
    fn what_the_load_prints_is_understood() {
        let text = r#"{"ios":7,"seconds":0.5,"iops":14.0,"driver_cpu_seconds":0.1,
            "daemon_cpu_seconds":null,"foreign_cpu":0.02}"#;
        let sample: Sample = serde_json::from_str(text).unwrap();
        assert_eq!((sample.iops, sample.daemon_cpu_seconds), (14.0, None));
    }
}
