//! The controller's program as its users see it: real processes, real sockets. The host behind it is
//! simulated where the test is about the controller, and real where it is about both.

mod access;
mod certificates;
mod compatibility;
mod disks;
mod events;
mod fault_campaign;
mod faults;
mod fleet;
#[allow(dead_code, reason = "node-agent's tests use the other guests")]
#[path = "../../node-agent/tests/processes/guest.rs"]
mod guest;
mod harness;
mod host_upgrades;
mod kill_orders;
mod networks;
mod operations;
mod pools;
mod replicas;
mod schema;
mod simulated;
mod standalone;
mod traces;
mod two_hosts;
mod upgrades;
mod uploads;
mod vms;
mod volumes;
