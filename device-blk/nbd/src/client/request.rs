//! What a client can be asked for.

use std::sync::mpsc;

/// One command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Data for [`Request::store`].
    Read {
        /// Where.
        offset_bytes: u64,
        /// At most [`super::Client::max_payload_bytes`].
        len_bytes: u32,
    },
    /// Data from [`Request::payload`].
    Write {
        /// Where.
        offset_bytes: u64,
        /// At most [`super::Client::max_payload_bytes`].
        len_bytes: u32,
        /// Answer only when it is on stable storage.
        fua: bool,
    },
    /// Zeroes, without sending them.
    WriteZeroes {
        /// Where.
        offset_bytes: u64,
        /// Any.
        len_bytes: u32,
        /// The space may be given back.
        may_unmap: bool,
        /// Answer only when it is on stable storage.
        fua: bool,
    },
    /// The content no longer matters. Succeeds without a word to a server that cannot.
    Trim {
        /// Where.
        offset_bytes: u64,
        /// Any.
        len_bytes: u32,
    },
    /// Everything that was answered before is on stable storage afterwards.
    Flush,
}

impl Command {
    pub(super) fn range(&self) -> Option<(u64, u32)> {
        match *self {
            Self::Read {
                offset_bytes,
                len_bytes,
            }
            | Self::Write {
                offset_bytes,
                len_bytes,
                ..
            }
            | Self::WriteZeroes {
                offset_bytes,
                len_bytes,
                ..
            }
            | Self::Trim {
                offset_bytes,
                len_bytes,
            } => Some((offset_bytes, len_bytes)),
            Self::Flush => None,
        }
    }

    pub(super) fn writes(&self) -> bool {
        matches!(
            self,
            Self::Write { .. } | Self::WriteZeroes { .. } | Self::Trim { .. }
        )
    }
}

/// A command with its data, wherever that is.
///
/// Everything is called on a thread of the client, which waits for nobody: so must these
/// functions. After a reconnect data is asked for and stored again from the start.
pub trait Request: Send {
    /// Always the same.
    fn command(&self) -> Command;

    /// Fills `into` with what is to be written, from byte `at` of the command's range on.
    fn payload(&mut self, at_bytes: usize, into: &mut [u8]);

    /// Takes what was read, from byte `at` of the command's range on. In any order; the request
    /// has failed unless [`Self::complete`] says otherwise.
    fn store(&mut self, at_bytes: usize, from: &[u8]);

    /// Nobody waits for it any more, which stays so: it need not be sent, or sent again. See
    /// [`super::Client::release_abandoned`].
    fn is_abandoned(&self) -> bool {
        false
    }

    /// The last call.
    ///
    /// # Errors
    /// The number that the server gave, or EIO; ESHUTDOWN after [`super::Client::abandon`] and
    /// ECANCELED for what is abandoned.
    fn complete(self: Box<Self>, result: Result<(), i32>);
}

/// A request whose issuer waits for it.
pub(super) struct Awaited {
    pub(super) command: Command,
    pub(super) data: Vec<u8>,
    pub(super) done: mpsc::SyncSender<Result<Vec<u8>, i32>>,
}

impl Request for Awaited {
    fn command(&self) -> Command {
        self.command
    }

    fn payload(&mut self, at_bytes: usize, into: &mut [u8]) {
        into.copy_from_slice(&self.data[at_bytes..at_bytes + into.len()]);
    }

    fn store(&mut self, at_bytes: usize, from: &[u8]) {
        self.data[at_bytes..at_bytes + from.len()].copy_from_slice(from);
    }

    fn complete(self: Box<Self>, result: Result<(), i32>) {
        let Self { data, done, .. } = *self;
        // Nobody may wait any more.
        let _ = done.try_send(result.map(|()| data));
    }
}
