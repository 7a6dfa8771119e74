//! The transmission phase of one connection, as the server.
//!
//! The connection's thread receives requests and sends answers; disk work is done by the
//! server's [`super::pool::Pool`], many requests of a connection at a time. Whatever ends the
//! connection, the thread waits for the work that has begun: a client that sees the connection
//! closed knows that none of its writes is still to come.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::Served;
use super::handshake::Agreed;
use super::task::{Answer, Task};
use crate::channel::{Channel, Received};
use crate::inbox::Inbox;
use crate::wire::{
    self, ChunkHeader, DEFAULT_MAX_PAYLOAD_BYTES, RequestHeader, chunk, command, errno,
};

/// Requests under way on one connection.
const MAX_INFLIGHT: usize = 128;
/// Data under way on one connection, received and to be sent; a single request may exceed it.
const MAX_INFLIGHT_BYTES: usize = 32 << 20;
/// How long a client may not take what it asked for.
const SEND_TIMEOUT: Duration = Duration::from_secs(60);

/// Serves until the client goes, breaks the protocol, or `stop` is set and `answers` woken.
///
/// # Errors
/// How the connection broke, if it did.
pub(super) fn serve(
    agreed: Agreed,
    served: &Served,
    answers: &Arc<Inbox<Answer>>,
    stop: &AtomicBool,
) -> io::Result<()> {
    let mut connection = Connection {
        agreed,
        served,
        answers,
        stop,
        incoming: Incoming::Header,
        inflight: 0,
        inflight_bytes: 0,
        ending: None,
        last_sent: Instant::now(),
    };
    let end = loop {
        if let Some(end) = connection.step() {
            break end;
        }
    };
    connection.await_tasks();
    end
}

struct Connection<'a> {
    agreed: Agreed,
    served: &'a Served,
    answers: &'a Arc<Inbox<Answer>>,
    stop: &'a AtomicBool,
    incoming: Incoming,
    inflight: usize,
    inflight_bytes: usize,
    /// No further request is taken; what is under way is completed and answered.
    ending: Option<io::Result<()>>,
    /// When the client last took something, or there was nothing to take.
    last_sent: Instant,
}

enum Incoming {
    Header,
    /// The data of a write, so far.
    Data {
        header: RequestHeader,
        data: Vec<u8>,
    },
    /// Data of a write that is refused.
    Skip {
        header: RequestHeader,
        left_bytes: usize,
        error: u32,
    },
}

/// What a client must not send.
struct Breach(&'static str);

impl Connection<'_> {
    fn channel(&mut self) -> &mut Channel {
        &mut self.agreed.channel
    }

    /// One round; `Some` when the connection is over.
    fn step(&mut self) -> Option<io::Result<()>> {
        while let Some(answer) = self.answers.pop() {
            self.answer(answer);
        }
        if let Err(error) = self.send() {
            return Some(Err(error));
        }
        if self.stop.load(Ordering::SeqCst) && self.ending.is_none() {
            self.ending = Some(Ok(()));
        }
        if self.ending.is_some() && self.inflight == 0 && self.agreed.channel.unsent_bytes() == 0 {
            self.channel().close_write();
            return self.ending.take();
        }
        let takes_requests = self.takes_requests();
        if takes_requests {
            match self.receive() {
                Ok(true) => return None,
                Ok(false) => (),
                Err(error) => return Some(Err(error)),
            }
        }
        self.sleep()
    }

    fn takes_requests(&self) -> bool {
        self.ending.is_none()
            && self.inflight < MAX_INFLIGHT
            && self.inflight_bytes + self.agreed.channel.unsent_bytes() < MAX_INFLIGHT_BYTES
    }

    fn send(&mut self) -> io::Result<()> {
        let before = self.agreed.channel.unsent_bytes();
        let is_done = self.channel().send()?;
        if is_done || self.agreed.channel.unsent_bytes() < before {
            self.last_sent = Instant::now();
        } else if self.last_sent.elapsed() >= SEND_TIMEOUT {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the client does not take its answers",
            ));
        }
        Ok(())
    }

    /// True when something came.
    fn receive(&mut self) -> io::Result<bool> {
        // What was received already may have waited for room.
        if self.take_requests() {
            return Ok(true);
        }
        match self.channel().receive()? {
            Received::Nothing => Ok(false),
            Received::Bytes => {
                self.take_requests();
                Ok(true)
            }
            Received::End => {
                self.ending = Some(Ok(()));
                Ok(true)
            }
        }
    }

    fn sleep(&mut self) -> Option<io::Result<()>> {
        let timeout = if self.agreed.channel.unsent_bytes() > 0 {
            SEND_TIMEOUT
        } else {
            Duration::from_secs(3600)
        };
        // Once it is heeded, stopping is no reason to stay awake.
        let never = AtomicBool::new(false);
        let flag = if self.ending.is_some() {
            &never
        } else {
            self.stop
        };
        if !self.answers.fall_asleep(true, flag) {
            return None;
        }
        let wants_input = self.takes_requests();
        match self
            .agreed
            .channel
            .wait(wants_input, self.answers.wake_fd(), timeout)
        {
            Ok(ready) => {
                if ready.woken {
                    self.answers.woke_up();
                }
                None
            }
            Err(error) => Some(Err(error)),
        }
    }

    /// Takes requests off what has been received; true if there was any.
    fn take_requests(&mut self) -> bool {
        let mut took_any = false;
        while self.takes_requests() {
            match self.take_request() {
                Ok(true) => took_any = true,
                Ok(false) => break,
                Err(Breach(what)) => {
                    self.ending = Some(Err(io::Error::new(io::ErrorKind::InvalidData, what)));
                    return true;
                }
            }
        }
        took_any
    }

    /// False when more has to be received first.
    fn take_request(&mut self) -> Result<bool, Breach> {
        match std::mem::replace(&mut self.incoming, Incoming::Header) {
            Incoming::Header => self.take_header(),
            Incoming::Data { header, mut data } => {
                let input = self.agreed.channel.input();
                let missing = header.len_bytes as usize - data.len();
                let len = missing.min(input.len());
                data.extend_from_slice(&input[..len]);
                self.channel().consume(len);
                if len < missing {
                    self.incoming = Incoming::Data { header, data };
                    return Ok(false);
                }
                self.begin(header, data);
                Ok(true)
            }
            Incoming::Skip {
                header,
                left_bytes,
                error,
            } => {
                let len = left_bytes.min(self.agreed.channel.input().len());
                self.channel().consume(len);
                if len < left_bytes {
                    self.incoming = Incoming::Skip {
                        header,
                        left_bytes: left_bytes - len,
                        error,
                    };
                    return Ok(false);
                }
                self.refuse(header, error);
                Ok(true)
            }
        }
    }

    fn take_header(&mut self) -> Result<bool, Breach> {
        let input = self.agreed.channel.input();
        let Some(bytes) = input.first_chunk::<{ RequestHeader::BYTES }>() else {
            return Ok(false);
        };
        let header = RequestHeader::decode(bytes).ok_or(Breach("a request without its magic"))?;
        self.channel().consume(RequestHeader::BYTES);
        match header.command {
            command::DISC => {
                self.ending = Some(Ok(()));
                return Ok(true);
            }
            command::WRITE => {
                // More than anybody may send is no mistake to be polite about.
                if header.len_bytes > DEFAULT_MAX_PAYLOAD_BYTES {
                    return Err(Breach("a write of more than 32 MiB"));
                }
                self.incoming = match self.check(&header) {
                    Ok(()) => Incoming::Data {
                        header,
                        data: Vec::with_capacity(header.len_bytes as usize),
                    },
                    Err(error) => Incoming::Skip {
                        header,
                        left_bytes: header.len_bytes as usize,
                        error,
                    },
                };
            }
            _ => match self.check(&header) {
                Ok(()) => self.begin(header, Vec::new()),
                Err(error) => self.refuse(header, error),
            },
        }
        Ok(true)
    }

    /// Whether the request is possible, by the protocol's "Error values".
    fn check(&self, header: &RequestHeader) -> Result<(), u32> {
        let allowed_flags = match header.command {
            command::READ if self.agreed.structured_replies => command::FLAG_FUA | command::FLAG_DF,
            command::READ | command::WRITE | command::TRIM | command::FLUSH => command::FLAG_FUA,
            command::WRITE_ZEROES => {
                command::FLAG_FUA | command::FLAG_NO_HOLE | command::FLAG_FAST_ZERO
            }
            command::BLOCK_STATUS if self.agreed.has_allocation_context => {
                command::FLAG_FUA | command::FLAG_REQ_ONE
            }
            _ => return Err(errno::EINVAL),
        };
        if header.flags & !allowed_flags != 0 {
            return Err(errno::EINVAL);
        }
        let is_write = header.is_write();
        if is_write && self.served.export.is_read_only() {
            return Err(errno::EPERM);
        }
        if header.command == command::FLUSH {
            return Ok(());
        }
        if header.command == command::READ && header.len_bytes > DEFAULT_MAX_PAYLOAD_BYTES {
            return Err(errno::EINVAL);
        }
        let is_inside = header
            .offset_bytes
            .checked_add(u64::from(header.len_bytes))
            .is_some_and(|end| end <= self.served.export.size_bytes());
        if !is_inside {
            return Err(if is_write {
                errno::ENOSPC
            } else {
                errno::EINVAL
            });
        }
        let (min_block, _) = self.served.export.block_bytes();
        let misaligned =
            (header.offset_bytes | u64::from(header.len_bytes)) & u64::from(min_block - 1);
        if misaligned != 0 || header.command == command::BLOCK_STATUS && header.len_bytes == 0 {
            return Err(errno::EINVAL);
        }
        Ok(())
    }

    fn begin(&mut self, header: RequestHeader, data: Vec<u8>) {
        let held_bytes = match header.command {
            command::READ | command::WRITE => header.len_bytes as usize,
            _ => 0,
        };
        self.inflight += 1;
        self.inflight_bytes += held_bytes;
        self.served.pool.run(Task {
            header,
            data,
            held_bytes,
            export: Arc::clone(&self.served.export),
            lease: self.agreed.lease.clone(),
            answers: Arc::clone(self.answers),
        });
    }

    fn answer(&mut self, answer: Answer) {
        self.inflight -= 1;
        self.inflight_bytes -= answer.held_bytes;
        match answer.result {
            Ok(data) => self.succeed(answer.header, &data),
            Err(error) => self.refuse(answer.header, error),
        }
    }

    fn succeed(&mut self, header: RequestHeader, data: &[u8]) {
        let cookie = header.cookie;
        let is_structured = self.agreed.structured_replies
            && matches!(header.command, command::READ | command::BLOCK_STATUS);
        if !is_structured {
            self.channel().put(&wire::encode_simple_reply(0, cookie));
            self.channel().put(data);
            return;
        }
        let mut prefix = [0; 8];
        let (kind, prefix) = match header.command {
            command::READ if data.is_empty() => (chunk::NONE, &[][..]),
            command::READ => {
                prefix = header.offset_bytes.to_be_bytes();
                (chunk::OFFSET_DATA, &prefix[..])
            }
            _ => {
                prefix[..4].copy_from_slice(&super::handshake::ALLOCATION_CONTEXT_ID.to_be_bytes());
                (chunk::BLOCK_STATUS, &prefix[..4])
            }
        };
        let head = ChunkHeader {
            flags: chunk::FLAG_DONE,
            kind,
            cookie,
            len_bytes: (prefix.len() + data.len()) as u32,
        };
        self.channel().put(&head.encode());
        let prefix = prefix.to_vec();
        self.channel().put(&prefix);
        self.channel().put(data);
    }

    fn refuse(&mut self, header: RequestHeader, error: u32) {
        if !self.agreed.structured_replies {
            let reply = wire::encode_simple_reply(error, header.cookie);
            return self.channel().put(&reply);
        }
        let head = ChunkHeader {
            flags: chunk::FLAG_DONE,
            kind: chunk::ERROR,
            cookie: header.cookie,
            len_bytes: 6,
        };
        self.channel().put(&head.encode());
        self.channel().put(&error.to_be_bytes());
        // No text.
        self.channel().put(&0u16.to_be_bytes());
    }

    /// See the module's text. Disk work ends when the kernel ends it: there is no deadline,
    /// since an answer that is not waited for could be a write that is not over.
    fn await_tasks(&mut self) {
        while self.inflight > 0 {
            match self.answers.pop() {
                Some(answer) => {
                    self.inflight -= 1;
                    self.inflight_bytes -= answer.held_bytes;
                }
                None => self.answers.sleep(),
            }
        }
    }
}
