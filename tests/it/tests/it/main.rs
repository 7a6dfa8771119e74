//! Integration tests: real processes, third-party peers, real guests. One binary.
//!
//! Modules under `nested` need a KVM that can run Linux and are run by `cargo lab test` inside
//! the nested host (or directly where hardware KVM is there).

mod layering;
