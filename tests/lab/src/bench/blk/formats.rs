//! What qcow2 costs beside our own raw image of the same size.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::super::ground::{self, Ground, Medium};
use super::super::process::{Daemon, Driver, Load, LoadProgram};
use super::super::rounds::{Contender, RowSpec, Samples, Verdict};
use super::super::{Effort, Session};
use super::serving::{self, Disk};
use super::{BIG_READ, BIG_WRITE, Column, QD1, QD32};
use crate::progress::step;

const RAW: &str = "own-raw";
const QCOW2: &str = "qcow2";
const CHAIN: &str = "qcow2-chain-of-3";

/// Stretches of the chain that are in the same image.
const STRETCH_BYTES: u64 = 1 << 20;

/// Columns in which each is compared. Writing to a chain is left out: the first write to a cluster
/// copies it, the second finds it in the top image, so a bench sees no chain at all after a moment.
const PLAIN_COLUMNS: [Column; 4] = [QD1, QD32, BIG_READ, BIG_WRITE];
const CHAIN_COLUMNS: [Column; 3] = [QD1, QD32, BIG_READ];

const PLAIN_TARGET: f64 = 0.9;
const CHAIN_TARGET: f64 = 0.75;

pub(super) fn run(session: &mut Session, medium: Medium) -> Result<()> {
    let mut groups: Vec<(Column, bool, Vec<RowSpec>)> = PLAIN_COLUMNS
        .into_iter()
        .map(|column| {
            let has_chain = CHAIN_COLUMNS.iter().any(|other| other.name == column.name);
            (column, has_chain, rows(medium, column, has_chain))
        })
        .collect();
    groups.retain(|(_, _, rows)| session.wants(rows));
    if groups.is_empty() {
        return Ok(());
    }
    step(format_args!("{}: qcow2 images", medium.name()));
    let rounds = session.effort.rounds;
    let stand = Stand::set_up(session.ground()?, medium, &session.effort);
    for (column, has_chain, rows) in groups {
        let samples = match &stand {
            Ok(stand) => stand.compare(column.load, has_chain, rounds),
            Err(error) => Err(anyhow::anyhow!("{error:#}")),
        };
        session.add(&rows, samples)?;
    }
    Ok(())
}

fn rows(medium: Medium, column: Column, has_chain: bool) -> Vec<RowSpec> {
    let row = |ours: &'static str, value: f64| RowSpec {
        case: format!("{}/{ours}/{}", medium.name(), column.name),
        ours,
        peers: vec![RAW],
        verdict: Verdict::Target {
            value,
            peer: Some(RAW.to_owned()),
        },
        ..RowSpec::default()
    };
    let mut rows = vec![row(QCOW2, PLAIN_TARGET)];
    if has_chain {
        rows.push(row(CHAIN, CHAIN_TARGET));
    }
    rows
}

/// Images of the same content in one process of ours.
struct Stand {
    daemon: Daemon,
    load: LoadProgram,
}

impl Stand {
    fn set_up(ground: &Ground, medium: Medium, effort: &Effort) -> Result<Self> {
        let images = Images::make(ground, medium, effort.image_bytes / 2)?;
        let disks = [
            Disk::new("raw", &images.raw, "format=raw"),
            Disk::new("qcow2", &images.qcow2, "format=qcow2"),
            Disk::new("chain", &images.chain, "format=qcow2"),
        ];
        Ok(Self {
            daemon: serving::device_blk(ground, "formats", &disks)?,
            load: ground.load(effort),
        })
    }

    fn compare(&self, load: Load, has_chain: bool, rounds: u32) -> Result<Samples> {
        let names = [RAW, QCOW2, CHAIN];
        let disks = names.into_iter().zip(&self.daemon.sockets);
        let contenders: Vec<Contender> = disks
            .filter(|(name, _)| has_chain || *name != CHAIN)
            .map(|(name, socket)| {
                Contender::new(name, move || {
                    self.load
                        .on_disks(&[&self.daemon], &[socket], Driver::Sleeping, load)
                })
            })
            .collect();
        Samples::take(&contenders, rounds)
    }
}

struct Images {
    raw: PathBuf,
    qcow2: PathBuf,
    /// The top of three.
    chain: PathBuf,
}

impl Images {
    fn make(ground: &Ground, medium: Medium, bytes: u64) -> Result<Self> {
        let place = |name: &str| ground.dir(medium).join(name);
        let raw = place("formats.raw");
        ground::fill(&raw, bytes)?;
        let qcow2 = place("plain.qcow2");
        convert(ground, &raw, &qcow2)?;
        let base = place("base.qcow2");
        convert(ground, &raw, &base)?;
        let (middle, top) = (place("middle.qcow2"), place("top.qcow2"));
        overlay(ground, &base, &middle, bytes, 1)?;
        overlay(ground, &middle, &top, bytes, 2)?;
        Ok(Self {
            raw,
            qcow2,
            chain: top,
        })
    }
}

fn convert(ground: &Ground, raw: &Path, qcow2: &Path) -> Result<()> {
    let args = [
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        text(raw)?,
        text(qcow2)?,
    ];
    ground::run_tool(ground.image_tool("qemu-img")?, &args)?;
    ground::forget(&File::open(qcow2)?)
}

/// An image on top of another, in which every third stretch, from number `first` on, is its own.
fn overlay(ground: &Ground, base: &Path, image: &Path, bytes: u64, first: u64) -> Result<()> {
    let args = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        text(base)?,
        "-F",
        "qcow2",
        text(image)?,
    ];
    ground::run_tool(ground.image_tool("qemu-img")?, &args)?;
    let writes: String = (first..bytes / STRETCH_BYTES)
        .step_by(3)
        .map(|stretch| {
            let offset = stretch * STRETCH_BYTES;
            format!(
                "write -q -P {} {offset} {STRETCH_BYTES}\n",
                1 + stretch % 255
            )
        })
        .collect();
    ground::feed_tool(
        ground.image_tool("qemu-io")?,
        &["-f", "qcow2", text(image)?],
        &writes,
    )?;
    ground::forget(&File::open(image)?)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8; name another --dir", path.display()))
}
