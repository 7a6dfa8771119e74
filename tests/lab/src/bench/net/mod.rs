//! `cargo lab bench net`: device-net's NICs beside DPDK's vhost PMD, Open vSwitch with DPDK, and
//! plain use of a tap. The frontend is DPDK's testpmd with net_virtio_user.
//!
//! Most of these poll, so each contender's processes ([`rig`]) are stopped except in its turn.

mod dropping;
mod idle;
mod loads;
mod namespace;
mod open_vswitch;
mod rig;
mod segments;
mod serving;
mod switch;
mod tap;
mod tap_receive;
mod testpmd;
mod turns;

use anyhow::Result;

use super::Session;
use crate::artifacts::dpdk::Dpdk;
use serving::{Bay, Cpus};

const OURS: &str = "ours";
const VHOST_PMD: &str = "vhost-pmd";

pub(super) fn run(session: &mut Session) -> Result<()> {
    if let Some(ground) = &session.ground {
        ground.program("device-net")?;
        // Fetched before there is no network any more.
        Dpdk::obtain()?;
        namespace::enter()?;
    }
    switch::run(session)?;
    loads::run(session)?;
    dropping::run(session)?;
    tap::run(session)?;
    tap_receive::run(session)?;
    segments::run(session)?;
    idle::run(session)
}

impl<'a> Bay<'a> {
    fn open(session: &'a Session) -> Result<Self> {
        Ok(Self {
            ground: session.ground()?,
            dpdk: Dpdk::obtain()?,
            cpus: Cpus::choose()?,
        })
    }
}
