//! Guests that have something else to do: a load below what the daemon could carry, and what it
//! costs; and more guests on a switch.

use anyhow::Result;

use super::super::Session;
use super::super::report::Better;
use super::super::rounds::{Contender, Metric, RowSpec, Samples, Verdict};
use super::open_vswitch::Forwarding;
use super::serving::Bay;
use super::switch::{self, Guests, OVS};
use super::{OURS, VHOST_PMD};
use crate::progress::step;

const LEN: usize = 64;
/// Looks into memory for each packet: the more, the lower the load.
const LOOKUPS: [u32; 3] = [10, 40, 160];

/// Ports of a full switch, and what each may lose to the others' presence.
const MANY_PORTS: usize = 16;
const TWO_PORTS: &str = "2-ports";
const MANY_PORTS_TARGET: f64 = 0.9;

pub(super) fn run(session: &mut Session) -> Result<()> {
    for lookups in LOOKUPS {
        let rows = load_rows(lookups);
        if session.wants(&rows) {
            step(format_args!(
                "guest to guest, {lookups} lookups for each packet"
            ));
            let bay = Bay::open(session)?;
            let samples = compare_loads(&bay, session, lookups);
            session.add(&rows, samples)?;
        }
    }
    let rows = port_rows();
    if session.wants(&rows) {
        step(format_args!("{MANY_PORTS} guests"));
        let bay = Bay::open(session)?;
        let samples = compare_ports(&bay, session);
        session.add(&rows, samples)?;
    }
    Ok(())
}

fn load_rows(lookups: u32) -> Vec<RowSpec> {
    let case = format!("switch/working-guests-{lookups}");
    let row = |case: String, verdict: Verdict| RowSpec {
        case,
        unit: "packets/s",
        peers: vec![OVS, VHOST_PMD],
        verdict,
        ..RowSpec::default()
    };
    let cost = |peer: &str| RowSpec {
        unit: "CPU s per million packets",
        better: Better::Lower,
        metric: Metric::CpuPerMillion,
        ..row(
            format!("{case}/daemon-cpu/beside-{peer}"),
            Verdict::Target {
                value: 1.0,
                peer: Some(peer.to_owned()),
            },
        )
    };
    vec![row(case.clone(), Verdict::Info), cost(OVS), cost(VHOST_PMD)]
}

fn compare_loads(bay: &Bay, session: &Session, lookups: u32) -> Result<Samples> {
    let effort = &session.effort;
    let guests = Guests::working(2, LEN, lookups);
    let ours = switch::ours(bay, OURS, "adaptive", &guests)?;
    let vhost_pmd = switch::vhost_pmd(bay, VHOST_PMD, &guests)?;
    let ovs = switch::open_vswitch(bay, OVS, Forwarding::Learning, &guests)?;
    let contenders = [
        Contender::new(OURS, || ours.measure(effort)),
        Contender::new(VHOST_PMD, || vhost_pmd.measure(effort)),
        Contender::new(OVS, || ovs.measure(effort)),
    ];
    Samples::take(&contenders, effort.rounds)
}

fn port_rows() -> Vec<RowSpec> {
    let row = |case: &str, peers: Vec<&'static str>, verdict: Verdict| RowSpec {
        case: format!("switch/{MANY_PORTS}-ports/{case}"),
        unit: "packets/s",
        peers,
        verdict,
        ..RowSpec::default()
    };
    let target = Verdict::Target {
        value: MANY_PORTS_TARGET,
        peer: Some(TWO_PORTS.to_owned()),
    };
    vec![
        row("sum", vec![TWO_PORTS], target),
        row("sum/beside-vhost-pmd", vec![VHOST_PMD], Verdict::Info),
    ]
}

/// All ports busy: what they get together, beside what two get.
fn compare_ports(bay: &Bay, session: &Session) -> Result<Samples> {
    let effort = &session.effort;
    let many_guests = Guests::forwarding(MANY_PORTS, LEN);
    let many = switch::ours(bay, OURS, "adaptive", &many_guests)?;
    let two = switch::ours(bay, TWO_PORTS, "adaptive", &Guests::forwarding(2, LEN))?;
    let vhost_pmd = switch::vhost_pmd(bay, VHOST_PMD, &many_guests)?;
    let contenders = [
        Contender::new(OURS, || many.measure(effort)),
        Contender::new(TWO_PORTS, || two.measure(effort)),
        Contender::new(VHOST_PMD, || vhost_pmd.measure(effort)),
    ];
    Samples::take(&contenders, effort.rounds)
}
