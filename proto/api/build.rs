//! Compiles the `.proto` files without protoc and keeps the descriptor set for reflection.

use std::path::PathBuf;

use prost::Message;

const PROTOS: &[&str] = &[
    "mortise/vmm/v1/vmm.proto",
    "mortise/device/v1/device.proto",
    "mortise/device/v1/policy.proto",
    "mortise/device/v1/nics.proto",
    "mortise/device/v1/disks.proto",
    "mortise/device/v1/faults.proto",
    "mortise/device/v1/leases.proto",
    "mortise/node/v1/networks.proto",
    "mortise/node/v1/upgrade.proto",
    "mortise/node/v1/node.proto",
    "mortise/node/v1/nics.proto",
    "mortise/node/v1/devices.proto",
    "mortise/node/v1/faults.proto",
    "mortise/node/v1/leases.proto",
    "mortise/node/v1/agents.proto",
    "mortise/controller/v1/placement.proto",
    "mortise/controller/v1/vms.proto",
    "mortise/controller/v1/volumes.proto",
    "mortise/controller/v1/networks.proto",
    "mortise/controller/v1/disks.proto",
    "mortise/controller/v1/nics.proto",
    "mortise/controller/v1/devices.proto",
    "mortise/controller/v1/upgrades.proto",
    "mortise/controller/v1/hosts.proto",
    "mortise/controller/v1/host_upgrades.proto",
    "mortise/controller/v1/operations.proto",
    "mortise/controller/v1/events.proto",
    "mortise/controller/v1/faults.proto",
    "mortise/controller/v1/watches.proto",
    "mortise/controller/v1/audit.proto",
    "mortise/controller/v1/state.proto",
    "mortise/controller/v1/projects.proto",
    "mortise/controller/v1/certificates.proto",
    "mortise/controller/v1/pools.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?).join("mortise.bin");
    std::fs::write(out, descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        // Seeds hold passwords: `validate::cloud_init` says how they are printed.
        .skip_debug([
            "mortise.node.v1.CloudInit",
            "mortise.controller.v1.CloudInit",
        ])
        // The same message is to have the same bytes: requests are told apart by their digests.
        .btree_map(".")
        .compile_fds(descriptors)?;
    Ok(())
}
