//! In which order VMs come back after a boot of the host.

use std::{collections::BTreeMap, time::Duration};

use tokio::sync::watch;

/// A VM that does not come up does not keep others down for longer.
const PATIENCE: Duration = Duration::from_secs(120);

/// How many VMs of each order are still to come up. Filled before the first begins.
#[derive(Debug)]
pub(crate) struct Autostart(watch::Sender<BTreeMap<u32, usize>>);

impl Autostart {
    /// Of VMs with these orders.
    pub(crate) fn of(orders: impl Iterator<Item = u32>) -> Self {
        let mut waiting = BTreeMap::new();
        for order in orders {
            *waiting.entry(order).or_default() += 1;
        }
        Self(watch::Sender::new(waiting))
    }

    /// Waits until all VMs of lower orders are up or have failed.
    pub(crate) async fn turn(&self, order: u32) {
        let mut waiting = self.0.subscribe();
        let first = |waiting: &BTreeMap<u32, usize>| {
            waiting.keys().next().is_none_or(|lowest| *lowest >= order)
        };
        if tokio::time::timeout(PATIENCE, waiting.wait_for(first))
            .await
            .is_err()
        {
            tracing::warn!(
                order,
                "VMs that come before take too long; not waiting for them"
            );
        }
    }

    /// One of this order is up, or has failed.
    pub(crate) fn done(&self, order: u32) {
        self.0.send_if_modified(|waiting| {
            let Some(left) = waiting.get_mut(&order) else {
                return false;
            };
            *left -= 1;
            if *left == 0 {
                waiting.remove(&order);
            }
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn higher_orders_wait_for_all_of_the_lower_ones() {
        let autostart = Autostart::of([7, 1, 7, 1].into_iter());
        let is_its_turn = async |order| {
            tokio::time::timeout(Duration::ZERO, autostart.turn(order))
                .await
                .is_ok()
        };
        assert!(is_its_turn(1).await);
        assert!(!is_its_turn(7).await);
        autostart.done(1);
        assert!(!is_its_turn(7).await);
        autostart.done(1);
        assert!(is_its_turn(7).await);
        // One that was not counted changes nothing.
        autostart.done(3);
    }
}
