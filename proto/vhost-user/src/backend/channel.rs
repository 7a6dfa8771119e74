//! The channel for a backend's own requests (SET_BACKEND_REQ_FD): tells the frontend that the
//! device configuration changed.
//!
//! ```text
//!            changed: CONFIG_CHANGE_MSG
//!   quiet ─────────────────────────────▶ awaiting (only with REPLY_ACK) ─┐ changed: once more,
//!     ▲                                        │                         │ after the answer
//!     └──────────────── answered ──────────────┴─────────────────────────┘
//! ```
//!
//! The frontend is not trusted: nothing here blocks, and a frontend that does not read or does not
//! answer hears no more.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::sockopt::SockType as SockTypeOption;
use nix::sys::socket::{MsgFlags, SockType, getsockopt, recv, send};
use vhost::vhost_user::message::BackendReq;

use super::connection::{FLAG_NEED_REPLY, FLAG_REPLY, HEADER_BYTES, PROTOCOL_VERSION, word_at};

/// A header and 64 bits.
const ANSWER_BYTES: usize = HEADER_BYTES + 8;

/// See the module's description.
#[derive(Debug, Default)]
pub(super) struct ConfigNotice {
    socket: Option<OwnedFd>,
    asks_for_answers: bool,
    /// The frontend has yet to be told.
    is_due: bool,
    is_awaiting: bool,
    /// The part of an answer that has arrived.
    answer: Vec<u8>,
}

impl ConfigNotice {
    /// Uses `socket` from now on.
    ///
    /// # Errors
    /// It is no stream socket.
    pub(super) fn open(&mut self, socket: OwnedFd, asks_for_answers: bool) -> io::Result<()> {
        if getsockopt(&socket, SockTypeOption)? != SockType::Stream {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        *self = ConfigNotice {
            socket: Some(socket),
            asks_for_answers,
            is_due: self.is_due,
            is_awaiting: false,
            answer: Vec::new(),
        };
        self.tell();
        Ok(())
    }

    /// Readable when [`ConfigNotice::hear`] has something to do.
    pub(super) fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// The device configuration changed.
    pub(super) fn changed(&mut self) {
        self.is_due = true;
        self.tell();
    }

    /// Takes what the frontend sent on the channel.
    pub(super) fn hear(&mut self) {
        let Some(socket) = &self.socket else { return };
        let mut bytes = [0; ANSWER_BYTES];
        let missing = ANSWER_BYTES - self.answer.len();
        match recv(
            socket.as_raw_fd(),
            &mut bytes[..missing],
            MsgFlags::MSG_DONTWAIT,
        ) {
            Ok(0) => return self.close("the frontend closed it"),
            Ok(received) => self.answer.extend(&bytes[..received]),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return,
            Err(error) => return self.close(error.desc()),
        }
        if !self.is_awaiting {
            return self.close("the frontend spoke unasked");
        }
        if self.answer.len() < ANSWER_BYTES {
            return;
        }
        let answer = std::mem::take(&mut self.answer);
        let header = [0, 4, 8].map(|at| word_at(&answer, at));
        let expected = [
            BackendReq::CONFIG_CHANGE_MSG as u32,
            PROTOCOL_VERSION | FLAG_REPLY,
            8,
        ];
        if header != expected {
            return self.close("the frontend's answer is none");
        }
        if answer[HEADER_BYTES..] != [0; 8] {
            tracing::warn!("the frontend could not take the changed configuration");
        }
        self.is_awaiting = false;
        self.tell();
    }

    fn tell(&mut self) {
        let Some(socket) = &self.socket else { return };
        if !self.is_due || self.is_awaiting {
            return;
        }
        let need_reply = if self.asks_for_answers {
            FLAG_NEED_REPLY
        } else {
            0
        };
        let message = [
            BackendReq::CONFIG_CHANGE_MSG as u32,
            PROTOCOL_VERSION | need_reply,
            0,
        ]
        .map(u32::to_ne_bytes)
        .concat();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(socket.as_raw_fd(), &message, flags) {
            Ok(sent) if sent == message.len() => {
                self.is_due = false;
                self.is_awaiting = self.asks_for_answers;
            }
            Ok(_) => self.close("a message did not fit"),
            // Unread messages fill it, and they say the same.
            Err(nix::Error::EAGAIN) => self.is_due = false,
            Err(error) => self.close(error.desc()),
        }
    }

    fn close(&mut self, reason: &str) {
        tracing::debug!(reason, "the channel for the backend's requests ends");
        self.socket = None;
        self.answer.clear();
    }
}
