//! A NIC under TCP load whose daemon is killed again and again: between two network namespaces whose
//! kernels talk TCP to one another. The host's sends a stream through the NIC's tap; the guest's hears
//! it through a tap of its own ([`tap`](crate::tap)), whose frames a driver carries over two rings.
//!
//! ```text
//!   sender, kernel ── tap ── device-net ══ rings ══ driver ── tap ── kernel, receiver
//! ```

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::host::{Daemon, Fencing, Host, PATIENCE, Readiness};
use crate::memory::Memory;
use crate::random::Random;
use crate::ring::{FrameRing, RingMemory};
use crate::tap::{Framing, Tap};
use crate::transport::{Flaw, Transport, Wiring, await_true};

/// The guest's hardware address.
pub(crate) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
/// Where the host listens.
const PORT: u16 = 5000;
const TAP: &str = "recovery0";
const GUESTS_TAP: &str = "guest0";
const RING_DEPTH: usize = 256;
const FRAME_BYTES: usize = 2048;
/// `struct virtio_net_hdr_v1`
const HEADER_BYTES: usize = 12;
const RX: usize = 0;
const TX: usize = 1;
/// How long the receiver and the driver sleep at most before they look whether they are wanted.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

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
    // Held across incarnations, as node-agent does: what comes meanwhile waits in it.
    let tap = Tap::make(TAP, Framing::VnetHdr, HOST, None)?;
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
            // What the guest's kernel has by now came through the old one.
            guest.drain();
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
    let state = guest.end();
    outcome.bytes = state.bytes.load(Ordering::SeqCst);
    outcome.wrong = state.wrong.load(Ordering::SeqCst);
    if state.is_lost.load(Ordering::SeqCst) {
        outcome.failure.get_or_insert(LOST.into());
    }
    drop(sender);
    Ok(outcome)
}

fn serve(host: &mut Host, listener: &UnixListener, tap: &Tap) -> Result<Daemon> {
    let mut daemon = host.process()?;
    host.attach_nic(&mut daemon, listener, tap.file(), TAP)?;
    Ok(daemon)
}

/// The byte at a place of the stream.
fn byte_at(position: u64) -> u8 {
    (position / 8).to_le_bytes()[(position % 8) as usize]
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

const LOST: &str = "the connection was lost";

#[derive(Debug)]
struct State {
    bytes: AtomicU64,
    wrong: AtomicU64,
    gap_ns: AtomicU64,
    ended: AtomicBool,
    is_lost: AtomicBool,
    /// Times that the driver found its rings empty.
    idle_turns: AtomicU64,
    /// Has it look again.
    wake: EventFd,
}

impl State {
    fn new() -> io::Result<Self> {
        Ok(Self {
            bytes: AtomicU64::new(0),
            wrong: AtomicU64::new(0),
            gap_ns: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            is_lost: AtomicBool::new(false),
            idle_turns: AtomicU64::new(0),
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }
}

/// The guest's kernel, in a namespace of its own, and its NIC's driver.
struct Guest {
    state: Arc<State>,
    driver: JoinHandle<()>,
    receiver: JoinHandle<()>,
    _transport: Transport,
}

impl Guest {
    fn boot(socket: &Path) -> Result<Self> {
        let memory = Arc::new(Memory::new(4 << 20)?);
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
        let state = Arc::new(State::new()?);
        let (tap, receiver) = Self::start_kernel(&state)?;
        let driver = Driver {
            rings,
            memory,
            free: pages.into(),
            tap,
            state: Arc::clone(&state),
        };
        let driver = thread::Builder::new()
            .name("nic".to_owned())
            .spawn(move || driver.run())?;
        Ok(Self {
            state,
            driver,
            receiver,
            _transport: transport,
        })
    }

    /// A namespace lives as long as a thread is in it: the receiver's.
    fn start_kernel(state: &Arc<State>) -> Result<(Tap, JoinHandle<()>)> {
        let (taps, tap) = mpsc::sync_channel(1);
        let state = Arc::clone(state);
        let receive = move || {
            let made = unshare(CloneFlags::CLONE_NEWNET)
                .context("no network namespace for the guest")
                .and_then(|()| Tap::make(GUESTS_TAP, Framing::Bare, GUEST, Some(MAC)));
            let is_made = made.is_ok();
            if taps.send(made).is_ok() && is_made && take_stream(&state).is_err() {
                state.is_lost.store(true, Ordering::SeqCst);
            }
        };
        let thread = thread::Builder::new()
            .name("receiver".to_owned())
            .spawn(receive)?;
        Ok((tap.recv()??, thread))
    }

    /// Until the driver has seen its rings empty.
    fn drain(&self) {
        let turns = || self.state.idle_turns.load(Ordering::SeqCst);
        // The turn that is under way may have begun too early.
        for _ in 0..2 {
            let before = turns();
            let _ = self.state.wake.write(1);
            while turns() == before && !self.driver.is_finished() {
                thread::yield_now();
            }
        }
    }

    fn await_bytes(&self, bytes: u64) -> Result<()> {
        let state = &self.state;
        await_true(PATIENCE, || {
            state.bytes.load(Ordering::SeqCst) >= bytes || state.is_lost.load(Ordering::SeqCst)
        })
        .context("nothing arrives")?;
        ensure!(!state.is_lost.load(Ordering::SeqCst), LOST);
        Ok(())
    }

    fn end(self) -> Arc<State> {
        self.state.ended.store(true, Ordering::SeqCst);
        let _ = self.state.wake.write(1);
        for thread in [self.receiver, self.driver] {
            thread.join().expect("the guest's threads do not panic");
        }
        self.state
    }
}

/// Connects to the sender, takes its stream and compares it until told to end.
fn take_stream(state: &State) -> io::Result<()> {
    let sender = SocketAddrV4::new(HOST, PORT);
    let mut stream = TcpStream::connect_timeout(&sender.into(), PATIENCE)?;
    stream.set_read_timeout(Some(LOOK_INTERVAL))?;
    let mut part = vec![0; 64 << 10];
    let (mut position, mut last_progress) = (0, Instant::now());
    while !state.ended.load(Ordering::SeqCst) {
        let count = match stream.read(&mut part) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => count,
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => continue,
                _ => return Err(error),
            },
        };
        let gap_ns = last_progress.elapsed().as_nanos() as u64;
        last_progress = Instant::now();
        state.gap_ns.fetch_max(gap_ns, Ordering::SeqCst);
        let bytes = (position..).zip(&part[..count]);
        let wrong = bytes.filter(|(place, byte)| **byte != byte_at(*place));
        state
            .wrong
            .fetch_add(wrong.count() as u64, Ordering::SeqCst);
        position += count as u64;
        state.bytes.store(position, Ordering::SeqCst);
    }
    Ok(())
}

/// Carries frames between the rings and the guest's kernel.
struct Driver {
    rings: [FrameRing; 2],
    memory: Arc<Memory>,
    free: VecDeque<usize>,
    tap: Tap,
    state: Arc<State>,
}

impl Driver {
    fn run(mut self) {
        while self.free.len() > RING_DEPTH && self.rings[RX].has_room() {
            self.offer();
        }
        self.rings[RX].kick();
        while !self.state.ended.load(Ordering::SeqCst) {
            let moved = self.receive() + self.send();
            if moved == 0 {
                self.state.idle_turns.fetch_add(1, Ordering::SeqCst);
                self.sleep();
            }
        }
    }

    /// Gives the kernel the frames that are there.
    fn receive(&mut self) -> usize {
        let mut count = 0;
        let mut frame = [0; FRAME_BYTES];
        while count < RING_DEPTH
            && let Some((page, len_bytes)) = self.rings[RX].take_used(&self.memory)
        {
            count += 1;
            let len_bytes = len_bytes.clamp(HEADER_BYTES, FRAME_BYTES);
            let frame = &mut frame[..len_bytes];
            self.memory.read(page, frame);
            // What the kernel does not take is lost, as frames are.
            let _ = self.tap.file().write(&frame[HEADER_BYTES..]);
            self.free.push_back(page);
            self.offer();
        }
        if count > 0 {
            self.rings[RX].kick();
        }
        count
    }

    fn offer(&mut self) {
        let page = self.free.pop_front().expect("a page for each buffer");
        self.rings[RX].add(page, FRAME_BYTES, true, &self.memory);
    }

    /// Sends what the kernel has, as long as there is room for it.
    fn send(&mut self) -> usize {
        while let Some((page, _)) = self.rings[TX].take_used(&self.memory) {
            self.free.push_back(page);
        }
        let mut count = 0;
        let mut frame = [0; FRAME_BYTES];
        while self.can_send()
            && let Ok(len_bytes) = self.tap.file().read(&mut frame[HEADER_BYTES..])
        {
            count += 1;
            let page = self.free.pop_front().expect("there is one, as was seen");
            let with_header = &frame[..HEADER_BYTES + len_bytes];
            self.memory.write(page, with_header);
            self.rings[TX].add(page, with_header.len(), false, &self.memory);
        }
        if count > 0 {
            self.rings[TX].kick();
        }
        count
    }

    fn can_send(&self) -> bool {
        self.rings[TX].has_room() && !self.free.is_empty()
    }

    /// Until there is something to do, or it is time to look.
    fn sleep(&self) {
        let events = [&self.rings[RX].call, &self.rings[TX].call, &self.state.wake];
        // SAFETY: the descriptors are open while `self` lives, which is longer than the call.
        let fds = events.map(|event| unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) });
        let wants = match self.can_send() {
            true => PollFlags::POLLIN,
            false => PollFlags::empty(),
        };
        let mut polls = [
            PollFd::new(fds[0], PollFlags::POLLIN),
            PollFd::new(fds[1], PollFlags::POLLIN),
            PollFd::new(fds[2], PollFlags::POLLIN),
            PollFd::new(self.tap.file().as_fd(), wants),
        ];
        if poll(&mut polls, LOOK_INTERVAL.as_millis() as u8).is_ok() {
            for event in events {
                let _ = event.read();
            }
        }
    }
}
