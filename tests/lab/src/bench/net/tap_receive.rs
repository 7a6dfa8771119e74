//! From a tap of the host to a guest, while something on the host sends as fast as it can.
//!
//! Sender and frontend share a CPU, for the daemon has the other. They take short turns, and the frontend, which
//! polls, gets a quarter of it: receiving takes less.

use anyhow::Result;

use super::super::Session;
use super::super::process::Daemon;
use super::super::report::Better;
use super::super::rounds::{Contender, Metric, RowSpec, Samples, Verdict};
use super::rig::{Count, Rig};
use super::serving::Bay;
use super::{OURS, VHOST_PMD, turns};
use crate::progress::step;

/// The limit: one thread that reads from a tap and does nothing else.
const LIMIT: &str = "readv";
/// Packets per second: three times what Cloud Hypervisor's daemon was seen to do.
const TARGET: f64 = 0.75e6;

/// Weighs a third of what the sender does.
const FRONTEND_NICE: i32 = 5;

const LENGTHS: [(usize, bool); 2] = [(64, true), (1514, false)];

pub(super) fn run(session: &mut Session) -> Result<()> {
    for (len, has_target) in LENGTHS {
        let rows = rows(len, has_target);
        if !session.wants(&rows) {
            continue;
        }
        step(format_args!("tap to guest, {len} bytes"));
        let bay = Bay::open(session)?;
        let samples = compare(&bay, session, len);
        session.add(&rows, samples)?;
    }
    Ok(())
}

fn rows(len: usize, has_target: bool) -> Vec<RowSpec> {
    let case = format!("tap/rx-{len}");
    let row = |case: String, verdict: Verdict| RowSpec {
        case,
        unit: "packets/s",
        peers: vec![LIMIT, VHOST_PMD],
        verdict,
        ..RowSpec::default()
    };
    let target = Verdict::Target {
        value: TARGET,
        peer: None,
    };
    vec![
        row(
            case.clone(),
            if has_target { target } else { Verdict::Info },
        ),
        RowSpec {
            unit: "CPU s per million packets",
            better: Better::Lower,
            metric: Metric::CpuPerMillion,
            ..row(format!("{case}/daemon-cpu"), Verdict::Info)
        },
    ]
}

fn compare(bay: &Bay, session: &Session, len: usize) -> Result<Samples> {
    let effort = &session.effort;
    let ours = ours(bay, len)?;
    let vhost_pmd = vhost_pmd(bay, len)?;
    let limit = limit(bay, len)?;
    let contenders = [
        Contender::new(OURS, || ours.measure(effort)),
        Contender::new(VHOST_PMD, || vhost_pmd.measure(effort)),
        Contender::new(LIMIT, || limit.measure(effort)),
    ];
    Samples::take(&contenders, effort.rounds)
}

fn ours(bay: &Bay, len: usize) -> Result<Rig> {
    let sockets = [bay.socket("rx-ours")];
    let nic = format!("id=nic,tap=rxours,socket={}", sockets[0].display());
    let daemon = bay.device_net("rx-ours", &[nic], &sockets)?;
    let mut rig = Rig {
        daemons_rest: true,
        frontend: Some(bay.frontend("rx-ours-front", &sockets, &receiving())?),
        generators: vec![sender(bay, "rxours", len)?],
        ..Rig::new(daemon, Count::AtFrontend { ports: 1 })
    };
    rig.begin("start")?;
    share_cpu(&rig)?;
    Ok(rig)
}

fn vhost_pmd(bay: &Bay, len: usize) -> Result<Rig> {
    let sockets = [bay.socket("rx-vhost")];
    let tap = "net_tap0,iface=rxvhost".to_owned();
    let daemon = bay.vhost_pmd("rx-vhost", &sockets, &[tap], "io")?;
    let mut rig = Rig {
        frontend: Some(bay.frontend("rx-vhost-front", &sockets, &receiving())?),
        generators: vec![sender(bay, "rxvhost", len)?],
        ..Rig::new(daemon, Count::AtFrontend { ports: 1 })
    };
    rig.begin("start")?;
    share_cpu(&rig)?;
    Ok(rig)
}

fn share_cpu(rig: &Rig) -> Result<()> {
    if let Some(frontend) = &rig.frontend {
        turns::make_short(frontend.process.pid(), FRONTEND_NICE)?;
    }
    for sender in &rig.generators {
        turns::make_short(sender.pid(), 0)?;
    }
    Ok(())
}

fn limit(bay: &Bay, len: usize) -> Result<Rig> {
    let args = ["tap-read", "--tap", LIMIT];
    let daemon = bay.load("tap-readv", bay.cpus.daemon, &args)?;
    let mut rig = Rig {
        generators: vec![sender(bay, LIMIT, len)?],
        ..Rig::new(daemon, Count::FromTap(LIMIT))
    };
    rig.begin("")?;
    Ok(rig)
}

fn sender(bay: &Bay, tap: &str, len: usize) -> Result<Daemon> {
    let bytes = len.to_string();
    let args = ["flood", "--interface", tap, "--bytes", &bytes];
    bay.load(&format!("sender-{tap}"), bay.cpus.frontend, &args)
}

fn receiving() -> [String; 1] {
    ["--forward-mode=rxonly".to_owned()]
}
