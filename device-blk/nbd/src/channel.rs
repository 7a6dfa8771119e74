//! A socket, perhaps with TLS, and the bytes on their way.
//!
//! The socket never blocks. The handshakes wait with deadlines ([`Channel::read_exact`],
//! [`Channel::flush`]); the transmission phase moves what it can ([`Channel::receive`],
//! [`Channel::send`]) and waits in one place for everything ([`Channel::wait`]).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How much is received before it is looked at.
const INPUT_BYTES: usize = 256 << 10;
/// How much TLS takes in one go; its own buffer is as large by default.
const TLS_STEP_BYTES: usize = 64 << 10;

#[derive(Debug)]
pub(crate) struct Channel {
    socket: File,
    tls: Option<Box<rustls::Connection>>,
    input: Box<[u8]>,
    input_start: usize,
    input_end: usize,
    output: Vec<u8>,
    output_start: usize,
    is_write_closed: bool,
}

/// What an attempt to receive brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    Bytes,
    /// Nothing for now.
    Nothing,
    /// The peer will send no more.
    End,
}

/// What [`Channel::wait`] saw.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ready {
    pub(crate) woken: bool,
}

impl Channel {
    /// # Errors
    /// The socket cannot be switched to non-blocking.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
        fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self {
            socket: File::from(socket),
            tls: None,
            input: vec![0; INPUT_BYTES].into_boxed_slice(),
            input_start: 0,
            input_end: 0,
            output: Vec::new(),
            output_start: 0,
            is_write_closed: false,
        })
    }

    pub(crate) fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Encrypts from here on.
    ///
    /// # Errors
    /// The handshake fails, or the peer sent something in the clear that would have been taken
    /// for encrypted.
    pub(crate) fn start_tls(
        &mut self,
        connection: rustls::Connection,
        deadline: Instant,
    ) -> io::Result<()> {
        assert!(self.tls.is_none() && self.output_start == self.output.len());
        if self.input_start != self.input_end {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the peer sent data between agreeing on TLS and TLS itself",
            ));
        }
        let tls = self.tls.insert(Box::new(connection));
        while tls.is_handshaking() {
            let mut moved = false;
            if tls.wants_write() {
                moved |= would_block_to_none(tls.write_tls(&mut self.socket))?.is_some();
            }
            if tls.wants_read()
                && let Some(bytes) = would_block_to_none(tls.read_tls(&mut self.socket))?
            {
                if bytes == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                moved = true;
                if let Err(error) = tls.process_new_packets() {
                    // The peer is told why, as far as that goes.
                    let _ = tls.write_tls(&mut self.socket);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, error));
                }
            }
            if !moved {
                let mut interest = PollFlags::POLLIN;
                interest.set(PollFlags::POLLOUT, tls.wants_write());
                wait_until(self.socket.as_fd(), interest, deadline)?;
            }
        }
        // The last flight of the handshake may still be on its way out.
        self.flush(deadline)
    }

    /// Appends to what is to be sent.
    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
    }

    /// Appends `len_bytes` that `fill` writes.
    pub(crate) fn put_with(&mut self, len_bytes: usize, fill: impl FnOnce(&mut [u8])) {
        let at = self.output.len();
        self.output.resize(at + len_bytes, 0);
        fill(&mut self.output[at..]);
    }

    /// Bytes that are put and not sent.
    pub(crate) fn unsent_bytes(&self) -> usize {
        self.output.len() - self.output_start
    }

    /// Sends what goes without waiting; true when nothing is left.
    ///
    /// # Errors
    /// The connection is broken.
    pub(crate) fn send(&mut self) -> io::Result<bool> {
        if self.is_write_closed {
            return Ok(true);
        }
        let is_done = match &mut self.tls {
            None => send_plain(&mut self.socket, &self.output, &mut self.output_start)?,
            Some(tls) => send_tls(&mut self.socket, tls, &self.output, &mut self.output_start)?,
        };
        if self.output_start == self.output.len() {
            self.output.clear();
            self.output_start = 0;
        } else if self.output_start >= self.output.len() / 2 {
            self.output.drain(..self.output_start);
            self.output_start = 0;
        }
        Ok(is_done)
    }

    /// Sends everything.
    ///
    /// # Errors
    /// The connection is broken, or `deadline` passes.
    pub(crate) fn flush(&mut self, deadline: Instant) -> io::Result<()> {
        while !self.send()? {
            wait_until(self.socket.as_fd(), PollFlags::POLLOUT, deadline)?;
        }
        Ok(())
    }

    /// What has been received and not consumed.
    pub(crate) fn input(&self) -> &[u8] {
        &self.input[self.input_start..self.input_end]
    }

    pub(crate) fn consume(&mut self, len_bytes: usize) {
        assert!(len_bytes <= self.input_end - self.input_start);
        self.input_start += len_bytes;
        if self.input_start == self.input_end {
            (self.input_start, self.input_end) = (0, 0);
        }
    }

    /// Receives once, without waiting. Whoever calls it consumes input in between, for a full
    /// buffer takes nothing.
    ///
    /// # Errors
    /// The connection is broken.
    pub(crate) fn receive(&mut self) -> io::Result<Received> {
        if self.input_start > 0 && self.input.len() - self.input_end < INPUT_BYTES / 4 {
            self.input.copy_within(self.input_start..self.input_end, 0);
            self.input_end -= self.input_start;
            self.input_start = 0;
        }
        let room = &mut self.input[self.input_end..];
        if room.is_empty() {
            return Ok(Received::Nothing);
        }
        let received = match &mut self.tls {
            None => would_block_to_none(self.socket.read(room))?,
            Some(tls) => receive_tls(&mut self.socket, tls, room)?,
        };
        Ok(match received {
            None => Received::Nothing,
            Some(0) => Received::End,
            Some(bytes) => {
                self.input_end += bytes;
                Received::Bytes
            }
        })
    }

    /// Fills `into`.
    ///
    /// # Errors
    /// The connection is broken or ends, or `deadline` passes.
    pub(crate) fn read_exact(&mut self, into: &mut [u8], deadline: Instant) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            let input = self.input();
            if !input.is_empty() {
                let len = input.len().min(into.len() - done);
                into[done..done + len].copy_from_slice(&input[..len]);
                self.consume(len);
                done += len;
                continue;
            }
            // A peer that sends byte by byte does not get more time by it.
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match self.receive()? {
                Received::Bytes => (),
                Received::Nothing => wait_until(self.socket.as_fd(), PollFlags::POLLIN, deadline)?,
                Received::End => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        Ok(())
    }

    /// See [`Self::read_exact`].
    pub(crate) fn read_array<const N: usize>(&mut self, deadline: Instant) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes, deadline)?;
        Ok(bytes)
    }

    /// Waits for the peer, for `wake` to become readable, or for `timeout` to pass.
    ///
    /// # Errors
    /// `poll` failed, which it does not.
    pub(crate) fn wait(
        &self,
        wants_input: bool,
        wake: BorrowedFd<'_>,
        timeout: Duration,
    ) -> io::Result<Ready> {
        let mut interest = PollFlags::empty();
        if wants_input {
            interest |= PollFlags::POLLIN;
        }
        let tls_has_output = self.tls.as_ref().is_some_and(|tls| tls.wants_write());
        if !self.is_write_closed && (self.unsent_bytes() > 0 || tls_has_output) {
            interest |= PollFlags::POLLOUT;
        }
        let mut fds = [
            PollFd::new(wake, PollFlags::POLLIN),
            PollFd::new(self.socket.as_fd(), interest),
        ];
        // A peer that hung up is reported whether asked for or not; without interest in it that
        // would be a busy loop.
        let len = if interest.is_empty() { 1 } else { 2 };
        poll_for(&mut fds[..len], timeout)?;
        let woken = fds[0].revents().is_some_and(|events| !events.is_empty());
        Ok(Ready { woken })
    }

    /// Tells the peer that nothing more will come, and drops what was not sent; what the peer
    /// sends is still received.
    pub(crate) fn close_write(&mut self) {
        if self.is_write_closed {
            return;
        }
        self.is_write_closed = true;
        self.output.clear();
        self.output_start = 0;
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            let _ = tls.write_tls(&mut self.socket);
        }
        // SAFETY: the descriptor is open; shutdown touches no memory.
        unsafe { libc::shutdown(self.socket.as_raw_fd(), libc::SHUT_WR) };
    }
}

fn send_plain(socket: &mut File, output: &[u8], start: &mut usize) -> io::Result<bool> {
    while *start < output.len() {
        match would_block_to_none(socket.write(&output[*start..]))? {
            None => return Ok(false),
            Some(bytes) => *start += bytes,
        }
    }
    Ok(true)
}

fn send_tls(
    socket: &mut File,
    tls: &mut rustls::Connection,
    output: &[u8],
    start: &mut usize,
) -> io::Result<bool> {
    loop {
        while tls.wants_write() {
            if would_block_to_none(tls.write_tls(socket))?.is_none() {
                return Ok(false);
            }
        }
        if *start == output.len() {
            return Ok(true);
        }
        let end = output.len().min(*start + TLS_STEP_BYTES);
        *start += tls.writer().write(&output[*start..end])?;
    }
}

/// `Some(0)` is the end.
fn receive_tls(
    socket: &mut File,
    tls: &mut rustls::Connection,
    room: &mut [u8],
) -> io::Result<Option<usize>> {
    loop {
        // A peer that is gone without a close_notify cannot be told from one that was cut off;
        // NBD's own framing tells whether something is missing.
        match tls.reader().read(room) {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Some(0)),
            Err(error) => return Err(error),
        }
        match would_block_to_none(tls.read_tls(socket))? {
            None => return Ok(None),
            Some(_) => {
                if let Err(error) = tls.process_new_packets() {
                    let _ = tls.write_tls(socket);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, error));
                }
            }
        }
    }
}

fn would_block_to_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
        Err(error) => Err(error),
    }
}

fn wait_until(socket: BorrowedFd<'_>, interest: PollFlags, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    poll_for(&mut [PollFd::new(socket, interest)], left)
}

/// Interruptions count as events: callers look anew in any case.
fn poll_for(fds: &mut [PollFd<'_>], timeout: Duration) -> io::Result<()> {
    // Rounded up: a zero would spin through the last millisecond.
    let timeout_ms = i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
    let timeout = PollTimeout::try_from(timeout_ms).unwrap_or(PollTimeout::MAX);
    match poll(fds, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
