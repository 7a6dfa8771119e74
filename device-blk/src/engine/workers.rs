//! Threads that do for an image what may block.
//!
//! One of several is kept for reads: a medium that takes no writes would otherwise keep those
//! waiting that it could answer.
//!
//! A disk has none until its image needs them. The first is started by whoever attaches or
//! exchanges the image; from then on one is always idle, up to the image's bound: a thread that
//! takes an item and leaves nobody waiting starts its successor first. (Queues' threads could not
//! do that: what they start would be confined like them.) Surplus threads end after a while.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use vhost_user::eventfd::EventFd;
use vhost_user::ring::MemoryPin;

use super::allowance::Allowance;
use crate::confinement;
use crate::image::{Buffers, Image, PendingTask, Task};

/// A thread that had nothing to do for so long ends, unless it is the last.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// What to do, without the memory to do it with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read {
        offset_bytes: u64,
    },
    Write {
        offset_bytes: u64,
    },
    WriteZeroes {
        offset_bytes: u64,
        len_bytes: u64,
        unmap: bool,
    },
    Discard {
        offset_bytes: u64,
        len_bytes: u64,
    },
    Flush,
}

/// One thing to do for a queue. It is answered exactly once: with an error if it is dropped.
pub(super) struct Item {
    /// `None` when it was answered.
    held: Option<Held>,
    operation: Operation,
    /// Of the guest's memory or of a buffer that the job holds until it gets the result.
    iovecs: Vec<libc::iovec>,
    /// Where the job is.
    slot: usize,
    results: Arc<Results>,
    /// Of the disk.
    allowance: Arc<Allowance>,
}

/// What an item keeps alive.
pub(super) struct Held {
    pub(super) image: Arc<dyn Image>,
    /// Keeps the guest's memory mapped.
    #[expect(dead_code, reason = "held for its drop")]
    pub(super) pin: MemoryPin,
}

// SAFETY: the vectors are addresses of memory that the pin and the waiting job keep valid; any
// thread may use them, as the kernel does.
unsafe impl Send for Item {}

/// The result of an [`Item`].
pub(super) struct Done {
    pub(super) slot: usize,
    /// 0 or a negative error number, as io_uring has it.
    pub(super) result: i32,
    /// To be used again.
    pub(super) iovecs: Vec<libc::iovec>,
}

// SAFETY: as for `Item`.
unsafe impl Send for Done {}

/// Results on their way to one queue; never more than it has requests.
pub(super) struct Results {
    done: Mutex<VecDeque<Done>>,
    waker: Arc<EventFd>,
    is_abandoned: AtomicBool,
}

impl Results {
    pub(super) fn new(waker: Arc<EventFd>) -> Self {
        Self {
            done: Mutex::default(),
            waker,
            is_abandoned: AtomicBool::new(false),
        }
    }

    /// The queue ends: what was not begun need not be.
    pub(super) fn abandon(&self) {
        self.is_abandoned.store(true, Ordering::Release);
    }

    fn is_abandoned(&self) -> bool {
        self.is_abandoned.load(Ordering::Acquire)
    }

    pub(super) fn take(&self) -> Option<Done> {
        lock(&self.done).pop_front()
    }

    pub(super) fn is_empty(&self) -> bool {
        lock(&self.done).is_empty()
    }

    fn put(&self, done: Done) {
        lock(&self.done).push_back(done);
        self.waker.ring();
    }
}

/// The threads of one disk.
#[derive(Default)]
pub(crate) struct Workers {
    pool: Arc<Pool>,
}

#[derive(Default)]
struct Pool {
    state: Mutex<State>,
    changed: Condvar,
}

/// Who starts a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Starter {
    Process,
    Worker,
}

#[derive(Default)]
struct State {
    items: VecDeque<Item>,
    name: String,
    threads: usize,
    max_threads: usize,
    /// Threads that do something else than reading.
    changing: usize,
    idle: usize,
    is_ended: bool,
}

impl Workers {
    /// Sees to it that there is a thread. Must run on a thread that is not a queue's.
    pub(super) fn prepare(&self, name: &str, max_threads: usize) {
        let mut state = lock(&self.pool.state);
        state.name = name.rsplit('/').next().unwrap_or(name).to_owned();
        state.max_threads = max_threads.max(1);
        if state.threads == 0 {
            Pool::start_thread(&self.pool, &mut state, Starter::Process);
        }
    }

    pub(super) fn submit(&self, item: Item) {
        let image = Arc::clone(item.image());
        if let Some(executor) = image.executor() {
            return executor.begin(Box::new(item));
        }
        let mut state = lock(&self.pool.state);
        if state.threads == 0 {
            drop(state);
            // Its thread could not be started, which was logged then.
            return item.answer(-libc::ENOMEM);
        }
        state.items.push_back(item);
        drop(state);
        self.pool.changed.notify_one();
    }
}

impl Drop for Workers {
    /// Threads end when they are through; nobody waits for a result any more.
    fn drop(&mut self) {
        lock(&self.pool.state).is_ended = true;
        self.pool.changed.notify_all();
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.pool.state);
        f.debug_struct("Workers")
            .field("threads", &state.threads)
            .field("idle", &state.idle)
            .finish()
    }
}

impl Pool {
    fn start_thread(pool: &Arc<Self>, state: &mut State, starter: Starter) {
        // Thread names have 15 characters.
        let short_name: String = state.name.chars().take(11).collect();
        let own = Arc::clone(pool);
        let started = thread::Builder::new()
            .name(format!("{short_name}/io"))
            .spawn(move || own.run(starter));
        match started {
            Ok(_) => state.threads += 1,
            Err(error) => {
                tracing::error!(image = state.name, %error, "no further worker thread");
            }
        }
    }

    fn run(self: Arc<Self>, starter: Starter) {
        // What a worker starts is confined already, and another filter would only add up.
        if starter == Starter::Process
            && let Err(error) = confinement::confine_worker_thread()
        {
            tracing::error!(%error, "a worker thread cannot be confined and ends");
            let mut state = lock(&self.state);
            state.threads -= 1;
            let abandoned = match state.threads {
                0 => std::mem::take(&mut state.items),
                _ => VecDeque::new(),
            };
            drop(state);
            for item in abandoned {
                item.answer(-libc::EIO);
            }
            return;
        }
        while let Some(item) = self.next_item() {
            let changes = item.changes();
            if item.results.is_abandoned() {
                item.answer(-libc::ECANCELED);
            } else if item.allowance.is_over() {
                // The queue begins it anew, once it may.
                item.answer(-libc::EAGAIN);
            } else {
                let performed = panic::catch_unwind(AssertUnwindSafe(|| item.perform()));
                // A defect of the image's; the guest must not wait for ever.
                item.answer(performed.unwrap_or(-libc::EIO));
            }
            // This thread looks for the next item itself, also for one that had to wait for it.
            lock(&self.state).changing -= usize::from(changes);
        }
    }

    /// Waits for something to do; `None` ends the thread.
    fn next_item(self: &Arc<Self>) -> Option<Item> {
        let mut state = lock(&self.state);
        loop {
            if let Some(item) = state.take_item() {
                if state.idle == 0 && state.threads < state.max_threads {
                    Self::start_thread(self, &mut state, Starter::Worker);
                }
                return Some(item);
            }
            if state.is_ended {
                state.threads -= 1;
                return None;
            }
            state.idle += 1;
            let is_last = state.idle == 1;
            let timed_out;
            if is_last {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                timed_out = false;
            } else {
                let (woken, wait) = self
                    .changed
                    .wait_timeout(state, IDLE_TIMEOUT)
                    .unwrap_or_else(PoisonError::into_inner);
                state = woken;
                timed_out = wait.timed_out();
            }
            state.idle -= 1;
            if timed_out && state.items.is_empty() && state.idle > 0 {
                state.threads -= 1;
                return None;
            }
        }
    }
}

impl State {
    /// The first item that may begin.
    fn take_item(&mut self) -> Option<Item> {
        let may_change = self.changing + 1 < self.max_threads.max(2);
        let first = self
            .items
            .iter()
            .position(|item| may_change || !item.changes());
        let item = self.items.remove(first?)?;
        self.changing += usize::from(item.changes());
        Some(item)
    }
}

impl Item {
    fn changes(&self) -> bool {
        !matches!(self.operation, Operation::Read { .. })
    }

    pub(super) fn new(
        held: Held,
        operation: Operation,
        iovecs: Vec<libc::iovec>,
        slot: usize,
        results: Arc<Results>,
        allowance: Arc<Allowance>,
    ) -> Self {
        Self {
            held: Some(held),
            operation,
            iovecs,
            slot,
            results,
            allowance,
        }
    }

    fn image(&self) -> &Arc<dyn Image> {
        let held = self.held.as_ref();
        &held.expect("it holds its image until it is answered").image
    }

    fn perform(&self) -> i32 {
        result_code(self.image().perform(&mut self.task()))
    }

    fn answer(mut self, result: i32) {
        self.answer_once(result);
    }

    fn answer_once(&mut self, result: i32) {
        // Before the queue hears of it: it may end then, and its image be let go.
        if self.held.take().is_some() {
            self.results.put(Done {
                slot: self.slot,
                result,
                iovecs: std::mem::take(&mut self.iovecs),
            });
        }
    }
}

impl Drop for Item {
    /// Whoever took it lost it, which is a defect; the guest must not wait for ever.
    fn drop(&mut self) {
        self.answer_once(-libc::EIO);
    }
}

impl PendingTask for Item {
    fn task(&self) -> Task<'_> {
        // SAFETY: the pin keeps the guest's memory mapped, and a job keeps its buffer until it
        // has the result; nobody refers to either as Rust values meanwhile.
        let buffers = unsafe { Buffers::new(&self.iovecs) };
        match self.operation {
            Operation::Read { offset_bytes } => Task::Read {
                offset_bytes,
                buffers,
            },
            Operation::Write { offset_bytes } => Task::Write {
                offset_bytes,
                buffers,
            },
            Operation::WriteZeroes {
                offset_bytes,
                len_bytes,
                unmap,
            } => Task::WriteZeroes {
                offset_bytes,
                len_bytes,
                unmap,
            },
            Operation::Discard {
                offset_bytes,
                len_bytes,
            } => Task::Discard {
                offset_bytes,
                len_bytes,
            },
            Operation::Flush => Task::Flush,
        }
    }

    fn is_abandoned(&self) -> bool {
        self.results.is_abandoned()
    }

    fn complete(self: Box<Self>, result: Result<(), i32>) {
        (*self).answer(result_code(result));
    }
}

/// As io_uring has it. An error number of 0 or below would pass for success.
fn result_code(result: Result<(), i32>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(errno) => -errno.max(1),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
