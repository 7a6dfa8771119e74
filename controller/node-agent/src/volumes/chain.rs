//! Which files a volume consists of, and which of two lists is right after a change of the layers
//! was interrupted.

use std::{
    ffi::{CStr, CString},
    fs::{self, File},
    io::{self, Seek as _, SeekFrom},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::{Layer, Pending, Pool, VolumeError, VolumeRecord, io_error};
use crate::spec::Format;

/// Images on top of one another. Each costs a descriptor and a look-up per request; a clone of a
/// clone of a template with some snapshots stays far below.
pub(crate) const MAX_LAYERS: usize = 16;

/// Extended attribute that a daemon puts on the image which it writes from now on, before it does.
const CURRENT_MARK: &CStr = c"user.mortise.current";

/// What a daemon opens for a disk, the image that is written first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    /// Never empty.
    pub(crate) layers: Vec<ChainLayer>,
    /// LUKS.
    pub(crate) encrypted: bool,
}

/// One image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ChainLayer {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// raw or qcow2.
    pub(crate) format: Format,
}

impl Pool {
    /// The files of a volume. With `settle`, which only whoever knows that no daemon serves it may
    /// ask for, a change of the layers that was interrupted is decided first.
    ///
    /// # Errors
    /// When there is no such volume, or its record cannot be changed.
    pub(crate) fn chain(&self, id: &str, settle: bool) -> Result<Chain, VolumeError> {
        let mut record = self.record(id)?;
        if settle && record.pending.is_some() {
            let _changing = self.change(id)?;
            record = self.record(id)?;
            self.settle(&mut record)?;
        }
        let records = self.records()?;
        let layers = layers(&record, &records)
            .iter()
            .map(|layer| ChainLayer {
                path: self.file(layer),
                format: layer.format,
            })
            .collect();
        Ok(Chain {
            layers,
            encrypted: record.encrypted,
        })
    }

    /// Decides an interrupted change of the layers, for a disk that no daemon serves.
    pub(crate) fn settle(&self, record: &mut VolumeRecord) -> Result<(), VolumeError> {
        let Some(pending) = record.pending.take() else {
            return Ok(());
        };
        let id = record.id.clone();
        match pending {
            Pending::Snapshot { layer, snapshot } => {
                let happened = has_data(&self.file(&layer))
                    .map_err(io_error(&id, "looking at an interrupted snapshot"))?;
                tracing::warn!(
                    volume = id,
                    snapshot,
                    happened,
                    "a snapshot was interrupted"
                );
                if happened {
                    record.push(layer, snapshot);
                    self.save(record)?;
                } else {
                    self.save(record)?;
                    remove(&self.file(&layer)).map_err(io_error(&id, "removing a layer"))?;
                }
            }
            Pending::Copy { layer } => {
                tracing::warn!(volume = id, "a mirror was interrupted");
                self.save(record)?;
                remove(&self.file(&layer)).map_err(io_error(&id, "removing a copy"))?;
            }
            Pending::Switch { layer } => {
                let happened = switched(&self.file(&layer))
                    .map_err(io_error(&id, "looking at an interrupted mirror"))?;
                tracing::warn!(volume = id, happened, "a mirror's switch was interrupted");
                if happened {
                    self.replace_layers(record, layer)?;
                } else {
                    self.save(record)?;
                    remove(&self.file(&layer)).map_err(io_error(&id, "removing a copy"))?;
                }
            }
            Pending::Commit => {
                let below = record.layers.get(1).map(|layer| self.file(layer));
                let happened = below
                    .as_ref()
                    .map_or(Ok(false), |path| switched(path))
                    .map_err(io_error(&id, "looking at an interrupted merge"))?;
                tracing::warn!(volume = id, happened, "a merge of layers was interrupted");
                if happened {
                    self.drop_top_layer(record)?;
                } else {
                    // What was merged already is in both layers, and the upper one still covers it.
                    self.save(record)?;
                }
            }
        }
        Ok(())
    }

    /// The volume consists of `layer` alone from now on; its other files go.
    pub(crate) fn replace_layers(
        &self,
        record: &mut VolumeRecord,
        layer: Layer,
    ) -> Result<(), VolumeError> {
        let before = std::mem::replace(&mut record.layers, vec![layer]);
        record.pending = None;
        record.base = None;
        self.save(record)?;
        for layer in before {
            let path = self.file(&layer);
            if let Err(error) = remove(&path) {
                tracing::warn!("removing {}: {error}", path.display());
            }
        }
        Ok(())
    }

    /// The layer that was merged into the one below goes.
    pub(crate) fn drop_top_layer(&self, record: &mut VolumeRecord) -> Result<(), VolumeError> {
        let merged = record.layers.remove(0);
        if let Some(top) = record.layers.first_mut() {
            top.snapshot = None;
        }
        record.pending = None;
        self.save(record)?;
        let path = self.file(&merged);
        if let Err(error) = remove(&path) {
            tracing::warn!("removing {}: {error}", path.display());
        }
        Ok(())
    }

    /// Removes a daemon's mark from an image that is to be switched to once more.
    pub(crate) fn unmark(&self, layer: &Layer) -> io::Result<()> {
        let name = c_path(&self.file(layer))?;
        // SAFETY: both strings end with NUL.
        if unsafe { libc::removexattr(name.as_ptr(), CURRENT_MARK.as_ptr()) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ENODATA | libc::EOPNOTSUPP) => Ok(()),
            _ => Err(error),
        }
    }

    /// What a guest sees of it.
    pub(crate) fn capacity_bytes(&self, record: &VolumeRecord) -> Result<u64, VolumeError> {
        let id = &record.id;
        let layer = &record.layers[0];
        let path = self.file(layer);
        let mut file = File::open(&path).map_err(io_error(id, "opening it"))?;
        match layer.format {
            Format::Qcow2 => qcow2::Header::read(&file)
                .map(|header| header.capacity_bytes())
                .map_err(|source| VolumeError::Qcow2 {
                    id: id.clone(),
                    action: "reading",
                    path,
                    source,
                }),
            Format::Raw => {
                let len_bytes = file
                    .seek(SeekFrom::End(0))
                    .map_err(io_error(id, "measuring it"))?;
                if !record.encrypted {
                    return Ok(len_bytes);
                }
                let payload = super::make::luks_payload(id, &file)?;
                Ok(len_bytes.saturating_sub(payload))
            }
        }
    }
}

impl VolumeRecord {
    /// Puts a new layer on top; the one below is a snapshot from now on.
    pub(crate) fn push(&mut self, layer: Layer, snapshot: String) {
        if let Some(top) = self.layers.first_mut() {
            top.snapshot = Some(snapshot);
        }
        self.layers.insert(0, layer);
    }
}

/// A volume's own layers and those of its bases.
pub(super) fn layers(record: &VolumeRecord, records: &[VolumeRecord]) -> Vec<Layer> {
    let mut layers = record.layers.clone();
    let mut base = record.base.clone();
    // Bounded also if the records were changed by hand into a circle.
    while let Some(wanted) = base.take().filter(|_| layers.len() <= MAX_LAYERS) {
        let Some(below) = records.iter().find(|record| record.id == wanted.volume) else {
            break;
        };
        let from = match &wanted.snapshot {
            None => 0,
            Some(_) => below
                .layers
                .iter()
                .position(|layer| layer.snapshot == wanted.snapshot)
                .unwrap_or(0),
        };
        layers.extend(below.layers[from..].iter().cloned());
        base = below.base.clone();
    }
    layers
}

/// Whether a qcow2 file maps anything: its L1 table (of 64-bit offsets, big-endian) has an entry.
/// A file that is not complete has none.
fn has_data(path: &Path) -> io::Result<bool> {
    const L1_ENTRIES_AT: usize = 36;
    const L1_OFFSET_AT: usize = 40;
    /// QEMU's limit, too.
    const MAX_L1_BYTES: u64 = 32 << 20;
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        opened => opened?,
    };
    if qcow2::Header::read(&file).is_err() {
        return Ok(false);
    }
    let mut header = [0; L1_OFFSET_AT + 8];
    file.read_exact_at(&mut header, 0)?;
    let entries = u32::from_be_bytes(header[L1_ENTRIES_AT..][..4].try_into().expect("4 bytes"));
    let offset = u64::from_be_bytes(header[L1_OFFSET_AT..][..8].try_into().expect("8 bytes"));
    let len_bytes = (u64::from(entries) * 8).min(MAX_L1_BYTES);
    let mut table = vec![0; len_bytes as usize];
    match file.read_exact_at(&mut table, offset) {
        Ok(()) => Ok(table.iter().any(|byte| *byte != 0)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the daemon marked the target of a mirror as the one that it writes.
fn switched(path: &Path) -> io::Result<bool> {
    let name = c_path(path)?;
    // SAFETY: both strings end with NUL; with no buffer only the attribute's size is asked for.
    let size = unsafe {
        libc::getxattr(
            name.as_ptr(),
            CURRENT_MARK.as_ptr(),
            std::ptr::null_mut(),
            0,
        )
    };
    if size >= 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENODATA | libc::ENOENT | libc::EOPNOTSUPP) => Ok(false),
        _ => Err(error),
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    use std::os::unix::ffi::OsStrExt as _;
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Removes a file; one that is not there is no error.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
