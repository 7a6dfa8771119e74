//! From a guest to nowhere: what taking packets out of a guest costs, without anything after it.

use anyhow::Result;

use super::super::Session;
use super::super::rounds::{Contender, RowSpec, Samples};
use super::rig::{Count, Rig};
use super::serving::{self, Bay};
use super::{OURS, VHOST_PMD};
use crate::progress::step;

const LENGTHS: [usize; 2] = [64, 1514];

pub(super) fn run(session: &mut Session) -> Result<()> {
    for len in LENGTHS {
        let row = RowSpec {
            case: format!("drop/{len}"),
            unit: "packets/s",
            peers: vec![VHOST_PMD],
            ..RowSpec::default()
        };
        if !session.wants(std::slice::from_ref(&row)) {
            continue;
        }
        step(format_args!("guest to nowhere, {len} bytes"));
        let bay = Bay::open(session)?;
        let samples = compare(&bay, session, len);
        session.add(&[row], samples)?;
    }
    Ok(())
}

fn compare(bay: &Bay, session: &Session, len: usize) -> Result<Samples> {
    let effort = &session.effort;
    let ours = ours(bay, len)?;
    let vhost_pmd = vhost_pmd(bay, len)?;
    let contenders = [
        Contender::new(OURS, || ours.measure(effort)),
        Contender::new(VHOST_PMD, || vhost_pmd.measure(effort)),
    ];
    Samples::take(&contenders, effort.rounds)
}

/// A switch on which nobody else is.
fn ours(bay: &Bay, len: usize) -> Result<Rig> {
    let sockets = [bay.socket("drop-ours")];
    let nic = format!(
        "id=nic,switch=lan,mac={},polling=always,socket={}",
        serving::mac(0),
        sockets[0].display()
    );
    let daemon = bay.device_net("drop-ours", &[nic], &sockets)?;
    let mut rig = Rig {
        frontend: Some(bay.frontend("drop-ours-front", &sockets, &serving::sending(len))?),
        ..Rig::new(daemon, Count::ByFrontend { ports: 1 })
    };
    rig.begin("start")?;
    Ok(rig)
}

fn vhost_pmd(bay: &Bay, len: usize) -> Result<Rig> {
    let sockets = [bay.socket("drop-vhost")];
    let daemon = bay.vhost_pmd("drop-vhost", &sockets, &[], "rxonly")?;
    let mut rig = Rig {
        frontend: Some(bay.frontend("drop-vhost-front", &sockets, &serving::sending(len))?),
        ..Rig::new(daemon, Count::ByFrontend { ports: 1 })
    };
    rig.begin("start")?;
    Ok(rig)
}
