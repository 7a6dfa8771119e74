//! What goes wrong, as the seed says.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::world::{HOSTS, REPLICAS, World};

/// Breaks something every few seconds until then, and mends it after a while.
pub(crate) async fn run(world: Arc<World>, until: Instant) {
    while Instant::now() < until {
        tokio::time::sleep(world.random.millis(500, 6_000)).await;
        let lasts = match world.random.below(3) {
            0 => world.random.millis(200, 3_000),
            1 => world.random.millis(3_000, 12_000),
            _ => world.random.millis(12_000, 40_000),
        };
        let host = world.random.below(HOSTS as u64) as usize;
        let replica = world.random.below(REPLICAS as u64) as usize;
        let what = world.random.below(10);
        world.log(|| format!("fault {what} on h{host}, replica {replica} for {lasts:?}"));
        let world = world.clone();
        tokio::spawn(async move {
            break_something(&world, what, host, replica, lasts, until).await;
        });
    }
}

async fn break_something(
    world: &Arc<World>,
    what: u64,
    host: usize,
    replica: usize,
    lasts: Duration,
    until: Instant,
) {
    let end = (Instant::now() + lasts).min(until);
    let host = &world.hosts[host];
    match what {
        // A host is cut off from all, or from one replica.
        0 | 1 => {
            let cut: Vec<usize> = match what {
                0 => (0..REPLICAS).collect(),
                _ => vec![replica],
            };
            world.cut(&host.id, &cut, 1);
            tokio::time::sleep_until(end).await;
            world.cut(&host.id, &cut, -1);
        }
        // It stands still: SIGSTOP of everything, a suspended machine.
        2 | 3 => {
            host.set_frozen(true);
            tokio::time::sleep_until(end).await;
            host.set_frozen(false);
        }
        4 => {
            host.crash();
            tokio::time::sleep_until(end).await;
            host.boot();
        }
        5 => {
            host.set_agent(false);
            tokio::time::sleep_until(end).await;
            host.set_agent(true);
        }
        6 => {
            world.replicas[replica].freeze(1);
            tokio::time::sleep_until(end).await;
            world.replicas[replica].freeze(-1);
        }
        7 => {
            world.replicas[replica].crash();
        }
        8 => {
            world.slow.send_replace(true);
            tokio::time::sleep_until(end).await;
            world.slow.send_replace(false);
        }
        _ => {
            let kind = world.random.below(4);
            let set = |on: bool| {
                world.store.send_modify(|faults| match kind {
                    0 => faults.full = on,
                    1 => faults.unreachable = on,
                    2 => faults.in_doubt = on,
                    _ => faults.compacted = on,
                });
            };
            set(true);
            // A watch is told once.
            match kind {
                3 => tokio::time::sleep(Duration::from_millis(100)).await,
                _ => tokio::time::sleep_until(end).await,
            }
            set(false);
        }
    }
}
