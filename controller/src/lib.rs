//! The controller: users ask it for VMs over gRPC, it keeps what they want in its store and makes
//! hosts' node agents do it.
//!
//! ```text
//! gate       what requests pass first: auth (who may do what), rates, the audit log; telemetry: traces
//! api        gRPC handlers: requests in, answers out; query: filters, orders and masks of lists
//! commands   what users can ask for, as transactions on the store
//! store      (a crate) where state is kept, for one controller or many; model: the records in it
//! plan       pure: (wanted, seen) -> actions
//! leader     (of store) which of several controllers acts, and what keeps the others from it
//! hosts      all hosts: connections, what was seen; scheduler: which of them gets a VM
//! leases     which hosts are lost; failover: what is taken from them
//! reconciler the loop: load, look, plan, act; cache: what is wanted, in memory; focus: what is looked at
//! host_upgrades rolling upgrades of agents and daemons, some hosts at a time
//! faults     experiments: runs, what they saw, their verdicts
//! certificates what is shown and believed by TLS: the authority, tokens of hosts that join
//! node       the connection to a host's agent; agent: starts one in standalone mode
//! ```

pub mod agent;
pub mod api;
pub mod cache;
pub mod certificates;
pub mod commands;
pub mod failover;
pub mod faults;
pub mod focus;
pub mod host_upgrades;
pub mod hosts;
pub mod leases;
pub mod metrics;
pub mod model;
pub mod moving;
pub mod node;
pub mod options;
pub mod plan;
pub mod query;
pub mod reach;
pub mod reconciler;
pub mod scheduler;

/// Records' home, and who leads: a crate of its own.
pub use ::store;
pub use ::store::leader;
