//! Frames on their way between the kernel and a ring, many with one system call.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use io_uring::{opcode, types};

use super::packet::{self, TAG_ROOM_BYTES};
use super::slots::Slots;
use super::uring::{self, Uring};
use crate::nic::header::{MAX_FRAME_LEN_BYTES, MAX_HEADER_LEN_BYTES};

/// Frames in one call to send them. What more would save is lost in the caches.
const SEND_SLOTS: usize = 64;
/// What is copied, with its header, before it is sent; of larger frames, copying costs more than
/// calling for each.
pub(super) const SEND_SLOT_BYTES: usize = 2048;

/// Frames in one call to receive them.
const RECEIVE_SLOTS: usize = 32;
const RECEIVE_SLOT_BYTES: usize =
    (MAX_HEADER_LEN_BYTES + MAX_FRAME_LEN_BYTES + TAG_ROOM_BYTES).next_multiple_of(4096);
/// Reads in a call when the last one found no frames; each that finds none costs a little.
const MIN_READS: usize = 2;

/// Frames to be sent.
pub(super) struct SendBatch {
    /// Before the slots in which it reads: they outlive it.
    uring: Option<Uring>,
    slots: Slots,
    lens_bytes: [u16; SEND_SLOTS],
    count: usize,
}

impl SendBatch {
    /// # Errors
    /// No memory.
    pub(super) fn new() -> io::Result<Self> {
        let slots = Slots::new(SEND_SLOTS, SEND_SLOT_BYTES)?;
        Ok(Self {
            uring: uring::or_one_by_one(Uring::new(SEND_SLOTS, Some(&slots))),
            slots,
            lens_bytes: [0; SEND_SLOTS],
            count: 0,
        })
    }

    /// Frames that wait.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn is_full(&self) -> bool {
        self.count == self.slots.count()
    }

    /// Where the next frame and its header go.
    pub(super) fn next_slot(&mut self) -> &mut [u8] {
        self.slots.slot_mut(self.count)
    }

    /// What was put into slot `from` and not pushed is what the next slot holds, of a batch that
    /// is empty now.
    pub(super) fn move_to_front(&mut self, from: usize, len_bytes: usize) {
        assert_eq!(self.count, 0, "the front is free");
        if from > 0 {
            let frame = self.slots.slot(from)[..len_bytes].to_vec();
            self.slots.slot_mut(0)[..len_bytes].copy_from_slice(&frame);
        }
    }

    /// The next slot holds header and frame.
    pub(super) fn push(&mut self, len_bytes: usize) {
        assert!(len_bytes <= SEND_SLOT_BYTES);
        self.lens_bytes[self.count] = len_bytes as u16;
        self.count += 1;
    }

    /// Sends everything, in its order, and tells how each frame fared: header and frame, and what
    /// the kernel said of it.
    pub(super) fn flush(&mut self, fd: &OwnedFd, mut sent: impl FnMut(&[u8], io::Result<()>)) {
        let count = std::mem::take(&mut self.count);
        let Self {
            uring,
            slots,
            lens_bytes,
            ..
        } = self;
        let mut results = [-libc::EAGAIN; SEND_SLOTS];
        let is_usable;
        match uring {
            Some(uring) if count > 1 => {
                for (index, &len_bytes) in lens_bytes[..count].iter().enumerate() {
                    let (at, len) = (slots.as_ptr(index), u32::from(len_bytes));
                    let target = types::Fd(fd.as_raw_fd());
                    let entry = if uring.has_buffers() {
                        opcode::WriteFixed::new(target, at, len, 0)
                            .rw_flags(libc::RWF_NOWAIT)
                            .build()
                    } else {
                        opcode::Write::new(target, at, len)
                            .rw_flags(libc::RWF_NOWAIT)
                            .build()
                    };
                    // SAFETY: the slots are ours and stay as they are until `run` returns.
                    unsafe { uring.push(&entry.user_data(index as u64)) };
                }
                let ran = uring.run(|index, result| results[index as usize] = result);
                is_usable = ran.is_ok() && results[0] != -libc::EOPNOTSUPP;
            }
            _ => is_usable = false,
        }
        if !is_usable {
            // One by one: no ring, a single frame, or a kernel that does not know RWF_NOWAIT here.
            for (index, &len_bytes) in lens_bytes[..count].iter().enumerate() {
                if results[index] >= 0 {
                    continue;
                }
                let (at, len) = (slots.as_ptr(index), usize::from(len_bytes));
                // SAFETY: the slot is live memory of that length.
                results[index] = as_result(unsafe { libc::write(fd.as_raw_fd(), at.cast(), len) });
            }
            if count > 1 {
                *uring = None;
            }
        }
        for (index, &len_bytes) in lens_bytes[..count].iter().enumerate() {
            let frame = &slots.slot(index)[..usize::from(len_bytes)];
            sent(frame, check(results[index]).map(drop));
        }
    }
}

/// Where received frames come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Each read gives one as it is.
    Reads,
    /// Packet sockets, which tell a tag beside its frame.
    Packets,
}

/// Frames that were received and not yet delivered.
pub(super) struct ReceiveBatch {
    source: Source,
    uring: Option<Uring>,
    slots: Slots,
    /// Header and frame in each slot; 0 for none.
    lens_bytes: [u32; RECEIVE_SLOTS],
    /// The first slot that was not delivered, and the end of those received.
    next: usize,
    end: usize,
    /// Frames that the last call found.
    found: usize,
}

impl ReceiveBatch {
    /// # Errors
    /// No memory.
    pub(super) fn new(source: Source) -> io::Result<Self> {
        let uring = match source {
            Source::Reads => uring::or_one_by_one(Uring::new(RECEIVE_SLOTS, None)),
            Source::Packets => None,
        };
        Ok(Self {
            source,
            uring,
            slots: Slots::new(RECEIVE_SLOTS, RECEIVE_SLOT_BYTES)?,
            lens_bytes: [0; RECEIVE_SLOTS],
            next: 0,
            end: 0,
            found: 0,
        })
    }

    /// Header and frame that come next.
    pub(super) fn front(&self) -> Option<&[u8]> {
        let len_bytes = *self.lens_bytes[..self.end].get(self.next)?;
        Some(&self.slots.slot(self.next)[..len_bytes as usize])
    }

    /// The front was delivered, or dropped.
    pub(super) fn pop_front(&mut self) {
        self.next += 1;
        self.skip_empty();
    }

    /// Frames that wait.
    pub(super) fn len(&self) -> usize {
        self.end - self.next.min(self.end)
    }

    /// Forgets what waits.
    pub(super) fn clear(&mut self) {
        self.next = self.end;
    }

    /// Receives more, when nothing waits any more. Returns whether there may be even more.
    ///
    /// # Errors
    /// What the kernel says if it gives nothing, other than that there is nothing.
    pub(super) fn receive(&mut self, fd: &OwnedFd) -> io::Result<bool> {
        assert_eq!(self.len(), 0, "frames are received when none wait");
        (self.next, self.end) = (0, 0);
        let wanted = (2 * self.found).clamp(MIN_READS, RECEIVE_SLOTS);
        let mut failure = 0;
        let mut is_cut_short = false;
        match &mut self.uring {
            Some(uring) => {
                for index in 0..wanted {
                    let at = self.slots.as_ptr(index);
                    let read =
                        opcode::Read::new(types::Fd(fd.as_raw_fd()), at, RECEIVE_SLOT_BYTES as u32);
                    // SAFETY: the slots are ours, and nobody borrows them until `run` returns.
                    unsafe {
                        uring.push(
                            &read
                                .rw_flags(libc::RWF_NOWAIT)
                                .build()
                                .user_data(index as u64),
                        )
                    };
                }
                self.lens_bytes[..wanted].fill(0);
                let (lens_bytes, end) = (&mut self.lens_bytes, &mut self.end);
                let ran = uring.run(|index, result| match u32::try_from(result) {
                    Ok(len_bytes) => {
                        lens_bytes[index as usize] = len_bytes;
                        *end = (*end).max(index as usize + 1);
                    }
                    Err(_) => failure = result,
                });
                if ran.is_err() || failure == -libc::EOPNOTSUPP {
                    // Short of memory, or a kernel that does not know RWF_NOWAIT here: one by one
                    // from now on.
                    self.uring = None;
                    failure = -libc::EAGAIN;
                    is_cut_short = true;
                }
            }
            None if self.source == Source::Packets => {
                let (slots, lens_bytes) = (&mut self.slots, &mut self.lens_bytes);
                match packet::receive_many(fd, slots, wanted, lens_bytes) {
                    Ok(count) => self.end = count,
                    Err(error) => failure = -error.raw_os_error().unwrap_or(libc::EIO),
                }
            }
            None => {
                while self.end < wanted {
                    let at = self.slots.as_ptr(self.end);
                    // SAFETY: the slot is ours and of that length.
                    let read = unsafe { libc::read(fd.as_raw_fd(), at.cast(), RECEIVE_SLOT_BYTES) };
                    match u32::try_from(as_result(read)) {
                        Ok(len_bytes) => self.lens_bytes[self.end] = len_bytes,
                        Err(_) => {
                            failure = as_result(read);
                            break;
                        }
                    }
                    self.end += 1;
                }
            }
        }
        self.found = self.end;
        self.skip_empty();
        if self.end == 0 && failure != -libc::EAGAIN {
            check(failure)?;
        }
        Ok(self.end == wanted || is_cut_short)
    }
}

impl ReceiveBatch {
    /// A frame may come between two reads of one call.
    fn skip_empty(&mut self) {
        while self.next < self.end && self.lens_bytes[self.next] == 0 {
            self.next += 1;
        }
    }
}

/// What a system call returned, as io_uring tells it.
fn as_result(answer: isize) -> i32 {
    if answer < 0 {
        -io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO)
    } else {
        answer as i32
    }
}

fn check(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    /// Datagram sockets keep frames apart as taps do.
    fn pair() -> (OwnedFd, OwnedFd) {
        let (a, b) = UnixDatagram::pair().unwrap();
        for socket in [&a, &b] {
            socket.set_nonblocking(true).unwrap();
        }
        (a.into(), b.into())
    }

    fn round_trip(sender: &mut SendBatch, receiver: &mut ReceiveBatch) {
        let (near, far) = pair();
        // A datagram socket holds ten.
        let frames: Vec<Vec<u8>> = (1..=10).map(|n| vec![n; 100 * usize::from(n)]).collect();
        for frame in &frames {
            sender.next_slot()[..frame.len()].copy_from_slice(frame);
            sender.push(frame.len());
        }
        let mut sent = Vec::new();
        sender.flush(&near, |frame, result| {
            result.unwrap();
            sent.push(frame.to_vec());
        });
        assert_eq!(sent, frames);
        assert_eq!(sender.len(), 0);
        let mut received = Vec::new();
        for _ in 0..20 {
            let may_be_more = receiver.receive(&far).unwrap();
            while let Some(frame) = receiver.front() {
                received.push(frame.to_vec());
                receiver.pop_front();
            }
            if !may_be_more {
                break;
            }
        }
        assert_eq!(received, frames);
    }

    #[test]
    fn frames_pass_in_order_with_and_without_a_ring() {
        let mut sender = SendBatch::new().unwrap();
        let mut receiver = ReceiveBatch::new(Source::Reads).unwrap();
        round_trip(&mut sender, &mut receiver);
        sender.uring = None;
        receiver.uring = None;
        round_trip(&mut sender, &mut receiver);
    }

    #[test]
    fn each_refused_frame_is_told_and_a_dead_descriptor_is_an_error() {
        let (near, far) = pair();
        drop(far);
        let mut sender = SendBatch::new().unwrap();
        for _ in 0..3 {
            sender.push(60);
        }
        let mut refused = 0;
        sender.flush(&near, |_, result| refused += usize::from(result.is_err()));
        assert_eq!(refused, 3);

        let mut receiver = ReceiveBatch::new(Source::Reads).unwrap();
        let nothing = std::fs::File::options().write(true).open("/dev/null");
        assert!(receiver.receive(&nothing.unwrap().into()).is_err());
        assert_eq!(receiver.len(), 0);
    }
}
