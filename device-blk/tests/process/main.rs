//! The real `device-blk` process, driven by third parties: the `virtio-driver` crate as a
//! vhost-user frontend, QEMU's tools, and gRPC clients.

mod blocks;
mod broken_chains;
mod control;
mod crash;
mod daemon;
mod driver;
mod encrypted;
mod encrypted_jobs;
mod faults;
mod field_bugs;
mod ghosts;
mod injected;
mod io;
mod job_faults;
mod jobs;
mod jobs_crash;
mod layers;
mod leased;
mod lifecycle;
mod limits;
mod locks;
mod lost_cache;
mod polling;
mod qcow2;
mod qcow2_crash;
mod qcow2_faults;
mod qemu;
mod remote;
mod remote_jobs;
mod sandboxed;
mod wrong_requests;
