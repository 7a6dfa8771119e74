//! What can be typed.

use std::path::PathBuf;

use api::listen::Address;
use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) mod ca;
pub(crate) mod device;
pub(crate) mod disk;
pub(crate) mod fault;
pub(crate) mod host;
pub(crate) mod network;
pub(crate) mod nic;
pub(crate) mod pool;
pub(crate) mod project;
pub(crate) mod volume;

use crate::spec::{DiskArg, NetArg, ShareArg, VhostUserArg, parse_size};

/// Runs virtual machines made of separate processes
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "Examples:
  vmctl run --kernel vmlinuz --disk debian.raw --net   boot a VM and attach its console
  vmctl vm list                                        what is there
  vmctl vm stop web && vmctl vm delete web             shut down and remove
  vmctl vm show web -o json | jq .status               for scripts

Exit status: 0 done, 1 failed, 2 command line not understood."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Where the controller listens: https://HOST:PORT with --ca, http://HOST:PORT or unix:PATH
    #[arg(
        long,
        global = true,
        env = "MORTISE_ENDPOINT",
        value_name = "ADDRESS",
        default_value = "http://127.0.0.1:7070"
    )]
    pub(crate) endpoint: Address,
    /// Project that names without one belong to
    #[arg(long, global = true, env = "MORTISE_PROJECT", default_value = api::names::DEFAULT_PROJECT)]
    pub(crate) project: String,
    /// Format of what is printed on stdout
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub(crate) output: Format,
    /// No progress on stderr
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// File whose first line is the token that says who asks
    #[arg(long, global = true, env = "MORTISE_TOKEN_FILE", value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Who vouches for the controller, PEM: what `vmctl ca show --pem` prints
    #[arg(long, global = true, env = "MORTISE_CA", value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// The certificate that says who asks, PEM
    #[arg(
        long,
        global = true,
        env = "MORTISE_CERT",
        value_name = "FILE",
        requires = "tls_key"
    )]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Its key, PEM
    #[arg(
        long,
        global = true,
        env = "MORTISE_KEY",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    pub(crate) tls_key: Option<PathBuf>,
    /// Send the token without TLS beyond this machine
    #[arg(long, global = true)]
    pub(crate) insecure: bool,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Table,
    /// For programs: the API's messages, proto3 JSON with field names as in the .proto files
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create, start, stop, look at and delete VMs
    Vm {
        #[command(subcommand)]
        command: VmCommand,
    },
    /// Create, import, clone, grow and delete volumes: disk images that outlive VMs
    Volume {
        #[command(subcommand)]
        command: volume::VolumeCommand,
    },
    /// Exchange the daemons of VMs' devices
    Device {
        #[command(subcommand)]
        command: device::DeviceCommand,
    },
    /// Look at, limit, grow, copy and keep the state of VMs' disks
    Disk {
        #[command(subcommand)]
        command: disk::DiskCommand,
    },
    /// Look at, limit, unplug and listen to VMs' NICs
    Nic {
        #[command(subcommand)]
        command: nic::NicCommand,
    },
    /// Create, look at, change and delete networks that VMs' NICs are in
    Network {
        #[command(subcommand)]
        command: network::NetworkCommand,
    },
    /// Have ports of the host lead to VMs in nat networks
    PortForward {
        #[command(subcommand)]
        command: network::PortForwardCommand,
    },
    /// Say what may reach VMs and what they may reach
    SecurityGroup {
        #[command(subcommand)]
        command: network::SecurityGroupCommand,
    },
    /// Break things on purpose and see what guests notice
    Fault {
        #[command(subcommand)]
        command: fault::FaultCommand,
    },
    /// Look at hosts, and take them out of service and back
    Host {
        #[command(subcommand)]
        command: host::HostCommand,
    },
    /// Look at who makes certificates, exchange it, and get certificates for users
    Ca {
        #[command(subcommand)]
        command: ca::CaCommand,
    },
    /// Tell of places for volumes that hosts share
    Pool {
        #[command(subcommand)]
        command: pool::PoolCommand,
    },
    /// Create, look at and delete projects
    Project {
        #[command(subcommand)]
        command: project::ProjectCommand,
    },
    /// Say how much a project may have
    Quota {
        #[command(subcommand)]
        command: project::QuotaCommand,
    },
    /// Who asked for what, and what came of it
    Audit {
        #[command(subcommand)]
        command: project::AuditCommand,
    },
    /// Write the controllers' whole state to a file; it holds secrets of seeds
    #[command(after_help = "Examples:
  vmctl backup /backups/mortise-$(date +%F).state")]
    Backup {
        /// Where to; replaced once the new one is whole
        file: PathBuf,
    },
    /// Put the state of a file in the place of the controllers'; hosts then get what it says
    #[command(after_help = "Examples:
  vmctl restore mortise.state            into an empty store
  vmctl restore mortise.state --force    instead of what is there")]
    Restore {
        /// What `vmctl backup` wrote
        file: PathBuf,
        /// Replace what is there
        #[arg(long)]
        force: bool,
    },
    /// Which controller leads, and where the state is
    Controller,
    /// Look at and wait for long-running operations
    Op {
        #[command(subcommand)]
        command: OpCommand,
    },
    /// What happened, oldest first
    #[command(after_help = "Examples:
  vmctl events
  vmctl events --follow --vm web")]
    Events(EventsArgs),
    /// Create a VM, start it and attach its console, all in one
    #[command(
        long_about = "Create a VM, start it and attach its console, all in one.

If no controller answers on this machine, a standalone one is started; it keeps running.
Without a terminal, the console's output is printed until the VM stops.

Exit status: 0 when the guest shut down or you left its console, 1 when it failed.",
        after_help = "Examples:
  vmctl run --kernel vmlinuz --disk debian.raw --cmdline 'root=/dev/vda1 console=ttyS0'
  vmctl run --kernel vmlinuz --initramfs initrd.img --disk root.raw --disk data.raw,readonly \\
            --net host-cidr=192.168.100.1/24 --cpus 4 --memory 2G --name web --rm
  vmctl run --kernel vmlinuz --disk debian.raw --net user,port-forward=tcp:2222:22 \\
            --ssh-key ~/.ssh/id_ed25519.pub --user-data cloud-config.yaml
  vmctl run --kernel vmlinuz --disk root.raw --detach

Ctrl-] leaves the console; the VM runs on."
    )]
    Run(Box<RunArgs>),
    /// Print a shell's completion script
    #[command(after_help = "Examples:
  source <(vmctl completion bash)
  vmctl completion zsh > ~/.zfunc/_vmctl
  vmctl completion fish > ~/.config/fish/completions/vmctl.fish")]
    Completion {
        /// Which shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

/// `90s`, `30m`, `1h`, `7d`.
pub(crate) fn parse_seconds(text: &str) -> Result<u32, String> {
    let units = [("s", 1), ("m", 60), ("h", 3_600), ("d", 86_400)];
    let parsed = units.iter().find_map(|(unit, seconds)| {
        let number: u32 = text.strip_suffix(unit)?.parse().ok()?;
        number.checked_mul(*seconds).filter(|seconds| *seconds > 0)
    });
    parsed.ok_or_else(|| "must be a time such as 90s, 30m, 1h or 7d".to_owned())
}

/// `vmctl vm ...`
#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Create a VM; it is not started
    #[command(after_help = "Examples:
  vmctl vm create web --kernel /boot/vmlinuz --disk /images/web.raw --net --memory 1G
  vmctl vm create web --kernel /boot/vmlinuz --disk volume=data
  vmctl vm create web -f spec.json

spec.json holds the API's VmSpec; `vmctl vm show NAME -o json | jq .spec` prints one.")]
    Create(Box<VmCreateArgs>),
    /// List VMs
    List {
        /// Of all projects
        #[arg(long)]
        all_projects: bool,
        /// Which ones, such as 'status.phase = running AND spec.vcpus > 2'
        #[arg(long, value_name = "FILTER")]
        filter: Option<String>,
        /// Such as 'create_time desc, name'
        #[arg(long, value_name = "FIELDS")]
        order_by: Option<String>,
    },
    /// Show everything about a VM
    Show {
        /// The VM
        name: String,
    },
    /// Boot a VM and wait until it runs
    Start {
        /// The VM
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Shut a VM down and wait until it is off
    #[command(after_help = "Examples:
  vmctl vm stop web           press the power button; stop hard after the grace period
  vmctl vm stop web --force   stop hard at once")]
    Stop {
        /// The VM
        name: String,
        /// Without asking the guest
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Hard-reset a running VM
    Reset {
        /// The VM
        name: String,
    },
    /// Attach a VM's serial console; Ctrl-] leaves it
    #[command(after_help = "Examples:
  vmctl vm console web              interactive
  vmctl vm console web </dev/null   only print, until the VM stops")]
    Console {
        /// The VM
        name: String,
        /// Only what the guest prints from now on, nothing held back
        #[arg(long)]
        new_only: bool,
    },
    /// Delete a VM; its disks and volumes stay
    #[command(after_help = "Examples:
  vmctl vm delete web           refused while web runs
  vmctl vm delete web --force   stops it hard first")]
    Delete {
        /// The VM
        name: String,
        /// Stop it hard first if it runs
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

/// Whether to wait for an operation.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct WaitArgs {
    /// Return at once; `vmctl op wait` waits later
    #[arg(long)]
    pub(crate) no_wait: bool,
}

/// What a VM is made of.
#[derive(Debug, Clone, Args)]
pub(crate) struct MachineArgs {
    /// Kernel: bzImage, or vmlinux with PVH or 64-bit entry
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub(crate) initramfs: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,
    /// A disk: IMAGE, volume=NAME or nbd=ADDRESS/EXPORT[@GENERATION], then any of readonly,
    /// format=raw|qcow2 (of an IMAGE), queues=N, serial=TEXT, name=NAME, block-size=512|4096,
    /// polling=adaptive|never|always, cpus=0-3+6, page-cache, slow-ms=N, read-iops=N, read-bps=SIZE,
    /// write-iops=N, write-bps=SIZE (each also with -burst), tls=FILE, tls-hostname=NAME (of nbd)
    #[arg(long = "disk", value_name = "IMAGE[,OPTION..]")]
    pub(crate) disks: Vec<DiskArg>,
    /// A NIC: in a network of `vmctl network` if the first word is its name, without privileges if that
    /// is user, else on a new tap. Options: of networks ip=ADDRESS, sg=SECURITY-GROUP (repeat for
    /// more), allow-spoofing, and as of user networks
    /// port-forward=tcp|udp:[ADDRESS:]HOST-PORT[:GUEST-PORT] (repeat for more); of user networks
    /// host-loopback=ADDRESS; of taps tap=NAME (an existing one), host-cidr=ADDRESS/BITS, bridge=NAME;
    /// of all mac=ADDRESS, mtu=N, queues=N, name=NAME
    #[arg(long = "net", value_name = "[NETWORK,]OPTION[,OPTION..]", num_args = 0..=1, default_missing_value = "")]
    pub(crate) nets: Vec<NetArg>,
    /// A device of a third-party daemon: type=blk|net|fs|vsock|rng|NUMBER,socket=PATH, then any of
    /// queues=N, queue-size=N, name=NAME, config=hex:DIGITS or config=str:TEXT (the configuration
    /// space, for a daemon that serves none)
    #[arg(long = "vhost-user", value_name = "type=TYPE,socket=PATH[,OPTION..]")]
    pub(crate) vhost_user: Vec<VhostUserArg>,
    /// A folder that a virtiofsd serves on SOCKET; the guest mounts it with mount -t virtiofs TAG
    #[arg(long = "share", value_name = "TAG=SOCKET")]
    pub(crate) shares: Vec<ShareArg>,
    #[command(flatten)]
    pub(crate) seed: SeedArgs,
    #[command(flatten)]
    pub(crate) placement: host::PlacementArgs,
    /// Virtual CPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=32))]
    pub(crate) cpus: Option<u32>,
    /// Memory, such as 512M or 4G [default: 512M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) memory: Option<u64>,
    /// Keep a started, confined process ready for each device daemon: one that dies is replaced at once
    #[arg(long)]
    pub(crate) warm_spare: bool,
    /// When it does not run although it should, its guest not having ended it: never start it again, on
    /// the same host, or anywhere [default: never]
    #[arg(long, value_name = "POLICY")]
    pub(crate) restart: Option<RestartArg>,
    /// Start it again after a boot of its host if it ran before; those of lower ORDER first [default: 0]
    #[arg(long, value_name = "ORDER", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    pub(crate) autostart: Option<u32>,
    /// How long the guest may take to shut down before it is stopped hard [default: 30]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) shutdown_grace: Option<u32>,
}

/// Of `--restart`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum RestartArg {
    /// It stays as it is
    Never,
    /// Its host starts it again
    SameHost,
    /// So does its host; when that is lost, another one does. Its disks must be reached from there
    Anywhere,
}

/// What cloud-init in the guest finds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub(crate) struct SeedArgs {
    /// cloud-init's user-data, - for stdin; at most 128 KiB
    #[arg(long, value_name = "FILE")]
    pub(crate) user_data: Option<PathBuf>,
    /// cloud-init's meta-data; instance-id and local-hostname are added where they are missing
    #[arg(long, value_name = "FILE")]
    pub(crate) meta_data: Option<PathBuf>,
    /// cloud-init's network-config [default: DHCP on the first NIC]
    #[arg(long, value_name = "FILE")]
    pub(crate) network_config: Option<PathBuf>,
    /// Public SSH keys for the image's default user; repeat for more files
    #[arg(long = "ssh-key", value_name = "FILE")]
    pub(crate) ssh_keys: Vec<PathBuf>,
}

/// `vmctl vm create`
#[derive(Debug, Args)]
pub(crate) struct VmCreateArgs {
    /// Name of the VM: a-z, 0-9 and hyphen
    pub(crate) name: String,
    /// Take the spec from a JSON file, - for stdin; options given as well override it
    #[arg(short, long, value_name = "FILE", required_unless_present = "kernel")]
    pub(crate) file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    /// The same id again creates nothing twice [default: a random one]
    #[arg(long, value_name = "ID")]
    pub(crate) request_id: Option<String>,
    /// Only check whether it could be created, and show what every host says to it
    #[arg(long, visible_alias = "dry-run")]
    pub(crate) validate_only: bool,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

/// `vmctl run`
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    /// Name of the VM [default: a random one]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Delete the VM after it stopped, or when this command is interrupted
    #[arg(long)]
    pub(crate) rm: bool,
    /// Return once the VM runs, instead of attaching its console
    #[arg(short, long, conflicts_with = "rm")]
    pub(crate) detach: bool,
    /// State directory of the controller that is started if none answers
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Directory for its sockets
    #[arg(long, value_name = "DIR")]
    pub(crate) run_dir: Option<PathBuf>,
}

/// `vmctl op ...`
#[derive(Debug, Subcommand)]
pub(crate) enum OpCommand {
    /// List operations, newest first
    List {
        /// Only those on this VM and its disks
        #[arg(long, value_name = "NAME")]
        vm: Option<String>,
        /// At most so many
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Wait until an operation is done; its failure is this command's
    Wait {
        /// The operation, as printed by --no-wait and op list
        name: String,
        /// Give up after so many seconds
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
    },
    /// Take an operation back: a start that is not done yet becomes a stop, a copy of a disk ends
    Cancel {
        /// The operation
        name: String,
    },
}

/// `vmctl events`
#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Go on printing what happens
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only about this VM
    #[arg(long, value_name = "NAME")]
    pub(crate) vm: Option<String>,
    /// Only what happened after this revision
    #[arg(long, value_name = "REVISION", default_value_t = 0)]
    pub(crate) after: u64,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_takes_the_documented_options() {
        let cli = Cli::try_parse_from([
            "vmctl",
            "run",
            "--kernel",
            "k",
            "--initramfs",
            "i",
            "--cmdline",
            "console=ttyS0",
            "--disk",
            "a.raw",
            "--disk",
            "b.raw,readonly",
            "--net",
            "--net",
            "host-cidr=10.0.0.1/24",
            "--cpus",
            "2",
            "--memory",
            "512M",
            "--name",
            "web",
            "--rm",
        ])
        .unwrap();
        let Command::Run(args) = cli.command else {
            panic!("{:?}", cli.command)
        };
        assert_eq!((args.machine.disks.len(), args.machine.nets.len()), (2, 2));
        assert_eq!(args.machine.memory, Some(512 << 20));
        assert!(args.rm);
    }

    #[test]
    fn times_have_units() {
        assert_eq!(parse_seconds("90s"), Ok(90));
        assert_eq!(parse_seconds("7d"), Ok(604_800));
        for bad in ["", "1", "h", "0m", "99999999d", "-1s"] {
            assert!(parse_seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn endpoint_takes_url_and_socket() {
        for endpoint in [
            "http://127.0.0.1:1",
            "https://c:1",
            "127.0.0.1:1",
            "unix:/run/c.sock",
        ] {
            Cli::try_parse_from(["vmctl", "--endpoint", endpoint, "host", "list"]).unwrap();
        }
        assert!(Cli::try_parse_from(["vmctl", "--endpoint", "nonsense", "host", "list"]).is_err());
    }

    #[test]
    fn no_cpus_is_no_default() {
        for cpus in ["0", "33"] {
            let line = ["vmctl", "run", "--kernel", "k", "--cpus", cpus];
            assert!(Cli::try_parse_from(line).is_err(), "{cpus}");
        }
    }

    #[test]
    fn create_needs_a_kernel_or_a_file() {
        assert!(Cli::try_parse_from(["vmctl", "vm", "create", "web"]).is_err());
        Cli::try_parse_from(["vmctl", "vm", "create", "web", "-f", "x.json"]).unwrap();
    }
}
