//! From a guest to another guest, through a switch.
//!
//! The frontend has a port for each guest, and forwards what it receives on one through the other:
//! a fixed number of packets circulates, each with the address of the guest at the other end. The
//! peers' best is to turn packets back at one port, which needs no look at addresses.

use std::path::PathBuf;

use anyhow::Result;

use super::super::Session;
use super::super::report::Better;
use super::super::rounds::{Contender, Metric, RowSpec, Samples, Verdict};
use super::open_vswitch::{self, Forwarding};
use super::rig::{Count, Rig};
use super::serving::{self, Bay};
use super::{OURS, VHOST_PMD};
use crate::progress::step;

/// Ours, told to poll without pause, as the others always do.
const POLLING: &str = "ours-polling";
/// The vhost PMD with one port that sends everything back.
const VHOST_PMD_BACK: &str = "vhost-pmd-back";
/// Open vSwitch, which learns addresses.
pub(super) const OVS: &str = "ovs-dpdk";
/// Open vSwitch told to send everything back.
const OVS_HAIRPIN: &str = "ovs-dpdk-hairpin";

const OVS_TARGET: f64 = 1.0;
const VHOST_PMD_TARGET: f64 = 0.9;

/// Bursts of 32 packets that circulate, of all ports together, and of one: half of what a ring holds, so that
/// none is lost for want of a place.
const BURSTS: usize = 32;
const BURSTS_OF_A_PORT: usize = 16;

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
    let mut rows = Vec::new();
    for (case, ours) in [(case.clone(), OURS), (format!("{case}/polling"), POLLING)] {
        rows.push(row(case.clone(), ours, target(OVS_TARGET, OVS_HAIRPIN)));
        if has_target {
            for peer in [VHOST_PMD, VHOST_PMD_BACK] {
                rows.push(row(
                    format!("{case}/beside-{peer}"),
                    ours,
                    target(VHOST_PMD_TARGET, peer),
                ));
            }
        }
    }
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
    let guests = |ports| Guests::forwarding(ports, len);
    let polling = ours(bay, POLLING, "always", &guests(2))?;
    let adaptive = ours(bay, OURS, "adaptive", &guests(2))?;
    let vhost_pmd = vhost_pmd(bay, VHOST_PMD, &guests(2))?;
    let vhost_pmd_back = self::vhost_pmd(bay, VHOST_PMD_BACK, &guests(1))?;
    let ovs = open_vswitch(bay, OVS, Forwarding::Learning, &guests(2))?;
    let hairpin = open_vswitch(bay, OVS_HAIRPIN, Forwarding::Back, &guests(1))?;
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

/// A process of ours whose switch has a port for each guest.
pub(super) fn ours(bay: &Bay, name: &str, polling: &str, guests: &Guests) -> Result<Rig> {
    let sockets = guests.sockets(bay, name);
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
    let daemon = bay.device_net(name, &nics, &sockets)?;
    let rig = Rig {
        daemons_rest: polling != "always",
        ..Rig::new(
            daemon,
            Count::AtFrontend {
                ports: guests.ports,
            },
        )
    };
    guests.connect(bay, name, rig, &sockets)
}

/// DPDK's vhost PMD with a port for each guest.
pub(super) fn vhost_pmd(bay: &Bay, name: &str, guests: &Guests) -> Result<Rig> {
    let sockets = guests.sockets(bay, name);
    let daemon = bay.vhost_pmd(name, &sockets, &[], "io")?;
    let rig = Rig::new(
        daemon,
        Count::AtFrontend {
            ports: guests.ports,
        },
    );
    guests.connect(bay, name, rig, &sockets)
}

/// Open vSwitch with a port for each guest.
pub(super) fn open_vswitch(
    bay: &Bay,
    name: &str,
    forwarding: Forwarding,
    guests: &Guests,
) -> Result<Rig> {
    let switch = open_vswitch::start(bay, name, guests.ports, forwarding)?;
    let rig = Rig {
        others: vec![switch.database],
        ..Rig::new(
            switch.daemon,
            Count::AtFrontend {
                ports: guests.ports,
            },
        )
    };
    guests.connect(bay, name, rig, &switch.sockets)
}

/// A frontend whose ports, two and two, address one another.
pub(super) struct Guests {
    ports: usize,
    options: Vec<String>,
}

impl Guests {
    /// Who does nothing else.
    pub(super) fn forwarding(ports: usize, len: usize) -> Self {
        Self::with_mode(ports, len, &["--forward-mode=io".to_owned()])
    }

    /// Who looks up memory so often for each packet, as a guest that has something to do: it is
    /// slower than what it is connected to.
    pub(super) fn working(ports: usize, len: usize, lookups: u32) -> Self {
        let mode = [
            "--forward-mode=noisy".to_owned(),
            "--noisy-lkup-memory=64".to_owned(),
            format!("--noisy-lkup-num-reads={lookups}"),
        ];
        Self::with_mode(ports, len, &mode)
    }

    fn with_mode(ports: usize, len: usize, mode: &[String]) -> Self {
        // A port alone addresses one that is not there.
        let peers = (0..ports.max(2)).map(|port| {
            let peer = serving::mac(port ^ 1);
            format!("--eth-peer={port},{peer}")
        });
        let len = format!("--txpkts={len}");
        Self {
            ports,
            options: mode.iter().cloned().chain([len]).chain(peers).collect(),
        }
    }

    fn sockets(&self, bay: &Bay, name: &str) -> Vec<PathBuf> {
        (0..self.ports)
            .map(|port| bay.socket(&format!("{name}-{port}")))
            .collect()
    }

    fn connect(&self, bay: &Bay, name: &str, rig: Rig, sockets: &[PathBuf]) -> Result<Rig> {
        // As many buffers are in rings whatever the number of ports, for the caches' sake.
        let queue_size = (2 * serving::QUEUE_SIZE / self.ports).min(serving::QUEUE_SIZE);
        let name = format!("{name}-front");
        let frontend = bay.frontend_with(&name, sockets, queue_size, &[], &self.options)?;
        let mut rig = Rig {
            frontend: Some(frontend),
            ..rig
        };
        // As many packets circulate whatever the number of ports: what differs is the ports alone.
        let bursts = (BURSTS / self.ports).clamp(1, BURSTS_OF_A_PORT);
        rig.begin(&format!("start tx_first {bursts}"))?;
        Ok(rig)
    }
}
