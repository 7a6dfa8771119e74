//! As many queues as a disk may have, each as large as it may be: started, used and stopped in
//! bounded time, and threads only for queues that the driver enabled.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::backend::{Device, QueueHandler, Server, Wake, bind};
use crate::driver::{DriverRing, GuestMemory, PackedDriverRing};
use crate::frontend::{Endpoint, Events, Link, Timeouts, Wiring, first_base};
use crate::ring::{Ring, RingAddresses, RingError, RingFormat};

const NUM_QUEUES: u16 = 64;
const QUEUE_SIZE: u16 = 1024;
const RING_BYTES: u64 = 0x8000;
const MEMORY_BYTES: u64 = RING_BYTES * 65;
const F_PACKED: u64 = 1 << 34;

/// Counts the queues that run.
struct Sink(Arc<AtomicUsize>);

impl Device for Sink {
    fn features(&self) -> u64 {
        0
    }

    fn num_queues(&self) -> u16 {
        NUM_QUEUES
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start_queue(&self, _index: u16, _features: u64) -> std::io::Result<Box<dyn QueueHandler>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(SinkQueue(Arc::clone(&self.0))))
    }
}

struct SinkQueue(Arc<AtomicUsize>);

impl QueueHandler for SinkQueue {
    fn process(&mut self, ring: &mut Ring, _wake: Wake) -> Result<(), RingError> {
        while let Some(chain) = ring.pop()? {
            ring.complete(chain, 0);
        }
        Ok(())
    }
}

impl Drop for SinkQueue {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Nobody;

impl Events for Nobody {
    fn stopped(&self) {}
    fn config_read(&self, _config: &[u8], _is_current: &dyn Fn() -> bool) {}
    fn ring_broken(&self) {
        panic!("the backend found a ring broken");
    }
}

/// The driver's end of either kind of ring.
enum DriverEnd {
    Split(DriverRing),
    Packed(PackedDriverRing),
}

impl DriverEnd {
    fn new(format: RingFormat, memory: &Arc<GuestMemory>, base_gpa: u64) -> DriverEnd {
        match format {
            RingFormat::Split => DriverEnd::Split(DriverRing::new(memory, base_gpa, QUEUE_SIZE, 0)),
            RingFormat::Packed => {
                DriverEnd::Packed(PackedDriverRing::new(memory, base_gpa, QUEUE_SIZE, 0))
            }
        }
    }

    fn addresses(&self) -> RingAddresses {
        match self {
            DriverEnd::Split(ring) => ring.addresses(),
            DriverEnd::Packed(ring) => ring.addresses(),
        }
    }

    fn add(&mut self, gpa: u64) -> Option<u16> {
        match self {
            DriverEnd::Split(ring) => ring.add(&[(gpa, 16)], &[]),
            DriverEnd::Packed(ring) => ring.add(&[(gpa, 16)], &[]),
        }
    }

    fn pop_used(&mut self) -> Option<(u16, u32)> {
        match self {
            DriverEnd::Split(ring) => ring.pop_used(),
            DriverEnd::Packed(ring) => ring.pop_used(),
        }
    }
}

#[track_caller]
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + 4 * TIMEOUT;
    while !condition() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        thread::yield_now();
    }
}

#[test]
fn sixty_four_full_queues_start_work_and_stop() {
    for (format, enabled) in [
        (RingFormat::Split, 64),
        (RingFormat::Packed, 64),
        (RingFormat::Split, 3),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("many.sock");
        let running = Arc::new(AtomicUsize::new(0));
        let device = Arc::new(Sink(Arc::clone(&running)));
        let server = Server::spawn("many", bind(&socket).unwrap(), device).unwrap();
        let memory = Arc::new(GuestMemory::new(MEMORY_BYTES).unwrap());
        let region = MemoryRegion {
            gpa: 0,
            size_bytes: MEMORY_BYTES,
            file: Arc::new(memory.file().try_clone().unwrap()),
            file_offset: 0,
        };
        let endpoint = Endpoint {
            socket,
            timeouts: Timeouts::default(),
            config_len: 0,
        };
        let first = endpoint.connect_within(TIMEOUT).unwrap();
        assert_eq!(first.offer.queue_num, Some(u64::from(NUM_QUEUES)));
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let events: Vec<_> = (0..NUM_QUEUES)
            .map(|_| QueueEvents {
                kick: event(),
                call: event(),
            })
            .collect();
        let kicks: Vec<_> = events
            .iter()
            .map(|queue| queue.kick.try_clone().unwrap())
            .collect();
        let wiring = Wiring {
            memory: Arc::new(MemoryTable::new(vec![region])),
            queues: events,
            events: Arc::new(Nobody),
        };
        let link = Link::spawn("many", endpoint, first, wiring).unwrap();
        let mut rings: Vec<_> = (0..enabled)
            .map(|index| DriverEnd::new(format, &memory, RING_BYTES * index))
            .collect();
        let user_base = memory.layouts()[0].user_addr;
        let state = |(index, ring): (u16, &DriverEnd)| {
            let addresses = ring.addresses();
            QueueState {
                index,
                size: QUEUE_SIZE,
                desc_gpa: addresses.desc - user_base,
                driver_gpa: addresses.avail - user_base,
                device_gpa: addresses.used - user_base,
                base: Some(first_base(format)),
            }
        };
        let packed = if format == RingFormat::Packed {
            F_PACKED
        } else {
            0
        };
        link.activate(Activation {
            features: F_VERSION_1 | packed,
            queues: (0..).zip(&rings).map(state).collect(),
        });
        let enabled = enabled as usize;
        // A queue's thread says that it runs once its handler is made.
        eventually("all enabled queues run, and no other", || {
            running.load(Ordering::SeqCst) == enabled
                && server.status().queues_running as usize == enabled
        });
        for (ring, kick) in rings.iter_mut().zip(&kicks) {
            while ring.add(RING_BYTES * 64).is_some() {}
            kick.write(1).unwrap();
        }
        for ring in &mut rings {
            let mut back = 0;
            eventually("a full ring comes back", || {
                back += usize::from(ring.pop_used().is_some());
                back == usize::from(QUEUE_SIZE)
            });
        }
        link.pause(TIMEOUT);
        assert_eq!(
            running.load(Ordering::SeqCst),
            0,
            "{format:?}: all stand still"
        );
        link.resume();
        eventually("they go on", || running.load(Ordering::SeqCst) == enabled);
        drop(link);
        server.stop(TIMEOUT).unwrap();
        assert_eq!(running.load(Ordering::SeqCst), 0);
    }
}
