//! The command line.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::{CommandFactory, Parser};

use crate::request::ID_BYTES;

/// Queues a disk may have.
pub(crate) const MAX_QUEUES: u16 = 64;

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

  Two disks in one process, one of them read-only, and metrics for Prometheus:
    device-blk --control-socket /run/blk.ctl --metrics-listen 127.0.0.1:9101 \\
        --disk id=root,path=root.img,socket=/run/root.vu,queues=4 \\
        --disk id=iso,path=install.iso,socket=/run/iso.vu,readonly

  No disk yet; a manager attaches them (descriptors by --fd-socket, requests by gRPC):
    device-blk --control-socket /run/blk.ctl --fd-socket /run/blk.fds

What runs: grpcurl -plaintext -unix /run/blk.ctl mortise.device.v1.DeviceDaemon/ListDevices
Logs go to standard error; MORTISE_LOG sets their level (error, warn, info, debug, trace).
SIGTERM completes what is in flight and ends with status 0. Socket files stay behind, since the
running daemon cannot touch the file system; the next start replaces them.";

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

    /// A disk: id=ID,path=IMAGE,socket=PATH[,readonly][,queues=N][,serial=S][,page-cache].
    /// Inherited descriptors: fd=N in place of path, socket-fd=N in place of socket. May be
    /// repeated
    #[arg(long = "disk", value_name = "SPEC", value_parser = parse_disk)]
    pub(crate) disks: Vec<DiskArg>,

    /// Where GET /metrics is answered over HTTP
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) metrics_listen: Option<String>,

    /// How long an image that is in use is waited for; a killed process holds its images until
    /// its last request has ended
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = parse_seconds)]
    pub(crate) lock_wait: Duration,
}

/// One `--disk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskArg {
    pub(crate) id: String,
    pub(crate) image: Source,
    pub(crate) socket: Source,
    pub(crate) read_only: bool,
    pub(crate) page_cache: bool,
    pub(crate) num_queues: u16,
    /// Empty for the id.
    pub(crate) serial: String,
}

/// Something to open, or opened by whoever started this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Path(PathBuf),
    Fd(RawFd),
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
        let sources = self
            .disks
            .iter()
            .flat_map(|disk| [&disk.image, &disk.socket]);
        sources
            .filter_map(|source| match source {
                Source::Fd(fd) => Some(*fd),
                Source::Path(_) => None,
            })
            .collect()
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

fn parse_seconds(text: &str) -> Result<Duration, String> {
    text.parse::<f64>()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| format!("{text:?} is no number of seconds"))
}

/// Reads `key=value` parts separated by commas.
fn parse_disk(spec: &str) -> Result<DiskArg, String> {
    let (mut id, mut image, mut socket) = (None, None, None);
    let (mut read_only, mut page_cache) = (false, false);
    let (mut num_queues, mut serial) = (1, String::new());
    for part in spec.split(',') {
        match part.split_once('=') {
            Some(("id", value)) => set_once(&mut id, "id", value.to_owned())?,
            Some(("path", value)) => {
                set_once(&mut image, "path or fd", Source::Path(value.into()))?
            }
            Some(("fd", value)) => {
                set_once(&mut image, "path or fd", Source::Fd(parse_fd("fd", value)?))?;
            }
            Some(("socket", value)) => {
                set_once(
                    &mut socket,
                    "socket or socket-fd",
                    Source::Path(value.into()),
                )?;
            }
            Some(("socket-fd", value)) => {
                let fd = Source::Fd(parse_fd("socket-fd", value)?);
                set_once(&mut socket, "socket or socket-fd", fd)?;
            }
            Some(("queues", value)) => num_queues = parse_queues(value)?,
            Some(("serial", value)) => serial = parse_serial(value)?,
            None if part == "readonly" => read_only = true,
            None if part == "page-cache" => page_cache = true,
            _ => {
                return Err(format!(
                    "{part:?} is not understood; known are id=, path=, fd=, socket=, socket-fd=, \
                     queues=, serial=, readonly, page-cache (a path with a comma can be passed \
                     as a descriptor)"
                ));
            }
        }
    }
    let id = id.ok_or("id= is missing")?;
    if !is_id(&id) {
        return Err(format!(
            "id {id:?} must start with a letter and consist of at most 63 of a-z, 0-9 and '-'"
        ));
    }
    let image = image.ok_or("path= (or fd=) is missing")?;
    let socket = socket.ok_or("socket= (or socket-fd=) is missing")?;
    Ok(DiskArg {
        id,
        image,
        socket,
        read_only,
        page_cache,
        num_queues,
        serial,
    })
}

fn set_once<T>(place: &mut Option<T>, name: &str, value: T) -> Result<(), String> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("{name} is given twice")),
    }
}

fn parse_fd(key: &str, value: &str) -> Result<RawFd, String> {
    match value.parse() {
        Ok(fd) if fd > 2 => Ok(fd),
        _ => Err(format!(
            "{key}={value}: an open descriptor above 2 is wanted"
        )),
    }
}

fn parse_queues(value: &str) -> Result<u16, String> {
    match value.parse() {
        Ok(queues) if (1..=MAX_QUEUES).contains(&queues) => Ok(queues),
        _ => Err(format!("queues={value}: 1 to {MAX_QUEUES} are possible")),
    }
}

fn parse_serial(value: &str) -> Result<String, String> {
    let printable = value.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    if value.len() > ID_BYTES || !printable {
        return Err(format!(
            "serial={value}: at most {ID_BYTES} printable ASCII characters fit"
        ));
    }
    Ok(value.to_owned())
}

fn is_id(id: &str) -> bool {
    let is_rest = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    id.len() <= 63
        && id.as_bytes().first().is_some_and(u8::is_ascii_lowercase)
        && id.bytes().all(is_rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn short_disk_gets_defaults() {
        let disk = parse_disk("id=root,path=/x/root.img,socket=/run/s").unwrap();
        assert_eq!(
            disk,
            DiskArg {
                id: "root".into(),
                image: Source::Path("/x/root.img".into()),
                socket: Source::Path("/run/s".into()),
                read_only: false,
                page_cache: false,
                num_queues: 1,
                serial: String::new(),
            }
        );
    }

    #[test]
    fn full_disk_is_read() {
        let disk =
            parse_disk("id=a,fd=7,socket-fd=8,readonly,page-cache,queues=4,serial=S 1").unwrap();
        assert_eq!((disk.image, disk.socket), (Source::Fd(7), Source::Fd(8)));
        assert!(disk.read_only && disk.page_cache);
        assert_eq!((disk.num_queues, disk.serial.as_str()), (4, "S 1"));
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

    #[test]
    fn mistakes_are_named() {
        for (spec, named) in [
            ("path=/x,socket=/s", "id="),
            ("id=a,socket=/s", "path="),
            ("id=a,path=/x", "socket="),
            ("id=A,path=/x,socket=/s", "a-z"),
            ("id=a,path=/x,fd=5,socket=/s", "twice"),
            ("id=a,path=/x,socket=/s,queues=65", "64"),
            ("id=a,path=/x,socket=/s,queues=0", "64"),
            ("id=a,path=/x,socket=/s,ro", "\"ro\""),
            ("id=a,fd=1,socket=/s", "above 2"),
            ("id=a,path=/x,socket=/s,serial=123456789012345678901", "20"),
        ] {
            let error = parse_disk(spec).unwrap_err();
            assert!(error.contains(named), "{spec}: {error}");
        }
    }
}
