//! Buffers for guest memory that `O_DIRECT` does not take: a bounded pool for each queue.

use super::buffer::AlignedBuffer;

/// One buffer; a longer request goes through it in pieces.
pub(crate) const BOUNCE_BYTES: usize = 256 << 10;
/// Buffers of one queue (2 MiB); further requests wait for one.
const MAX_BUFFERS: usize = 8;

/// Buffers are made when they are needed first, and kept.
#[derive(Debug, Default)]
pub(crate) struct BouncePool {
    free: Vec<AlignedBuffer>,
    lent: usize,
}

impl BouncePool {
    /// `None` when all buffers are in use.
    pub(crate) fn take(&mut self) -> Option<AlignedBuffer> {
        if self.free.is_empty() && self.lent == MAX_BUFFERS {
            return None;
        }
        self.lent += 1;
        Some(
            self.free
                .pop()
                .unwrap_or_else(|| AlignedBuffer::new(BOUNCE_BYTES)),
        )
    }

    pub(crate) fn give_back(&mut self, buffer: AlignedBuffer) {
        self.lent -= 1;
        self.free.push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pool_is_bounded_and_buffers_come_back() {
        let mut pool = BouncePool::default();
        let mut taken: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(taken.len(), MAX_BUFFERS);
        pool.give_back(taken.pop().unwrap());
        assert!(pool.take().is_some());
        assert!(pool.take().is_none());
    }
}
