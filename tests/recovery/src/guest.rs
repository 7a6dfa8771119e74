//! The guest of a disk: rings of the third-party crate `virtio-driver`, kept full of reads and
//! writes that an [`oracle`](guest::oracle) verifies, across any number of backends.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guest::oracle::{self, BLOCK_LEN, Ledger};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::Memory;
use crate::random::Random;
use crate::ring::{Kind, Ring, RingMemory};
use crate::transport::{Flaw, Progress, Transport, Wiring};

const WAKE: u64 = u64::MAX;
/// What one read touches of memory.
const TOUCH_BYTES: usize = 1 << 20;

/// How a guest uses its disk.
#[derive(Clone, Debug)]
pub struct Habits {
    /// Rings.
    pub queues: usize,
    /// Requests in flight on each.
    pub depth: usize,
    /// Packed rings instead of split ones.
    pub packed: bool,
    /// All of the memory that is shared.
    pub memory_bytes: usize,
    /// Blocks at the disk's start that are written and verified.
    pub blocks: u64,
    /// Of everything random.
    pub seed: u64,
    /// One flush for so many requests; 0 for none.
    pub flush_every: u64,
    /// Of a hundred requests.
    pub writes_percent: u64,
    /// What to do wrong.
    pub flaw: Flaw,
    /// How long nothing may complete while anything is in flight.
    pub patience: Duration,
}

impl Default for Habits {
    fn default() -> Self {
        Self {
            queues: 4,
            depth: 32,
            packed: false,
            memory_bytes: 64 << 20,
            blocks: 16 << 10,
            seed: 1,
            flush_every: 1000,
            writes_percent: 50,
            flaw: Flaw::None,
            patience: Duration::from_secs(20),
        }
    }
}

/// What the guest shows while it runs.
#[derive(Debug)]
pub struct Display {
    started: Instant,
    /// Requests in flight now.
    pub in_flight: AtomicU64,
    /// Requests that were answered.
    pub completed: AtomicU64,
    /// Time of the first completion after the last hang-up, in ns since the start; 0 until then.
    first_completion_ns: AtomicU64,
    /// The last hang-up that was noticed.
    noticed: AtomicU64,
    /// No request is begun.
    quiet: AtomicBool,
    touch: AtomicBool,
    ended: AtomicBool,
    /// What is in flight is not waited for.
    abandoned: AtomicBool,
    /// Found guilty: it stopped by itself.
    failed: AtomicBool,
    latencies: Mutex<Vec<Duration>>,
    /// The longest time without a completion since it was taken last.
    gap_ns: AtomicU64,
    wake: EventFd,
}

impl Display {
    /// Stopped by itself, because something was wrong.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// The first completion after hang-up number `hang_up`, once there is one.
    pub fn first_completion(&self, hang_up: u64) -> Option<Instant> {
        if self.noticed.load(Ordering::SeqCst) < hang_up {
            return None;
        }
        match self.first_completion_ns.load(Ordering::SeqCst) {
            0 => None,
            ns => Some(self.started + Duration::from_nanos(ns)),
        }
    }

    /// Hang-ups after which the guest has looked at what the old backend left.
    pub fn hang_ups_noticed(&self) -> u64 {
        self.noticed.load(Ordering::SeqCst)
    }

    /// How long requests took since the last call.
    pub fn take_latencies(&self) -> Vec<Duration> {
        std::mem::take(&mut *self.latencies())
    }

    /// The longest time between two completions since the last call.
    pub fn take_gap(&self) -> Duration {
        Duration::from_nanos(self.gap_ns.swap(0, Ordering::SeqCst))
    }

    /// Begins no more requests, or goes on.
    pub fn set_quiet(&self, quiet: bool) {
        self.quiet.store(quiet, Ordering::SeqCst);
        let _ = self.wake.write(1);
    }

    /// Lets the backend touch all memory, once nothing is in flight; [`Self::is_touched`] tells
    /// when that is over. To be called while quiet.
    pub fn begin_touch(&self) {
        self.touch.store(true, Ordering::SeqCst);
        let _ = self.wake.write(1);
    }

    /// See [`Self::begin_touch`].
    pub fn is_touched(&self) -> bool {
        !self.touch.load(Ordering::SeqCst)
    }

    fn latencies(&self) -> std::sync::MutexGuard<'_, Vec<Duration>> {
        self.latencies
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A guest at work on a thread of its own.
#[derive(Debug)]
pub struct Guest {
    transport: Option<Transport>,
    display: Arc<Display>,
    thread: Option<JoinHandle<Ledger>>,
}

impl Guest {
    /// Boots: connects to `socket`, where a backend must answer by now, and fills its rings.
    ///
    /// # Errors
    /// When the backend lacks something, or the system refuses.
    pub fn boot(socket: &Path, habits: &Habits) -> io::Result<Self> {
        let memory = Arc::new(Memory::new(habits.memory_bytes)?);
        let features = crate::ring::features(habits.packed);
        let mut places = RingMemory::new(socket, features, &memory)?;
        let rings = (0..habits.queues)
            .map(|_| places.ring(habits.depth))
            .collect::<io::Result<Vec<Ring>>>()?;
        let (free_pages, touchable) = places.pages();
        let plans = rings.iter().map(Ring::plan).collect::<io::Result<_>>()?;
        let transport = Transport::start(Wiring {
            socket: socket.to_owned(),
            memory: Arc::clone(&memory),
            rings: plans,
            features,
            flaw: habits.flaw,
        })?;
        let display = Arc::new(Display {
            started: Instant::now(),
            in_flight: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            first_completion_ns: AtomicU64::new(0),
            noticed: AtomicU64::new(0),
            quiet: AtomicBool::new(false),
            touch: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            latencies: Mutex::default(),
            gap_ns: AtomicU64::new(0),
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        });
        let driver = Driver {
            random: Random::new(habits.seed),
            ledger: Ledger::new(habits.seed, habits.blocks),
            habits: habits.clone(),
            rings,
            memory,
            free_pages: free_pages.into(),
            touchable,
            display: Arc::clone(&display),
            progress: Arc::clone(transport.progress()),
            in_flight: 0,
            requests: 0,
            last_completion: Instant::now(),
            latencies: Vec::new(),
        };
        let signals = driver.signals()?;
        let thread = thread::Builder::new()
            .name("guest".to_owned())
            .spawn(move || driver.run(&signals))?;
        Ok(Self {
            transport: Some(transport),
            display,
            thread: Some(thread),
        })
    }

    /// What it shows.
    pub fn display(&self) -> &Arc<Display> {
        &self.display
    }

    /// How its connection is.
    pub fn progress(&self) -> &Arc<Progress> {
        self.transport
            .as_ref()
            .expect("only `end` takes it")
            .progress()
    }

    /// Lets what is in flight complete, hangs up and says what was promised.
    ///
    /// # Panics
    /// The guest's thread did.
    pub fn end(mut self) -> Ledger {
        let ledger = self.join().expect("a guest ends once");
        drop(self.transport.take());
        ledger
    }

    /// A guest whose machine is gone: what is in flight stays unanswered, and is no violation.
    ///
    /// # Panics
    /// The guest's thread did.
    pub fn abandon(self) -> Ledger {
        self.display.abandoned.store(true, Ordering::SeqCst);
        self.end()
    }

    fn join(&mut self) -> Option<Ledger> {
        self.display.ended.store(true, Ordering::SeqCst);
        let _ = self.display.wake.write(1);
        let thread = self.thread.take()?;
        Some(thread.join().expect("the guest's thread does not panic"))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.join();
        }
    }
}

struct Driver {
    habits: Habits,
    random: Random,
    ledger: Ledger,
    rings: Vec<Ring>,
    memory: Arc<Memory>,
    /// Used in turn, so that all memory is.
    free_pages: std::collections::VecDeque<usize>,
    touchable: std::ops::Range<usize>,
    display: Arc<Display>,
    progress: Arc<Progress>,
    in_flight: u64,
    requests: u64,
    last_completion: Instant,
    latencies: Vec<Duration>,
}

impl Driver {
    fn signals(&self) -> io::Result<Epoll> {
        let signals = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        for (index, ring) in (0..).zip(&self.rings) {
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            signals.add(borrow(&ring.call), EpollEvent::new(flags, index))?;
        }
        let wake = EpollEvent::new(EpollFlags::EPOLLIN, WAKE);
        signals.add(borrow(&self.display.wake), wake)?;
        Ok(signals)
    }

    fn run(mut self, signals: &Epoll) -> Ledger {
        let mut events = vec![EpollEvent::empty(); self.rings.len() + 1];
        loop {
            let hang_ups = self.progress.hang_ups.load(Ordering::SeqCst);
            let is_new = hang_ups != self.display.noticed.load(Ordering::SeqCst);
            if is_new {
                self.display.first_completion_ns.store(0, Ordering::SeqCst);
            }
            let reaped = self.reap_all();
            if is_new {
                // What comes from now on is the next backend's.
                self.display.noticed.store(hang_ups, Ordering::SeqCst);
            } else if reaped > 0 && self.display.first_completion_ns.load(Ordering::SeqCst) == 0 {
                let ns = self.display.started.elapsed().as_nanos() as u64;
                self.display.first_completion_ns.store(ns, Ordering::SeqCst);
            }
            if !self.ledger.summary().is_clean() {
                return self.give_up();
            }
            let is_over = self.in_flight == 0 || self.display.abandoned.load(Ordering::SeqCst);
            if self.display.ended.load(Ordering::SeqCst) && is_over {
                return self.ledger;
            }
            if self.last_completion.elapsed() > self.habits.patience && self.in_flight > 0 {
                self.ledger.note_unanswered(self.in_flight);
                return self.give_up();
            }
            self.submit_all();
            self.publish();
            // A full turn may have left something behind an edge-triggered signal.
            let timeout_ms = if reaped > 0 { 0 } else { 100 };
            let count = signals.wait(&mut events, EpollTimeout::from(timeout_ms as u8));
            for event in &events[..count.unwrap_or(0)] {
                let event_fd = match event.data() {
                    WAKE => &self.display.wake,
                    index => &self.rings[index as usize].call,
                };
                let _ = event_fd.read();
            }
        }
    }

    fn give_up(self) -> Ledger {
        self.display.failed.store(true, Ordering::SeqCst);
        self.ledger
    }

    fn publish(&mut self) {
        self.display
            .in_flight
            .store(self.in_flight, Ordering::SeqCst);
        if !self.latencies.is_empty() {
            self.display.latencies().append(&mut self.latencies);
        }
    }

    fn submit_all(&mut self) {
        if self.display.ended.load(Ordering::SeqCst) {
            return;
        }
        if self.display.quiet.load(Ordering::SeqCst) {
            if self.in_flight == 0 && self.display.touch.load(Ordering::SeqCst) {
                self.submit_touches();
            }
            return;
        }
        for index in 0..self.rings.len() {
            let mut is_new = false;
            while self.rings[index].in_flight() < self.habits.depth {
                self.submit(index);
                is_new = true;
            }
            if is_new {
                self.rings[index].kick();
            }
        }
    }

    fn submit(&mut self, index: usize) {
        self.requests += 1;
        self.in_flight += 1;
        let flush_every = self.habits.flush_every;
        if flush_every > 0 && self.requests.is_multiple_of(flush_every) {
            let flush = self.ledger.begin_flush();
            return self.rings[index].flush(Kind::Flush(flush));
        }
        let page = self
            .free_pages
            .pop_front()
            .expect("a page for each request");
        let blocks = self.ledger.blocks();
        let block = self.random.below(blocks);
        let mut content = [0; BLOCK_LEN];
        let wants_write = self.random.below(100) < self.habits.writes_percent;
        // The next block that is not being written already.
        let mut steps = 0..if wants_write { blocks } else { 0 };
        let write = steps.find_map(|step| {
            let block = (block + step) % blocks;
            self.ledger.begin_write(block, &mut content)
        });
        match write {
            Some(write) => {
                self.memory.write(page, &content);
                let kind = Kind::Write(write, page);
                self.rings[index].write(write.block, page, &self.memory, kind);
            }
            None => {
                // What a read that does nothing leaves is no block.
                self.memory.write(page, &[0xdb; 64]);
                let read = self.ledger.begin_read(block);
                let kind = Kind::Read(read, page);
                self.rings[index].read(block, page, BLOCK_LEN, &self.memory, kind);
            }
        }
    }

    /// Reads behind the verified blocks into all memory.
    fn submit_touches(&mut self) {
        let block = self.ledger.blocks();
        let pieces: Vec<usize> = self.touchable.clone().step_by(TOUCH_BYTES).collect();
        for (turn, &offset) in pieces.iter().enumerate() {
            let index = turn % self.rings.len();
            let len = TOUCH_BYTES.min(self.touchable.end - offset);
            if self.rings[index].in_flight() == self.habits.depth {
                self.rings[index].kick();
                if !self.await_ring(index) {
                    return;
                }
            }
            self.rings[index].read(block, offset, len, &self.memory, Kind::Touch);
            self.in_flight += 1;
        }
        self.rings.iter_mut().for_each(Ring::kick);
        if (0..self.rings.len()).all(|index| self.await_empty(index)) {
            self.display.touch.store(false, Ordering::SeqCst);
        }
    }

    fn await_ring(&mut self, index: usize) -> bool {
        let depth = self.habits.depth;
        self.await_below(index, depth)
    }

    fn await_empty(&mut self, index: usize) -> bool {
        self.await_below(index, 1)
    }

    fn await_below(&mut self, index: usize, count: usize) -> bool {
        let give_up = Instant::now() + self.habits.patience;
        while self.rings[index].in_flight() >= count {
            self.reap(index);
            if Instant::now() >= give_up || !self.ledger.summary().is_clean() {
                return false;
            }
            thread::yield_now();
        }
        true
    }

    fn reap_all(&mut self) -> u64 {
        (0..self.rings.len()).map(|index| self.reap(index)).sum()
    }

    fn reap(&mut self, index: usize) -> u64 {
        let mut count = 0;
        loop {
            let done = match self.rings[index].next_completion(&self.memory) {
                Ok(Some(done)) => done,
                Ok(None) => break,
                Err(_) => {
                    self.ledger.note_unasked();
                    break;
                }
            };
            count += 1;
            self.in_flight -= 1;
            if !matches!(done.kind, Kind::Touch) {
                self.latencies.push(done.took);
            }
            self.settle(done.kind, done.is_ok);
        }
        if count > 0 {
            let gap = self.last_completion.elapsed();
            let gap_ns = &self.display.gap_ns;
            gap_ns.fetch_max(gap.as_nanos() as u64, Ordering::SeqCst);
            self.last_completion = Instant::now();
            self.display.completed.fetch_add(count, Ordering::SeqCst);
        }
        count
    }

    fn settle(&mut self, kind: Kind, is_ok: bool) {
        match (kind, is_ok) {
            (Kind::Write(write, _), true) => self.ledger.end_write(write),
            (Kind::Write(write, _), false) => self.ledger.fail_write(write),
            (Kind::Read(read, page), true) => {
                let mut content = [0; BLOCK_LEN];
                self.memory.read(page, &mut content);
                self.ledger.end_read(read, &content);
            }
            (Kind::Read(read, _), false) => self.ledger.fail_read(read),
            (Kind::Flush(flush), true) => self.ledger.end_flush(flush),
            (Kind::Flush(flush), false) => self.ledger.fail_flush(flush),
            (Kind::Touch, _) => {}
        }
        if let Kind::Write(_, page) | Kind::Read(_, page) = kind {
            self.free_pages.push_back(page);
        }
    }
}

/// Reads the verified part of `image` and compares it with what was promised.
///
/// # Errors
/// The image cannot be read.
pub fn verify_image(image: &Path, ledger: &mut Ledger) -> io::Result<oracle::Summary> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::open(image)?;
    let mut content = [0; BLOCK_LEN];
    for block in 0..ledger.blocks() {
        file.read_exact_at(&mut content, block * BLOCK_LEN as u64)?;
        ledger.check(block, &content);
    }
    Ok(ledger.summary().clone())
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open while `event` lives, and the result lives no longer.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
