//! Jobs on a disk that is written meanwhile: mirror, backup, resize.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use api::device::{
    CancelJobRequest, CompleteJobRequest, CreateBitmapRequest, FdRef, GetImageRequest,
    GetJobRequest, Job, JobState, ListBitmapsRequest, ListJobsRequest, ResizeRequest,
    StartBackupRequest, StartMirrorRequest, Target,
};
use tonic::{Code, Status};

use crate::control::Manager;
use crate::daemon::{Daemon, Place, await_some, await_true, read_image};
use crate::driver::Client;

/// Unit in which the writer writes.
pub(crate) const BLOCK: usize = 4096;

/// A guest that writes blocks one after the other, each with the number of its write, and
/// remembers them.
pub(crate) struct Writer {
    stop: Arc<AtomicBool>,
    /// Writes that were answered.
    answered: Arc<AtomicU64>,
    thread: JoinHandle<Vec<u64>>,
}

impl Writer {
    /// Writes to `blocks` blocks from the first on, until it is stopped.
    pub(crate) fn start(socket: &Path, blocks: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let (stopped, count, socket) = (stop.clone(), answered.clone(), socket.to_owned());
        let thread = thread::spawn(move || {
            let mut client = Client::connect(&socket);
            let mut log = Vec::new();
            let mut random = 0x9e37_79b9_7f4a_7c15_u64;
            while !stopped.load(Ordering::Relaxed) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let block = random % blocks;
                log.push(block);
                let data = stamped(log.len() as u64);
                assert_eq!(client.write(block * BLOCK as u64, &data), 0);
                count.store(log.len() as u64, Ordering::Release);
            }
            assert_eq!(client.flush(), 0);
            log
        });
        Self {
            stop,
            answered,
            thread,
        }
    }

    pub(crate) fn answered(&self) -> u64 {
        self.answered.load(Ordering::Acquire)
    }

    /// Waits until it has written more.
    pub(crate) fn await_more(&self, writes: u64) {
        let from = self.answered();
        await_true("the guest goes on", || self.answered() >= from + writes);
    }

    /// The blocks it wrote, in order.
    pub(crate) fn stop(self) -> Vec<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// See [`state_after`].
pub(crate) fn assert_is_final(image: &[u8], log: &[u64]) {
    assert_state(image, log, log.len() as u64);
}

/// Asserts that `image` is what some first writes left, and returns how many.
pub(crate) fn assert_is_an_instant(image: &[u8], log: &[u64]) -> u64 {
    let writes = last_write(image);
    assert_state(image, log, writes);
    writes
}

/// A block as write number `number` leaves it; 0 for never.
fn stamped(number: u64) -> [u8; BLOCK] {
    let mut block = [number as u8; BLOCK];
    block[..8].copy_from_slice(&number.to_le_bytes());
    block
}

/// Writes to each block after the first `writes` of them.
fn state_after(log: &[u64], writes: u64) -> BTreeMap<u64, u64> {
    let numbered = log[..writes as usize].iter().zip(1..);
    numbered.map(|(&block, number)| (block, number)).collect()
}

/// Asserts that `image` is what the first `writes` writes made of an empty disk.
fn assert_state(image: &[u8], log: &[u64], writes: u64) {
    let state = state_after(log, writes);
    for (block, data) in image.chunks_exact(BLOCK).enumerate() {
        let number = state.get(&(block as u64)).copied().unwrap_or(0);
        assert!(
            data == stamped(number),
            "block {block} has write {} instead of {number} after {writes}",
            u64::from_le_bytes(data[..8].try_into().unwrap())
        );
    }
}

/// The last write that is in `image`.
fn last_write(image: &[u8]) -> u64 {
    let numbers = image
        .chunks_exact(BLOCK)
        .map(|data| u64::from_le_bytes(data[..8].try_into().unwrap()));
    numbers.max().unwrap()
}

/// Size of the disks here: some rounds of a mirror.
pub(crate) const DISK_BYTES: u64 = 24 << 20;
pub(crate) const DISK_BLOCKS: u64 = DISK_BYTES / BLOCK as u64;

/// A daemon with an empty disk `a`, and its manager.
pub(crate) fn disk() -> (Daemon, Manager) {
    let place = Place::new();
    let image = File::create(place.path("a.img")).unwrap();
    image.set_len(DISK_BYTES).unwrap();
    let fds = place.fds().display().to_string();
    let daemon = Daemon::start_with(&place, &[&place.disk("a")], &["--fd-socket", &fds]);
    (daemon, Manager::of(place))
}

/// Sends a target, made when it is not there.
pub(crate) fn target(manager: &Manager, name: &str, format: &str) -> Target {
    let path = manager.place.path(name);
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap();
    manager.send(name.split('.').next().unwrap(), file.as_fd());
    Target {
        image_fd: Some(FdRef {
            token: name.split('.').next().unwrap().to_owned(),
        }),
        format: format.into(),
        name: name.into(),
        ..Target::default()
    }
}

pub(crate) fn job(manager: &mut Manager, job_id: &str) -> Result<Job, Status> {
    let request = GetJobRequest {
        id: "a".into(),
        job_id: job_id.into(),
    };
    manager.disks(async |disks| disks.get_job(request).await)
}

/// Waits until the job is in `state`; fails when it ends otherwise.
pub(crate) fn await_job(manager: &mut Manager, job_id: &str, state: JobState) -> Job {
    await_some("the job gets there", || {
        let job = job(manager, job_id).unwrap();
        let is_over = matches!(
            job.state(),
            JobState::Done | JobState::Failed | JobState::Cancelled
        );
        assert!(!is_over || job.state() == state, "{job:?}");
        (job.state() == state).then_some(job)
    })
}

pub(crate) fn mirror(
    manager: &mut Manager,
    job_id: &str,
    target: Target,
    slow: bool,
) -> Result<Job, Status> {
    let request = StartMirrorRequest {
        id: "a".into(),
        job_id: job_id.into(),
        target: Some(target),
        auto_complete: false,
        bytes_per_second: if slow { 1 << 20 } else { 0 },
    };
    manager.disks(async |disks| disks.start_mirror(request).await)
}

/// Lets a mirror that was ready switch over. A guest that writes fast makes it unready again.
pub(crate) fn complete(manager: &mut Manager, job_id: &str) {
    await_true("the mirror can be completed", || {
        let request = CompleteJobRequest {
            id: "a".into(),
            job_id: job_id.into(),
        };
        match manager.disks(async |disks| disks.complete_job(request).await) {
            Ok(_) => true,
            Err(error) if error.message().contains("RUNNING") => false,
            Err(error) => panic!("{error}"),
        }
    });
    await_job(manager, job_id, JobState::Done);
}

pub(crate) fn cancel(manager: &mut Manager, job_id: &str) -> Result<Job, Status> {
    let request = CancelJobRequest {
        id: "a".into(),
        job_id: job_id.into(),
    };
    manager.disks(async |disks| disks.cancel_job(request).await)
}

pub(crate) fn backup(
    manager: &mut Manager,
    job_id: &str,
    target: Target,
    bitmap: &str,
    new_bitmap: &str,
) -> Result<Job, Status> {
    let request = StartBackupRequest {
        id: "a".into(),
        job_id: job_id.into(),
        target: Some(target),
        bitmap: bitmap.into(),
        new_bitmap: new_bitmap.into(),
        bytes_per_second: 0,
    };
    manager.disks(async |disks| disks.start_backup(request).await)
}

pub(crate) fn image_of(path: &Path) -> Vec<u8> {
    read_image(path, 0, DISK_BYTES as usize)
}

#[test]
fn mirror_under_load_switches_over_without_losing_a_write() {
    let (mut daemon, mut manager) = disk();
    let writer = Writer::start(&manager.place.socket("a"), DISK_BLOCKS);
    writer.await_more(500);
    let to = target(&manager, "copy.img", "raw");
    mirror(&mut manager, "m", to, false).unwrap();
    let ready = await_job(&mut manager, "m", JobState::Ready);
    assert!(ready.done_bytes >= DISK_BYTES, "{ready:?}");
    complete(&mut manager, "m");
    let source = image_of(&manager.place.path("a.img"));
    let switched_before = writer.answered();
    writer.await_more(500);
    let log = writer.stop();
    assert_state(
        &image_of(&manager.place.path("copy.img")),
        &log,
        log.len() as u64,
    );
    let unchanged = image_of(&manager.place.path("a.img"));
    assert!(source == unchanged, "the source is let go of");
    let last = last_write(&unchanged);
    assert!(last <= switched_before);
    assert_state(&unchanged, &log, last);
    let image =
        manager.disks(async |disks| disks.get_image(GetImageRequest { id: "a".into() }).await);
    assert_eq!(image.unwrap().name, "copy.img");
    daemon.assert_alive();
}

#[test]
fn cancelled_mirror_leaves_the_disk_where_it_was() {
    let (mut daemon, mut manager) = disk();
    let writer = Writer::start(&manager.place.socket("a"), DISK_BLOCKS);
    let to = target(&manager, "copy.img", "raw");
    let started = mirror(&mut manager, "m", to, true).unwrap();
    assert_eq!(
        (started.kind.as_str(), started.id.as_str()),
        ("mirror", "a")
    );
    writer.await_more(200);
    let early = CompleteJobRequest {
        id: "a".into(),
        job_id: "m".into(),
    };
    let error = manager
        .disks(async |disks| disks.complete_job(early).await)
        .unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    let other = target(&manager, "other.img", "raw");
    let error = mirror(&mut manager, "n", other, false).unwrap_err();
    assert_eq!(
        error.code(),
        Code::FailedPrecondition,
        "one at a time: {error}"
    );
    assert_eq!(
        cancel(&mut manager, "m").unwrap().state(),
        JobState::Cancelled
    );
    let listed = manager
        .disks(async |disks| disks.list_jobs(ListJobsRequest::default()).await)
        .unwrap();
    assert_eq!(listed.jobs.len(), 1);
    cancel(&mut manager, "m").unwrap();
    assert_eq!(job(&mut manager, "m").unwrap_err().code(), Code::NotFound);
    writer.await_more(100);
    let log = writer.stop();
    assert_state(
        &image_of(&manager.place.path("a.img")),
        &log,
        log.len() as u64,
    );
    daemon.assert_alive();
}

#[test]
fn mirror_onto_the_disk_itself_is_refused_and_harms_nothing() {
    let (mut daemon, mut manager) = disk();
    let mut client = Client::connect(&manager.place.socket("a"));
    assert_eq!(client.write(8192, &[7; BLOCK]), 0);
    let itself = target(&manager, "a.img", "raw");
    let error = mirror(&mut manager, "m", itself, false).unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert_eq!(client.read(8192, BLOCK), [7; BLOCK]);
    assert_eq!(
        image_of(&manager.place.path("a.img")).len() as u64,
        DISK_BYTES
    );
    daemon.assert_alive();
}

#[test]
fn backup_under_load_is_the_disk_of_one_instant_and_increments_restore_exactly() {
    let (mut daemon, mut manager) = disk();
    let writer = Writer::start(&manager.place.socket("a"), DISK_BLOCKS / 4);
    writer.await_more(1000);
    let to = target(&manager, "full.img", "raw");
    let before = writer.answered();
    backup(&mut manager, "full", to, "", "since").unwrap();
    let after = writer.answered();
    writer.await_more(200);
    await_job(&mut manager, "full", JobState::Done);
    let full = image_of(&manager.place.path("full.img"));

    // The increment is laid over a copy of the full backup.
    std::fs::copy(
        manager.place.path("full.img"),
        manager.place.path("restored.img"),
    )
    .unwrap();
    writer.await_more(300);
    let to = target(&manager, "restored.img", "raw");
    let before_second = writer.answered();
    let second = backup(&mut manager, "second", to, "since", "").unwrap();
    let after_second = writer.answered();
    assert!(second.total_bytes < DISK_BYTES, "{second:?}");
    let done = await_job(&mut manager, "second", JobState::Done);
    assert_eq!(done.done_bytes, done.total_bytes);
    let restored = image_of(&manager.place.path("restored.img"));
    writer.await_more(100);
    let log = writer.stop();

    for (image, least, most) in [
        (&full, before, after + 1),
        (&restored, before_second, after_second + 1),
    ] {
        let instant = last_write(image);
        assert!(
            least <= instant + 1 && instant <= most,
            "instant after write {instant}, not {least} to {most}"
        );
        assert_state(image, &log, instant);
    }
    assert_state(
        &image_of(&manager.place.path("a.img")),
        &log,
        log.len() as u64,
    );
    daemon.assert_alive();
}

#[test]
fn failed_backup_gives_the_bitmap_back_and_the_disk_serves_on() {
    let (mut daemon, mut manager) = disk();
    let mut client = Client::connect(&manager.place.socket("a"));
    let create = CreateBitmapRequest {
        id: "a".into(),
        bitmap: "b".into(),
        granularity_bytes: 0,
    };
    manager
        .disks(async |disks| disks.create_bitmap(create).await)
        .unwrap();
    // More than the job copies at once, however slow it is told to be.
    for block in 0..24 {
        assert_eq!(client.write(block * 2 * 65536, &[1; BLOCK]), 0);
    }
    let dirty = |manager: &mut Manager| {
        let request = ListBitmapsRequest { id: "a".into() };
        let listed = manager
            .disks(async |disks| disks.list_bitmaps(request).await)
            .unwrap();
        listed.bitmaps[0].dirty_bytes
    };
    assert_eq!(dirty(&mut manager), 24 * 65536);
    let unknown = target(&manager, "x.img", "raw");
    let error = backup(&mut manager, "x", unknown, "none", "").unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");

    // So slow that it can be cancelled.
    let to = target(&manager, "inc.img", "raw");
    let request = StartBackupRequest {
        id: "a".into(),
        job_id: "inc".into(),
        target: Some(to),
        bitmap: "b".into(),
        new_bitmap: String::new(),
        bytes_per_second: 1,
    };
    manager
        .disks(async |disks| disks.start_backup(request).await)
        .unwrap();
    assert_eq!(client.write(121 * 65536, &[2; BLOCK]), 0);
    assert_eq!(client.write(40 * 65536, &[2; BLOCK]), 0);
    assert_eq!(
        cancel(&mut manager, "inc").unwrap().state(),
        JobState::Cancelled
    );
    assert_eq!(
        dirty(&mut manager),
        25 * 65536,
        "what it had, and what came"
    );
    assert_eq!(client.read(40 * 65536, BLOCK), [2; BLOCK]);
    daemon.assert_alive();
}

#[test]
fn detach_ends_a_job_first() {
    let (mut daemon, mut manager) = disk();
    let to = target(&manager, "copy.img", "raw");
    mirror(&mut manager, "m", to, true).unwrap();
    manager.detach("a").unwrap();
    assert!(manager.list().is_empty());
    daemon.assert_alive();
    assert!(daemon.end(nix::sys::signal::Signal::SIGTERM).success());
}

#[test]
fn grown_disk_is_seen_by_its_driver_and_written_to_its_new_end() {
    let (mut daemon, mut manager) = disk();
    let mut client = Client::connect(&manager.place.socket("a"));
    let resize = |manager: &mut Manager, capacity_bytes| {
        let request = ResizeRequest {
            id: "a".into(),
            capacity_bytes,
        };
        manager.disks(async |disks| disks.resize(request).await)
    };
    assert_eq!(client.write(DISK_BYTES, &[1; BLOCK]), -libc::EIO);
    let grown = DISK_BYTES + (1 << 20);
    for _ in 0..2 {
        let device = resize(&mut manager, grown).unwrap();
        assert_eq!(device.blk.unwrap().capacity_bytes, grown);
    }
    assert_eq!(u64::from(client.config().capacity) * 512, grown);
    assert_eq!(client.write(grown - BLOCK as u64, &[1; BLOCK]), 0);
    assert_eq!(client.write(grown, &[1; BLOCK]), -libc::EIO);
    let error = resize(&mut manager, DISK_BYTES).unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    let path = manager.place.path("a.img");
    assert_eq!(path.metadata().unwrap().len(), grown);
    daemon.assert_alive();
}
