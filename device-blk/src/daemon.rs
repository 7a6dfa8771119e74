//! The process: opens what the command line names, confines itself, serves.
//!
//! The order matters. Images and sockets are opened first, because nothing can be opened
//! afterwards; then the process is confined, while it has a single thread; only then do
//! threads start and guests get in touch.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow};
use api::daemon::{DeviceTable, Parts};
use api::device::attach_request::{Device as DeviceConfig, Listener as ListenerConfig};
use api::device::disks_server::DisksServer;
use api::device::leases_server::LeasesServer;
use api::device::{AttachRequest, BackingImage, FdRef};
use api::fds::Inbox;
use api::listen::{self, SocketFile, Sweeper};
use api::serve::Services;
use faults::{Faults, Kind};

use crate::assembly::{Files, assemble};
use crate::cli::{Args, DiskArg, Source};
use crate::confinement;
use crate::disk::Disk;
use crate::disks::DiskService;
use crate::engine::ring_maker;
use crate::engine::uring::Uring;
use crate::image::lock::Attachment;
use crate::image::{Image, chain, raw};
use crate::leases::LeaseService;
use crate::remote;

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// Something that the command line names cannot be had, or the process cannot be confined.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    sandbox::close_other_fds(&args.inherited_fds())?;
    if let Some(allowed) = args.allowed_remotes()? {
        remote::start_connector(allowed).context("cannot start the connector")?;
    }
    api::limits::raise_open_files();
    api::limits::raise_locked_memory();
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
    // Last, for servers do not wait long: opening may wait for locks.
    for disk in &args.disks {
        if let Some(source) = &disk.config.nbd {
            remote::connect_ahead(source, &disk.id).with_context(|| format!("disk {}", disk.id))?;
        }
    }

    let socket_files = opened.iter().filter_map(|disk| disk.socket_file.as_ref());
    let socket_files = socket_files
        .chain(control.socket_file())
        .chain(fd_socket.as_ref().map(|(_, file)| file));
    let sweeper = Sweeper::start(socket_files).context("cannot prepare for a failure")?;
    let achieved = confinement::enter()?;
    // Guests are served before the control socket is: a SIGTERM must drain them, not kill.
    api::serve::hold_termination();
    ring_maker::start()?;
    confinement::forbid_new_rings()?;
    for missing in achieved.missing_names() {
        tracing::warn!("the sandbox lacks {missing}");
    }

    let inbox = fd_socket
        .map(|(listener, file)| Inbox::on(listener, file))
        .transpose()?;
    let lock_wait = args.lock_wait;
    let opened_images = Arc::new(Mutex::new(BTreeMap::new()));
    let images = Arc::clone(&opened_images);
    let faults = args
        .allow_faults
        .then(|| Faults::start(Kind::Block))
        .transpose()?;
    let faults_of_disks = faults.clone();
    let table = DeviceTable::new("device-blk", achieved.into_names(), inbox, move |parts| {
        let opened = lock(&images).remove(&parts.request.id);
        Disk::attach(parts, opened, lock_wait, faults_of_disks.as_ref())
    });
    let mut socket_files = Vec::new();
    for Opened {
        parts,
        image,
        socket_file,
    } in opened
    {
        if let Some(image) = image {
            lock(&opened_images).insert(parts.request.id.clone(), image);
        }
        table
            .attach(parts)
            .map_err(|status| anyhow!("{}", status.message()))?;
        socket_files.extend(socket_file);
    }
    sweeper.dismiss();
    tracing::info!(
        control_socket = %args.control_socket.display(),
        disks = args.disks.len(),
        "serving"
    );
    let disks = DisksServer::new(DiskService::new(table.clone(), lock_wait));
    let services = Services::new()
        .with(disks)
        .with(LeasesServer::new(LeaseService(table.clone())))
        .with(api::fault_control::service(faults));
    api::daemon::run(&table, services, control, metrics)?;
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
    /// Opened, checked and locked here already: a failure must be able to remove sockets. None
    /// when it is on another host: what talks to that is confined, and starts threads; here it is
    /// only connected to.
    image: Option<(Arc<dyn Image>, Attachment)>,
    socket_file: Option<SocketFile>,
}

fn open(disk: &DiskArg, lock_wait: Duration) -> anyhow::Result<Opened> {
    let mut config = disk.config.clone();
    let mut files = Files::default();
    if let Some(source) = &disk.image {
        let (file, name) = open_image(source, config.read_only)?;
        files.image = Some(file);
        config.image_name = name;
    }
    if let (Some(Source::Path(path)), Some(file), None, "qcow2") = (
        &disk.image,
        &files.image,
        &disk.backing,
        config.format.as_str(),
    ) {
        for image in chain::follow(file, path)? {
            files.backing.push(image.file);
            config.backing.push(BackingImage {
                image_fd: None,
                format: match image.format {
                    qcow2::Format::Raw => "raw".to_owned(),
                    qcow2::Format::Qcow2 => "qcow2".to_owned(),
                },
                name: image.name,
            });
        }
    }
    for backing in disk.backing.iter().flatten() {
        files.backing.push(raw::open_file(&backing.path, true)?);
        config.backing.push(BackingImage {
            image_fd: None,
            format: backing.format.clone(),
            name: backing.path.display().to_string(),
        });
    }
    files.key = disk.key.as_ref().map(open_secret).transpose()?;
    files.nbd_tls = disk.nbd_tls.as_ref().map(open_secret).transpose()?;
    let mut fds = Vec::new();
    let image = match &mut config.nbd {
        None => {
            let attachment = attachment_of(&disk.socket)?;
            let name = &config.image_name;
            let image = assemble(&config, name, files, Some(attachment), lock_wait)?;
            Some((image, attachment))
        }
        Some(source) => {
            source.tls_fd = files.nbd_tls.as_ref().map(|_| FdRef::default());
            fds.extend(files.nbd_tls);
            None
        }
    };
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
        device: Some(DeviceConfig::Blk(config)),
    };
    let parts = Parts {
        request,
        listener,
        fds,
    };
    Ok(Opened {
        parts,
        image,
        socket_file,
    })
}

/// The disk as frontends know it: by its socket.
fn attachment_of(socket: &Source) -> anyhow::Result<Attachment> {
    match socket {
        Source::Path(path) => {
            let absolute = std::path::absolute(path)
                .with_context(|| format!("{} is no name of a socket", path.display()))?;
            Ok(Attachment::at(absolute.as_os_str().as_bytes()))
        }
        Source::Fd(fd) => {
            let address = nix::sys::socket::getsockname::<nix::sys::socket::UnixAddr>(*fd);
            let address = address.with_context(|| format!("descriptor {fd} is no socket"))?;
            let path = address.path().map(|path| path.as_os_str().as_bytes());
            Ok(Attachment::at(path.unwrap_or_default()))
        }
    }
}

/// An image with its name for logs.
pub(crate) fn open_image(source: &Source, read_only: bool) -> anyhow::Result<(File, String)> {
    Ok(match source {
        Source::Path(path) => (raw::open_file(path, read_only)?, path.display().to_string()),
        Source::Fd(fd) => (File::from(inherited(*fd)?), format!("fd {fd}")),
    })
}

/// A file with a key or certificates.
pub(crate) fn open_secret(source: &Source) -> anyhow::Result<OwnedFd> {
    match source {
        Source::Path(path) => {
            let file =
                File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            Ok(file.into())
        }
        Source::Fd(fd) => inherited(*fd),
    }
}

/// Takes over a descriptor that the command line names.
pub(crate) fn inherited(fd: i32) -> anyhow::Result<OwnedFd> {
    // SAFETY: F_SETFD takes an integer and touches no memory.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(std::io::Error::last_os_error())
            .with_context(|| format!("descriptor {fd} was not passed to this process"));
    }
    // SAFETY: it is open, as was just seen, and the command line gives it to us; `Args` has
    // each descriptor used once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
