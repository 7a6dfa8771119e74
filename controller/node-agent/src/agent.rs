//! All VMs of this host by name, and what they share.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    net::IpAddr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use api::node::VmStatus;
use tokio::sync::{Mutex, broadcast};
use tonic::Code;

use lease::Restart;

use crate::{
    autostart::Autostart,
    epoch::{self, Superseded},
    faults::{Allowed, Faults, Knobs},
    host::{Host, HostError},
    image::Claims,
    import::Imports,
    inventory::Inventory,
    jobs::Jobs,
    leases::{LeaseError, Leases},
    network::{NetworkError, Networks},
    process,
    promised::Promised,
    record::{Record, RecordError, Store},
    spec::{DiskSource, Power, Spec},
    versions::Versions,
    vm::{Env, Refusal, Vm},
    volumes::{Pool, VolumeError},
};

/// Changes of status that a watcher may lag behind before it gets all states anew.
const CHANGE_BACKLOG: usize = 1024;
/// More VMs than a host of 4 TiB gets at 1 GiB each have no place in one agent.
const MAX_VMS: usize = 4096;

/// An agent that was killed while it forked leaves the lock to the child until that executes its
/// program.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
/// Less than a caller waits for its answer.
const EVICT_PATIENCE: Duration = Duration::from_secs(8);
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The agent's state. Shared by all calls.
pub(crate) struct Agent {
    /// What does not change.
    pub(crate) host: Host,
    /// What a scheduler wants to know of it.
    pub(crate) inventory: Inventory,
    /// What the VMs share.
    pub(crate) env: Arc<Env>,
    /// Work on volumes and disks.
    pub(crate) jobs: Jobs,
    vms: Mutex<BTreeMap<String, Vm>>,
    /// Holds the state directory's lock as long as the agent lives.
    _lock: File,
}

/// Where the agent keeps and finds things.
#[derive(Clone, Debug)]
pub(crate) struct Dirs {
    /// Survives reboots.
    pub(crate) state: PathBuf,
    /// Sockets and logs.
    pub(crate) run: PathBuf,
    /// Programs.
    pub(crate) bin: PathBuf,
    /// The converter of foreign images, if there is one.
    pub(crate) qemu_img: Option<PathBuf>,
    /// What makes user networks, if it was named.
    pub(crate) passt: Option<PathBuf>,
    /// Where the host is, and what people call it.
    pub(crate) zone: String,
    pub(crate) labels: BTreeMap<String, String>,
    /// Processes stand by for the daemons of all VMs.
    pub(crate) warm_spares: bool,
    /// A daemon that does not get on for this long is killed.
    pub(crate) hang_after: Duration,
    /// What may go wrong on purpose.
    pub(crate) allowed: Allowed,
}

/// Why the agent cannot work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// A directory cannot be made.
    #[error("making the directory {path}", path = .path.display())]
    Dir {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another agent works here.
    #[error("another node-agent uses the state directory {path}; stop it or give each its own --state-dir", path = .path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The host's identity.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The records.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The volumes.
    #[error(transparent)]
    Volumes(#[from] VolumeError),
    /// The networks.
    #[error(transparent)]
    Networks(#[from] NetworkError),
}

/// Why a call was not carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// No such VM.
    #[error("VM {id:?} does not exist on this host")]
    NotFound {
        /// As asked for.
        id: String,
    },
    /// Too many VMs.
    #[error("this host has {MAX_VMS} VMs already; delete some")]
    TooMany,
    /// It may not be started here now.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A newer leader was heard meanwhile.
    #[error(transparent)]
    Superseded(#[from] Superseded),
    /// The VM refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The VM cannot be kept.
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl CallError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } => Code::NotFound,
            Self::TooMany => Code::ResourceExhausted,
            // The next wish may well be of the present session.
            Self::Lease(_) | Self::Superseded(_) => Code::Unavailable,
            Self::Refused(refusal) => refusal.code(),
            Self::Record(_) => Code::Internal,
        }
    }
}

impl Agent {
    /// Opens the directories and adopts all VMs that an earlier agent left.
    ///
    /// # Errors
    /// When another agent is there, or the state cannot be read.
    pub(crate) fn open(dirs: &Dirs, underlay: Option<IpAddr>) -> Result<Self, AgentError> {
        let run_dir = dirs.run.join("vms");
        for path in [&dirs.state, &run_dir] {
            fs::create_dir_all(path).map_err(|source| AgentError::Dir {
                path: path.clone(),
                source,
            })?;
        }
        let lock = lock_dir(&dirs.state)?;
        let claims = Claims::default();
        let uploads = |source| AgentError::Dir {
            path: dirs.state.join("uploads"),
            source,
        };
        let imports = Imports::open(&dirs.state, dirs.qemu_img.clone()).map_err(uploads)?;
        let host = Host::open(&dirs.state, underlay)?;
        let knobs = Knobs::new(dirs.allowed.faults);
        // Before the VMs, which may want to start in them, or run in them.
        let networks = Networks::open(
            &dirs.state,
            &dirs.run,
            &dirs.bin,
            &host.id,
            underlay,
            &knobs,
            dirs.hang_after,
        )?;
        let (changes, _) = broadcast::channel(CHANGE_BACKLOG);
        let store = Store::open(&dirs.state)?.failing_as(knobs.clone());
        let records = store.load()?;
        let boot_id = process::boot_id();
        let is_leased = |record: &Record| {
            record.spec.restart == Restart::Anywhere && record.state.is_of_boot(&boot_id)
        };
        let comes_back = records.iter().filter(|record| {
            record.spec.comes_back() && record.state.ran() && !record.state.is_of_boot(&boot_id)
        });
        let env = Arc::new(Env {
            leases: Leases::open(&dirs.run, &boot_id, records.iter().any(is_leased)),
            autostart: Autostart::of(comes_back.map(|record| record.spec.autostart_order)),
            store,
            faults: Faults::open(&dirs.state, dirs.allowed, knobs.clone()),
            knobs,
            volumes: Pool::open(&dirs.state, &dirs.run, claims.clone(), imports.clone())?,
            imports,
            claims,
            run_dir,
            promised: Promised::default(),
            bin_dir: dirs.bin.clone(),
            versions: Versions::of(&dirs.state, &dirs.bin),
            warm_spares: dirs.warm_spares,
            hang_after: dirs.hang_after,
            passt: dirs.passt.clone(),
            networks,
            boot_id,
            changes,
        });
        env.versions.remove_unfinished();
        let of_switches = env.networks.pins()?;
        let pins = records.iter().flat_map(|record| &record.pins);
        env.versions.collect(pins.chain(&of_switches));
        let vms = records
            .into_iter()
            .map(|record| (record.spec.id.clone(), Vm::adopt(env.clone(), record)))
            .collect();
        // After the VMs, which say what NICs a switch has.
        env.networks.adopt();
        let inventory = Inventory::open(
            &dirs.state,
            &dirs.bin,
            dirs.zone.clone(),
            dirs.labels.clone(),
        );
        Ok(Self {
            host,
            inventory,
            env,
            vms: Mutex::new(vms),
            jobs: Jobs::default(),
            _lock: lock,
        })
    }

    /// Makes `spec` a VM's wish; the VM need not exist yet. `session` is the host's lease's, as the
    /// controller knows it.
    ///
    /// # Errors
    /// When the wish is refused or cannot be kept.
    pub(crate) async fn apply(&self, spec: Spec, session: &str) -> Result<VmStatus, CallError> {
        let permit = self.env.leases.permit(spec.restart, spec.power, session);
        let _permit = permit.await?;
        let vm = {
            let mut vms = self.vms.lock().await;
            match vms.get(&spec.id) {
                Some(vm) => vm.clone(),
                None if vms.len() >= MAX_VMS => return Err(CallError::TooMany),
                None => {
                    epoch::recheck()?;
                    let id = spec.id.clone();
                    let vm = Vm::create(self.env.clone(), spec)?;
                    vms.insert(id, vm.clone());
                    return Ok(vm.status());
                }
            }
        };
        vm.apply(spec).await?;
        Ok(vm.status())
    }

    /// Hard-resets a VM.
    ///
    /// # Errors
    /// When it does not run.
    pub(crate) async fn reset(&self, id: &str) -> Result<VmStatus, CallError> {
        let vm = self.find(id).await?;
        vm.reset().await?;
        Ok(vm.status())
    }

    /// Forgets a stopped VM. One that is not there is no error.
    ///
    /// # Errors
    /// When it runs.
    pub(crate) async fn delete(&self, id: &str) -> Result<(), CallError> {
        // Not locked while the VM answers: one that is being stopped takes its time.
        let Some(vm) = self.vms.lock().await.get(id).cloned() else {
            return Ok(());
        };
        match vm.delete().await {
            // Gone: by another call.
            Ok(()) | Err(Refusal::Gone { .. }) => {}
            Err(refusal) => return Err(refusal.into()),
        }
        let mut vms = self.vms.lock().await;
        if vms.get(id).is_some_and(|known| known.is(&vm)) {
            vms.remove(id);
        }
        Ok(())
    }

    /// Stops a VM at once, whatever was wished of it, and forgets it: it is another host's now. One that is
    /// not there is no error.
    ///
    /// # Errors
    /// When it did not stop in time; it stops nevertheless.
    pub(crate) async fn evict(&self, id: &str) -> Result<(), CallError> {
        let Ok(vm) = self.find(id).await else {
            return Ok(());
        };
        let spec = vm.spec();
        if vm.is_active() && spec.power != Power::OffNow {
            let off = Spec {
                power: Power::OffNow,
                generation: spec.generation + 1,
                ..Spec::clone(&spec)
            };
            match vm.apply(off).await {
                Ok(()) | Err(Refusal::Gone { .. }) => {}
                Err(refusal) => return Err(refusal.into()),
            }
        }
        let mut status = vm.watch();
        let stopped = status.wait_for(|_| !vm.is_active());
        // Whether it did, deleting says.
        let _ = tokio::time::timeout(EVICT_PATIENCE, stopped).await;
        self.delete(id).await
    }

    /// One VM.
    ///
    /// # Errors
    /// When it does not exist.
    pub(crate) async fn find(&self, id: &str) -> Result<Vm, CallError> {
        let vms = self.vms.lock().await;
        vms.get(id)
            .cloned()
            .ok_or_else(|| CallError::NotFound { id: id.to_owned() })
    }

    /// All VMs, by name.
    pub(crate) async fn all(&self) -> Vec<Vm> {
        self.vms.lock().await.values().cloned().collect()
    }

    /// The VM whose spec names a volume, running or not.
    pub(crate) async fn holder_of(&self, volume: &str) -> Option<String> {
        self.attachment(volume)
            .await
            .map(|(vm, _)| vm.spec().id.clone())
    }

    /// The VM whose spec names a volume, running or not, and the name of the disk. One that may
    /// write it comes first.
    pub(crate) async fn attachment(&self, volume: &str) -> Option<(Vm, String)> {
        let names = |source: &DiskSource| matches!(source, DiskSource::Volume(id) if id == volume);
        let mut found: Vec<(bool, Vm, String)> = Vec::new();
        for vm in self.all().await {
            let spec = vm.spec();
            for disk in spec.disks.iter().filter(|disk| names(&disk.source)) {
                found.push((disk.read_only, vm.clone(), disk.name.clone()));
            }
        }
        found
            .into_iter()
            .min_by_key(|(read_only, ..)| *read_only)
            .map(|(_, vm, disk)| (vm, disk))
    }
}

/// Two agents on the same records would start each VM twice.
fn lock_dir(dir: &Path) -> Result<File, AgentError> {
    let path = dir.join("lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|source| AgentError::Dir {
            path: path.clone(),
            source,
        })?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        // SAFETY: flock takes its arguments by value; the file is open.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok(file);
        }
        if Instant::now() > deadline {
            return Err(AgentError::InUse {
                path: dir.to_owned(),
            });
        }
        std::thread::sleep(LOCK_POLL_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn second_agent_on_one_state_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = Dirs {
            state: dir.path().join("state"),
            run: dir.path().join("run"),
            bin: dir.path().to_owned(),
            qemu_img: None,
            passt: None,
            warm_spares: false,
            zone: String::new(),
            labels: BTreeMap::new(),
            hang_after: Duration::from_secs(10),
            allowed: Allowed::default(),
        };
        let first = Agent::open(&dirs, None).unwrap();
        assert!(matches!(
            Agent::open(&dirs, None),
            Err(AgentError::InUse { .. })
        ));
        drop(first);
        Agent::open(&dirs, None).unwrap();
    }
}
