//! The NICs of a network whose datapath is a switch: what ports are wanted, and what its daemon was
//! told of them. VMs want and withdraw ports whether the daemon runs or not; its keeper
//! ([`super::switch`]) asks for the next step until nothing is left to do.
//!
//! ```text
//!            want                  attached                told
//! (none) ───────────▶ Waiting ───────────────▶ Attached ─────────▶ Attached, as wanted
//!    ▲                 ▲   ▲                    │
//!    │ withdraw,       │   └────────────────────┘ the daemon died
//!    │ detached        └── Failed: tried again after a pause
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::net::UnixListener,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use api::{device::Policy, node::NetworkSpec};
use tokio::sync::{Notify, watch};
use tonic::Code;

use super::{
    policy,
    port::{PortPlan, Told, port_id},
};
use crate::{
    process::Process,
    spec::NicTuning,
    vm::{DaemonError, error_chain},
};

/// What was refused or got lost is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// All ports of one network. Shared by the network, VMs and the daemon's keeper.
#[derive(Debug)]
pub(super) struct Ports {
    table: Mutex<Table>,
    /// Wakes the keeper.
    changed: Notify,
    /// Rises with whatever happens, for those who wait.
    events: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Table {
    /// Says what NICs may let pass.
    spec: NetworkSpec,
    wanted: BTreeMap<String, Port>,
    /// What the daemon has attached, whether it is wanted or not.
    served: BTreeSet<String>,
    /// What it did not detach, and when to ask again.
    stuck: BTreeMap<String, Instant>,
    daemon: DaemonState,
    last_serial: u64,
}

/// What is known of the daemon.
#[derive(Clone, Debug, Default)]
pub(super) struct DaemonState {
    /// `None` while it is being restarted.
    pub(super) process: Option<Process>,
    pub(super) restarts: u64,
    pub(super) sandbox: Vec<String>,
    /// What it says its version is.
    pub(super) version: String,
    /// What it was upgraded to; empty for the installed program.
    pub(super) build: String,
    /// Why it is not there or was last restarted.
    pub(super) last_error: String,
}

/// A daemon that runs.
#[derive(Debug)]
pub(super) struct Daemon {
    pub(super) process: Process,
    pub(super) sandbox: Vec<String>,
    pub(super) version: String,
    pub(super) build: String,
}

#[derive(Debug)]
struct Port {
    plan: PortPlan,
    /// Held while it is wanted, so that connecting never races a restart. `None` of a port that an earlier
    /// agent made: its socket is the daemon's.
    listener: Option<Arc<UnixListener>>,
    /// An earlier agent may have attached it.
    adopted: bool,
    /// Of this wish: a NIC may go and come back while a step is on its way.
    serial: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    Waiting,
    Attached { told: Option<Told> },
    Failed { problem: Problem, retry_at: Instant },
}

/// Why a port is not served.
#[derive(Clone, Debug)]
pub(super) struct Problem {
    pub(super) code: Code,
    pub(super) message: String,
    /// Trying again changes nothing.
    is_final: bool,
}

/// What the keeper does next.
#[derive(Debug)]
pub(super) enum Step {
    Detach {
        id: String,
    },
    Attach {
        id: String,
        serial: u64,
        listener: Option<Arc<UnixListener>>,
        plan: Box<PortPlan>,
        told: Told,
    },
    Tell {
        id: String,
        serial: u64,
        told: Told,
    },
}

impl Default for Ports {
    fn default() -> Self {
        Self {
            table: Mutex::default(),
            changed: Notify::new(),
            events: watch::Sender::new(0),
        }
    }
}

impl Ports {
    /// Replaces what policies are made of.
    pub(super) fn set_spec(&self, spec: &NetworkSpec) {
        self.table().spec = spec.clone();
        self.changed.notify_one();
    }

    /// Wants a port; `adopted` if the daemon may have it already.
    pub(super) fn want(&self, plan: PortPlan, adopted: bool) {
        let mut table = self.table();
        table.last_serial += 1;
        let port = Port {
            listener: None,
            adopted,
            serial: table.last_serial,
            state: State::Waiting,
            plan,
        };
        let id = port_id(&port.plan.vm, &port.plan.nic);
        table.wanted.insert(id, port);
        drop(table);
        self.changed.notify_one();
    }

    /// Takes over what may change of a port.
    pub(super) fn tune(&self, id: &str, tuning: NicTuning) {
        if let Some(port) = self.table().wanted.get_mut(id) {
            port.plan.tuning = tuning;
        }
        self.changed.notify_one();
    }

    /// Wants no port of a VM any more; waits until the daemon has let go of them, at most for `deadline`.
    pub(super) async fn withdraw(&self, vm: &str, deadline: Duration) {
        let gone: Vec<String> = {
            let mut table = self.table();
            let of_vm = table.wanted.iter().filter(|(_, port)| port.plan.vm == vm);
            let gone: Vec<String> = of_vm.map(|(id, _)| id.clone()).collect();
            for id in &gone {
                table.wanted.remove(id);
            }
            gone
        };
        if gone.is_empty() {
            return;
        }
        self.changed.notify_one();
        let let_go = self.until(|table| {
            let any_served = gone.iter().any(|id| table.served.contains(id));
            (table.daemon.process.is_none() || !any_served).then_some(())
        });
        if tokio::time::timeout(deadline, let_go).await.is_err() {
            tracing::warn!(vm, "the switch still has NICs of it; it is told again");
        }
    }

    /// Waits until the port is served, or it is known why it cannot be.
    pub(super) async fn served(&self, id: &str, deadline: Duration) -> Result<(), Problem> {
        let ended = self.until(|table| match &table.wanted.get(id)?.state {
            State::Attached { .. } => Some(Ok(())),
            State::Failed { problem, .. } if problem.is_final => Some(Err(problem.clone())),
            _ => None,
        });
        match tokio::time::timeout(deadline, ended).await {
            Ok(ended) => ended,
            Err(_) => Err(self.why_not(id)),
        }
    }

    /// Waits until all attached ports are told what is wanted of them.
    pub(super) async fn told(&self, deadline: Duration) -> Result<(), (PortPlan, Problem)> {
        let ended = self.until(|table| {
            for port in table.wanted.values() {
                match &port.state {
                    State::Attached { told } if *told != Some(table.wish(port)) => return None,
                    State::Failed { problem, .. } if problem.is_final => {
                        return Some(Err((port.plan.clone(), problem.clone())));
                    }
                    _ => {}
                }
            }
            Some(Ok(()))
        });
        // One that dies meanwhile is told by what its successor is attached with.
        tokio::time::timeout(deadline, ended)
            .await
            .unwrap_or(Ok(()))
    }

    /// Waits until the daemon runs.
    pub(super) async fn up(&self, deadline: Duration) -> Result<(), Problem> {
        let up = self.until(|table| table.daemon.process.as_ref().map(drop));
        tokio::time::timeout(deadline, up).await.map_err(|_| {
            let message = self.table().daemon.last_error.clone();
            Problem::transient(Code::Unavailable, message)
        })
    }

    /// The daemon as it is now.
    pub(super) fn daemon(&self) -> DaemonState {
        self.table().daemon.clone()
    }

    /// NICs that are wanted, as VM/NIC.
    pub(super) fn names(&self) -> Vec<String> {
        let table = self.table();
        let names = table.wanted.values();
        names
            .map(|port| format!("{}/{}", port.plan.vm, port.plan.nic))
            .collect()
    }

    /// A daemon's metrics with its NICs' labels as those of a VM's own daemon are.
    pub(super) fn with_names(&self, mut text: String) -> String {
        for (id, port) in &self.table().wanted {
            let own = format!("vm=\"{}\",device=\"{}\"", port.plan.vm, port.plan.nic);
            text = text.replace(&format!("device=\"{id}\""), &own);
        }
        text
    }

    /// The NICs of a VM that are wanted.
    pub(super) fn of_vm(&self, vm: &str) -> Vec<String> {
        let table = self.table();
        let of_vm = table.wanted.values().filter(|port| port.plan.vm == vm);
        of_vm.map(|port| port.plan.nic.clone()).collect()
    }

    /// Whether all NICs that are wanted are attached.
    ///
    /// # Errors
    /// Which one is not, and why if that is known.
    pub(super) fn all_attached(&self) -> Result<(), String> {
        for (id, port) in &self.table().wanted {
            match &port.state {
                State::Attached { .. } => {}
                State::Waiting => return Err(format!("{id} was not attached in time")),
                State::Failed { problem, .. } => return Err(format!("{id}: {}", problem.message)),
            }
        }
        Ok(())
    }

    /// Whether there is such a NIC.
    pub(super) fn wants(&self, id: &str) -> bool {
        self.table().wanted.contains_key(id)
    }

    /// A daemon runs, with these devices already.
    pub(super) fn came_up(&self, daemon: Daemon, served: BTreeSet<String>) {
        self.happened(|table| {
            table.daemon.process = Some(daemon.process);
            table.daemon.sandbox = daemon.sandbox;
            table.daemon.version = daemon.version;
            table.daemon.build = daemon.build;
            table.served = served;
            table.stuck.clear();
        });
    }

    /// It was not the first one.
    pub(super) fn count_restart(&self) {
        self.happened(|table| table.daemon.restarts += 1);
    }

    /// No daemon runs, and why.
    pub(super) fn went_down(&self, error: String) {
        self.happened(|table| {
            table.daemon.process = None;
            table.daemon.last_error = error;
            table.served.clear();
            table.stuck.clear();
            for port in table.wanted.values_mut() {
                port.state = State::Waiting;
            }
        });
    }

    /// Waits until there may be a next step.
    pub(super) async fn changed(&self) {
        let next = self.table().next_retry();
        match next {
            Some(at) => {
                let _ = tokio::time::timeout_at(at.into(), self.changed.notified()).await;
            }
            None => self.changed.notified().await,
        }
    }

    /// The next thing that the daemon has to be told.
    pub(super) fn next_step(&self) -> Option<Step> {
        let mut table = self.table();
        let step = table.next_step();
        drop(table);
        // An adopted port that is found attached is no step, but news.
        self.happened(|_| {});
        step
    }

    /// How a step ended.
    pub(super) fn detached(&self, id: &str, result: Result<(), DaemonError>) {
        self.happened(|table| match result {
            Ok(())
            | Err(DaemonError::Call {
                code: Code::NotFound,
                ..
            }) => {
                table.served.remove(id);
                table.stuck.remove(id);
            }
            Err(error) => {
                tracing::warn!(port = id, "{}", error_chain(&error));
                table
                    .stuck
                    .insert(id.to_owned(), Instant::now() + RETRY_AFTER);
            }
        });
    }

    /// How a step ended; with the listener that the daemon was handed.
    pub(super) fn attached(
        &self,
        (id, serial): (&str, u64),
        told: Told,
        result: Result<Arc<UnixListener>, DaemonError>,
    ) {
        self.happened(|table| {
            // One that gave no answer may have it: it is detached before it is attached again.
            if result.as_ref().map_or_else(is_unanswered, |_| true) {
                table.served.insert(id.to_owned());
            }
            let Some(port) = table
                .wanted
                .get_mut(id)
                .filter(|port| port.serial == serial)
            else {
                return;
            };
            match result {
                Ok(listener) => {
                    port.listener = Some(listener);
                    port.state = State::Attached { told: Some(told) };
                }
                Err(error) => port.fail(error),
            }
        });
    }

    /// How a step ended.
    pub(super) fn was_told(
        &self,
        (id, serial): (&str, u64),
        told: Told,
        result: Result<(), DaemonError>,
    ) {
        self.happened(|table| {
            let port = table.wanted.get_mut(id);
            let Some(port) = port.filter(|port| port.serial == serial) else {
                return;
            };
            match result {
                Ok(()) => port.state = State::Attached { told: Some(told) },
                Err(error) => {
                    // Attached all the same; found so when it is tried again.
                    port.adopted = true;
                    port.fail(error);
                }
            }
        });
    }

    fn why_not(&self, id: &str) -> Problem {
        let table = self.table();
        if let Some(Port {
            state: State::Failed { problem, .. },
            ..
        }) = table.wanted.get(id)
        {
            return problem.clone();
        }
        let message = match table.daemon.last_error.as_str() {
            "" => "its switch did not take the NIC in time".to_owned(),
            error => error.to_owned(),
        };
        Problem::transient(Code::Unavailable, message)
    }

    async fn until<T>(&self, mut question: impl FnMut(&Table) -> Option<T>) -> T {
        let mut events = self.events.subscribe();
        loop {
            events.borrow_and_update();
            if let Some(answer) = question(&self.table()) {
                return answer;
            }
            if events.changed().await.is_err() {
                // The sender is ours.
                std::future::pending::<()>().await;
            }
        }
    }

    fn happened(&self, what: impl FnOnce(&mut Table)) {
        what(&mut self.table());
        self.events.send_modify(|events| *events += 1);
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("nothing panics under this lock")
    }
}

impl Table {
    fn next_step(&mut self) -> Option<Step> {
        self.daemon.process.as_ref()?;
        let now = Instant::now();
        let unwanted = self.served.iter().find(|id| {
            let stuck = self.stuck.get(*id).is_some_and(|until| *until > now);
            let kept = self
                .wanted
                .get(*id)
                .is_some_and(|port| port.adopted || matches!(port.state, State::Attached { .. }));
            !stuck && !kept
        });
        if let Some(id) = unwanted {
            return Some(Step::Detach { id: id.clone() });
        }
        let ids: Vec<String> = self.wanted.keys().cloned().collect();
        ids.iter().find_map(|id| self.step_of(id, now))
    }

    /// What has to be done about one port that is wanted.
    fn step_of(&mut self, id: &str, now: Instant) -> Option<Step> {
        let is_served = self.served.contains(id);
        let port = self.wanted.get_mut(id)?;
        match &port.state {
            State::Failed { retry_at, .. } if *retry_at > now => return None,
            State::Attached { .. } => {}
            // Not detached yet.
            _ if is_served && !port.adopted => return None,
            _ if is_served => {
                port.adopted = false;
                port.state = State::Attached { told: None };
            }
            _ => {}
        }
        let port = self.wanted.get(id)?;
        let wish = self.wish(port);
        let (id, serial) = (id.to_owned(), port.serial);
        match &port.state {
            State::Attached { told } if told.as_ref() == Some(&wish) => None,
            State::Attached { .. } => Some(Step::Tell {
                id,
                serial,
                told: wish,
            }),
            _ => Some(Step::Attach {
                id,
                serial,
                listener: port.listener.clone(),
                plan: Box::new(port.plan.clone()),
                told: wish,
            }),
        }
    }

    fn wish(&self, port: &Port) -> Told {
        let policy = policy::of(&self.spec, &port.plan.vm, &port.plan.nic);
        let policy = match port.plan.track_flows {
            true => Some(Policy {
                track_flows: true,
                ..policy.unwrap_or_default()
            }),
            false => policy,
        };
        Told {
            policy,
            tuning: port.plan.tuning,
        }
    }

    fn next_retry(&self) -> Option<Instant> {
        let failed = self.wanted.values().filter_map(|port| match &port.state {
            State::Failed { retry_at, .. } => Some(*retry_at),
            _ => None,
        });
        failed.chain(self.stuck.values().copied()).min()
    }
}

impl Port {
    fn fail(&mut self, error: DaemonError) {
        let problem = Problem::of(&error);
        tracing::warn!(
            vm = self.plan.vm,
            nic = self.plan.nic,
            "{}",
            problem.message
        );
        self.state = State::Failed {
            problem,
            retry_at: Instant::now() + RETRY_AFTER,
        };
    }
}

impl Problem {
    fn of(error: &DaemonError) -> Self {
        let is_final = match error {
            DaemonError::Call { .. } => !is_unanswered(error),
            DaemonError::Listen { .. } => true,
            _ => false,
        };
        Self {
            code: error.code(),
            message: error_chain(error),
            is_final,
        }
    }

    fn transient(code: Code, message: String) -> Self {
        Self {
            code,
            message,
            is_final: false,
        }
    }
}

/// A call that a dying daemon cut off, or one that took too long.
fn is_unanswered(error: &DaemonError) -> bool {
    let DaemonError::Call { code, .. } = error else {
        return false;
    };
    matches!(
        code,
        Code::Unknown | Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded
    )
}

#[cfg(test)]
mod tests;
