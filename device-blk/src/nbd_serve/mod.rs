//! `device-blk nbd-serve`: one image for other hosts, by NBD.
//!
//! A process of its own, without gRPC and without tokio: it opens image, socket, certificates and
//! the record of generations, confines itself, serves, and ends with SIGTERM. The image is locked
//! like that of a disk. Clients are device-blk on other hosts, QEMU, nbdkit, the kernel's.

mod cli;
mod export;
mod status;

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use api::device::{BackingImage, BlkConfig};
use api::listen::{Listener, SocketFile};
use nbd::server::{Export, Fence, FileExport, Options, Server};
use nbd::{MAX_PEM_BYTES, TlsServer};
use nix::sys::signal::{SigSet, Signal};
use sandbox::Confinement;
use sandbox::seccomp::{Profile, Syscalls, sets};

use crate::assembly::{Files, assemble};
use crate::cli::Source;
use crate::daemon::{inherited, open_image, open_secret};
use crate::image::{Image, SECTOR_BYTES, chain, key};
use cli::ServeArgs;
use export::ImageExport;

/// The word that asks for all this.
pub(crate) const SUBCOMMAND: &str = "nbd-serve";

/// How long clients have to take their last answers.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Threads that wait for the disk.
const DISK_THREADS: usize = 16;

/// Reads `args`, which follow the subcommand, and serves until SIGTERM or SIGINT.
///
/// # Errors
/// Something that the command line names cannot be had, or the process cannot be confined.
pub(crate) fn run(args: impl Iterator<Item = OsString>) -> anyhow::Result<()> {
    let args = cli::parse(args);
    sandbox::close_other_fds(&args.inherited_fds())?;
    api::limits::raise_open_files();
    let termination = block_termination()?;
    let image = open(&args)?;
    let fence = args.generations.as_ref().map(open_fence).transpose()?;
    let tls = args.tls.as_ref().map(read_tls).transpose()?;
    let boot_id = boot_id()?;
    let (listener, name, _socket_file) = listen(&args)?;
    let status_file = args.status_file.as_deref().map(open_status).transpose()?;

    let achieved = Confinement::new(Profile::new("device-blk-nbd", syscalls())).enter()?;
    for missing in achieved.missing_names() {
        tracing::warn!("the sandbox lacks {missing}");
    }
    let image_name = image.name().to_owned();
    let has_fence = fence.is_some();
    let export = export_of(image)?;
    let size_bytes = export.size_bytes();
    let options = Options {
        name: args.export.clone(),
        tls,
        fence,
        max_connections: args.max_connections,
        disk_threads: DISK_THREADS,
        boot_id,
    };
    let server = Arc::new(Server::new(export, options)?);
    let accepting = Arc::clone(&server);
    let acceptor = std::thread::Builder::new()
        .name("nbd-accept".into())
        .spawn(move || {
            if let Err(error) = accepting.run(listener) {
                tracing::error!("no further clients are taken: {error}");
            }
        })?;
    tracing::info!(
        address = name,
        export = args.export,
        image = image_name,
        size_bytes,
        read_only = args.read_only,
        tls = args.tls.is_some(),
        generation = server.fence().map(|fence| fence.generation().0),
        "serving"
    );
    if let Some(file) = status_file {
        let server = Arc::downgrade(&server);
        std::thread::Builder::new()
            .name("nbd-status".into())
            .spawn(move || status::keep(&server, &file))?;
    }
    if !has_fence && !args.read_only {
        tracing::warn!(
            "whoever connects may write, two at a time as well; --generation-file keeps stale \
             owners out"
        );
    }
    termination.wait().map_err(io::Error::from)?;
    if !server.stop(DRAIN_TIMEOUT) {
        bail!("clients did not take their answers within {DRAIN_TIMEOUT:?}");
    }
    // A panic has been printed.
    let _ = acceptor.join();
    // The image is closed in order: formats give back what they had reserved.
    drop(server);
    tracing::info!("drained and stopped");
    Ok(())
}

/// Signals come to [`SigSet::wait`] alone, in whatever thread.
fn block_termination() -> anyhow::Result<SigSet> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    Ok(signals)
}

/// Threads, clients' sockets, and the files that are open.
fn syscalls() -> Syscalls {
    sets::base()
        .with(sets::open_sockets())
        .with(sets::file_io())
        .allow(&[libc::SYS_fstatfs])
}

fn open(args: &ServeArgs) -> anyhow::Result<Arc<dyn Image>> {
    let (file, name) = open_image(&args.image, args.read_only)?;
    let mut config = BlkConfig {
        read_only: args.read_only,
        format: args.format.clone(),
        // Clients' requests come in any alignment, and what they read is worth keeping.
        page_cache: true,
        ..BlkConfig::default()
    };
    let mut files = Files::default();
    if let ("qcow2", Source::Path(path)) = (args.format.as_str(), &args.image) {
        for backing in chain::follow(&file, path)? {
            config.backing.push(BackingImage {
                image_fd: None,
                format: match backing.format {
                    qcow2::Format::Raw => "raw".to_owned(),
                    qcow2::Format::Qcow2 => "qcow2".to_owned(),
                },
                name: backing.name,
            });
            files.backing.push(backing.file);
        }
    }
    files.image = Some(file);
    files.key = args.key.as_ref().map(open_secret).transpose()?;
    Ok(assemble(&config, &name, files, None, args.lock_wait)?)
}

/// Raw images are served to the byte, others in sectors.
fn export_of(image: Arc<dyn Image>) -> anyhow::Result<Arc<dyn Export>> {
    Ok(match export::plain_file(&*image)? {
        Some(file) => {
            let size_bytes = image.capacity_sectors() * SECTOR_BYTES;
            // The duplicate keeps the description, and so its locks.
            let export = FileExport::new(file, size_bytes, image.is_read_only());
            Arc::new(export)
        }
        None => Arc::new(ImageExport::new(image)),
    })
}

fn open_fence(source: &Source) -> anyhow::Result<Fence> {
    let (file, name) = match source {
        Source::Path(path) => {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .with_context(|| format!("cannot open {}", path.display()))?;
            sync_directory(path)?;
            (file, path.display().to_string())
        }
        Source::Fd(fd) => (File::from(inherited(*fd)?), format!("descriptor {fd}")),
    };
    file.try_lock().with_context(|| {
        format!("{name}: another server uses this record of generations; stop it first")
    })?;
    Fence::open(file).with_context(|| format!("{name}: no record of generations"))
}

/// Opened while files can be.
fn open_status(path: &Path) -> anyhow::Result<File> {
    File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// A file that was just made is still there after a power failure.
fn sync_directory(path: &Path) -> anyhow::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .with_context(|| format!("cannot sync {}", directory.display()))
}

fn read_tls(source: &Source) -> anyhow::Result<TlsServer> {
    let pem = key::read_bytes(open_secret(source)?, MAX_PEM_BYTES).context("--tls-file")?;
    TlsServer::from_pem(&pem).context("--tls-file")
}

/// Changes with each start of this host.
fn boot_id() -> anyhow::Result<[u8; 16]> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(PATH).with_context(|| format!("cannot read {PATH}"))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16)
        .map(u128::to_be_bytes)
        .with_context(|| format!("{PATH} has no boot id"))
}

fn listen(args: &ServeArgs) -> anyhow::Result<(OwnedFd, String, Option<SocketFile>)> {
    if let Some(fd) = args.listen_fd {
        return Ok((inherited(fd)?, format!("descriptor {fd}"), None));
    }
    let address = args.listen.as_ref().context("--listen is missing")?;
    let listener = Listener::bind(address)?;
    let name = listener.address().to_string();
    Ok(match listener {
        Listener::Unix(listener, file) => (listener.into(), name, Some(file)),
        Listener::Tcp(listener) => (listener.into(), name, None),
        Listener::Tls(_) => {
            bail!("--listen {address}: NBD has a TLS of its own; name HOST:PORT and --tls-file")
        }
    })
}
