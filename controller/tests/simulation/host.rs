//! A host: its clock, its agent with the production lease, and what its VMs' processes would do.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use api::node::{
    HostStatus, Power, RenewLeaseRequest, RenewLeaseResponse, RestartPolicy, VmPhase, VmSpec,
    VmStatus,
};
use controller::plan::{Call, Observed};
use lease::{HostLease, Moment, Renewal, Stage, Terms, Ticket};
use tokio::time::Instant;
use tonic::Status;

use crate::server::Server;

pub(crate) struct Host {
    pub(crate) id: String,
    began: Instant,
    /// What its clock showed then, and how it goes: thousandths of the true speed.
    zero: Duration,
    rate: u32,
    /// Devices stop at their own deadlines, without a word of the agent.
    deadlines: bool,
    state: Mutex<State>,
}

struct State {
    /// Has power.
    is_up: bool,
    /// How many faults hold all of it, as if it were suspended.
    freezes: u32,
    /// How many faults hold its agent alone; VMs and their devices go on.
    agent_freezes: u32,
    /// Its agent lives.
    has_agent: bool,
    /// Which of its agents, of all that ever lived here.
    agent: u64,
    /// The agent's, which the next one finds in a file.
    lease: HostLease,
    /// Numbers sessions and copies.
    next: u64,
    epoch: u64,
    vms: BTreeMap<String, Copy>,
}

/// A VM's processes here.
#[derive(Clone)]
struct Copy {
    /// Never the same twice, and later ones are higher.
    id: u64,
    spec: VmSpec,
    phase: VmPhase,
    stop_reason: String,
    /// Until when its device-blk does I/O.
    io_until: Moment,
}

/// A write on its way to the disk's server.
pub(crate) struct Write {
    pub(crate) export: String,
    pub(crate) generation: u64,
    pub(crate) copy: u64,
}

impl Host {
    /// `number` is part of its name, `rate` is 1000 for a clock that goes right.
    pub(crate) fn new(number: usize, zero: Duration, rate: u32, deadlines: bool) -> Self {
        let id = format!("h{number}");
        Self {
            began: Instant::now(),
            zero,
            rate,
            deadlines,
            state: Mutex::new(State {
                is_up: true,
                freezes: 0,
                agent_freezes: 0,
                has_agent: true,
                agent: 1,
                lease: HostLease::new(format!("{id}-0")),
                next: 1,
                epoch: 0,
                vms: BTreeMap::new(),
            }),
            id,
        }
    }

    fn now(&self) -> Moment {
        Moment(self.zero + self.began.elapsed() * self.rate / 1000)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Whether its agent takes calls.
    pub(crate) fn answers(&self) -> bool {
        let state = self.state();
        state.is_moving() && state.has_moving_agent()
    }

    /// Which agent takes calls or would; another one knows nothing of what this one had begun.
    pub(crate) fn agent(&self) -> u64 {
        self.state().agent
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.state().freezes > 0
    }

    /// SIGSTOP of everything, or a suspended machine.
    pub(crate) fn freeze(&self) {
        self.state().freezes += 1;
    }

    /// Whether it overslept the end of its lease.
    pub(crate) fn thaw(&self) -> bool {
        let now = self.now();
        let mut state = self.state();
        state.freezes -= 1;
        state.is_moving() && state.has_overslept(now)
    }

    /// SIGSTOP of the agent alone.
    pub(crate) fn freeze_agent(&self) {
        self.state().agent_freezes += 1;
    }

    /// Whether it overslept the end of its host's lease, so that devices had to stop by themselves.
    pub(crate) fn thaw_agent(&self) -> bool {
        let now = self.now();
        let mut state = self.state();
        state.agent_freezes -= 1;
        state.is_moving() && state.has_moving_agent() && state.has_overslept(now)
    }

    pub(crate) fn set_agent(&self, lives: bool) {
        let mut state = self.state();
        state.has_agent = lives;
        state.agent += 1;
    }

    /// Power goes: nothing is left of what ran.
    pub(crate) fn crash(&self) {
        let mut state = self.state();
        state.is_up = false;
        state.agent += 1;
        for copy in state.vms.values_mut().filter(|copy| copy.is_active()) {
            copy.phase = VmPhase::Stopped;
            copy.stop_reason = "host-reboot".to_owned();
        }
    }

    pub(crate) fn boot(&self) {
        let mut state = self.state();
        let session = state.new_session(&self.id);
        state.lease = HostLease::new(session);
        (state.is_up, state.has_agent) = (true, true);
    }

    /// What the agent's loop and its VMs' tasks do every now and then.
    pub(crate) fn tick(&self) {
        let now = self.now();
        let mut state = self.state();
        if !state.is_moving() || !state.has_moving_agent() {
            return;
        }
        let stage = state.lease.stage(now);
        for copy in state.vms.values_mut().filter(|copy| copy.is_active()) {
            match stage {
                Stage::Held { until } => {
                    copy.io_until = until;
                    copy.phase = VmPhase::Running;
                }
                Stage::Suspended { .. } => copy.phase = VmPhase::Paused,
                Stage::Unheld | Stage::Lapsed => {
                    copy.phase = VmPhase::Stopped;
                    copy.stop_reason = "lease-lost".to_owned();
                }
            }
        }
        if stage == Stage::Lapsed {
            let session = state.new_session(&self.id);
            state.lease.settled(session);
        }
    }

    /// Copies of VMs that are let do something: they run, and their disks may be used.
    pub(crate) fn running(&self) -> Vec<String> {
        let now = self.now();
        let state = self.state();
        if !state.is_moving() {
            return Vec::new();
        }
        let running = state
            .vms
            .iter()
            .filter(|(_, copy)| self.may_write(copy, now));
        running.map(|(id, _)| id.clone()).collect()
    }

    /// It is let run, and use its disk.
    fn may_write(&self, copy: &Copy, now: Moment) -> bool {
        copy.phase == VmPhase::Running && (now < copy.io_until || !self.deadlines)
    }

    /// Requests that guests' disks begin now.
    pub(crate) fn writes(&self) -> Vec<Write> {
        let now = self.now();
        let state = self.state();
        if !state.is_moving() {
            return Vec::new();
        }
        let writers = state.vms.values().filter(|copy| self.may_write(copy, now));
        writers
            .filter_map(|copy| {
                let nbd = copy.spec.disks.first()?.nbd.as_ref()?;
                Some(Write {
                    export: nbd.export.clone(),
                    generation: nbd.generation,
                    copy: copy.id,
                })
            })
            .collect()
    }

    /// What a controller sees.
    pub(crate) fn observed(&self) -> Observed {
        let state = self.state();
        Observed {
            host: Some(HostStatus {
                lease_session: state.lease.session().to_owned(),
                ..inventory(&self.id)
            }),
            vms: state
                .vms
                .iter()
                .map(|(id, copy)| (id.clone(), copy.status()))
                .collect(),
            connected: true,
            ..Observed::default()
        }
    }

    /// What stands before everything that a leader asks for.
    pub(crate) fn admit(&self, epoch: u64) -> Result<(), Status> {
        let mut state = self.state();
        if epoch < state.epoch {
            return Err(Status::unavailable("somebody else leads"));
        }
        state.epoch = epoch;
        Ok(())
    }

    pub(crate) fn renew(&self, request: &RenewLeaseRequest) -> RenewLeaseResponse {
        let now = self.now();
        let mut state = self.state();
        let term = |term_ms: u32| Duration::from_millis(term_ms.into());
        let renewal = Renewal {
            ticket: Ticket {
                session: request.session.clone(),
                at: Moment::from_nanos(request.ticket_boottime_ns),
            },
            terms: Terms {
                lease: term(request.lease_ms),
                grace: term(request.grace_ms),
                settle: term(request.settle_ms),
            },
            epoch: 0,
        };
        let refusal = match request.session.is_empty() {
            true => None,
            false => state.lease.renew(&renewal, now).err(),
        };
        let ticket = state.lease.ticket(now);
        RenewLeaseResponse {
            session: ticket.session,
            ticket_boottime_ns: ticket.at.as_nanos(),
            refusal: refusal
                .map(|refused| refused.to_string())
                .unwrap_or_default(),
            ..RenewLeaseResponse::default()
        }
    }

    pub(crate) fn told(&self, call: &Call, server: &Server) -> Result<(), Status> {
        let now = self.now();
        let mut state = self.state();
        match call {
            Call::ApplyVm(spec) => state.apply(spec, now, server),
            Call::DeleteVm(id) => {
                if state.vms.get(id).is_some_and(Copy::is_active) {
                    return Err(Status::failed_precondition("it runs"));
                }
                state.vms.remove(id);
                Ok(())
            }
            Call::EvictVm(id) => {
                state.vms.remove(id);
                Ok(())
            }
            _ => Err(Status::unimplemented("not simulated")),
        }
    }
}

/// What a host has, apart from what changes.
pub(crate) fn inventory(id: &str) -> HostStatus {
    HostStatus {
        host_id: id.to_owned(),
        hostname: id.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        cpus: 8,
        memory_bytes: 16 << 30,
        kvm: "hardware".to_owned(),
        ..HostStatus::default()
    }
}

impl State {
    fn new_session(&mut self, host: &str) -> String {
        self.next += 1;
        format!("{host}-{}", self.next)
    }

    fn is_moving(&self) -> bool {
        self.is_up && self.freezes == 0
    }

    fn has_moving_agent(&self) -> bool {
        self.has_agent && self.agent_freezes == 0
    }

    /// A VM is still taken for running although its device had to stop by now.
    fn has_overslept(&self, now: Moment) -> bool {
        let running = |copy: &Copy| copy.phase == VmPhase::Running && now >= copy.io_until;
        self.vms.values().any(running)
    }

    fn apply(&mut self, spec: &VmSpec, now: Moment, server: &Server) -> Result<(), Status> {
        let on = spec.power() == Power::On;
        if on && spec.restart_policy() == RestartPolicy::Anywhere {
            let is_held = matches!(self.lease.stage(now), Stage::Held { .. });
            if !is_held || spec.lease_session != self.lease.session() {
                return Err(Status::unavailable("no lease"));
            }
        }
        let known = self.vms.get(&spec.id);
        match known.map(|copy| copy.spec.generation) {
            Some(known) if spec.generation < known => {
                return Err(Status::unavailable("a newer wish is known"));
            }
            Some(known) if spec.generation == known => return Ok(()),
            _ => {}
        }
        if let Some(copy) = self
            .vms
            .get_mut(&spec.id)
            .filter(|copy| copy.is_active() && on)
        {
            copy.spec.generation = spec.generation;
            return Ok(());
        }
        self.next += 1;
        let until = match self.lease.stage(now) {
            Stage::Held { until } => until,
            _ => Moment::default(),
        };
        let nbd = spec.disks.first().and_then(|disk| disk.nbd.as_ref());
        let is_let_in =
            !on || nbd.is_none_or(|nbd| server.admit(&nbd.export, nbd.generation, self.next));
        let (phase, stop_reason) = match (on, is_let_in) {
            (true, true) => (VmPhase::Running, ""),
            (true, false) => (VmPhase::Failed, "refused by the disk's server"),
            (false, _) => (VmPhase::Stopped, "stop-request"),
        };
        let copy = Copy {
            id: self.next,
            spec: spec.clone(),
            phase,
            stop_reason: stop_reason.to_owned(),
            io_until: until,
        };
        self.vms.insert(spec.id.clone(), copy);
        Ok(())
    }
}

impl Copy {
    fn is_active(&self) -> bool {
        matches!(self.phase, VmPhase::Running | VmPhase::Paused)
    }

    fn status(&self) -> VmStatus {
        VmStatus {
            id: self.spec.id.clone(),
            observed_generation: self.spec.generation,
            phase: self.phase.into(),
            stop_reason: self.stop_reason.clone(),
            ..VmStatus::default()
        }
    }
}
