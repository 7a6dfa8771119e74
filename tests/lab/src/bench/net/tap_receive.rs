//! From a tap of the host to a guest.
//!
//! Who sends on the host must not be in the frontend's way, for the daemon has the other CPU. So the frontend does
//! both: what it receives from the guest's NIC it sends out through the tap by a packet socket, and a fixed number
//! of packets circulates.

use std::path::PathBuf;

use anyhow::Result;

use super::super::Session;
use super::super::report::Better;
use super::super::rounds::{Contender, Metric, RowSpec, Samples, Verdict};
use super::rig::{Count, Rig};
use super::serving::{self, Bay};
use super::{OURS, VHOST_PMD, namespace};
use crate::progress::step;

/// The limit: one thread that reads from a tap and does nothing else.
const LIMIT: &str = "readv";
/// Packets per second: three times what Cloud Hypervisor's daemon was seen to do.
const TARGET: f64 = 0.75e6;
/// The same beside the limit: on the machine where it did 0.25 million, a tap took 2.1 million at least.
const LIMIT_TARGET: f64 = 0.36;

const OURS_TAP: &str = "rxours";
const VHOST_PMD_TAP: &str = "rxvhost";

/// Packets that circulate at first: fewer than a tap's queue or a ring holds.
const CIRCULATING: u32 = 800;

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
    let row = |case: String, peers: &[&'static str], verdict: Verdict| RowSpec {
        case,
        unit: "packets/s",
        peers: peers.to_vec(),
        verdict: if has_target { verdict } else { Verdict::Info },
        ..RowSpec::default()
    };
    let target = |value: f64, peer: Option<&str>| Verdict::Target {
        value,
        peer: peer.map(str::to_owned),
    };
    vec![
        row(case.clone(), &[VHOST_PMD], target(TARGET, None)),
        row(
            format!("{case}/beside-{LIMIT}"),
            &[LIMIT],
            target(LIMIT_TARGET, Some(LIMIT)),
        ),
        RowSpec {
            unit: "CPU s per million packets",
            better: Better::Lower,
            metric: Metric::CpuPerMillion,
            ..row(
                format!("{case}/daemon-cpu"),
                &[LIMIT, VHOST_PMD],
                Verdict::Info,
            )
        },
    ]
}

fn compare(bay: &Bay, session: &Session, len: usize) -> Result<Samples> {
    let effort = &session.effort;
    let ours = ours(bay, len)?;
    let vhost_pmd = vhost_pmd(bay, len)?;
    let limit = limit(bay, len)?;
    let contenders = [
        Contender::new(OURS, || {
            inject(bay, OURS_TAP, len)?;
            ours.measure(effort)
        }),
        Contender::new(VHOST_PMD, || {
            inject(bay, VHOST_PMD_TAP, len)?;
            vhost_pmd.measure(effort)
        }),
        Contender::new(LIMIT, || limit.measure(effort)),
    ];
    Samples::take(&contenders, effort.rounds)
}

fn ours(bay: &Bay, len: usize) -> Result<Rig> {
    let sockets = [bay.socket("rx-ours")];
    let nic = format!("id=nic,tap={OURS_TAP},socket={}", sockets[0].display());
    let daemon = bay.device_net("rx-ours", &[nic], &sockets)?;
    let rig = Rig {
        daemons_rest: true,
        ..Rig::new(daemon, Count::AtFrontend { ports: 1 })
    };
    circulate(bay, rig, OURS_TAP, &sockets, len)
}

fn vhost_pmd(bay: &Bay, len: usize) -> Result<Rig> {
    let sockets = [bay.socket("rx-vhost")];
    let tap = format!("net_tap0,iface={VHOST_PMD_TAP}");
    let daemon = bay.vhost_pmd("rx-vhost", &sockets, &[tap], "io")?;
    let rig = Rig::new(daemon, Count::AtFrontend { ports: 1 });
    circulate(bay, rig, VHOST_PMD_TAP, &sockets, len)
}

/// Gives it a frontend, and something to circulate.
fn circulate(bay: &Bay, rig: Rig, tap: &str, sockets: &[PathBuf], len: usize) -> Result<Rig> {
    namespace::await_tap(tap)?;
    let back = format!("net_af_packet0,iface={tap},qdisc_bypass=1");
    let mode = ["--forward-mode=io".to_owned()];
    let name = format!("{tap}-front");
    let frontend = bay.frontend_with(&name, sockets, serving::QUEUE_SIZE, &[back], &mode)?;
    frontend.await_ports(1)?;
    let mut rig = Rig {
        frontend: Some(frontend),
        ..rig
    };
    rig.begin_with("start", || inject(bay, tap, len))?;
    Ok(rig)
}

/// Something to circulate, again in each turn: now and then a packet is lost.
fn inject(bay: &Bay, tap: &str, len: usize) -> Result<()> {
    let (bytes, count) = (len.to_string(), CIRCULATING.to_string());
    let args = ["flood", "--interface", tap, "--bytes", &bytes];
    bay.load_once(&[&args[..], &["--count", &count]].concat())
}

fn limit(bay: &Bay, len: usize) -> Result<Rig> {
    let args = ["tap-read", "--tap", LIMIT];
    let daemon = bay.load("tap-readv", bay.cpus.daemon, &args)?;
    namespace::await_tap(LIMIT)?;
    let bytes = len.to_string();
    let args = ["flood", "--interface", LIMIT, "--bytes", &bytes];
    let mut rig = Rig {
        generators: vec![bay.load("sender-readv", bay.cpus.frontend, &args)?],
        ..Rig::new(daemon, Count::FromTap(LIMIT))
    };
    rig.begin("")?;
    Ok(rig)
}
