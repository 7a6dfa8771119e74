//! The file system itself, by plain system calls.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::{Effect, Fault, FaultFs, Op};

fn mounted() -> Option<FaultFs> {
    match FaultFs::mount() {
        Ok(fs) => Some(fs),
        Err(error) => {
            eprintln!("skipped: no FUSE here: {error}");
            None
        }
    }
}

fn file(fs: &FaultFs) -> File {
    std::fs::write(fs.underneath("a"), vec![1; 16 << 10]).unwrap();
    File::options()
        .read(true)
        .write(true)
        .open(fs.path("a"))
        .unwrap()
}

#[test]
fn requests_without_faults_reach_the_file_underneath() {
    let Some(fs) = mounted() else { return };
    let a = file(&fs);
    a.write_all_at(&[2; 512], 512).unwrap();
    a.sync_data().unwrap();
    let underneath = std::fs::read(fs.underneath("a")).unwrap();
    assert!(underneath[512..1024] == [2; 512] && underneath[1024] == 1);
    std::fs::write(fs.path("b"), b"new").unwrap();
    assert_eq!(std::fs::read(fs.underneath("b")).unwrap(), b"new");
    std::fs::rename(fs.path("b"), fs.path("a")).unwrap();
    assert_eq!(std::fs::read(fs.path("a")).unwrap(), b"new");
    assert_eq!(
        a.metadata().unwrap().len(),
        16 << 10,
        "the old file lives on"
    );
}

#[test]
fn faults_hit_their_range_as_often_as_they_should() {
    let Some(fs) = mounted() else { return };
    let a = file(&fs);
    let fault = Fault::new(Op::Write, Effect::Fail(libc::EIO))
        .within(4096..8192)
        .times(2);
    let fault = fs.inject(fault);
    a.write_all_at(&[2; 4096], 0).unwrap();
    for _ in 0..2 {
        let error = a.write_all_at(&[2; 4096], 4096).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    }
    a.write_all_at(&[2; 4096], 4096).unwrap();
    assert_eq!(fs.hits(fault), 2);
    let of_another = fs.inject(Fault::new(Op::Sync, Effect::Fail(libc::EIO)).of("b"));
    a.sync_data().unwrap();
    assert_eq!(fs.hits(of_another), 0);
    let of_this = fs.inject(Fault::new(Op::Sync, Effect::Fail(libc::EIO)).of("a"));
    assert!(a.sync_data().is_err());
    fs.lift(of_this);
    a.sync_data().unwrap();
}

#[test]
fn held_requests_wait_and_delayed_ones_come_late() {
    let Some(fs) = mounted() else { return };
    let a = file(&fs);
    fs.inject(Fault::new(Op::Write, Effect::Hold).times(1));
    let writer = {
        let a = a.try_clone().unwrap();
        std::thread::spawn(move || a.write_all_at(&[3; 512], 0))
    };
    fs.await_held(1);
    assert_eq!(std::fs::read(fs.underneath("a")).unwrap()[0], 1);
    assert!(!writer.is_finished());
    assert_eq!(fs.release(), 1);
    writer.join().unwrap().unwrap();
    assert_eq!(std::fs::read(fs.underneath("a")).unwrap()[0], 3);

    let delay = Duration::from_millis(50);
    fs.inject(Fault::new(Op::Sync, Effect::Delay(delay)).times(1));
    let began = Instant::now();
    a.sync_data().unwrap();
    assert!(began.elapsed() >= delay);
}

#[test]
fn short_writes_move_less() {
    let Some(fs) = mounted() else { return };
    let a = file(&fs);
    fs.inject(Fault::new(Op::Write, Effect::Short(700)).times(1));
    assert_eq!(a.write_at(&[2; 4096], 0).unwrap(), 700);
    let underneath = std::fs::read(fs.underneath("a")).unwrap();
    assert!(underneath[699] == 2 && underneath[700] == 1);
}

#[test]
fn what_was_not_flushed_can_be_forgotten_and_what_was_stays() {
    let Ok(fs) = FaultFs::mount_volatile() else {
        eprintln!("skipped: no FUSE here");
        return;
    };
    let a = file(&fs);
    let underneath = || std::fs::read(fs.underneath("a")).unwrap();
    a.write_all_at(&[2; 8192], 0).unwrap();
    assert!(underneath() == [1; 16 << 10], "not yet");
    a.sync_data().unwrap();
    a.write_all_at(&[3; 512], 4096 - 256).unwrap();
    assert!(std::fs::read(fs.path("a")).unwrap()[4096 - 256..4096 + 256] == [3; 512]);
    let mut turn = 0;
    let lost = fs.forget(|| {
        turn += 1;
        turn == 1
    });
    assert_eq!(lost.unwrap(), 1);
    let found = underneath();
    assert!(found[..4096] == [2; 4096], "lost, and flushed before");
    assert!(found[4096..4352] == [3; 256], "written back in time");
    assert!(found[4352..8192] == [2; 8192 - 4352]);

    let lying = fs.inject(Fault::new(Op::Sync, Effect::Skip));
    a.write_all_at(&[4; 4096], 0).unwrap();
    a.sync_data().unwrap();
    assert_eq!(fs.hits(lying), 1);
    assert_eq!(fs.forget(|| true).unwrap(), 1);
    assert!(underneath()[..4096] == [2; 4096], "the flush was a lie");
}
