//! What the agent knows about each VM, on disk: one JSON file per VM in STATE_DIR/vms, replaced
//! atomically and synced, so that the next agent finds either the old or the new state.

use std::{
    borrow::Cow,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{faults::Knobs, process::Identity, spec::Spec, versions::Pinned};

/// Raised when a record's meaning changes.
const VERSION: u32 = 1;

/// Everything that must survive the agent about one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    /// As last applied.
    pub(crate) spec: Spec,
    /// How far it got.
    pub(crate) state: State,
    /// Resets counted while the VM ran.
    #[serde(default)]
    pub(crate) resets: u64,
    /// exec of vmm-core to the first console byte.
    #[serde(default)]
    pub(crate) first_console_byte_ms: u64,
    /// Versions that its daemons were upgraded to; one that is not here is the installed one.
    #[serde(default)]
    pub(crate) pins: Vec<Pinned>,
}

/// The persisted half of the VM's state machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum State {
    /// Processes may exist or not; the next agent removes them and begins again.
    Starting(Assets),
    /// All processes were up.
    Running(Assets),
    /// A stop was under way.
    Stopping(Assets),
    /// Nothing is left running.
    Stopped {
        /// guest-shutdown, stop-request, killed, ...; empty when it never ran.
        reason: String,
    },
    /// Nothing is left running.
    Failed(Failure),
}

/// What exists on the host on behalf of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Assets {
    /// The boot in which the processes live.
    pub(crate) boot_id: String,
    /// `vmm-core`.
    pub(crate) vmm: Option<Identity>,
    /// Device daemons.
    pub(crate) daemons: Vec<DaemonRecord>,
    /// Taps that the agent created.
    pub(crate) taps: Vec<String>,
    /// When the VM was up.
    pub(crate) started_at_ms: u64,
}

/// A device daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DaemonRecord {
    /// Which of them.
    pub(crate) kind: DaemonKind,
    /// `None` while it is being restarted.
    pub(crate) process: Option<Identity>,
    /// Times it was restarted.
    pub(crate) restarts: u64,
}

/// The device daemons of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum DaemonKind {
    /// `device-blk`
    Blk,
    /// `device-net`
    Net,
    /// passt, for the NIC of this number.
    Passt(u8),
}

impl DaemonKind {
    /// Name of the program.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Blk => "device-blk",
            Self::Net => "device-net",
            Self::Passt(_) => "passt",
        }
    }

    /// Stem of its sockets' and its log's names.
    pub(crate) fn stem(self) -> Cow<'static, str> {
        match self {
            Self::Blk => "blk".into(),
            Self::Net => "net".into(),
            Self::Passt(nic) => format!("passt{nic}").into(),
        }
    }
}

/// Why a VM is not there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failure {
    /// A google.rpc.Code.
    pub(crate) code: i32,
    /// For people.
    pub(crate) message: String,
    /// vmm-error and the like; empty when it never ran.
    pub(crate) stop_reason: String,
}

impl State {
    fn assets(&self) -> Option<&Assets> {
        match self {
            Self::Starting(assets) | Self::Running(assets) | Self::Stopping(assets) => Some(assets),
            Self::Stopped { .. } | Self::Failed(_) => None,
        }
    }

    /// Something of it may live in this boot.
    pub(crate) fn is_of_boot(&self, boot_id: &str) -> bool {
        self.assets()
            .is_some_and(|assets| assets.boot_id == boot_id)
    }

    /// It ran, and nobody wished it to end.
    pub(crate) fn ran(&self) -> bool {
        matches!(self, Self::Running(_))
    }
}

impl Record {
    /// A VM that never ran.
    pub(crate) fn new(spec: Spec) -> Self {
        Self {
            version: VERSION,
            spec,
            state: State::Stopped {
                reason: String::new(),
            },
            resets: 0,
            first_console_byte_ms: 0,
            pins: Vec::new(),
        }
    }
}

/// Why state could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    /// Reading or writing failed.
    #[error("{action} {path}", path = .path.display())]
    Io {
        /// What was done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file does not hold what it should.
    #[error("{path} is not a record of this version; move it away to forget what it is about", path = .path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// Where it is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// Written by another version.
    #[error("{path} has version {version}, which this agent does not know; run the one that wrote it", path = .path.display())]
    Version {
        /// Which file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

/// The directory of records.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    dir: PathBuf,
    knobs: Knobs,
}

impl Store {
    /// Opens STATE_DIR/vms, creating it where needed.
    ///
    /// # Errors
    /// When it cannot be created.
    pub(crate) fn open(state_dir: &Path) -> Result<Self, RecordError> {
        let dir = state_dir.join("vms");
        fs::create_dir_all(&dir).map_err(io_error("creating", &dir))?;
        Ok(Self {
            dir,
            knobs: Knobs::default(),
        })
    }

    /// Fails while a fault says so.
    pub(crate) fn failing_as(self, knobs: Knobs) -> Self {
        Self { knobs, ..self }
    }

    /// All records. Half-written files of a dead agent are removed.
    ///
    /// # Errors
    /// When one cannot be read: an agent that forgot a running VM could start it twice.
    pub(crate) fn load(&self) -> Result<Vec<Record>, RecordError> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(io_error("reading", &self.dir))? {
            let path = entry.map_err(io_error("reading", &self.dir))?.path();
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("json") => records.push(load_json(&path, VERSION)?),
                Some("tmp") => {
                    fs::remove_file(&path).map_err(io_error("removing", &path))?;
                }
                _ => {}
            }
        }
        Ok(records)
    }

    /// Replaces the VM's record; on return it is durable.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn save(&self, record: &Record) -> Result<(), RecordError> {
        let path = self.path(&record.spec.id);
        if self.knobs.is_store_lost() {
            return Err(io_error("writing", &path)(
                io::ErrorKind::StorageFull.into(),
            ));
        }
        save_json(&path, record)
    }

    /// Forgets the VM. One that is not known is no error.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn remove(&self, id: &str) -> Result<(), RecordError> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("removing", &path)(error))
            }
            _ => sync_dir(&self.dir),
        }
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }
}

/// Reads a record of this version.
///
/// # Errors
/// When it cannot be read, is of another version, or is none.
pub(crate) fn load_json<T: DeserializeOwned>(path: &Path, expected: u32) -> Result<T, RecordError> {
    /// Read first, so that another version's record is named as such.
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let bytes = fs::read(path).map_err(io_error("reading", path))?;
    let versioned: Versioned = parse(path, &bytes)?;
    if versioned.version != expected {
        return Err(RecordError::Version {
            path: path.to_owned(),
            version: versioned.version,
        });
    }
    parse(path, &bytes)
}

fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, RecordError> {
    serde_json::from_slice(bytes).map_err(|source| RecordError::Format {
        path: path.to_owned(),
        source,
    })
}

/// Reads the records of all VMs and changes nothing: whether this version can.
///
/// # Errors
/// When one cannot be read.
pub(crate) fn read_all(state_dir: &Path) -> Result<(), RecordError> {
    let dir = state_dir.join("vms");
    if !dir.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(&dir).map_err(io_error("reading", &dir))? {
        let path = entry.map_err(io_error("reading", &dir))?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            match load_json::<Record>(&path, VERSION) {
                // Removed meanwhile.
                Err(RecordError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                }
                read => drop(read?),
            }
        }
    }
    Ok(())
}

/// Replaces a record; on return it is durable.
///
/// # Errors
/// When the disk refuses.
pub(crate) fn save_json<T: Serialize>(path: &Path, record: &T) -> Result<(), RecordError> {
    let temporary = path.with_extension("tmp");
    let bytes = serde_json::to_vec_pretty(record).expect("records have string keys only");
    // Specs hold the passwords of seeds for cloud-init.
    let _ = fs::remove_file(&temporary);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(io_error("creating", &temporary))?;
    file.write_all(&bytes)
        .and_then(|()| file.sync_all())
        .map_err(io_error("writing", &temporary))?;
    fs::rename(&temporary, path).map_err(io_error("replacing", path))?;
    sync_dir(path.parent().expect("records are in a directory"))
}

/// Makes renames and removals in `dir` durable.
///
/// # Errors
/// When the disk refuses.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), RecordError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(io_error("syncing", dir))
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError::Io {
        action,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tests::api_spec;

    fn record(id: &str) -> Record {
        let mut record = Record::new(Spec::from_validated(&api_spec(id)));
        record.state = State::Running(Assets {
            boot_id: "boot".into(),
            vmm: Some(Identity {
                pid: 7,
                start_ticks: 8,
            }),
            daemons: vec![DaemonRecord {
                kind: DaemonKind::Blk,
                process: None,
                restarts: 3,
            }],
            taps: vec!["mt-web-0".into()],
            started_at_ms: 9,
        });
        record
    }

    #[test]
    fn record_reads_back_as_written_and_half_written_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.save(&record("web")).unwrap();
        fs::write(dir.path().join("vms/db.tmp"), b"{").unwrap();
        assert_eq!(store.load().unwrap(), [record("web")]);
        assert!(!dir.path().join("vms/db.tmp").exists());
        store.remove("web").unwrap();
        store.remove("web").unwrap();
        assert_eq!(store.load().unwrap(), []);
    }

    #[test]
    fn damaged_and_foreign_records_stop_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        fs::write(dir.path().join("vms/web.json"), b"{\"version\":2}").unwrap();
        assert!(matches!(
            store.load(),
            Err(RecordError::Version { version: 2, .. })
        ));
        fs::write(dir.path().join("vms/web.json"), b"{\"version\":1}").unwrap();
        assert!(matches!(store.load(), Err(RecordError::Format { .. })));
    }
}
