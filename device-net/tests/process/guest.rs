//! A driver for virtio-net over the vhost crate's frontend: the guest of these tests.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Instant;

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_user::driver::{Buffer, DriverRing, GuestMemory};
use vhost_user::ring::RingAddresses;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use crate::daemon::{DEADLINE, await_true};
use crate::frame::{self, Parsed};

pub(crate) const HEADER_LEN: usize = 12;
pub(crate) const RING_SIZE: u16 = 256;

/// What the driver acknowledges of what is offered, unless a test says otherwise.
pub(crate) const USUAL: &[u32] = &[
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_MQ,
];

const MEMORY_BYTES: u64 = 32 << 20;
const RING_GPA: u64 = 0x10000;
const RX_GPA: u64 = 8 << 20;
const TX_GPA: u64 = 24 << 20;
/// Each queue has this much for its buffers.
const QUEUE_BYTES: u64 = 4 << 20;
const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// What survives a daemon.
pub(crate) struct Machine {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) rings: Vec<DriverRing>,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
    pub(crate) errs: Vec<EventFd>,
    inflight: Option<(VhostUserInflight, File)>,
    posted: Vec<HashMap<u16, Buffer>>,
    features: u64,
}

/// A machine that is connected to a daemon.
pub(crate) struct Guest {
    pub(crate) machine: Machine,
    pub(crate) frontend: Frontend,
    /// Everything that the daemon offers.
    pub(crate) offered: u64,
    stream: UnixStream,
    _watchdog: Sender<()>,
}

/// A frame as it arrived.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) pair: usize,
    pub(crate) header: [u8; HEADER_LEN],
    pub(crate) frame: Vec<u8>,
    pub(crate) num_buffers: u16,
}

impl Guest {
    /// Connects with the usual features and starts the rings of `pairs` queue pairs (and the
    /// control queue, if it was acknowledged).
    pub(crate) fn connect(socket: &Path, pairs: usize) -> Guest {
        Guest::connect_with(socket, pairs, USUAL)
    }

    pub(crate) fn connect_with(socket: &Path, pairs: usize, features: &[u32]) -> Guest {
        let mut guest = Guest::negotiate(socket, features);
        let ctrl = guest.has(VIRTIO_NET_F_CTRL_VQ);
        for queue in 0..2 * pairs + usize::from(ctrl) {
            guest.start(queue);
        }
        guest
    }

    /// Connects, up to memory.
    pub(crate) fn negotiate(socket: &Path, features: &[u32]) -> Guest {
        let mut guest = Guest::open(socket, Machine::new());
        let wanted = features.iter().fold(0, |mask, bit| mask | 1 << bit);
        guest.offered = guest.frontend.get_features().unwrap();
        guest.machine.features = guest.offered & wanted;
        guest.set_up();
        guest
    }

    /// The daemon's successor takes over.
    pub(crate) fn reconnect(self, socket: &Path, pairs: usize) -> Guest {
        let offered = self.offered;
        let machine = self.hang_up();
        let mut guest = Guest::open(socket, machine);
        guest.offered = offered;
        guest.set_up();
        let ctrl = guest.has(VIRTIO_NET_F_CTRL_VQ);
        for queue in 0..2 * pairs + usize::from(ctrl) {
            guest.start(queue);
            guest.machine.kicks[queue].write(1).unwrap();
        }
        guest
    }

    fn open(socket: &Path, machine: Machine) -> Guest {
        let mut stream = None;
        await_true("the daemon accepts", || {
            stream = UnixStream::connect(socket).ok();
            stream.is_some()
        });
        let stream = stream.unwrap();
        let (alive, watched) = channel();
        let victim = stream.try_clone().unwrap();
        thread::spawn(move || {
            if watched.recv_timeout(3 * DEADLINE) == Err(RecvTimeoutError::Timeout) {
                let _ = victim.shutdown(std::net::Shutdown::Both);
            }
        });
        let frontend = Frontend::from_stream(stream.try_clone().unwrap(), 64);
        frontend.set_owner().unwrap();
        Guest {
            machine,
            frontend,
            offered: 0,
            stream,
            _watchdog: alive,
        }
    }

    fn set_up(&mut self) {
        let features = self.machine.features | VHOST_USER_F_PROTOCOL_FEATURES;
        self.frontend.get_features().unwrap();
        self.frontend.set_features(features).unwrap();
        let protocol_features = self.frontend.get_protocol_features().unwrap();
        self.frontend
            .set_protocol_features(protocol_features)
            .unwrap();
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let layout = self.machine.memory.layouts()[0];
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: layout.gpa,
            memory_size: layout.len_bytes,
            userspace_addr: layout.user_addr,
            mmap_offset: layout.mmap_offset,
            mmap_handle: self.machine.memory.file().as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).unwrap();
        if self.machine.inflight.is_none() {
            let num_queues = self.frontend.get_queue_num().unwrap() as u16;
            let shape = VhostUserInflight::new(0, 0, num_queues, RING_SIZE);
            self.machine.inflight = Some(self.frontend.get_inflight_fd(&shape).unwrap());
        }
        let (description, file) = self.machine.inflight.as_ref().unwrap();
        self.frontend
            .set_inflight_fd(description, file.as_raw_fd())
            .unwrap();
    }

    /// Starts a ring where it stands.
    pub(crate) fn start(&mut self, queue: usize) {
        let ring = &self.machine.rings[queue];
        let (addresses, base) = (ring.addresses(), ring.used_idx());
        self.start_ring(queue, addresses, base);
    }

    /// Starts any ring.
    pub(crate) fn start_ring(&mut self, queue: usize, addresses: RingAddresses, base: u16) {
        let Machine {
            kicks, calls, errs, ..
        } = &self.machine;
        let config = VringConfigData {
            queue_max_size: RING_SIZE,
            queue_size: RING_SIZE,
            flags: 0,
            desc_table_addr: addresses.desc,
            used_ring_addr: addresses.used,
            avail_ring_addr: addresses.avail,
            log_addr: None,
        };
        let frontend = &mut self.frontend;
        frontend.set_vring_num(queue, RING_SIZE).unwrap();
        frontend.set_vring_base(queue, base).unwrap();
        frontend.set_vring_addr(queue, &config).unwrap();
        frontend.set_vring_call(queue, &calls[queue]).unwrap();
        frontend.set_vring_err(queue, &errs[queue]).unwrap();
        frontend.set_vring_kick(queue, &kicks[queue]).unwrap();
        frontend.set_vring_enable(queue, true).unwrap();
    }

    /// Ends the connection; the machine lives on.
    pub(crate) fn hang_up(self) -> Machine {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        self.machine
    }

    pub(crate) fn has(&self, feature: u32) -> bool {
        self.machine.features & 1 << feature != 0
    }

    /// Supplies `count` receive buffers of `len` bytes each.
    pub(crate) fn supply(&mut self, pair: usize, count: u32, len: u32) {
        let first = self.machine.posted[2 * pair].len() as u64;
        for number in 0..u64::from(count) {
            let at = RX_GPA + pair as u64 * QUEUE_BYTES + (first + number) * u64::from(len);
            self.supply_buffer(pair, (at, len));
        }
        self.kick(2 * pair);
    }

    fn supply_buffer(&mut self, pair: usize, buffer: Buffer) {
        let machine = &mut self.machine;
        machine
            .memory
            .write(buffer.0, &vec![0xaa; buffer.1 as usize]);
        let head = machine.rings[2 * pair].add(&[], &[buffer]).unwrap();
        machine.posted[2 * pair].insert(head, buffer);
    }

    /// Takes a frame and gives its buffers back to the device.
    pub(crate) fn try_receive(&mut self, pair: usize) -> Option<Received> {
        let queue = 2 * pair;
        let (head, len) = self.machine.rings[queue].pop_used()?;
        let mut used = vec![self.machine.take(queue, head, len)];
        let header: [u8; HEADER_LEN] = used[0].1[..HEADER_LEN].try_into().unwrap();
        let num_buffers = u16::from_le_bytes([header[10], header[11]]);
        for _ in 1..num_buffers {
            // Published together with the first.
            let (head, len) = self.machine.rings[queue]
                .pop_used()
                .expect("the whole frame");
            used.push(self.machine.take(queue, head, len));
        }
        let mut frame = Vec::new();
        for (buffer, bytes) in used {
            frame.extend(bytes);
            self.supply_buffer(pair, buffer);
        }
        self.kick(queue);
        frame.drain(..HEADER_LEN);
        Some(Received {
            pair,
            header,
            frame,
            num_buffers,
        })
    }

    /// Waits for a frame on any of the pairs that `wanted` makes something of. Answers ARP
    /// meanwhile and passes over everything else.
    #[track_caller]
    pub(crate) fn receive<T>(&mut self, wanted: impl Fn(&Received, Parsed) -> Option<T>) -> T {
        let until = Instant::now() + DEADLINE;
        let pairs = self.machine.rings.len() / 2;
        loop {
            for pair in 0..pairs {
                let Some(received) = self.try_receive(pair) else {
                    continue;
                };
                match frame::parse(&received.frame) {
                    Parsed::ArpRequest(answer) => self.send(0, &answer),
                    parsed => {
                        if let Some(found) = wanted(&received, parsed) {
                            return found;
                        }
                    }
                }
            }
            assert!(Instant::now() < until, "the frame never came");
            thread::yield_now();
        }
    }

    /// The host's Ethernet address, by ARP.
    #[track_caller]
    pub(crate) fn find_host(&mut self) -> [u8; 6] {
        self.send(0, &frame::arp_request());
        self.receive(|_, parsed| match parsed {
            Parsed::ArpReply { host_mac } => Some(host_mac),
            _ => None,
        })
    }

    /// Sends a frame with an empty header and waits until the device is done with it.
    #[track_caller]
    pub(crate) fn send(&mut self, pair: usize, frame: &[u8]) {
        self.send_with(pair, [0; HEADER_LEN], frame);
    }

    #[track_caller]
    pub(crate) fn send_with(&mut self, pair: usize, header: [u8; HEADER_LEN], frame: &[u8]) {
        let at = TX_GPA + pair as u64 * QUEUE_BYTES / 4;
        self.machine.memory.write(at, &header);
        self.machine.memory.write(at + HEADER_LEN as u64, frame);
        // Header, then the frame in two parts, as drivers do.
        let cut = frame.len() as u32 / 2;
        let frame_at = at + HEADER_LEN as u64;
        let parts = [
            (at, HEADER_LEN as u32),
            (frame_at, cut),
            (frame_at + u64::from(cut), frame.len() as u32 - cut),
        ];
        let parts: Vec<Buffer> = parts.into_iter().filter(|part| part.1 > 0).collect();
        self.transmit(pair, &parts);
    }

    /// Offers any buffers as one frame and waits until the device is done with them.
    #[track_caller]
    pub(crate) fn transmit(&mut self, pair: usize, parts: &[Buffer]) {
        let queue = 2 * pair + 1;
        let head = self.machine.rings[queue].add(parts, &[]).unwrap();
        self.kick(queue);
        let mut used = None;
        await_true("the device is done with a frame", || {
            used = self.machine.rings[queue].pop_used();
            used.is_some()
        });
        assert_eq!(used.unwrap().0, head);
    }

    /// Sends a command over the control queue; what the device answers.
    #[track_caller]
    pub(crate) fn command(&mut self, bytes: &[u8]) -> u8 {
        let queue = self.ctrl_queue();
        let (command_at, ack_at) = (TX_GPA - 0x2000, TX_GPA - 0x1000);
        self.machine.memory.write(command_at, bytes);
        self.machine.memory.write(ack_at, &[0xff]);
        let command = [(command_at, bytes.len() as u32)];
        self.machine.rings[queue]
            .add(&command, &[(ack_at, 1)])
            .unwrap();
        self.kick(queue);
        await_true("the device acknowledges a command", || {
            self.machine.rings[queue].pop_used().is_some()
        });
        self.machine.memory.read(ack_at, 1)[0]
    }

    fn ctrl_queue(&self) -> usize {
        self.machine.rings.len() - 1
    }

    /// Whether the device wants to be told or not.
    pub(crate) fn kick_now(&mut self, queue: usize) {
        self.machine.kicks[queue].write(1).unwrap();
    }

    pub(crate) fn kick(&mut self, queue: usize) {
        if self.machine.rings[queue].needs_kick() {
            self.machine.kicks[queue].write(1).unwrap();
        }
    }
}

impl Machine {
    /// Rings for two pairs and a control queue.
    fn new() -> Machine {
        let memory = Arc::new(GuestMemory::new(MEMORY_BYTES).unwrap());
        let ring = |queue: u64| {
            let features = 1 << VIRTIO_RING_F_EVENT_IDX;
            DriverRing::new(&memory, RING_GPA * (queue + 1), RING_SIZE, features)
        };
        let events = || {
            (0..5)
                .map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap())
                .collect()
        };
        Machine {
            rings: (0..5).map(ring).collect(),
            kicks: events(),
            calls: events(),
            errs: events(),
            inflight: None,
            posted: vec![HashMap::new(); 5],
            features: 0,
            memory,
        }
    }

    fn take(&mut self, queue: usize, head: u16, len: u32) -> (Buffer, Vec<u8>) {
        let buffer = self.posted[queue]
            .remove(&head)
            .expect("a head that was supplied");
        (buffer, self.memory.read(buffer.0, len as usize))
    }
}
