//! The kernel's virtual machine monitor: opening `/dev/kvm`, and the VM with its memory slots
//! and in-kernel interrupt controllers.
//!
//! vCPUs live in [`crate::vcpu`]; interrupts and doorbells in [`routes`].

pub mod interrupts;
pub mod irqchip;
pub mod routes;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_bindings::{KVM_API_VERSION, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use nix::unistd::{Gid, Group};

use crate::layout::{IDENTITY_MAP_START, TSS_START};
use crate::memory::GuestRam;

/// Most vCPUs a machine can have; KVM may allow fewer.
pub const MAX_VCPUS: u32 = 32;

/// `KVM_CAP_IOEVENTFD_ANY_LENGTH`: doorbells that answer writes of any width.
const CAP_IOEVENTFD_ANY_LENGTH: libc::c_ulong = 122;
/// `KVM_CAP_IMMEDIATE_EXIT`: kicking a vCPU out of the guest without a race.
const CAP_IMMEDIATE_EXIT: libc::c_ulong = 136;

/// Why there is no KVM to use.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No such device node.
    #[error(
        "{path} does not exist: enable virtualization in the firmware, load the kvm-intel or kvm-amd module, \
         or pass the device into this container"
    )]
    Missing {
        /// The device node.
        path: PathBuf,
    },
    /// The device node cannot be opened by this user.
    #[error("no permission to open {path}: {remedy}")]
    Permission {
        /// The device node.
        path: PathBuf,
        /// Whose group to join.
        remedy: String,
    },
    /// The device node cannot be opened for another reason.
    #[error("cannot open {path}")]
    Open {
        /// The device node.
        path: PathBuf,
        /// The system call's error.
        #[source]
        source: io::Error,
    },
    /// Not a KVM this program knows.
    #[error("{path} speaks KVM API {found}, not {KVM_API_VERSION}: is it a KVM device?")]
    ApiVersion {
        /// The device node.
        path: PathBuf,
        /// What it answered.
        found: i32,
    },
    /// The kernel's KVM is too old.
    #[error("this kernel's KVM lacks {0}: use Linux 5.10 or newer")]
    Capability(&'static str),
    /// More vCPUs than KVM allows.
    #[error(
        "{wanted} vCPUs are more than this host's KVM allows ({allowed}): give a smaller --cpus"
    )]
    TooManyVcpus {
        /// What was asked for.
        wanted: u32,
        /// What KVM allows.
        allowed: u32,
    },
    /// A call that sets up the VM failed.
    #[error("KVM refused to {what}")]
    Setup {
        /// What was to be done.
        what: &'static str,
        /// The ioctl's error.
        #[source]
        source: io::Error,
    },
}

/// Turns an ioctl's error into [`KvmError::Setup`].
pub fn failed_to(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Setup {
        what,
        source: source.into(),
    }
}

/// Opens the KVM device at `path` and checks that it can do what Mortise needs.
///
/// # Errors
/// It is not there, not permitted, or too old.
pub fn open(path: &Path) -> Result<Kvm, KvmError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(path)
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => KvmError::Missing { path: path.into() },
            io::ErrorKind::PermissionDenied => KvmError::Permission {
                path: path.into(),
                remedy: permission_remedy(path),
            },
            _ => KvmError::Open {
                path: path.into(),
                source,
            },
        })?;
    // SAFETY: the descriptor was opened just now and is owned by nobody else.
    let kvm = unsafe { Kvm::from_raw_fd(file.into_raw_fd()) };
    let found = kvm.get_api_version();
    if found != KVM_API_VERSION as i32 {
        return Err(KvmError::ApiVersion {
            path: path.into(),
            found,
        });
    }
    check_capabilities(&kvm)?;
    Ok(kvm)
}

fn check_capabilities(kvm: &Kvm) -> Result<(), KvmError> {
    let needed = [
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
        (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
        (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
        (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
        (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
        (Cap::MpState, "KVM_CAP_MP_STATE"),
    ];
    if let Some((_, name)) = needed
        .into_iter()
        .find(|(cap, _)| !kvm.check_extension(*cap))
    {
        return Err(KvmError::Capability(name));
    }
    let raw = [
        (CAP_IOEVENTFD_ANY_LENGTH, "KVM_CAP_IOEVENTFD_ANY_LENGTH"),
        (CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"),
    ];
    match raw
        .into_iter()
        .find(|(cap, _)| kvm.check_extension_raw(*cap) <= 0)
    {
        Some((_, name)) => Err(KvmError::Capability(name)),
        None => Ok(()),
    }
}

/// What to type so that this user may open the device.
fn permission_remedy(path: &Path) -> String {
    let group = path.metadata().ok().map(|meta| {
        let gid = meta.gid();
        let group = Group::from_gid(Gid::from_raw(gid)).ok().flatten();
        (
            gid,
            meta.mode(),
            group.map_or_else(|| gid.to_string(), |group| group.name),
        )
    });
    match group {
        Some((gid, mode, name)) if gid != 0 && mode & 0o060 == 0o060 => {
            format!("join group {name} (as root: usermod -aG {name} USER), then log in again")
        }
        _ => "its group has no access or is root's: as root, chgrp kvm and chmod 660 it, and join group kvm".into(),
    }
}

/// The VM: guest RAM in memory slots, PIC and IOAPIC in the kernel.
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
}

impl Vm {
    /// Makes a VM with `ram` in its memory slots, and its interrupt controllers.
    ///
    /// # Errors
    /// KVM refused one of the steps.
    pub fn new(kvm: Kvm, ram: &GuestRam) -> Result<Self, KvmError> {
        let fd = kvm.create_vm().map_err(failed_to("create a VM"))?;
        for (slot, region) in ram.regions().into_iter().enumerate() {
            let memslot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.gpa,
                memory_size: region.size_bytes,
                userspace_addr: region.hva,
            };
            // SAFETY: the mapping is `ram`'s, which the machine keeps for as long as it keeps this VM, and the
            // slots' addresses do not overlap.
            unsafe { fd.set_user_memory_region(memslot) }
                .map_err(failed_to("take guest RAM as a memory slot"))?;
        }
        fd.set_identity_map_address(IDENTITY_MAP_START)
            .map_err(failed_to("set the identity map page"))?;
        fd.set_tss_address(TSS_START as usize)
            .map_err(failed_to("set the TSS pages"))?;
        fd.create_irq_chip()
            .map_err(failed_to("create the interrupt controllers"))?;
        Ok(Self {
            kvm,
            fd: Arc::new(fd),
        })
    }

    /// The system-wide descriptor.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The VM's descriptor.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }
}

/// How many vCPUs `kvm` allows a machine of ours.
pub fn max_vcpus(kvm: &Kvm) -> u32 {
    MAX_VCPUS.min(kvm.get_max_vcpus() as u32)
}

#[cfg(test)]
mod tests {
    use std::fs::{File, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn remedy_names_the_group_that_may_open_the_device() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("kvm");
        let file = File::create(&path).unwrap();
        file.set_permissions(Permissions::from_mode(0o660)).unwrap();
        let remedy = permission_remedy(&path);
        match file.metadata().unwrap().gid() {
            0 => assert!(remedy.contains("chgrp kvm"), "{remedy}"),
            gid => {
                let group = Group::from_gid(Gid::from_raw(gid)).unwrap();
                let name = group.map_or_else(|| gid.to_string(), |group| group.name);
                assert!(remedy.contains(&format!("usermod -aG {name}")), "{remedy}");
            }
        }
        file.set_permissions(Permissions::from_mode(0o600)).unwrap();
        assert!(permission_remedy(&path).contains("chmod 660"));
    }

    #[test]
    fn missing_and_forbidden_devices_are_told_apart() {
        let missing = open(Path::new("/nowhere/kvm")).err().unwrap();
        assert!(matches!(missing, KvmError::Missing { .. }), "{missing}");
        let forbidden = KvmError::Permission {
            path: "/dev/kvm".into(),
            remedy: "join group kvm".into(),
        };
        let line = "no permission to open /dev/kvm: join group kvm";
        assert_eq!(forbidden.to_string(), line);
    }
}
