//! What the queues of a disk share, and what they read of it.
//!
//! ```text
//!                 ┌─ image ........ what is served; exchanged behind the gate alone
//!   BlkDevice ──► Backend ─ gate ......... stops all queues at one instant
//!   jobs ───────►  │      ─ workers ...... threads that may block
//!                  └─ observers .. rate limits, notes of what is written
//! ```

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use faults::DeviceFaults;
use vhost_user::backend::Polling;

use super::allowance::Allowance;
use super::gate::{Gate, GateError};
use super::ghosts::Ghosts;
use super::workers::Workers;
use crate::image::{Access, Image, SECTOR_BYTES};
use crate::latency::SlowThreshold;
use request::{ID_BYTES, Limits};

/// Decides when reads and writes may begin: rate limits.
pub(crate) trait Admission: Send + Sync {
    /// False when every request is admitted at once. Asked once for many requests.
    fn is_limited(&self) -> bool;
    /// Takes what a request costs. Requests of one direction and queue are asked for in their
    /// order.
    ///
    /// # Errors
    /// The time (`CLOCK_MONOTONIC`) at which the same request may go: its turn is reserved, and it
    /// is asked for again then, or earlier when the limits were changed.
    fn admit(&self, queue: u16, access: Access, len_bytes: u64, now_ns: u64) -> Result<(), u64>;
}

/// Hears of every change: dirty bitmaps, mirrors.
pub(crate) trait WriteObserver: Send + Sync {
    /// A write, write-zeroes or discard is over, whatever became of it, and is answered next.
    /// Before it begins would not do: a copier could take the note, read what was there, and miss
    /// what comes. Called on queues' threads for each: cheap when nobody is interested, and never
    /// blocks.
    fn mark(&self, offset_bytes: u64, len_bytes: u64);
}

/// No limits, nobody interested.
#[derive(Debug)]
pub(crate) struct Unobserved;

impl Admission for Unobserved {
    fn is_limited(&self) -> bool {
        false
    }

    fn admit(&self, _: u16, _: Access, _: u64, _: u64) -> Result<(), u64> {
        Ok(())
    }
}

impl WriteObserver for Unobserved {
    fn mark(&self, _: u64, _: u64) {}
}

/// How a disk is served.
#[derive(Clone)]
pub(crate) struct ServeOptions {
    /// The answer to GET_ID.
    pub(crate) serial: [u8; ID_BYTES],
    /// 512 or 4096.
    pub(crate) block_bytes: u32,
    pub(crate) polling: Polling,
    /// CPUs the queues' threads run on, in turn; empty for any.
    pub(crate) cpus: Vec<usize>,
    pub(crate) admission: Arc<dyn Admission>,
    pub(crate) observer: Arc<dyn WriteObserver>,
    pub(crate) slow: Arc<SlowThreshold>,
    /// What is to go wrong on purpose.
    pub(crate) faults: Arc<DeviceFaults>,
    /// Until when it may do I/O.
    pub(crate) allowance: Arc<Allowance>,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            serial: [0; ID_BYTES],
            block_bytes: SECTOR_BYTES as u32,
            polling: Polling::Adaptive,
            cpus: Vec::new(),
            admission: Arc::new(Unobserved),
            observer: Arc::new(Unobserved),
            slow: SlowThreshold::new(0),
            faults: DeviceFaults::none(),
            allowance: Arc::new(Allowance::always()),
        }
    }
}

/// A disk as its queues see it. Outlives sessions.
pub(crate) struct Backend {
    image: RwLock<Arc<dyn Image>>,
    /// Images that were exchanged, and may still be looked at by queues. Closing one may block and
    /// write, which a queue's thread is not allowed to: see [`Backend::close_retired`].
    retired: Mutex<Vec<Arc<dyn Image>>>,
    pub(super) gate: Gate,
    pub(super) workers: Workers,
    pub(super) options: ServeOptions,
    polling: AtomicU8,
    ghosts: Mutex<Vec<Ghosts>>,
}

impl Backend {
    pub(crate) fn new(image: Arc<dyn Image>, options: ServeOptions) -> Self {
        let backend = Self {
            gate: Gate::default(),
            workers: Workers::default(),
            polling: AtomicU8::new(options.polling as u8),
            image: RwLock::new(image),
            retired: Mutex::default(),
            options,
            ghosts: Mutex::default(),
        };
        backend.prepare_workers(&*backend.image());
        backend
    }

    /// What is served now.
    pub(crate) fn image(&self) -> Arc<dyn Image> {
        Arc::clone(&self.image.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Stops all queues, runs `alone`, and lets them go on. No request runs meanwhile; new ones
    /// stay in their rings. `alone` may exchange the image that it is handed, for one of the same
    /// capacity or more; it must be short, since the guest waits.
    ///
    /// # Errors
    /// Requests in flight did not complete within `patience`: nothing happened.
    pub(crate) fn quiesced<T>(
        &self,
        patience: Duration,
        alone: impl FnOnce(&mut Arc<dyn Image>) -> T,
    ) -> Result<T, GateError> {
        self.gate.closed(patience, || {
            let mut image = self.image();
            let result = alone(&mut image);
            self.prepare_workers(&*image);
            let mut served = self.image.write().unwrap_or_else(PoisonError::into_inner);
            if !Arc::ptr_eq(&served, &image) {
                let mut retired = self.retired();
                // It may have been served before, as that of a backup that is over.
                retired.retain(|other| !Arc::ptr_eq(other, &image));
                retired.push(std::mem::replace(&mut *served, image));
            }
            result
        })
    }

    /// Closes images that were exchanged, on this thread, as soon as the queues have let go of
    /// them. Whoever exchanged one calls it when it has no use for the old one any more. What is
    /// still used after a while is closed the next time.
    pub(crate) fn close_retired(&self) {
        /// A queue lets go of an image when it is woken by the gate.
        const PATIENCE: Duration = Duration::from_secs(5);
        const LOOK_INTERVAL: Duration = Duration::from_millis(1);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (unused, used): (Vec<_>, Vec<_>) = std::mem::take(&mut *self.retired())
                .into_iter()
                .partition(|image| Arc::strong_count(image) == 1);
            let is_done = used.is_empty();
            self.retired().extend(used);
            drop(unused);
            if is_done || Instant::now() >= deadline {
                return;
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    fn retired(&self) -> MutexGuard<'_, Vec<Arc<dyn Image>>> {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn polling(&self) -> Polling {
        match self.polling.load(Ordering::Relaxed) {
            x if x == Polling::Never as u8 => Polling::Never,
            x if x == Polling::Always as u8 => Polling::Always,
            _ => Polling::Adaptive,
        }
    }

    /// Takes effect with the next request of each queue.
    pub(crate) fn set_polling(&self, polling: Polling) {
        self.polling.store(polling as u8, Ordering::Relaxed);
        self.gate.wake_all();
    }

    /// Makes queues look at what changed: limits, capacity.
    pub(crate) fn wake_queues(&self) {
        self.gate.wake_all();
    }

    /// What is to go wrong on purpose.
    pub(crate) fn faults(&self) -> &Arc<DeviceFaults> {
        &self.options.faults
    }

    /// See [`ServeOptions::allowance`].
    pub(crate) fn allowance(&self) -> &Allowance {
        &self.options.allowance
    }

    /// See [`ServeOptions::cpus`].
    pub(crate) fn cpus(&self) -> &[usize] {
        &self.options.cpus
    }

    pub(crate) fn block_bytes(&self) -> u32 {
        self.options.block_bytes
    }

    /// Whether operations of a queue that ended have not.
    pub(crate) fn has_ghosts(&self) -> bool {
        let mut ghosts = self.ghosts.lock().unwrap_or_else(PoisonError::into_inner);
        let had_ghosts = !ghosts.is_empty();
        ghosts.retain_mut(|of_queue| !of_queue.have_ended());
        if had_ghosts && ghosts.is_empty() {
            tracing::info!(
                image = self.image().name(),
                "the requests that still ran have ended; the disk can be used again"
            );
        }
        !ghosts.is_empty()
    }

    /// Keeps what a queue leaves behind.
    pub(super) fn keep(&self, ghosts: Ghosts) {
        self.ghosts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(ghosts);
    }

    /// Capacity in whole blocks.
    pub(crate) fn capacity_sectors(&self, image: &dyn Image) -> u64 {
        let block_sectors = u64::from(self.options.block_bytes) / SECTOR_BYTES;
        image.capacity_sectors() / block_sectors * block_sectors
    }

    /// What requests are checked against.
    pub(crate) fn limits(&self, image: &dyn Image) -> Limits {
        Limits {
            capacity_sectors: self.capacity_sectors(image),
            block_sectors: u64::from(self.options.block_bytes) / SECTOR_BYTES,
            read_only: image.is_read_only(),
            discard: image.punches_holes(),
        }
    }

    /// Queues' threads start no others: they are confined too far.
    fn prepare_workers(&self, image: &dyn Image) {
        if image.plain_file().is_none() {
            self.workers.prepare(image.name(), image.max_workers());
        }
    }
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend")
            .field("image", &self.image)
            .finish_non_exhaustive()
    }
}
