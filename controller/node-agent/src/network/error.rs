//! Why a network is not there.

use std::{io, path::PathBuf};

use tonic::Code;

use crate::{
    epoch::Superseded, process::ProcessError, record::RecordError, tap::TapError, vm::DaemonError,
};

/// See the module.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    /// No such network.
    #[error("network {id:?} does not exist on this host")]
    NotFound {
        /// As asked for.
        id: String,
    },
    /// A VM wants to be in a network that is not there.
    #[error("network {id} is not ready: {problem}")]
    NotReady {
        /// The network.
        id: String,
        /// Why not.
        problem: String,
    },
    /// The network does not know the NIC.
    #[error("network {id} does not know NIC {nic} of VM {vm}; apply the network again")]
    UnknownNic {
        /// The network.
        id: String,
        /// The VM.
        vm: String,
        /// The NIC.
        nic: String,
    },
    /// A newer leader was heard while the command waited.
    #[error(transparent)]
    Superseded(#[from] Superseded),
    /// NICs are in it.
    #[error("network {id} is in use by {}; stop their VMs first", users.join(", "))]
    InUse {
        /// The network.
        id: String,
        /// Interfaces in its bridge, and NICs on its switch.
        users: Vec<String>,
    },
    /// Not allowed.
    #[error("network {id}: {action}: not permitted; run node-agent as root or with CAP_NET_ADMIN")]
    NotPermitted {
        /// The network.
        id: String,
        /// What was done.
        action: &'static str,
    },
    /// A program is not installed.
    #[error(
        "network {id}: program {program} is not there; install it (Debian: apt-get install {package}) or put it beside node-agent"
    )]
    NoProgram {
        /// The network.
        id: String,
        /// What it is called.
        program: &'static str,
        /// Where Debian has it.
        package: &'static str,
    },
    /// No such bridge.
    #[error(
        "spec.bridge: bridge {bridge} does not exist; create it: ip link add {bridge} type bridge"
    )]
    NoBridge {
        /// As asked for.
        bridge: String,
    },
    /// It is something else.
    #[error(
        "spec.bridge: interface {bridge} is no bridge; name one, or put it into one: ip link set {bridge} master BRIDGE"
    )]
    NotABridge {
        /// As asked for.
        bridge: String,
    },
    /// No such interface.
    #[error("spec.uplink: interface {uplink} does not exist; ip link shows those that do")]
    NoUplink {
        /// As asked for.
        uplink: String,
    },
    /// It should not exist.
    #[error(
        "interface {name} exists already but was not made for network {id}; remove it: ip link del {name}"
    )]
    Exists {
        /// The network.
        id: String,
        /// The interface.
        name: String,
    },
    /// Another interface has the subnet.
    #[error(
        "spec.ipv4_gateway: {subnet} overlaps {other} of interface {interface}; choose another subnet"
    )]
    Overlap {
        /// As asked for.
        subnet: String,
        /// What is there.
        other: String,
        /// Who has it.
        interface: String,
    },
    /// Nobody said where others send to.
    #[error(
        "spec.overlay.underlay_address: is missing; name this host's address there, or start node-agent with --underlay-address"
    )]
    NoUnderlay,
    /// The kernel refused.
    #[error("network {id}: {action}")]
    Netlink {
        /// The network.
        id: String,
        /// What was done.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: Box<rtnetlink::Error>,
    },
    /// A file could not be read or written.
    #[error("network {id}: {action} {path}", path = .path.display())]
    Io {
        /// The network.
        id: String,
        /// What was done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// nft refused.
    #[error("network {id}: nft: {message}")]
    Firewall {
        /// The network.
        id: String,
        /// What it said.
        message: String,
    },
    /// The kernel does not filter frames on bridges.
    #[error(
        "network {id}: this host's kernel cannot filter frames on a bridge, which a network with a VNI needs; \
         load the module: modprobe nft_meta_bridge (kernels built without CONFIG_NFT_BRIDGE_META have none: \
         boot the distribution's full kernel, or leave out the VNI)"
    )]
    NoBridgeRules {
        /// The network.
        id: String,
    },
    /// dnsmasq could not be started.
    #[error("network {id}")]
    Spawn {
        /// The network.
        id: String,
        /// Why not.
        #[source]
        source: ProcessError,
    },
    /// dnsmasq does not serve.
    #[error("network {id}: {message}")]
    Server {
        /// The network.
        id: String,
        /// Its last words.
        message: String,
    },
    /// NICs cannot move from one datapath to another.
    #[error("spec.datapath: network {id} has another; delete the network and create it anew")]
    Datapath {
        /// The network.
        id: String,
    },
    /// Its frames could not be kept apart.
    #[error(
        "network {id} has no VLANs, which NIC {nic} is to be in; apply it with DATAPATH_SWITCH and vlan_aware, or leave the VLANs out"
    )]
    NoVlans {
        /// The network.
        id: String,
        /// The NIC.
        nic: String,
    },
    /// VLANs came or went.
    #[error("spec.vlan_aware: network {id} has another; delete the network and create it anew")]
    VlanAware {
        /// The network.
        id: String,
    },
    /// The program of its switch is missing.
    #[error(
        "network {id}: program {path} does not exist; build it, or name its directory with --bin-dir", path = .path.display()
    )]
    NoSwitchProgram {
        /// The network.
        id: String,
        /// Where it should be.
        path: PathBuf,
    },
    /// The tap between its switch and its bridge.
    #[error("network {id}: uplink of its switch")]
    Tap {
        /// The network.
        id: String,
        /// Why not.
        #[source]
        source: TapError,
    },
    /// Its switch does not run, or does not serve a NIC.
    #[error("network {id}: its switch: {message}")]
    Switch {
        /// The network.
        id: String,
        /// What the API answers.
        code: Code,
        /// Why not.
        message: String,
    },
    /// Its switch does not serve a NIC as it should.
    #[error("network {id}: NIC {nic} of VM {vm}: {message}")]
    Port {
        /// The network.
        id: String,
        /// The VM.
        vm: String,
        /// The NIC.
        nic: String,
        /// What the API answers.
        code: Code,
        /// Why not.
        message: String,
    },
    /// A running NIC did not take its policy.
    #[error("network {id}: telling NIC {nic} of VM {vm} what it may let pass")]
    Policy {
        /// The network.
        id: String,
        /// The VM.
        vm: String,
        /// The NIC.
        nic: String,
        /// Why not.
        #[source]
        source: Box<DaemonError>,
    },
    /// It cannot be kept.
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl NetworkError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } | Self::NoBridge { .. } | Self::NoUplink { .. } => Code::NotFound,
            Self::NotPermitted { .. } => Code::PermissionDenied,
            Self::Exists { .. } => Code::AlreadyExists,
            Self::NotABridge { .. } | Self::NoUnderlay => Code::InvalidArgument,
            Self::Policy { .. } | Self::Superseded(_) => Code::Unavailable,
            Self::Record(_) => Code::Internal,
            Self::Tap { source, .. } => source.code(),
            Self::Switch { code, .. } | Self::Port { code, .. } => *code,
            _ => Code::FailedPrecondition,
        }
    }

    /// Of a netlink call; a lack of permission is told as such.
    pub(super) fn netlink(
        id: &str,
        action: &'static str,
    ) -> impl FnOnce(rtnetlink::Error) -> Self + use<> {
        let id = id.to_owned();
        move |source| match &source {
            rtnetlink::Error::NetlinkError(message)
                if matches!(-message.raw_code(), libc::EPERM | libc::EACCES) =>
            {
                Self::NotPermitted { id, action }
            }
            _ => Self::Netlink {
                id,
                action,
                source: Box::new(source),
            },
        }
    }

    /// Of a file.
    pub(super) fn io(
        id: &str,
        action: &'static str,
        path: &std::path::Path,
    ) -> impl FnOnce(io::Error) -> Self + use<> {
        let (id, path) = (id.to_owned(), path.to_owned());
        move |source| Self::Io {
            id,
            action,
            path,
            source,
        }
    }
}
