//! Projects as stored.

use api::controller as pb;
use prost::Message;

use super::prefix;

/// There while projects other than the default one have to be made before anything is made in them.
pub const EXPLICIT_PROJECTS: &str = "explicit-projects";

/// What may be in a project, as prefixes of keys.
pub const PROJECT_COLLECTIONS: [&str; 5] = [
    prefix::VMS,
    prefix::VOLUMES,
    prefix::NETWORKS,
    prefix::SECURITY_GROUPS,
    prefix::FAULT_EXPERIMENTS,
];

/// A project as stored.
#[derive(Clone, PartialEq, Message)]
pub struct ProjectRecord {
    /// What users see.
    #[prost(message, required, tag = "1")]
    pub project: pb::Project,
    /// Nothing is to be made in it any more.
    #[prost(bool, tag = "2")]
    pub deleting: bool,
    /// Of the request that made it.
    #[prost(string, tag = "3")]
    pub request_id: String,
    /// Of that request, to tell a repetition from a clash.
    #[prost(bytes = "vec", tag = "4")]
    pub fingerprint: Vec<u8>,
}

/// Key of a project.
pub fn project_key(id: &str) -> String {
    format!("{}{id}", prefix::PROJECTS)
}

/// Key that changes with all that counts against a project's quota.
pub fn quota_fence_key(id: &str) -> String {
    format!("quota-fence/{id}")
}
