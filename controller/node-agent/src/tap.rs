//! Tap interfaces: made for a VM's life, given to its device-net as descriptors, removed with it.
//!
//! A created tap is persistent, so that it keeps its index, address and bridge while nobody has it
//! open; its name follows from the VM's, so that the next agent knows it. While an agent is there, it
//! has it open itself ([`KeptTaps`]).

use std::{
    fs::{File, OpenOptions},
    io,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
};

use rtnetlink::{LinkUnspec, packet_route::link::LinkAttribute};
use tonic::Code;

use crate::spec::{Cidr, Nic};

mod kept;

pub(crate) use kept::KeptTaps;

const TUN: &str = "/dev/net/tun";
/// IFNAMSIZ less the NUL.
const MAX_NAME_BYTES: usize = 15;
/// Of struct virtio_net_hdr_v1, which virtio 1.x devices use on each packet.
const VNET_HDR_BYTES: libc::c_int = 12;

/// Why a VM cannot have its tap.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TapError {
    /// The kernel has no tap driver, or we may not use it.
    #[error(
        "opening {TUN} for tap {name}: load the tun module (modprobe tun) and give the agent access to it"
    )]
    Driver {
        /// The tap.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Not allowed.
    #[error(
        "tap {name}: not permitted; run node-agent with CAP_NET_ADMIN, or make a tap for its user (ip tuntap add {name} mode tap user USER) and name it in the NIC"
    )]
    NotPermitted {
        /// The tap.
        name: String,
    },
    /// Somebody else has it.
    #[error("tap {name} is in use by another process; choose another")]
    Busy {
        /// The tap.
        name: String,
    },
    /// It should exist.
    #[error(
        "tap {name} does not exist; create it (ip tuntap add {name} mode tap) or leave the NIC's tap empty to get one"
    )]
    Missing {
        /// The tap.
        name: String,
    },
    /// It should not exist.
    #[error(
        "interface {name} exists already but was not made for this VM; remove it (ip link del {name}) or rename the VM"
    )]
    Exists {
        /// The tap.
        name: String,
    },
    /// It has one queue only.
    #[error(
        "tap {name} has a single queue but {queue_pairs} queue pairs are asked for; create it with multi_queue"
    )]
    SingleQueue {
        /// The tap.
        name: String,
        /// As asked for.
        queue_pairs: u32,
    },
    /// No such bridge.
    #[error(
        "bridge {bridge} for tap {name} does not exist; create it (ip link add {bridge} type bridge)"
    )]
    NoBridge {
        /// The tap.
        name: String,
        /// The bridge.
        bridge: String,
    },
    /// A call on the tap failed.
    #[error("tap {name}: {action}")]
    Ioctl {
        /// The tap.
        name: String,
        /// What was done.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A change of the interface failed.
    #[error("tap {name}: {action}")]
    Netlink {
        /// The tap.
        name: String,
        /// What was done.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: Box<rtnetlink::Error>,
    },
}

impl TapError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::NotPermitted { .. } => Code::PermissionDenied,
            Self::Missing { .. } | Self::NoBridge { .. } => Code::NotFound,
            Self::Exists { .. } => Code::AlreadyExists,
            Self::SingleQueue { .. } => Code::InvalidArgument,
            _ => Code::FailedPrecondition,
        }
    }
}

/// Name of the tap that is made for NIC number `index` of a VM: readable where it fits.
pub(crate) fn name(vm: &str, index: usize) -> String {
    let readable = format!("mt-{vm}-{index}");
    if readable.len() <= MAX_NAME_BYTES {
        return readable;
    }
    // Index first: it must not be lost, and at 2 + 2 + 1 + 10 bytes the name is full.
    format!("mt{index}.{:010x}", fnv1a(vm.as_bytes()) & 0xff_ffff_ffff)
}

/// A locally administered unicast address that a NIC keeps for life.
pub(crate) fn derived_mac(vm: &str, nic: &str) -> String {
    let hash = fnv1a(format!("{vm}/{nic}").as_bytes()).to_be_bytes();
    format!(
        "52:54:{:02x}:{:02x}:{:02x}:{:02x}",
        hash[0], hash[1], hash[2], hash[3]
    )
}

/// Whether the interface exists.
pub(crate) fn exists(name: &str) -> bool {
    std::path::Path::new("/sys/class/net").join(name).exists()
}

/// Makes a persistent tap for `nic` and sets its address, bridge and MTU. A tap of this name must
/// not exist.
///
/// # Errors
/// When any of it fails; the tap may then exist and is the caller's to [`remove`].
pub(crate) async fn create(name: &str, nic: &Nic) -> Result<(), TapError> {
    if exists(name) {
        return Err(TapError::Exists {
            name: name.to_owned(),
        });
    }
    // A tap that has one queue only works with drivers and tools that know no more.
    let queue = attach_queue(name, nic.queue_pairs > 1)?;
    set_persistent(name, &queue)?;
    configure(name, nic.bridge.as_deref(), nic.mtu, nic.host_cidr).await
}

/// Makes a persistent tap of one queue in `bridge`, or sets up the one that is there.
///
/// # Errors
/// When any of it fails; the tap may then exist and is the caller's to [`remove`].
pub(crate) async fn ensure(name: &str, bridge: &str, mtu: u32) -> Result<(), TapError> {
    if !exists(name) {
        let queue = attach_queue(name, false)?;
        set_persistent(name, &queue)?;
    }
    configure(name, Some(bridge), mtu, None).await
}

/// Opens one queue for each queue pair of an existing tap.
///
/// # Errors
/// When the tap is not there, busy, of the wrong kind or not permitted.
pub(crate) fn open(name: &str, queue_pairs: u32) -> Result<Vec<OwnedFd>, TapError> {
    /// IFF_MULTI_QUEUE in /sys/class/net/NAME/tun_flags.
    const MULTI_QUEUE: u32 = libc::IFF_MULTI_QUEUE as u32;
    // TUNSETIFF would create it.
    let flags =
        std::fs::read_to_string(format!("/sys/class/net/{name}/tun_flags")).map_err(|_| {
            TapError::Missing {
                name: name.to_owned(),
            }
        })?;
    let flags = u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).unwrap_or(0);
    let multi_queue = flags & MULTI_QUEUE != 0;
    if !multi_queue && queue_pairs > 1 {
        return Err(TapError::SingleQueue {
            name: name.to_owned(),
            queue_pairs,
        });
    }
    (0..queue_pairs)
        .map(|_| attach_queue(name, multi_queue).map(OwnedFd::from))
        .collect()
}

/// Removes a tap. One that is not there is no error.
///
/// # Errors
/// When the kernel refuses.
pub(crate) async fn remove(name: &str) -> Result<(), TapError> {
    let Some(index) = index_of(name) else {
        return Ok(());
    };
    let (handle, connection) = netlink(name)?;
    let removed = handle.link().del(index).execute().await;
    connection.abort();
    match removed {
        Err(source) if exists(name) => Err(netlink_error(name, "removing it", source)),
        _ => Ok(()),
    }
}

fn attach_queue(name: &str, multi_queue: bool) -> Result<File, TapError> {
    let queue = OpenOptions::new()
        .read(true)
        .write(true)
        .open(TUN)
        .map_err(|source| TapError::Driver {
            name: name.to_owned(),
            source,
        })?;
    let flags = libc::IFF_TAP
        | libc::IFF_NO_PI
        | libc::IFF_VNET_HDR
        | if multi_queue {
            libc::IFF_MULTI_QUEUE
        } else {
            0
        };
    let request = interface_request(name, flags);
    // SAFETY: TUNSETIFF reads and writes an ifreq, which lives across the call.
    if unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF, &request) } < 0 {
        let source = io::Error::last_os_error();
        return Err(match source.raw_os_error() {
            Some(libc::EPERM) => TapError::NotPermitted {
                name: name.to_owned(),
            },
            Some(libc::EBUSY) => TapError::Busy {
                name: name.to_owned(),
            },
            _ => TapError::Ioctl {
                name: name.to_owned(),
                action: "attaching a queue",
                source,
            },
        });
    }
    // SAFETY: TUNSETVNETHDRSZ reads an int, which lives across the call.
    if unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETVNETHDRSZ, &VNET_HDR_BYTES) } < 0 {
        return Err(ioctl_error(name, "setting the header's length"));
    }
    set_nonblocking(name, &queue)?;
    Ok(queue)
}

fn set_nonblocking(name: &str, queue: &File) -> Result<(), TapError> {
    // SAFETY: F_SETFL takes an int; the file is open.
    if unsafe {
        libc::fcntl(
            queue.as_raw_fd(),
            libc::F_SETFL,
            libc::O_RDWR | libc::O_NONBLOCK,
        )
    } < 0
    {
        return Err(ioctl_error(name, "making it non-blocking"));
    }
    Ok(())
}

fn set_persistent(name: &str, queue: &File) -> Result<(), TapError> {
    // SAFETY: TUNSETPERSIST takes its argument by value.
    if unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETPERSIST, 1) } < 0 {
        return Err(ioctl_error(name, "making it persistent"));
    }
    Ok(())
}

fn interface_request(name: &str, flags: libc::c_int) -> libc::ifreq {
    // SAFETY: an ifreq of zeroes is valid: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name[..MAX_NAME_BYTES]
        .iter_mut()
        .zip(name.bytes())
    {
        *target = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}

async fn configure(
    name: &str,
    bridge: Option<&str>,
    mtu: u32,
    host_cidr: Option<Cidr>,
) -> Result<(), TapError> {
    let index = index_of(name).ok_or_else(|| TapError::Missing {
        name: name.to_owned(),
    })?;
    let bridge = match bridge {
        None => None,
        Some(bridge) => Some(index_of(bridge).ok_or_else(|| TapError::NoBridge {
            name: name.to_owned(),
            bridge: bridge.to_owned(),
        })?),
    };
    let (handle, connection) = netlink(name)?;
    let done = configure_link(&handle, name, index, bridge, mtu, host_cidr).await;
    connection.abort();
    done
}

async fn configure_link(
    handle: &rtnetlink::Handle,
    name: &str,
    index: u32,
    bridge: Option<u32>,
    mtu: u32,
    host_cidr: Option<Cidr>,
) -> Result<(), TapError> {
    let mut link = LinkUnspec::new_with_index(index);
    if mtu != 0 {
        link = link.append_extra_attribute(LinkAttribute::Mtu(mtu));
    }
    if let Some(bridge) = bridge {
        link = link.controller(bridge);
    }
    handle
        .link()
        .set(link.build())
        .execute()
        .await
        .map_err(|source| netlink_error(name, "setting its MTU and bridge", source))?;
    if let Some(Cidr {
        address,
        prefix_len,
    }) = host_cidr
    {
        let address: IpAddr = address;
        handle
            .address()
            .add(index, address, prefix_len)
            .execute()
            .await
            .map_err(|source| netlink_error(name, "giving it its address", source))?;
    }
    handle
        .link()
        .set(LinkUnspec::new_with_index(index).up().build())
        .execute()
        .await
        .map_err(|source| netlink_error(name, "setting it up", source))
}

fn netlink(name: &str) -> Result<(rtnetlink::Handle, tokio::task::JoinHandle<()>), TapError> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|source| TapError::Ioctl {
            name: name.to_owned(),
            action: "opening a netlink socket",
            source,
        })?;
    Ok((handle, tokio::spawn(connection)))
}

fn index_of(name: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(name).ok()
}

fn ioctl_error(name: &str, action: &'static str) -> TapError {
    TapError::Ioctl {
        name: name.to_owned(),
        action,
        source: io::Error::last_os_error(),
    }
}

fn netlink_error(name: &str, action: &'static str, source: rtnetlink::Error) -> TapError {
    TapError::Netlink {
        name: name.to_owned(),
        action,
        source: Box::new(source),
    }
}

/// Fowler-Noll-Vo, 64 bits: the standard library's hashes may change between versions.
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_do_not_collide() {
        assert_eq!(name("web", 0), "mt-web-0");
        let long = "a".repeat(63);
        for index in [0, 9, 10, 29] {
            assert!(
                name(&long, index).len() <= MAX_NAME_BYTES,
                "{}",
                name(&long, index)
            );
        }
        assert_ne!(name(&long, 0), name(&long, 1));
        assert_ne!(name(&long, 0), name(&format!("{}b", &long[..62]), 0));
    }

    #[test]
    fn derived_mac_is_stable_and_unicast() {
        assert_eq!(derived_mac("web", "eth0"), derived_mac("web", "eth0"));
        assert_ne!(derived_mac("web", "eth0"), derived_mac("web", "eth1"));
        assert!(derived_mac("web", "eth0").starts_with("52:54:"));
    }

    #[test]
    fn tap_that_is_not_there_is_named() {
        KeptTaps::default().open("mt-no-such-0", 1).unwrap_err();
        let error = open("mt-no-such-0", 1).unwrap_err();
        assert_eq!(error.code(), Code::NotFound);
        assert!(error.to_string().contains("mt-no-such-0"));
    }
}
