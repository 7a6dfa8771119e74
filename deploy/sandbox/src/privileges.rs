//! Privileges: no new ones, no capabilities, no core dumps of guest memory.

use std::io;

use crate::Achieved;

/// `PR_SET_NO_NEW_PRIVS`: no set-uid program run from here gains anything.
///
/// # Errors
/// The kernel refused, which no supported kernel does.
pub fn no_new_privs() -> Result<Achieved, PrivilegeError> {
    // SAFETY: this prctl takes no pointer.
    let answer = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    succeeded(answer, "set no_new_privs")?;
    Ok(Achieved::of("no_new_privs"))
}

/// Keeps guest memory out of core files: the core size limit becomes 0, hard and soft.
///
/// # Errors
/// The kernel refused, which it does to nobody who lowers a limit.
pub fn no_core_dumps() -> Result<Achieved, PrivilegeError> {
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `none` is a valid rlimit that outlives the call.
    let answer = unsafe { libc::setrlimit(libc::RLIMIT_CORE, &none) };
    succeeded(answer, "set RLIMIT_CORE to 0")?;
    Ok(Achieved::of("no_core_dumps"))
}

/// A Linux capability by its number in `linux/capability.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability(u8);

impl Capability {
    /// `CAP_NET_ADMIN`
    pub const NET_ADMIN: Self = Self(12);
    /// `CAP_IPC_LOCK`
    pub const IPC_LOCK: Self = Self(14);
    /// `CAP_SYS_ADMIN`
    pub const SYS_ADMIN: Self = Self(21);
    /// `CAP_SYS_NICE`
    pub const SYS_NICE: Self = Self(23);
}

/// Gives up all capabilities of the calling thread but those in `keep` that it holds now, and
/// empties the bounding and ambient sets of the rest.
///
/// # Errors
/// The kernel refused to read or lower the sets.
pub fn drop_capabilities(keep: &[Capability]) -> Result<Achieved, PrivilegeError> {
    let kept_mask = keep
        .iter()
        .fold(0_u64, |mask, capability| mask | 1 << capability.0);
    let held = CapabilitySets::of_this_thread()?;
    drop_bounding_set(kept_mask, held.effective() & CAP_SETPCAP_MASK != 0)?;
    // SAFETY: this prctl takes no pointer.
    let answer = unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0,
        )
    };
    succeeded(answer, "clear the ambient capabilities")?;
    held.masked(kept_mask).apply_to_this_thread()?;
    Ok(Achieved::of(if keep.is_empty() {
        "no_capabilities".to_owned()
    } else {
        format!("capabilities:{:#x}", held.permitted() & kept_mask)
    }))
}

const CAP_SETPCAP_MASK: u64 = 1 << 8;

fn drop_bounding_set(kept_mask: u64, permitted: bool) -> Result<(), PrivilegeError> {
    if !permitted {
        // Nothing can be gained through the bounding set once no_new_privs is set.
        return Ok(());
    }
    for number in (0..64).filter(|number| kept_mask & (1 << number) == 0) {
        // SAFETY: this prctl takes no pointer.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) } < 0 {
            let source = io::Error::last_os_error();
            if source.raw_os_error() == Some(libc::EINVAL) {
                // Past the last capability that this kernel knows.
                return Ok(());
            }
            return Err(PrivilegeError::Refused {
                action: "drop a capability from the bounding set",
                source,
            });
        }
    }
    Ok(())
}

/// `struct __user_cap_data_struct`, twice: capabilities 0 to 31, then 32 to 63.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityWord {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;

#[derive(Clone, Copy)]
struct CapabilitySets([CapabilityWord; 2]);

impl CapabilitySets {
    fn of_this_thread() -> Result<Self, PrivilegeError> {
        let mut header = CapabilityHeader {
            version: LINUX_CAPABILITY_VERSION_3,
            pid: 0,
        };
        let mut words = [CapabilityWord::default(); 2];
        // SAFETY: version 3 reads the header and writes exactly two words.
        let answer = unsafe { libc::syscall(libc::SYS_capget, &mut header, words.as_mut_ptr()) };
        succeeded(answer, "read the capabilities")?;
        Ok(Self(words))
    }

    fn effective(&self) -> u64 {
        u64::from(self.0[0].effective) | u64::from(self.0[1].effective) << 32
    }

    fn permitted(&self) -> u64 {
        u64::from(self.0[0].permitted) | u64::from(self.0[1].permitted) << 32
    }

    fn masked(mut self, mask: u64) -> Self {
        for (word, mask) in self.0.iter_mut().zip([mask as u32, (mask >> 32) as u32]) {
            word.effective &= mask;
            word.permitted &= mask;
            word.inheritable = 0;
        }
        self
    }

    fn apply_to_this_thread(&self) -> Result<(), PrivilegeError> {
        let mut header = CapabilityHeader {
            version: LINUX_CAPABILITY_VERSION_3,
            pid: 0,
        };
        // SAFETY: version 3 reads the header and exactly two words.
        let answer = unsafe { libc::syscall(libc::SYS_capset, &mut header, self.0.as_ptr()) };
        succeeded(answer, "drop the capabilities")
    }
}

fn succeeded(answer: impl Into<i64>, action: &'static str) -> Result<(), PrivilegeError> {
    if answer.into() < 0 {
        return Err(PrivilegeError::Refused {
            action,
            source: io::Error::last_os_error(),
        });
    }
    Ok(())
}

/// A privilege could not be given up.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// The kernel refused.
    #[error("cannot {action}; the process refuses to run unconfined")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}
