//! Devices go from one process to another and, if need be, back. Each goes by itself, so that its guest's
//! requests wait for it alone.

use std::{sync::Arc, time::Duration};

use tokio::task::JoinSet;

use super::super::{
    daemon::{DaemonError, DevicePlan, Listeners, Plan},
    incarnation::{Drained, Incarnation, Standby},
};
use crate::process::Process;

/// A process that failed its gate has no longer than this to complete what it has in flight.
const GIVE_BACK_WITHIN: Duration = Duration::from_secs(1);

/// How often a process that takes devices is asked whether it is there, and how long it has for an answer.
const ASK_INTERVAL: Duration = Duration::from_millis(50);
const SILENT_AFTER: Duration = Duration::from_millis(500);

/// See the module's description.
pub(super) struct Handover {
    old_plan: Arc<Plan>,
    new_plan: Arc<Plan>,
    listeners: Listeners,
    old: Side,
    new: Side,
}

/// One of the two processes.
#[derive(Clone)]
struct Side {
    /// `None` when it does not answer.
    incarnation: Option<Incarnation>,
    process: Option<Process>,
}

impl Handover {
    pub(super) fn new(old_plan: &Plan, new_plan: &Plan, listeners: &Listeners) -> Self {
        let nobody = Side {
            incarnation: None,
            process: None,
        };
        Self {
            old_plan: Arc::new(old_plan.clone()),
            new_plan: Arc::new(new_plan.clone()),
            listeners: listeners.clone(),
            old: nobody.clone(),
            new: nobody,
        }
    }

    /// Who has the devices.
    pub(super) fn from(mut self, incarnation: Option<Incarnation>, process: &Process) -> Self {
        self.old = Side {
            incarnation,
            process: Some(process.clone()),
        };
        self
    }

    /// Who is to have them.
    pub(super) fn to(mut self, standby: &Standby) -> Self {
        self.new = Side {
            incarnation: Some(standby.incarnation.clone()),
            process: Some((*standby.process).clone()),
        };
        self
    }

    /// The new process takes all devices, whatever the old one does: one that does not let go is killed, and
    /// what it had in flight is replayed. Notes of such devices.
    ///
    /// # Errors
    /// What the new process could not take, and why.
    pub(super) async fn take(&mut self, drain: Duration) -> Result<Vec<String>, DaemonError> {
        let moving = all(self.moving(&self.old, &self.new, &self.new_plan, drain));
        tokio::pin!(moving);
        let moved = tokio::select! {
            moved = &mut moving => moved,
            // What is under way fails at once then, and the guest waits no longer.
            () = self.new.silence() => {
                self.new.end().await;
                moving.await
            }
        };
        if self
            .old
            .process
            .as_ref()
            .is_none_or(|old| old.exit().is_some())
        {
            self.old.incarnation = None;
        }
        moved
    }

    /// The old process gets all devices back.
    ///
    /// # Errors
    /// It is gone, or could not take them.
    pub(super) async fn give_back(&mut self, standby: &Standby) -> Result<(), DaemonError> {
        if self.old.incarnation.is_none() {
            standby.process.kill().await;
            return Err(DaemonError::Exited(format!(
                "the old {} is not there any more",
                self.old_plan.kind.program()
            )));
        }
        // One that hangs is not waited for: guests are.
        if !standby.is_awake().await {
            standby.process.kill().await;
            self.new.incarnation = None;
        }
        let moving = self.moving(&self.new, &self.old, &self.old_plan, GIVE_BACK_WITHIN);
        all(moving).await.map(drop)
    }

    fn moving(
        &self,
        from: &Side,
        to: &Side,
        plan: &Arc<Plan>,
        drain: Duration,
    ) -> JoinSet<Result<Option<String>, DaemonError>> {
        let mut moving = JoinSet::new();
        for device in &plan.devices {
            let (from, to, plan) = (from.clone(), to.clone(), plan.clone());
            let listener = self.listeners[&device.name].clone();
            let device = device.clone();
            moving.spawn(async move {
                let to = to
                    .incarnation
                    .expect("it answered before anything was moved");
                move_one(&from, &to, &plan, device, listener, drain).await
            });
        }
        moving
    }
}

async fn move_one(
    from: &Side,
    to: &Incarnation,
    plan: &Plan,
    device: DevicePlan,
    listener: Arc<std::os::unix::net::UnixListener>,
    drain: Duration,
) -> Result<Option<String>, DaemonError> {
    let name = device.name.clone();
    // Opened while the other process serves on, where that is possible: the guest waits for less.
    let sent = match device.opens_beside_another() {
        true => {
            let sending = plan.send_descriptors(&to.sockets.fds, device.clone(), listener.clone());
            Some(sending.await?)
        }
        false => None,
    };
    let note = from.release(&name, drain).await;
    match sent {
        Some(request) => to.attach_sent(request).await?,
        None => to.attach(plan, device, listener).await?,
    }
    Ok(note)
}

impl Side {
    /// Comes when the process does not answer any more. A device may take long to attach (ghosts of the old
    /// process, a passphrase); the process answers all the same.
    async fn silence(&self) {
        let Some(incarnation) = &self.incarnation else {
            return std::future::pending().await;
        };
        while incarnation.info(SILENT_AFTER).await.is_ok() {
            tokio::time::sleep(ASK_INTERVAL).await;
        }
    }

    /// Lets go of a device, dead or alive. A note if that delayed requests.
    async fn release(&self, device: &str, drain: Duration) -> Option<String> {
        let Some(incarnation) = &self.incarnation else {
            self.end().await;
            return Some(format!(
                "{device}: the process that served it did not answer and was killed"
            ));
        };
        match incarnation.detach(device, drain).await {
            Ok(Drained::Wholly) => None,
            Ok(Drained::InPart(what)) => {
                // What the kernel still does for it must be over before the next one begins: only the
                // process's end is sure to drop the image's lock then.
                self.end().await;
                Some(format!("{device}: {what}; they were replayed"))
            }
            Err(error) if error.is_not_found() => None,
            Err(error) => {
                self.end().await;
                Some(format!("{device}: {error}; the process was killed"))
            }
        }
    }

    async fn end(&self) {
        if let Some(process) = &self.process {
            process.kill().await;
        }
    }
}

/// Waits for all of them; the notes, or the first error.
async fn all(
    mut moving: JoinSet<Result<Option<String>, DaemonError>>,
) -> Result<Vec<String>, DaemonError> {
    let (mut notes, mut first_error) = (Vec::new(), None);
    while let Some(joined) = moving.join_next().await {
        match joined {
            Ok(Ok(note)) => notes.extend(note),
            Ok(Err(error)) => first_error = first_error.or(Some(error)),
            Err(panic) => panic!("handing a device over: {panic}"),
        }
    }
    first_error.map_or(Ok(notes), Err)
}
