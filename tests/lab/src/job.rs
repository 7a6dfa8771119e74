//! What is run on real KVM, and what it reports: the same directly and in a nested host.

use serde::{Deserialize, Serialize};

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "job", rename_all = "snake_case")]
pub(crate) enum Job {
    /// A developer's command, on the host's console.
    Command { argv: Vec<String> },
}

/// One line of JSON from a running job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// A step began, for people.
    Step { text: String },
    /// The job ended; nothing follows.
    End { code: i32, error: Option<String> },
}
