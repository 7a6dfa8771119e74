//! A tap or another interface of the host as a port of a switch: the way to the host and the world.
//!
//! Whoever sends a frame there writes it to the interface at once. A thread of its own reads what comes from
//! the interface and puts it into guests' rings; guests without buffers lose it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread;

use smallvec::{SmallVec, smallvec};

use super::deliver::Body;
use super::forward::{Bodies, Sender};
use super::frame::{Frame, MAX_HEAD_LEN_BYTES};
use super::mac_table::PortNumber;
use super::vlan::Vlans;
use super::{Switch, UplinkError, offload};
use crate::kernel::{Interface, TAG_ROOM_BYTES};
use crate::nic::header::{Header, MAX_FRAME_LEN_BYTES, MAX_HEADER_LEN_BYTES, Offloads};
use crate::nic::stats::{Direction, DropReason};

/// Frames read at once, each into a buffer for the longest.
const BATCH: usize = 16;

/// Addresses learnt of an uplink at most: half of the table.
const SHARE: usize = 4096;

/// Header, two parts, and a body in as many pieces as there usually are at most.
const USUAL_IOVECS: usize = 3 + 5;

/// What the kernel takes in one call.
const MAX_IOVECS: usize = 1024;

/// The sending side.
#[derive(Debug)]
pub(super) struct Uplink {
    interface: Interface,
    /// What came from there; what was sent is counted by the senders.
    received: Direction,
}

impl Uplink {
    /// Connects the interface to the switch as port `number`.
    pub(super) fn start(
        switch: &Arc<Switch>,
        number: PortNumber,
        vlans: &Arc<Vlans>,
        interface: Interface,
    ) -> Result<Arc<Self>, UplinkError> {
        // What guests cannot finish is finished by the switch.
        interface
            .set_offloads(Offloads::all())
            .map_err(UplinkError::Io)?;
        let uplink = Arc::new(Self {
            interface,
            received: Direction::default(),
        });
        let receiving = Receiving {
            uplink: Arc::clone(&uplink),
            sender: Sender::new(switch, number, vlans, SHARE),
            frames: Frames {
                header_len_bytes: uplink.interface.header_len_bytes(),
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

    /// Writes a frame that consists of `parts` and `body`; a large datagram in pieces if the kernel does not
    /// cut it.
    ///
    /// # Errors
    /// The kernel does not take it.
    pub(super) fn send(
        &self,
        header: &Header,
        parts: [&[u8]; 2],
        body: Body<'_>,
    ) -> Result<(), DropReason> {
        if header.is_large_datagram() && !self.interface.has_uso() {
            return self.send_in_pieces(header, parts, body);
        }
        self.send_whole(header, parts, body)
    }

    #[cold]
    fn send_in_pieces(
        &self,
        header: &Header,
        parts: [&[u8]; 2],
        body: Body<'_>,
    ) -> Result<(), DropReason> {
        let (mut frame, mut segment) = (parts.concat(), Vec::new());
        body.copy_into(&mut frame);
        offload::finish(header, &mut frame, &mut segment, |piece| {
            self.send_whole(&Header::empty(), [piece, &[]], Body::Own(&[]))
        })
    }

    fn send_whole(
        &self,
        header: &Header,
        parts: [&[u8]; 2],
        body: Body<'_>,
    ) -> Result<(), DropReason> {
        let own = |bytes: &[u8]| libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        let header = &header.as_bytes()[..self.interface.header_len_bytes()];
        let mut iovecs: SmallVec<[libc::iovec; USUAL_IOVECS]> =
            smallvec![own(header), own(parts[0]), own(parts[1])];
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
        let written =
            unsafe { libc::writev(self.fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) };
        if written < 0 {
            return Err(DropReason::Refused);
        }
        Ok(())
    }

    fn fd(&self) -> RawFd {
        self.interface.queue(0).as_raw_fd()
    }
}

const SLOT_BYTES: usize = MAX_HEADER_LEN_BYTES + MAX_FRAME_LEN_BYTES + TAG_ROOM_BYTES;

/// The receiving side.
struct Receiving {
    uplink: Arc<Uplink>,
    sender: Sender,
    frames: Frames,
}

/// Frames as they were read, each behind its virtio-net header.
struct Frames {
    header_len_bytes: usize,
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
            .split_at_checked(self.header_len_bytes)
            .filter(|(_, frame)| frame.len() >= super::frame::ETHERNET_LEN_BYTES)
            .ok_or(DropReason::Malformed)?;
        let mut bytes = [0; MAX_HEADER_LEN_BYTES];
        bytes[..header.len()].copy_from_slice(header);
        let header = Header::checked(&bytes, frame.len(), Offloads::all())
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
                .get(self.header_len_bytes..)
                .unwrap_or_default(),
        )
    }
}

impl Receiving {
    /// As long as there is an interface.
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
                    tracing::error!(%error, "a switch's uplink fails and ends; was the interface deleted?");
                    return;
                }
            }
        }
    }

    /// Reads what there is, up to a batch.
    fn read_some(&mut self) -> io::Result<usize> {
        let interface = &self.uplink.interface;
        for (index, slot) in self.frames.bytes.chunks_exact_mut(SLOT_BYTES).enumerate() {
            match interface.read(slot) {
                Ok(len) => self.frames.lens[index] = len,
                Err(error) => {
                    return match error.raw_os_error() {
                        // ENETDOWN: the interface went down or up, told once.
                        Some(libc::EAGAIN | libc::EINTR | libc::ENETDOWN) => Ok(index),
                        _ => Err(error),
                    };
                }
            }
        }
        Ok(BATCH)
    }

    /// Waits for frames; without limit, as the descriptor lives as long as the process does.
    fn wait(&self) {
        let mut poll = libc::pollfd {
            fd: self.uplink.fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd whose descriptor is open throughout.
        unsafe { libc::poll(&mut poll, 1, -1) };
    }
}
