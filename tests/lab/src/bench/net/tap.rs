//! From a guest to a tap of the host.

use anyhow::Result;

use super::super::Session;
use super::super::report::Better;
use super::super::rounds::{Contender, Metric, RowSpec, Samples, Verdict};
use super::rig::Rig;
use super::serving::Bay;
use super::{OURS, VHOST_PMD, namespace};
use crate::progress::step;

/// The limit: one thread that writes to a tap and does nothing else.
const LIMIT: &str = "writev";

/// Of the limit, and of the vhost PMD's way to a tap.
const LIMIT_TARGET: f64 = 0.95;
const VHOST_PMD_TARGET: f64 = 1.5;
/// CPU seconds of the daemon per million packets.
const CPU_TARGET: f64 = 0.5;

/// Lengths of packets, with what is demanded of them.
const LENGTHS: [(usize, bool); 2] = [(64, true), (1514, false)];

pub(super) fn run(session: &mut Session) -> Result<()> {
    for (len, has_target) in LENGTHS {
        let rows = rows(len, has_target);
        if !session.wants(&rows) {
            continue;
        }
        step(format_args!("guest to tap, {len} bytes"));
        let bay = Bay::open(session)?;
        let samples = compare(&bay, session, len);
        session.add(&rows, samples)?;
    }
    Ok(())
}

fn rows(len: usize, has_target: bool) -> Vec<RowSpec> {
    let case = format!("tap/tx-{len}");
    let verdict = |value: f64, peer: Option<&str>| match has_target {
        true => Verdict::Target {
            value,
            peer: peer.map(str::to_owned),
        },
        false => Verdict::Info,
    };
    let row = |case: String, verdict: Verdict| RowSpec {
        case,
        unit: "packets/s",
        peers: vec![LIMIT, VHOST_PMD],
        verdict,
        ..RowSpec::default()
    };
    let mut rows = vec![row(case.clone(), verdict(LIMIT_TARGET, Some(LIMIT)))];
    if has_target {
        let beside = format!("{case}/beside-{VHOST_PMD}");
        rows.push(row(beside, verdict(VHOST_PMD_TARGET, Some(VHOST_PMD))));
    }
    rows.push(RowSpec {
        unit: "CPU s per million packets",
        better: Better::Lower,
        metric: Metric::CpuPerMillion,
        ..row(format!("{case}/daemon-cpu"), verdict(CPU_TARGET, None))
    });
    rows
}

fn compare(bay: &Bay, session: &Session, len: usize) -> Result<Samples> {
    let txpkts = format!("--txpkts={len}");
    let options = ["--forward-mode=txonly".to_owned(), txpkts];

    let our_socket = bay.socket("tap-ours");
    let nic = format!("id=nic,tap=ours,socket={}", our_socket.display());
    let ours = bay.device_net("tap-ours", &[nic], &[our_socket.clone()])?;
    let mut our_frontend = bay.frontend("tap-ours-front", &[&our_socket], &options)?;
    our_frontend.tell("start")?;
    let ours = Rig {
        daemons: vec![ours.pid()],
        load: vec![our_frontend.process.pid()],
        daemons_rest: true,
        packets: Box::new(|| namespace::packets_to_host("ours")),
        last_words: Box::new(|| {
            format!(
                "{}; {}",
                ours.last_words(),
                our_frontend.process.last_words()
            )
        }),
    };
    ours.settle()?;

    let socket = bay.socket("tap-vhost");
    let tap = "net_tap0,iface=vhost".to_owned();
    let backend = bay.vhost_pmd("tap-vhost", &[socket.clone()], &[tap], "io")?;
    let mut frontend = bay.frontend("tap-vhost-front", &[&socket], &options)?;
    frontend.tell("start")?;
    let vhost_pmd = Rig {
        daemons: vec![backend.process.pid()],
        load: vec![frontend.process.pid()],
        daemons_rest: false,
        packets: Box::new(|| namespace::packets_to_host("vhost")),
        last_words: Box::new(|| {
            format!(
                "{}; {}",
                backend.process.last_words(),
                frontend.process.last_words()
            )
        }),
    };
    vhost_pmd.settle()?;

    let bytes = len.to_string();
    let args = ["tap-write", "--tap", LIMIT, "--bytes", &bytes];
    let writer = bay.load("tap-writev", bay.cpus.daemon, &args)?;
    let limit = Rig {
        daemons: vec![writer.pid()],
        load: Vec::new(),
        daemons_rest: false,
        packets: Box::new(|| namespace::packets_to_host(LIMIT)),
        last_words: Box::new(|| writer.last_words()),
    };
    limit.settle()?;

    let contenders = [
        Contender::new(OURS, || ours.measure(&session.effort)),
        Contender::new(VHOST_PMD, || vhost_pmd.measure(&session.effort)),
        Contender::new(LIMIT, || limit.measure(&session.effort)),
    ];
    Samples::take(&contenders, session.effort.rounds)
}
