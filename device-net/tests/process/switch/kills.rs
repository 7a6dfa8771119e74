//! Two guests whose drivers sleep as Linux's do, on a switch that is killed again and again.
//!
//! Each guest sends numbered frames and acknowledges the other's, with a window as TCP has one. Neither
//! driver looks at its receive ring unless it was interrupted, and neither sends while a few frames of its
//! own wait to be taken back: the first does so when it sends, as Linux does, and asks to be interrupted
//! when most are done with; the second only when it is interrupted. One interrupt or kick that is lost, and
//! a guest stands still. Both are connected as VMs are: by a [`Link`], which replays what it was told to
//! each new process.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vhost_user::driver::{Buffer, DriverRing, GuestMemory, PackedDriverRing};
use vhost_user::frontend::{
    Activation, Endpoint, Events, Link, MemoryRegion, MemoryTable, QueueEvents, QueueState,
    Timeouts, Wiring, first_base,
};
use vhost_user::ring::{RingAddresses, RingFormat};
use virtio_bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use super::{ethernet, mac, text};
use crate::control::Manager;
use crate::daemon::{DEADLINE, Daemon, await_true};
use crate::guest::HEADER_LEN;

const RING_SIZE: u16 = 64;
const MEMORY_BYTES: u64 = 4 << 20;
const RING_STEP: u64 = 0x1_0000;
const BUFFERS_GPA: u64 = 1 << 20;
const BUFFER_LEN: u32 = 2048;
/// Frames that are sent and not acknowledged at most.
const WINDOW: u64 = 24;
/// Frames of its own in the transmit ring from which on a guest sends nothing new, as TCP does.
const MOST_QUEUED: usize = 6;
/// What is not acknowledged by then is sent again: frames are lost while ports come back.
const RESEND_AFTER: Duration = Duration::from_millis(100);
const RX: usize = 0;
const TX: usize = 1;
/// Sequence number and acknowledgement, behind two addresses and a type.
const NUMBERS_AT: usize = HEADER_LEN + 14;
/// Unless SWITCH_KILLS asks for more.
const KILLS: u32 = 6;

#[test]
fn guests_with_split_rings_are_always_woken_after_kills_of_their_switch() {
    kill_under_traffic(RingFormat::Split);
}

#[test]
fn guests_with_packed_rings_are_always_woken_after_kills_of_their_switch() {
    kill_under_traffic(RingFormat::Packed);
}

fn kill_under_traffic(format: RingFormat) {
    let kills = std::env::var("SWITCH_KILLS").map_or(KILLS, |kills| kills.parse().unwrap());
    let (mut daemon, args, guests) = start(format);
    let args = args.each_ref().map(String::as_str);
    for kill in 0..=kills {
        for round in 0..20 {
            for (number, guest) in guests.iter().enumerate() {
                let told = guest.progress.delivered.load(Ordering::SeqCst);
                let until = Instant::now() + DEADLINE;
                while guest.progress.delivered.load(Ordering::SeqCst) < told + 50 {
                    assert!(
                        Instant::now() < until,
                        "after kill {kill}, round {round}: guest {number} hears nothing; {:?}",
                        guests.each_ref().map(|guest| &guest.progress)
                    );
                    thread::sleep(Duration::from_micros(300));
                }
            }
        }
        if kill < kills {
            daemon = daemon.crash_and_start(&args);
        }
    }
    guests.into_iter().for_each(Guest::end);
    drop(daemon);
}

/// A signal can be lost by who delivers it, too. Without being asked the daemon knows nothing of that.
#[test]
fn guests_that_miss_an_interrupt_go_on_when_the_daemon_is_asked_how_it_is() {
    for format in [RingFormat::Split, RingFormat::Packed] {
        let (daemon, _, guests) = start(format);
        let heard = |guest: &Guest| guest.progress.delivered.load(Ordering::SeqCst);
        await_true("the guests have begun", || {
            guests.iter().all(|guest| heard(guest) > 100)
        });
        // The second one takes frames back only when it is interrupted.
        let misses = &guests[1].progress.misses_next;
        misses.store(true, Ordering::SeqCst);
        await_true("an interrupt is missed", || !misses.load(Ordering::SeqCst));
        let mut manager = Manager::of(&daemon);
        let told = guests.each_ref().map(heard);
        await_true("both go on", || {
            manager.list();
            (0..2).all(|number| heard(&guests[number]) > told[number] + 2 * WINDOW)
        });
        guests.into_iter().for_each(Guest::end);
    }
}

/// A daemon with two ports, what it is started with, and guests at both of them.
fn start(format: RingFormat) -> (Daemon, [String; 4], [Guest; 2]) {
    let dir = tempfile::tempdir().unwrap();
    let sockets = [0, 1].map(|number| dir.path().join(format!("port{number}.vu")));
    let nic = |number: usize| {
        let (mac, socket) = (text(mac(number)), sockets[number].display());
        format!("id=port{number},switch=s0,mac={mac},socket={socket}")
    };
    let args = ["--nic".to_owned(), nic(0), "--nic".to_owned(), nic(1)];
    let daemon = Daemon::start(dir, &args.each_ref().map(String::as_str));
    let guests = [0, 1].map(|number| Guest::boot(&sockets[number], number, format));
    (daemon, args, guests)
}

/// What is known of a guest from outside.
#[derive(Debug, Default)]
struct Progress {
    delivered: AtomicU64,
    sent: AtomicU64,
    resent: AtomicU64,
    queued: AtomicU64,
    interrupts: [AtomicU64; 2],
    /// The next interrupt of its transmit ring is lost.
    misses_next: AtomicBool,
    ended: AtomicBool,
}

/// A guest, on a thread of its own.
struct Guest {
    progress: Arc<Progress>,
    driver: JoinHandle<()>,
    _link: Link,
}

impl Guest {
    fn boot(socket: &Path, number: usize, format: RingFormat) -> Self {
        let packed = match format {
            RingFormat::Split => 0,
            RingFormat::Packed => 1 << VIRTIO_F_RING_PACKED,
        };
        let features = packed
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_NET_F_MRG_RXBUF;
        let memory = Arc::new(GuestMemory::new(MEMORY_BYTES).unwrap());
        let layout = memory.layouts()[0];
        let rings = [RX, TX].map(|queue| {
            let at = RING_STEP * (queue as u64 + 1);
            match format {
                RingFormat::Split => {
                    Ring::Split(DriverRing::new(&memory, at, RING_SIZE, features), 0)
                }
                RingFormat::Packed => {
                    Ring::Packed(PackedDriverRing::new(&memory, at, RING_SIZE, features))
                }
            }
        });
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap();
        let events = [RX, TX].map(|_| QueueEvents {
            kick: event(),
            call: event(),
        });
        let queues = (0..).zip(&rings).map(|(index, ring)| {
            let gpa = |address| address - layout.user_addr + layout.gpa;
            let RingAddresses { desc, avail, used } = ring.addresses();
            QueueState {
                index,
                size: RING_SIZE,
                desc_gpa: gpa(desc),
                driver_gpa: gpa(avail),
                device_gpa: gpa(used),
                base: Some(first_base(format)),
            }
        });
        let activation = Activation {
            features,
            queues: queues.collect(),
        };
        let file: File = memory.file().try_clone().unwrap();
        let wiring = Wiring {
            memory: Arc::new(MemoryTable::new(vec![MemoryRegion {
                gpa: layout.gpa,
                size_bytes: layout.len_bytes,
                file: Arc::new(file),
                file_offset: layout.mmap_offset,
            }])),
            queues: events
                .iter()
                .map(|events| QueueEvents {
                    kick: events.kick.try_clone().unwrap(),
                    call: events.call.try_clone().unwrap(),
                })
                .collect(),
            events: Arc::new(Silent),
        };
        let endpoint = Endpoint {
            socket: socket.to_owned(),
            timeouts: Timeouts::default(),
            config_len: 0,
        };
        let first = endpoint.connect_within(DEADLINE).unwrap();
        let link = Link::spawn(&format!("port{number}"), endpoint, first, wiring).unwrap();
        let progress = Arc::<Progress>::default();
        let mut driver = Driver {
            rings,
            events,
            memory,
            number,
            progress: Arc::clone(&progress),
            posted: HashMap::new(),
            queued: HashMap::new(),
            free: Vec::new(),
            acknowledged: 0,
            sent: 0,
            expected: 0,
            owes: false,
            resend_at: Instant::now() + RESEND_AFTER,
        };
        driver.set_up();
        link.activate(activation);
        let driver = thread::spawn(move || driver.run());
        Self {
            progress,
            driver,
            _link: link,
        }
    }

    fn end(self) {
        self.progress.ended.store(true, Ordering::SeqCst);
        self.driver.join().unwrap();
    }
}

/// Nothing that a link tells matters here.
struct Silent;

impl Events for Silent {
    fn stopped(&self) {}
    fn config_read(&self, _config: &[u8], _is_current: &dyn Fn() -> bool) {}
    fn ring_broken(&self) {}
}

/// A ring of either format, with Linux's ways to ask for interrupts.
enum Ring {
    /// And what was popped of it.
    Split(DriverRing, u16),
    Packed(PackedDriverRing),
}

impl Ring {
    fn addresses(&self) -> RingAddresses {
        match self {
            Self::Split(ring, _) => ring.addresses(),
            Self::Packed(ring) => ring.addresses(),
        }
    }

    fn add(&mut self, readable: &[Buffer], writable: &[Buffer]) -> u16 {
        match self {
            Self::Split(ring, _) => ring.add(readable, writable),
            Self::Packed(ring) => ring.add(readable, writable),
        }
        .expect("room for as many as there are buffers")
    }

    fn needs_kick(&mut self) -> bool {
        match self {
            Self::Split(ring, _) => ring.needs_kick(),
            Self::Packed(ring) => ring.needs_kick(),
        }
    }

    fn pop_used(&mut self) -> Option<(u16, u32)> {
        match self {
            Self::Split(ring, popped) => {
                let used = ring.pop_used()?;
                *popped = popped.wrapping_add(1);
                Some(used)
            }
            Self::Packed(ring) => ring.pop_used(),
        }
    }

    /// No interrupts, as far as the format can say so.
    fn disable(&self) {
        match self {
            Self::Split(ring, _) => ring.set_used_event(0),
            Self::Packed(ring) => ring.set_driver_event(ring.raw_next_used(), 1),
        }
    }

    /// An interrupt once `count` more are used after the next one.
    fn enable_after(&self, count: u16) {
        match self {
            Self::Split(ring, popped) => ring.set_used_event(popped.wrapping_add(count)),
            Self::Packed(ring) => {
                let raw = ring.raw_next_used();
                let (mut at, mut wrap) = ((raw & 0x7fff) + count, raw & 0x8000);
                if at >= RING_SIZE {
                    (at, wrap) = (at - RING_SIZE, wrap ^ 0x8000);
                }
                ring.set_driver_event(at | wrap, 2);
            }
        }
        std::sync::atomic::fence(Ordering::SeqCst);
    }
}

/// Its network stack, which knows one connection.
struct Driver {
    rings: [Ring; 2],
    events: [QueueEvents; 2],
    memory: Arc<GuestMemory>,
    number: usize,
    progress: Arc<Progress>,
    /// Buffers in the rings, by what the ring calls them.
    posted: HashMap<u16, Buffer>,
    queued: HashMap<u16, Buffer>,
    free: Vec<Buffer>,
    acknowledged: u64,
    sent: u64,
    expected: u64,
    /// An acknowledgement.
    owes: bool,
    resend_at: Instant,
}

impl Driver {
    fn set_up(&mut self) {
        for index in 0..u64::from(RING_SIZE) {
            let at = BUFFERS_GPA + 2 * index * u64::from(BUFFER_LEN);
            let buffer = (at, BUFFER_LEN);
            let id = self.rings[RX].add(&[], &[buffer]);
            self.posted.insert(id, buffer);
            self.free.push((at + u64::from(BUFFER_LEN), BUFFER_LEN));
        }
        self.rings[RX].enable_after(0);
        self.rings[TX].enable_after(0);
    }

    /// Its transmit ring is looked at when it sends.
    fn reclaims_when_sending(&self) -> bool {
        self.number == 0
    }

    fn run(mut self) {
        while !self.progress.ended.load(Ordering::SeqCst) {
            let [rx, tx] = self.sleep();
            if tx {
                self.reclaim_until_asleep();
            }
            if rx {
                self.receive_until_asleep();
            }
            self.send();
        }
    }

    /// Until an interrupt, or until it is time to send something again; who interrupted.
    fn sleep(&self) -> [bool; 2] {
        let mut polls = [RX, TX].map(|queue| libc::pollfd {
            fd: self.events[queue].call.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        });
        let left = self.resend_at.saturating_duration_since(Instant::now());
        let timeout_ms = left.as_millis() as i32 + 1;
        // SAFETY: two valid pollfds, whose descriptors are open throughout.
        unsafe { libc::poll(polls.as_mut_ptr(), 2, timeout_ms) };
        [RX, TX].map(|queue| {
            if self.events[queue].call.read().is_err() {
                return false;
            }
            self.progress.interrupts[queue].fetch_add(1, Ordering::Relaxed);
            queue == RX || !self.progress.misses_next.swap(false, Ordering::SeqCst)
        })
    }

    fn reclaim(&mut self) {
        while let Some((id, _)) = self.rings[TX].pop_used() {
            let buffer = self.queued.remove(&id).expect("a frame that was sent");
            self.free.push(buffer);
        }
        let queued = self.queued.len() as u64;
        self.progress.queued.store(queued, Ordering::Relaxed);
    }

    fn reclaim_until_asleep(&mut self) {
        loop {
            self.rings[TX].disable();
            self.reclaim();
            self.rings[TX].enable_after(0);
            let before = self.queued.len();
            self.reclaim();
            if self.queued.len() == before {
                return;
            }
        }
    }

    fn receive_until_asleep(&mut self) {
        loop {
            self.rings[RX].disable();
            while self.receive() {}
            self.rings[RX].enable_after(0);
            if !self.receive() {
                return;
            }
        }
    }

    fn receive(&mut self) -> bool {
        let Some((id, len)) = self.rings[RX].pop_used() else {
            return false;
        };
        let buffer = self.posted.remove(&id).expect("a buffer that was supplied");
        assert!(len as usize >= NUMBERS_AT + 16, "{len} bytes");
        let numbers = self.memory.read(buffer.0 + NUMBERS_AT as u64, 16);
        let number = |at: usize| u64::from_le_bytes(numbers[at..at + 8].try_into().unwrap());
        let (sequence, acknowledges) = (number(0), number(8));
        if acknowledges > self.acknowledged {
            self.acknowledged = acknowledges;
            self.resend_at = Instant::now() + RESEND_AFTER;
        }
        if sequence > 0 {
            self.owes = true;
            if sequence == self.expected + 1 {
                self.expected = sequence;
                self.progress.delivered.fetch_add(1, Ordering::SeqCst);
            }
        }
        let id = self.rings[RX].add(&[], &[buffer]);
        self.posted.insert(id, buffer);
        if self.rings[RX].needs_kick() {
            self.events[RX].kick.write(1).unwrap();
        }
        true
    }

    /// What the window allows, and what is owed.
    fn send(&mut self) {
        if self.resend_at <= Instant::now() {
            self.resend_at = Instant::now() + RESEND_AFTER;
            // What waits in the ring is not sent twice.
            if self.queued.is_empty() && self.sent > self.acknowledged {
                self.progress.resent.fetch_add(1, Ordering::Relaxed);
                self.sent = self.acknowledged;
            }
        }
        while self.sent < self.acknowledged + WINDOW && self.queued.len() < MOST_QUEUED {
            self.sent += 1;
            self.transmit(self.sent);
            self.progress.sent.fetch_add(1, Ordering::Relaxed);
        }
        if self.owes && self.queued.len() < MOST_QUEUED {
            self.transmit(0);
        }
    }

    /// A frame, or with number 0 an acknowledgement alone.
    fn transmit(&mut self, sequence: u64) {
        while self.reclaims_when_sending() {
            self.rings[TX].disable();
            self.reclaim();
            // When most of what waits is done with.
            let before = self.queued.len();
            self.rings[TX].enable_after(before as u16 * 3 / 4);
            self.reclaim();
            if self.queued.len() == before {
                break;
            }
        }
        self.owes = false;
        let len = match sequence {
            0 => 16,
            _ => 16 + (sequence * 37 % 1400) as usize,
        };
        let mut payload = vec![0x5a; len];
        payload[..8].copy_from_slice(&sequence.to_le_bytes());
        payload[8..16].copy_from_slice(&self.expected.to_le_bytes());
        let frame = ethernet(mac(1 - self.number), mac(self.number), &payload);
        let frame = [&[0; HEADER_LEN][..], &frame].concat();
        let buffer = self.free.pop().expect("a buffer for each descriptor");
        self.memory.write(buffer.0, &frame);
        let id = self.rings[TX].add(&[(buffer.0, frame.len() as u32)], &[]);
        self.queued.insert(id, buffer);
        if self.rings[TX].needs_kick() {
            self.events[TX].kick.write(1).unwrap();
        }
    }
}
