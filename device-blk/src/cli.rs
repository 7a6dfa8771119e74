//! The command line.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::{CommandFactory, Parser};

mod disk;

pub(crate) use disk::{DiskArg, Source};

use crate::remote::Allowed;

/// Queues a disk may have.
pub(crate) const MAX_QUEUES: u16 = 64;

const DISK_HELP: &str = "\
A disk, as KEY=VALUE parts and flags joined by commas. May be repeated.

  id=ID                 name of the disk: a-z, 0-9 and '-'
  path=IMAGE, fd=N      the image, or a descriptor that was opened for us
  nbd=ADDR/EXPORT[@G]   an export of an NBD server instead; ADDR is HOST:PORT or
                        unix:PATH, G the generation that is presented
  nbd-tls-file=PEM, nbd-tls-fd=N, nbd-tls-hostname=NAME
                        TLS for it: CA certificates, then optionally our own
                        certificate and its key
  socket=PATH, socket-fd=N
                        where VMMs connect
  format=raw|qcow2      never guessed [default: raw]
  backing=PATH[:FORMAT] what a qcow2 image is based on, nearest first, repeated;
                        without it the names in the images are followed
  key-file=PATH, key-fd=N
                        the image is encrypted with LUKS, and this is its passphrase
  readonly              refuse writes
  page-cache            do not use O_DIRECT
  queues=N              1 to 64 [default: 1]
  block-size=512|4096   what guests see [default: 512]
  serial=S              at most 20 bytes [default: the id]
  polling=adaptive|never|always
                        whether queues look for work a while before they sleep
  cpus=0-3+8            CPUs of the queues' threads, in turn [default: any]
  read-iops=N, read-bps=N, write-iops=N, write-bps=N
                        limits for a second; K, M, G and T are powers of 1024
  read-iops-burst=N ... at once after a pause [default: what a second allows]
  slow-ms=N|never       requests that take longer are logged [default: 1000]";

const EXAMPLES: &str = "\
Examples:
  One disk for any VMM that speaks vhost-user:
    device-blk --control-socket /run/blk.ctl \\
        --disk id=root,path=root.img,socket=/run/root.vu

  ... with QEMU as that VMM (guest memory must be shared):
    qemu-system-x86_64 -accel kvm -m 2G \\
        -object memory-backend-memfd,id=mem,size=2G,share=on -machine q35,memory-backend=mem \\
        -chardev socket,id=root,path=/run/root.vu,reconnect-ms=500 \\
        -device vhost-user-blk-pci,chardev=root ...

  A qcow2 image with its backing files, limited to 500 writes and 50 MiB/s:
    device-blk --control-socket /run/blk.ctl --disk id=root,path=root.qcow2,format=qcow2,\\
        socket=/run/root.vu,write-iops=500,write-bps=50M

  Two disks in one process, one of them read-only, and metrics for Prometheus:
    device-blk --control-socket /run/blk.ctl --metrics-listen 127.0.0.1:9101 \\
        --disk id=root,path=root.img,socket=/run/root.vu,queues=4 \\
        --disk id=iso,path=install.iso,socket=/run/iso.vu,readonly

  No disk yet; a manager attaches them (descriptors by --fd-socket, requests by gRPC):
    device-blk --control-socket /run/blk.ctl --fd-socket /run/blk.fds

  A disk of another host, and an image for other hosts (nbd-serve --help tells all):
    device-blk --control-socket /run/blk.ctl \\
        --disk id=a,nbd=pool:10809/a@7,nbd-tls-file=client.pem,socket=/run/a.vu
    device-blk nbd-serve --image a.img --export a --listen 0.0.0.0:10809 --tls-file server.pem \\
        --generation-file a.generation

What runs: grpcurl -plaintext -unix /run/blk.ctl mortise.device.v1.DeviceDaemon/ListDevices
What can be done to a disk meanwhile (limits, resize, snapshot, mirror, backup, ...):
    grpcurl -plaintext -unix /run/blk.ctl describe mortise.device.v1.Disks
Logs go to standard error; MORTISE_LOG sets their level (error, warn, info, debug, trace).
SIGTERM completes what is in flight and ends with status 0, or 1 if something could not be
completed. Socket files stay behind, since the running daemon cannot touch the file system; the
next start replaces them.";

/// Serves disk images as vhost-user-blk devices
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Where the gRPC control service listens
    #[arg(long, value_name = "PATH")]
    pub(crate) control_socket: PathBuf,

    /// Where descriptors for Attach requests are received; without it nothing can be attached
    /// later
    #[arg(long, value_name = "PATH")]
    pub(crate) fd_socket: Option<PathBuf>,

    /// A disk: id=ID,path=IMAGE,socket=PATH[,format=qcow2][,readonly][,queues=N]...; --help tells
    /// all
    #[arg(long = "disk", value_name = "SPEC", value_parser = disk::parse, long_help = DISK_HELP)]
    pub(crate) disks: Vec<DiskArg>,

    /// A server that remote disks (nbd) may be attached from later, HOST:PORT or unix:PATH, or
    /// `any`; may be repeated. Servers of --disk need not be named. A process of its own connects
    /// to them
    #[arg(long, value_name = "ADDRESS", value_parser = parse_remote)]
    pub(crate) remote: Vec<Remote>,

    /// Where GET /metrics is answered over HTTP
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) metrics_listen: Option<String>,

    /// Lets faults be armed over the control socket (service mortise.device.v1.Faults). For
    /// experiments: whoever reaches the socket can then spoil what guests read and write
    #[arg(long)]
    pub(crate) allow_faults: bool,

    /// How long an image that is in use is waited for; a killed process holds its images until
    /// its last request has ended
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = parse_seconds)]
    pub(crate) lock_wait: Duration,
}

/// One `--remote`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Remote {
    Any,
    Address(nbd::Address),
}

/// Reads the command line of this process; ends it when that is wrong.
pub(crate) fn parse() -> Args {
    let args = Args::parse();
    if let Err(message) = args.check() {
        let error = clap::error::ErrorKind::ValueValidation;
        Args::command().error(error, message).exit();
    }
    args
}

impl Args {
    /// Descriptors that the command line names.
    pub(crate) fn inherited_fds(&self) -> Vec<RawFd> {
        self.disks.iter().flat_map(DiskArg::inherited_fds).collect()
    }

    /// Where connections to other hosts may go; `None` when there are none to be made.
    pub(crate) fn allowed_remotes(&self) -> Result<Option<Allowed>, nbd::AddressError> {
        if self.remote.contains(&Remote::Any) {
            return Ok(Some(Allowed::Any));
        }
        let named = self.remote.iter().filter_map(|remote| match remote {
            Remote::Any => None,
            Remote::Address(address) => Some(Ok(address.clone())),
        });
        let of_disks = self.disks.iter().filter_map(|disk| {
            let source = disk.config.nbd.as_ref()?;
            Some(source.address.parse())
        });
        let addresses = named.chain(of_disks).collect::<Result<Vec<_>, _>>()?;
        Ok((!addresses.is_empty()).then_some(Allowed::Only(addresses)))
    }

    /// Looks for what two disks cannot share.
    fn check(&self) -> Result<(), String> {
        let mut fds = self.inherited_fds();
        fds.sort_unstable();
        if let Some(twice) = fds.windows(2).find(|pair| pair[0] == pair[1]) {
            let fd = twice[0];
            return Err(format!(
                "descriptor {fd} is named twice; pass one for each use"
            ));
        }
        let mut ids: Vec<_> = self.disks.iter().map(|disk| disk.id.as_str()).collect();
        ids.sort_unstable();
        match ids.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(twice) => Err(format!("two disks have the id {}", twice[0])),
            None => Ok(()),
        }
    }
}

fn parse_remote(text: &str) -> Result<Remote, nbd::AddressError> {
    match text {
        "any" => Ok(Remote::Any),
        address => address.parse().map(Remote::Address),
    }
}

pub(crate) fn parse_seconds(text: &str) -> Result<Duration, String> {
    text.parse::<f64>()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| format!("{text:?} is no number of seconds"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn what_two_disks_cannot_share_is_named() {
        let args = |disks: &[&str]| {
            let specs = disks.iter().flat_map(|disk| ["--disk", disk]);
            Args::parse_from(
                ["device-blk", "--control-socket", "c"]
                    .into_iter()
                    .chain(specs),
            )
        };
        let fine = args(&["id=a,fd=7,socket-fd=8", "id=b,path=x,socket-fd=9"]);
        assert_eq!(fine.check(), Ok(()));
        assert_eq!(fine.inherited_fds(), [7, 8, 9]);
        let twice = args(&["id=a,fd=7,socket-fd=8", "id=b,fd=8,socket=/s"]);
        assert!(twice.check().unwrap_err().contains("descriptor 8"));
        let twice = args(&["id=a,path=x,socket=/s", "id=a,path=y,socket=/t"]);
        assert!(twice.check().unwrap_err().contains("id a"));
    }
}
