//! The agent with real `vmm-core` and daemon processes, on guests of a few instructions that any
//! /dev/kvm runs, an interpreting one too.
//!
//! The other programs are taken from the directory of the agent's own; `cargo build` makes them.

mod adoption;
mod failures;
mod faults;
mod guest;
mod harness;
mod leases;
mod lifecycle;
mod outages;
mod resources;
mod seed;
mod stand_in;
mod storage;
mod upgrade;
mod user_network;
