//! The gate under load, and exchanging what is served.

use std::os::unix::fs::FileExt;
use std::thread;

use super::*;

use crate::engine::backend::Admission;

const PATIENCE: Duration = Duration::from_secs(30);

fn image_of(byte: u8) -> (Arc<RawImage>, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes = vec![byte; CAPACITY_SECTORS as usize * 512];
    file.as_file().write_all_at(&bytes, 0).unwrap();
    let options = OpenOptions {
        read_only: false,
        page_cache: false,
        block_bytes: 512,
        lock_patience: Duration::ZERO,
    };
    let image = RawImage::from_file(file.reopen().unwrap(), "test".into(), options).unwrap();
    (Arc::new(image), file)
}

/// Whoever is alone with the image sees it at rest, and no request is lost or goes astray.
#[test]
fn closure_is_alone_under_load_and_every_request_is_answered() {
    const ROUNDS: u8 = 20;
    let (first, file) = image_of(0);
    let (second, second_file) = image_of(0);
    let path = file.path().to_owned();
    let mut rig = rig_of(
        Arc::new(Backend::new(first, ServeOptions::default())),
        CacheMode::WriteBack,
        file,
    );
    let backend = Arc::clone(&rig.queue.backend);
    let closer = thread::spawn(move || {
        for _ in 0..ROUNDS {
            let at_rest = backend.quiesced(PATIENCE, |_| {
                let before = std::fs::read(&path).unwrap();
                thread::yield_now();
                before == std::fs::read(&path).unwrap()
            });
            assert!(at_rest.unwrap(), "the image changed meanwhile");
        }
        // Atomically: what is written from now on is in the second one.
        backend.quiesced(PATIENCE, |image| *image = second).unwrap();
    });
    let deadline = Instant::now() + PATIENCE;
    let mut byte = 1;
    while !closer.is_finished() {
        assert!(Instant::now() < deadline, "the gate stays shut");
        for slot in 0..16 {
            rig.offer_write(slot, byte);
        }
        rig.complete_all();
        for slot in 0..16 {
            assert_eq!(rig.status(slot), 0, "write {slot} of {byte}");
        }
        byte = byte.wrapping_add(1).max(1);
    }
    closer.join().unwrap();
    for slot in 0..16 {
        rig.offer_write(slot, 0xaa);
    }
    rig.complete_all();
    let written = std::fs::read(second_file.path()).unwrap();
    let len_bytes = 16 * LEN_BYTES as usize;
    assert!(written[..len_bytes].iter().all(|&byte| byte == 0xaa));
    assert!(rig.image_bytes(0).iter().all(|&byte| byte != 0xaa));
}

#[test]
fn gate_that_requests_keep_busy_opens_again_and_says_so() {
    let mut rig = rig(CacheMode::WriteBack);
    rig.offer_write(0, 1);
    rig.queue.accept(&mut rig.ring).unwrap();
    rig.queue.uring.submit();
    // Nobody reaps, so the request stays in flight.
    let backend = Arc::clone(&rig.queue.backend);
    let refused = backend.quiesced(Duration::from_millis(20), |_| panic!("not alone"));
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("1 queue"), "{error}");
    rig.complete_all();
    assert_eq!(rig.status(0), 0);
    rig.offer_write(1, 2);
    rig.complete_all();
    assert_eq!(rig.status(1), 0, "requests go on");
}

#[test]
fn queue_that_ends_is_not_waited_for() {
    let rig = rig(CacheMode::WriteBack);
    let backend = Arc::clone(&rig.queue.backend);
    let closer = thread::spawn(move || backend.quiesced(PATIENCE, |_| ()));
    drop(rig);
    closer.join().unwrap().unwrap();
}

#[test]
fn disk_that_grew_takes_requests_behind_its_old_end() {
    let (image, file) = image_of(0);
    let backend = Backend::new(image.clone(), ServeOptions::default());
    let mut rig = rig_of(Arc::new(backend), CacheMode::WriteBack, file);
    rig.offer_at(0, 1, CAPACITY_SECTORS, &[3; 512]);
    rig.complete_all();
    assert_eq!(rig.status(0), Status::IoErr as u8);
    use crate::image::Image;
    image.resize(CAPACITY_SECTORS + 1).unwrap();
    rig.offer_at(0, 1, CAPACITY_SECTORS, &[3; 512]);
    rig.complete_all();
    assert_eq!(rig.status(0), 0);
}

/// Holds every request; its turn has always come already.
struct AlwaysLate;

impl Admission for AlwaysLate {
    fn is_limited(&self) -> bool {
        true
    }

    fn admit(&self, _: u16, _: Access, _: u64, now_ns: u64) -> Result<(), u64> {
        Err(now_ns)
    }
}

/// A queue that looks for work without sleeping would turn round and round for nothing.
#[test]
fn held_requests_are_no_events_while_the_gate_is_closed() {
    let (image, file) = image_of(0);
    let options = ServeOptions {
        admission: Arc::new(AlwaysLate),
        ..ServeOptions::default()
    };
    let backend = Arc::new(Backend::new(image, options));
    let mut rig = rig_of(Arc::clone(&backend), CacheMode::WriteBack, file);
    rig.offer_write(0, 1);
    rig.queue.process(&mut rig.ring, Wake::Kick).unwrap();
    assert_eq!(rig.queue.held(), 1);
    assert!(rig.queue.has_events(), "its turn has come");
    thread::scope(|scope| {
        let (open, may_open) = std::sync::mpsc::channel();
        let closer = scope.spawn(move || {
            backend.quiesced(PATIENCE, |_| may_open.recv_timeout(PATIENCE).unwrap())
        });
        let deadline = Instant::now() + PATIENCE;
        while !rig.queue.backend.gate.is_closed() {
            assert!(Instant::now() < deadline, "the gate stays open");
            thread::yield_now();
        }
        assert!(rig.queue.has_events(), "the gate has closed");
        rig.queue.process(&mut rig.ring, Wake::Event(0)).unwrap();
        assert!(!rig.queue.has_events(), "nothing can begin");
        open.send(()).unwrap();
        closer.join().unwrap().unwrap();
    });
    assert!(rig.queue.has_events(), "the gate has opened");
}

/// As with a backup, which puts something in front of the image and takes it away again.
#[test]
fn image_that_is_served_again_is_not_waited_for() {
    let (first, file) = image_of(0);
    let (second, _second_file) = image_of(0);
    let backend = Backend::new(first.clone(), ServeOptions::default());
    let rig = rig_of(Arc::new(backend), CacheMode::WriteBack, file);
    let backend = &rig.queue.backend;
    // Nobody else has it, but the queue never looks.
    backend.gate.leave(rig.queue.gate_id);
    backend.quiesced(PATIENCE, |image| *image = second).unwrap();
    let again = first.clone();
    backend.quiesced(PATIENCE, |image| *image = again).unwrap();
    let began = Instant::now();
    backend.close_retired();
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
}
