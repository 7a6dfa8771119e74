//! From a guest to a tap of the host.

use anyhow::Result;

use super::super::Session;
use super::super::report::Better;
use super::super::rounds::{Contender, Metric, RowSpec, Samples, Verdict};
use super::rig::{Count, Rig};
use super::serving::{self, Bay};
use super::{OURS, VHOST_PMD};
use crate::progress::step;

/// The limit: one thread that writes to a tap and does nothing else.
const LIMIT: &str = "writev";
/// The least that the kernel takes: one thread that hands it the same packet, many with each call.
const KERNEL: &str = "io_uring";

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
    let cost = |case: String, ours: &'static str, verdict: Verdict| RowSpec {
        unit: "CPU s per million packets",
        better: Better::Lower,
        metric: Metric::CpuPerMillion,
        ours,
        ..row(case, verdict)
    };
    let cpu = format!("{case}/daemon-cpu");
    rows.push(cost(cpu.clone(), OURS, verdict(CPU_TARGET, None)));
    // Of a target below this, the kernel is the reason.
    rows.push(RowSpec {
        peers: vec![LIMIT],
        ..cost(format!("{cpu}/kernel-alone"), KERNEL, Verdict::Info)
    });
    rows
}

fn compare(bay: &Bay, session: &Session, len: usize) -> Result<Samples> {
    let effort = &session.effort;
    let ours = ours(bay, len)?;
    let vhost_pmd = vhost_pmd(bay, len)?;
    let limit = limit(bay, LIMIT, len, &[])?;
    let kernel = self::limit(bay, KERNEL, len, &["--batches"])?;
    let contenders = [
        Contender::new(OURS, || ours.measure(effort)),
        Contender::new(VHOST_PMD, || vhost_pmd.measure(effort)),
        Contender::new(LIMIT, || limit.measure(effort)),
        Contender::new(KERNEL, || kernel.measure(effort)),
    ];
    Samples::take(&contenders, effort.rounds)
}

fn ours(bay: &Bay, len: usize) -> Result<Rig> {
    let sockets = [bay.socket("tap-ours")];
    let nic = format!("id=nic,tap=ours,socket={}", sockets[0].display());
    let daemon = bay.device_net("tap-ours", &[nic], &sockets)?;
    let mut rig = Rig {
        daemons_rest: true,
        frontend: Some(bay.frontend("tap-ours-front", &sockets, &serving::sending(len))?),
        ..Rig::new(daemon, Count::AtTap("ours"))
    };
    rig.begin("start")?;
    Ok(rig)
}

fn vhost_pmd(bay: &Bay, len: usize) -> Result<Rig> {
    let sockets = [bay.socket("tap-vhost")];
    let tap = "net_tap0,iface=vhost".to_owned();
    let daemon = bay.vhost_pmd("tap-vhost", &sockets, &[tap], "io")?;
    let mut rig = Rig {
        frontend: Some(bay.frontend("tap-vhost-front", &sockets, &serving::sending(len))?),
        ..Rig::new(daemon, Count::AtTap("vhost"))
    };
    rig.begin("start")?;
    Ok(rig)
}

/// Named as its tap.
fn limit(bay: &Bay, name: &'static str, len: usize, further: &[&str]) -> Result<Rig> {
    let bytes = len.to_string();
    let args = [&["tap-write", "--tap", name, "--bytes", &bytes], further].concat();
    let daemon = bay.load(&format!("tap-{name}"), bay.cpus.daemon, &args)?;
    let mut rig = Rig::new(daemon, Count::AtTap(name));
    rig.begin("")?;
    Ok(rig)
}
