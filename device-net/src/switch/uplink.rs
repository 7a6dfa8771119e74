//! A tap as a port of a switch: the way to the host and the world.
//!
//! Whoever sends a frame there writes it to the tap at once. A thread of its own reads what comes from
//! the tap and puts it into guests' rings; guests without buffers lose it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use super::deliver::Body;
use super::forward::{Bodies, Sender};
use super::frame::{Frame, MAX_HEAD_LEN_BYTES};
use super::mac_table::PortNumber;
use super::vlan::Vlans;
use super::{Switch, UplinkError};
use crate::kernel::Tap;
use crate::nic::header::{Header, MAX_FRAME_LEN_BYTES, MAX_HEADER_LEN_BYTES, Offloads};
use crate::nic::stats::{Direction, DropReason};

/// Frames read at once, each into a buffer for the longest.
const BATCH: usize = 16;

/// Addresses learnt of an uplink at most: half of the table.
const SHARE: usize = 4096;

/// What the kernel takes in one call.
const MAX_IOVECS: usize = 1024;

/// The sending side.
#[derive(Debug)]
pub(super) struct Uplink {
    tap: Tap,
    /// What came from there; what was sent is counted by the senders.
    received: Direction,
}

impl Uplink {
    /// Connects the tap to the switch as port `number`.
    pub(super) fn start(
        switch: &Arc<Switch>,
        number: PortNumber,
        vlans: &Arc<Vlans>,
        tap: OwnedFd,
    ) -> Result<Arc<Self>, UplinkError> {
        let tap = Tap::from_fds(vec![tap]).map_err(UplinkError::Tap)?;
        // What guests cannot finish is finished by the switch.
        tap.set_offloads(Offloads::all()).map_err(UplinkError::Io)?;
        let uplink = Arc::new(Self {
            tap,
            received: Direction::default(),
        });
        let receiving = Receiving {
            uplink: Arc::clone(&uplink),
            sender: Sender::new(switch, number, vlans, SHARE),
            frames: Frames {
                bytes: vec![0; BATCH * SLOT_BYTES].into_boxed_slice(),
                lens: [0; BATCH],
            },
        };
        thread::Builder::new()
            .name("switch/uplink".to_owned())
            .spawn(move || receiving.run())
            .map_err(UplinkError::Io)?;
        Ok(uplink)
    }

    /// Writes a frame that consists of `parts` and `body`.
    ///
    /// # Errors
    /// The kernel does not take it.
    pub(super) fn send(
        &self,
        header: &Header,
        parts: [&[u8]; 2],
        body: Body<'_>,
    ) -> Result<(), DropReason> {
        let own = |bytes: &[u8]| libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        let mut iovecs = vec![own(header.as_bytes()), own(parts[0]), own(parts[1])];
        match body {
            Body::Own(bytes) => iovecs.push(own(bytes)),
            Body::Chain { chain, skip_bytes } => {
                iovecs.extend(chain.readable_range(skip_bytes, usize::MAX).map(|segment| {
                    libc::iovec {
                        iov_base: segment.as_ptr().cast(),
                        iov_len: segment.len(),
                    }
                }));
            }
        }
        if iovecs.len() > MAX_IOVECS {
            return Err(DropReason::TooLong);
        }
        // SAFETY: bytes of ours, and mapped memory of the sender, which its batch keeps mapped.
        let written = unsafe {
            libc::writev(
                self.tap.queue(0).as_raw_fd(),
                iovecs.as_ptr(),
                iovecs.len() as libc::c_int,
            )
        };
        if written < 0 {
            return Err(DropReason::Refused);
        }
        Ok(())
    }
}

const SLOT_BYTES: usize = MAX_HEADER_LEN_BYTES + MAX_FRAME_LEN_BYTES;

/// The receiving side.
struct Receiving {
    uplink: Arc<Uplink>,
    sender: Sender,
    frames: Frames,
}

/// Frames as they were read, each behind its virtio-net header.
struct Frames {
    bytes: Box<[u8]>,
    lens: [usize; BATCH],
}

impl Frames {
    fn slot(&self, index: usize) -> &[u8] {
        &self.bytes[index * SLOT_BYTES..][..self.lens[index]]
    }

    fn frame(&self, index: usize, vlans: &Vlans) -> Result<Frame, DropReason> {
        let (header, frame) = self
            .slot(index)
            .split_first_chunk::<MAX_HEADER_LEN_BYTES>()
            .filter(|(_, frame)| frame.len() >= super::frame::ETHERNET_LEN_BYTES)
            .ok_or(DropReason::Malformed)?;
        let header = Header::checked(header, frame.len(), Offloads::all())
            .map_err(|_| DropReason::Malformed)?;
        let mut head = [0; MAX_HEAD_LEN_BYTES];
        let len = frame.len().min(MAX_HEAD_LEN_BYTES);
        head[..len].copy_from_slice(&frame[..len]);
        Frame::with_head(head, Some(header), frame.len(), vlans)
    }
}

impl Bodies for Frames {
    fn body(&self, index: usize) -> Body<'_> {
        Body::Own(
            self.slot(index)
                .get(MAX_HEADER_LEN_BYTES..)
                .unwrap_or_default(),
        )
    }
}

impl Receiving {
    /// As long as there is a tap.
    fn run(mut self) {
        loop {
            match self.read_some() {
                Ok(0) => self.wait(),
                Ok(count) => {
                    let (frames, counters) = (&self.frames, &self.uplink.received);
                    self.sender
                        .read(count, frames, None, counters, |index, vlans| {
                            frames.frame(index, vlans)
                        });
                    self.sender.send(frames, counters);
                }
                Err(error) => {
                    tracing::error!(%error, "a switch's uplink fails and ends; was the tap deleted?");
                    return;
                }
            }
        }
    }

    /// Reads what there is, up to a batch.
    fn read_some(&mut self) -> io::Result<usize> {
        let tap = self.uplink.tap.queue(0).as_raw_fd();
        for (index, slot) in self.frames.bytes.chunks_exact_mut(SLOT_BYTES).enumerate() {
            // SAFETY: a buffer of ours and its length.
            let len = unsafe { libc::read(tap, slot.as_mut_ptr().cast(), slot.len()) };
            match usize::try_from(len) {
                Ok(len) => self.frames.lens[index] = len,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    return match error.raw_os_error() {
                        Some(libc::EAGAIN | libc::EINTR) => Ok(index),
                        _ => Err(error),
                    };
                }
            }
        }
        Ok(BATCH)
    }

    /// Waits for frames; without limit, as the tap lives as long as the process does.
    fn wait(&self) {
        let mut poll = libc::pollfd {
            fd: self.uplink.tap.queue(0).as_fd().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd whose descriptor is open throughout.
        unsafe { libc::poll(&mut poll, 1, -1) };
    }
}
