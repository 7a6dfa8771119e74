//! The process: opens what the command line names, confines itself, serves.
//!
//! The order matters. Images and sockets are opened first, because nothing can be opened
//! afterwards; then the process is confined, while it has a single thread; only then do
//! threads start and guests get in touch.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow};
use api::daemon::{DeviceTable, Parts, ServedDevice};
use api::device::attach_request::{Device as DeviceConfig, Listener as ListenerConfig};
use api::device::{AttachRequest, BlkConfig, BlkStats, Device, FdRef};
use api::fds::Inbox;
use api::listen::{self, SocketFile};
use api::serve::Services;
use tonic::Status;
use vhost_user::backend::Server;

use crate::cli::{Args, DiskArg, MAX_QUEUES, Source};
use crate::confinement;
use crate::device::{BlkDevice, serial_id};
use crate::engine::backend::ServeOptions;
use crate::engine::uring::Uring;
use crate::image::{Image, ImageError, OpenOptions, RawImage, SECTOR_BYTES, raw};
use crate::request::OpKind;

/// How long a detach or shutdown waits for requests in flight.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// Something that the command line names cannot be had, or the process cannot be confined.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    sandbox::close_other_fds(&args.inherited_fds())?;
    api::limits::raise_open_files();
    // A host without io_uring is told about here, not by a guest's disk that never answers.
    drop(Uring::new(1)?);
    let control = listen::unix(&args.control_socket)?;
    let fd_socket = args
        .fd_socket
        .as_deref()
        .map(listen::unix_socket)
        .transpose()?;
    let metrics = args
        .metrics_listen
        .as_deref()
        .map(listen::tcp)
        .transpose()?;
    let opened = args
        .disks
        .iter()
        .map(|disk| open(disk, args.lock_wait).with_context(|| format!("disk {}", disk.id)))
        .collect::<anyhow::Result<Vec<_>>>()?;

    let achieved = confinement::enter()?;
    // Guests are served before the control socket is: a SIGTERM must drain them, not kill.
    api::serve::hold_termination();
    for missing in achieved.missing_names() {
        tracing::warn!("the sandbox lacks {missing}");
    }

    let inbox = fd_socket
        .map(|(listener, file)| Inbox::on(listener, file))
        .transpose()?;
    let lock_wait = args.lock_wait;
    let opened_images = Arc::new(Mutex::new(BTreeMap::new()));
    let images = Arc::clone(&opened_images);
    let table = DeviceTable::new("device-blk", achieved.into_names(), inbox, move |parts| {
        let opened = lock(&images).remove(&parts.request.id);
        Disk::attach(parts, opened, lock_wait)
    });
    let mut socket_files = Vec::new();
    for Opened {
        parts,
        image,
        socket_file,
    } in opened
    {
        lock(&opened_images).insert(parts.request.id.clone(), image);
        table
            .attach(parts)
            .map_err(|status| anyhow!("{}", status.message()))?;
        socket_files.extend(socket_file);
    }
    tracing::info!(
        control_socket = %args.control_socket.display(),
        disks = args.disks.len(),
        "serving"
    );
    api::daemon::run(&table, Services::new(), control, metrics)?;
    tracing::info!("drained and stopped");
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A disk of the command line, before the process is confined.
struct Opened {
    /// All but the image.
    parts: Parts,
    /// Opened, checked and locked here already: a failure must be able to remove sockets.
    image: RawImage,
    socket_file: Option<SocketFile>,
}

fn open(disk: &DiskArg, lock_wait: Duration) -> anyhow::Result<Opened> {
    let (file, image_name) = match &disk.image {
        Source::Path(path) => (
            raw::open_file(path, disk.read_only)?,
            path.display().to_string(),
        ),
        Source::Fd(fd) => (File::from(inherited(*fd)?), format!("fd {fd}")),
    };
    let options = OpenOptions {
        read_only: disk.read_only,
        page_cache: disk.page_cache,
        block_bytes: SECTOR_BYTES as u32,
        lock_patience: lock_wait,
    };
    let image = RawImage::from_file(file, image_name.clone(), options)?;
    let (listener, socket_file) = match &disk.socket {
        Source::Path(path) => {
            let (listener, file) = listen::unix_socket(path)?;
            (listener, Some(file))
        }
        Source::Fd(fd) => (
            vhost_user::backend::listener_from_fd(inherited(*fd)?)?,
            None,
        ),
    };
    let request = AttachRequest {
        id: disk.id.clone(),
        listener: Some(match &disk.socket {
            Source::Path(path) => ListenerConfig::SocketPath(path.display().to_string()),
            Source::Fd(_) => ListenerConfig::SocketFd(FdRef::default()),
        }),
        device: Some(DeviceConfig::Blk(BlkConfig {
            image_fd: None,
            read_only: disk.read_only,
            serial: disk.serial.clone(),
            num_queues: u32::from(disk.num_queues),
            image_name,
            page_cache: disk.page_cache,
            ..BlkConfig::default()
        })),
    };
    let parts = Parts {
        request,
        listener,
        fds: Vec::new(),
    };
    Ok(Opened {
        parts,
        image,
        socket_file,
    })
}

/// Takes over a descriptor that the command line names.
fn inherited(fd: i32) -> anyhow::Result<OwnedFd> {
    // SAFETY: F_SETFD takes an integer and touches no memory.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(std::io::Error::last_os_error())
            .with_context(|| format!("descriptor {fd} was not passed to this process"));
    }
    // SAFETY: it is open, as was just seen, and the command line gives it to us; `Args` has
    // each descriptor used once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// An attached disk.
struct Disk {
    device: Arc<BlkDevice>,
    serving: Mutex<Serving>,
}

enum Serving {
    Running(Server),
    /// What its server said last.
    Stopped(vhost_user::backend::Status),
}

impl Disk {
    /// Serves `opened`, or else the image among `parts`.
    fn attach(
        parts: Parts,
        opened: Option<RawImage>,
        lock_wait: Duration,
    ) -> Result<Arc<dyn ServedDevice>, Status> {
        let Parts {
            request,
            listener,
            fds,
        } = parts;
        let Some(DeviceConfig::Blk(config)) = request.device else {
            return Err(Status::invalid_argument(
                "blk: missing; this daemon serves disks alone",
            ));
        };
        let num_queues = match u16::try_from(config.num_queues) {
            Ok(0) => 1,
            Ok(queues) if queues <= MAX_QUEUES => queues,
            _ => {
                return Err(Status::invalid_argument(format!(
                    "blk.num_queues: 1 to {MAX_QUEUES} are possible"
                )));
            }
        };
        let name = if config.image_name.is_empty() {
            &request.id
        } else {
            &config.image_name
        };
        let serial = if config.serial.is_empty() {
            &request.id
        } else {
            &config.serial
        };
        let image = match opened {
            Some(image) => image,
            None => {
                let Some(image) = fds.into_iter().next() else {
                    return Err(Status::invalid_argument("blk.image_fd: missing"));
                };
                let options = OpenOptions {
                    read_only: config.read_only,
                    page_cache: config.page_cache,
                    block_bytes: SECTOR_BYTES as u32,
                    lock_patience: lock_wait,
                };
                RawImage::from_file(File::from(image), name.clone(), options)
                    .map_err(|error| refusal(&error))?
            }
        };
        tracing::info!(
            disk = request.id,
            image = name,
            capacity_bytes = image.capacity_sectors() * SECTOR_BYTES,
            read_only = image.is_read_only(),
            direct_io = image.direct().is_some(),
            discard = image.punches_holes(),
            "attached"
        );
        let options = ServeOptions {
            serial: serial_id(serial),
            ..ServeOptions::default()
        };
        let device = Arc::new(BlkDevice::new(Arc::new(image), num_queues, options));
        let server = Server::spawn(&request.id, listener, device.clone())
            .map_err(|error| Status::resource_exhausted(format!("cannot serve: {error}")))?;
        Ok(Arc::new(Self {
            device,
            serving: Mutex::new(Serving::Running(server)),
        }))
    }
}

/// How an image's fault is told over gRPC.
fn refusal(error: &ImageError) -> Status {
    let message = match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    match error {
        ImageError::Missing { .. } => Status::not_found(message),
        ImageError::WrongKind { .. }
        | ImageError::TooSmall { .. }
        | ImageError::NotWritable { .. }
        | ImageError::NotReadable { .. } => Status::invalid_argument(message),
        ImageError::InUse { .. } | ImageError::NoLocks { .. } => {
            Status::failed_precondition(message)
        }
        ImageError::Io { .. } => Status::internal(message),
    }
}

impl ServedDevice for Disk {
    fn describe(&self) -> Device {
        let status = match &*lock(&self.serving) {
            Serving::Running(server) => server.status(),
            Serving::Stopped(status) => status.clone(),
        };
        let stats = self.device.stats();
        let image = self.device.image();
        let (read, write) = (stats.op(OpKind::Read), stats.op(OpKind::Write));
        Device {
            id: String::new(),
            r#type: "blk".to_owned(),
            connected: status.connected,
            sessions: status.sessions,
            queues_running: status.queues_running,
            inflight: stats.inflight,
            last_session_end: status.last_session_end.unwrap_or_default(),
            blk: Some(BlkStats {
                read_requests: read.requests,
                read_bytes: read.bytes,
                write_requests: write.requests,
                write_bytes: write.bytes,
                flush_requests: stats.op(OpKind::Flush).requests,
                discard_requests: stats.op(OpKind::Discard).requests,
                write_zeroes_requests: stats.op(OpKind::WriteZeroes).requests,
                errors: stats.errors(),
                capacity_bytes: image.capacity_sectors() * SECTOR_BYTES,
                direct_io: image.direct().is_some(),
                ..BlkStats::default()
            }),
            net: None,
        }
    }

    fn stop(&self) -> Result<(), Status> {
        let mut serving = lock(&self.serving);
        let Serving::Running(server) = &*serving else {
            return Ok(());
        };
        let last = vhost_user::backend::Status {
            connected: false,
            queues_running: 0,
            ..server.status()
        };
        let running = std::mem::replace(&mut *serving, Serving::Stopped(last));
        drop(serving);
        let Serving::Running(server) = running else {
            unreachable!("it was running a moment ago");
        };
        server
            .stop(DRAIN_TIMEOUT)
            .map_err(|error| Status::deadline_exceeded(error.to_string()))
    }
}
