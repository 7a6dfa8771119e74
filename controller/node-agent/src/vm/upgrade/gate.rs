//! Whether a new process does what the old one did: it answers, `vmm-core` is connected to all its devices,
//! what the guest asks for is completed and without errors, and so it stays for a while.

use std::{collections::BTreeMap, time::Duration};

use api::{
    device::Device,
    vmm::{DeviceConnection, DeviceHealth},
};
use tokio::time::Instant;

use super::{
    super::{daemon::Plan, error_chain, incarnation::Incarnation, vmm},
    Wish,
};

/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// A process that serves answers at once; one that does not for so long hangs.
const ANSWER_WITHIN: Duration = Duration::from_millis(500);
/// The frontend connects within milliseconds; the guest waits for it.
const CONNECTED_WITHIN: Duration = Duration::from_secs(2);

/// How the devices were before anything was moved.
pub(super) struct Before {
    devices: BTreeMap<String, DeviceHealth>,
}

impl Before {
    /// Asks `vmm-core`.
    pub(super) async fn look(plan: &Plan) -> Self {
        let devices = health(plan, 0).await.unwrap_or_default();
        Self { devices }
    }

    /// Waits until the new process passes.
    ///
    /// # Errors
    /// Why it does not, in words.
    pub(super) async fn gate(
        &self,
        new: &Incarnation,
        plan: &Plan,
        wish: &Wish,
    ) -> Result<(), String> {
        let began = Instant::now();
        let deadline = began + wish.gate;
        let mut well_since = None;
        loop {
            let looked = self.look_again(new, plan).await;
            let now = Instant::now();
            let (problem, limit) = match looked {
                Ok(()) => {
                    let since = *well_since.get_or_insert(now);
                    if now - since >= wish.watch {
                        return Ok(());
                    }
                    (None, deadline.max(since + wish.watch))
                }
                Err(Problem::Final(what)) => return Err(what),
                Err(Problem::NotYet(what)) => {
                    // It was well before.
                    if well_since.is_some() {
                        return Err(what);
                    }
                    (Some(what), deadline.min(began + CONNECTED_WITHIN))
                }
                Err(Problem::Slow(what)) => {
                    well_since = None;
                    (Some(what), deadline)
                }
            };
            if now >= limit {
                let within = limit - began;
                return Err(match problem {
                    Some(what) => format!("{what}, {within:?} after the hand-over"),
                    None => format!("it was not watched for long enough within {within:?}"),
                });
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// For how long each device's guest was served by nobody, as `vmm-core` saw it.
    pub(super) async fn stalls(&self, plan: &Plan) -> Vec<(String, Duration)> {
        let seen = health(plan, 1).await.unwrap_or_default();
        let names = plan.devices.iter().map(|device| &device.name);
        names
            .filter_map(|name| {
                let before = self.devices.get(name)?.outages_total;
                let outage = seen.get(name)?.outages.last()?;
                let us = outage.first_completion_us.or(outage.replayed_us)?;
                (outage.number > before).then(|| (name.clone(), Duration::from_micros(us)))
            })
            .collect()
    }

    async fn look_again(&self, new: &Incarnation, plan: &Plan) -> Result<(), Problem> {
        let (served, seen) = tokio::join!(new.devices(ANSWER_WITHIN), health(plan, 0));
        let served = served.map_err(|error| Problem::Final(error_chain(&error)))?;
        let seen = seen.ok_or_else(|| Problem::Slow("vmm-core does not answer".to_owned()))?;
        for device in &plan.devices {
            let name = &device.name;
            let served = served.iter().find(|served| served.id == *name);
            let served =
                served.ok_or_else(|| Problem::Final(format!("it does not serve {name}")))?;
            check_served(served)?;
            match seen.get(name) {
                Some(seen) => self.check_seen(name, seen, served)?,
                None if served.connected => {}
                None => return Err(Problem::NotYet(format!("{name} is not connected"))),
            }
        }
        Ok(())
    }

    fn check_seen(&self, name: &str, seen: &DeviceHealth, served: &Device) -> Result<(), Problem> {
        let before = self.devices.get(name);
        let is_new = before.is_none_or(|before| seen.incarnations > before.incarnations);
        if seen.connection() != DeviceConnection::Connected || !is_new || !served.connected {
            let why = match seen.last_error.as_str() {
                "" => String::new(),
                why => format!(" ({why})"),
            };
            return Err(Problem::NotYet(format!("{name} is not connected{why}")));
        }
        // What was there before the hand-over was drained or replayed: all that is due is the new
        // process's to complete.
        let is_due = seen.queues.iter().any(|queue| queue.due > 0);
        let has_advanced = before.is_none_or(|before| {
            seen.queues.iter().any(|queue| {
                let then = before.queues.iter().find(|then| then.index == queue.index);
                then.is_none_or(|then| then.used_idx != queue.used_idx)
            })
        });
        if is_due && !has_advanced && completed(served) == 0 {
            return Err(Problem::Slow(format!(
                "{name} completes none of the requests that are due"
            )));
        }
        Ok(())
    }
}

enum Problem {
    /// It will not pass.
    Final(String),
    /// It should within a moment.
    NotYet(String),
    /// Its storage, or the host, may be slow.
    Slow(String),
}

fn check_served(served: &Device) -> Result<(), Problem> {
    let errors = served.blk.as_ref().map_or(0, |blk| blk.errors);
    match errors {
        0 => Ok(()),
        errors => Err(Problem::Final(format!(
            "{errors} requests to {} failed",
            served.id
        ))),
    }
}

/// Since it was attached.
fn completed(served: &Device) -> u64 {
    let disk = served.blk.as_ref().map_or(0, |blk| {
        blk.read_requests + blk.write_requests + blk.flush_requests + blk.discard_requests
    });
    let nic = served
        .net
        .as_ref()
        .map_or(0, |net| net.rx_packets + net.tx_packets);
    disk + nic
}

/// The machine's devices by name; `None` when `vmm-core` does not answer.
async fn health(plan: &Plan, max_outages: u32) -> Option<BTreeMap<String, DeviceHealth>> {
    let asked = tokio::time::timeout(ANSWER_WITHIN, vmm::devices(plan.dir(), max_outages)).await;
    let devices = asked.ok()?.ok()?.into_iter();
    Some(devices.map(|device| (device.tag.clone(), device)).collect())
}
