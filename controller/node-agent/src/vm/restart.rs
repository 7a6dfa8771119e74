//! Starting a VM again by itself: after it died, by its restart policy, and after a boot of the host.

use std::time::Duration;

use lease::{Restart, Stage};
use tokio::time::Instant;

use super::{Actor, Next};
use crate::{
    record::{Assets, State},
    spec::Power,
};

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// One that ran this long is started again as if it had never died.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// What a start waits for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wait {
    /// That this has passed.
    Pause(Duration),
    /// That VMs of lower orders are up.
    Turn(u32),
}

/// How often it died of late.
#[derive(Debug, Default)]
pub(super) struct Restarts {
    pause: Duration,
    up_since: Option<Instant>,
}

impl Restarts {
    pub(super) fn is_up(&mut self) {
        self.up_since = Some(Instant::now());
    }

    /// It is being started because it died.
    pub(super) fn under_way(&self) -> bool {
        !self.pause.is_zero() && self.up_since.is_none()
    }

    fn next_pause(&mut self) -> Duration {
        let ran = self.up_since.take().map(|since| since.elapsed());
        self.pause = match ran {
            Some(ran) if ran >= STABLE_AFTER => FIRST_PAUSE,
            _ => (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE),
        };
        self.pause
    }
}

impl Actor {
    /// The VM died: starts it again if its policy says so. Nobody is told that it failed: whoever wished
    /// it to run would take that for its end.
    pub(super) fn restart(&mut self, problem: &str) -> Option<Next> {
        let may = match self.record.spec.restart {
            Restart::Never => false,
            Restart::SameHost => true,
            Restart::Anywhere => matches!(self.env.leases.stage(), Stage::Held { .. }),
        };
        if !may || self.record.spec.power != Power::On {
            return None;
        }
        let pause = self.restarts.next_pause();
        tracing::warn!(
            vm = self.id(),
            ?pause,
            "starting it again by its restart policy: {problem}"
        );
        Some(Next::StartAfter(Wait::Pause(pause)))
    }

    /// Waits, and carries out what does not need the VM meanwhile.
    pub(super) async fn await_start(&mut self, wait: Wait) -> Next {
        // The next agent goes on from here.
        let _ = self.enter(State::Starting(Assets::default()), None);
        let env = self.env.clone();
        let spec = self.record.spec.clone();
        let over = async {
            match wait {
                Wait::Pause(pause) => tokio::time::sleep(pause).await,
                Wait::Turn(order) => env.autostart.turn(order).await,
            }
        };
        tokio::pin!(over);
        let lapse = super::leased::lapse(&env, &spec);
        tokio::pin!(lapse);
        let next = loop {
            tokio::select! {
                () = &mut over => break self.start().await,
                () = &mut lapse => break self.finish(super::leased::LOST),
                command = self.commands.recv() => match command {
                    None => break Next::Gone,
                    Some(command) => self.command_while_starting(command),
                }
            }
            if self.record.spec.power != Power::On {
                break self.finish("stop-request");
            }
        };
        if let Wait::Turn(order) = wait {
            env.autostart.done(order);
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_until_it_stays_up() {
        let mut restarts = Restarts::default();
        assert!(!restarts.under_way());
        let mut pauses = Vec::new();
        for _ in 0..8 {
            pauses.push(restarts.next_pause().as_secs());
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert!(restarts.under_way());
        restarts.is_up();
        assert!(!restarts.under_way());
        tokio::time::advance(STABLE_AFTER).await;
        assert_eq!(restarts.next_pause(), FIRST_PAUSE);
    }
}
