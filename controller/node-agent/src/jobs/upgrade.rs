//! Exchanging daemons for another version, a bounded number of devices at a time. One that does not pass
//! its gate gets its old version back, and no further wave begins.

use std::{path::Path, time::Duration};

use api::node::{UpgradeDaemons, VmPhase};
use tokio::task::JoinSet;
use tonic::Code;

use super::{Context, JobError, Wish as JobWish};
use crate::{
    network::{Exchangeable, NetworkError, Networks},
    record::{DaemonKind, RecordError},
    versions::Binary,
    vm::{
        Vm, error_chain,
        upgrade::{Done, UpgradeError, Wish},
    },
};

const DEFAULT_GATE: Duration = Duration::from_secs(10);
const DEFAULT_WATCH: Duration = Duration::from_millis(300);
const DEFAULT_DRAIN: Duration = Duration::from_secs(5);
/// A daemon that is just being restarted is asked again.
const BUSY_PAUSE: Duration = Duration::from_millis(200);
const BUSY_ATTEMPTS: u32 = 50;

/// Why versions that nobody uses stay.
#[derive(Debug, thiserror::Error)]
enum CollectError {
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Network(#[from] NetworkError),
}

/// A daemon that is to be exchanged.
#[derive(Clone)]
enum Target {
    /// A VM's own.
    Own {
        vm: Vm,
        kind: DaemonKind,
        /// That it serves.
        devices: usize,
    },
    /// A network's switch.
    Switch(Exchangeable),
}

/// What serves a device.
enum Server {
    Own(DaemonKind),
    /// Of this network.
    Switch(String),
}

impl Target {
    fn name(&self) -> String {
        match self {
            Self::Own { vm, kind, .. } => format!("{} of {}", kind.program(), vm.spec().id),
            Self::Switch(switch) => format!("device-net of network {}", switch.network),
        }
    }

    fn kind(&self) -> DaemonKind {
        match self {
            Self::Own { kind, .. } => *kind,
            Self::Switch(_) => DaemonKind::Net,
        }
    }

    fn devices(&self) -> usize {
        match self {
            Self::Own { devices, .. } => *devices,
            Self::Switch(switch) => switch.nics.max(1),
        }
    }
}

impl Server {
    fn kind(&self) -> DaemonKind {
        match self {
            Self::Own(kind) => *kind,
            Self::Switch(_) => DaemonKind::Net,
        }
    }
}

impl Context {
    pub(super) async fn upgrade(&self, work: UpgradeDaemons) -> Result<Vec<String>, JobError> {
        let outcome = self.upgrade_all(&work).await;
        // What no VM uses any more, or never did.
        let collecting = self.blocking(|agent| {
            let records = agent.env.store.load()?;
            let pins = records.iter().flat_map(|record| &record.pins);
            let of_switches = agent.env.networks.pins()?;
            agent.env.versions.collect(pins.chain(&of_switches));
            Ok::<(), CollectError>(())
        });
        if let Err(error) = collecting.await {
            tracing::warn!("versions that no VM uses stay: {}", error_chain(&error));
        }
        outcome
    }

    async fn upgrade_all(&self, work: &UpgradeDaemons) -> Result<Vec<String>, JobError> {
        let vms = self.vms(work).await?;
        let served_by = match (work.vm_ids.first(), work.device.as_str()) {
            (Some(_), device) if !device.is_empty() => Some(daemon_of(&vms[0], device)?),
            _ => None,
        };
        let named = [DaemonKind::Blk, DaemonKind::Net]
            .into_iter()
            .find(|kind| kind.program() == work.program);
        let serving = served_by.as_ref().map(Server::kind);
        let wanted = match (serving, named) {
            (Some(served), Some(named)) if served != named => {
                return Err(JobError::NoUpgrade {
                    vm: vms[0].spec().id.clone(),
                    device: work.device.clone(),
                    problem: format!("is served by {}, not {}", served.program(), named.program()),
                });
            }
            (served, named) => served.or(named),
        };
        // Nothing is touched before it is known to be what it should be.
        let binary = match work.binary.as_str() {
            "" => None,
            path => {
                let versions = &self.agent.env.versions;
                Some(versions.admit(Path::new(path), wanted).await?)
            }
        };
        let wanted = wanted.or(binary.as_ref().map(|binary| binary.kind));
        let mut targets = match &served_by {
            Some(Server::Switch(_)) => Vec::new(),
            _ => targets(&vms, wanted),
        };
        // A VM's upgrade leaves alone what other VMs use.
        if wanted.is_none_or(|wanted| wanted == DaemonKind::Net) {
            let switches = self.agent.env.networks.switches().into_iter();
            let meant = switches.filter(|switch| match &served_by {
                Some(Server::Switch(network)) => *network == switch.network,
                _ => work.vm_ids.is_empty(),
            });
            targets.extend(meant.map(Target::Switch));
        }
        if targets.is_empty() {
            return Err(JobError::NothingToUpgrade);
        }
        let terms = Terms::of(work, binary);
        self.in_waves(targets, &terms, work.max_unavailable.max(1) as usize)
            .await
    }

    /// Those that were named, which must run; or all that do.
    async fn vms(&self, work: &UpgradeDaemons) -> Result<Vec<Vm>, JobError> {
        if work.vm_ids.is_empty() {
            return Ok(self.agent.all().await);
        }
        let mut vms = Vec::new();
        for id in &work.vm_ids {
            let found = self.agent.find(id).await;
            let vm = found.map_err(|_| JobError::NoVm { vm: id.clone() })?;
            if !runs(&vm) {
                return Err(JobError::NoUpgrade {
                    vm: id.clone(),
                    device: "nothing".to_owned(),
                    problem: "can be upgraded while it does not run; start it first".to_owned(),
                });
            }
            vms.push(vm);
        }
        Ok(vms)
    }

    async fn in_waves(
        &self,
        targets: Vec<Target>,
        terms: &Terms,
        max_unavailable: usize,
    ) -> Result<Vec<String>, JobError> {
        let waves = waves(targets, max_unavailable);
        let wish = self.entry.wish.subscribe();
        let mut report = Report::default();
        let mut rest = waves.iter().flatten().map(Target::name);
        for (index, wave) in waves.iter().enumerate() {
            if *wish.borrow() == JobWish::Cancel {
                return Err(JobError::UpgradeCancelled(report.text(rest)));
            }
            let names: Vec<String> = rest.by_ref().take(wave.len()).collect();
            self.entry.state.send_modify(|job| {
                job.stage = format!(
                    "wave {} of {}: {}",
                    index + 1,
                    waves.len(),
                    names.join(", ")
                );
            });
            report.add(wave, terms, &self.agent.env.networks).await;
            if let Some((code, _)) = report.failed.first() {
                let code = *code;
                return Err(JobError::Upgrade {
                    code,
                    text: report.text(rest),
                });
            }
        }
        Ok(report.done)
    }
}

/// How each is exchanged.
struct Terms {
    binary: Option<Binary>,
    version: String,
    gate: Duration,
    watch: Duration,
    drain: Duration,
}

impl Terms {
    fn of(work: &UpgradeDaemons, binary: Option<Binary>) -> Self {
        let or = |ms: u32, default| match ms {
            0 => default,
            ms => Duration::from_millis(ms.into()),
        };
        Self {
            version: match (work.version.as_str(), &binary) {
                ("", Some(binary)) => binary.version.clone(),
                (version, _) => version.to_owned(),
            },
            binary,
            gate: or(work.gate_ms, DEFAULT_GATE),
            watch: or(work.watch_ms, DEFAULT_WATCH),
            drain: or(work.drain_ms, DEFAULT_DRAIN),
        }
    }

    fn wish(&self, kind: DaemonKind) -> Wish {
        Wish {
            kind,
            binary: self.binary.clone(),
            version: self.version.clone(),
            gate: self.gate,
            watch: self.watch,
            drain: self.drain,
        }
    }
}

/// What came of the daemons so far, for people.
#[derive(Default)]
struct Report {
    done: Vec<String>,
    failed: Vec<(Code, String)>,
}

impl Report {
    /// Exchanges the daemons of a wave at the same time.
    async fn add(&mut self, wave: &[Target], terms: &Terms, networks: &Networks) {
        let mut upgrading = JoinSet::new();
        for target in wave {
            let (target, wish) = (target.clone(), terms.wish(target.kind()));
            let networks = networks.clone();
            upgrading.spawn(async move {
                let outcome = upgrade(&target, &networks, wish).await;
                (target.name(), outcome)
            });
        }
        while let Some(joined) = upgrading.join_next().await {
            match joined {
                Ok((name, Ok(Some(done)))) => {
                    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
                    let mut text = format!(
                        "{name}: {} in place of {}, handed over in {:.1} ms",
                        done.to,
                        done.from,
                        milliseconds(done.handed_over)
                    );
                    for (device, stall) in &done.stalls {
                        text += &format!(", {device} stalled {:.1} ms", milliseconds(*stall));
                    }
                    self.done.push(text);
                    let notes = done.notes.iter();
                    self.done
                        .extend(notes.map(|note| format!("{name}: {note}")));
                }
                Ok((name, Ok(None))) => self.done.push(format!("{name}: has that version")),
                Ok((name, Err(error))) => self
                    .failed
                    .push((error.code(), format!("{name}: {}", error_chain(&error)))),
                Err(panic) => panic!("upgrading a daemon: {panic}"),
            }
        }
    }

    fn text(&self, untouched: impl Iterator<Item = String>) -> String {
        let failed = self.failed.iter().map(|(_, text)| text.clone());
        let untouched: Vec<String> = untouched.collect();
        let mut parts: Vec<String> = failed.collect();
        if !self.done.is_empty() {
            parts.push(format!("upgraded: {}", self.done.join(", ")));
        }
        if !untouched.is_empty() {
            parts.push(format!("not begun: {}", untouched.join(", ")));
        }
        match parts.is_empty() {
            true => "nothing was begun".to_owned(),
            false => parts.join("; "),
        }
    }
}

/// Exchanges one daemon; `None` when it runs that very binary already.
async fn upgrade(
    target: &Target,
    networks: &Networks,
    wish: Wish,
) -> Result<Option<Done>, UpgradeError> {
    let (vm, kind) = match target {
        Target::Own { vm, kind, .. } => (vm, *kind),
        Target::Switch(switch) => {
            let is_same =
                |binary: &Binary| !binary.build.is_empty() && binary.build == switch.build;
            if wish.binary.as_ref().is_some_and(is_same) {
                return Ok(None);
            }
            let exchanged = networks.exchange_switch(&switch.network, &wish).await;
            return exchanged.map(Some);
        }
    };
    if let Some(binary) = &wish.binary {
        let status = vm.status();
        let own = status
            .processes
            .iter()
            .find(|process| process.name == kind.program() && process.network.is_empty());
        // The installed program may have been replaced since; a copy is what it was.
        if !binary.build.is_empty() && own.is_some_and(|own| own.build == binary.build) {
            return Ok(None);
        }
    }
    for _ in 0..BUSY_ATTEMPTS {
        match vm.upgrade(wish.clone()).await {
            Err(UpgradeError::Busy { .. }) => tokio::time::sleep(BUSY_PAUSE).await,
            outcome => return outcome.map(Some),
        }
    }
    vm.upgrade(wish).await.map(Some)
}

fn runs(vm: &Vm) -> bool {
    matches!(vm.status().phase(), VmPhase::Running | VmPhase::Paused)
}

/// The daemon that serves a device.
fn daemon_of(vm: &Vm, device: &str) -> Result<Server, JobError> {
    let (spec, status) = (vm.spec(), vm.status());
    let refuse = |problem: &str| {
        Err(JobError::NoUpgrade {
            vm: spec.id.clone(),
            device: device.to_owned(),
            problem: problem.to_owned(),
        })
    };
    let is_seed = spec.cloud_init.is_some() && device == api::validate::SEED_DISK;
    if is_seed || spec.disks.iter().any(|disk| disk.name == device) {
        return Ok(Server::Own(DaemonKind::Blk));
    }
    if spec.vhost_user.iter().any(|other| other.name == device) {
        return refuse("is served by somebody else's daemon, which its owner upgrades");
    }
    let shared = status
        .processes
        .iter()
        .find(|process| !process.network.is_empty() && process.devices.iter().any(|d| d == device));
    if let Some(shared) = shared {
        return Ok(Server::Switch(shared.network.clone()));
    }
    match spec.nics.iter().find(|nic| nic.name == device) {
        Some(nic) if nic.user.is_some() => {
            refuse("is served by passt, of which there is one version on a host")
        }
        Some(_) => Ok(Server::Own(DaemonKind::Net)),
        None => refuse("does not exist"),
    }
}

/// The daemons of running VMs, of one kind or of both.
fn targets(vms: &[Vm], wanted: Option<DaemonKind>) -> Vec<Target> {
    let mut targets = Vec::new();
    for vm in vms.iter().filter(|vm| runs(vm)) {
        let status = vm.status();
        for kind in [DaemonKind::Blk, DaemonKind::Net] {
            let own = status
                .processes
                .iter()
                .find(|process| process.name == kind.program() && process.network.is_empty());
            if let Some(own) = own.filter(|_| wanted.is_none_or(|wanted| wanted == kind)) {
                targets.push(Target::Own {
                    vm: vm.clone(),
                    kind,
                    devices: own.devices.len(),
                });
            }
        }
    }
    targets
}

/// As many at a time as have no more devices than that; one with more goes alone.
fn waves(targets: Vec<Target>, max_unavailable: usize) -> Vec<Vec<Target>> {
    let sizes: Vec<usize> = targets.iter().map(Target::devices).collect();
    let mut targets = targets.into_iter();
    wave_lengths(&sizes, max_unavailable)
        .into_iter()
        .map(|len| targets.by_ref().take(len).collect())
        .collect()
}

fn wave_lengths(sizes: &[usize], max_unavailable: usize) -> Vec<usize> {
    let mut lengths = Vec::new();
    let mut at_risk = 0;
    for size in sizes {
        match lengths.last_mut() {
            Some(len) if at_risk + size <= max_unavailable => {
                *len += 1;
                at_risk += size;
            }
            _ => {
                lengths.push(1);
                at_risk = *size;
            }
        }
    }
    lengths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waves_risk_no_more_devices_than_allowed() {
        assert_eq!(wave_lengths(&[1, 1, 1, 1, 1], 2), [2, 2, 1]);
        assert_eq!(wave_lengths(&[1, 2, 1, 1], 3), [2, 2]);
        assert_eq!(wave_lengths(&[1, 1], 1), [1, 1]);
        assert_eq!(wave_lengths(&[5, 1, 1], 2), [1, 2]);
        assert_eq!(wave_lengths(&[], 2), Vec::<usize>::new());
    }

    #[test]
    fn report_says_what_was_and_was_not_done() {
        let report = Report {
            done: vec!["a: v2".into()],
            failed: vec![(Code::Aborted, "b: rolled back".into())],
        };
        let text = report.text(["c".to_owned()].into_iter());
        assert_eq!(text, "b: rolled back; upgraded: a: v2; not begun: c");
        assert_eq!(
            Report::default().text(std::iter::empty()),
            "nothing was begun"
        );
    }
}
