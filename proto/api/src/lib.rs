//! What Mortise's processes say to one another: messages and services generated from
//! `proto/api/proto`, and what every server of them shares.

pub mod connect;
pub mod daemon;
pub mod dirs;
pub mod errors;
pub mod fds;
pub mod limits;
pub mod listen;
pub mod metrics;
pub mod names;
pub mod rate;
pub mod serve;
pub mod validate;

/// Generated from `mortise/vmm/v1/vmm.proto`: the control socket of `vmm-core`.
#[allow(missing_docs, clippy::all)]
pub mod vmm {
    tonic::include_proto!("mortise.vmm.v1");
}
/// Generated from `mortise/device/v1/device.proto`: the control socket of a device daemon.
#[allow(missing_docs, clippy::all)]
pub mod device {
    tonic::include_proto!("mortise.device.v1");
}
/// Generated from `mortise/node/v1/node.proto`: the node agent.
#[allow(missing_docs, clippy::all)]
pub mod node {
    tonic::include_proto!("mortise.node.v1");
}
/// Generated from `mortise/controller/v1/*.proto`: what users talk to.
#[allow(missing_docs, clippy::all)]
pub mod controller {
    tonic::include_proto!("mortise.controller.v1");
}

/// All services' descriptors, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/mortise.bin"));
