//! From a guest to another guest, through a switch.
//!
//! The frontend has a port for each guest, and forwards what it receives on one through the other:
//! a fixed number of packets circulates, each with the address of the guest at the other end. The
//! peers' best is to turn packets back at one port, which needs no look at addresses.

use anyhow::Result;

use super::super::Session;
use super::super::report::Better;
use super::super::rounds::{Contender, Metric, RowSpec, Samples, Verdict};
use super::open_vswitch::{self, Forwarding};
use super::rig::{Count, Rig};
use super::serving::{self, Bay};
use super::{CIRCULATE, OURS, VHOST_PMD};
use crate::progress::step;

/// Ours, told to poll, as the others always do.
const POLLING: &str = "ours-polling";
/// The vhost PMD with one port that sends everything back.
const VHOST_PMD_BACK: &str = "vhost-pmd-back";
/// Open vSwitch, which learns addresses.
const OVS: &str = "ovs-dpdk";
/// Open vSwitch told to send everything back.
const OVS_HAIRPIN: &str = "ovs-dpdk-hairpin";

const OVS_TARGET: f64 = 1.0;
const VHOST_PMD_TARGET: f64 = 0.9;

const LENGTHS: [(usize, bool); 2] = [(64, true), (1514, false)];

pub(super) fn run(session: &mut Session) -> Result<()> {
    for (len, has_target) in LENGTHS {
        let rows = rows(len, has_target);
        if !session.wants(&rows) {
            continue;
        }
        step(format_args!("guest to guest, {len} bytes"));
        let bay = Bay::open(session)?;
        let samples = compare(&bay, session, len);
        session.add(&rows, samples)?;
    }
    Ok(())
}

fn rows(len: usize, has_target: bool) -> Vec<RowSpec> {
    let case = format!("switch/{len}");
    let row = |case: String, ours: &'static str, verdict: Verdict| RowSpec {
        case,
        unit: "packets/s",
        ours,
        peers: vec![OVS, OVS_HAIRPIN, VHOST_PMD, VHOST_PMD_BACK],
        verdict,
        ..RowSpec::default()
    };
    let target = |value: f64, peer: &str| match has_target {
        true => Verdict::Target {
            value,
            peer: Some(peer.to_owned()),
        },
        false => Verdict::Info,
    };
    let polling = format!("{case}/polling");
    let mut rows = vec![row(
        polling.clone(),
        POLLING,
        target(OVS_TARGET, OVS_HAIRPIN),
    )];
    if has_target {
        for (peer, value) in [
            (VHOST_PMD, VHOST_PMD_TARGET),
            (VHOST_PMD_BACK, VHOST_PMD_TARGET),
        ] {
            rows.push(row(
                format!("{polling}/beside-{peer}"),
                POLLING,
                target(value, peer),
            ));
        }
    }
    rows.push(row(case.clone(), OURS, Verdict::Info));
    rows.push(RowSpec {
        unit: "CPU s per million packets",
        better: Better::Lower,
        metric: Metric::CpuPerMillion,
        ..row(format!("{case}/daemon-cpu"), OURS, Verdict::Info)
    });
    rows
}

fn compare(bay: &Bay, session: &Session, len: usize) -> Result<Samples> {
    let effort = &session.effort;
    let polling = ours(bay, POLLING, "always", len)?;
    let adaptive = ours(bay, OURS, "adaptive", len)?;
    let vhost_pmd = vhost_pmd(bay, VHOST_PMD, 2, len)?;
    let vhost_pmd_back = vhost_pmd_rig(bay, len)?;
    let ovs = open_vswitch(bay, OVS, Forwarding::Learning, len)?;
    let hairpin = open_vswitch(bay, OVS_HAIRPIN, Forwarding::Back, len)?;
    let contenders = [
        Contender::new(POLLING, || polling.measure(effort)),
        Contender::new(OURS, || adaptive.measure(effort)),
        Contender::new(VHOST_PMD, || vhost_pmd.measure(effort)),
        Contender::new(VHOST_PMD_BACK, || vhost_pmd_back.measure(effort)),
        Contender::new(OVS, || ovs.measure(effort)),
        Contender::new(OVS_HAIRPIN, || hairpin.measure(effort)),
    ];
    Samples::take(&contenders, effort.rounds)
}

fn ours(bay: &Bay, name: &str, polling: &str, len: usize) -> Result<Rig> {
    let sockets = [0, 1].map(|port| bay.socket(&format!("{name}-{port}")));
    let nics: Vec<String> = sockets
        .iter()
        .enumerate()
        .map(|(port, socket)| {
            format!(
                "id=nic{port},switch=lan,mac={},polling={polling},socket={}",
                serving::mac(port),
                socket.display()
            )
        })
        .collect();
    let mut rig = Rig {
        daemons: vec![bay.device_net(name, &nics, &sockets)?],
        daemons_rest: polling != "always",
        frontend: Some(bay.frontend(&format!("{name}-front"), &sockets, &forwarding(len))?),
        generators: Vec::new(),
        count: Count::AtFrontend { ports: 2 },
        others: Vec::new(),
    };
    rig.begin(CIRCULATE)?;
    Ok(rig)
}

fn vhost_pmd_rig(bay: &Bay, len: usize) -> Result<Rig> {
    vhost_pmd(bay, VHOST_PMD_BACK, 1, len)
}

fn vhost_pmd(bay: &Bay, name: &str, ports: usize, len: usize) -> Result<Rig> {
    let sockets: Vec<_> = (0..ports)
        .map(|port| bay.socket(&format!("{name}-{port}")))
        .collect();
    let mut rig = Rig {
        daemons: vec![bay.vhost_pmd(name, &sockets, &[], "io")?],
        daemons_rest: false,
        frontend: Some(bay.frontend(&format!("{name}-front"), &sockets, &forwarding(len))?),
        generators: Vec::new(),
        count: Count::AtFrontend { ports },
        others: Vec::new(),
    };
    rig.begin(CIRCULATE)?;
    Ok(rig)
}

fn open_vswitch(bay: &Bay, name: &str, forwarding_of: Forwarding, len: usize) -> Result<Rig> {
    let ports = match forwarding_of {
        Forwarding::Learning => 2,
        Forwarding::Back => 1,
    };
    let switch = open_vswitch::start(bay, name, ports, forwarding_of)?;
    let frontend = bay.frontend(&format!("{name}-front"), &switch.sockets, &forwarding(len))?;
    let mut rig = Rig {
        daemons: vec![switch.daemon],
        daemons_rest: false,
        frontend: Some(frontend),
        generators: Vec::new(),
        count: Count::AtFrontend { ports },
        others: vec![switch.database],
    };
    rig.begin(CIRCULATE)?;
    Ok(rig)
}

/// A frontend whose ports address one another.
fn forwarding(len: usize) -> [String; 4] {
    [
        "--forward-mode=io".to_owned(),
        format!("--txpkts={len}"),
        format!("--eth-peer=0,{}", serving::mac(1)),
        format!("--eth-peer=1,{}", serving::mac(0)),
    ]
}
