//! Rolling upgrades of hosts: what the leading controller does with the one that is in the store.
//!
//! ```text
//! Waiting ── there is room ──▶ Agent: told ─▶ on trial, all is well: confirmed ─▶ its new agent is there for good
//!                                │                                          │
//!                                └── refused, rolled back, not back ─▶ Failed ◀── Daemons: one operation for each kind
//!                                                                                   └──▶ Done
//! ```
//!
//! Each step is stored before it is begun and may be begun twice, so the next controller goes on where one
//! ended. A host rolls its agent back by itself when nobody confirms it, whatever becomes of the
//! controllers. [`waves`] says who begins.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::controller as pb;
use api::node::{AgentUpgrade, AgentUpgradeState, UpgradeAgentRequest, VmPhase};
use api::validate::{DEVICE_PROGRAMS, UpgradeTarget};
use futures_util::future::join_all;
use prost::Message as _;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::commands::{self, CommandError};
use crate::hosts::Hosts;
use crate::model::{self, HOST_UPGRADE, HostProgress, HostUpgradeRecord, UpgradeStage, VmRecord};
use crate::node::Node;
use crate::plan::Observed;
use crate::reconciler::{decode, with_source};
use crate::store::{SharedStore, StoreError, Transaction};

mod waves;

use waves::Next;

/// Between two looks at hosts that are under way.
const LOOK_INTERVAL: Duration = Duration::from_millis(300);
/// A failing store is given this long before the next attempt.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// A host has jobs that would have to begin anew, VMs that are started, or does not answer, no longer.
const BUSY_WITHIN: Duration = Duration::from_secs(600);
/// Nothing can begin because hosts do not answer, no longer.
const BLOCKED_WITHIN: Duration = Duration::from_secs(600);
/// What a new agent has when the request does not say; as agents have it.
const DEFAULT_CONFIRM: Duration = Duration::from_secs(60);
/// What is kept of what one stage of a host comes to, in bytes. Operations of its devices have the rest.
const LONGEST_FINDING: usize = 200;
/// For two agents to end and two to begin, in addition to what a new one has to be confirmed.
const EXCHANGE_WITHIN: Duration = Duration::from_secs(90);

/// Does what is wanted while this controller leads; ends when it leads no more.
pub async fn run(store: SharedStore, hosts: Hosts) {
    let notes = Notes::default();
    loop {
        match follow(&store, &hosts, &notes).await {
            Ok(()) => {}
            Err(StoreError::Deposed) => return,
            Err(error) => {
                tracing::error!(error = %with_source(&error), "cannot go on with an upgrade of hosts");
                tokio::time::sleep(STORE_RETRY).await;
            }
        }
    }
}

/// What this controller alone knows of an upgrade. The next one gives each wait its whole time again.
#[derive(Default)]
struct Notes {
    /// Since when something is waited for.
    clocks: Mutex<BTreeMap<String, Instant>>,
    /// Hosts that are being told. They check binaries first, and trials of others must not wait for that.
    tellings: Mutex<BTreeMap<String, JoinHandle<Result<AgentUpgrade, Status>>>>,
}

impl Notes {
    fn since(&self, what: &str) -> Duration {
        let mut clocks = lock(&self.clocks);
        let begun = clocks.entry(what.to_owned()).or_insert_with(Instant::now);
        begun.elapsed()
    }

    fn has(&self, what: &str) -> bool {
        lock(&self.clocks).contains_key(what)
    }

    fn forget(&self, what: &str) {
        lock(&self.clocks).remove(what);
    }

    fn clear(&self) {
        lock(&self.clocks).clear();
        lock(&self.tellings).clear();
    }

    /// Tells a host, unless it is being told. What it answered, as soon as it has.
    async fn tell(
        &self,
        node: &Node,
        host: &str,
        record: &HostUpgradeRecord,
    ) -> Option<Result<AgentUpgrade, Status>> {
        let answered = {
            let mut tellings = lock(&self.tellings);
            let telling = tellings.entry(host.to_owned()).or_insert_with(|| {
                let (node, request) = (node.clone(), request(record));
                tokio::spawn(async move { node.upgrade_agent(request).await })
            });
            match telling.is_finished() {
                true => tellings.remove(host)?,
                false => return None,
            }
        };
        let panicked = |error| Status::internal(format!("telling the host: {error}"));
        Some(answered.await.unwrap_or_else(|error| Err(panicked(error))))
    }
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn follow(store: &SharedStore, hosts: &Hosts, notes: &Notes) -> Result<(), StoreError> {
    let revision = *store.revision().borrow();
    let mut changes = store.watch(HOST_UPGRADE, revision).await?;
    loop {
        let Some(item) = store.get(HOST_UPGRADE).await? else {
            notes.clear();
            match changes.recv().await {
                Some(Ok(_)) => continue,
                Some(Err(StoreError::Compacted { .. })) | None => return Ok(()),
                Some(Err(error)) => return Err(error),
            }
        };
        let record: HostUpgradeRecord = decode(&item.key, &item.value)?;
        let upgrade = Upgrade {
            store,
            hosts,
            record: &record,
            revision: item.revision,
        };
        match upgrade.step(notes).await {
            // Somebody cancelled it meanwhile.
            Ok(()) | Err(StoreError::Conflict { .. }) => {}
            Err(error) => return Err(error),
        }
        match tokio::time::timeout(LOOK_INTERVAL, changes.recv()).await {
            Ok(None | Some(Err(StoreError::Compacted { .. }))) => return Ok(()),
            Ok(Some(Err(error))) => return Err(error),
            Ok(Some(Ok(_))) | Err(_) => {}
        }
    }
}

/// One look at an upgrade.
struct Upgrade<'a> {
    store: &'a SharedStore,
    hosts: &'a Hosts,
    record: &'a HostUpgradeRecord,
    revision: u64,
}

/// What becomes of a host.
enum Turn {
    /// It waits for this.
    Stays(String),
    /// What was done, if anything; the next stage comes.
    Goes(Option<String>),
    /// Why it is not exchanged.
    Fails(String),
}

impl Upgrade<'_> {
    async fn step(&self, notes: &Notes) -> Result<(), StoreError> {
        let down = self.down();
        let mut after = self.record.clone();
        match waves::next(self.record, &down) {
            Next::Over => {
                self.finish().await?;
                notes.clear();
                return Ok(());
            }
            Next::Blocked(down) => self.blocked(&mut after, &down, notes),
            Next::Begin(places) => {
                notes.forget("blocked");
                for place in places {
                    self.begin(&mut after.hosts[place]);
                }
            }
        }
        // Those that were stored as begun before.
        let both = self.record.hosts.iter().zip(&mut after.hosts);
        let under_way = both.filter(|(before, _)| waves::is_under_way(before.stage()));
        let mut driving = Vec::new();
        for (_, progress) in under_way {
            driving.push(self.drive(progress, notes));
        }
        for driven in join_all(driving).await {
            driven?;
        }
        if after == *self.record {
            return Ok(());
        }
        let transaction = Transaction::new()
            .if_unchanged(HOST_UPGRADE, self.revision)
            .put(HOST_UPGRADE, after.encode_to_vec());
        self.store.commit(transaction).await.map(drop)
    }

    /// Hosts of the fleet that do not answer.
    fn down(&self) -> BTreeSet<String> {
        let ids = self.hosts.ids().into_iter();
        let mut down: BTreeSet<String> = ids
            .filter(|id| !self.hosts.observed(id).connected)
            .collect();
        // One that was deleted since answers neither.
        let known: BTreeSet<String> = self.hosts.ids().into_iter().collect();
        let gone = self.record.hosts.iter().map(|progress| &progress.host);
        down.extend(gone.filter(|host| !known.contains(*host)).cloned());
        down
    }

    /// Says what is in the way, and gives up after a time.
    fn blocked(&self, after: &mut HostUpgradeRecord, down: &[String], notes: &Notes) {
        let waited = notes.since("blocked");
        let names = down.join(", ");
        let max = self.record.max_unavailable;
        let first = after
            .hosts
            .iter_mut()
            .find(|progress| progress.stage() == UpgradeStage::Waiting);
        let Some(first) = first else { return };
        first.note = format!(
            "of at most {max} unavailable hosts, {} do not answer: {names}",
            down.len()
        );
        if waited > BLOCKED_WITHIN {
            first.note = format!("could not begin within {BLOCKED_WITHIN:?}: {}", first.note);
            first.set_stage(UpgradeStage::Failed);
        }
    }

    fn begin(&self, progress: &mut HostProgress) {
        let observed = self.hosts.observed(&progress.host);
        let ran = observed.vms.values().filter(|vm| runs(vm.phase()));
        progress.ran = ran.map(|vm| vm.id.clone()).collect();
        let host = observed.host.as_ref();
        progress.problem_before = host.map(|host| host.problem.clone()).unwrap_or_default();
        progress.note.clear();
        progress.set_stage(match self.record.agent_binary.is_empty() {
            true => UpgradeStage::Daemons,
            false => UpgradeStage::Agent,
        });
    }

    async fn drive(&self, progress: &mut HostProgress, notes: &Notes) -> Result<(), StoreError> {
        let turn = match progress.stage() {
            UpgradeStage::Agent => self.agent(progress, notes).await?,
            _ => self.daemons(progress, notes).await?,
        };
        match turn {
            Turn::Stays(note) => progress.note = note,
            Turn::Goes(finding) => {
                // The record is one for all hosts, and a store's values are bounded.
                progress.ran.clear();
                progress.problem_before.clear();
                progress.findings.extend(finding.as_deref().map(shortened));
                progress.note.clear();
                progress.set_stage(match progress.stage() {
                    UpgradeStage::Agent => UpgradeStage::Daemons,
                    _ => UpgradeStage::Done,
                });
            }
            Turn::Fails(why) => {
                progress.ran.clear();
                tracing::warn!(host = progress.host, why, "a host's upgrade failed");
                progress.note = shortened(&why);
                progress.set_stage(UpgradeStage::Failed);
            }
        }
        Ok(())
    }

    async fn agent(&self, progress: &HostProgress, notes: &Notes) -> Result<Turn, StoreError> {
        let host = &progress.host;
        let told = format!("told {host}");
        let is_told = notes.has(&told);
        let within = match is_told {
            true => self.confirm() + EXCHANGE_WITHIN,
            false => BUSY_WITHIN,
        };
        let waited = match is_told {
            true => notes.since(&told),
            false => notes.since(host),
        };
        let patient = |why: String| match waited > within {
            true => Turn::Fails(format!("not done within {within:?}: {why}")),
            false => Turn::Stays(why),
        };
        let Some(node) = self.hosts.get(host) else {
            return Ok(patient("the host is not known any more".to_owned()));
        };
        let answer = match node.get_agent_upgrade().await {
            Ok(known) if known.upgrade_id == self.record.id() => Ok(known),
            Ok(_) => match notes.tell(&node, host, self.record).await {
                Some(answer) => answer,
                None => return Ok(patient("it checks the binary".to_owned())),
            },
            Err(status) => Err(status),
        };
        let seen = match answer {
            Ok(seen) => seen,
            Err(status) if status.code() == Code::Unimplemented => {
                let why = "its agent is older than this way of upgrading; exchange it by hand";
                return Ok(Turn::Fails(why.to_owned()));
            }
            Err(status) if is_passing(&status) => {
                return Ok(patient(api::errors::explain(&status)));
            }
            Err(status) => return Ok(Turn::Fails(api::errors::explain(&status))),
        };
        notes.since(&told);
        Ok(match seen.state() {
            AgentUpgradeState::RolledBack => {
                Turn::Fails(format!("its agent was rolled back: {}", seen.error))
            }
            AgentUpgradeState::Trial => match self.is_well(progress, &node).await? {
                Ok(()) => {
                    // If this is not heard it is said again.
                    let _ = node.confirm_agent_upgrade(self.record.id()).await;
                    patient("its new agent is well and takes over".to_owned())
                }
                Err(why) => patient(format!("its new agent is on trial: {why}")),
            },
            AgentUpgradeState::Done => match self.is_well(progress, &node).await? {
                Ok(()) => Turn::Goes(Some(exchanged(&seen))),
                Err(why) => patient(format!("its new agent has taken over: {why}")),
            },
            _ => patient("its agent makes room".to_owned()),
        })
    }

    fn confirm(&self) -> Duration {
        match self.record.confirm_ms {
            0 => DEFAULT_CONFIRM,
            ms => Duration::from_millis(ms.into()),
        }
    }

    /// Whether a host that begins to answer again is as well as it was, and what is not.
    async fn is_well(
        &self,
        progress: &HostProgress,
        node: &Node,
    ) -> Result<Result<(), String>, StoreError> {
        if let Err(status) = node.look().await {
            return Ok(Err(api::errors::explain(&status)));
        }
        let seen = self.hosts.observed(&progress.host);
        if let Err(why) = is_host_well(progress, &seen) {
            return Ok(Err(why));
        }
        for id in &progress.ran {
            let phase = seen.vms.get(id).map(|vm| vm.phase());
            let is_lost = match phase {
                Some(VmPhase::Failed) => true,
                Some(_) => false,
                None => self.belongs(&progress.host, id).await?,
            };
            if is_lost {
                let word = phase.map_or("is not there", |_| "has failed");
                return Ok(Err(format!("VM {id}, which ran before, {word}")));
            }
        }
        Ok(Ok(()))
    }

    /// Whether a VM is still that host's.
    async fn belongs(&self, host: &str, node_id: &str) -> Result<bool, StoreError> {
        let key = format!("node-ids/{}/{node_id}", api::names::VMS);
        let Some(name) = self.store.get(&key).await? else {
            return Ok(false);
        };
        let name = String::from_utf8_lossy(&name.value).into_owned();
        let Ok(name) = api::names::Name::parse_vm(&name) else {
            return Ok(false);
        };
        let Some(item) = self.store.get(&model::key(&name)).await? else {
            return Ok(false);
        };
        let record: VmRecord = decode(&item.key, &item.value)?;
        Ok(record.host == host && !record.vm.deleting)
    }

    /// Each kind is an operation of its own, which waits and rolls back as those of users do.
    async fn daemons(&self, progress: &HostProgress, notes: &Notes) -> Result<Turn, StoreError> {
        let host = &progress.host;
        let observed = self.hosts.observed(host);
        let away = format!("away {host}");
        let mut is_lost = false;
        if observed.connected {
            notes.forget(&away);
        } else {
            is_lost = notes.since(&away) > BUSY_WITHIN;
            if !is_lost {
                return Ok(Turn::Stays("it does not answer".to_owned()));
            }
        }
        let mut findings = Vec::new();
        let binaries = [&self.record.device_blk, &self.record.device_net];
        for (program, binary) in DEVICE_PROGRAMS.into_iter().zip(binaries) {
            if binary.is_empty() {
                continue;
            }
            if !is_lost && !runs_program(&observed, program) {
                findings.push(format!("no {program} runs there"));
                continue;
            }
            let place = self.record.hosts.iter();
            let place = place.take_while(|other| other.host != *host).count();
            let request = pb::UpgradeDevicesRequest {
                target: model::host_name(host),
                binary: binary.clone(),
                program: program.to_owned(),
                max_unavailable: self.record.max_devices_unavailable,
                request_id: format!("{}-{place}-{program}", self.record.id()),
                ..Default::default()
            };
            let target = UpgradeTarget::Host(host.clone());
            let operation = commands::upgrade_devices(self.store, &target, &request).await;
            let operation = match operation {
                Ok(operation) => operation,
                Err(CommandError::Store(error)) => return Err(error),
                Err(error) => return Ok(Turn::Fails(format!("{program}: {error}"))),
            };
            let metadata = operation.metadata.unwrap_or_default();
            match (operation.done, operation.error) {
                (false, _) if is_lost => {
                    // Else it would be done as soon as the host returns.
                    let _ = commands::cancel_operation(self.store, &operation.name).await;
                    return Ok(Turn::Fails(format!(
                        "{program}: the host does not answer for {BUSY_WITHIN:?}, and how far it came is not known"
                    )));
                }
                (false, _) => {
                    let name = operation.name;
                    return Ok(Turn::Stays(format!("its {program} is exchanged: {name}")));
                }
                (true, Some(error)) => {
                    return Ok(Turn::Fails(format!("{program}: {}", error.message)));
                }
                (true, None) => findings.extend(metadata.findings),
            }
        }
        let findings = findings.join("; ");
        Ok(Turn::Goes((!findings.is_empty()).then_some(findings)))
    }

    /// Ends the operation, and the upgrade with it.
    async fn finish(&self) -> Result<(), StoreError> {
        let name = &self.record.operation;
        let mut transaction = Transaction::new()
            .if_unchanged(HOST_UPGRADE, self.revision)
            .delete(HOST_UPGRADE);
        if let Some(item) = self.store.get(name).await? {
            let mut operation: pb::Operation = decode(&item.key, &item.value)?;
            operation.done = true;
            operation.end_time = Some(model::now());
            operation.error = error(self.record);
            let metadata = operation.metadata.get_or_insert_default();
            metadata.findings = findings(self.record);
            let (reason, words) = match &operation.error {
                None => ("HOSTS_UPGRADED", metadata.findings.join("; ")),
                Some(error) => ("HOST_UPGRADE_FAILED", error.message.clone()),
            };
            let mut event = model::new_event(&metadata.target, reason, words);
            event.warning = operation.error.is_some();
            transaction = transaction
                .if_unchanged(name, item.revision)
                .put(name, operation.encode_to_vec())
                .put(event.name.clone(), event.encode_to_vec());
        }
        let transaction = transaction.delete(model::pending_key(name));
        self.store.commit(transaction).await.map(drop)
    }
}

/// Has a host look at the binaries of a request.
///
/// # Errors
/// What is wrong with them, for people.
pub async fn check(node: &Node, request: &pb::UpgradeHostsRequest) -> Result<String, String> {
    let checked = node.upgrade_agent(UpgradeAgentRequest {
        upgrade_id: "check".to_owned(),
        binary: request.agent_binary.clone(),
        protocol: api::PROTOCOL,
        confirm_within_ms: 0,
        device_blk: request.device_blk.clone(),
        device_net: request.device_net.clone(),
        validate_only: true,
    });
    match checked.await {
        Ok(seen) if seen.binary.is_empty() => Ok("can use these daemons".to_owned()),
        Ok(seen) => Ok(format!("would get {}", exchanged(&seen))),
        Err(status) if status.code() == Code::Unimplemented => {
            Err("its agent is older than this way of upgrading; exchange it by hand".to_owned())
        }
        Err(status) => Err(api::errors::explain(&status)),
    }
}

/// What an upgrade waits for, for people.
pub fn progress(record: &HostUpgradeRecord) -> String {
    let count = |stage| waves::in_stages(record, move |own| own == stage).count();
    let mut words = format!(
        "{} of {} hosts done",
        count(UpgradeStage::Done),
        record.hosts.len()
    );
    let failed = count(UpgradeStage::Failed);
    if failed > 0 {
        words.push_str(&format!(", {failed} failed"));
    }
    if record.cancel {
        words.push_str(", cancelled");
    }
    for progress in record.hosts.iter().filter(|host| !host.note.is_empty()) {
        words.push_str(&format!("; {}: {}", progress.host, progress.note));
    }
    words
}

/// What was done on each host, and what became of the others.
pub fn findings(record: &HostUpgradeRecord) -> Vec<String> {
    let line = |progress: &HostProgress| {
        let mut words = progress.findings.clone();
        match progress.stage() {
            UpgradeStage::Waiting => words.push("not begun".to_owned()),
            UpgradeStage::Agent | UpgradeStage::Daemons => words.push("under way".to_owned()),
            UpgradeStage::Failed => words.push(format!("failed: {}", progress.note)),
            UpgradeStage::Done if words.is_empty() => words.push("nothing to do".to_owned()),
            UpgradeStage::Done => {}
        }
        format!("{}: {}", progress.host, words.join("; "))
    };
    record.hosts.iter().map(line).collect()
}

fn error(record: &HostUpgradeRecord) -> Option<pb::OperationError> {
    let of = |stage| waves::in_stages(record, move |own| own == stage).collect::<Vec<_>>();
    let (done, left) = (of(UpgradeStage::Done), of(UpgradeStage::Waiting));
    let failed = record.hosts.iter();
    let failed = failed.filter(|progress| progress.stage() == UpgradeStage::Failed);
    let failed: Vec<String> = failed
        .map(|progress| format!("{}: {}", progress.host, progress.note))
        .collect();
    let (code, reason, why) = match (failed.is_empty(), record.cancel, left.is_empty()) {
        (false, ..) => (Code::Aborted, "HOST_UPGRADE_FAILED", failed.join("; ")),
        (true, true, false) => (Code::Cancelled, "CANCELLED", "cancelled".to_owned()),
        _ => return None,
    };
    let listed = |hosts: Vec<&str>| match hosts.is_empty() {
        true => "none".to_owned(),
        false => hosts.join(", "),
    };
    let (done, left) = (listed(done), listed(left));
    Some(pb::OperationError {
        code: code as i32,
        message: format!("{why}; done: {done}; not begun: {left}"),
        reason: reason.to_owned(),
    })
}

fn request(record: &HostUpgradeRecord) -> UpgradeAgentRequest {
    UpgradeAgentRequest {
        upgrade_id: record.id().to_owned(),
        binary: record.agent_binary.clone(),
        protocol: api::PROTOCOL,
        confirm_within_ms: record.confirm_ms,
        device_blk: record.device_blk.clone(),
        device_net: record.device_net.clone(),
        validate_only: false,
    }
}

/// All hosts' words are in one value of the store, which is bounded.
fn shortened(words: &str) -> String {
    match words.len() <= LONGEST_FINDING {
        true => words.to_owned(),
        false => format!("{}…", &words[..words.floor_char_boundary(LONGEST_FINDING)]),
    }
}

fn exchanged(seen: &AgentUpgrade) -> String {
    format!(
        "node-agent {} ({}) in place of {}",
        seen.to_version, seen.binary, seen.from_version
    )
}

fn is_host_well(progress: &HostProgress, seen: &Observed) -> Result<(), String> {
    if !seen.connected {
        return Err("it does not answer".to_owned());
    }
    let host = seen.host.clone().unwrap_or_default();
    if host.host_id != progress.host {
        return Err("another host answers there".to_owned());
    }
    let is_new = !host.problem.is_empty() && progress.problem_before.is_empty();
    match is_new {
        true => Err(format!("it has a problem: {}", host.problem)),
        false => Ok(()),
    }
}

fn runs(phase: VmPhase) -> bool {
    matches!(phase, VmPhase::Running | VmPhase::Paused)
}

fn runs_program(seen: &Observed, program: &str) -> bool {
    let vms = seen.vms.values().filter(|vm| runs(vm.phase()));
    vms.flat_map(|vm| &vm.processes)
        .any(|process| process.name == program && process.pid != 0)
}

/// It may be otherwise in a moment: nobody answers, or the host is busy.
fn is_passing(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Unknown
            | Code::Cancelled
            | Code::Internal
    )
}

#[cfg(test)]
mod tests;
