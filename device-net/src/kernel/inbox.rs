//! Frames that were received and wait to be delivered, each as the driver can take it.
//!
//! What the kernel left undone and the driver did not agree to do is finished here: checksums and
//! segmentation. A packet socket always hands frames over as they are, a tap those that were queued
//! for another driver.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;

use super::batch::{ReceiveBatch, Source};
use crate::nic::header::{
    Header, HeaderError, MAX_FRAME_LEN_BYTES, MAX_HEADER_LEN_BYTES, Offloads,
};
use crate::nic::stats::DropReason;
use crate::switch::offload;

/// See the module's description.
pub(super) struct Inbox {
    /// Of the kernel's header.
    header_len_bytes: usize,
    /// What the driver can finish.
    offloads: Offloads,
    batch: ReceiveBatch,
    /// What became of a frame that came before those of `batch`.
    finished: VecDeque<Box<[u8]>>,
}

impl Inbox {
    /// # Errors
    /// No memory.
    pub(super) fn new(
        source: Source,
        header_len_bytes: usize,
        offloads: Offloads,
    ) -> io::Result<Self> {
        Ok(Self {
            header_len_bytes,
            offloads,
            batch: ReceiveBatch::new(source)?,
            finished: VecDeque::new(),
        })
    }

    /// As [`ReceiveBatch::receive`].
    ///
    /// # Errors
    /// As there.
    pub(super) fn receive(&mut self, queue: &OwnedFd) -> io::Result<bool> {
        self.batch.receive(queue)
    }

    /// Makes the next frame one that the driver can take, and returns the header for it; None when
    /// nothing waits.
    ///
    /// # Errors
    /// Why it cannot be delivered: [`Inbox::pop`] it.
    #[inline]
    pub(super) fn prepare(&mut self) -> Option<Result<Header, DropReason>> {
        if !self.finished.is_empty() {
            return Some(Ok(Header::default()));
        }
        let received = self.batch.front()?;
        let Some((header, frame_len_bytes)) = split(received, self.header_len_bytes) else {
            return Some(Err(DropReason::Malformed));
        };
        Some(
            match Header::checked(&header, frame_len_bytes, self.offloads) {
                Ok(header) => Ok(header),
                Err(HeaderError::NotNegotiated) => self.finish(&header),
                Err(_) => Err(DropReason::Malformed),
            },
        )
    }

    /// The frame that was prepared.
    #[inline]
    pub(super) fn frame(&self) -> &[u8] {
        if let Some(frame) = self.finished.front() {
            return frame;
        }
        let received = self.batch.front().unwrap_or_default();
        received.get(self.header_len_bytes..).unwrap_or_default()
    }

    /// The next frame was delivered, or is dropped.
    #[inline]
    pub(super) fn pop(&mut self) {
        if self.finished.pop_front().is_none() {
            self.batch.pop_front();
        }
    }

    /// Frames that wait.
    pub(super) fn len(&self) -> usize {
        self.finished.len() + self.batch.len()
    }

    /// Forgets what waits.
    pub(super) fn clear(&mut self) {
        self.finished.clear();
        self.batch.clear();
    }

    /// Moves the front of the batch to `finished`, cut and summed.
    #[cold]
    fn finish(&mut self, header: &[u8; MAX_HEADER_LEN_BYTES]) -> Result<Header, DropReason> {
        let mut frame = self.frame().to_vec();
        let header = Header::checked(header, frame.len(), Offloads::all())
            .map_err(|_| DropReason::Malformed)?;
        let (finished, mut segment) = (&mut self.finished, Vec::new());
        let result = offload::finish(&header, &mut frame, &mut segment, |part| {
            finished.push_back(part.into());
            Ok(())
        });
        if let Err(reason) = result {
            self.finished.clear();
            return Err(reason);
        }
        self.batch.pop_front();
        Ok(Header::default())
    }
}

/// The kernel's header, and the length of the frame behind it.
fn split(received: &[u8], header_len_bytes: usize) -> Option<([u8; MAX_HEADER_LEN_BYTES], usize)> {
    let (header, frame) = received.split_at_checked(header_len_bytes)?;
    let mut bytes = [0; MAX_HEADER_LEN_BYTES];
    bytes[..header_len_bytes].copy_from_slice(header);
    (1..=MAX_FRAME_LEN_BYTES)
        .contains(&frame.len())
        .then_some((bytes, frame.len()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use virtio_bindings::virtio_net::{VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_UDP_L4};

    use super::*;

    const ETHERNET: usize = 14;
    const UDP_AT: usize = ETHERNET + 20;
    const PAYLOAD_AT: usize = UDP_AT + 8;

    /// IPv4 and UDP with 2500 bytes, to be cut into pieces of 1000.
    fn unfinished() -> Vec<u8> {
        let mut header = [0; MAX_HEADER_LEN_BYTES];
        header[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
        header[1] = VIRTIO_NET_HDR_GSO_UDP_L4 as u8;
        header[4..6].copy_from_slice(&1000_u16.to_le_bytes());
        header[6..8].copy_from_slice(&(UDP_AT as u16).to_le_bytes());
        header[8..10].copy_from_slice(&6_u16.to_le_bytes());
        let mut frame = vec![0; PAYLOAD_AT + 2500];
        frame[12..14].copy_from_slice(&[0x08, 0]);
        frame[ETHERNET] = 0x45;
        let len = (frame.len() - ETHERNET) as u16;
        frame[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&len.to_be_bytes());
        frame[ETHERNET + 9] = 17;
        for (at, byte) in frame[PAYLOAD_AT..].iter_mut().enumerate() {
            *byte = at as u8;
        }
        [&header[..], &frame].concat()
    }

    fn deliver(offloads: Offloads, sent: &[&[u8]]) -> Vec<Result<Vec<u8>, DropReason>> {
        let (near, far) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        for bytes in sent {
            far.send(bytes).unwrap();
        }
        let mut inbox = Inbox::new(Source::Reads, MAX_HEADER_LEN_BYTES, offloads).unwrap();
        let queue = near.into();
        while inbox.receive(&queue).unwrap() && inbox.len() == 0 {}
        let mut delivered = Vec::new();
        while let Some(prepared) = inbox.prepare() {
            delivered.push(prepared.map(|_| inbox.frame().to_vec()));
            inbox.pop();
        }
        assert_eq!(inbox.len(), 0);
        delivered
    }

    #[test]
    fn frame_that_the_driver_can_finish_is_left_as_it_is() {
        let sent = unfinished();
        let delivered = deliver(Offloads::all(), &[&sent]);
        assert_eq!(delivered, [Ok(sent[MAX_HEADER_LEN_BYTES..].to_vec())]);
    }

    #[test]
    fn frame_that_the_driver_cannot_finish_is_cut() {
        let sent = unfinished();
        let delivered = deliver(Offloads::default(), &[&sent]);
        let payloads: Vec<&[u8]> = delivered
            .iter()
            .map(|frame| &frame.as_ref().unwrap()[PAYLOAD_AT..])
            .collect();
        assert_eq!(
            payloads.iter().map(|p| p.len()).collect::<Vec<_>>(),
            [1000, 1000, 500]
        );
        assert_eq!(payloads.concat(), sent[MAX_HEADER_LEN_BYTES + PAYLOAD_AT..]);
    }

    #[test]
    fn nonsense_is_dropped_and_the_next_frame_comes() {
        let mut header_alone = unfinished();
        header_alone.truncate(MAX_HEADER_LEN_BYTES);
        let mut no_datagram = unfinished();
        no_datagram.truncate(MAX_HEADER_LEN_BYTES + UDP_AT + 4);
        let plain = [[0; MAX_HEADER_LEN_BYTES].as_slice(), &[7; 60]].concat();
        let delivered = deliver(Offloads::default(), &[&header_alone, &no_datagram]);
        assert!(delivered.iter().all(Result::is_err), "{delivered:?}");
        let delivered = deliver(Offloads::default(), &[&header_alone, &plain]);
        assert_eq!(delivered, [Err(DropReason::Malformed), Ok(vec![7; 60])]);
    }
}
