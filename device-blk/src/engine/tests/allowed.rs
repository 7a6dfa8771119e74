//! Requests of many steps, and the end of the time that the disk was allowed.

use super::*;
use crate::engine::allowance::Allowance;

/// `VIRTIO_BLK_T_WRITE_ZEROES`
const WRITE_ZEROES: u8 = 13;
const DEADLINE: Duration = Duration::from_secs(20);

/// Lets the queue work until `condition` holds.
fn until(rig: &mut Rig, what: &str, condition: impl Fn(&Rig) -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition(rig) {
        assert!(Instant::now() < deadline, "never came true: {what}");
        rig.queue.process(&mut rig.ring, Wake::Event(0)).unwrap();
        std::thread::yield_now();
    }
}

fn status(rig: &Rig) -> u8 {
    rig.memory.read(STATUS_GPA, 1)[0]
}

#[test]
fn next_step_of_a_request_waits_for_leave() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(CAPACITY_SECTORS * 512).unwrap();
    let image_options = OpenOptions {
        read_only: false,
        page_cache: true,
        block_bytes: 512,
        lock_patience: Duration::ZERO,
    };
    let image = RawImage::from_file(file.reopen().unwrap(), "test".into(), image_options).unwrap();
    let allowance = Arc::new(Allowance::leased(u64::MAX));
    let options = ServeOptions {
        allowance: Arc::clone(&allowance),
        ..ServeOptions::default()
    };
    let backend = Arc::new(Backend::new(Arc::new(image), options));
    let mut rig = rig_of(backend, CacheMode::WriteBack, file);
    let ranges: Vec<u8> = [0_u64, 64]
        .into_iter()
        .flat_map(|sector| [sector.to_le_bytes(), 8_u64.to_le_bytes()].concat())
        .collect();
    rig.offer(0, WRITE_ZEROES, &ranges);
    assert!(rig.queue.pass_gate(), "what is served is read");
    let chain = rig.ring.pop().unwrap().unwrap();
    let job = rig.queue.parse(&mut rig.ring, chain).unwrap();
    rig.queue.begin(&mut rig.ring, job);
    allowance.end();
    until(&mut rig, "the first step is over", |rig| {
        !rig.queue.stopped.is_empty()
    });
    assert_eq!(status(&rig), NO_STATUS);
    let left = rig.queue.drain(&mut rig.ring, Instant::now() + DEADLINE);
    assert_eq!((left, status(&rig)), (1, NO_STATUS), "nothing more begins");
    assert!(allowance.extend(u64::MAX));
    until(&mut rig, "the request is answered", |rig| {
        status(rig) != NO_STATUS
    });
    assert_eq!(status(&rig), Status::Ok as u8);
    assert!(rig.queue.stopped.is_empty());
}
