//! What a disk of a VM is made of on this host: the images that are opened for its daemon, each
//! with a description of its own for each incarnation, and the claims that keep others off.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
};

use api::device::{BackingImage, BlkConfig, FdRef, NbdSource};
use tonic::Code;

use super::daemon::DaemonError;
use crate::{
    image::{self, Claim, Claims, ImageError},
    spec::{Disk, DiskSource, Nbd},
    volumes::{Chain, ChainLayer, Pool, VolumeError},
};

/// Why a disk cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    /// An image cannot be used.
    #[error("disk {disk}")]
    Image {
        /// Name of the disk.
        disk: String,
        /// Why not.
        #[source]
        source: ImageError,
    },
    /// The volume cannot be used.
    #[error("disk {disk}")]
    Volume {
        /// Name of the disk.
        disk: String,
        /// Why not.
        #[source]
        source: Box<VolumeError>,
    },
    /// A secret cannot be read.
    #[error("disk {disk}: cannot open {what} {path}; correct the path or its permissions", path = .path.display())]
    Secret {
        /// Name of the disk.
        disk: String,
        /// tls_file
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl DiskError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Image { source, .. } => source.code(),
            Self::Volume { source, .. } => source.code(),
            Self::Secret { .. } => Code::FailedPrecondition,
        }
    }
}

/// A disk's files, open for one incarnation of its daemon.
pub(super) enum Opened {
    /// The image that is written first.
    Images {
        /// Never empty.
        images: Vec<(ChainLayer, File)>,
        /// Yields the passphrase.
        key: Option<File>,
    },
    /// On another host.
    Nbd {
        /// Where.
        source: Nbd,
        /// Yields certificates.
        tls: Option<File>,
    },
}

/// Opens all that a disk is made of. The daemon of an earlier incarnation must be gone.
pub(super) fn open(disk: &Disk, volumes: &Pool) -> Result<Opened, DiskError> {
    let volume = |source| DiskError::Volume {
        disk: disk.name.clone(),
        source: Box::new(source),
    };
    let (chain, key) = match &disk.source {
        DiskSource::Nbd(source) => {
            let open = |path: &PathBuf| {
                File::open(path).map_err(|source| DiskError::Secret {
                    disk: disk.name.clone(),
                    what: "tls_file",
                    path: path.clone(),
                    source,
                })
            };
            return Ok(Opened::Nbd {
                tls: source.tls_file.as_ref().map(open).transpose()?,
                source: source.clone(),
            });
        }
        DiskSource::Path(path) => (path_chain(disk, path), None),
        DiskSource::Volume(id) => {
            let chain = volumes.chain(id, true).map_err(volume)?;
            let key = if chain.encrypted {
                let found = volumes.keys().reader(id).map_err(|source| {
                    volume(crate::volumes::io_error(id, "reading its key")(source))
                })?;
                Some(found.ok_or_else(|| volume(VolumeError::NoKey { id: id.clone() }))?)
            } else {
                None
            };
            (chain, key)
        }
    };
    let images: Result<Vec<(ChainLayer, File)>, ImageError> = chain
        .layers
        .into_iter()
        .enumerate()
        .map(|(index, layer)| {
            let read_only = disk.read_only || index > 0;
            let file = image::open(&layer.path, read_only, layer.format)?;
            Ok((layer, file))
        })
        .collect();
    let images = images.map_err(|source| DiskError::Image {
        disk: disk.name.clone(),
        source,
    })?;
    Ok(Opened::Images { images, key })
}

impl Opened {
    /// Hands everything over by `send`, and answers with the request that names it.
    pub(super) fn into_config(
        self,
        disk: &Disk,
        send: impl Fn(BorrowedFd<'_>) -> Result<FdRef, DaemonError>,
    ) -> Result<BlkConfig, DaemonError> {
        let mut config = BlkConfig {
            read_only: disk.read_only,
            serial: disk.serial.clone(),
            num_queues: disk.num_queues,
            page_cache: disk.page_cache,
            limits: Some(disk.tuning.limits()),
            block_size: disk.block_size,
            polling: disk.tuning.polling() as i32,
            cpus: disk.cpus.clone(),
            slow_request_ms: disk.slow_request_ms,
            ..BlkConfig::default()
        };
        match self {
            Self::Images { images, key } => {
                for (index, (layer, file)) in images.iter().enumerate() {
                    let fd = Some(send(file.as_fd())?);
                    let (name, format) = (layer.path.display().to_string(), layer.format.name());
                    if index == 0 {
                        config.image_fd = fd;
                        config.image_name = name;
                        config.format = format.to_owned();
                    } else {
                        config.backing.push(BackingImage {
                            image_fd: fd,
                            format: format.to_owned(),
                            name,
                        });
                    }
                }
                config.key_fd = key.map(|key| send(key.as_fd())).transpose()?;
            }
            Self::Nbd { source, tls } => {
                config.image_name = format!("nbd:{}/{}", source.address, source.export);
                config.nbd = Some(NbdSource {
                    address: source.address,
                    export: source.export,
                    generation: source.generation,
                    tls_fd: tls.map(|tls| send(tls.as_fd())).transpose()?,
                    tls_hostname: source.tls_hostname,
                });
            }
        }
        Ok(config)
    }
}

/// Claims a disk's images for a VM, and checks that nobody else on the host has them. Blocks while
/// other processes' locks are waited for.
pub(super) fn claim(
    disk: &Disk,
    volumes: &Pool,
    claims: &Claims,
    vm: &str,
) -> Result<Vec<Claim>, DiskError> {
    let chain = match &disk.source {
        DiskSource::Nbd(_) => return Ok(Vec::new()),
        DiskSource::Path(path) => path_chain(disk, path),
        DiskSource::Volume(id) => {
            let check = || {
                volumes.admit(id, disk.generation)?;
                if !disk.read_only {
                    volumes.refuse_frozen(id)?;
                }
                let chain = volumes.chain(id, true)?;
                if chain.encrypted && !volumes.keys().has(id) {
                    return Err(VolumeError::NoKey { id: id.clone() });
                }
                Ok(chain)
            };
            check().map_err(|source| DiskError::Volume {
                disk: disk.name.clone(),
                source: Box::new(source),
            })?
        }
    };
    claim_chain(disk, &chain, claims, vm, true)
}

/// Claims the images of a disk that is in use already; what cannot be had is worth a warning.
pub(super) fn claim_adopted(disk: &Disk, volumes: &Pool, claims: &Claims, vm: &str) -> Vec<Claim> {
    let chain = match &disk.source {
        DiskSource::Nbd(_) => return Vec::new(),
        DiskSource::Path(path) => Ok(path_chain(disk, path)),
        DiskSource::Volume(id) => volumes
            .chain(id, false)
            .map_err(|source| DiskError::Volume {
                disk: disk.name.clone(),
                source: Box::new(source),
            }),
    };
    chain
        .and_then(|chain| claim_chain(disk, &chain, claims, vm, false))
        .inspect_err(|error| {
            tracing::warn!(vm, "adopting a disk: {}", super::error_chain(error));
        })
        .unwrap_or_default()
}

fn claim_chain(
    disk: &Disk,
    chain: &Chain,
    claims: &Claims,
    vm: &str,
    probe: bool,
) -> Result<Vec<Claim>, DiskError> {
    let holder = format!("VM {vm}");
    let mut held = Vec::new();
    for (index, layer) in chain.layers.iter().enumerate() {
        let read_only = disk.read_only || index > 0;
        let claim = || {
            let file = image::open(&layer.path, read_only || !probe, layer.format)?;
            // A guest may write what it likes into a volume of its own; a path was named by people.
            let by_path = matches!(disk.source, DiskSource::Path(_));
            if by_path && layer.format == crate::spec::Format::Raw {
                image::refuse_qcow2(&layer.path, &file)?;
            }
            let claim = claims.claim(&layer.path, &file, &holder, read_only)?;
            if probe {
                image::probe_locks(&layer.path, &file, read_only)?;
            }
            Ok(claim)
        };
        held.push(claim().map_err(|source| DiskError::Image {
            disk: disk.name.clone(),
            source,
        })?);
    }
    Ok(held)
}

fn path_chain(disk: &Disk, path: &std::path::Path) -> Chain {
    Chain {
        layers: vec![ChainLayer {
            path: path.to_owned(),
            format: disk.format,
        }],
        encrypted: false,
    }
}
