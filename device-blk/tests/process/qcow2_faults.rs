//! qcow2 on storage that lies and hangs: what the map of an image must not get wrong.

use faultfs::{Effect, Fault, Op};
use nix::sys::signal::Signal;

use crate::daemon::{Daemon, await_true};
use crate::driver::{Client, all_features};
use crate::faults::{Kind, Rig, spec};
use crate::io::pattern;

/// The cluster is not the disk's any more, as far as the file goes: what is written there would be
/// gone with the process.
#[test]
fn write_after_a_discard_that_failed_and_landed_is_there_after_a_restart() {
    const AT: u64 = 1 << 20;
    let Some(mut rig) = Rig::new(Kind::Qcow2) else {
        return;
    };
    assert_eq!(rig.client.write(AT, &pattern(1, 64 << 10)), 0);
    assert_eq!(rig.client.flush(), 0);
    assert!(rig.client.read(AT, 4096) == pattern(1, 64 << 10)[..4096]);
    let lie = rig
        .fs
        .inject(Fault::new(Op::Write, Effect::Lie(libc::EIO)).times(1));
    assert_eq!(rig.client.discard(AT, 64 << 10), -libc::EIO);
    assert_eq!(rig.fs.hits(lie), 1);
    rig.fs.lift(lie);

    let data = pattern(2, 64 << 10);
    assert_eq!(rig.client.write(AT, &data), 0);
    assert_eq!(rig.client.flush(), 0);
    assert!(rig.client.read(AT, data.len()) == data);
    drop(rig.client);
    rig.daemon.end(Signal::SIGKILL);
    let place = &rig.manager.place;
    let spec = spec(place, Kind::Qcow2, "a", &rig.fs.path("a.img"));
    let _again = Daemon::start(place, &[&spec]);
    let mut client = Client::connect_with(&place.socket("a"), 2, all_features());
    assert!(client.read(AT, data.len()) == data, "it was flushed");
}

/// The same for a write that allocates: what a later write finds there is what the file has.
#[test]
fn write_that_failed_and_landed_is_followed_by_one_that_lasts() {
    const AT: u64 = 1 << 20;
    let Some(mut rig) = Rig::new(Kind::Qcow2) else {
        return;
    };
    // Its table is there, and its page is loaded.
    assert_eq!(rig.client.write(0, &pattern(1, 4096)), 0);
    assert!(rig.client.read(AT, 4096).iter().all(|&byte| byte == 0));
    // Data, then the map.
    for writes in 1..=3 {
        let at = AT * writes;
        let honest = Fault::new(Op::Write, Effect::Short(usize::MAX)).times(writes - 1);
        let honest = rig.fs.inject(honest);
        let lie = rig
            .fs
            .inject(Fault::new(Op::Write, Effect::Lie(libc::EIO)).times(1));
        let first = rig.client.write(at, &pattern(2, 64 << 10));
        assert_eq!(first != 0, rig.fs.hits(lie) == 1, "{writes}");
        rig.fs.lift(honest);
        rig.fs.lift(lie);
        assert_eq!(rig.client.write(at, &pattern(at, 4096)), 0);
        assert_eq!(rig.client.flush(), 0);
        assert!(rig.client.read(at, 4096) == pattern(at, 4096));
    }
    drop(rig.client);
    rig.daemon.end(Signal::SIGKILL);
    let place = &rig.manager.place;
    let spec = spec(place, Kind::Qcow2, "a", &rig.fs.path("a.img"));
    let _again = Daemon::start(place, &[&spec]);
    let mut client = Client::connect_with(&place.socket("a"), 2, all_features());
    for writes in 1..=3 {
        let at = AT * writes;
        assert!(client.read(at, 4096) == pattern(at, 4096), "{writes}");
    }
}

/// More writes hang than there are threads to wait for them.
#[test]
fn reads_go_on_while_every_write_hangs() {
    const HELD: usize = 24;
    let Some(mut rig) = Rig::new(Kind::Qcow2) else {
        return;
    };
    let data = pattern(1, 64 << 10);
    assert_eq!(rig.client.write(0, &data), 0);
    assert_eq!(rig.client.flush(), 0);
    let hold = rig.fs.inject(Fault::new(Op::Write, Effect::Hold));
    for id in 0..HELD {
        let at = (id as u64 + 1) * (256 << 10);
        rig.client.submit_write(0, at, 1 << 20, 4096, id);
    }
    rig.client.kick(0);
    rig.fs.await_held(1);
    await_true("all threads have something to do", || {
        rig.manager.get("a").inflight == HELD as u64
    });
    for _ in 0..8 {
        assert_eq!(rig.client.read_at(1, 0, 0, data.len()), 0);
        assert!(rig.client.buffer()[..data.len()] == data);
    }
    rig.fs.lift(hold);
    let mut done = 0;
    await_true("what was held completes", || {
        rig.fs.release();
        while let Some((_, result)) = rig.client.poll_completion(0) {
            assert_eq!(result, 0);
            done += 1;
        }
        done == HELD
    });
}
