//! The frontend against a daemon on the `vhost-user-backend` crate, which most third-party
//! daemons are built on: another implementation of sessions, rings and memory tables. It keeps no
//! in-flight region, and serves one session for each daemon made.

use std::collections::VecDeque;
use std::io;
use std::ops::Deref;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vhost_user_backend::{
    ShutdownHandle, VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{DescriptorChain, QueueOwnedT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{F_PROTOCOL_FEATURES, F_VERSION_1};
use crate::driver::{DriverRing, GuestMemory};
use crate::frontend::{
    Activation, Endpoint, Events, Link, MemoryRegion, MemoryTable, QueueEvents, QueueState,
    Timeouts, Wiring,
};

const NUM_QUEUES: u16 = 2;
const RING_SIZE: u16 = 16;
const MEMORY_BYTES: u64 = 0x10_0000;
const DATA_GPA: u64 = 0x8_0000;
const F_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const PROTOCOL: Protocol = Protocol::MQ
    .union(Protocol::REPLY_ACK)
    .union(Protocol::CONFIG);
const CONFIG: &[u8; 16] = b"a configuration!";
/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);
/// The event that ends a worker has the number after those of its queues.
const EXIT_EVENT: u16 = NUM_QUEUES;

type Memory = GuestMemoryAtomic<GuestMemoryMmap<()>>;

#[track_caller]
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        thread::yield_now();
    }
}

#[test]
fn both_rings_are_served_with_either_way_to_tell_the_memory() {
    for slots in [Protocol::empty(), Protocol::CONFIGURE_MEM_SLOTS] {
        let directory = tempfile::tempdir().unwrap();
        let daemons = Daemons::serve(directory.path(), PROTOCOL | slots);
        let mut guest = Guest::connect(&daemons.socket);
        guest.activate();
        for round in 0..50u8 {
            guest.exchange(usize::from(round % 2), &[round; 100]);
        }
        let health = guest.link.health();
        assert!(health.connected, "{health:?}");
        assert_eq!((health.incarnations, health.last_error.as_str()), (1, ""));
        assert!(daemons.echo.event_idx.load(Ordering::SeqCst));
        assert_eq!(guest.told.broken.load(Ordering::SeqCst), 0);
    }
}

#[test]
fn end_of_a_link_is_no_failure_of_its_backend() {
    let directory = tempfile::tempdir().unwrap();
    let daemons = Daemons::serve(directory.path(), PROTOCOL);
    let mut guest = Guest::connect(&daemons.socket);
    guest.activate();
    guest.exchange(0, b"last words");
    assert_eq!(guest.link.last_health().last_error, "");
}

#[test]
fn driver_that_wants_no_interrupt_yet_gets_none() {
    let directory = tempfile::tempdir().unwrap();
    let daemons = Daemons::serve(directory.path(), PROTOCOL);
    let mut guest = Guest::connect(&daemons.socket);
    guest.activate();
    guest.exchange(0, b"first");
    let quiet = guest.submit_until(0, b"quiet", 4);
    eventually("the request is completed", || {
        guest.rings[0].used_idx() == 2
    });
    // A ring's worker serves both rings: what it does for the second comes after the first.
    guest.exchange(1, b"after that");
    assert!(guest.calls[0].read().is_err(), "interrupt before its time");
    assert_eq!(guest.rings[0].pop_used(), Some((quiet.0, 5)));
    guest.exchange(0, b"loud");
}

#[test]
fn configuration_is_written_and_read_back() {
    let directory = tempfile::tempdir().unwrap();
    let daemons = Daemons::serve(directory.path(), PROTOCOL);
    let guest = Guest::connect(&daemons.socket);
    let told = |expected: &[u8]| *guest.told.config.lock().unwrap() == expected;
    eventually("the handshake's configuration is told", || told(CONFIG));
    assert!(guest.link.write_config(2, b"CONF"));
    eventually("the daemon has it, and so has the driver", || {
        told(b"a CONFiguration!")
    });
    *daemons.echo.config.lock().unwrap() = [7; 16];
    guest.link.refresh_config();
    eventually("a change is told", || told(&[7; 16]));
}

#[test]
fn next_daemon_hears_what_the_driver_wrote_until_the_driver_resets() {
    let directory = tempfile::tempdir().unwrap();
    let daemons = Daemons::serve(directory.path(), PROTOCOL);
    let mut guest = Guest::connect(&daemons.socket);
    guest.activate();
    let has = |expected: &[u8]| *daemons.echo.config.lock().unwrap() == expected;
    // A daemon that starts anew has its own idea of the configuration.
    let replace_daemon = |guest: &Guest| {
        daemons.echo.config.lock().unwrap().copy_from_slice(CONFIG);
        let incarnations = guest.link.health().incarnations;
        daemons.end_session();
        eventually("the next daemon is connected", || {
            let health = guest.link.health();
            health.connected && health.incarnations > incarnations
        });
    };
    assert!(guest.link.write_config(2, b"XXXX"));
    assert!(guest.link.write_config(2, b"CONF"));
    eventually("the daemon has it", || has(b"a CONFiguration!"));
    for _ in 0..3 {
        replace_daemon(&guest);
        guest.exchange(0, b"served in the driver's mode");
        assert!(has(b"a CONFiguration!"), "before the first request");
    }
    let _ = guest.link.deactivate();
    replace_daemon(&guest);
    assert!(guest.link.write_config(15, b"?"));
    eventually("only what came after the reset is told", || {
        has(b"a configuration?")
    });
}

#[test]
fn requests_that_a_lost_daemon_held_are_served_by_the_next_though_it_does_not_track_them() {
    let directory = tempfile::tempdir().unwrap();
    let daemons = Daemons::serve(directory.path(), PROTOCOL);
    let mut guest = Guest::connect(&daemons.socket);
    guest.activate();
    for round in 1..=5u8 {
        guest.exchange(0, &[round; 32]);
        let taken = daemons.echo.taken.load(Ordering::SeqCst);
        daemons.echo.holds.store(true, Ordering::SeqCst);
        let held = guest.submit(0, &[round + 100; 32]);
        eventually("the daemon took the request", || {
            daemons.echo.taken.load(Ordering::SeqCst) > taken
        });
        daemons.end_session();
        daemons.echo.holds.store(false, Ordering::SeqCst);
        guest.complete(0, held, &[round + 100; 32]);
        let incarnations = u64::from(round) + 1;
        eventually("the next daemon is connected", || {
            let health = guest.link.health();
            health.connected && health.incarnations == incarnations
        });
        let health = guest.link.health();
        assert!(
            !health.inflight_tracking,
            "this daemon cannot promise that nothing is lost: {health:?}"
        );
        assert!(!health.last_error.is_empty(), "{health:?}");
    }
}

#[test]
fn driver_resets_pauses_and_goes_on() {
    for reset_device in [Protocol::empty(), Protocol::RESET_DEVICE] {
        let directory = tempfile::tempdir().unwrap();
        let daemons = Daemons::serve(directory.path(), PROTOCOL | reset_device);
        let mut guest = Guest::connect(&daemons.socket);
        for round in 1..=5u8 {
            guest.activate();
            guest.exchange(0, &[round; 8]);
            guest.link.pause(PATIENCE);
            let taken = daemons.echo.taken.load(Ordering::SeqCst);
            let waiting = guest.submit(0, &[round + 100; 8]);
            assert_eq!(
                guest.link.activation().unwrap().queues[0].base,
                Some(1),
                "round {round}"
            );
            assert_eq!(daemons.echo.taken.load(Ordering::SeqCst), taken, "paused");
            guest.link.resume();
            guest.complete(0, waiting, &[round + 100; 8]);
            if !guest.link.deactivate() {
                let stopped = || guest.told.stopped.load(Ordering::SeqCst) == u32::from(round);
                eventually("the rings stand still", stopped);
            }
        }
        let health = guest.link.health();
        assert_eq!(health.incarnations, 1, "{health:?}");
        let resets = if reset_device.is_empty() { 0 } else { 5 };
        eventually("the daemon was told of all resets", || {
            daemons.echo.resets.load(Ordering::SeqCst) == resets
        });
    }
}

/// What all incarnations of the daemon share with the test.
struct Echo {
    protocol_features: Protocol,
    /// Requests are taken but not completed.
    holds: AtomicBool,
    taken: AtomicU32,
    event_idx: AtomicBool,
    resets: AtomicU32,
    config: Mutex<[u8; 16]>,
}

/// One incarnation's device: copies what it reads to what it may write.
struct EchoBackend {
    echo: Arc<Echo>,
    memory: Memory,
}

impl EchoBackend {
    fn serve(&self, vring: &VringRwLock) -> io::Result<()> {
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            self.take_available(vring)?;
            if vring.needs_notification().map_err(io::Error::other)? {
                vring.signal_used_queue()?;
            }
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }

    fn take_available(&self, vring: &VringRwLock) -> io::Result<()> {
        let memory = self.memory.memory();
        let mut chains: VecDeque<DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap<()>>>> =
            vring
                .get_mut()
                .get_queue_mut()
                .iter(memory.clone())
                .map_err(io::Error::other)?
                .collect();
        self.echo
            .taken
            .fetch_add(chains.len() as u32, Ordering::SeqCst);
        if self.echo.holds.load(Ordering::SeqCst) {
            return Ok(());
        }
        while let Some(chain) = chains.pop_front() {
            let head = chain.head_index();
            let mut reader = chain
                .clone()
                .reader(memory.deref())
                .map_err(io::Error::other)?;
            let mut writer = chain.writer(memory.deref()).map_err(io::Error::other)?;
            let written = io::copy(&mut reader, &mut writer)?;
            vring
                .add_used(head, written as u32)
                .map_err(io::Error::other)?;
        }
        Ok(())
    }
}

impl VhostUserBackendMut for EchoBackend {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        usize::from(NUM_QUEUES)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(RING_SIZE)
    }

    fn features(&self) -> u64 {
        F_VERSION_1 | F_EVENT_IDX | F_PROTOCOL_FEATURES
    }

    fn protocol_features(&self) -> Protocol {
        self.echo.protocol_features
    }

    fn reset_device(&mut self) {
        self.echo.resets.fetch_add(1, Ordering::SeqCst);
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.echo.event_idx.store(enabled, Ordering::SeqCst);
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.echo.config.lock().unwrap();
        config[offset as usize..(offset + size) as usize].to_vec()
    }

    fn set_config(&mut self, offset: u32, buf: &[u8]) -> io::Result<()> {
        let start = offset as usize;
        self.echo.config.lock().unwrap()[start..start + buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    /// Without it, dropping a daemon waits for its worker for ever.
    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &mut self,
        device_event: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread_id: usize,
    ) -> io::Result<()> {
        assert!(device_event < EXIT_EVENT, "nothing else was registered");
        // The ring may have been stopped since the kick. Passing an error on would end the worker;
        // the test's driver finds an answer missing.
        let _ = self.serve(&vrings[usize::from(device_event)]);
        Ok(())
    }
}

/// Daemons on one listening socket, a new one for each session.
struct Daemons {
    echo: Arc<Echo>,
    socket: PathBuf,
    session: Arc<Mutex<Option<ShutdownHandle>>>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Daemons {
    fn serve(directory: &Path, protocol_features: Protocol) -> Self {
        let echo = Arc::new(Echo {
            protocol_features,
            holds: AtomicBool::new(false),
            taken: AtomicU32::new(0),
            event_idx: AtomicBool::new(false),
            resets: AtomicU32::new(0),
            config: Mutex::new(*CONFIG),
        });
        let socket = directory.join("daemon.sock");
        let mut listener = Listener::from(UnixListener::bind(&socket).unwrap());
        let session = Arc::new(Mutex::new(None));
        let ends = Arc::new(AtomicBool::new(false));
        let (served, current, stop) = (Arc::clone(&echo), Arc::clone(&session), Arc::clone(&ends));
        let thread = thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                let memory = Memory::new(GuestMemoryMmap::new());
                let backend = EchoBackend {
                    echo: Arc::clone(&served),
                    memory: memory.clone(),
                };
                let mut daemon =
                    VhostUserDaemon::new("echo".to_owned(), Arc::new(Mutex::new(backend)), memory)
                        .unwrap();
                daemon.start(&mut listener).unwrap();
                *current.lock().unwrap() = daemon.shutdown_handle();
                // A hang-up is an error here.
                let _ = daemon.wait();
            }
        });
        Self {
            echo,
            socket,
            session,
            ends,
            thread: Some(thread),
        }
    }

    /// The session ends as if the daemon had died; the next is ready to be connected to.
    fn end_session(&self) {
        let session = self.session.lock().unwrap().take();
        session.expect("a session is served").shutdown();
    }
}

impl Drop for Daemons {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        if let Some(session) = self.session.lock().unwrap().take() {
            session.shutdown();
        }
        // The thread may wait for a connection.
        drop(UnixStream::connect(&self.socket));
        let ended = self.thread.take().unwrap().join();
        assert!(thread::panicking() || ended.is_ok(), "the daemon panicked");
    }
}

/// What the link told.
#[derive(Default)]
struct Told {
    stopped: AtomicU32,
    broken: AtomicU32,
    config: Mutex<Vec<u8>>,
}

impl Events for Told {
    fn stopped(&self) {
        self.stopped.fetch_add(1, Ordering::SeqCst);
    }

    fn config_read(&self, config: &[u8], is_current: &dyn Fn() -> bool) {
        if is_current() {
            config.clone_into(&mut self.config.lock().unwrap());
        }
    }

    fn ring_broken(&self) {
        self.broken.fetch_add(1, Ordering::SeqCst);
    }
}

/// A driver and its link to the daemon.
struct Guest {
    memory: Arc<GuestMemory>,
    rings: Vec<DriverRing>,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
    told: Arc<Told>,
    link: Link,
    slots_used: u64,
}

impl Guest {
    fn connect(socket: &Path) -> Self {
        let endpoint = Endpoint {
            socket: socket.to_owned(),
            timeouts: Timeouts {
                first_reply: PATIENCE,
                request: PATIENCE,
                stop: PATIENCE,
            },
            config_len: CONFIG.len() as u16,
        };
        let connected = endpoint.connect_within(PATIENCE).unwrap();
        assert_eq!(connected.offer.config.as_deref(), Some(&CONFIG[..]));
        assert_eq!(connected.offer.queue_num, Some(u64::from(NUM_QUEUES)));
        let memory = Arc::new(GuestMemory::with_regions(&[(0, MEMORY_BYTES)]).unwrap());
        let region = MemoryRegion {
            gpa: 0,
            size_bytes: MEMORY_BYTES,
            file: Arc::new(memory.file().try_clone().unwrap()),
            file_offset: 0,
        };
        let events = || -> Vec<EventFd> {
            (0..NUM_QUEUES)
                .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
                .collect()
        };
        let (kicks, calls) = (events(), events());
        let shared = kicks.iter().zip(&calls).map(|(kick, call)| QueueEvents {
            kick: kick.try_clone().unwrap(),
            call: call.try_clone().unwrap(),
        });
        let told = Arc::new(Told::default());
        let wiring = Wiring {
            memory: Arc::new(MemoryTable::new(vec![region])),
            queues: shared.collect(),
            events: Arc::clone(&told) as _,
        };
        Self {
            link: Link::spawn("echo", endpoint, connected, wiring).unwrap(),
            memory,
            rings: Vec::new(),
            kicks,
            calls,
            told,
            slots_used: 0,
        }
    }

    /// Sets fresh rings up, as a driver does before DRIVER_OK.
    fn activate(&mut self) {
        let base_gpa = |index: u16| 0x1_0000 * u64::from(index + 1);
        let offset = self.memory.layouts()[0].user_addr;
        self.rings = (0..NUM_QUEUES)
            .map(|index| DriverRing::new(&self.memory, base_gpa(index), RING_SIZE, F_EVENT_IDX))
            .collect();
        let state = |(index, ring): (u16, &DriverRing)| {
            let addresses = ring.addresses();
            QueueState {
                index,
                size: RING_SIZE,
                desc_gpa: addresses.desc - offset,
                driver_gpa: addresses.avail - offset,
                device_gpa: addresses.used - offset,
                base: Some(0),
            }
        };
        self.link.activate(Activation {
            features: F_VERSION_1 | F_EVENT_IDX,
            queues: (0..).zip(&self.rings).map(state).collect(),
        });
    }

    fn submit(&mut self, queue: usize, data: &[u8]) -> (u16, u64) {
        self.submit_until(queue, data, self.rings[queue].used_idx())
    }

    /// Asks for an interrupt when entry `used_event` of the used ring is written.
    fn submit_until(&mut self, queue: usize, data: &[u8], used_event: u16) -> (u16, u64) {
        let gpa = DATA_GPA + self.slots_used % 64 * 0x200;
        self.slots_used += 1;
        self.memory.write(gpa, data);
        self.memory.write(gpa + 0x100, &vec![0; data.len()]);
        let len = data.len() as u32;
        let ring = &mut self.rings[queue];
        ring.set_used_event(used_event);
        let head = ring.add(&[(gpa, len)], &[(gpa + 0x100, len)]).unwrap();
        if ring.needs_kick() {
            self.kicks[queue].write(1).unwrap();
        }
        (head, gpa + 0x100)
    }

    /// Waits for the interrupt, then takes the one answer.
    fn complete(&mut self, queue: usize, (head, gpa): (u16, u64), data: &[u8]) {
        eventually("the interrupt is raised", || {
            self.calls[queue].read().is_ok()
        });
        eventually("the request is completed", || {
            self.rings[queue].used_idx() == self.rings[queue].avail_idx()
        });
        assert_eq!(
            self.rings[queue].pop_used(),
            Some((head, data.len() as u32))
        );
        assert_eq!(self.memory.read(gpa, data.len()), data);
    }

    fn exchange(&mut self, queue: usize, data: &[u8]) {
        let request = self.submit(queue, data);
        self.complete(queue, request, data);
    }
}
