//! `vmctl volume`: what can be typed.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};

use super::WaitArgs;
use crate::spec::parse_size;

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
        /// A pool that hosts share, where the volume is already: an export of its server, a file of its
        /// directory [default: a host's own]
        #[arg(long, value_name = "POOL", conflicts_with_all = ["from", "encrypted", "preallocate", "cluster_size"])]
        pool: Option<String>,
        /// What it is called there [default: NAME]
        #[arg(long, value_name = "NAME", requires = "pool")]
        export: Option<String>,
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
