//! Many disks in one process: what they get together, what each costs in memory, and whether they
//! let the machine sleep.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;

use super::super::ground::{self, Ground, Medium};
use super::super::process::{self, Daemon, Driver, Load, LoadProgram};
use super::super::report::{Better, Row, Series};
use super::super::rounds::{Contender, RowSpec, Samples, Verdict};
use super::super::{Effort, Session, interrupt};
use super::serving::{self, Disk};
use super::{OURS, QD32};
use crate::memory;
use crate::progress::step;

const DISKS: usize = 64;
/// In flight over all disks.
const DEPTH: u32 = 128;

const ONE_DISK: &str = "one-disk";
const PROCESSES: &str = "64-processes";

/// Of the same load on one disk, or on as many processes.
const SUM_TARGET: f64 = 0.9;
const MEGABYTES_TARGET: f64 = 1.5;

pub(super) fn run(session: &mut Session) -> Result<()> {
    for medium in Medium::ALL {
        throughput(session, medium)?;
    }
    idle(session)
}

fn throughput(session: &mut Session, medium: Medium) -> Result<()> {
    let rows = throughput_rows(medium);
    if !session.wants(&rows) {
        return Ok(());
    }
    step(format_args!("{}: {DISKS} disks", medium.name()));
    let samples = Stand::set_up(session.ground()?, medium, &session.effort)
        .and_then(|stand| stand.compare(session.effort.rounds));
    session.add(&rows, samples)
}

fn throughput_rows(medium: Medium) -> Vec<RowSpec> {
    let row = |case: &str, peer: &str| RowSpec {
        case: format!("{}/{DISKS}-disks/{case}", medium.name()),
        peers: vec![ONE_DISK, PROCESSES],
        verdict: Verdict::Target {
            value: SUM_TARGET,
            peer: Some(peer.to_owned()),
        },
        ..RowSpec::default()
    };
    vec![
        row("randread-4k/qd128-in-sum/one-disk", ONE_DISK),
        row("randread-4k/qd128-in-sum/64-processes", PROCESSES),
    ]
}

/// The same bytes as one disk, as 64 disks of one process, and as 64 disks of a process each.
struct Stand {
    one: Daemon,
    many: Daemon,
    processes: Vec<Daemon>,
    load: LoadProgram,
}

impl Stand {
    fn set_up(ground: &Ground, medium: Medium, effort: &Effort) -> Result<Self> {
        let (whole, bytes) = (ground.dir(medium).join("whole.img"), effort.image_bytes);
        ground::fill(&whole, bytes)?;
        let parts = small_images(ground, medium, "part", bytes / DISKS as u64)?;
        let others = small_images(ground, medium, "other", bytes / DISKS as u64)?;
        let processes = others.iter().enumerate().map(|(index, image)| {
            let disks = [Disk::new("disk", image, "")];
            serving::device_blk(ground, &format!("process-{index}"), &disks)
        });
        Ok(Self {
            one: serving::device_blk(ground, "one", &[Disk::new("disk", &whole, "")])?,
            many: many(ground, "many", &parts)?,
            processes: processes.collect::<Result<_>>()?,
            load: ground.load(effort),
        })
    }

    fn compare(&self, rounds: u32) -> Result<Samples> {
        let spread = Load {
            depth: DEPTH / DISKS as u32,
            ..QD32.load
        };
        let whole = Load {
            depth: DEPTH,
            ..QD32.load
        };
        let contenders = [
            Contender::new(OURS, || {
                self.load
                    .on_disks(&[&self.many], &paths(&self.many), Driver::Sleeping, spread)
            }),
            Contender::new(ONE_DISK, || {
                self.load
                    .on_disks(&[&self.one], &paths(&self.one), Driver::Sleeping, whole)
            }),
            Contender::new(PROCESSES, || {
                let daemons: Vec<&Daemon> = self.processes.iter().collect();
                let sockets: Vec<&Path> = daemons.iter().flat_map(|daemon| paths(daemon)).collect();
                self.load
                    .on_disks(&daemons, &sockets, Driver::Sleeping, spread)
            }),
        ];
        Samples::take(&contenders, rounds)
    }
}

fn idle(session: &mut Session) -> Result<()> {
    let wakeups = RowSpec {
        case: format!("idle/{DISKS}-disks/wake-ups"),
        unit: "context switches/s",
        better: Better::Lower,
        verdict: Verdict::Target {
            value: 0.0,
            peer: None,
        },
        ..RowSpec::default()
    };
    let megabytes = RowSpec {
        case: format!("memory/{DISKS}-disks/each-further"),
        unit: "MB PSS",
        better: Better::Lower,
        verdict: Verdict::Target {
            value: MEGABYTES_TARGET,
            peer: None,
        },
        ..RowSpec::default()
    };
    let specs = [wakeups, megabytes];
    if !session.wants(&specs) {
        return Ok(());
    }
    step(format_args!("{DISKS} idle disks"));
    let found = Quiet::measure(session.ground()?, &session.effort);
    interrupt::check()?;
    let values = found.map(|quiet| [quiet.wakeups_per_second, quiet.megabytes_each]);
    for (index, spec) in specs.iter().enumerate() {
        let row = match &values {
            Ok(values) => Row::new(spec, &[values[index]], &[] as &[Series], &[0.0]),
            Err(error) => Row::failed(spec, &format!("{error:#}")),
        };
        session.add_row(row);
    }
    Ok(())
}

/// What disks cost that have worked and are idle now, with their frontends still connected.
struct Quiet {
    wakeups_per_second: f64,
    megabytes_each: f64,
}

impl Quiet {
    fn measure(ground: &Ground, effort: &Effort) -> Result<Self> {
        const BYTES: u64 = 1 << 20;
        let load = ground.load(effort);
        let images = small_images(ground, Medium::FileDirect, "idle", BYTES)?;
        let one = many(ground, "idle-one", &images[..1])?;
        let holder = load.hold(&paths(&one), QD32.load)?;
        process::await_idle(one.pid())?;
        let (_, one_kib) = memory::sets_kib(one.pid())?;
        // Its image is wanted again, and its pages would be shared with the next process.
        drop((holder, one));

        let all = many(ground, "idle-all", &images)?;
        let _holder = load.hold(&paths(&all), QD32.load)?;
        process::await_idle(all.pid())?;
        let (_, all_kib) = memory::sets_kib(all.pid())?;
        let (before, began) = (process::context_switches(all.pid())?, Instant::now());
        std::thread::sleep(effort.idle);
        let switches = process::context_switches(all.pid())?.saturating_sub(before);
        Ok(Self {
            wakeups_per_second: switches as f64 / began.elapsed().as_secs_f64(),
            megabytes_each: (all_kib as f64 - one_kib as f64) * 1024.0 / 1e6 / (DISKS - 1) as f64,
        })
    }
}

fn many(ground: &Ground, name: &str, images: &[PathBuf]) -> Result<Daemon> {
    let disks: Vec<Disk> = images
        .iter()
        .enumerate()
        .map(|(index, image)| Disk::new(&format!("d{index}"), image, ""))
        .collect();
    serving::device_blk(ground, name, &disks)
}

fn small_images(ground: &Ground, medium: Medium, name: &str, bytes: u64) -> Result<Vec<PathBuf>> {
    (0..DISKS)
        .map(|index| {
            let image = ground.dir(medium).join(format!("{name}-{index}.img"));
            ground::fill(&image, bytes)?;
            Ok(image)
        })
        .collect()
}

fn paths(daemon: &Daemon) -> Vec<&Path> {
    daemon.sockets.iter().map(PathBuf::as_path).collect()
}
