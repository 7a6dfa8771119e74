//! What the pool knows about a volume beyond its files: STATE_DIR/volumes/ID.json. A plain raw
//! volume without snapshots needs none: it is the file ID.raw.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    record::{self, RecordError},
    spec::Format,
};

/// Raised when a record's meaning changes.
const VERSION: u32 = 1;

/// Everything that must survive the agent about one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VolumeRecord {
    version: u32,
    /// Its name.
    pub(crate) id: String,
    /// Its own images, the one that is written first.
    pub(crate) layers: Vec<Layer>,
    /// What the last layer lies on: a linked clone's base.
    #[serde(default)]
    pub(crate) base: Option<Base>,
    /// LUKS.
    #[serde(default)]
    pub(crate) encrypted: bool,
    /// A change of the layers that was begun.
    #[serde(default)]
    pub(crate) pending: Option<Pending>,
    /// Number of the next layer's file.
    #[serde(default)]
    pub(crate) next_layer: u32,
    /// The files are being removed.
    #[serde(default)]
    pub(crate) deleting: bool,
    /// The highest of its attachments.
    #[serde(default)]
    pub(crate) generation: u64,
}

/// One image of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layer {
    /// In the pool, or absolute.
    pub(crate) file: PathBuf,
    /// Never guessed from the content, which guests write.
    pub(crate) format: Format,
    /// Name of what this layer keeps as it was; `None` for the one that is written.
    #[serde(default)]
    pub(crate) snapshot: Option<String>,
    /// When the layer was made.
    #[serde(default)]
    pub(crate) created_at_ms: u64,
}

/// Where a linked clone begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Base {
    /// The volume.
    pub(crate) volume: String,
    /// Its layer of this name and those below; `None` for all of it.
    #[serde(default)]
    pub(crate) snapshot: Option<String>,
}

/// A change of the layers, noted before it may happen: whoever finds it finds out whether it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Pending {
    /// Writes go to this new layer from some instant on; the one before is then a snapshot of this
    /// name. It happened if the layer holds anything.
    Snapshot {
        /// The new one.
        layer: Layer,
        /// What the layer below is called from then on.
        snapshot: String,
    },
    /// The disk is copied to this image and nothing reads it yet.
    Copy {
        /// The target.
        layer: Layer,
    },
    /// The daemon was told to go on with the copy.
    Switch {
        /// The target.
        layer: Layer,
    },
    /// The top layer is being merged into the one below. Until the daemon goes on with that one,
    /// which it marks, reading through both gives what the guest wrote.
    Commit,
}

impl VolumeRecord {
    /// Of a volume with one layer.
    pub(crate) fn new(id: &str, layer: Layer) -> Self {
        Self {
            version: VERSION,
            id: id.to_owned(),
            layers: vec![layer],
            base: None,
            encrypted: false,
            pending: None,
            next_layer: 1,
            deleting: false,
            generation: 0,
        }
    }

    /// A plain raw volume, which has no record.
    pub(crate) fn plain(id: &str) -> Self {
        let mut layer = Layer::new(format!("{id}.raw").into(), Format::Raw);
        // No record says when.
        layer.created_at_ms = 0;
        Self::new(id, layer)
    }

    /// Whether it needs no file.
    pub(crate) fn is_plain(&self) -> bool {
        let mut plain = Self::plain(&self.id);
        if let (Some(layer), Some(own)) = (plain.layers.first_mut(), self.layers.first()) {
            layer.created_at_ms = own.created_at_ms;
        }
        *self == plain
    }

    /// Takes the name of a new layer's file.
    pub(crate) fn new_layer(&mut self, format: Format) -> Layer {
        let number = self.next_layer;
        self.next_layer += 1;
        Layer::new(
            format!("{}.{number}.{}", self.id, format.name()).into(),
            format,
        )
    }

    /// The record in `dir`.
    ///
    /// # Errors
    /// When it cannot be read or is none.
    pub(crate) fn load(dir: &Path, id: &str) -> Result<Option<Self>, RecordError> {
        let path = path(dir, id);
        if !path.exists() {
            return Ok(None);
        }
        record::load_json(&path, VERSION).map(Some)
    }

    /// Replaces the record; on return it is durable.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn save(&self, dir: &Path) -> Result<(), RecordError> {
        record::save_json(&path(dir, &self.id), self)
    }

    /// Removes the record. One that is not there is no error.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(crate) fn forget(&self, dir: &Path) -> Result<(), RecordError> {
        let path = path(dir, &self.id);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(RecordError::Io {
                action: "removing",
                path,
                source,
            }),
            _ => record::sync_dir(dir),
        }
    }
}

impl Layer {
    /// A layer made now.
    pub(crate) fn new(file: PathBuf, format: Format) -> Self {
        Self {
            file,
            format,
            snapshot: None,
            created_at_ms: crate::vm::now_ms(),
        }
    }
}

fn path(dir: &Path, id: &str) -> PathBuf {
    dir.join(format!("{id}.json"))
}
