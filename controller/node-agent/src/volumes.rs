//! The host's pool of volumes: image files in STATE_DIR/volumes, and a record for each volume that
//! is more than one raw file. A volume appears under its name only when it is complete and durable.
//!
//! A volume consists of layers, each a file. The first is written; below it are what its snapshots
//! keep and, for a linked clone, the layers of the volume that it is based on.

mod chain;
mod copy;
mod error;
mod keys;
mod make;
mod record;

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::watch;

use self::keys::Keys;
pub(crate) use self::{
    chain::{Chain, ChainLayer, MAX_LAYERS},
    error::{VolumeError, io_error, is_full},
    make::{create_file, create_new, grow_layer, make_overlay},
    record::{Base, Layer, Pending, VolumeRecord},
};
use crate::{
    image::{self, Claims},
    import::ImportRequest,
    record as records,
    spec::Format,
};

const SECTOR_BYTES: u64 = 512;
/// ext4's largest file with 4 KiB blocks is 16 TiB; leave the file system the last word below that.
const MAX_VOLUME_BYTES: u64 = 16 << 40;

/// What is to be made.
#[derive(Clone, Debug, Default)]
pub(crate) struct Request {
    /// A checked name.
    pub(crate) id: String,
    /// 0 for the source's.
    pub(crate) size_bytes: u64,
    /// Of the image.
    pub(crate) format: Format,
    /// What is reserved now.
    pub(crate) preallocation: Preallocation,
    /// Of qcow2; 0 for the default.
    pub(crate) cluster_bytes: u32,
    /// LUKS.
    pub(crate) encrypted: bool,
    /// What is in it.
    pub(crate) content: Content,
}

/// What a new volume holds.
#[derive(Clone, Debug, Default)]
pub(crate) enum Content {
    /// Zeroes.
    #[default]
    Nothing,
    /// Those of a raw image.
    Copy(PathBuf),
    /// Those of another volume, which stays below.
    Clone(Base),
    /// Those of files that were uploaded.
    Import(ImportRequest),
}

/// What is reserved when a volume is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// qcow2's tables.
    Metadata,
    /// Blocks.
    Falloc,
    /// Blocks, by writing zeroes.
    Full,
}

/// A volume, complete or on its way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Volume {
    /// Its name.
    pub(crate) id: String,
    /// What a guest sees.
    pub(crate) size_bytes: u64,
    /// While it is being made.
    pub(crate) creating: Option<Progress>,
    /// Of the layer that is written.
    pub(crate) format: Format,
    /// 0 for formats without.
    pub(crate) cluster_bytes: u32,
    /// Volume it is a linked clone of.
    pub(crate) base: Option<String>,
    /// Linked clones of it.
    pub(crate) clones: Vec<String>,
    /// All that it consists of, the one that is written first.
    pub(crate) layers: Vec<LayerInfo>,
    /// How many of these are its own.
    pub(crate) own_layers: usize,
    /// LUKS.
    pub(crate) encrypted: bool,
    /// The passphrase is here.
    pub(crate) key_present: bool,
}

/// One file of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayerInfo {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// raw or qcow2.
    pub(crate) format: Format,
    /// Blocks on the file system.
    pub(crate) allocated_bytes: u64,
    /// The snapshot that it keeps.
    pub(crate) snapshot: Option<String>,
    /// When it was made; 0 when that is not known.
    pub(crate) created_at_ms: u64,
}

/// How far the making of a volume is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// copying, verifying, converting
    pub(crate) stage: &'static str,
    /// Bytes of it.
    pub(crate) done_bytes: u64,
    /// Of so many; 0 when that is not known.
    pub(crate) total_bytes: u64,
}

/// The pool. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Pool {
    dir: PathBuf,
    claims: Claims,
    keys: Keys,
    imports: crate::import::Imports,
    creating: Arc<Mutex<HashMap<String, Arc<Creation>>>>,
    changing: Arc<Mutex<HashSet<String>>>,
}

/// A volume on its way.
#[derive(Debug)]
pub(crate) struct Creation {
    size_bytes: AtomicU64,
    format: Format,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    stage: Mutex<&'static str>,
    /// Closed when it is over, however it ended.
    over: watch::Receiver<()>,
}

/// The right to change a volume's layers, until it is dropped.
#[derive(Debug)]
pub(crate) struct Changing {
    pool: Pool,
    id: String,
}

impl Pool {
    /// Opens STATE_DIR/volumes; what a dead agent left half-made is removed.
    ///
    /// # Errors
    /// When it cannot be created or read.
    pub(crate) fn open(
        state_dir: &Path,
        run_dir: &Path,
        claims: Claims,
        imports: crate::import::Imports,
    ) -> Result<Self, VolumeError> {
        let dir = state_dir.join("volumes");
        let error = |source| VolumeError::Pool {
            dir: dir.clone(),
            source,
        };
        fs::create_dir_all(&dir).map_err(error)?;
        let pool = Self {
            keys: Keys::open(run_dir).map_err(error)?,
            dir: dir.clone(),
            claims,
            imports,
            creating: Arc::default(),
            changing: Arc::default(),
        };
        pool.remove_leftovers()?;
        Ok(pool)
    }

    /// Keys of encrypted volumes.
    pub(crate) fn keys(&self) -> &Keys {
        &self.keys
    }

    /// Where a layer's file is.
    pub(crate) fn file(&self, layer: &Layer) -> PathBuf {
        // An absolute one stands for itself.
        self.dir.join(&layer.file)
    }

    /// All volumes, by name.
    ///
    /// # Errors
    /// When the directory or a record cannot be read.
    pub(crate) fn list(&self) -> Result<Vec<Volume>, VolumeError> {
        let mut volumes: Vec<Volume> = self
            .lock()
            .iter()
            .map(|(id, creation)| creation.describe(id))
            .collect();
        let records = self.records()?;
        for record in records.iter().filter(|record| !record.deleting) {
            // One that was just completed is still among those being made.
            volumes.retain(|volume| volume.id != record.id);
            volumes.push(self.describe(record, &records));
        }
        volumes.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(volumes)
    }

    /// One volume that is complete.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn get(&self, id: &str) -> Result<Volume, VolumeError> {
        let record = self.record(id)?;
        Ok(self.describe(&record, &self.records()?))
    }

    /// Makes a volume, or waits for the one that is being made under this name.
    ///
    /// # Errors
    /// When it cannot be made; nothing is left of it then.
    pub(crate) async fn create(&self, request: Request) -> Result<Volume, VolumeError> {
        loop {
            if let Some(volume) = self.existing(&request)? {
                return Ok(volume);
            }
            let (over_sender, over) = watch::channel(());
            let creation = Arc::new(Creation {
                size_bytes: AtomicU64::new(request.size_bytes),
                format: request.format,
                done_bytes: AtomicU64::new(0),
                total_bytes: AtomicU64::new(0),
                stage: Mutex::new(""),
                over,
            });
            let other = {
                let mut creating = self.lock();
                let other = creating.get(&request.id).cloned();
                if other.is_none() {
                    creating.insert(request.id.clone(), creation.clone());
                }
                other
            };
            if let Some(other) = other {
                let _ = other.over.clone().changed().await;
                continue;
            }
            let pool = self.clone();
            // Goes on when the caller hangs up; the same request finds it again.
            let making = tokio::task::spawn_blocking(move || {
                let made = pool
                    .make(&request, &creation)
                    .map_err(|error| pool.explain_full_disk(error));
                pool.lock().remove(&request.id);
                drop(over_sender);
                made
            });
            return making
                .await
                .unwrap_or_else(|panic| panic!("making a volume: {panic}"));
        }
    }

    /// Removes a volume. One that is not there is no error.
    ///
    /// # Errors
    /// When a VM, a copy or a linked clone uses it.
    pub(crate) fn delete(&self, id: &str) -> Result<(), VolumeError> {
        let mut record = match self.record(id) {
            Err(VolumeError::Missing { .. }) => {
                return self
                    .keys
                    .forget(id)
                    .map_err(io_error(id, "removing its key"));
            }
            found => found?,
        };
        let _changing = self.change(id)?;
        self.refuse_clones(id)?;
        let mut claims = Vec::new();
        for layer in &record.layers {
            let path = self.file(layer);
            let image = |source| VolumeError::Image {
                id: id.to_owned(),
                source,
            };
            let file = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(io_error(id, "opening it"))?,
            };
            let claim = self.claims.claim(&path, &file, "a deletion", false);
            claims.push(claim.map_err(image)?);
            image::probe_locks(&path, &file, false).map_err(image)?;
        }
        if !record.is_plain() {
            // What is left after a crash must not be taken for a plain volume.
            record.deleting = true;
            record.save(&self.dir)?;
        }
        self.remove_files(&record)?;
        self.keys
            .forget(id)
            .map_err(io_error(id, "removing its key"))
    }

    /// What is known of a volume that is complete.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn record(&self, id: &str) -> Result<VolumeRecord, VolumeError> {
        if let Some(record) = VolumeRecord::load(&self.dir, id)? {
            return Ok(record);
        }
        let plain = VolumeRecord::plain(id);
        if self.file(&plain.layers[0]).exists() {
            return Ok(plain);
        }
        Err(VolumeError::Missing { id: id.to_owned() })
    }

    /// Replaces what is known of a volume.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn save(&self, record: &VolumeRecord) -> Result<(), VolumeError> {
        if record.is_plain() {
            record.forget(&self.dir)?;
        } else {
            record.save(&self.dir)?;
        }
        Ok(())
    }

    /// Takes the right to change a volume's layers.
    ///
    /// # Errors
    /// When somebody has it.
    pub(crate) fn change(&self, id: &str) -> Result<Changing, VolumeError> {
        let mut changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if changing.insert(id.to_owned()) {
            Ok(Changing {
                pool: self.clone(),
                id: id.to_owned(),
            })
        } else {
            Err(VolumeError::Busy { id: id.to_owned() })
        }
    }

    /// Refuses a volume that linked clones are based on, at any layer.
    ///
    /// # Errors
    /// When there are some.
    pub(crate) fn refuse_clones(&self, id: &str) -> Result<(), VolumeError> {
        let clones = clones(&self.records()?, id, |_| true);
        if clones.is_empty() {
            return Ok(());
        }
        Err(VolumeError::HasClones {
            id: id.to_owned(),
            clones: clones.join(", "),
        })
    }

    /// Takes an attachment's generation in, durably; 0 says nothing.
    ///
    /// # Errors
    /// When a later attachment has been here.
    pub(crate) fn admit(&self, id: &str, generation: u64) -> Result<(), VolumeError> {
        if generation == 0 {
            return Ok(());
        }
        let _changing = self.change(id)?;
        let mut record = self.record(id)?;
        if generation < record.generation {
            return Err(VolumeError::Superseded {
                id: id.to_owned(),
                given: generation,
                highest: record.generation,
            });
        }
        if generation > record.generation {
            record.generation = generation;
            self.save(&record)?;
        }
        Ok(())
    }

    /// Refuses to write a volume that linked clones are based on as it is.
    ///
    /// # Errors
    /// When there are some.
    pub(crate) fn refuse_frozen(&self, id: &str) -> Result<(), VolumeError> {
        let clones = clones(&self.records()?, id, |base| base.snapshot.is_none());
        if clones.is_empty() {
            return Ok(());
        }
        Err(VolumeError::Frozen {
            id: id.to_owned(),
            clones: clones.join(", "),
        })
    }

    fn existing(&self, request: &Request) -> Result<Option<Volume>, VolumeError> {
        let volume = match self.get(&request.id) {
            Err(VolumeError::Missing { .. }) => return Ok(None),
            found => found?,
        };
        if request.size_bytes != 0 && request.size_bytes != volume.size_bytes {
            return Err(VolumeError::Exists {
                id: request.id.clone(),
                size_bytes: volume.size_bytes,
            });
        }
        Ok(Some(volume))
    }

    fn records(&self) -> Result<Vec<VolumeRecord>, VolumeError> {
        let error = |source| VolumeError::Pool {
            dir: self.dir.clone(),
            source,
        };
        let mut ids = HashSet::new();
        for entry in fs::read_dir(&self.dir).map_err(error)? {
            let name = entry.map_err(error)?.file_name();
            let name = name.to_str().unwrap_or_default();
            let id = name.strip_suffix(".raw").or(name.strip_suffix(".json"));
            // Other layers have a number in their names.
            if let Some(id) = id.filter(|id| api::names::is_id(id)) {
                ids.insert(id.to_owned());
            }
        }
        let mut records = Vec::new();
        for id in ids {
            match self.record(&id) {
                // Deleted meanwhile.
                Err(VolumeError::Missing { .. }) => {}
                found => records.push(found?),
            }
        }
        Ok(records)
    }

    fn describe(&self, record: &VolumeRecord, records: &[VolumeRecord]) -> Volume {
        let layers: Vec<LayerInfo> = chain::layers(record, records)
            .iter()
            .map(|layer| self.layer_info(layer))
            .collect();
        let top = layers.first();
        let header = top
            .filter(|top| top.format == Format::Qcow2)
            .and_then(|top| qcow2::Header::read(&File::open(&top.path).ok()?).ok());
        Volume {
            id: record.id.clone(),
            size_bytes: self.capacity_bytes(record).unwrap_or(0),
            creating: None,
            format: top.map(|top| top.format).unwrap_or_default(),
            cluster_bytes: header.map_or(0, |header| header.cluster_bytes() as u32),
            base: record.base.as_ref().map(|base| base.volume.clone()),
            clones: clones(records, &record.id, |_| true),
            own_layers: record.layers.len().min(layers.len()),
            layers,
            encrypted: record.encrypted,
            key_present: record.encrypted && self.keys.has(&record.id),
        }
    }

    fn layer_info(&self, layer: &Layer) -> LayerInfo {
        let path = self.file(layer);
        let metadata = fs::metadata(&path).ok();
        LayerInfo {
            allocated_bytes: metadata.map_or(0, |metadata| {
                std::os::unix::fs::MetadataExt::blocks(&metadata) * SECTOR_BYTES
            }),
            path,
            format: layer.format,
            snapshot: layer.snapshot.clone(),
            created_at_ms: layer.created_at_ms,
        }
    }

    /// Removes temporary files, volumes whose deletion was begun, and layers that no record names:
    /// their volumes were never complete.
    fn remove_leftovers(&self) -> Result<(), VolumeError> {
        let error = |source| VolumeError::Pool {
            dir: self.dir.clone(),
            source,
        };
        for record in self.records()?.iter().filter(|record| record.deleting) {
            self.remove_files(record)?;
        }
        let records = self.records()?;
        let mut known: HashSet<PathBuf> = HashSet::new();
        for record in &records {
            known.extend(record.layers.iter().map(|layer| self.file(layer)));
            if let Some(
                Pending::Snapshot { layer, .. }
                | Pending::Copy { layer }
                | Pending::Switch { layer },
            ) = &record.pending
            {
                known.insert(self.file(layer));
            }
        }
        for entry in fs::read_dir(&self.dir).map_err(error)? {
            let path = entry.map_err(error)?.path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            let is_ours = matches!(extension, Some("tmp" | "raw" | "qcow2" | "luks"));
            if is_ours && !known.contains(&path) {
                tracing::info!(path = %path.display(), "removing what was left half-made");
                fs::remove_file(path).map_err(error)?;
            }
        }
        Ok(())
    }

    fn remove_files(&self, record: &VolumeRecord) -> Result<(), VolumeError> {
        for layer in &record.layers {
            match fs::remove_file(self.file(layer)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error(&record.id, "removing it")(error));
                }
                _ => {}
            }
        }
        records::sync_dir(&self.dir)?;
        record.forget(&self.dir)?;
        Ok(())
    }

    fn explain_full_disk(&self, error: VolumeError) -> VolumeError {
        match error {
            VolumeError::Io { id, source, .. } if is_full(&source) => VolumeError::NoSpace {
                id,
                dir: self.dir.clone(),
                free_mib: self.free_bytes() >> 20,
            },
            other => other,
        }
    }

    fn free_bytes(&self) -> u64 {
        nix::sys::statvfs::statvfs(&self.dir)
            .map_or(0, |stat| stat.blocks_available() * stat.fragment_size())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Creation>>> {
        self.creating.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Creation {
    /// What goes on from now.
    pub(crate) fn begin(&self, stage: &'static str, total_bytes: u64) {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) = stage;
        self.done_bytes.store(0, Ordering::Relaxed);
        self.total_bytes.store(total_bytes, Ordering::Relaxed);
    }

    /// Where to count what is done.
    pub(crate) fn done_bytes(&self) -> &AtomicU64 {
        &self.done_bytes
    }

    fn describe(&self, id: &str) -> Volume {
        Volume {
            id: id.to_owned(),
            size_bytes: self.size_bytes.load(Ordering::Relaxed),
            format: self.format,
            creating: Some(Progress {
                stage: *self.stage.lock().unwrap_or_else(PoisonError::into_inner),
                done_bytes: self.done_bytes.load(Ordering::Relaxed),
                total_bytes: self.total_bytes.load(Ordering::Relaxed),
            }),
            ..Volume::default()
        }
    }
}

impl Drop for Changing {
    fn drop(&mut self) {
        let mut changing = self
            .pool
            .changing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        changing.remove(&self.id);
    }
}

/// Ids of the linked clones of a volume whose base is as wanted.
fn clones(records: &[VolumeRecord], id: &str, wanted: impl Fn(&Base) -> bool) -> Vec<String> {
    let mut clones: Vec<String> = records
        .iter()
        .filter(|record| {
            record
                .base
                .as_ref()
                .is_some_and(|base| base.volume == id && wanted(base))
        })
        .map(|record| record.id.clone())
        .collect();
    clones.sort();
    clones
}

#[cfg(test)]
mod tests;
