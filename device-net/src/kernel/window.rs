//! Chains of a receive ring that were popped and wait for frames.

use std::collections::VecDeque;

use vhost_user::ring::{DescChain, Ring, RingError};

use crate::nic::header::Header;

/// Chains in the window at most. A frame of 64 KiB needs 45 of Linux's mergeable buffers.
const MAX_CHAINS: usize = 256;

/// See the module's description. Each of its chains has room for the driver's header.
pub(super) struct Window {
    header_len_bytes: usize,
    is_mergeable: bool,
    chains: VecDeque<DescChain>,
    len_bytes: usize,
}

/// How much room there is for a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    Enough,
    /// Not before the driver supplies more.
    NotYet,
    /// The frame fits into nothing that this ring can offer.
    Never,
}

impl Window {
    pub(super) fn new(header_len_bytes: usize, is_mergeable: bool) -> Self {
        Self {
            header_len_bytes,
            is_mergeable,
            chains: VecDeque::new(),
            len_bytes: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    pub(super) fn chains(&self) -> &VecDeque<DescChain> {
        &self.chains
    }

    /// Makes room for header and frame of `len_bytes` in all, if there are buffers. Returns how
    /// many chains went back to the driver unused because they have no room for a header.
    pub(super) fn make_room(
        &mut self,
        ring: &mut Ring,
        len_bytes: usize,
    ) -> Result<u64, RingError> {
        let mut useless = 0;
        // Without mergeable buffers one chain takes the whole frame, or none does.
        let goal_bytes = if self.is_mergeable { len_bytes } else { 1 };
        // A driver that offers useless chains for ever must not keep this thread for ever.
        for _ in 0..ring.size() {
            if self.len_bytes >= goal_bytes || self.chains.len() == MAX_CHAINS {
                break;
            }
            let Some(chain) = ring.pop()? else { break };
            let chain_bytes = chain.writable_len_bytes() as usize;
            if chain_bytes <= self.header_len_bytes {
                useless += 1;
                ring.complete(chain, 0);
                continue;
            }
            self.len_bytes += chain_bytes;
            self.chains.push_back(chain);
        }
        Ok(useless)
    }

    /// Whether header and frame of `len_bytes` in all have room.
    pub(super) fn room(&self, ring: &Ring, len_bytes: usize) -> Room {
        if !self.is_mergeable {
            return match self.chains.front() {
                None => Room::NotYet,
                Some(chain) if chain.writable_len_bytes() as usize >= len_bytes => Room::Enough,
                Some(_) => Room::Never,
            };
        }
        let max_chains = MAX_CHAINS.min(usize::from(ring.size()));
        match self.chains.len() {
            _ if self.len_bytes >= len_bytes => Room::Enough,
            count if count < max_chains => Room::NotYet,
            _ => Room::Never,
        }
    }

    /// Copies `bytes` to where they belong, `offset_bytes` after the beginning of the driver's
    /// header. There is room for them.
    pub(super) fn write(&self, offset_bytes: usize, bytes: &[u8]) {
        let mut chain_start = 0;
        let mut left = bytes;
        for chain in &self.chains {
            let chain_end = chain_start + chain.writable_len_bytes() as usize;
            let at = offset_bytes + bytes.len() - left.len();
            if at < chain_end {
                let (part, rest) = left.split_at(left.len().min(chain_end - at));
                chain.write_at(at - chain_start, part);
                left = rest;
            }
            if left.is_empty() {
                return;
            }
            chain_start = chain_end;
        }
    }

    /// Copies bytes back from where [`Self::write`] would put them; returns how many there are.
    pub(super) fn read(&self, offset_bytes: usize, bytes: &mut [u8]) -> usize {
        let mut chain_start = 0;
        let mut done = 0;
        for chain in &self.chains {
            let chain_end = chain_start + chain.writable_len_bytes() as usize;
            let at = offset_bytes + done;
            if at < chain_end {
                for segment in chain.writable_range(at - chain_start, bytes.len() - done) {
                    // SAFETY: the segment is mapped guest memory of this length (the chain holds
                    // the mapping), and no longer than what is left of `bytes`.
                    unsafe {
                        std::ptr::copy_nonoverlapping(
                            segment.as_ptr(),
                            bytes.as_mut_ptr().add(done),
                            segment.len(),
                        );
                    }
                    done += segment.len();
                }
            }
            if done == bytes.len() {
                break;
            }
            chain_start = chain_end;
        }
        done
    }

    /// Writes the header of a frame whose bytes are in place, and gives the driver as many chains
    /// as header and frame of `len_bytes` in all take up.
    pub(super) fn complete(&mut self, ring: &mut Ring, header: &Header, len_bytes: usize) {
        let mut num_chains = 0;
        let mut covered_bytes = 0;
        for chain in &self.chains {
            num_chains += 1;
            covered_bytes += chain.writable_len_bytes() as usize;
            if covered_bytes >= len_bytes {
                break;
            }
        }
        let header = header.with_num_buffers(num_chains);
        if let Some(first) = self.chains.front() {
            first.write_at(0, &header.as_bytes()[..self.header_len_bytes]);
        }
        let mut left_bytes = len_bytes;
        for chain in self.chains.drain(..usize::from(num_chains)) {
            let chain_bytes = chain.writable_len_bytes() as usize;
            let written_bytes = left_bytes.min(chain_bytes);
            self.len_bytes -= chain_bytes;
            left_bytes -= written_bytes;
            ring.complete(chain, written_bytes as u32);
        }
    }

    /// Gives all chains back, as if they had not been popped.
    pub(super) fn put_back(&mut self, ring: &mut Ring) {
        while let Some(chain) = self.chains.pop_back() {
            ring.unpop(chain);
        }
        self.len_bytes = 0;
    }
}
