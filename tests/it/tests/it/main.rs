//! Integration tests: real processes, third-party peers, real guests. One binary.
//!
//! Modules under `nested` need a KVM that can run Linux; `cargo lab test` runs them inside the
//! nested host, or directly where hardware KVM is there. `cargo lab env` prints the variables that
//! the others need when they are run by cargo alone.

mod clocks;
mod guest_run;
mod layering;
mod nested;
mod process;
mod qemu;
mod qemu_formats;
mod qemu_frontend;
mod qemu_kills;
mod qemu_resize;
mod qemu_switch;
mod reflection;
mod site;
