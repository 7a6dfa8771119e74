//! A disk that an NBD server has.
//!
//! The client has threads of its own and takes requests by the hundred, so tasks are handed over
//! to it ([`Executor`]) and no worker waits for one. What a connection's end means for requests is
//! told in [`nbd::client`]: they wait, and no guest sees an error, unless the server says that
//! the disk has another owner.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use nbd::client::{Client, Command, Request};

use super::{Access, DirectIo, Executor, Image, PendingTask, Place, SECTOR_BYTES, Task};

/// What one command zeroes or discards; larger ranges go piece by piece.
const MAX_RANGE_BYTES: u64 = 1 << 30;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct NbdImage {
    client: Arc<Client>,
    name: String,
    is_read_only: bool,
    capacity_sectors: AtomicU64,
    patience: Mutex<Option<Duration>>,
}

impl NbdImage {
    pub(crate) fn new(client: Client, name: String, is_read_only: bool) -> Self {
        Self {
            capacity_sectors: AtomicU64::new(client.size_bytes() / SECTOR_BYTES),
            client: Arc::new(client),
            name,
            is_read_only,
            patience: Mutex::new(None),
        }
    }

    fn begin_work(&self, work: impl Work + 'static) {
        let max_payload_bytes = u64::from(self.client.max_payload_bytes());
        Ongoing {
            client: Arc::clone(&self.client),
            work,
            done_bytes: 0,
            max_payload_bytes,
        }
        .go_on();
    }
}

impl Image for NbdImage {
    fn name(&self) -> &str {
        &self.name
    }

    fn format(&self) -> &'static str {
        "nbd"
    }

    fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors.load(Ordering::Acquire)
    }

    fn physical_block_bytes(&self) -> u32 {
        self.client
            .preferred_block_bytes()
            .clamp(SECTOR_BYTES as u32, 4096)
    }

    fn punches_holes(&self) -> bool {
        !self.is_read_only && self.client.can_trim()
    }

    fn direct(&self) -> Option<DirectIo> {
        None
    }

    fn locate(&self, _: Access, _: u64, len_bytes: u64) -> Place {
        Place::Worker { len_bytes }
    }

    fn perform(&self, task: &mut Task<'_>) -> Result<(), i32> {
        let (done, result) = mpsc::sync_channel(1);
        // SAFETY: this function waits until the client has let go of the task: `Borrowed` tells
        // so when it is dropped, whatever happens.
        let work = unsafe { Borrowed::new(task, done) };
        self.begin_work(work);
        let patience = *self.patience.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(patience) = patience {
            match result.recv_timeout(patience) {
                Ok(result) => return result,
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(libc::EIO),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    tracing::error!(
                        image = self.name,
                        "no answer within {patience:?}; it is given up"
                    );
                    self.client.abandon();
                    // It may have come at the last moment.
                    let result = result.recv().unwrap_or(Err(libc::EIO));
                    return result.map_err(|_| libc::ETIMEDOUT);
                }
            }
        }
        result.recv().unwrap_or(Err(libc::EIO))
    }

    fn executor(&self) -> Option<&dyn Executor> {
        Some(self)
    }

    fn resize(&self, capacity_sectors: u64) -> io::Result<()> {
        if self.client.size_bytes() / SECTOR_BYTES < capacity_sectors {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the server's export is smaller; grow it there, let the server be started again, \
                 and resize the disk then",
            ));
        }
        self.capacity_sectors
            .fetch_max(capacity_sectors, Ordering::AcqRel);
        Ok(())
    }

    fn set_patience(&self, patience: Option<Duration>) {
        *self.patience.lock().unwrap_or_else(PoisonError::into_inner) = patience;
    }

    fn abandon(&self) {
        self.client.abandon();
    }

    fn remote_status(&self) -> Option<nbd::client::Status> {
        Some(self.client.status())
    }
}

impl Executor for NbdImage {
    fn begin(&self, pending: Box<dyn PendingTask>) {
        self.begin_work(pending);
    }

    fn release_abandoned(&self) {
        self.client.release_abandoned();
    }
}

/// A task, wherever it is from.
trait Work: Send {
    fn task(&self) -> Task<'_>;
    fn is_abandoned(&self) -> bool;
    fn finish(self, result: Result<(), i32>);
}

impl Work for Box<dyn PendingTask> {
    fn task(&self) -> Task<'_> {
        (**self).task()
    }

    fn is_abandoned(&self) -> bool {
        (**self).is_abandoned()
    }

    fn finish(self, result: Result<(), i32>) {
        self.complete(result);
    }
}

/// A task whose owner waits in [`Image::perform`].
struct Borrowed {
    task: *const Task<'static>,
    done: mpsc::SyncSender<Result<(), i32>>,
}

// SAFETY: the task is used by one thread at a time, and its owner waits.
unsafe impl Send for Borrowed {}

impl Borrowed {
    /// # Safety
    /// The caller waits until the other end of `done` has an answer or is closed, with `task`
    /// untouched.
    unsafe fn new(task: &Task<'_>, done: mpsc::SyncSender<Result<(), i32>>) -> Self {
        Self {
            task: std::ptr::from_ref(task).cast(),
            done,
        }
    }
}

impl Work for Borrowed {
    fn task(&self) -> Task<'_> {
        // SAFETY: the owner waits, by `new`'s contract.
        match unsafe { &*self.task } {
            Task::Read {
                offset_bytes,
                buffers,
            } => Task::Read {
                offset_bytes: *offset_bytes,
                buffers: *buffers,
            },
            Task::Write {
                offset_bytes,
                buffers,
            } => Task::Write {
                offset_bytes: *offset_bytes,
                buffers: *buffers,
            },
            Task::WriteZeroes {
                offset_bytes,
                len_bytes,
                unmap,
            } => Task::WriteZeroes {
                offset_bytes: *offset_bytes,
                len_bytes: *len_bytes,
                unmap: *unmap,
            },
            Task::Discard {
                offset_bytes,
                len_bytes,
            } => Task::Discard {
                offset_bytes: *offset_bytes,
                len_bytes: *len_bytes,
            },
            Task::Flush => Task::Flush,
        }
    }

    /// Its owner waits.
    fn is_abandoned(&self) -> bool {
        false
    }

    fn finish(self, result: Result<(), i32>) {
        // There is room for one answer, and its owner waits.
        let _ = self.done.try_send(result);
    }
}

/// A task under way, command by command.
struct Ongoing<W> {
    client: Arc<Client>,
    work: W,
    done_bytes: u64,
    max_payload_bytes: u64,
}

impl<W: Work + 'static> Ongoing<W> {
    fn go_on(self) {
        let client = Arc::clone(&self.client);
        client.submit(Box::new(self));
    }

    fn len_bytes(&self) -> u64 {
        match self.work.task() {
            Task::Read { buffers, .. } | Task::Write { buffers, .. } => buffers.len_bytes() as u64,
            Task::WriteZeroes { len_bytes, .. } | Task::Discard { len_bytes, .. } => len_bytes,
            Task::Flush => 0,
        }
    }

    /// Bytes of the command that is next.
    fn step_bytes(&self, max_bytes: u64) -> u32 {
        (self.len_bytes() - self.done_bytes).min(max_bytes) as u32
    }

    fn current_step_bytes(&self) -> u64 {
        match self.command() {
            Command::Read { len_bytes, .. }
            | Command::Write { len_bytes, .. }
            | Command::WriteZeroes { len_bytes, .. }
            | Command::Trim { len_bytes, .. } => u64::from(len_bytes),
            Command::Flush => 0,
        }
    }
}

impl<W: Work + 'static> Request for Ongoing<W> {
    fn command(&self) -> Command {
        match self.work.task() {
            Task::Read { offset_bytes, .. } => Command::Read {
                offset_bytes: offset_bytes + self.done_bytes,
                len_bytes: self.step_bytes(self.max_payload_bytes),
            },
            Task::Write { offset_bytes, .. } => Command::Write {
                offset_bytes: offset_bytes + self.done_bytes,
                len_bytes: self.step_bytes(self.max_payload_bytes),
                fua: false,
            },
            Task::WriteZeroes {
                offset_bytes,
                unmap,
                ..
            } if self.client.can_write_zeroes() => Command::WriteZeroes {
                offset_bytes: offset_bytes + self.done_bytes,
                len_bytes: self.step_bytes(MAX_RANGE_BYTES),
                may_unmap: unmap,
                fua: false,
            },
            // Zeroes as data, from `payload`.
            Task::WriteZeroes { offset_bytes, .. } => Command::Write {
                offset_bytes: offset_bytes + self.done_bytes,
                len_bytes: self.step_bytes(self.max_payload_bytes),
                fua: false,
            },
            Task::Discard { offset_bytes, .. } => Command::Trim {
                offset_bytes: offset_bytes + self.done_bytes,
                len_bytes: self.step_bytes(MAX_RANGE_BYTES),
            },
            Task::Flush => Command::Flush,
        }
    }

    fn payload(&mut self, at_bytes: usize, into: &mut [u8]) {
        match self.work.task() {
            Task::Write { buffers, .. } => {
                let copied = buffers.read_at(self.done_bytes as usize + at_bytes, into);
                debug_assert_eq!(copied, into.len(), "the command is as long as its buffers");
            }
            _ => into.fill(0),
        }
    }

    fn store(&mut self, at_bytes: usize, from: &[u8]) {
        if let Task::Read { buffers, .. } = self.work.task() {
            let copied = buffers.write_at(self.done_bytes as usize + at_bytes, from);
            debug_assert_eq!(copied, from.len(), "the command is as long as its buffers");
        }
    }

    fn is_abandoned(&self) -> bool {
        self.work.is_abandoned()
    }

    fn complete(mut self: Box<Self>, result: Result<(), i32>) {
        let is_discard = matches!(self.work.task(), Task::Discard { .. });
        match result {
            // A discard is advice.
            Err(libc::EOPNOTSUPP) if is_discard => self.work.finish(Ok(())),
            Err(errno) => self.work.finish(Err(errno)),
            Ok(()) => {
                self.done_bytes += self.current_step_bytes();
                if self.done_bytes < self.len_bytes() {
                    self.go_on();
                } else {
                    self.work.finish(Ok(()));
                }
            }
        }
    }
}
