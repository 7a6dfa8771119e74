//! What goes wrong, as the seed says.

use std::sync::Arc;

use tokio::time::Instant;

use crate::hits::Hit;
use crate::world::{HOSTS, REPLICAS, StoreFaults, World};

#[derive(Clone, Copy, Debug)]
enum Fault {
    /// A host is cut off from all.
    CutFromAll,
    /// Or from one replica.
    CutFromOne,
    /// SIGSTOP of everything on a host, or a suspended machine.
    HostFreezes,
    /// Power goes.
    HostCrashes,
    AgentFreezes,
    AgentCrashes,
    ReplicaFreezes,
    ReplicaCrashes,
    /// Messages take long.
    Slow,
    StoreFull,
    StoreUnreachable,
    StoreInDoubt,
    WatchesBreak,
}

impl Fault {
    const ALL: [Self; 13] = [
        Self::CutFromAll,
        Self::CutFromOne,
        Self::HostFreezes,
        Self::HostCrashes,
        Self::AgentFreezes,
        Self::AgentCrashes,
        Self::ReplicaFreezes,
        Self::ReplicaCrashes,
        Self::Slow,
        Self::StoreFull,
        Self::StoreUnreachable,
        Self::StoreInDoubt,
        Self::WatchesBreak,
    ];
}

/// Breaks something every few seconds until then, and mends it after a while.
pub(crate) async fn run(world: Arc<World>, until: Instant) {
    while Instant::now() < until {
        tokio::time::sleep(world.random.millis(300, 5_000)).await;
        let lasts = match world.random.below(3) {
            0 => world.random.millis(200, 3_000),
            1 => world.random.millis(3_000, 12_000),
            _ => world.random.millis(12_000, 40_000),
        };
        let host = world.random.below(HOSTS as u64) as usize;
        let replica = world.random.below(REPLICAS as u64) as usize;
        let fault = Fault::ALL[world.random.below(Fault::ALL.len() as u64) as usize];
        world.log(|| format!("{fault:?}: h{host} or replica {replica}, for {lasts:?}"));
        let world = world.clone();
        tokio::spawn(async move {
            let end = (Instant::now() + lasts).min(until);
            break_something(&world, fault, host, replica, end).await;
        });
    }
}

async fn break_something(
    world: &Arc<World>,
    fault: Fault,
    host: usize,
    replica: usize,
    end: Instant,
) {
    let host = &world.hosts[host];
    let over = tokio::time::sleep_until(end);
    match fault {
        Fault::CutFromAll | Fault::CutFromOne => {
            let cut: Vec<usize> = match fault {
                Fault::CutFromAll => (0..REPLICAS).collect(),
                _ => vec![replica],
            };
            world.cut(&host.id, &cut, 1);
            over.await;
            world.cut(&host.id, &cut, -1);
        }
        Fault::HostFreezes => {
            host.freeze();
            over.await;
            if host.thaw() {
                world.hits.count(Hit::HostOverslept);
            }
        }
        Fault::HostCrashes => {
            host.crash();
            over.await;
            host.boot();
        }
        Fault::AgentFreezes => {
            host.freeze_agent();
            over.await;
            if host.thaw_agent() {
                world.hits.count(Hit::AgentOverslept);
            }
        }
        Fault::AgentCrashes => {
            host.set_agent(false);
            over.await;
            host.set_agent(true);
        }
        Fault::ReplicaFreezes => {
            let led = world.replicas[replica].freeze();
            over.await;
            if led.is_some_and(|epoch| epoch < world.newest_epoch()) {
                world.hits.count(Hit::LeaderOverslept);
            }
            world.replicas[replica].thaw();
        }
        Fault::ReplicaCrashes => world.replicas[replica].crash(),
        Fault::Slow => {
            world.slow.send_replace(true);
            over.await;
            world.slow.send_replace(false);
        }
        Fault::StoreFull | Fault::StoreUnreachable | Fault::StoreInDoubt | Fault::WatchesBreak => {
            let set = |on: bool| {
                world.store.send_modify(|faults| *which(fault, faults) = on);
            };
            set(true);
            over.await;
            set(false);
        }
    }
}

fn which(fault: Fault, faults: &mut StoreFaults) -> &mut bool {
    match fault {
        Fault::StoreFull => &mut faults.full,
        Fault::StoreUnreachable => &mut faults.unreachable,
        Fault::StoreInDoubt => &mut faults.in_doubt,
        _ => &mut faults.watches_break,
    }
}
