//! The controller: users ask it for VMs over gRPC, it keeps what they want in its store and makes
//! hosts' node agents do it.
//!
//! ```text
//! api        gRPC handlers: requests in, answers out
//! commands   what users can ask for, as transactions on the store
//! store      (a crate) where state is kept, for one controller or many; model: the records in it
//! plan       pure: (wanted, seen) -> actions
//! leader     (of store) which of several controllers acts, and what keeps the others from it
//! reconciler the loop: load, look, plan, act
//! faults     experiments: runs, what they saw, their verdicts
//! node       the connection to a host's agent; agent: starts one in standalone mode
//! ```

pub mod agent;
pub mod api;
pub mod commands;
pub mod faults;
pub mod metrics;
pub mod model;
pub mod node;
pub mod options;
pub mod plan;
pub mod query;
pub mod reconciler;

/// Records' home, and who leads: a crate of its own.
pub use ::store;
pub use ::store::leader;
