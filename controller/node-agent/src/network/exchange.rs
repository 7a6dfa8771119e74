//! Exchanging the program of a network's switch, which serves NICs of many VMs.
//!
//! Its control socket, and the only queue of a tap, are one process's: the old one ends before the new one
//! begins. Meanwhile frames are lost, as when a cable is out for a moment, and every guest's device is
//! connected again by its `vmm-core`. A new process that does not serve all NICs in time, or loses one that was
//! connected, goes; the old program is started again.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::{
    Made, Network, Networks, make, record,
    record::Pin,
    switch::{self, Switch},
};
use crate::{
    record::DaemonKind,
    versions::Pinned,
    vm::{Done, UpgradeError, Wish, error_chain},
};

/// Between two looks at a new process.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// A switch that can be exchanged.
#[derive(Clone, Debug)]
pub(crate) struct Exchangeable {
    /// Id of its network.
    pub(crate) network: String,
    /// NICs that it serves.
    pub(crate) nics: usize,
    /// What it was upgraded to; empty for the installed program.
    pub(crate) build: String,
}

impl Networks {
    /// The switches that run, by network.
    pub(crate) fn switches(&self) -> Vec<Exchangeable> {
        let table = self.table().clone();
        let running = table.into_iter().filter_map(|(id, network)| {
            let daemon = network.ports.daemon();
            daemon.process.as_ref()?;
            make::is_switched(&network.seen.borrow().spec).then(|| Exchangeable {
                network: id,
                nics: network.ports.names().len(),
                build: daemon.build,
            })
        });
        running.collect()
    }

    /// What switches were upgraded to.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub(crate) fn pins(&self) -> Result<Vec<Pinned>, super::NetworkError> {
        let records = record::load(&self.inner.state_dir)?;
        let pins = records.into_iter().filter_map(|record| record.pin);
        Ok(pins.map(Pin::into_pinned).collect())
    }

    /// Exchanges a switch as is wished, and keeps what it then runs for the next agent.
    ///
    /// # Errors
    /// Why it runs what it ran before, or is only being started again.
    pub(crate) async fn exchange_switch(
        &self,
        id: &str,
        wish: &Wish,
    ) -> Result<Done, UpgradeError> {
        let none = || UpgradeError::NoSwitch {
            network: id.to_owned(),
        };
        let network = self.find(id).ok_or_else(none)?;
        let mut made = network.work.lock().await;
        let switch = made.switch.take().ok_or_else(none)?;
        let program = match &wish.binary {
            Some(binary) if !binary.build.is_empty() => switch::Program {
                path: binary.path.clone(),
                build: binary.build.clone(),
            },
            Some(_) => switch::Program::of(None, &self.inner.bin_dir),
            None => switch.program().clone(),
        };
        let (switch, outcome) = exchange(&network, switch, program, wish).await;
        made.pin = Pin::of(switch.program());
        made.switch = Some(switch);
        self.keep_pin(id, &made);
        outcome
    }

    fn keep_pin(&self, id: &str, made: &Made) {
        let Some(spec) = &made.spec else { return };
        if let Err(error) = record::save(&self.inner.state_dir, spec, made.pin.as_ref()) {
            tracing::warn!(network = id, "{}", error_chain(&error));
        }
    }
}

async fn exchange(
    network: &Network,
    old: Switch,
    program: switch::Program,
    wish: &Wish,
) -> (Switch, Result<Done, UpgradeError>) {
    let ports = &network.ports;
    let from = ports.daemon();
    let old_plan = old.plan().clone();
    let new_plan = switch::Plan {
        program,
        ..old_plan.clone()
    };
    let before = old_plan.connected().await.unwrap_or_default();
    old.stop().await;
    let began = Instant::now();
    let deadline = began + wish.gate;
    let failed = match new_plan.start().await {
        Err(error) => error_chain(&error),
        Ok(up) if !wish.version.is_empty() && wish.version != up.version() => {
            let said = format!("the new process says it is {}", up.version());
            up.end().await;
            format!("{said}, not {}", wish.version)
        }
        Ok(up) => {
            let new = Switch::keep(new_plan.clone(), ports, up);
            match gate(network, &new, &before, deadline, wish.watch).await {
                Ok(handed_over) => {
                    let done = Done {
                        from: named(&from.version, &from.build),
                        to: named(&ports.daemon().version, &new_plan.program.build),
                        handed_over: handed_over - began,
                        stalls: Vec::new(),
                        notes: Vec::new(),
                    };
                    return (new, Ok(done));
                }
                Err(reason) => {
                    new.stop().await;
                    reason
                }
            }
        }
    };
    tracing::warn!(
        network = old_plan.network,
        "its switch's new version goes: {failed}"
    );
    match old_plan.start().await {
        Ok(up) => {
            let old = Switch::keep(old_plan, ports, up);
            (old, Err(UpgradeError::RolledBack { reason: failed }))
        }
        Err(error) => {
            let old = Switch::revive(old_plan, ports, error_chain(&error));
            (old, Err(UpgradeError::Restarted { reason: failed }))
        }
    }
}

/// Waits until the new process serves all NICs and is connected to those that the old one was, and watches
/// that it stays so. When it first did.
async fn gate(
    network: &Network,
    new: &Switch,
    before: &BTreeSet<String>,
    deadline: Instant,
    watch: Duration,
) -> Result<Instant, String> {
    let mut well_since = None;
    loop {
        let problem = look(network, new, before).await.err();
        let now = Instant::now();
        match (problem, well_since) {
            (None, Some(since)) if now.duration_since(since) >= watch => return Ok(since),
            (None, Some(_)) => {}
            (None, None) => well_since = Some(now),
            // It was well before.
            (Some(problem), Some(_)) => return Err(problem),
            (Some(problem), None) if now >= deadline => return Err(problem),
            (Some(_), None) => {}
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn look(network: &Network, new: &Switch, before: &BTreeSet<String>) -> Result<(), String> {
    network.ports.all_attached()?;
    let Some(connected) = new.plan().connected().await else {
        return Err("the new process does not answer".to_owned());
    };
    // Of VMs that ended meanwhile, nothing is wanted.
    let missing = before
        .iter()
        .find(|id| !connected.contains(*id) && network.ports.wants(id));
    missing.map_or(Ok(()), |id| Err(format!("{id} is not connected any more")))
}

fn named(version: &str, build: &str) -> String {
    match build {
        "" => format!("{} {version}", switch::PROGRAM),
        build => format!("{} {version} ({build})", switch::PROGRAM),
    }
}

impl Pin {
    /// What a switch is started as, if that is not the installed program.
    fn of(program: &switch::Program) -> Option<Self> {
        (!program.build.is_empty()).then(|| Self {
            path: program.path.display().to_string(),
            build: program.build.clone(),
        })
    }

    fn into_pinned(self) -> Pinned {
        Pinned {
            kind: DaemonKind::Net,
            path: self.path.into(),
            build: self.build,
        }
    }
}
