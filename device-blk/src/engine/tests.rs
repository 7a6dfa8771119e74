//! The engine on a ring in this process: what ends a queue, and what it counts.

use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost_user::driver::{DriverRing, GuestMemory};
use vhost_user::ring::RingConfig;

mod allowed;
mod leaving;
mod patchwork;
mod quiescing;

use super::backend::ServeOptions;
use super::*;
use crate::image::{OpenOptions, RawImage};
use crate::stats::Snapshot;

const CAPACITY_SECTORS: u64 = 2048;
const SIZE: u16 = 64;
const HEADERS_GPA: u64 = 0x1_0000;
const STATUS_GPA: u64 = 0x2_0000;
const DATA_GPA: u64 = 0x10_0000;
const LEN_BYTES: u32 = 16 << 10;
const NO_STATUS: u8 = 0xff;

struct Rig {
    memory: Arc<GuestMemory>,
    driver: DriverRing,
    ring: Ring,
    queue: BlkQueue,
    stats: Arc<QueueStats>,
    _file: tempfile::NamedTempFile,
}

fn rig(cache: CacheMode) -> Rig {
    rig_with(cache, false)
}

fn rig_with(cache: CacheMode, page_cache: bool) -> Rig {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(CAPACITY_SECTORS * 512).unwrap();
    let options = OpenOptions {
        read_only: false,
        page_cache,
        block_bytes: 512,
        lock_patience: Duration::ZERO,
    };
    let image = RawImage::from_file(file.reopen().unwrap(), "test".into(), options).unwrap();
    let backend = Backend::new(Arc::new(image), ServeOptions::default());
    rig_of(Arc::new(backend), cache, file)
}

fn rig_of(backend: Arc<Backend>, cache: CacheMode, file: tempfile::NamedTempFile) -> Rig {
    let memory = Arc::new(GuestMemory::new(4 << 20).unwrap());
    let driver = DriverRing::new(&memory, 0, SIZE, 0);
    let ring = Ring::start(RingConfig {
        index: 0,
        size: SIZE,
        features: 0,
        addresses: driver.addresses(),
        memory: memory.table().unwrap(),
        next_avail: 0,
        inflight: None,
        call: None,
    })
    .unwrap();
    let stats = Arc::<QueueStats>::default();
    let queue = BlkQueue::new(backend, cache, Arc::clone(&stats)).unwrap();
    Rig {
        memory,
        driver,
        ring,
        queue,
        stats,
        _file: file,
    }
}

impl Rig {
    /// Makes write number `slot` available: its own data to its own place.
    fn offer_write(&mut self, slot: u64, byte: u8) {
        let mut header = [0; HEADER_BYTES];
        header[0] = 1;
        header[8..].copy_from_slice(&(slot * u64::from(LEN_BYTES) / 512).to_le_bytes());
        let header_gpa = HEADERS_GPA + slot * 16;
        let data_gpa = DATA_GPA + slot * u64::from(LEN_BYTES);
        self.memory.write(header_gpa, &header);
        self.memory.write(data_gpa, &vec![byte; LEN_BYTES as usize]);
        self.memory.write(STATUS_GPA + slot, &[NO_STATUS]);
        let readable = [(header_gpa, 16), (data_gpa, LEN_BYTES)];
        self.driver
            .add(&readable, &[(STATUS_GPA + slot, 1)])
            .unwrap();
    }

    /// A request of `kind` with `payload` for the device.
    fn offer(&mut self, slot: u64, kind: u8, payload: &[u8]) {
        self.offer_at(slot, kind, 0, payload);
    }

    fn offer_at(&mut self, slot: u64, kind: u8, sector: u64, payload: &[u8]) {
        let mut header = [0; HEADER_BYTES];
        header[0] = kind;
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let header_gpa = HEADERS_GPA + slot * 16;
        let data_gpa = DATA_GPA + slot * u64::from(LEN_BYTES);
        self.memory.write(header_gpa, &header);
        self.memory.write(data_gpa, payload);
        self.memory.write(STATUS_GPA + slot, &[NO_STATUS]);
        let mut readable = vec![(header_gpa, 16)];
        if !payload.is_empty() {
            readable.push((data_gpa, payload.len() as u32));
        }
        self.driver
            .add(&readable, &[(STATUS_GPA + slot, 1)])
            .unwrap();
    }

    fn offer_read(&mut self, slot: u64, sector: u64, len_bytes: u32) {
        let mut header = [0; HEADER_BYTES];
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let header_gpa = HEADERS_GPA + slot * 16;
        let data_gpa = DATA_GPA + slot * u64::from(LEN_BYTES);
        self.memory.write(header_gpa, &header);
        self.memory
            .write(data_gpa, &vec![NO_STATUS; len_bytes as usize]);
        self.memory.write(STATUS_GPA + slot, &[NO_STATUS]);
        let writable = [(data_gpa, len_bytes), (STATUS_GPA + slot, 1)];
        self.driver.add(&[(header_gpa, 16)], &writable).unwrap();
    }

    /// What was read into a slot.
    fn data(&self, slot: u64, len_bytes: usize) -> Vec<u8> {
        let data_gpa = DATA_GPA + slot * u64::from(LEN_BYTES);
        self.memory.read(data_gpa, len_bytes)
    }

    /// Works like the ring's thread until the driver has all its requests back.
    fn complete_all(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.driver.used_idx() != self.driver.avail_idx() {
            assert!(Instant::now() < deadline, "requests stay unanswered");
            self.queue.process(&mut self.ring, Wake::Event(0)).unwrap();
            self.ring.publish();
            if !self.queue.prepare_sleep() {
                let fds = self.queue.event_fds();
                let mut polls = [PollFd::new(fds[0], PollFlags::POLLIN)];
                poll(&mut polls, PollTimeout::from(100u8)).unwrap();
            }
        }
        while self.driver.pop_used().is_some() {}
    }

    fn backing(&mut self) -> Backing<'_> {
        Backing {
            served: &self.queue.served,
            write_through: false,
            bounce: &mut self.queue.bounce,
            zero_range_works: &mut self.queue.zero_range_works,
            nowait: &mut self.queue.nowait,
        }
    }

    fn status(&self, slot: u64) -> u8 {
        self.memory.read(STATUS_GPA + slot, 1)[0]
    }

    fn image_bytes(&self, slot: u64) -> Vec<u8> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; LEN_BYTES as usize];
        let file = std::fs::File::open(self._file.path()).unwrap();
        file.read_exact_at(&mut bytes, slot * u64::from(LEN_BYTES))
            .unwrap();
        bytes
    }
}

#[test]
fn drain_completes_what_is_in_flight() {
    let mut rig = rig(CacheMode::WriteBack);
    for slot in 0..16 {
        rig.offer_write(slot, slot as u8 + 1);
    }
    rig.queue.process(&mut rig.ring, Wake::Kick).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    assert_eq!(rig.queue.drain(&mut rig.ring, deadline), 0);
    rig.ring.publish();
    for slot in 0..16 {
        assert_eq!(rig.status(slot), 0, "write {slot}");
        assert!(
            rig.image_bytes(slot)
                .iter()
                .all(|&byte| byte == slot as u8 + 1)
        );
        assert!(rig.driver.pop_used().is_some());
    }
    let total = Snapshot::of([&*rig.stats]);
    assert_eq!(total.op(OpKind::Write).requests, 16);
    assert_eq!(total.op(OpKind::Write).bytes, 16 * u64::from(LEN_BYTES));
    assert_eq!((total.inflight, total.errors()), (0, 0));
}

#[test]
fn dropped_queue_leaves_nothing_running_and_answers_nothing() {
    let mut rig = rig(CacheMode::WriteBack);
    for slot in 0..16 {
        rig.offer_write(slot, 7);
    }
    // Taken off the ring and submitted, never reaped.
    rig.queue.accept(&mut rig.ring).unwrap();
    rig.queue.uring.submit();
    assert_eq!(Snapshot::of([&*rig.stats]).inflight, 16);
    let Rig { queue, stats, .. } = &mut rig;
    let backend = Arc::clone(&queue.backend);
    let fresh = BlkQueue::new(backend, CacheMode::WriteBack, Arc::clone(stats)).unwrap();
    drop(std::mem::replace(queue, fresh));
    assert!(!queue.backend.has_ghosts());
    assert_eq!(Snapshot::of([&*rig.stats]).inflight, 0);
    assert_eq!(rig.ring.in_flight(), 16, "the next session gets them again");
    for slot in 0..16 {
        assert_eq!(rig.status(slot), NO_STATUS);
    }
}

#[test]
fn write_through_reaches_the_image_in_every_mode() {
    let toggled = Arc::new(AtomicBool::new(false));
    for cache in [
        CacheMode::WriteThrough,
        CacheMode::Toggled(Arc::clone(&toggled)),
    ] {
        assert!(cache.is_write_through());
        let mut rig = rig(cache);
        rig.offer_write(3, 9);
        rig.queue.process(&mut rig.ring, Wake::Kick).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        assert_eq!(rig.queue.drain(&mut rig.ring, deadline), 0);
        assert_eq!(rig.status(3), 0);
        assert!(rig.image_bytes(3).iter().all(|&byte| byte == 9));
    }
    toggled.store(true, Ordering::Release);
    assert!(!CacheMode::Toggled(toggled).is_write_through());
}

#[test]
fn flush_that_failed_is_never_followed_by_one_that_succeeds() {
    let mut rig = rig_with(CacheMode::WriteBack, true);
    rig.offer(0, 4, &[]);
    let chain = rig.ring.pop().unwrap().unwrap();
    let mut flush = Job::flush(chain);
    let mut iovecs = Vec::new();
    let mut backing = rig.backing();
    assert!(matches!(
        flush.next(&mut backing, &mut iovecs),
        Next::Submit(_)
    ));
    assert_eq!(
        flush.completed(-libc::ENOSPC, &mut backing),
        Err(libc::ENOSPC)
    );
    rig.ring.complete(flush.chain, 1);
    // The kernel reports a lost page once only.
    rig.offer(1, 4, &[]);
    rig.queue.process(&mut rig.ring, Wake::Kick).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    assert_eq!(rig.queue.drain(&mut rig.ring, deadline), 0);
    assert_eq!(rig.status(1), Status::IoErr as u8);
}

/// As block devices with blocks of 4 KiB answer to other ranges.
#[test]
fn range_that_the_storage_cannot_take_is_written_or_left_alone() {
    for (kind, op) in [(11, RangeOp::Discard), (13, RangeOp::WriteZeroes)] {
        let mut rig = rig(CacheMode::WriteBack);
        rig.offer(0, kind, &[0; RANGE_BYTES]);
        let chain = rig.ring.pop().unwrap().unwrap();
        let range = ByteRange {
            offset_bytes: 512,
            len_bytes: 512,
            unmap: op == RangeOp::Discard,
        };
        let mut job = Job::ranges(chain, op, vec![range]);
        let mut iovecs = Vec::new();
        let mut backing = rig.backing();
        assert!(matches!(
            job.next(&mut backing, &mut iovecs),
            Next::Submit(_)
        ));
        assert_eq!(job.completed(-libc::EINVAL, &mut backing), Ok(()));
        match (op, job.next(&mut backing, &mut iovecs)) {
            (RangeOp::Discard, Next::Done(Status::Ok)) => {}
            (RangeOp::WriteZeroes, Next::Submit(_)) => {
                let bytes: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
                assert_eq!(bytes, 512);
            }
            _ => panic!("{op:?} ends otherwise"),
        }
        assert!(rig.queue.zero_range_works, "other ranges may do");
        rig.ring.complete(job.chain, 1);
    }
}
