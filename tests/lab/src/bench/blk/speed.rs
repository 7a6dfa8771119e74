//! Requests per second and CPU time per request of a raw image.

use std::path::PathBuf;

use anyhow::Result;

use super::super::ground::{self, Ground, Medium};
use super::super::process::{Daemon, Driver, Load, LoadProgram, Ring};
use super::super::report::Better;
use super::super::rounds::{Contender, Metric, RowSpec, Samples, Verdict};
use super::super::{Effort, Session};
use super::serving::{self, Disk};
use super::{
    BIG_READ, BIG_WRITE, Column, DEFERRED_LIMIT, LIMIT, OURS, QD1, QD32, QD128, STORAGE_DAEMON,
};
use crate::progress::step;

/// Ours, told never to poll.
const NEVER_POLLING: &str = "ours-polling-never";
/// Of no peer that runs beside us may we have less.
const BESIDE: f64 = 0.95;

/// A column and the share of the limit to reach.
fn columns(medium: Medium) -> [(Column, f64); 5] {
    let targets = match medium {
        Medium::FileDirect => [0.85, 1.0, 0.95, 1.0, 1.0],
        Medium::Tmpfs => [1.25, 0.85, 0.85, 0.95, 0.95],
    };
    let columns = [QD1, QD32, QD128, BIG_READ, BIG_WRITE];
    std::array::from_fn(|index| (columns[index], targets[index]))
}

/// CPU seconds of the daemon per million requests, at most.
fn cpu_target(medium: Medium) -> f64 {
    match medium {
        Medium::FileDirect => 4.5,
        Medium::Tmpfs => 3.0,
    }
}

/// What is compared in one group of rounds.
#[derive(Clone, Copy)]
enum Comparison {
    Speed(Column),
    /// The same, with a driver that takes no interrupts.
    BusyDriver(Column),
    Cost,
}

pub(super) fn run(session: &mut Session, medium: Medium) -> Result<()> {
    let mut groups: Vec<(Comparison, Vec<RowSpec>)> = columns(medium)
        .into_iter()
        .flat_map(|(column, target)| {
            let rows = speed_rows(medium, column, target);
            let busy_rows = vec![busy_row(medium, column)];
            [
                (Comparison::Speed(column), rows),
                (Comparison::BusyDriver(column), busy_rows),
            ]
        })
        .collect();
    groups.push((Comparison::Cost, cpu_rows(medium)));
    groups.retain(|(_, rows)| session.wants(rows));
    if groups.is_empty() {
        return Ok(());
    }
    step(format_args!("{}: raw image", medium.name()));
    let stand = Stand::set_up(session.ground()?, medium, &session.effort);
    for (comparison, rows) in groups {
        let samples = match &stand {
            Ok(stand) => stand.compare(comparison, session),
            Err(error) => Err(anyhow::anyhow!("{error:#}")),
        };
        session.add(&rows, samples)?;
    }
    Ok(())
}

fn speed_rows(medium: Medium, column: Column, target: f64) -> Vec<RowSpec> {
    let case = format!("{}/{}", medium.name(), column.name);
    let mut peers = vec![LIMIT, STORAGE_DAEMON];
    if medium == Medium::Tmpfs {
        peers.push(DEFERRED_LIMIT);
    }
    let against = |case: String, peer: &str, value: f64| RowSpec {
        case,
        peers: peers.clone(),
        verdict: Verdict::Target {
            value,
            peer: Some(peer.to_owned()),
        },
        ..RowSpec::default()
    };
    vec![
        against(case.clone(), LIMIT, target),
        against(
            format!("{case}/beside-{STORAGE_DAEMON}"),
            STORAGE_DAEMON,
            BESIDE,
        ),
    ]
}

fn busy_row(medium: Medium, column: Column) -> RowSpec {
    RowSpec {
        case: format!("{}/{}/busy-driver", medium.name(), column.name),
        peers: vec![STORAGE_DAEMON],
        ..RowSpec::default()
    }
}

fn cpu_rows(medium: Medium) -> Vec<RowSpec> {
    let case = format!("{}/{}/daemon-cpu", medium.name(), QD32.name);
    let row = |case: String, ours: &'static str, verdict: Verdict| RowSpec {
        case,
        unit: "CPU s per million I/O",
        better: Better::Lower,
        metric: Metric::CpuPerMillion,
        ours,
        peers: vec![STORAGE_DAEMON],
        verdict,
    };
    let absolute = Verdict::Target {
        value: cpu_target(medium),
        peer: None,
    };
    let beside = Verdict::Target {
        value: (100.0 / BESIDE).round() / 100.0,
        peer: Some(STORAGE_DAEMON.to_owned()),
    };
    vec![
        row(format!("{case}/polling-never"), NEVER_POLLING, absolute),
        row(
            format!("{case}/polling-never/beside-{STORAGE_DAEMON}"),
            NEVER_POLLING,
            beside,
        ),
        row(format!("{case}/polling-adaptive"), OURS, Verdict::Info),
    ]
}

/// An image and all that serve it.
struct Stand {
    medium: Medium,
    image: PathBuf,
    ours: Daemon,
    never_polling: Daemon,
    storage_daemon: Daemon,
    load: LoadProgram,
}

impl Stand {
    fn set_up(ground: &Ground, medium: Medium, effort: &Effort) -> Result<Self> {
        let image = ground.dir(medium).join("raw.img");
        ground::fill(&image, effort.image_bytes)?;
        // Ours would refuse a second writer of the same image, and rightly so.
        let second = ground.dir(medium).join("raw-2.img");
        ground::fill(&second, effort.image_bytes)?;
        let never = [Disk::new("never", &second, "polling=never")];
        Ok(Self {
            medium,
            ours: serving::device_blk(ground, OURS, &[Disk::new("adaptive", &image, "")])?,
            never_polling: serving::device_blk(ground, NEVER_POLLING, &never)?,
            storage_daemon: serving::storage_daemon(ground, &image, medium)?,
            image,
            load: ground.load(effort),
        })
    }

    fn compare(&self, comparison: Comparison, session: &Session) -> Result<Samples> {
        let rounds = session.effort.rounds;
        match comparison {
            Comparison::Speed(column) => self.compare_speed(column.load, rounds),
            Comparison::BusyDriver(column) => {
                let of = |name, daemon| self.contender(name, daemon, Driver::Busy, column.load);
                let contenders = [
                    of(OURS, &self.ours),
                    of(STORAGE_DAEMON, &self.storage_daemon),
                ];
                Samples::take(&contenders, session.few_rounds())
            }
            Comparison::Cost => {
                let of = |name, daemon| self.contender(name, daemon, Driver::Sleeping, QD32.load);
                let contenders = [
                    of(OURS, &self.ours),
                    of(NEVER_POLLING, &self.never_polling),
                    of(STORAGE_DAEMON, &self.storage_daemon),
                ];
                Samples::take(&contenders, rounds)
            }
        }
    }

    fn compare_speed(&self, load: Load, rounds: u32) -> Result<Samples> {
        let of = |name, daemon| self.contender(name, daemon, Driver::Sleeping, load);
        let mut contenders = vec![
            of(OURS, &self.ours),
            self.limit(LIMIT, Ring::Plain, load),
            of(STORAGE_DAEMON, &self.storage_daemon),
        ];
        if self.medium == Medium::Tmpfs {
            contenders.push(self.limit(DEFERRED_LIMIT, Ring::Deferred, load));
        }
        Samples::take(&contenders, rounds)
    }

    fn limit(&self, name: &'static str, ring: Ring, load: Load) -> Contender<'_> {
        Contender::new(name, move || {
            let direct = self.medium.is_direct();
            self.load.on_file(&self.image, direct, ring, load)
        })
    }

    fn contender<'a>(
        &'a self,
        name: &'static str,
        daemon: &'a Daemon,
        driver: Driver,
        load: Load,
    ) -> Contender<'a> {
        Contender::new(name, move || {
            let sockets = [daemon.sockets[0].as_path()];
            self.load.on_disks(&[daemon], &sockets, driver, load)
        })
    }
}
