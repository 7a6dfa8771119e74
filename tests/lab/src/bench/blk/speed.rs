//! Requests per second and CPU time per request of a raw image.

use std::path::PathBuf;

use anyhow::Result;

use super::super::Session;
use super::super::ground::{self, Ground, Medium};
use super::super::process::{Daemon, Load, LoadProgram};
use super::super::report::Better;
use super::super::rounds::{Contender, Metric, RowSpec, Samples, Verdict};
use super::serving::{self, Disk};
use super::{BIG_READ, BIG_WRITE, BUSY, Column, LIMIT, OURS, QD1, QD32, QD128, STORAGE_DAEMON};
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

pub(super) fn run(session: &mut Session, medium: Medium) -> Result<()> {
    let cpu = cpu_rows(medium);
    let mut groups: Vec<(Column, bool, Vec<RowSpec>)> = columns(medium)
        .into_iter()
        .map(|(column, target)| (column, false, speed_rows(medium, column, target)))
        .collect();
    groups.push((QD32, true, cpu));
    groups.retain(|(_, _, rows)| session.wants(rows));
    if groups.is_empty() {
        return Ok(());
    }
    step(format_args!("{}: raw image", medium.name()));
    let effort = session.effort;
    let stand = Stand::set_up(
        session.ground()?,
        medium,
        effort.image_bytes,
        effort.seconds,
    );
    for (column, is_cpu, rows) in groups {
        let samples = match &stand {
            Ok(stand) if is_cpu => stand.compare_cost(column.load, effort.rounds),
            Ok(stand) => stand.compare_speed(column.load, effort.rounds),
            Err(error) => Err(anyhow::anyhow!("{error:#}")),
        };
        session.add(&rows, samples)?;
    }
    Ok(())
}

fn speed_rows(medium: Medium, column: Column, target: f64) -> Vec<RowSpec> {
    let case = format!("{}/{}", medium.name(), column.name);
    let against = |case: String, peer: &str, value: f64| RowSpec {
        case,
        peers: vec![LIMIT, STORAGE_DAEMON],
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
    fn set_up(ground: &Ground, medium: Medium, bytes: u64, seconds: f64) -> Result<Self> {
        let image = ground.dir(medium).join("raw.img");
        ground::fill(&image, bytes)?;
        // Ours would refuse a second writer of the same image, and rightly so.
        let second = ground.dir(medium).join("raw-2.img");
        ground::fill(&second, bytes)?;
        let never = [Disk::new("never", &second, "polling=never")];
        Ok(Self {
            medium,
            ours: serving::device_blk(ground, OURS, &[Disk::new("adaptive", &image, "")])?,
            never_polling: serving::device_blk(ground, NEVER_POLLING, &never)?,
            storage_daemon: serving::storage_daemon(ground, &image, medium)?,
            image,
            load: ground.load(seconds),
        })
    }

    fn compare_speed(&self, load: Load, rounds: u32) -> Result<Samples> {
        let contenders = [
            self.contender(OURS, &self.ours, load),
            Contender::new(LIMIT, move || {
                let direct = self.medium.is_direct();
                self.load.on_file(&self.image, direct, load)
            }),
            self.contender(STORAGE_DAEMON, &self.storage_daemon, load),
        ];
        Samples::take(&contenders, rounds)
    }

    fn compare_cost(&self, load: Load, rounds: u32) -> Result<Samples> {
        let contenders = [
            self.contender(OURS, &self.ours, load),
            self.contender(NEVER_POLLING, &self.never_polling, load),
            self.contender(STORAGE_DAEMON, &self.storage_daemon, load),
        ];
        Samples::take(&contenders, rounds)
    }

    fn contender<'a>(
        &'a self,
        name: &'static str,
        daemon: &'a Daemon,
        load: Load,
    ) -> Contender<'a> {
        Contender::new(name, move || {
            let sockets = [daemon.sockets[0].as_path()];
            self.load.on_disks(&[daemon], &sockets, BUSY, load)
        })
    }
}
