//! How each daemon is started to serve a disk.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::super::ground::{Ground, Medium};
use super::super::process::Daemon;

/// One of our disks.
pub(super) struct Disk<'a> {
    pub(super) id: String,
    pub(super) image: &'a Path,
    /// Further keys of `--disk`.
    pub(super) options: &'a str,
}

impl<'a> Disk<'a> {
    pub(super) fn new(id: &str, image: &'a Path, options: &'a str) -> Self {
        Self {
            id: id.to_owned(),
            image,
            options,
        }
    }
}

/// One process of ours that serves disks.
pub(super) fn device_blk(ground: &Ground, name: &str, disks: &[Disk]) -> Result<Daemon> {
    let dir = ground.run_dir();
    let mut command = Command::new(ground.program("device-blk")?);
    command
        .arg("--control-socket")
        .arg(dir.join(format!("{name}.ctl")));
    let mut sockets = Vec::new();
    for disk in disks {
        let socket = fresh_socket(dir, &format!("{name}-{}", disk.id));
        let mut spec = format!(
            "id={},path={},socket={}",
            disk.id,
            disk.image.display(),
            socket.display()
        );
        if !disk.options.is_empty() {
            spec = format!("{spec},{}", disk.options);
        }
        command.args(["--disk", &spec]);
        sockets.push(socket);
    }
    Daemon::start(name, &mut command, sockets, dir)
}

/// Set up as it does best here: with an I/O thread, past the page cache, and without the locks
/// that would keep the others from the file. On a disk io_uring serves it best, in memory Linux
/// AIO, since tmpfs answers that at once.
pub(super) fn storage_daemon(ground: &Ground, image: &Path, medium: Medium) -> Result<Daemon> {
    let name = super::STORAGE_DAEMON;
    let dir = ground.run_dir();
    let socket = fresh_socket(dir, name);
    let how = match medium {
        Medium::FileDirect => "cache.direct=on,aio=io_uring",
        Medium::Tmpfs if ground.allows_direct(medium) => "cache.direct=on,aio=native",
        Medium::Tmpfs => "cache.direct=off,aio=threads",
    };
    let mut command = ground.storage_daemon().command();
    command
        .args(["--object", "iothread,id=thread"])
        .arg("--blockdev")
        .arg(format!(
            "file,node-name=file,filename={},{how},locking=off",
            image.display()
        ))
        .arg("--export")
        .arg(format!(
            "vhost-user-blk,id=disk,node-name=file,addr.type=unix,addr.path={},writable=on,\
             iothread=thread",
            socket.display()
        ));
    Daemon::start(name, &mut command, vec![socket], dir)
}

/// A path at which nothing is yet.
fn fresh_socket(dir: &Path, name: &str) -> PathBuf {
    let socket = dir.join(format!("{name}.vu"));
    // Of a daemon before; only its absence tells when the next one listens.
    let _ = std::fs::remove_file(&socket);
    socket
}
