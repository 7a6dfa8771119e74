//! A cable from a NIC's vhost-user socket to a machine: a driver of virtio-net, over the vhost crate's
//! frontend, whose frames are those of a tap called eth0 in the machine. When the NIC's daemon dies the
//! driver connects to the next one, as vmm-core does.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::AsRawFd,
        unix::{fs::OpenOptionsExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserHeaderFlag, VhostUserInflight},
    },
};
use vhost_user::driver::{DriverRing, GuestMemory};
use vmm_sys_util::eventfd::EventFd;

use crate::namespace::{Namespace, poll};

const RX: usize = 0;
const TX: usize = 1;
const RING_SIZE: u16 = 256;
const MEMORY_BYTES: u64 = 4 << 20;
const RING_GPA: u64 = 0x10000;
const RX_GPA: u64 = 1 << 20;
const TX_GPA: u64 = 2 << 20;
/// A header and a frame of Ethernet's usual length.
const BUFFER_BYTES: u64 = 2048;
const HEADER_BYTES: usize = 12;
const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// See the module. Unplugged when dropped.
pub(crate) struct Cable {
    shared: Arc<Shared>,
    thread: Option<thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    pulled: AtomicBool,
    connections: AtomicU32,
}

impl Cable {
    /// Makes eth0 in `guest`, with the address `mac`, and connects it to the NIC at `socket`.
    pub(crate) fn plug(guest: &Namespace, mac: &str, socket: PathBuf) -> Self {
        let tap = guest.inside(open_tap);
        guest.run(&format!("ip link set eth0 address {mac} up"));
        let shared = Arc::new(Shared::default());
        let own = shared.clone();
        let thread = thread::spawn(move || {
            let mut driver = Driver::new(tap);
            while !own.pulled.load(Ordering::Acquire) {
                match driver.connect(&socket) {
                    Ok((stream, _frontend)) => {
                        own.connections.fetch_add(1, Ordering::AcqRel);
                        driver.carry(&stream, &own.pulled);
                    }
                    Err(_) => thread::sleep(POLL_INTERVAL),
                }
            }
        });
        let cable = Self {
            shared,
            thread: Some(thread),
        };
        cable.await_connections(1);
        cable
    }

    /// Waits until the NIC was connected to that often.
    pub(crate) fn await_connections(&self, count: u32) {
        poll("a connection to the NIC", || {
            (self.shared.connections.load(Ordering::Acquire) >= count).then_some(())
        });
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.shared.pulled.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What survives a daemon.
struct Driver {
    tap: File,
    memory: Arc<GuestMemory>,
    rings: [DriverRing; 2],
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
    inflight: Option<(VhostUserInflight, File)>,
    /// Where the buffer of a head is.
    buffers: [Vec<u64>; 2],
    /// Buffers for frames that are sent.
    free: Vec<u64>,
}

type Connected = (UnixStream, Frontend);

impl Driver {
    fn new(tap: File) -> Self {
        let memory = Arc::new(GuestMemory::new(MEMORY_BYTES).unwrap());
        let ring = |number: u64| DriverRing::new(&memory, RING_GPA * (number + 1), RING_SIZE, 0);
        let events = || [0; 2].map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let buffers = || vec![0; usize::from(RING_SIZE)];
        let slots = |first: u64| (0..u64::from(RING_SIZE)).map(move |n| first + n * BUFFER_BYTES);
        let mut driver = Self {
            rings: [ring(0), ring(1)],
            kicks: events(),
            calls: events(),
            inflight: None,
            buffers: [buffers(), buffers()],
            free: slots(TX_GPA).collect(),
            memory,
            tap,
        };
        for gpa in slots(RX_GPA) {
            driver.supply(gpa);
        }
        driver
    }

    fn supply(&mut self, gpa: u64) {
        let buffer = (gpa, BUFFER_BYTES as u32);
        let head = self.rings[RX].add(&[], &[buffer]).unwrap();
        self.buffers[RX][usize::from(head)] = gpa;
    }

    fn connect(&mut self, socket: &Path) -> Result<Connected, Box<dyn std::error::Error>> {
        let stream = UnixStream::connect(socket)?;
        let mut frontend = Frontend::from_stream(stream.try_clone()?, 2);
        frontend.set_owner()?;
        frontend.get_features()?;
        frontend.set_features(VERSION_1 | PROTOCOL_FEATURES)?;
        let protocol_features = frontend.get_protocol_features()?;
        frontend.set_protocol_features(protocol_features)?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let layout = self.memory.layouts()[0];
        frontend.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: layout.gpa,
            memory_size: layout.len_bytes,
            userspace_addr: layout.user_addr,
            mmap_offset: layout.mmap_offset,
            mmap_handle: self.memory.file().as_raw_fd(),
        }])?;
        let (description, file) = match &self.inflight {
            Some(inflight) => inflight,
            None => {
                let shape = VhostUserInflight::new(0, 0, 2, RING_SIZE);
                let made = frontend.get_inflight_fd(&shape)?;
                self.inflight.insert(made)
            }
        };
        frontend.set_inflight_fd(description, file.as_raw_fd())?;
        for queue in [RX, TX] {
            let ring = &self.rings[queue];
            let addresses = ring.addresses();
            frontend.set_vring_num(queue, RING_SIZE)?;
            frontend.set_vring_base(queue, ring.used_idx())?;
            frontend.set_vring_addr(
                queue,
                &VringConfigData {
                    queue_max_size: RING_SIZE,
                    queue_size: RING_SIZE,
                    flags: 0,
                    desc_table_addr: addresses.desc,
                    used_ring_addr: addresses.used,
                    avail_ring_addr: addresses.avail,
                    log_addr: None,
                },
            )?;
            frontend.set_vring_call(queue, &self.calls[queue])?;
            frontend.set_vring_kick(queue, &self.kicks[queue])?;
            frontend.set_vring_enable(queue, true)?;
            self.kicks[queue].write(1)?;
        }
        Ok((stream, frontend))
    }

    /// Carries frames both ways until the daemon hangs up or the cable is pulled.
    fn carry(&mut self, stream: &UnixStream, pulled: &AtomicBool) {
        while !pulled.load(Ordering::Acquire) {
            self.send_to_machine();
            self.take_from_machine();
            if self.wait(stream) {
                return;
            }
        }
    }

    fn send_to_machine(&mut self) {
        while let Some((head, len)) = self.rings[RX].pop_used() {
            let gpa = self.buffers[RX][usize::from(head)];
            let frame = self.memory.read(gpa, len as usize);
            // A machine that takes nothing loses it.
            let _ = self.tap.write(&frame[HEADER_BYTES..]);
            self.supply(gpa);
        }
        self.kick(RX);
    }

    fn take_from_machine(&mut self) {
        while let Some((head, _)) = self.rings[TX].pop_used() {
            self.free.push(self.buffers[TX][usize::from(head)]);
        }
        let mut frame = [0; BUFFER_BYTES as usize];
        while let Some(gpa) = self.free.pop() {
            let Ok(len) = self.tap.read(&mut frame[HEADER_BYTES..]) else {
                self.free.push(gpa);
                break;
            };
            let len = HEADER_BYTES + len;
            self.memory.write(gpa, &frame[..len]);
            let head = self.rings[TX].add(&[(gpa, len as u32)], &[]).unwrap();
            self.buffers[TX][usize::from(head)] = gpa;
        }
        self.kick(TX);
    }

    fn kick(&mut self, queue: usize) {
        if self.rings[queue].needs_kick() {
            self.kicks[queue].write(1).unwrap();
        }
    }

    /// Until there is something to do; whether the daemon hung up.
    fn wait(&mut self, stream: &UnixStream) -> bool {
        let fds = [
            stream.as_raw_fd(),
            self.tap.as_raw_fd(),
            self.calls[RX].as_raw_fd(),
            self.calls[TX].as_raw_fd(),
        ];
        let mut polled = fds.map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
        let timeout_ms = POLL_INTERVAL.as_millis() as i32;
        // SAFETY: an array of valid pollfds of that length.
        unsafe {
            libc::poll(
                polled.as_mut_ptr(),
                polled.len() as libc::nfds_t,
                timeout_ms,
            )
        };
        for call in &self.calls {
            let _ = call.read();
        }
        // It sends nothing of its own.
        polled[0].revents != 0
    }
}

/// eth0 in this thread's network.
fn open_tap() -> File {
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: an ifreq of zeroes is valid: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(b"eth0") {
        *target = *byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an ifreq, which lives across the call.
    let made = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &request) };
    assert_eq!(made, 0, "eth0: {}", io::Error::last_os_error());
    tap
}
