//! Frontends: an honest one on the vhost crate, and one that sends any bytes.

use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd as VmmEventFd;

use super::*;
use crate::driver::{DriverRing, GuestMemory};

pub(super) const MEMORY_BYTES: u64 = 0x100000;
const RING_GPA: u64 = 0x10000;
const DATA_GPA: u64 = 0x80000;
pub(super) const RING_SIZE: u16 = 16;

/// VIRTIO_F_RING_PACKED: these frontends' rings are split.
pub(super) const PACKED: u64 = 1 << 34;

/// Ends a blocking call of the vhost crate that gets no answer.
struct Watchdog {
    _alive: Sender<()>,
}

impl Watchdog {
    fn new(stream: UnixStream) -> Watchdog {
        let (alive, watched) = channel();
        thread::spawn(move || {
            if watched.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        });
        Watchdog { _alive: alive }
    }
}

/// What survives a daemon: guest memory, rings, event descriptors, the in-flight file.
pub(super) struct Guest {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) rings: Vec<DriverRing>,
    pub(super) kicks: Vec<VmmEventFd>,
    pub(super) calls: Vec<VmmEventFd>,
    pub(super) errs: Vec<VmmEventFd>,
    pub(super) inflight: Option<(VhostUserInflight, File)>,
}

impl Guest {
    pub(super) fn new() -> Guest {
        let memory = Arc::new(GuestMemory::new(MEMORY_BYTES).unwrap());
        let ring = |index: u16| {
            DriverRing::new(&memory, RING_GPA * u64::from(index + 1), RING_SIZE, 1 << 29)
        };
        let events = || {
            (0..NUM_QUEUES)
                .map(|_| VmmEventFd::new(libc::EFD_NONBLOCK).unwrap())
                .collect()
        };
        Guest {
            rings: (0..NUM_QUEUES).map(ring).collect(),
            kicks: events(),
            calls: events(),
            errs: events(),
            inflight: None,
            memory,
        }
    }

    pub(super) fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        let region = |layout: &crate::memory::RegionLayout| VhostUserMemoryRegionInfo {
            guest_phys_addr: layout.gpa,
            memory_size: layout.len_bytes,
            userspace_addr: layout.user_addr,
            mmap_offset: layout.mmap_offset,
            mmap_handle: self.memory.file().as_raw_fd(),
        };
        self.memory.layouts().iter().map(region).collect()
    }

    /// Offers a request whose data and answer lie in slot `slot`.
    pub(super) fn offer(&mut self, queue: usize, slot: u64, data: &[u8]) -> u16 {
        let gpa = DATA_GPA + slot * 256;
        self.memory.write(gpa, data);
        self.memory.write(gpa + 128, &[0; 128]);
        let len = data.len() as u32;
        self.rings[queue]
            .add(&[(gpa, len)], &[(gpa + 128, len)])
            .unwrap()
    }

    /// Offers a buffer of `len` bytes to be written.
    pub(super) fn offer_writable(&mut self, queue: usize, len: u32) {
        self.rings[queue].add(&[], &[(DATA_GPA, len)]).unwrap();
    }

    pub(super) fn answer(&self, slot: u64, len: usize) -> Vec<u8> {
        self.memory.read(DATA_GPA + slot * 256 + 128, len)
    }

    pub(super) fn kick(&mut self, queue: usize) {
        if self.rings[queue].needs_kick() {
            self.kicks[queue].write(1).unwrap();
        }
    }
}

/// An honest frontend.
pub(super) struct Honest {
    pub(super) frontend: Frontend,
    pub(super) guest: Guest,
    stream: UnixStream,
    _watchdog: Watchdog,
}

impl Honest {
    pub(super) fn connect(served: &Served) -> Honest {
        Honest::connect_with(served, Guest::new())
    }

    pub(super) fn connect_with(served: &Served, guest: Guest) -> Honest {
        let stream = served.connect();
        Honest {
            frontend: Frontend::from_stream(stream.try_clone().unwrap(), u64::from(NUM_QUEUES)),
            guest,
            _watchdog: Watchdog::new(stream.try_clone().unwrap()),
            stream,
        }
    }

    /// The daemon's connection dies, the guest lives on.
    pub(super) fn hang_up(self) -> Guest {
        self.stream.shutdown(std::net::Shutdown::Both).unwrap();
        self.guest
    }

    /// Everything up to memory.
    pub(super) fn set_up(&mut self) {
        self.negotiate();
        self.frontend.set_mem_table(&self.guest.regions()).unwrap();
    }

    pub(super) fn negotiate(&mut self) {
        self.frontend.set_owner().unwrap();
        let features = self.frontend.get_features().unwrap();
        self.frontend.set_features(features & !PACKED).unwrap();
        let protocol_features = self.frontend.get_protocol_features().unwrap();
        self.frontend
            .set_protocol_features(protocol_features)
            .unwrap();
        assert!(protocol_features.contains(VhostUserProtocolFeatures::REPLY_ACK));
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }

    /// Hands over the in-flight file, a new one if there is none yet.
    pub(super) fn track_inflight(&mut self) {
        if self.guest.inflight.is_none() {
            let shape = VhostUserInflight::new(0, 0, NUM_QUEUES, RING_SIZE);
            self.guest.inflight = Some(self.frontend.get_inflight_fd(&shape).unwrap());
        }
        let (description, file) = self.guest.inflight.as_ref().unwrap();
        self.frontend
            .set_inflight_fd(description, file.as_raw_fd())
            .unwrap();
    }

    pub(super) fn vring_addresses(&self, queue: usize) -> VringConfigData {
        let addresses = self.guest.rings[queue].addresses();
        VringConfigData {
            queue_max_size: RING_SIZE,
            queue_size: RING_SIZE,
            flags: 0,
            desc_table_addr: addresses.desc,
            used_ring_addr: addresses.used,
            avail_ring_addr: addresses.avail,
            log_addr: None,
        }
    }

    /// Starts a ring from `used->idx`, as after a crash.
    pub(super) fn start(&mut self, queue: usize) {
        self.start_from(queue, self.guest.rings[queue].used_idx());
    }

    pub(super) fn start_from(&mut self, queue: usize, base: u16) {
        let addresses = self.vring_addresses(queue);
        let (frontend, guest) = (&mut self.frontend, &self.guest);
        frontend.set_vring_num(queue, RING_SIZE).unwrap();
        frontend.set_vring_base(queue, base).unwrap();
        frontend.set_vring_addr(queue, &addresses).unwrap();
        frontend.set_vring_call(queue, &guest.calls[queue]).unwrap();
        frontend.set_vring_err(queue, &guest.errs[queue]).unwrap();
        frontend.set_vring_kick(queue, &guest.kicks[queue]).unwrap();
        frontend.set_vring_enable(queue, true).unwrap();
    }

    /// One request there and back, with the signals that go with it.
    #[track_caller]
    pub(super) fn assert_echo(&mut self, queue: usize, data: &[u8]) {
        let _ = self.guest.calls[queue].read();
        self.guest.rings[queue].ask_for_signal();
        let head = self.guest.offer(queue, 0, data);
        self.guest.kick(queue);
        let mut used = None;
        eventually("the request is completed", || {
            used = self.guest.rings[queue].pop_used();
            used.is_some()
        });
        assert_eq!(used, Some((head, data.len() as u32)));
        eventually("the driver is signalled", || {
            self.guest.calls[queue].read().is_ok()
        });
        assert_eq!(self.guest.answer(0, data.len()), data);
    }
}

/// A frontend that sends any bytes with any descriptors.
pub(super) struct Raw {
    pub(super) stream: UnixStream,
}

pub(super) const VERSION: u32 = 1;
pub(super) const NEED_REPLY: u32 = 8;

impl Raw {
    pub(super) fn connect(served: &Served) -> Raw {
        let stream = served.connect();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Raw { stream }
    }

    pub(super) fn send(&self, bytes: &[u8], fds: &[RawFd]) -> nix::Result<usize> {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() {
            &rights[..0]
        } else {
            &rights[..]
        };
        sendmsg::<()>(
            self.stream.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
    }

    pub(super) fn request(&self, code: u32, flags: u32, payload: &[u8], fds: &[RawFd]) {
        // The backend may have hung up already; the outcome is what counts.
        let _ = self.send(&message(code, flags, payload), fds);
    }

    /// SET_OWNER, and REPLY_ACK in force.
    pub(super) fn negotiate(&self) {
        self.request(3, VERSION, &[], &[]);
        self.request(1, VERSION, &[], &[]);
        let features = self.reply_value().unwrap() & !PACKED;
        self.request(2, VERSION, &features.to_ne_bytes(), &[]);
        self.request(15, VERSION, &[], &[]);
        let protocol_features = self.reply_value().unwrap();
        self.request(16, VERSION, &protocol_features.to_ne_bytes(), &[]);
    }

    /// SET_MEM_TABLE with one region of `guest`'s memory.
    pub(super) fn share(&self, guest: &Guest) {
        let fd = guest.memory.file().as_raw_fd();
        let user_addr = guest.memory.layouts()[0].user_addr;
        let payload = words(&[1, 0, MEMORY_BYTES, user_addr, 0]);
        self.request(5, VERSION | NEED_REPLY, &payload, &[fd]);
        assert_eq!(self.reply_value(), Some(0), "honest memory is accepted");
    }

    /// The eight bytes of the next reply; None when the backend hung up.
    pub(super) fn reply_value(&self) -> Option<u64> {
        let mut reply = [0u8; 20];
        (&self.stream).read_exact(&mut reply).ok()?;
        Some(u64::from_ne_bytes(reply[12..].try_into().unwrap()))
    }

    /// The backend hangs up without another reply.
    #[track_caller]
    pub(super) fn assert_ends(&self, what: &str) {
        let mut byte = [0];
        match (&self.stream).read(&mut byte) {
            Ok(0) => {}
            Ok(_) => panic!("{what}: answered instead of ending the session"),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            Err(error) => panic!("{what}: session goes on ({error})"),
        }
    }

    /// The last request is refused, and the session goes on.
    #[track_caller]
    pub(super) fn assert_refused(&self, what: &str) {
        let value = self
            .reply_value()
            .unwrap_or_else(|| panic!("{what}: the session ended"));
        assert_ne!(value, 0, "{what}: accepted");
    }
}

pub(super) fn message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(12 + payload.len());
    for word in [code, flags, payload.len() as u32] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

/// 64-bit fields of a payload.
pub(super) fn words(values: &[u64]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_ne_bytes())
        .collect()
}

/// A pair of 32-bit fields: vring state.
pub(super) fn state(index: u32, value: u32) -> Vec<u8> {
    [index, value]
        .iter()
        .flat_map(|value| value.to_ne_bytes())
        .collect()
}

/// SET_VRING_ADDR's payload.
pub(super) fn addresses(index: u32, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    let mut payload = state(index, 0);
    payload.extend(words(&[desc, used, avail, 0]));
    payload
}
