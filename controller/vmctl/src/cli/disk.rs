//! `vmctl disk`: what can be typed.

use std::path::PathBuf;

use api::controller as pb;
use clap::{Args, Subcommand};

use super::WaitArgs;
use super::volume::ImageFormat;
use crate::spec::parse_size;

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
