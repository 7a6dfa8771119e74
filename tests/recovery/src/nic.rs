//! A NIC under TCP load whose daemon is killed again and again: the kernel's TCP on the host sends a
//! stream through a tap, and a guest of two rings takes it ([`tcp`](crate::tcp)).

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::net::{SocketAddrV4, TcpListener};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::host::{Daemon, Fencing, Host, PATIENCE, Readiness};
use crate::memory::Memory;
use crate::random::Random;
use crate::ring::{FrameRing, RingMemory};
use crate::tcp::{HOST, PORT, Receiver, byte_at};
use crate::transport::{Flaw, Transport, Wiring, await_true};

const TAP: &str = "recovery0";
const RING_DEPTH: usize = 128;
const FRAME_BYTES: usize = 2048;
/// `struct virtio_net_hdr_v1`
const HEADER_BYTES: usize = 12;
const RX: usize = 0;
const TX: usize = 1;
/// After so long without a frame the guest says once more what it has.
const NUDGE_INTERVAL: Duration = Duration::from_millis(50);

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// One by one.
    pub kills: Vec<Kill>,
    /// Bytes of the stream that arrived.
    pub bytes: u64,
    /// Of them, wrong ones.
    pub wrong: u64,
    /// Why it ended early, if it did.
    pub failure: Option<String>,
}

/// One kill, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Kill {
    /// The longest time without new bytes.
    pub gap_ms: f64,
    /// From the signal to the first new bytes through the next daemon.
    pub first_bytes_ms: f64,
}

/// Kills `program` (device-net) `kills` times while a connection is busy. Moves this thread to a
/// network namespace of its own, which needs root.
///
/// # Errors
/// It could not begin.
pub fn run(program: &Path, kills: u32, readiness: Readiness, seed: u64) -> Result<Outcome> {
    unshare(CloneFlags::CLONE_NEWNET).context("no network namespace of our own; be root")?;
    let tap = Tap::make()?;
    let mut host = Host::new(program, &[], readiness, Fencing::On)?;
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("nic.vu");
    let listener = UnixListener::bind(&socket)?;
    let mut daemon = serve(&mut host, &listener, &tap)?;
    let sender = Sender::start()?;
    let guest = Guest::boot(&socket)?;
    let mut outcome = Outcome::default();
    let mut random = Random::new(seed);
    let mut storm = || -> Result<()> {
        guest.await_bytes(1)?;
        for _ in 0..kills {
            host.prepare()?;
            thread::sleep(Duration::from_millis(50 + random.below(200)));
            guest.state.gap_ns.store(0, Ordering::SeqCst);
            let killed = Instant::now();
            daemon.signal(Signal::SIGKILL)?;
            daemon.ended()?;
            let before = guest.state.bytes.load(Ordering::SeqCst);
            daemon = serve(&mut host, &listener, &tap)?;
            guest.await_bytes(before + 1)?;
            let first_bytes_ms = killed.elapsed().as_secs_f64() * 1e3;
            // A second gap may follow, until what was lost was sent once more.
            guest.await_bytes(before + (1 << 20))?;
            let gap_ns = guest.state.gap_ns.load(Ordering::SeqCst);
            outcome.kills.push(Kill {
                gap_ms: gap_ns as f64 / 1e6,
                first_bytes_ms,
            });
        }
        Ok(())
    };
    outcome.failure = storm().err().map(|error| format!("{error:#}"));
    let receiver = guest.end();
    (outcome.bytes, outcome.wrong) = receiver.received();
    if receiver.is_reset() {
        outcome
            .failure
            .get_or_insert("the connection was reset".into());
    }
    drop(sender);
    Ok(outcome)
}

fn serve(host: &mut Host, listener: &UnixListener, tap: &Tap) -> Result<Daemon> {
    let mut daemon = host.process()?;
    host.attach_nic(&mut daemon, listener, tap.open()?, TAP)?;
    Ok(daemon)
}

/// A persistent tap, up, with the host's address; gone with the namespace.
struct Tap;

impl Tap {
    fn make() -> Result<Self> {
        let tap = Self;
        let file = tap.open()?;
        // SAFETY: TUNSETPERSIST takes an integer.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST, 1) })?;
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        let mut request = request()?;
        // SAFETY: all zeroes is an address of no family.
        let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
        address.sin_family = libc::AF_INET as libc::sa_family_t;
        for (call, octets) in [
            (libc::SIOCSIFADDR, HOST.octets()),
            (libc::SIOCSIFNETMASK, [255, 255, 255, 0]),
        ] {
            address.sin_addr.s_addr = u32::from_ne_bytes(octets);
            // SAFETY: a sockaddr_in is as long as a sockaddr, and both are plain data.
            request.ifr_ifru.ifru_addr =
                unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) };
            // SAFETY: the call reads one live ifreq.
            check(unsafe { libc::ioctl(socket.as_raw_fd(), call, &raw const request) })?;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        // SAFETY: the call reads one live ifreq.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })?;
        Ok(tap)
    }

    /// For the next daemon. The last one is dead by now, but the kernel may still be at it.
    fn open(&self) -> Result<File> {
        let mut opened = Err(io::Error::from(io::ErrorKind::TimedOut));
        let waited = await_true(PATIENCE, || {
            opened = open_tap();
            !matches!(&opened, Err(error) if error.raw_os_error() == Some(libc::EBUSY))
        });
        waited?;
        opened.context("cannot open the tap")
    }
}

fn open_tap() -> io::Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut request = request()?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one live ifreq.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    Ok(file)
}

fn request() -> io::Result<libc::ifreq> {
    // SAFETY: all zeroes is a request without name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
        *place = byte as libc::c_char;
    }
    Ok(request)
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends the stream to whoever connects, as fast as TCP lets it.
struct Sender {
    _thread: JoinHandle<()>,
}

impl Sender {
    fn start() -> io::Result<Self> {
        let listener = TcpListener::bind(SocketAddrV4::new(HOST, PORT))?;
        let send = move || {
            let Ok((mut stream, _)) = listener.accept() else {
                return;
            };
            // Ends when the connection does: with the guest, or with the namespace.
            let _ = stream.set_write_timeout(Some(PATIENCE));
            let mut position = 0;
            loop {
                let part: Vec<u8> = (position..position + (64 << 10)).map(byte_at).collect();
                if stream.write_all(&part).is_err() {
                    return;
                }
                position += part.len() as u64;
            }
        };
        let thread = thread::Builder::new()
            .name("sender".to_owned())
            .spawn(send)?;
        Ok(Self { _thread: thread })
    }
}

#[derive(Debug, Default)]
struct State {
    bytes: AtomicU64,
    gap_ns: AtomicU64,
    ended: AtomicBool,
    reset: AtomicBool,
}

struct Guest {
    state: Arc<State>,
    thread: JoinHandle<Receiver>,
    _transport: Transport,
}

impl Guest {
    fn boot(socket: &Path) -> Result<Self> {
        let memory = Arc::new(Memory::new(2 << 20)?);
        let features = crate::ring::nic_features();
        let mut places = RingMemory::new(socket, features, &memory)?;
        let rings = [
            places.frame_ring(RING_DEPTH)?,
            places.frame_ring(RING_DEPTH)?,
        ];
        let (pages, _) = places.pages();
        ensure!(pages.len() >= RING_DEPTH * 2, "more memory is needed");
        let plans = rings
            .iter()
            .map(FrameRing::plan)
            .collect::<io::Result<_>>()?;
        let transport = Transport::start(Wiring {
            socket: socket.to_owned(),
            memory: Arc::clone(&memory),
            rings: plans,
            features,
            flaw: Flaw::None,
        })?;
        let state = Arc::<State>::default();
        let driver = Driver {
            rings,
            memory,
            free: pages.into(),
            receiver: Receiver::default(),
            state: Arc::clone(&state),
            last_progress: Instant::now(),
        };
        let thread = thread::Builder::new()
            .name("nic".to_owned())
            .spawn(move || driver.run())?;
        Ok(Self {
            state,
            thread,
            _transport: transport,
        })
    }

    fn await_bytes(&self, bytes: u64) -> Result<()> {
        let state = &self.state;
        await_true(PATIENCE, || {
            state.bytes.load(Ordering::SeqCst) >= bytes || state.reset.load(Ordering::SeqCst)
        })
        .context("nothing arrives")?;
        ensure!(
            !state.reset.load(Ordering::SeqCst),
            "the connection was reset"
        );
        Ok(())
    }

    fn end(self) -> Receiver {
        self.state.ended.store(true, Ordering::SeqCst);
        self.thread
            .join()
            .expect("the guest's thread does not panic")
    }
}

struct Driver {
    rings: [FrameRing; 2],
    memory: Arc<Memory>,
    free: VecDeque<usize>,
    receiver: Receiver,
    state: Arc<State>,
    last_progress: Instant,
}

impl Driver {
    fn run(mut self) -> Receiver {
        while self.free.len() > RING_DEPTH && self.rings[RX].has_room() {
            self.offer();
        }
        self.rings[RX].kick();
        self.send(&self.receiver.nudge());
        let mut last_nudge = Instant::now();
        while !self.state.ended.load(Ordering::SeqCst) {
            if self.receive() == 0 {
                if last_nudge.elapsed() > NUDGE_INTERVAL {
                    last_nudge = Instant::now();
                    self.send(&self.receiver.nudge());
                }
                wait(&self.rings[RX].call);
            }
        }
        self.receiver
    }

    /// Takes the frames that are there.
    fn receive(&mut self) -> usize {
        let mut count = 0;
        let mut frame = [0; FRAME_BYTES];
        let mut answer = None;
        while let Some(page) = self.rings[RX].take_used() {
            count += 1;
            self.memory.read(page, &mut frame);
            let heard = self.receiver.hear(&frame[HEADER_BYTES..]);
            if heard.is_progress {
                self.note_progress();
            }
            // Acknowledgements of one batch but the last say nothing; a gap needs each of them.
            if !heard.is_progress
                && let Some(answer) = heard.answer
            {
                self.send(&answer);
            } else if heard.answer.is_some() {
                answer = heard.answer;
            }
            self.free.push_back(page);
            self.offer();
        }
        if let Some(answer) = answer {
            self.send(&answer);
        }
        if count > 0 {
            self.rings[RX].kick();
        }
        let is_reset = self.receiver.is_reset();
        self.state.reset.store(is_reset, Ordering::SeqCst);
        count
    }

    fn note_progress(&mut self) {
        let gap_ns = self.last_progress.elapsed().as_nanos() as u64;
        self.last_progress = Instant::now();
        self.state.gap_ns.fetch_max(gap_ns, Ordering::SeqCst);
        let (bytes, _) = self.receiver.received();
        self.state.bytes.store(bytes, Ordering::SeqCst);
    }

    fn offer(&mut self) {
        let page = self.free.pop_front().expect("a page for each buffer");
        self.rings[RX].add(page, FRAME_BYTES, true, &self.memory);
    }

    fn send(&mut self, frame: &[u8]) {
        while let Some(page) = self.rings[TX].take_used() {
            self.free.push_back(page);
        }
        // While nobody takes frames they are dropped, as a NIC does.
        if !self.rings[TX].has_room() {
            return;
        }
        let Some(page) = self.free.pop_front() else {
            return;
        };
        let with_header = [&[0; HEADER_BYTES], frame].concat();
        self.memory.write(page, &with_header);
        self.rings[TX].add(page, with_header.len(), false, &self.memory);
        self.rings[TX].kick();
    }
}

/// Waits for an event, for a few milliseconds at most.
fn wait(event: &EventFd) {
    // SAFETY: the descriptor is open while `event` lives, which is longer than the call.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let mut polls = [nix::poll::PollFd::new(
        fd.as_fd(),
        nix::poll::PollFlags::POLLIN,
    )];
    if nix::poll::poll(&mut polls, 5_u8).is_ok() {
        let _ = event.read();
    }
}
