//! How a remote disk is doing, for people and metrics.

/// How a client is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Requests are served.
    Serving,
    /// The server owes answers and is silent.
    Stalled,
    /// Requests wait.
    Reconnecting {
        /// Of the last attempt, or how the connection was lost.
        reason: String,
    },
    /// Requests fail.
    Failed {
        /// Why.
        reason: String,
    },
}

/// A snapshot for people and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Now.
    pub state: State,
    /// Sessions lost so far.
    pub reconnects: u64,
    /// Connections of the session.
    pub connections: usize,
    /// Every byte is encrypted.
    pub is_encrypted: bool,
}
