//! The command line.

use std::collections::HashSet;
use std::path::PathBuf;

use clap::builder::PossibleValue;
use clap::{Parser, ValueEnum};

use crate::boot::ElfProtocol;
use crate::kvm::MAX_VCPUS;
use crate::machine::{MachineConfig, default_kvm_path};
use crate::virtio_pci::VhostUserDeviceConfig;

const EXAMPLES: &str = "\
Examples:
  Boot a kernel and an initramfs, with the console on this terminal (Ctrl-] ends it):
    vmm-core --kernel /boot/vmlinuz --initramfs root.cpio.gz --console stdio

  Boot from a disk that device-blk serves, with a control socket for grpcurl or node-agent:
    device-blk --disk id=root,path=root.img,socket=/run/vm/root.vu --control-socket /run/vm/blk.sock &
    vmm-core --control-socket /run/vm/vmm.sock --kernel vmlinux --cpus 2 --memory 1G \\
      --cmdline 'console=ttyS0 root=/dev/vda' --device tag=root,type=blk,socket=/run/vm/root.vu

Environment:
  MORTISE_LOG      what to log to standard error, as in RUST_LOG (default: info)
  MORTISE_SECCOMP  for debugging only. log: forbidden system calls are logged by the kernel and pass;
                   trap: they are named on standard error and end the process; off: no filter

Exit status: 0 after the guest switched itself off or was stopped, 1 after an error, 2 for wrong usage.";

/// Runs one virtual machine whose devices are served by other processes over vhost-user.
#[derive(Clone, Debug, Parser)]
#[command(name = "vmm-core", version, after_help = EXAMPLES)]
pub struct Cli {
    /// Where to serve the machine's control interface (gRPC on a Unix socket)
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,
    /// Kernel: an x86-64 ELF vmlinux or a bzImage
    #[arg(long, value_name = "PATH")]
    pub kernel: PathBuf,
    /// Initial RAM file system
    #[arg(long, value_name = "PATH")]
    pub initramfs: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "STRING", default_value = "console=ttyS0")]
    pub cmdline: String,
    /// Name of the machine, shown in its status
    #[arg(long, value_name = "NAME", default_value = "vm")]
    pub id: String,
    /// Number of vCPUs, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_VCPUS as i64))]
    pub cpus: u32,
    /// Guest memory, with a suffix of K, M or G
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub memory: u64,
    /// A device that another process serves:
    /// tag=NAME,type=blk|net|fs|vsock|rng|NUMBER,socket=PATH[,queues=N][,queue-size=N][,config-size=N][,config=hex:DIGITS|str:TEXT][,config-features=0xBITS]
    #[arg(long, value_name = "DEVICE")]
    pub device: Vec<VhostUserDeviceConfig>,
    /// Where the serial console goes, besides the control interface
    #[arg(long, value_name = "WHERE", value_enum, default_value_t = ConsoleOutput::None)]
    pub console: ConsoleOutput,
    /// Wait for a Start request instead of booting at once
    #[arg(long, requires = "control_socket")]
    pub no_start: bool,
    /// The machine is under a lease: it pauses at this time of CLOCK_BOOTTIME, unless AllowRun tells a
    /// later one
    #[arg(long, value_name = "NS", requires = "control_socket")]
    pub run_until_boottime_ns: Option<u64>,
    /// Where to write why the machine stopped, as JSON
    #[arg(long, value_name = "PATH")]
    pub exit_file: Option<PathBuf>,
    /// Lets faults be armed over the control socket (service mortise.device.v1.Faults): kicks that are
    /// lost or late, connections that are lost, looked for late or spoken over late. For machines that
    /// are to be broken
    #[arg(long, requires = "control_socket")]
    pub allow_faults: bool,
    /// How an ELF kernel is entered
    #[arg(long, value_name = "PROTOCOL", value_enum, default_value_t = ElfProtocol::Auto)]
    pub boot_protocol: ElfProtocol,
    /// The KVM device
    #[arg(long, value_name = "PATH", default_value_os_t = default_kvm_path().to_path_buf(), hide = true)]
    pub kvm: PathBuf,
}

/// What else gets the serial console.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ConsoleOutput {
    /// Nothing
    None,
    /// Standard input and output
    Stdio,
}

impl ValueEnum for ElfProtocol {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Auto, Self::Pvh, Self::Linux64]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(match self {
            Self::Auto => {
                PossibleValue::new("auto").help("PVH if the kernel has that entry, else linux64")
            }
            Self::Pvh => PossibleValue::new("pvh").help("PVH (Xen's start info)"),
            Self::Linux64 => {
                PossibleValue::new("linux64").help("Linux 64-bit boot protocol (zero page)")
            }
        })
    }
}

impl Cli {
    /// The machine that was asked for.
    ///
    /// # Errors
    /// Two devices have the same tag.
    pub fn machine_config(&self) -> Result<MachineConfig, String> {
        let mut tags = HashSet::new();
        if let Some(twice) = self.device.iter().find(|device| !tags.insert(&device.tag)) {
            return Err(format!(
                "two devices have tag={}: give each --device its own tag",
                twice.tag
            ));
        }
        Ok(MachineConfig {
            kvm_path: self.kvm.clone(),
            vcpus: self.cpus,
            memory_bytes: self.memory,
            kernel: self.kernel.clone(),
            initramfs: self.initramfs.clone(),
            cmdline: self.cmdline.clone(),
            elf_protocol: self.boot_protocol,
            devices: self.device.clone(),
        })
    }
}

/// `512M`, `2G`, `65536K`, or bytes.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "k" | "KiB" => 10,
        "M" | "m" | "MiB" => 20,
        "G" | "g" | "GiB" => 30,
        other => {
            return Err(format!(
                "unknown suffix {other:?}: use K, M or G, for example 512M"
            ));
        }
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "not a size: give a number with K, M or G, for example 512M")?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "more than 64 bits can count".into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_read_with_their_suffix() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2GiB"), Ok(2 << 30));
        assert_eq!(parse_size("65536"), Ok(65536));
        for bad in ["", "M", "-1", "1T", "1.5G", "99999999999G"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn vcpus_out_of_range_are_refused() {
        for cpus in ["0", "33", "-1", "many"] {
            assert!(
                Cli::try_parse_from(["vmm-core", "--kernel", "k", "--cpus", cpus]).is_err(),
                "{cpus}"
            );
        }
        assert_eq!(
            Cli::try_parse_from(["vmm-core", "--kernel", "k", "--cpus", "32"])
                .unwrap()
                .cpus,
            32
        );
    }

    #[test]
    fn devices_need_tags_of_their_own() {
        let device = "tag=a,type=blk,socket=/s";
        let cli = Cli::try_parse_from([
            "vmm-core", "--kernel", "k", "--device", device, "--device", device,
        ])
        .unwrap();
        assert!(cli.machine_config().unwrap_err().contains("tag=a"));
    }
}
