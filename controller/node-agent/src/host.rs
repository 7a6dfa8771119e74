//! The host: who it is, what it has, and whether VMs can run on it.

use std::{
    fs::{self, OpenOptions},
    io,
    net::IpAddr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use tonic::Code;

use crate::promised::Promised;

/// In STATE_DIR: the host's id.
pub(crate) const ID_FILE: &str = "host-id";
const KVM: &str = "/dev/kvm";
/// KVM_GET_API_VERSION, and the only answer there is since Linux 2.6.22.
const KVM_GET_API_VERSION: libc::Ioctl = 0xAE00;
const KVM_API_VERSION: i32 = 12;

/// What is the same as long as the agent lives.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    /// Chosen at first start and kept.
    pub(crate) id: String,
    /// As the kernel has it.
    pub(crate) hostname: String,
    /// CPUs this process may use.
    pub(crate) cpus: u32,
    /// Where other hosts send what overlays carry; empty if nobody said.
    pub(crate) underlay_address: String,
}

/// Why VMs, or one VM, cannot run here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostError {
    /// No KVM.
    #[error(
        "{KVM} does not exist: enable virtualization in the firmware (or nested virtualization in the hypervisor) and load kvm_intel or kvm_amd"
    )]
    NoKvm,
    /// No permission.
    #[error(
        "{KVM}: permission denied; add the agent's user to the group kvm (usermod -aG kvm USER) or run it as root"
    )]
    KvmPermission,
    /// It is there but does not work.
    #[error("opening {KVM}")]
    Kvm(#[source] io::Error),
    /// It is something else.
    #[error("{KVM} is not KVM, or one of API version {0} (12 is needed)")]
    KvmVersion(i32),
    /// Too little memory.
    #[error(
        "not enough memory: the VM needs {needed_mib} MiB, {available_mib} MiB are available; give it less or stop something"
    )]
    Memory {
        /// Guest RAM.
        needed_mib: u64,
        /// MemAvailable.
        available_mib: u64,
    },
    /// Other VMs may take it.
    #[error(
        "not enough memory: the VM needs {needed_mib} MiB, and the other running VMs were promised {promised_mib} of the host's {total_mib} MiB; give it less or stop another VM"
    )]
    Promised {
        /// Guest RAM.
        needed_mib: u64,
        /// Guest RAM of the others.
        promised_mib: u64,
        /// MemTotal.
        total_mib: u64,
    },
    /// The id cannot be kept.
    #[error("keeping the host's id in {path}", path = .path.display())]
    Id {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl HostError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::KvmPermission => Code::PermissionDenied,
            Self::Memory { .. } | Self::Promised { .. } => Code::ResourceExhausted,
            _ => Code::FailedPrecondition,
        }
    }
}

impl Host {
    /// Finds out, and chooses an id where STATE_DIR has none.
    ///
    /// # Errors
    /// When the id cannot be read or kept.
    pub(crate) fn open(state_dir: &Path, underlay: Option<IpAddr>) -> Result<Self, HostError> {
        let hostname = fs::read_to_string("/proc/sys/kernel/hostname")
            .map(|name| name.trim().to_owned())
            .unwrap_or_default();
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u32);
        Ok(Self {
            id: kept_id(&state_dir.join(ID_FILE))?,
            hostname,
            cpus,
            underlay_address: underlay.map(|ip| ip.to_string()).unwrap_or_default(),
        })
    }
}

/// Whether /dev/kvm can be used.
///
/// # Errors
/// Why not, with the remedy.
pub(crate) fn check_kvm() -> Result<(), HostError> {
    let kvm = OpenOptions::new()
        .read(true)
        .write(true)
        .open(KVM)
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => HostError::NoKvm,
            io::ErrorKind::PermissionDenied => HostError::KvmPermission,
            _ => HostError::Kvm(source),
        })?;
    // SAFETY: KVM_GET_API_VERSION takes no argument.
    match unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_API_VERSION, 0) } {
        KVM_API_VERSION => Ok(()),
        other => Err(HostError::KvmVersion(other)),
    }
}

/// Whether a VM's RAM can be had now.
///
/// # Errors
/// With both numbers.
pub(crate) fn check_memory(needed_bytes: u64) -> Result<(), HostError> {
    let available_bytes = meminfo_bytes("MemAvailable");
    if needed_bytes > available_bytes {
        return Err(HostError::Memory {
            needed_mib: needed_bytes >> 20,
            available_mib: available_bytes >> 20,
        });
    }
    Ok(())
}

/// Promises a VM its RAM beside what the other VMs were promised.
///
/// # Errors
/// With all three numbers.
pub(crate) fn promise_memory(
    promised: &Promised,
    vm: &str,
    needed_bytes: u64,
) -> Result<(), HostError> {
    let total_bytes = memory_bytes();
    promised
        .promise(vm, needed_bytes, total_bytes)
        .map_err(|others_bytes| HostError::Promised {
            needed_mib: needed_bytes >> 20,
            promised_mib: others_bytes >> 20,
            total_mib: total_bytes >> 20,
        })
}

/// "hardware", "interpreted" or "none".
pub(crate) fn kvm_kind() -> &'static str {
    if !Path::new(KVM).exists() {
        return "none";
    }
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if has_virtualization(&cpuinfo) {
        "hardware"
    } else {
        "interpreted"
    }
}

/// All memory of the host.
pub(crate) fn memory_bytes() -> u64 {
    meminfo_bytes("MemTotal")
}

fn has_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| {
            line.split_ascii_whitespace()
                .any(|flag| flag == "vmx" || flag == "svm")
        })
}

fn meminfo_bytes(name: &str) -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    parse_meminfo_bytes(&meminfo, name)
}

pub(crate) fn parse_meminfo_bytes(meminfo: &str, name: &str) -> u64 {
    meminfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .map_or(0, |kib| kib << 10)
}

pub(crate) fn kept_id(path: &Path) -> Result<String, HostError> {
    let error = |source| HostError::Id {
        path: path.to_owned(),
        source,
    };
    match fs::read_to_string(path) {
        Ok(id) if !id.trim().is_empty() => return Ok(id.trim().to_owned()),
        Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(error(source)),
        _ => {}
    }
    let id = uuid::Uuid::new_v4().to_string();
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, &id)
        .and_then(|()| fs::File::open(&temporary)?.sync_all())
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(error)?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_sizes_are_read() {
        assert!(has_virtualization(
            "model name : x\nflags\t\t: fpu vme svm lm\n"
        ));
        assert!(!has_virtualization("flags : fpu svm_lock\nbugs : vmx\n"));
        let meminfo = "MemTotal:  1000 kB\nMemAvailable:    512 kB\n";
        assert_eq!(parse_meminfo_bytes(meminfo, "MemAvailable"), 512 << 10);
    }

    #[test]
    fn id_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let first = Host::open(dir.path(), None).unwrap();
        assert_eq!(Host::open(dir.path(), None).unwrap().id, first.id);
    }

    #[test]
    fn memory_that_is_not_there_is_refused_with_numbers() {
        let error = check_memory(1 << 60).unwrap_err();
        assert_eq!(error.code(), Code::ResourceExhausted);
        assert!(error.to_string().contains("MiB are available"), "{error}");
    }
}
