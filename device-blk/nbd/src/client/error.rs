//! Why a remote disk cannot be used, at first or once more.

use std::io;

use super::handshake::HandshakeError;

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Asked for in vain.
    #[error("NBD: {0}")]
    Options(&'static str),
    /// No connection.
    #[error("NBD: cannot connect")]
    Dial(#[source] io::Error),
    /// A connection, but no use.
    #[error("NBD")]
    Handshake(#[source] HandshakeError),
    /// The export can only be read.
    #[error("NBD: the server exports the disk for reading only; attach it read-only")]
    ReadOnly,
    /// No write could be made durable one by one.
    #[error("NBD: the server has no FUA, so that single writes cannot be made durable")]
    NoFua,
    /// Came back different.
    #[error(
        "NBD: the disk had {was_bytes} bytes and now has {is_bytes}; restore the export to its size"
    )]
    Shrunk {
        /// Before.
        was_bytes: u64,
        /// Now.
        is_bytes: u64,
    },
    /// Came back different.
    #[error("NBD: the server no longer offers what it did: {0}")]
    Changed(&'static str),
    /// No threads or descriptors left.
    #[error("NBD: cannot start")]
    Resources(#[source] io::Error),
}

impl ConnectError {
    /// No later attempt can succeed: the disk belongs to somebody else.
    pub fn is_final(&self) -> bool {
        matches!(
            self,
            Self::Handshake(HandshakeError::Refused { .. } | HandshakeError::NoClaims)
        )
    }

    /// With its causes, for people.
    pub fn describe(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }
}
