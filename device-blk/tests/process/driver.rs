//! Two frontends built on the `virtio-driver` crate: [`Client`] uses its block driver as it
//! is, [`RawClient`] its virtqueues alone, to send what no driver would.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost_user::memory::Mapping;
use virtio_driver::virtqueue::{Virtqueue, VirtqueueLayout};
use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf,
    VirtioBlkTransport, VirtioFeatureFlags, VirtioTransport, iovec,
};

use crate::daemon::{DEADLINE, await_some};

/// Bytes of the buffer that client and daemon share.
pub(crate) const BUFFER_BYTES: usize = 8 << 20;
const QUEUE_SIZE: u16 = 128;

/// Everything that the crate and the daemon know.
pub(crate) fn all_features() -> u64 {
    VirtioFeatureFlags::VERSION_1.bits()
        | VirtioFeatureFlags::RING_EVENT_IDX.bits()
        | VirtioBlkFeatureFlags::all().bits()
}

/// Memory that the daemon maps too.
struct SharedBuffer {
    mapping: Mapping,
    file: File,
}

impl SharedBuffer {
    fn new() -> Self {
        // SAFETY: the name is a NUL-terminated literal.
        let fd = unsafe { libc::memfd_create(c"buffer".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0, "memfd");
        // SAFETY: just returned by the kernel and owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(BUFFER_BYTES as u64).unwrap();
        let mapping = Mapping::new(file.as_fd(), 0, BUFFER_BYTES as u64).unwrap();
        Self { mapping, file }
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: mapped, this long, and no request is in flight while a test looks at it.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.as_ptr().as_ptr(), BUFFER_BYTES) }
    }
}

/// To be shared later.
pub(crate) struct MoreMemory(SharedBuffer);

impl MoreMemory {
    pub(crate) fn new() -> Self {
        Self(SharedBuffer::new())
    }
}

/// A frontend with the crate's block driver.
pub(crate) struct Client {
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    transport: Box<VirtioBlkTransport>,
    buffer: SharedBuffer,
}

impl Client {
    pub(crate) fn connect(socket: &Path) -> Self {
        Self::connect_with(socket, 1, all_features())
    }

    pub(crate) fn connect_with(socket: &Path, num_queues: usize, features: u64) -> Self {
        let transport =
            VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(socket.to_str().unwrap(), features)
                .unwrap();
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let mut queues =
            VirtioBlkQueue::setup_queues(&mut *transport, num_queues, QUEUE_SIZE).unwrap();
        for queue in &mut queues {
            queue.set_used_notif_enabled(true);
        }
        let buffer = SharedBuffer::new();
        let address = buffer.mapping.as_ptr().as_ptr() as usize;
        transport
            .map_mem_region(address, BUFFER_BYTES, buffer.file.as_raw_fd(), 0)
            .unwrap();
        Self {
            queues,
            transport,
            buffer,
        }
    }

    pub(crate) fn features(&self) -> VirtioBlkFeatureFlags {
        VirtioBlkFeatureFlags::from_bits_truncate(self.transport.get_features())
    }

    pub(crate) fn config(&self) -> VirtioBlkConfig {
        self.transport.get_config().unwrap()
    }

    /// More memory than before: the table changes while the rings run.
    pub(crate) fn share_more(&mut self, more: &MoreMemory) {
        let address = more.0.mapping.as_ptr().as_ptr() as usize;
        let file = more.0.file.as_raw_fd();
        let shared = self
            .transport
            .map_mem_region(address, BUFFER_BYTES, file, 0);
        shared.unwrap();
    }

    pub(crate) fn buffer(&mut self) -> &mut [u8] {
        self.buffer.as_mut_slice()
    }

    /// Reads through queue `queue` into the buffer at `at`; 0 or a negative errno.
    pub(crate) fn read_at(&mut self, queue: usize, offset: u64, at: usize, len: usize) -> i32 {
        let target = &mut self.buffer.as_mut_slice()[at..at + len];
        self.queues[queue].read(offset, target, 0).unwrap();
        self.finish(queue)
    }

    pub(crate) fn write_at(&mut self, queue: usize, offset: u64, at: usize, len: usize) -> i32 {
        let source = &self.buffer.as_mut_slice()[at..at + len];
        self.queues[queue].write(offset, source, 0).unwrap();
        self.finish(queue)
    }

    /// Reads `len` bytes into the start of the buffer and returns them.
    pub(crate) fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.buffer()[..len].fill(0xee);
        assert_eq!(
            self.read_at(0, offset, 0, len),
            0,
            "read of {len} at {offset}"
        );
        self.buffer()[..len].to_vec()
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> i32 {
        self.buffer()[..data.len()].copy_from_slice(data);
        self.write_at(0, offset, 0, data.len())
    }

    pub(crate) fn flush(&mut self) -> i32 {
        self.queues[0].flush(0).unwrap();
        self.finish(0)
    }

    pub(crate) fn discard(&mut self, offset: u64, len: u64) -> i32 {
        self.queues[0].discard(offset, len, 0).unwrap();
        self.finish(0)
    }

    pub(crate) fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> i32 {
        self.queues[0].write_zeroes(offset, len, unmap, 0).unwrap();
        self.finish(0)
    }

    /// Transfers `parts` (position in the buffer, length) in one request.
    pub(crate) fn transfer(&mut self, write: bool, offset: u64, parts: &[(usize, usize)]) -> i32 {
        let base = self.buffer.mapping.as_ptr().as_ptr();
        let iovecs: Vec<_> = parts
            .iter()
            .map(|&(at, iov_len)| {
                assert!(at + iov_len <= BUFFER_BYTES);
                iovec {
                    iov_base: base.wrapping_add(at).cast(),
                    iov_len,
                }
            })
            .collect();
        let (vectors, count) = (iovecs.as_ptr(), iovecs.len());
        let queue = &mut self.queues[0];
        // SAFETY: all vectors lie in the buffer, as checked above.
        unsafe {
            if write {
                queue.writev(offset, vectors, count, 0).unwrap();
            } else {
                queue.readv(offset, vectors, count, 0).unwrap();
            }
        }
        self.finish(0)
    }

    /// Queues a write without waiting for it.
    pub(crate) fn submit_write(
        &mut self,
        queue: usize,
        offset: u64,
        at: usize,
        len: usize,
        id: usize,
    ) {
        let source = &self.buffer.as_mut_slice()[at..at + len];
        self.queues[queue].write(offset, source, id).unwrap();
    }

    /// Queues a read without waiting for it.
    pub(crate) fn submit_read(
        &mut self,
        queue: usize,
        offset: u64,
        at: usize,
        len: usize,
        id: usize,
    ) {
        let target = &mut self.buffer.as_mut_slice()[at..at + len];
        self.queues[queue].read(offset, target, id).unwrap();
    }

    /// Queues a flush without waiting for it.
    pub(crate) fn submit_flush(&mut self, queue: usize, id: usize) {
        self.queues[queue].flush(id).unwrap();
    }

    /// Queues a discard without waiting for it.
    pub(crate) fn submit_discard(&mut self, queue: usize, offset: u64, len: u64, id: usize) {
        self.queues[queue].discard(offset, len, id).unwrap();
    }

    pub(crate) fn kick(&self, queue: usize) {
        self.transport
            .get_submission_notifier(queue)
            .notify()
            .unwrap();
    }

    /// Waits for one completion, by the signal that the driver asked for: its id and result.
    pub(crate) fn completion(&mut self, queue: usize) -> (usize, i32) {
        let signal = self.transport.get_completion_fd(queue);
        loop {
            if let Some(done) = self.queues[queue].completions().next() {
                return (done.context, done.ret);
            }
            let mut polls = [PollFd::new(signal.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(DEADLINE).unwrap();
            assert_eq!(poll(&mut polls, timeout).unwrap(), 1, "no completion");
            signal.read().unwrap();
        }
    }

    /// A completion that is there already.
    pub(crate) fn poll_completion(&mut self, queue: usize) -> Option<(usize, i32)> {
        let done = self.queues[queue].completions().next()?;
        Some((done.context, done.ret))
    }

    fn finish(&mut self, queue: usize) -> i32 {
        self.kick(queue);
        self.completion(queue).1
    }
}

/// A request of any shape.
#[derive(Clone, Copy)]
pub(crate) struct RawRequest {
    pub(crate) header: [u8; 16],
    pub(crate) payload: [u8; 1024],
    pub(crate) answer: [u8; 1024],
    pub(crate) status: u8,
}

/// A field of [`RawRequest`], cut into pieces of the given lengths.
pub(crate) enum Piece {
    Header(usize, usize),
    Payload(usize, usize),
    Answer(usize, usize),
    Status,
}

/// A frontend that speaks virtqueue and nothing more.
pub(crate) struct RawClient {
    queue: Virtqueue<'static, RawRequest>,
    transport: VhostUser<VirtioBlkConfig, RawRequest>,
}

/// What status reads as when the daemon wrote none.
pub(crate) const NO_STATUS: u8 = 0xff;

impl RawClient {
    pub(crate) fn connect(socket: &Path) -> Self {
        let mut transport: VhostUser<VirtioBlkConfig, RawRequest> =
            VhostUser::new(socket.to_str().unwrap(), all_features()).unwrap();
        let features = VirtioFeatureFlags::from_bits_truncate(transport.get_features());
        let layout =
            VirtqueueLayout::new::<RawRequest>(1, usize::from(QUEUE_SIZE), features).unwrap();
        let translator = transport.iova_translator();
        let memory = transport.alloc_queue_mem(&layout).unwrap();
        // SAFETY: the transport keeps this memory mapped, and it is dropped after the queue.
        let memory = unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr(), memory.len()) };
        let queue = Virtqueue::new(translator, memory, QUEUE_SIZE, features).unwrap();
        transport
            .setup_queues(std::slice::from_ref(&queue))
            .unwrap();
        Self { queue, transport }
    }

    /// Sends a request of type `kind` whose chain is `pieces`; returns it as the daemon left
    /// it.
    pub(crate) fn request(
        &mut self,
        kind: u32,
        sector: u64,
        payload: &[u8],
        pieces: &[Piece],
    ) -> RawRequest {
        let mut filled = RawRequest {
            header: [0; 16],
            payload: [0; 1024],
            answer: [0xee; 1024],
            status: NO_STATUS,
        };
        filled.header[..4].copy_from_slice(&kind.to_le_bytes());
        filled.header[8..].copy_from_slice(&sector.to_le_bytes());
        filled.payload[..payload.len()].copy_from_slice(payload);
        self.queue
            .add_request(|request, add| {
                *request = filled;
                for piece in pieces {
                    let (bytes, from_device) = match *piece {
                        Piece::Header(at, len) => (&mut request.header[at..at + len], false),
                        Piece::Payload(at, len) => (&mut request.payload[at..at + len], false),
                        Piece::Answer(at, len) => (&mut request.answer[at..at + len], true),
                        Piece::Status => (std::slice::from_mut(&mut request.status), true),
                    };
                    let iov_base = bytes.as_mut_ptr().cast();
                    add(
                        iovec {
                            iov_base,
                            iov_len: bytes.len(),
                        },
                        from_device,
                    )?;
                }
                Ok(())
            })
            .unwrap();
        self.transport.get_submission_notifier(0).notify().unwrap();
        await_some("a request completes", || self.queue.completions().next()).req
    }
}
