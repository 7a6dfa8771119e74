//! A daemon killed under load loses nothing: the frontend reconnects, and the next incarnation
//! finishes what the last one had begun.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use vhost_user::driver::{Buffer, DriverRing, GuestMemory};
use vhost_user::frontend::{
    Activation, Endpoint, Events, Link, MemoryRegion, MemoryTable, QueueEvents, QueueState,
    Timeouts, Wiring,
};
use vmm_sys_util::eventfd::EventFd;

use crate::daemon::{DEADLINE, Daemon, Place, await_true};
use crate::io::pattern;

const QUEUE_SIZE: u16 = 128;
pub(crate) const SLOTS: u64 = 32;
pub(crate) const BLOCK_BYTES: u64 = 32 << 10;
const HEADERS_GPA: u64 = 0x1_0000;
const STATUS_GPA: u64 = 0x2_0000;
const DATA_GPA: u64 = 0x10_0000;
const VERSION_1: u64 = 1 << 32;
const FLUSH: u64 = 1 << 9;
const NO_STATUS: u8 = 0xff;

struct Indifferent;

impl Events for Indifferent {
    fn stopped(&self) {}
    fn config_read(&self, _config: &[u8], _is_current: &dyn Fn() -> bool) {}
    fn ring_broken(&self) {
        panic!("the daemon found the ring broken");
    }
}

fn data_gpa(slot: u64) -> u64 {
    DATA_GPA + slot * BLOCK_BYTES
}

/// A guest that writes blocks, each slot to its own place, and outlives daemons.
pub(crate) struct Guest {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) driver: DriverRing,
    pub(crate) kick: EventFd,
    pub(crate) link: Link,
    /// Slot of each head in flight.
    slots: Vec<Option<u64>>,
    pub(crate) pending: usize,
}

impl Guest {
    pub(crate) fn boot(place: &Place) -> Self {
        Self::boot_at(&place.socket("a"))
    }

    pub(crate) fn boot_at(socket: &Path) -> Self {
        let memory = Arc::new(GuestMemory::new(4 << 20).unwrap());
        let driver = DriverRing::new(&memory, 0, QUEUE_SIZE, 0);
        let layout = memory.layouts()[0];
        let region = MemoryRegion {
            gpa: layout.gpa,
            size_bytes: layout.len_bytes,
            file: Arc::new(memory.file().try_clone().unwrap()),
            file_offset: layout.mmap_offset,
        };
        let endpoint = Endpoint {
            socket: socket.to_owned(),
            timeouts: Timeouts::default(),
            config_len: 60,
        };
        let first = endpoint.connect_within(DEADLINE).unwrap();
        assert!(first.offer.tracks_inflight());
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let events = QueueEvents {
            kick: kick.try_clone().unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        };
        let wiring = Wiring {
            memory: Arc::new(MemoryTable::new(vec![region])),
            queues: vec![events],
            events: Arc::new(Indifferent),
        };
        let link = Link::spawn("guest", endpoint, first, wiring).unwrap();
        let addresses = driver.addresses();
        link.activate(Activation {
            features: VERSION_1 | FLUSH,
            queues: vec![QueueState {
                index: 0,
                size: QUEUE_SIZE,
                desc_gpa: 0,
                driver_gpa: addresses.avail - addresses.desc,
                device_gpa: addresses.used - addresses.desc,
                base: None,
            }],
        });
        Self {
            memory,
            driver,
            kick,
            link,
            slots: vec![None; usize::from(QUEUE_SIZE)],
            pending: 0,
        }
    }

    pub(crate) fn submit(&mut self, slot: u64, data: &[u8]) {
        self.reuse(slot, data);
        let [header, data, status] = self.prepare(slot, 1);
        let head = self.driver.add(&[header, data], &[status]).unwrap();
        self.begin(slot, head);
    }

    pub(crate) fn submit_read(&mut self, slot: u64) {
        let [header, data, status] = self.prepare(slot, 0);
        let head = self.driver.add(&[header], &[data, status]).unwrap();
        self.begin(slot, head);
    }

    /// What a slot's memory holds.
    pub(crate) fn data(&self, slot: u64) -> Vec<u8> {
        self.memory.read(data_gpa(slot), BLOCK_BYTES as usize)
    }

    /// Puts something else there.
    pub(crate) fn reuse(&self, slot: u64, data: &[u8]) {
        self.memory.write(data_gpa(slot), data);
    }

    /// Header, data and status of a request.
    fn prepare(&self, slot: u64, request_type: u8) -> [Buffer; 3] {
        let mut header = [0; 16];
        header[0] = request_type;
        header[8..].copy_from_slice(&(slot * BLOCK_BYTES / 512).to_le_bytes());
        let header_gpa = HEADERS_GPA + slot * 16;
        self.memory.write(header_gpa, &header);
        self.memory.write(STATUS_GPA + slot, &[NO_STATUS]);
        [
            (header_gpa, 16),
            (data_gpa(slot), BLOCK_BYTES as u32),
            (STATUS_GPA + slot, 1),
        ]
    }

    fn begin(&mut self, slot: u64, head: u16) {
        self.slots[usize::from(head)] = Some(slot);
        self.pending += 1;
        self.kick.write(1).unwrap();
    }

    pub(crate) fn reap(&mut self) -> usize {
        let mut reaped = 0;
        while let Some((head, _)) = self.driver.pop_used() {
            let slot = self.slots[usize::from(head)].take();
            let slot = slot.expect("a request completes once");
            let status = self.memory.read(STATUS_GPA + slot, 1)[0];
            assert_eq!(status, 0, "request of slot {slot}");
            self.pending -= 1;
            reaped += 1;
        }
        reaped
    }
}

#[test]
fn no_acknowledged_and_no_begun_write_is_lost_under_sigkill() {
    let place = Place::new();
    let path = place.image("a.img", SLOTS * BLOCK_BYTES / 512);
    let mut daemon = Daemon::start(&place, &[&place.disk("a")]);
    let mut guest = Guest::boot(&place);
    let image = File::open(&path).unwrap();
    for round in 0..12 {
        for slot in 0..SLOTS {
            guest.submit(slot, &pattern(round * SLOTS + slot, BLOCK_BYTES as usize));
        }
        // Killed after a different number of completions each time.
        let completed_first = (round as usize * 5) % SLOTS as usize;
        let mut completed = 0;
        await_true("some writes complete", || {
            completed += guest.reap();
            completed >= completed_first
        });
        daemon.end(Signal::SIGKILL);
        daemon = Daemon::start(&place, &[&place.disk("a")]);
        await_true("every write completes", || {
            guest.reap();
            guest.pending == 0
        });
        for slot in 0..SLOTS {
            let mut found = vec![0; BLOCK_BYTES as usize];
            image.read_exact_at(&mut found, slot * BLOCK_BYTES).unwrap();
            let expected = pattern(round * SLOTS + slot, BLOCK_BYTES as usize);
            assert!(found == expected, "round {round}, slot {slot}");
        }
    }
    let health = guest.link.health();
    assert!(health.inflight_tracking, "{health:?}");
    assert!(health.incarnations >= 12, "{health:?}");
    guest.link.pause(Duration::from_secs(10));
}
