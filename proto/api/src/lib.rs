//! What Mortise's processes say to one another: messages and services generated from
//! `proto/api/proto`, and what every server of them shares.

pub mod boottime;
pub mod connect;
pub mod daemon;
pub mod dirs;
pub mod errors;
pub mod fault_control;
pub mod fds;
pub mod latency;
pub mod limits;
pub mod listen;
pub mod metrics;
pub mod names;
pub mod rate;
pub mod serve;
pub mod tls;
pub mod validate;

/// Generated, one module for each part of the packages' names: messages of one package refer to those of
/// another by these.
#[allow(missing_docs, clippy::all, unreachable_pub)]
mod mortise {
    pub mod vmm {
        pub mod v1 {
            tonic::include_proto!("mortise.vmm.v1");
        }
    }
    pub mod device {
        pub mod v1 {
            tonic::include_proto!("mortise.device.v1");
        }
    }
    pub mod node {
        pub mod v1 {
            tonic::include_proto!("mortise.node.v1");
        }
    }
    pub mod controller {
        pub mod v1 {
            tonic::include_proto!("mortise.controller.v1");
        }
    }
}

/// Of `mortise/controller/v1/*.proto`: what users talk to.
pub use mortise::controller::v1 as controller;
/// Of `mortise/device/v1/*.proto`: the control socket of a device daemon.
pub use mortise::device::v1 as device;
/// Of `mortise/node/v1/*.proto`: the node agent.
pub use mortise::node::v1 as node;
/// Of `mortise/vmm/v1/vmm.proto`: the control socket of `vmm-core`.
pub use mortise::vmm::v1 as vmm;

/// Rises when what controllers and agents say to one another changes so that a version before the last one
/// would not understand it. Neighbours do: agents are exchanged one by one, under a running controller.
pub const PROTOCOL: u32 = 1;

/// All services' descriptors, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/mortise.bin"));
