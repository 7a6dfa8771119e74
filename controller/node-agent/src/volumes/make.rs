//! Making a volume's files. What is not complete has a temporary name, or one that no record names.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::atomic::Ordering,
};

use super::{
    Base, Content, Creation, Layer, MAX_LAYERS, MAX_VOLUME_BYTES, Pool, Preallocation, Request,
    SECTOR_BYTES, Volume, VolumeError, VolumeRecord, chain, copy::copy_data, io_error,
};
use crate::{
    image::{self, Claim},
    import::ImportRequest,
    record as records,
    spec::Format,
};

/// Written at a time where all blocks are to be written.
const ZERO_CHUNK_BYTES: usize = 1 << 20;

impl Pool {
    /// Makes what is asked for; nothing is left after a failure.
    pub(super) fn make(
        &self,
        request: &Request,
        creation: &Creation,
    ) -> Result<Volume, VolumeError> {
        let _changing = self.change(&request.id)?;
        let mut record = match (&request.content, request.format) {
            (Content::Clone(_), _) | (_, Format::Qcow2) => {
                let mut record = VolumeRecord::plain(&request.id);
                record.next_layer = 0;
                record.layers = vec![record.new_layer(Format::Qcow2)];
                record
            }
            _ if request.encrypted => {
                let file = format!("{}.luks", request.id);
                let mut record =
                    VolumeRecord::new(&request.id, Layer::new(file.into(), Format::Raw));
                record.encrypted = true;
                record
            }
            _ => VolumeRecord::plain(&request.id),
        };
        let path = self.file(&record.layers[0]);
        // Under its own name from the start if it is nothing without its record.
        let temporary = if record.is_plain() {
            path.with_extension("tmp")
        } else {
            path.clone()
        };
        let made = self
            .fill(&temporary, request, &mut record, creation)
            .and_then(|()| {
                if temporary != path {
                    fs::rename(&temporary, &path).map_err(io_error(&request.id, "naming it"))?;
                }
                records::sync_dir(&self.dir)?;
                self.save(&record)
            });
        if made.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        made?;
        if let Content::Import(import) = &request.content {
            self.imports.finished(&import.upload);
        }
        self.get(&request.id)
    }

    fn fill(
        &self,
        path: &Path,
        request: &Request,
        record: &mut VolumeRecord,
        creation: &Creation,
    ) -> Result<(), VolumeError> {
        match &request.content {
            Content::Import(import) => self.fill_from_upload(path, request, import, creation),
            Content::Clone(base) => self.fill_clone(path, request, base, record, creation),
            Content::Nothing | Content::Copy(_) if request.format == Format::Qcow2 => {
                let size_bytes = checked_size(&request.id, request.size_bytes, 0)?;
                let file = create_file(&request.id, path)?;
                make_qcow2(request, &file, path, size_bytes, None)
            }
            Content::Nothing if request.encrypted => self.fill_encrypted(path, request),
            Content::Nothing => {
                let size_bytes = checked_size(&request.id, request.size_bytes, 0)?;
                fill_raw(path, request, size_bytes, None, creation)
            }
            Content::Copy(source) => {
                let source = self.open_source(&request.id, source)?;
                let size_bytes = checked_size(&request.id, request.size_bytes, source.len_bytes)?;
                fill_raw(path, request, size_bytes, Some(source), creation)
            }
        }
    }

    fn fill_encrypted(&self, path: &Path, request: &Request) -> Result<(), VolumeError> {
        let id = &request.id;
        let size_bytes = checked_size(id, request.size_bytes, 0)?;
        let key = self
            .keys
            .reader(id)
            .map_err(io_error(id, "reading its key"))?
            .ok_or_else(|| VolumeError::NoKey { id: id.clone() })?;
        let luks = |problem: &dyn std::error::Error| VolumeError::Luks {
            id: id.clone(),
            problem: crate::vm::error_chain(problem),
        };
        let passphrase = luks::Passphrase::read(key).map_err(|error| luks(&error))?;
        let file = create_file(id, path)?;
        let payload = luks::DEFAULT_PAYLOAD_OFFSET_BYTES;
        file.set_len(payload + size_bytes)
            .map_err(io_error(id, "sizing it"))?;
        preallocate(id, &file, request.preallocation, payload + size_bytes)?;
        let options = luks::FormatOptions {
            payload_offset_bytes: payload,
            // Fits guests that see blocks of 512 and of 4096 bytes.
            sector_bytes: 512,
            ..luks::FormatOptions::default()
        };
        luks::format(&file, passphrase.as_bytes(), &options).map_err(|error| luks(&error))?;
        file.sync_all().map_err(io_error(id, "syncing it"))
    }

    fn fill_clone(
        &self,
        path: &Path,
        request: &Request,
        base: &Base,
        record: &mut VolumeRecord,
        creation: &Creation,
    ) -> Result<(), VolumeError> {
        let id = &request.id;
        // Nobody changes the base's layers between here and the clone's record.
        let _changing = self.change(&base.volume)?;
        let below = self.record(&base.volume)?;
        if below.encrypted {
            return Err(VolumeError::Encrypted {
                id: base.volume.clone(),
                what: "a linked clone",
            });
        }
        if below.pending.is_some() {
            return Err(VolumeError::Busy {
                id: base.volume.clone(),
            });
        }
        let known = |layer: &Layer| base.snapshot.is_some() && layer.snapshot == base.snapshot;
        let top = match &base.snapshot {
            None => &below.layers[0],
            Some(snapshot) => below
                .layers
                .iter()
                .find(|layer| known(layer))
                .ok_or_else(|| VolumeError::NoSnapshot {
                    id: base.volume.clone(),
                    snapshot: snapshot.clone(),
                })?,
        };
        record.base = Some(base.clone());
        let layers = chain::layers(record, &self.records()?).len();
        if layers > MAX_LAYERS {
            return Err(VolumeError::Layers {
                id: id.clone(),
                layers,
                max: MAX_LAYERS,
            });
        }
        let base_path = self.file(top);
        // A base that is written now would change under its clone.
        let _claim = match &base.snapshot {
            None => Some(self.claim_source(id, &base_path, top.format)?),
            Some(_) => None,
        };
        let mut base_alone = below.clone();
        base_alone.layers = vec![top.clone()];
        let base_bytes = self.capacity_bytes(&base_alone)?;
        let size_bytes = checked_size(id, request.size_bytes, base_bytes)?;
        creation.size_bytes.store(size_bytes, Ordering::Relaxed);
        // For people and other tools; ours go by the record.
        let name = top.file.display().to_string();
        let backing = qcow2::BackingRef {
            name,
            format: Some(top.format.name().to_owned()),
        };
        let file = create_file(id, path)?;
        make_qcow2(request, &file, path, size_bytes, Some(backing))
    }

    fn fill_from_upload(
        &self,
        path: &Path,
        request: &Request,
        import: &ImportRequest,
        creation: &Creation,
    ) -> Result<(), VolumeError> {
        let id = &request.id;
        let failed = |source| VolumeError::Import {
            id: id.clone(),
            source,
        };
        let source = self
            .imports
            .open_source(import, request.format, creation)
            .map_err(failed)?;
        let size_bytes = checked_size(id, request.size_bytes, source.size_bytes())?;
        creation.size_bytes.store(size_bytes, Ordering::Relaxed);
        source
            .make(
                path,
                request.format,
                request.cluster_bytes,
                self.free_bytes(),
                creation,
            )
            .map_err(failed)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(io_error(id, "opening it"))?;
        let made_bytes = match request.format {
            Format::Raw => file.metadata().map_err(io_error(id, "measuring it"))?.len(),
            Format::Qcow2 => source.size_bytes(),
        };
        if made_bytes < size_bytes {
            grow(id, &file, path, request.format, size_bytes)?;
        }
        preallocate(
            id,
            &file,
            match request.format {
                Format::Raw => request.preallocation,
                Format::Qcow2 => Preallocation::Off,
            },
            size_bytes,
        )?;
        file.sync_all().map_err(io_error(id, "syncing it"))
    }

    fn open_source(&self, id: &str, path: &Path) -> Result<Source, VolumeError> {
        let claim = self.claim_source(id, path, Format::Raw)?;
        let image = |source| VolumeError::Image {
            id: id.to_owned(),
            source,
        };
        let mut file = image::open(path, true, Format::Raw).map_err(image)?;
        image::refuse_qcow2(path, &file).map_err(image)?;
        // A block device's metadata has no length.
        let len_bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0))
            .map_err(io_error(id, "measuring the source"))?;
        Ok(Source {
            file,
            len_bytes,
            _claim: claim,
        })
    }

    fn claim_source(&self, id: &str, path: &Path, format: Format) -> Result<Claim, VolumeError> {
        let open = || {
            let file = image::open(path, true, format)?;
            let claim = self
                .claims
                .claim(path, &file, "a copy into a volume", true)?;
            image::probe_locks(path, &file, true)?;
            Ok(claim)
        };
        open().map_err(|source| VolumeError::Image {
            id: id.to_owned(),
            source,
        })
    }
}

/// An image that is copied, and the claim that keeps writers off meanwhile.
struct Source {
    file: File,
    len_bytes: u64,
    _claim: Claim,
}

/// Makes an image larger that no daemon has open.
///
/// # Errors
/// When the file system refuses, or the image is not as it should be.
fn grow(
    id: &str,
    file: &File,
    path: &Path,
    format: Format,
    size_bytes: u64,
) -> Result<(), VolumeError> {
    match format {
        Format::Raw => file
            .set_len(size_bytes)
            .map_err(io_error(id, "sizing it"))?,
        Format::Qcow2 => {
            let qcow2 = |source| VolumeError::Qcow2 {
                id: id.to_owned(),
                action: "growing",
                path: path.to_owned(),
                source,
            };
            let file = file.try_clone().map_err(io_error(id, "opening it"))?;
            let layer = qcow2::Layer {
                file: std::sync::Arc::new(file),
                format: qcow2::Format::Qcow2,
                mem_align_bytes: None,
            };
            let image = qcow2::Image::open(vec![layer], false).map_err(qcow2)?;
            image.resize(size_bytes).map_err(qcow2)?;
        }
    }
    file.sync_all().map_err(io_error(id, "syncing it"))
}

/// Makes a volume's first layer larger.
///
/// # Errors
/// As [`grow`].
pub(crate) fn grow_layer(
    pool: &Pool,
    id: &str,
    layer: &Layer,
    encrypted: bool,
    size_bytes: u64,
) -> Result<(), VolumeError> {
    let path = pool.file(layer);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(io_error(id, "opening it"))?;
    let header_bytes = if encrypted {
        luks_payload(id, &file)?
    } else {
        0
    };
    grow(id, &file, &path, layer.format, header_bytes + size_bytes)
        .map_err(|error| pool.explain_full_disk(error))
}

/// Where the data of an encrypted volume begin.
pub(crate) fn luks_payload(id: &str, file: &File) -> Result<u64, VolumeError> {
    luks::Volume::read(file)
        .map(|volume| volume.payload_offset_bytes())
        .map_err(|error| VolumeError::Luks {
            id: id.to_owned(),
            problem: crate::vm::error_chain(&error),
        })
}

/// A new file for a layer, for this agent alone.
pub(crate) fn create_file(id: &str, path: &Path) -> Result<File, VolumeError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(io_error(id, "creating it"))
}

/// An empty qcow2 image in an empty file.
pub(crate) fn make_overlay(
    id: &str,
    file: &File,
    path: &Path,
    size_bytes: u64,
    backing: qcow2::BackingRef,
) -> Result<(), VolumeError> {
    let request = Request {
        id: id.to_owned(),
        ..Request::default()
    };
    make_qcow2(&request, file, path, size_bytes, Some(backing))
}

fn make_qcow2(
    request: &Request,
    file: &File,
    path: &Path,
    size_bytes: u64,
    backing: Option<qcow2::BackingRef>,
) -> Result<(), VolumeError> {
    let options = qcow2::CreateOptions {
        capacity_bytes: size_bytes,
        cluster_bytes: request.cluster_bytes,
        backing,
        preallocation: match request.preallocation {
            Preallocation::Off => qcow2::Preallocation::Off,
            Preallocation::Metadata => qcow2::Preallocation::Metadata,
            Preallocation::Falloc => qcow2::Preallocation::Falloc,
            Preallocation::Full => qcow2::Preallocation::Full,
        },
    };
    qcow2::create(file, &options).map_err(|error| match error {
        qcow2::Error::Io { source, .. } => io_error(&request.id, "making a qcow2 image")(source),
        source => VolumeError::Qcow2 {
            id: request.id.clone(),
            action: "making",
            path: path.to_owned(),
            source,
        },
    })
}

fn fill_raw(
    path: &Path,
    request: &Request,
    size_bytes: u64,
    source: Option<Source>,
    creation: &Creation,
) -> Result<(), VolumeError> {
    let id = &request.id;
    creation.size_bytes.store(size_bytes, Ordering::Relaxed);
    let volume = create_file(id, path)?;
    volume
        .set_len(size_bytes)
        .map_err(io_error(id, "sizing it"))?;
    preallocate(id, &volume, request.preallocation, size_bytes)?;
    if let Some(source) = source {
        creation.begin("copying", source.len_bytes);
        copy_data(
            &source.file,
            &volume,
            source.len_bytes,
            creation.done_bytes(),
        )
        .map_err(io_error(id, "copying the source"))?;
    }
    volume.sync_all().map_err(io_error(id, "syncing it"))
}

fn preallocate(
    id: &str,
    file: &File,
    preallocation: Preallocation,
    size_bytes: u64,
) -> Result<(), VolumeError> {
    match preallocation {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => {
            reserve(file, size_bytes).map_err(io_error(id, "reserving its blocks"))
        }
        Preallocation::Full => {
            // First, so that a full disk is known before the work.
            reserve(file, size_bytes).map_err(io_error(id, "reserving its blocks"))?;
            write_zeroes(file).map_err(io_error(id, "writing its blocks"))
        }
    }
}

/// Takes the blocks if there are so many: a file system that is asked for more than it has may take all
/// of them first, and meanwhile nobody else can write.
fn reserve(file: &File, size_bytes: u64) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    const BLOCK_BYTES: u64 = 512;
    let own_bytes = file.metadata()?.blocks() * BLOCK_BYTES;
    let stat = nix::sys::statvfs::fstatvfs(file)?;
    let free_bytes = stat.blocks_available() * stat.fragment_size();
    if size_bytes.saturating_sub(own_bytes) > free_bytes {
        return Err(nix::errno::Errno::ENOSPC.into());
    }
    let mode = nix::fcntl::FallocateFlags::empty();
    Ok(nix::fcntl::fallocate(file, mode, 0, size_bytes as i64)?)
}

/// Writes zeroes where the file has a hole or reserved blocks; data stay.
fn write_zeroes(file: &File) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let zeroes = vec![0; ZERO_CHUNK_BYTES];
    let mut bytes = vec![0; ZERO_CHUNK_BYTES];
    let len_bytes = file.metadata()?.len();
    let mut at = 0;
    while at < len_bytes {
        let len = (len_bytes - at).min(ZERO_CHUNK_BYTES as u64) as usize;
        file.read_exact_at(&mut bytes[..len], at)?;
        if bytes[..len] == zeroes[..len] {
            file.write_all_at(&zeroes[..len], at)?;
        }
        at += len as u64;
    }
    Ok(())
}

fn checked_size(id: &str, asked_bytes: u64, source_bytes: u64) -> Result<u64, VolumeError> {
    let size_bytes = match asked_bytes {
        0 => source_bytes,
        asked => asked,
    };
    if !(SECTOR_BYTES..=MAX_VOLUME_BYTES).contains(&size_bytes)
        || !size_bytes.is_multiple_of(SECTOR_BYTES)
    {
        return Err(VolumeError::Size {
            id: id.to_owned(),
            size_bytes,
        });
    }
    if size_bytes < source_bytes {
        return Err(VolumeError::TooSmall {
            id: id.to_owned(),
            size_bytes,
            source_bytes,
        });
    }
    Ok(size_bytes)
}

/// A file beside the pool's own, made for a mirror or a backup: it must not be there.
pub(crate) fn create_new(id: &str, path: &Path) -> Result<File, VolumeError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(io_error(id, "creating the target file"))
}
