//! The command line of `device-blk nbd-serve`.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use api::listen::Address;
use clap::{ArgGroup, CommandFactory, Parser};

use crate::cli::{Source, parse_seconds};

const EXAMPLES: &str = "\
Examples:
  An image for device-blk on other hosts, with TLS and without stale writers:
    device-blk nbd-serve --image vm1.img --export vm1 --listen 0.0.0.0:10809 \\
        --tls-file server.pem --generation-file vm1.generation
  ... where it is used:
    device-blk --control-socket /run/blk.ctl \\
        --disk id=vm1,nbd=pool.example.org:10809/vm1@7,nbd-tls-file=client.pem,socket=/run/vm1.vu

  For programs of this host:
    device-blk nbd-serve --image base.qcow2 --format qcow2 --export base --read-only \\
        --listen unix:/run/base.nbd
    qemu-img info 'nbd+unix:///base?socket=/run/base.nbd'

With --generation-file a client must present the generation of its ownership: device-blk by
EXPORT@GENERATION, others by an export of that name. The highest that has been here is kept in the
file; lower ones are refused, and when a higher one comes, writes of those before it fail with
EPERM from then on, after those under way have been completed.
Logs go to standard error; MORTISE_LOG sets their level (error, warn, info, debug, trace).
SIGTERM completes what is under way and ends with status 0.";

/// Serves one image to other hosts by NBD
#[derive(Debug, Parser)]
#[command(
    name = "device-blk nbd-serve",
    version,
    after_help = EXAMPLES,
    group = ArgGroup::new("images").required(true).args(["image_path", "image_fd"]),
    group = ArgGroup::new("listeners").required(true).args(["listen", "listen_fd"]),
    group = ArgGroup::new("fenced").args(["generation_file", "generation_fd"]),
)]
struct RawArgs {
    /// The image
    #[arg(long = "image", value_name = "PATH")]
    image_path: Option<PathBuf>,
    /// The image, opened for us
    #[arg(long, value_name = "N")]
    image_fd: Option<RawFd>,
    /// raw or qcow2; never guessed. A qcow2 image's backing files are found by their names in it
    #[arg(long, default_value = "raw", value_parser = ["raw", "qcow2"])]
    format: String,
    /// The image is encrypted with LUKS, and this file has its passphrase
    #[arg(long, value_name = "PATH")]
    key_file: Option<PathBuf>,
    /// Name of the export
    #[arg(long, value_name = "NAME", value_parser = parse_export)]
    export: String,
    /// HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<Address>,
    /// A socket that listens
    #[arg(long, value_name = "N")]
    listen_fd: Option<RawFd>,
    /// Demands TLS: PEM with the CA whose clients are let in (none: all are), then our certificate
    /// and its key
    #[arg(long, value_name = "PEM", conflicts_with = "tls_fd")]
    tls_file: Option<PathBuf>,
    /// The same, opened for us
    #[arg(long, value_name = "N")]
    tls_fd: Option<RawFd>,
    /// Lets the latest owner alone write, and remembers who that is in this file, which is made if
    /// need be. Keep it beside the image
    #[arg(long, value_name = "PATH", conflicts_with = "generation_fd")]
    generation_file: Option<PathBuf>,
    /// The same, opened for us
    #[arg(long, value_name = "N")]
    generation_fd: Option<RawFd>,
    /// Keeps in this file, as JSON, the generation and how many clients and writes of earlier owners
    /// were refused
    #[arg(long, value_name = "PATH", requires = "fenced")]
    status_file: Option<PathBuf>,
    /// Refuses writes
    #[arg(long)]
    read_only: bool,
    /// Clients' connections at a time; each may take 32 MiB of memory
    #[arg(long, value_name = "N", default_value = "32", value_parser = clap::value_parser!(u16).range(1..=1024))]
    max_connections: u16,
    /// How long an image that is in use is waited for
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = parse_seconds)]
    lock_wait: Duration,
}

/// What is to be served, and how.
#[derive(Debug)]
pub(super) struct ServeArgs {
    pub(super) image: Source,
    pub(super) format: String,
    pub(super) key: Option<Source>,
    pub(super) export: String,
    /// One of the two.
    pub(super) listen: Option<Address>,
    pub(super) listen_fd: Option<RawFd>,
    pub(super) tls: Option<Source>,
    pub(super) generations: Option<Source>,
    pub(super) status_file: Option<PathBuf>,
    pub(super) read_only: bool,
    pub(super) max_connections: usize,
    pub(super) lock_wait: Duration,
}

/// Reads what follows the subcommand; ends the process when that is wrong.
pub(super) fn parse(args: impl Iterator<Item = OsString>) -> ServeArgs {
    let raw = RawArgs::parse_from(std::iter::once("device-blk nbd-serve".into()).chain(args));
    let args = ServeArgs::from(raw);
    let mut fds = args.inherited_fds();
    fds.sort_unstable();
    let twice = fds.windows(2).find(|pair| pair[0] == pair[1]);
    if let Some([fd, _]) = twice {
        let error = clap::error::ErrorKind::ValueValidation;
        let message = format!("descriptor {fd} is named twice; pass one for each use");
        RawArgs::command().error(error, message).exit();
    }
    args
}

impl From<RawArgs> for ServeArgs {
    fn from(raw: RawArgs) -> Self {
        let source = |path: Option<PathBuf>, fd: Option<RawFd>| {
            path.map(Source::Path).or(fd.map(Source::Fd))
        };
        Self {
            image: source(raw.image_path, raw.image_fd).expect("clap demands one of the two"),
            format: raw.format,
            key: source(raw.key_file, None),
            export: raw.export,
            listen: raw.listen,
            listen_fd: raw.listen_fd,
            tls: source(raw.tls_file, raw.tls_fd),
            generations: source(raw.generation_file, raw.generation_fd),
            status_file: raw.status_file,
            read_only: raw.read_only,
            max_connections: usize::from(raw.max_connections),
            lock_wait: raw.lock_wait,
        }
    }
}

impl ServeArgs {
    /// Descriptors that the command line names.
    pub(super) fn inherited_fds(&self) -> Vec<RawFd> {
        let sources = [
            Some(&self.image),
            self.tls.as_ref(),
            self.generations.as_ref(),
        ];
        let named = sources
            .into_iter()
            .flatten()
            .filter_map(|source| match source {
                Source::Fd(fd) => Some(*fd),
                Source::Path(_) => None,
            });
        named.chain(self.listen_fd).collect()
    }
}

/// `@` separates the generation.
fn parse_export(name: &str) -> Result<String, String> {
    if name.is_empty() || name.len() > 255 || name.contains(['@', '\0']) {
        return Err("1 to 255 bytes without '@' are possible".into());
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(args: &[&str]) -> Result<ServeArgs, String> {
        let args = std::iter::once("x").chain(args.iter().copied());
        RawArgs::try_parse_from(args)
            .map(ServeArgs::from)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn command_is_consistent() {
        RawArgs::command().debug_assert();
    }

    #[test]
    fn descriptors_are_named() {
        let args = read(&[
            "--image-fd=7",
            "--export=a",
            "--listen-fd=8",
            "--tls-fd=9",
            "--generation-fd=10",
        ])
        .unwrap();
        assert_eq!(args.inherited_fds(), [7, 9, 10, 8]);
    }

    #[test]
    fn mistakes_are_named() {
        for (args, named) in [
            (["--export=a", "--listen=unix:/s"].as_slice(), "--image"),
            (&["--image=a", "--export=a"], "--listen"),
            (&["--image=a", "--export=a@1", "--listen=unix:/s"], "'@'"),
            (&["--image=a", "--export=", "--listen=unix:/s"], "1 to 255"),
            (
                &[
                    "--image=a",
                    "--export=a",
                    "--listen=unix:/s",
                    "--format=vmdk",
                ],
                "qcow2",
            ),
        ] {
            let error = read(args).unwrap_err();
            assert!(error.contains(named), "{args:?}: {error}");
        }
    }
}
