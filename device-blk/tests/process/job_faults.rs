//! Jobs whose target fails: the job fails, the guest does not notice.

use std::fs::File;
use std::os::fd::AsFd;

use api::device::{FdRef, JobState, Target};
use faultfs::{Effect, Fault, FaultFs, Op};

use crate::control::Manager;
use crate::jobs::{
    DISK_BLOCKS, Writer, assert_is_final, await_job, backup, disk, image_of, mirror, target,
};

/// A target whose writes fail from some byte on.
fn failing_target(manager: &Manager, fs: &FaultFs, name: &str, format: &str) -> Target {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(fs.path(name))
        .unwrap();
    manager.send(name, file.as_fd());
    let broken = Fault::new(Op::Write, Effect::Fail(libc::EIO)).within(4 << 20..u64::MAX);
    fs.inject(broken.of(name));
    Target {
        image_fd: Some(FdRef { token: name.into() }),
        format: format.into(),
        name: name.into(),
        ..Target::default()
    }
}

#[test]
fn target_that_fails_ends_the_job_and_nothing_else() {
    let Ok(fs) = FaultFs::mount() else {
        eprintln!("skipped: no FUSE here");
        return;
    };
    let (mut daemon, mut manager) = disk();
    let writer = Writer::start(&manager.place.socket("a"), DISK_BLOCKS);
    writer.await_more(2000);
    for (number, format) in ["raw", "qcow2"].into_iter().enumerate() {
        let job = format!("m{number}");
        let to = failing_target(&manager, &fs, &job, format);
        mirror(&mut manager, &job, to, false).unwrap();
        let failed = await_job(&mut manager, &job, JobState::Failed);
        assert!(failed.error.contains(&job), "names the image: {failed:?}");
        writer.await_more(50);

        let job = format!("b{number}");
        let to = failing_target(&manager, &fs, &job, format);
        backup(&mut manager, &job, to, "", "b").unwrap();
        await_job(&mut manager, &job, JobState::Failed);
        writer.await_more(50);
    }
    // What failed holds nothing: the next one goes through.
    let to = target(&manager, "good.img", "raw");
    backup(&mut manager, "good", to, "", "").unwrap();
    await_job(&mut manager, "good", JobState::Done);
    writer.await_more(50);
    let log = writer.stop();
    assert_is_final(&image_of(&manager.place.path("a.img")), &log);
    daemon.assert_alive();
}
