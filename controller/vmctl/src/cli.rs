//! What can be typed.

use std::path::PathBuf;

use api::controller as pb;
use api::listen::Address;
use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) mod network;
pub(crate) mod nic;

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
    /// Where the controller listens: http://HOST:PORT or unix:PATH
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
        command: VolumeCommand,
    },
    /// Look at, limit, grow, copy and keep the state of VMs' disks
    Disk {
        #[command(subcommand)]
        command: DiskCommand,
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
    /// Look at hosts
    Host {
        #[command(subcommand)]
        command: HostCommand,
    },
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
    /// Virtual CPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=32))]
    pub(crate) cpus: Option<u32>,
    /// Memory, such as 512M or 4G [default: 512M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) memory: Option<u64>,
    /// How long the guest may take to shut down before it is stopped hard [default: 30]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) shutdown_grace: Option<u32>,
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
    /// Only check whether it could be created
    #[arg(long)]
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

/// `vmctl volume ...`
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume and wait until it is complete
    #[command(after_help = "Examples:
  vmctl volume create data --size 10G
  vmctl volume create data --size 100G --format qcow2 --preallocation metadata
  vmctl volume create root --from /images/debian.raw --size 20G
  vmctl volume create secret --size 10G --encrypted --key-file passphrase
  vmctl run --kernel vmlinuz --disk volume=root")]
    Create {
        /// Name of the volume: a-z, 0-9 and hyphen
        name: String,
        /// Its size, such as 10G [default: that of --from]
        #[arg(long, value_parser = parse_size, required_unless_present = "from")]
        size: Option<u64>,
        /// Raw image on the host to copy
        #[arg(long, value_name = "FILE")]
        from: Option<PathBuf>,
        /// Of the image
        #[arg(long, value_enum, default_value_t = ImageFormat::Raw)]
        format: ImageFormat,
        /// What is reserved now: off, metadata (qcow2's tables), falloc (all blocks) or full (all
        /// blocks, by writing zeroes)
        #[arg(long, value_enum, default_value_t = Preallocation::Off)]
        preallocation: Preallocation,
        /// Reserve all space now, as --preallocation falloc
        #[arg(long, conflicts_with = "preallocation")]
        preallocate: bool,
        /// Bytes of a qcow2 cluster, 512 to 2M [default: 64K]
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        cluster_size: Option<u64>,
        /// Encrypt it (LUKS2); raw only
        #[arg(long, requires = "key_file")]
        encrypted: bool,
        /// File on this machine with the passphrase, used as it is, - for stdin
        #[arg(long, value_name = "FILE", requires = "encrypted")]
        key_file: Option<PathBuf>,
        /// The same id again creates nothing twice [default: a random one]
        #[arg(long, value_name = "ID")]
        request_id: Option<String>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Create a volume from a disk of another hypervisor
    #[command(
        long_about = "Create a volume from a disk of another hypervisor.

The image is on this machine; it is sent to the host with a checksum and converted there. Images of
several files (a VMDK's descriptor with its extents, a Parallels .hdd folder) are sent with all their
files. The same command again after an interruption goes on where the last one ended, within a day.",
        after_help = "Examples:
  vmctl volume import Windows.vmdk windows                 ESX, Workstation, Fusion
  vmctl volume import web.vhdx web --to qcow2              Hyper-V
  vmctl volume import disk.vhd data --format vhd           Hyper-V, XenServer, Azure
  vmctl volume import Ubuntu.vdi ubuntu                    VirtualBox
  vmctl volume import 'Windows 11-0.hdd' win11             Parallels
  vmctl volume import debian.qcow2 debian --size 40G       QEMU, enlarged"
    )]
    Import {
        /// The image, or a Parallels .hdd folder
        file: PathBuf,
        /// Name of the new volume: a-z, 0-9 and hyphen
        name: String,
        /// Of the image; auto goes by its first bytes
        #[arg(long, value_enum, default_value_t = ForeignFormat::Auto)]
        format: ForeignFormat,
        /// Of the volume
        #[arg(long, value_enum, default_value_t = ImageFormat::Raw)]
        to: ImageFormat,
        /// Make it larger than the image, such as 40G
        #[arg(long, value_parser = parse_size)]
        size: Option<u64>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Create a linked clone: it holds only what differs from its base
    #[command(after_help = "Examples:
  vmctl volume clone template web1                     template is read-only while it has clones
  vmctl volume clone data data-monday --snapshot monday  data stays writable")]
    Clone {
        /// The volume to begin with
        base: String,
        /// Name of the new volume: a-z, 0-9 and hyphen
        name: String,
        /// The base as this snapshot keeps it
        #[arg(long, value_name = "NAME")]
        snapshot: Option<String>,
        /// Make it larger than its base, such as 40G
        #[arg(long, value_parser = parse_size)]
        size: Option<u64>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Make a volume larger; a running guest is told
    #[command(after_help = "Examples:
  vmctl volume resize data 20G
  vmctl volume resize data +5G")]
    Resize {
        /// The volume
        name: String,
        /// Its new size, or +SIZE more
        size: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Look for errors in a qcow2 volume's tables
    Check {
        /// The volume
        name: String,
        /// Give leaked clusters back
        #[arg(long)]
        repair_leaks: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Hand over or take back the passphrase of an encrypted volume
    Key {
        #[command(subcommand)]
        command: KeyCommand,
    },
    /// List volumes
    List {
        /// Of all projects
        #[arg(long)]
        all_projects: bool,
    },
    /// Show everything about a volume: format, size, layers, snapshots, clones
    #[command(alias = "info")]
    Show {
        /// The volume
        name: String,
    },
    /// Delete a volume and what is in it
    Delete {
        /// The volume
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

/// A volume's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ImageFormat {
    /// Byte for byte
    Raw,
    /// QEMU's
    Qcow2,
}

impl ImageFormat {
    /// As the API calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// What a volume reserves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Preallocation {
    /// Nothing
    Off,
    /// qcow2's tables
    Metadata,
    /// All blocks
    Falloc,
    /// All blocks, by writing zeroes
    Full,
}

/// Format of an image that is imported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ForeignFormat {
    /// By its first bytes
    Auto,
    /// VMware
    Vmdk,
    /// Hyper-V's older, Virtual PC, XenServer
    #[value(alias = "vpc")]
    Vhd,
    /// Hyper-V
    Vhdx,
    /// VirtualBox
    Vdi,
    /// Parallels
    #[value(alias = "hdd")]
    Parallels,
    /// QEMU
    Qcow2,
    /// Byte for byte
    Raw,
}

/// `vmctl volume key ...`
#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Hand a passphrase to the volume's host, which keeps it in memory until its next boot
    #[command(after_help = "Examples:
  vmctl volume key set secret --key-file passphrase
  pass show secret | tr -d '\\n' | vmctl volume key set secret --key-file -")]
    Set {
        /// The volume
        name: String,
        /// File on this machine with the passphrase, used as it is, - for stdin
        #[arg(long, value_name = "FILE")]
        key_file: PathBuf,
    },
    /// Have the host forget it; a VM that runs goes on until its disk's process is restarted
    Forget {
        /// The volume
        name: String,
    },
}

/// `vmctl disk ...`
#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// List a VM's disks with their load
    List {
        /// The VM
        vm: String,
    },
    /// Show everything about a disk
    Show {
        /// The VM
        vm: String,
        /// Its disk
        disk: String,
    },
    /// Limit a disk, also of a running VM; 0 takes a limit away, what is not given stays
    #[command(after_help = "Examples:
  vmctl disk set-limits web root --read-iops 1000 --write-bps 50M
  vmctl disk set-limits web root --write-bps 50M --write-bps-burst 1G
  vmctl disk set-limits web root --read-iops 0")]
    SetLimits(SetLimitsArgs),
    /// Choose how a disk's queues wait: adaptive, never or always polling
    SetPolling {
        /// The VM
        vm: String,
        /// Its disk
        disk: String,
        /// adaptive, never or always
        #[arg(value_parser = crate::spec::parse_polling)]
        polling: pb::Polling,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Make a disk's volume larger; a running guest is told
    #[command(after_help = "Examples:
  vmctl disk resize web root 20G
  vmctl disk resize web root +5G")]
    Resize {
        /// The VM
        vm: String,
        /// Its disk
        disk: String,
        /// Its new size, or +SIZE more
        size: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Keep what a disk holds now under a name; the guest goes on at once
    #[command(after_help = "Examples:
  vmctl disk snapshot web root before-upgrade
  vmctl volume clone web-root rescue --snapshot before-upgrade   look at it elsewhere
  vmctl disk commit web root                                     merge it, when it is not needed")]
    Snapshot {
        /// The VM
        vm: String,
        /// Its disk
        disk: String,
        /// Name of the snapshot: a-z, 0-9 and hyphen
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Merge the newest snapshot with what was written since
    Commit {
        /// The VM
        vm: String,
        /// Its disk
        disk: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Copy a running VM's disk to another place or format and go on there
    #[command(
        args_conflicts_with_subcommands = true,
        subcommand_negates_reqs = true,
        after_help = "Examples:
  vmctl disk mirror web root --to-format qcow2                  convert under the running guest
  vmctl disk mirror web root --to /mnt/fast/root.raw --hold     copy, then wait to be told
  vmctl disk mirror complete OPERATION                          switch over now
  vmctl disk mirror cancel OPERATION                            stay where it is

It goes on in the background; vmctl op list shows how far it is."
    )]
    Mirror(MirrorArgs),
    /// Copy a running VM's disk, as it is now, to a file on its host
    #[command(after_help = "Examples:
  vmctl disk backup web root /backup/root.raw --bitmap daily             all of it, and note what changes
  vmctl disk backup web root /backup/root.raw --incremental daily        bring that file up to date
  vmctl disk backup web root /backup/root.qcow2 --format qcow2")]
    Backup(BackupArgs),
}

/// `vmctl disk set-limits`
#[derive(Debug, Args)]
pub(crate) struct SetLimitsArgs {
    /// The VM
    pub(crate) vm: String,
    /// Its disk
    pub(crate) disk: String,
    /// Reads a second
    #[arg(long, value_name = "N", value_parser = parse_size)]
    pub(crate) read_iops: Option<u64>,
    /// Bytes read a second, such as 50M
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) read_bps: Option<u64>,
    /// Writes a second
    #[arg(long, value_name = "N", value_parser = parse_size)]
    pub(crate) write_iops: Option<u64>,
    /// Bytes written a second, such as 50M
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) write_bps: Option<u64>,
    /// Reads at once after a pause
    #[arg(long, value_name = "N", value_parser = parse_size)]
    pub(crate) read_iops_burst: Option<u64>,
    /// Bytes read at once after a pause
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) read_bps_burst: Option<u64>,
    /// Writes at once after a pause
    #[arg(long, value_name = "N", value_parser = parse_size)]
    pub(crate) write_iops_burst: Option<u64>,
    /// Bytes written at once after a pause
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) write_bps_burst: Option<u64>,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

/// `vmctl disk mirror`
#[derive(Debug, Args)]
pub(crate) struct MirrorArgs {
    #[command(subcommand)]
    pub(crate) command: Option<MirrorCommand>,
    /// The VM
    #[arg(required = true)]
    pub(crate) vm: Option<String>,
    /// Its disk
    #[arg(required = true)]
    pub(crate) disk: Option<String>,
    /// File on the host to be made [default: in the host's pool]
    #[arg(long, value_name = "FILE")]
    pub(crate) to: Option<PathBuf>,
    /// Format of the copy [default: that of the disk]
    #[arg(long, value_enum)]
    pub(crate) to_format: Option<ImageFormat>,
    /// Do not switch over before `mirror complete`
    #[arg(long)]
    pub(crate) hold: bool,
    /// Copy at most so many bytes a second, such as 100M
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) bps: Option<u64>,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

/// `vmctl disk mirror ...`
#[derive(Debug, Subcommand)]
pub(crate) enum MirrorCommand {
    /// Switch a mirror that keeps up over to its copy
    Complete {
        /// The mirror's operation
        operation: String,
    },
    /// End a mirror; the disk stays where it is
    Cancel {
        /// The mirror's operation
        operation: String,
    },
    /// How far a mirror is
    Status {
        /// The mirror's operation
        operation: String,
    },
}

/// `vmctl disk backup`
#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    /// The VM
    pub(crate) vm: String,
    /// Its disk
    pub(crate) disk: String,
    /// File on the host; it is made, or with --incremental a raw one is brought up to date
    pub(crate) file: PathBuf,
    /// Of the file
    #[arg(long, value_enum, default_value_t = ImageFormat::Raw)]
    pub(crate) format: ImageFormat,
    /// Only what was written since this bitmap began; it begins anew
    #[arg(long, value_name = "BITMAP")]
    pub(crate) incremental: Option<String>,
    /// Begin to note under this name what is written from now on
    #[arg(long, value_name = "BITMAP", conflicts_with = "incremental")]
    pub(crate) bitmap: Option<String>,
    /// Copy at most so many bytes a second, such as 100M
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) bps: Option<u64>,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

/// `vmctl host ...`
#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// List hosts
    List,
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
    fn endpoint_takes_url_and_socket() {
        for endpoint in ["http://127.0.0.1:1", "127.0.0.1:1", "unix:/run/c.sock"] {
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
