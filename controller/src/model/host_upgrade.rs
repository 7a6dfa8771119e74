//! The rolling upgrade of hosts that is under way, if one is:
//!
//! ```text
//! host-upgrade    HostUpgradeRecord; there is one at a time
//! ```

use prost::Message;

/// Key of the upgrade that is under way.
pub const HOST_UPGRADE: &str = "host-upgrade";

/// A rolling upgrade, until its operation is done.
#[derive(Clone, PartialEq, Message)]
pub struct HostUpgradeRecord {
    /// Name of its operation.
    #[prost(string, tag = "1")]
    pub operation: String,
    /// The agent's binary on hosts; empty: agents stay.
    #[prost(string, tag = "2")]
    pub agent_binary: String,
    /// The daemons'; empty: these stay.
    #[prost(string, tag = "3")]
    pub device_blk: String,
    /// The daemons'; empty: these stay.
    #[prost(string, tag = "4")]
    pub device_net: String,
    /// Hosts that are unavailable at one time, at most; at least 1.
    #[prost(uint32, tag = "5")]
    pub max_unavailable: u32,
    /// Devices at risk at one time on each.
    #[prost(uint32, tag = "6")]
    pub max_devices_unavailable: u32,
    /// How long a new agent has.
    #[prost(uint32, tag = "7")]
    pub confirm_ms: u32,
    /// In the order in which they are taken.
    #[prost(message, repeated, tag = "8")]
    pub hosts: Vec<HostProgress>,
    /// No further host begins.
    #[prost(bool, tag = "9")]
    pub cancel: bool,
}

/// How far a host is.
#[derive(Clone, PartialEq, Message)]
pub struct HostProgress {
    /// Its id.
    #[prost(string, tag = "1")]
    pub host: String,
    /// How far.
    #[prost(enumeration = "UpgradeStage", tag = "2")]
    pub stage: i32,
    /// What it waits for, or why it failed.
    #[prost(string, tag = "3")]
    pub note: String,
    /// What was done, for people.
    #[prost(string, repeated, tag = "4")]
    pub findings: Vec<String>,
    /// Ids there of VMs that ran when it began.
    #[prost(string, repeated, tag = "5")]
    pub ran: Vec<String>,
    /// What it said of itself when it began.
    #[prost(string, tag = "6")]
    pub problem_before: String,
}

/// Where a host is in an upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum UpgradeStage {
    /// Not begun.
    Waiting = 0,
    /// Its agent is being exchanged.
    Agent = 1,
    /// Its daemons are.
    Daemons = 2,
    /// All of it is exchanged.
    Done = 3,
    /// It is as before, or nobody knows; `note` says why.
    Failed = 4,
}

impl HostUpgradeRecord {
    /// What hosts know the exchange of their agent by.
    pub fn id(&self) -> &str {
        super::job_id(&self.operation)
    }
}
