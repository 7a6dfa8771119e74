//! The channel for a backend's own requests (SET_BACKEND_REQ_FD), as this end hears it.
//!
//! Only CONFIG_CHANGE_MSG is carried out; every other request is refused, and descriptors that
//! come with one are never received. A backend may send as much as it likes: it is listened to
//! for a moment, then not before [`INTERVAL`] has passed, and its messages fill its own socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, recv, send};
use vhost::vhost_user::message::BackendReq;

/// Between two looks at what the backend sends.
const INTERVAL: Duration = Duration::from_millis(100);
const HEADER_BYTES: usize = 12;
const MAX_PAYLOAD_BYTES: usize = 4096;
const VERSION_MASK: u32 = 3;
const VERSION: u32 = 1;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Why the backend is no longer heard. Its connection goes on.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChannelEnd {
    #[error("the backend closed its channel")]
    HungUp,
    #[error("the backend's channel is out of step")]
    Malformed,
    #[error("the backend's channel failed")]
    Socket(#[from] nix::Error),
}

/// This end of the channel.
#[derive(Debug)]
pub(super) struct RequestChannel {
    socket: UnixStream,
    /// The part of a message that has arrived.
    unread: Vec<u8>,
    quiet_until: Option<Instant>,
}

impl RequestChannel {
    /// A channel, and the end to give to the backend.
    ///
    /// # Errors
    /// No descriptors are left.
    pub(super) fn new() -> io::Result<(RequestChannel, UnixStream)> {
        let (socket, theirs) = UnixStream::pair()?;
        let channel = RequestChannel {
            socket,
            unread: Vec::new(),
            quiet_until: None,
        };
        Ok((channel, theirs))
    }

    /// When to look at the channel again; None: when it is readable.
    pub(super) fn quiet_until(&self) -> Option<Instant> {
        self.quiet_until.filter(|until| *until > Instant::now())
    }

    /// Takes what arrived, at most one message's worth of bytes; whether the backend says that its
    /// configuration changed.
    ///
    /// # Errors
    /// [`ChannelEnd`]; the channel is of no use any more.
    pub(super) fn hear(&mut self) -> Result<bool, ChannelEnd> {
        self.quiet_until = Some(Instant::now() + INTERVAL);
        let mut bytes = [0; HEADER_BYTES + MAX_PAYLOAD_BYTES];
        // Without room for descriptors the kernel drops them.
        match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Err(ChannelEnd::HungUp),
            Ok(received) => self.unread.extend(&bytes[..received]),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        let mut config_changed = false;
        while let Some(header) = self.unread.first_chunk::<HEADER_BYTES>() {
            let word = |at: usize| {
                u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
            };
            let (request, flags, payload_bytes) = (word(0), word(4), word(8) as usize);
            if flags & VERSION_MASK != VERSION
                || flags & FLAG_REPLY != 0
                || payload_bytes > MAX_PAYLOAD_BYTES
            {
                return Err(ChannelEnd::Malformed);
            }
            if self.unread.len() < HEADER_BYTES + payload_bytes {
                break;
            }
            self.unread.drain(..HEADER_BYTES + payload_bytes);
            let is_known = request == BackendReq::CONFIG_CHANGE_MSG as u32 && payload_bytes == 0;
            config_changed |= is_known;
            if flags & FLAG_NEED_REPLY != 0 {
                self.answer(request, !is_known)?;
            }
        }
        Ok(config_changed)
    }

    fn answer(&self, request: u32, refused: bool) -> Result<(), ChannelEnd> {
        let header = [request, VERSION | FLAG_REPLY, 8].map(u32::to_ne_bytes);
        let answer = [&header.concat()[..], &u64::from(refused).to_ne_bytes()].concat();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.socket.as_raw_fd(), &answer, flags) {
            Ok(sent) if sent == answer.len() => Ok(()),
            // Whoever asks for answers reads them.
            Ok(_) => Err(ChannelEnd::Malformed),
            Err(error) => Err(error.into()),
        }
    }
}

/// Readable when [`RequestChannel::hear`] has something to do.
impl AsFd for RequestChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, IoSlice, Read, Write};

    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    const CONFIG_CHANGE: u32 = 2;
    const VRING_HOST_NOTIFIER: u32 = 3;

    fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let header = [request, flags, payload.len() as u32].map(u32::to_ne_bytes);
        [&header.concat()[..], payload].concat()
    }

    fn answer_to(theirs: &mut UnixStream) -> (u32, u64) {
        let mut answer = [0; 20];
        theirs.read_exact(&mut answer).unwrap();
        assert_eq!(
            answer[4..12],
            message(0, VERSION | FLAG_REPLY, &[0; 8])[4..12]
        );
        (
            u32::from_ne_bytes(answer[..4].try_into().unwrap()),
            u64::from_ne_bytes(answer[12..].try_into().unwrap()),
        )
    }

    #[test]
    fn configuration_change_is_heard_and_answered_when_an_answer_is_wanted() {
        let (mut channel, mut theirs) = RequestChannel::new().unwrap();
        theirs
            .write_all(&message(CONFIG_CHANGE, VERSION, &[]))
            .unwrap();
        assert!(channel.hear().unwrap());
        theirs.set_nonblocking(true).unwrap();
        let silence = theirs.read(&mut [0]).unwrap_err();
        assert_eq!(silence.kind(), ErrorKind::WouldBlock);

        let with_answer = message(CONFIG_CHANGE, VERSION | FLAG_NEED_REPLY, &[]);
        for byte in &with_answer[..11] {
            theirs.write_all(&[*byte]).unwrap();
            assert!(!channel.hear().unwrap(), "not whole yet");
        }
        theirs.write_all(&with_answer[11..]).unwrap();
        assert!(channel.hear().unwrap());
        assert_eq!(answer_to(&mut theirs), (CONFIG_CHANGE, 0));
    }

    #[test]
    fn requests_with_descriptors_are_refused_and_nothing_is_received() {
        let (mut channel, mut theirs) = RequestChannel::new().unwrap();
        let (passed, mut kept) = UnixStream::pair().unwrap();
        let request = message(VRING_HOST_NOTIFIER, VERSION | FLAG_NEED_REPLY, &[0; 24]);
        let fds = [passed.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        let iov = [IoSlice::new(&request)];
        sendmsg::<()>(theirs.as_raw_fd(), &iov, &rights, MsgFlags::empty(), None).unwrap();
        drop(passed);
        assert!(!channel.hear().unwrap());
        assert_eq!(answer_to(&mut theirs), (VRING_HOST_NOTIFIER, 1));
        assert_eq!(kept.read(&mut [0]).unwrap(), 0, "nobody has the descriptor");
    }

    #[test]
    fn flood_is_taken_in_small_parts_and_then_left_alone_for_a_while() {
        let (mut channel, theirs) = RequestChannel::new().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let flood = message(CONFIG_CHANGE, VERSION, &[]).repeat(1000);
        while (&theirs).write(&flood).is_ok() {}
        assert_eq!(channel.quiet_until(), None);
        assert!(channel.hear().unwrap());
        assert!(channel.unread.len() < HEADER_BYTES);
        assert!(channel.quiet_until().is_some());
        assert!(
            (&theirs).write(&flood).is_err(),
            "the flood fills its own socket"
        );
    }

    #[test]
    fn backend_that_asks_for_answers_and_reads_none_is_heard_no_more() {
        let (mut channel, theirs) = RequestChannel::new().unwrap();
        let request = message(CONFIG_CHANGE, VERSION | FLAG_NEED_REPLY, &[]);
        let end = (0..1_000_000).find_map(|_| {
            (&theirs).write_all(&request).unwrap();
            channel.hear().err()
        });
        assert!(
            matches!(end, Some(ChannelEnd::Socket(nix::Error::EAGAIN))),
            "{end:?}"
        );
    }

    #[test]
    fn rubbish_ends_the_channel() {
        for rubbish in [
            message(CONFIG_CHANGE, 2, &[]),
            message(CONFIG_CHANGE, VERSION | FLAG_REPLY, &[]),
            [2, VERSION, 4097].map(u32::to_ne_bytes).concat(),
            vec![0xff; 100],
        ] {
            let (mut channel, mut theirs) = RequestChannel::new().unwrap();
            theirs.write_all(&rubbish).unwrap();
            assert!(matches!(channel.hear(), Err(ChannelEnd::Malformed)));
        }
        let (mut channel, _) = RequestChannel::new().unwrap();
        assert!(matches!(channel.hear(), Err(ChannelEnd::HungUp)));
    }
}
