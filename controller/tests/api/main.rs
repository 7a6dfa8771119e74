//! The controller's program as its users see it: real processes, real sockets. The host behind it is
//! simulated where the test is about the controller, and real where it is about both.

mod disks;
mod events;
mod faults;
mod harness;
mod networks;
mod operations;
mod simulated;
mod standalone;
mod upgrades;
mod uploads;
mod vms;
mod volumes;
