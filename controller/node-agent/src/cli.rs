//! The command line.

use std::path::PathBuf;

use api::listen::Address;
use clap::{Parser, ValueEnum};

use crate::faults::Allowed;

/// Runs virtual machines on this host as a controller wishes.
///
/// VMs go on when the agent ends, for whatever reason; the next agent on the same state directory
/// adopts them.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:
  node-agent --listen unix:/run/mortise/a.sock --state-dir /var/lib/mortise/a --run-dir /run/mortise/a
                                             for a controller on this machine
  node-agent join --controller https://10.0.0.1:7070 --token mt-... --ca-hash 5f... \\
                  --address https://10.0.0.9:7071 --state-dir /var/lib/mortise/a
                                             gets this host a certificate, with a token of
                                             `vmctl host token create`; see node-agent join --help
  node-agent --listen https://0.0.0.0:7071 --state-dir /var/lib/mortise/a --run-dir /run/mortise/a
                                             and then serves controllers alone"
)]
pub(crate) struct Cli {
    /// Where to serve gRPC: https://HOST:PORT for controllers with a certificate of its authority,
    /// HOST:PORT on loopback, or unix:PATH.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Address,
    /// Records of VMs, and volumes; must survive reboots.
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: PathBuf,
    /// Sockets and logs of running VMs. Keep the path short: socket paths hold 107 bytes.
    #[arg(long, value_name = "DIR")]
    pub(crate) run_dir: PathBuf,
    /// Directory of vmm-core, device-blk and device-net [default: that of node-agent].
    #[arg(long, value_name = "DIR")]
    pub(crate) bin_dir: Option<PathBuf>,
    /// Converts images of other formats at their import [default: beside node-agent, or in PATH].
    #[arg(long, value_name = "FILE")]
    pub(crate) qemu_img: Option<PathBuf>,
    /// This host's address that other hosts send to what overlay networks carry.
    #[arg(long, value_name = "IP")]
    pub(crate) underlay_address: Option<std::net::IpAddr>,
    /// Hosts of one zone fail together: a rack, a room.
    #[arg(long, value_name = "ZONE")]
    pub(crate) zone: Option<String>,
    /// What VMs may ask of their host; may be given several times.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
    pub(crate) labels: Vec<(String, String)>,
    /// Makes user networks [default: beside node-agent, or in PATH].
    #[arg(long, value_name = "FILE", env = "MORTISE_PASST")]
    pub(crate) passt: Option<PathBuf>,
    /// Keep a started, confined process ready for each daemon of every VM, so that one that dies is
    /// replaced without an exec. Costs a few MiB each; VMs can also ask for it one by one.
    #[arg(long)]
    pub(crate) warm_spares: bool,
    /// A device daemon whose control socket or queues do not answer for this many seconds hangs: it is
    /// killed, and started again. Waiting for slow storage is no hang.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) hang_after: u64,
    /// Let faults be armed in VMs' processes and, with `clock`, that of this host's clock too. For
    /// experiments: whoever reaches this agent can then spoil what guests read and write.
    #[arg(long, value_name = "ALSO", num_args = 0..=1, require_equals = true, default_missing_value = "faults")]
    allow_faults: Option<AllowFaults>,
    /// This host's certificate, where another authority than the controller's makes them: PEM, for
    /// mortise://hosts/ID, with what leads to its authority. Read again for each connection.
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "client_ca"])]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Its key, PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Who makes the certificates of controllers then, PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(crate) client_ca: Option<PathBuf>,
    /// Serve without TLS beyond this machine: whoever is on the network can run VMs here.
    #[arg(long)]
    pub(crate) insecure: bool,
    /// Serve /metrics for Prometheus over HTTP here: HOST:PORT or unix:PATH.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) metrics_listen: Option<Address>,
    /// Send traces to this OpenTelemetry collector (OTLP over gRPC).
    #[arg(long, value_name = "http://HOST:PORT", env = "MORTISE_OTLP")]
    pub(crate) otlp: Option<String>,
    /// Where an agent on trial says that it may stay; given by the process that watches over it.
    #[arg(long, hide = true)]
    pub(crate) trial_fd: Option<i32>,
}

/// Gets this host a certificate, and registers it with a controller.
///
/// The key is made here and stays here. What was got is in the state directory, and the agent renews it in
/// time. Joining again, with a token for this host, replaces it.
#[derive(Debug, Parser)]
#[command(
    name = "node-agent join",
    bin_name = "node-agent join",
    version,
    after_help = "Examples:
  vmctl host token create                   on a controller's machine; prints the line to run here:
  node-agent join --controller https://10.0.0.1:7070 --token mt-... --ca-hash 5f... \\
                  --address https://10.0.0.9:7071 --state-dir /var/lib/mortise/a"
)]
pub(crate) struct JoinArgs {
    /// Where a controller speaks TLS; may be given several times, for renewing where one is away.
    #[arg(long = "controller", value_name = "https://HOST:PORT", required = true)]
    pub(crate) controllers: Vec<Address>,
    /// The token, good for one host once.
    #[arg(
        long,
        value_name = "TOKEN",
        env = "MORTISE_JOIN_TOKEN",
        hide_env_values = true
    )]
    pub(crate) token: String,
    /// SHA-256 of the authority, by which the controller is known to be the right one.
    #[arg(long, value_name = "SHA256", value_parser = parse_hash)]
    pub(crate) ca_hash: String,
    /// Where controllers will reach this agent: what --listen will be, as others see it.
    #[arg(long, value_name = "https://HOST:PORT")]
    pub(crate) address: Address,
    /// As the agent will have it.
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: PathBuf,
}

fn parse_hash(text: &str) -> Result<String, String> {
    let good = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    match good {
        true => Ok(text.to_owned()),
        false => Err("must be 64 hexadecimal digits; `vmctl ca show` prints it".to_owned()),
    }
}

/// Of `--allow-faults`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum AllowFaults {
    Faults,
    Clock,
}

impl Cli {
    /// What may go wrong on purpose.
    pub(crate) fn allowed_faults(&self) -> Allowed {
        Allowed {
            faults: self.allow_faults.is_some(),
            clock: self.allow_faults == Some(AllowFaults::Clock),
        }
    }
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    let parts = text.split_once('=').filter(|(key, _)| !key.is_empty());
    let (key, value) = parts.ok_or("must be KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}
