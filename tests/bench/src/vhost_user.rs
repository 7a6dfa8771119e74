//! The load on disks that vhost-user daemons serve, through the third-party block driver of the
//! crate `virtio-driver`: one thread drives all disks, one queue each.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use virtio_driver::{
    QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue,
    VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};

use crate::buffer::Buffer;
use crate::load::{Load, Offsets, Outcome};
use crate::meter::{Meter, Pid};

/// A request that takes longer means that the daemon hangs.
const STALL: Duration = Duration::from_secs(10);
/// What a daemon that missed a notification gets after another one.
const SECOND_CHANCE: Duration = Duration::from_secs(1);
/// Header, data, status: the driver uses no indirect descriptors.
const DESCRIPTORS_PER_REQUEST: usize = 3;
/// What daemons are most used to.
const QUEUE_SIZE_MIN: u16 = 128;
/// Looks at the rings between two looks at the clock.
const LOOKS: u32 = 64;

/// What the driver does while it waits for completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Wait {
    /// Looks at the ring without pause; takes no interrupts.
    Busy,
    /// Sleeps until the daemon writes the call eventfd, as a guest without work does.
    Sleep,
}

/// Why a run through a daemon failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nobody listens there, or who does lacks what the driver needs.
    #[error("cannot use the vhost-user disk at {0}")]
    Connect(String, #[source] io::Error),
    /// Not one request fits.
    #[error("the disk at {0} is smaller than one block; give it a larger image")]
    TooSmall(String),
    /// More in flight than a ring holds.
    #[error("{0} requests in flight do not fit a ring of 1024 descriptors; use at most 341")]
    TooDeep(usize),
    /// The daemon answered with an error.
    #[error("a request at {offset_bytes} failed")]
    Request {
        /// Its place on the disk.
        offset_bytes: u64,
        /// What the status means.
        #[source]
        source: io::Error,
    },
    /// Neither success nor failure.
    #[error("no request completed within {} s", STALL.as_secs())]
    Stalled,
    /// The same on one disk of many.
    #[error(
        "{count} requests at {socket} did not complete within {} s, nor when the daemon was \
         notified once more",
        STALL.as_secs()
    )]
    Stuck {
        /// Where its daemon listens.
        socket: String,
        /// Requests that waited.
        count: usize,
    },
    /// The daemon slept over requests.
    #[error(
        "{count} requests at {socket} completed only when the daemon was notified once more: it \
         missed a notification"
    )]
    MissedNotification {
        /// Where it listens.
        socket: String,
        /// Requests that waited.
        count: usize,
    },
    /// The driver or this system refused.
    #[error("cannot go on")]
    System(#[from] io::Error),
}

/// Puts `load` on each of the disks at once, `load.depth` requests on each, and adds up.
///
/// # Errors
/// When a daemon cannot be used, or a request fails.
pub fn run(
    sockets: &[PathBuf],
    wait: Wait,
    daemons: &[Pid],
    load: &Load,
) -> Result<Outcome, Error> {
    let mut driver = Driver::connect(sockets, wait, load)?;
    let outcome = driver.count(daemons, load)?;
    driver.drain()?;
    Ok(outcome)
}

/// Keeps idle connections to the disks, each after `load.depth` requests, until `until` says so.
///
/// # Errors
/// When a daemon cannot be used, or a request fails.
pub fn hold(sockets: &[PathBuf], load: &Load, until: impl FnOnce()) -> Result<(), Error> {
    let mut driver = Driver::connect(sockets, Wait::Sleep, load)?;
    for disk in &mut driver.disks {
        disk.fill()?;
    }
    driver.drain()?;
    until();
    Ok(())
}

struct Driver {
    disks: Vec<Disk>,
    wait: Wait,
    signals: Epoll,
    events: Vec<EpollEvent>,
    last_completion: Instant,
}

struct Disk {
    socket: PathBuf,
    queue: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    offsets: Offsets,
    /// Offset of each slot's request.
    slots: Vec<u64>,
    writes: bool,
    inflight: usize,
    completed: u64,
    /// The queue's memory is the transport's: declared, and so dropped, after the queue.
    _transport: Box<VirtioBlkTransport>,
    /// Mapped by the daemon, so last of all.
    buffer: Buffer,
}

impl Driver {
    fn connect(sockets: &[PathBuf], wait: Wait, load: &Load) -> Result<Self, Error> {
        let signals = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(io::Error::from)?;
        let mut disks = Vec::with_capacity(sockets.len());
        for (index, socket) in sockets.iter().enumerate() {
            disks.push(Disk::connect(socket, index, wait, load, &signals)?);
        }
        Ok(Self {
            events: vec![EpollEvent::empty(); disks.len()],
            disks,
            wait,
            signals,
            last_completion: Instant::now(),
        })
    }

    fn count(&mut self, daemons: &[Pid], load: &Load) -> Result<Outcome, Error> {
        for disk in &mut self.disks {
            disk.fill()?;
        }
        let mut meter = Meter::start(load, daemons);
        self.last_completion = Instant::now();
        loop {
            match self.wait {
                Wait::Busy => self.look_around()?,
                Wait::Sleep => {
                    let deadline = meter.next_deadline();
                    self.sleep(deadline)?;
                }
            }
            let completed = self.disks.iter().map(|disk| disk.completed).sum();
            if let Some(outcome) = meter.check(completed)? {
                return Ok(outcome);
            }
        }
    }

    /// Some turns over all disks.
    fn look_around(&mut self) -> Result<(), Error> {
        let mut reaped = 0;
        for _ in 0..LOOKS {
            for disk in &mut self.disks {
                reaped += disk.turn()?;
            }
        }
        self.note(reaped)
    }

    /// Sleeps until a disk signals or `deadline` comes; a turn over the disks that did.
    fn sleep(&mut self, deadline: Instant) -> Result<(), Error> {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up: else the last millisecond would be spent looking.
        let left_ms = u16::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        let count = match self
            .signals
            .wait(&mut self.events, EpollTimeout::from(left_ms))
        {
            Err(nix::errno::Errno::EINTR) => 0,
            outcome => outcome.map_err(io::Error::from)?,
        };
        let mut reaped = 0;
        for event in &self.events[..count] {
            let index = usize::try_from(event.data()).unwrap_or(usize::MAX);
            let disk = &mut self.disks[index];
            // The signal is edge-triggered, so a turn must leave nothing behind.
            loop {
                let count = disk.turn()?;
                reaped += count;
                if count < disk.slots.len() {
                    break;
                }
            }
        }
        self.note(reaped)
    }

    fn note(&mut self, reaped: usize) -> Result<(), Error> {
        if reaped > 0 {
            self.last_completion = Instant::now();
        } else if self.last_completion.elapsed() > STALL {
            return Err(Error::Stalled);
        }
        Ok(())
    }

    /// Waits until nothing is in flight.
    fn drain(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + STALL;
        for disk in &mut self.disks {
            if disk.drain_until(deadline)? {
                continue;
            }
            let count = disk.inflight;
            let socket = disk.socket.display().to_string();
            disk.notifier.notify()?;
            return Err(if disk.drain_until(Instant::now() + SECOND_CHANCE)? {
                Error::MissedNotification { socket, count }
            } else {
                Error::Stuck { socket, count }
            });
        }
        Ok(())
    }
}

impl Disk {
    fn connect(
        socket: &Path,
        index: usize,
        wait: Wait,
        load: &Load,
        signals: &Epoll,
    ) -> Result<Self, Error> {
        let refused = |error| Error::Connect(socket.display().to_string(), error);
        let queue_size = queue_size(load.depth)?;
        let name = socket
            .to_str()
            .ok_or_else(|| refused(io::ErrorKind::InvalidFilename.into()))?;
        let transport = VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(name, features())
            .map_err(refused)?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let mut queue = VirtioBlkQueue::setup_queues(&mut *transport, 1, queue_size)
            .map_err(refused)?
            .pop()
            .ok_or_else(|| refused(io::ErrorKind::NotFound.into()))?;
        queue.set_used_notif_enabled(wait == Wait::Sleep);
        let buffer = Buffer::new(load.depth, load.block_bytes)?;
        transport
            .map_mem_region(buffer.address(), buffer.len_bytes(), buffer.fd(), 0)
            .map_err(refused)?;
        let signal = transport.get_completion_fd(0);
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        signals
            .add(&*signal, EpollEvent::new(flags, index as u64))
            .map_err(io::Error::from)?;
        let sectors = u64::from(transport.get_config().map_err(refused)?.capacity);
        let capacity_bytes = sectors.saturating_mul(512);
        if capacity_bytes < load.block_bytes as u64 {
            return Err(Error::TooSmall(socket.display().to_string()));
        }
        Ok(Self {
            socket: socket.to_owned(),
            queue,
            notifier: transport.get_submission_notifier(0),
            offsets: Offsets::new(load, capacity_bytes, index as u64 + 1),
            slots: vec![0; load.depth],
            writes: load.pattern.writes(),
            inflight: 0,
            completed: 0,
            _transport: transport,
            buffer,
        })
    }

    /// Brings as many requests into flight as there are slots.
    fn fill(&mut self) -> Result<(), Error> {
        for slot in 0..self.slots.len() {
            self.submit(slot)?;
        }
        self.kick()
    }

    /// Replaces requests that have completed, at most all; how many.
    fn turn(&mut self) -> Result<usize, Error> {
        let mut count = 0;
        while count < self.slots.len() {
            let Some(slot) = self.reap()? else { break };
            self.submit(slot)?;
            count += 1;
        }
        if count > 0 {
            self.kick()?;
        }
        Ok(count)
    }

    /// Whether all that was in flight has completed.
    fn drain_until(&mut self, deadline: Instant) -> Result<bool, Error> {
        while self.inflight > 0 {
            if self.reap()?.is_some() {
                continue;
            }
            if Instant::now() > deadline {
                return Ok(false);
            }
            std::thread::yield_now();
        }
        Ok(true)
    }

    fn submit(&mut self, slot: usize) -> Result<(), Error> {
        let offset = self.offsets.next_offset();
        let (start, len) = (self.buffer.slot(slot), self.buffer.slot_bytes());
        self.slots[slot] = offset;
        // SAFETY: the slot is inside the buffer, which lives until this disk is dropped, and no
        // other request in flight uses it.
        unsafe {
            if self.writes {
                self.queue.write_raw(offset, start, len, slot)?;
            } else {
                self.queue.read_raw(offset, start, len, slot)?;
            }
        }
        self.inflight += 1;
        Ok(())
    }

    /// The slot of a request that has completed.
    fn reap(&mut self) -> Result<Option<usize>, Error> {
        let Some(done) = self.queue.completions().next() else {
            return Ok(None);
        };
        self.inflight -= 1;
        if done.ret != 0 {
            return Err(Error::Request {
                offset_bytes: self.slots[done.context],
                source: io::Error::from_raw_os_error(-done.ret),
            });
        }
        self.completed += 1;
        Ok(Some(done.context))
    }

    fn kick(&mut self) -> Result<(), Error> {
        if self.queue.avail_notif_needed() {
            self.notifier.notify()?;
        }
        Ok(())
    }
}

fn features() -> u64 {
    VirtioFeatureFlags::VERSION_1.bits()
        | VirtioFeatureFlags::RING_EVENT_IDX.bits()
        | VirtioBlkFeatureFlags::FLUSH.bits()
}

fn queue_size(depth: usize) -> Result<u16, Error> {
    let descriptors = depth.saturating_mul(DESCRIPTORS_PER_REQUEST);
    match u16::try_from(descriptors) {
        Ok(count) if count <= 1024 => Ok(count.next_power_of_two().max(QUEUE_SIZE_MIN)),
        _ => Err(Error::TooDeep(depth)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_hold_what_is_in_flight() {
        assert_eq!(queue_size(1).unwrap(), 128);
        assert_eq!(queue_size(32).unwrap(), 128);
        assert_eq!(queue_size(128).unwrap(), 512);
        assert_eq!(queue_size(341).unwrap(), 1024);
        assert!(matches!(queue_size(342), Err(Error::TooDeep(342))));
        assert!(matches!(queue_size(usize::MAX), Err(Error::TooDeep(_))));
    }

    #[test]
    fn a_socket_without_listener_is_named() {
        let load = Load {
            pattern: crate::load::Pattern::Randread,
            block_bytes: 4096,
            depth: 1,
            warm_up: Duration::ZERO,
            duration: Duration::from_millis(1),
        };
        let error = run(&["/nonexistent/s".into()], Wait::Busy, &[], &load).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/s"), "{error}");
    }
}
