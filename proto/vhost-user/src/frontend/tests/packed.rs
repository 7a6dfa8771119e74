//! Packed rings through both ends of this crate: wrap counters are kept over stops, and a backend
//! that dies loses and doubles nothing.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::backend::{Device, QueueHandler, Server, Wake};
use crate::driver::{GuestMemory, PackedDriverRing};
use crate::frontend::{Endpoint, Events, Link, Timeouts, Wiring, first_base};
use crate::ring::{DescChain, Ring, RingError, RingFormat};

/// Not a power of two, so that laps end at odd places.
const RING_SIZE: u16 = 13;
const F_EVENT_IDX: u64 = 1 << 29;
const F_PACKED: u64 = 1 << 34;
const DATA_GPA: u64 = 0x1_0000;

/// Remembers every request, and answers none while it holds.
#[derive(Default)]
struct Echo {
    holds: AtomicBool,
    taken: Mutex<Vec<u32>>,
}

struct EchoDevice(Arc<Echo>);

impl Device for EchoDevice {
    fn features(&self) -> u64 {
        0
    }

    fn num_queues(&self) -> u16 {
        1
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start_queue(&self, _index: u16, _features: u64) -> std::io::Result<Box<dyn QueueHandler>> {
        Ok(Box::new(EchoQueue {
            echo: Arc::clone(&self.0),
            held: Vec::new(),
        }))
    }
}

struct EchoQueue {
    echo: Arc<Echo>,
    held: Vec<DescChain>,
}

impl QueueHandler for EchoQueue {
    fn process(&mut self, ring: &mut Ring, _wake: Wake) -> Result<(), RingError> {
        while let Some(chain) = ring.pop()? {
            let mut name = [0; 4];
            assert_eq!(chain.read_at(0, &mut name), 4);
            self.echo
                .taken
                .lock()
                .unwrap()
                .push(u32::from_ne_bytes(name));
            // Every second request overtakes the one before.
            if self.echo.holds.load(Ordering::SeqCst) && name[0].is_multiple_of(2) {
                self.held.push(chain);
                continue;
            }
            chain.write_at(0, &name);
            ring.complete(chain, 4);
        }
        Ok(())
    }

    fn drain(&mut self, ring: &mut Ring, _deadline: Instant) -> usize {
        if !self.echo.holds.load(Ordering::SeqCst) {
            self.held
                .drain(..)
                .for_each(|chain| ring.complete(chain, 4));
        }
        self.held.len()
    }
}

struct Nobody;

impl Events for Nobody {
    fn stopped(&self) {}
    fn config_read(&self, _config: &[u8], _is_current: &dyn Fn() -> bool) {}
    fn ring_broken(&self) {
        panic!("the backend found the ring broken");
    }
}

struct Guest {
    memory: Arc<GuestMemory>,
    driver: PackedDriverRing,
    kick: EventFd,
    link: Link,
    at_the_device: HashMap<u16, u32>,
    next_name: u32,
}

impl Guest {
    fn boot(socket: &std::path::Path) -> Guest {
        let memory = Arc::new(GuestMemory::new(0x4_0000).unwrap());
        let driver = PackedDriverRing::new(&memory, 0, RING_SIZE, F_EVENT_IDX);
        let region = MemoryRegion {
            gpa: 0,
            size_bytes: 0x4_0000,
            file: Arc::new(memory.file().try_clone().unwrap()),
            file_offset: 0,
        };
        let endpoint = Endpoint {
            socket: socket.to_owned(),
            timeouts: Timeouts::default(),
            config_len: 0,
        };
        let first = endpoint.connect_within(TIMEOUT).unwrap();
        assert!(first.offer.tracks_inflight());
        assert_ne!(first.offer.features & F_PACKED, 0);
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let wiring = Wiring {
            memory: Arc::new(MemoryTable::new(vec![region])),
            queues: vec![QueueEvents {
                kick: kick.try_clone().unwrap(),
                call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            }],
            events: Arc::new(Nobody),
        };
        let link = Link::spawn("packed", endpoint, first, wiring).unwrap();
        let addresses = driver.addresses();
        link.activate(Activation {
            features: F_VERSION_1 | F_EVENT_IDX | F_PACKED,
            queues: vec![QueueState {
                index: 0,
                size: RING_SIZE,
                desc_gpa: 0,
                driver_gpa: addresses.avail - addresses.desc,
                device_gpa: addresses.used - addresses.desc,
                base: Some(first_base(RingFormat::Packed)),
            }],
        });
        Guest {
            memory,
            driver,
            kick,
            link,
            at_the_device: HashMap::new(),
            next_name: 0,
        }
    }

    /// Offers a request of two descriptors.
    fn submit(&mut self) -> u32 {
        let name = self.next_name;
        let gpa = DATA_GPA + u64::from(name % 64) * 16;
        self.memory.write(gpa, &name.to_ne_bytes());
        let id = self.driver.add(&[(gpa, 4)], &[(gpa + 8, 4)]).unwrap();
        assert_eq!(self.at_the_device.insert(id, name), None);
        self.next_name += 1;
        if self.driver.needs_kick() {
            self.kick.write(1).unwrap();
        }
        name
    }

    fn reap(&mut self) -> Vec<u32> {
        std::iter::from_fn(|| {
            let (id, written) = self.driver.pop_used()?;
            assert_eq!(written, 4);
            Some(
                self.at_the_device
                    .remove(&id)
                    .expect("a request comes back once"),
            )
        })
        .collect()
    }

    #[track_caller]
    fn await_all(&mut self) {
        let deadline = Instant::now() + TIMEOUT;
        while !self.at_the_device.is_empty() {
            assert!(Instant::now() < deadline, "requests do not come back");
            self.reap();
            thread::yield_now();
        }
    }
}

fn serve(listener: &UnixListener, echo: &Arc<Echo>) -> Server {
    let device = Arc::new(EchoDevice(Arc::clone(echo)));
    Server::spawn("echo", listener.try_clone().unwrap(), device).unwrap()
}

#[test]
fn rings_stop_and_go_on_at_any_place_of_any_lap() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("packed.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let echo = Arc::new(Echo::default());
    let server = serve(&listener, &echo);
    let mut guest = Guest::boot(&socket);
    for _ in 0..30 {
        guest.submit();
        guest.await_all();
        guest.link.pause(TIMEOUT);
        let base = guest.link.activation().unwrap().queues[0].base.unwrap();
        let position = u32::from(guest.driver.raw_next_avail());
        assert_eq!(base, position | position << 16);
        guest.link.resume();
    }
    let taken = echo.taken.lock().unwrap().clone();
    assert_eq!(taken, (0..30).collect::<Vec<_>>(), "each once, in order");
    drop(guest);
    server.stop(TIMEOUT).unwrap();
}

#[test]
fn backends_that_end_in_order_leave_the_place_to_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("packed.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let echo = Arc::new(Echo::default());
    let mut server = serve(&listener, &echo);
    let mut guest = Guest::boot(&socket);
    for _ in 0..30 {
        guest.submit();
        guest.await_all();
        // Nothing is in flight, and nobody asks where the ring stands.
        server.stop(TIMEOUT).unwrap();
        server = serve(&listener, &echo);
    }
    let taken = echo.taken.lock().unwrap().clone();
    assert_eq!(taken, (0..30).collect::<Vec<_>>(), "each once, in order");
    drop(guest);
    server.stop(TIMEOUT).unwrap();
}

#[test]
fn backends_that_die_lose_and_double_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("packed.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let echo = Arc::new(Echo::default());
    let mut server = serve(&listener, &echo);
    let mut guest = Guest::boot(&socket);
    for round in 0..12 {
        echo.holds.store(true, Ordering::SeqCst);
        let names: HashSet<u32> = (0..6).map(|_| guest.submit()).collect();
        let deadline = Instant::now() + TIMEOUT;
        let mut back = Vec::new();
        while back.len() < 3 {
            assert!(Instant::now() < deadline, "round {round}: {back:?}");
            back.extend(guest.reap());
            thread::yield_now();
        }
        // The others are in flight when the backend ends.
        let error = server.stop(Duration::ZERO).unwrap_err();
        assert_eq!(error.inflight, 3, "round {round}");
        echo.holds.store(false, Ordering::SeqCst);
        let seen_before = echo.taken.lock().unwrap().len();
        server = serve(&listener, &echo);
        guest.await_all();
        let again: HashSet<u32> = echo.taken.lock().unwrap()[seen_before..]
            .iter()
            .copied()
            .collect();
        let expected = names
            .into_iter()
            .filter(|name| !back.contains(name))
            .collect();
        assert_eq!(again, expected, "round {round}");
    }
    assert!(guest.link.health().incarnations >= 12);
    drop(guest);
    server.stop(TIMEOUT).unwrap();
}
