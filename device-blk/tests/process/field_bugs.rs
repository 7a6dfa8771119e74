//! What users of other daemons and VMMs met with, as far as a daemon has a part in it.
//!
//! | report | here |
//! |---|---|
//! | in-flight requests lost after a stop that timed out | below |
//! | a pause that never ends when the guest uses fewer queues than there are | below |
//! | a detach that succeeds and leaves the slot stuck | below, `control.rs` |
//! | a reconnection that goes on at `avail_idx` and skips requests | `ghosts.rs`, `crash.rs` |
//! | in-flight entry 0 cleared although nothing was published | `vhost-user`, `inflight/split/tests.rs` |

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use faultfs::{Effect, Fault, Op};
use guest::oracle::BLOCK_LEN;
use nix::sys::signal::Signal;
use recovery::guest::Habits;
use recovery::host::{Disk, Fencing, Host, Readiness};
use recovery::transport::await_true as await_within;
use recovery::upgrade;
use tempfile::NamedTempFile;

use crate::crash::{BLOCK_BYTES, Guest, SLOTS};
use crate::daemon::{DEADLINE, await_true};
use crate::faults::fault_fs;
use crate::io::pattern;

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_device-blk"))
}

fn habits(queues: usize) -> Habits {
    Habits {
        queues,
        memory_bytes: 8 << 20,
        blocks: 512,
        ..Habits::default()
    }
}

fn image() -> NamedTempFile {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(512 * BLOCK_LEN as u64).unwrap();
    image
}

#[test]
fn requests_left_by_a_stop_that_timed_out_are_resubmitted() {
    let Some(fs) = fault_fs() else { return };
    let underneath = File::create_new(fs.underneath("a.img")).unwrap();
    underneath.set_len(SLOTS * BLOCK_BYTES).unwrap();
    let disk = Disk::raw(&fs.path("a.img"), 1);
    let mut host = Host::new(program(), &[disk], Readiness::Cold, Fencing::On).unwrap();
    let mut daemon = host.serve().unwrap();
    let mut guest = Guest::boot_at(host.socket(0));
    let held = fs.inject(Fault::new(Op::Write, Effect::Hold).of("a.img").times(1));
    let data = pattern(9, BLOCK_BYTES as usize);
    guest.submit(3, &data);
    fs.await_held(1);
    let stopped = host.detach(&mut daemon, 0, Duration::from_millis(300));
    let error = stopped.unwrap_err().to_string();
    assert!(error.contains("in time"), "{error}");
    assert_eq!((guest.reap(), guest.pending), (0, 1));
    daemon.signal(Signal::SIGKILL).unwrap();
    fs.release();
    daemon.ended().unwrap();
    let _next = host.serve().unwrap();
    await_true("the request completes", || {
        guest.reap();
        guest.pending == 0
    });
    let mut found = vec![0; BLOCK_BYTES as usize];
    underneath
        .read_exact_at(&mut found, 3 * BLOCK_BYTES)
        .unwrap();
    assert!(found == data);
    assert_eq!(fs.hits(held), 1);
}

#[test]
fn disk_with_more_queues_than_the_guest_uses_can_be_stopped() {
    let image = image();
    let disk = Disk::raw(image.path(), 4);
    let mut host = Host::new(program(), &[disk], Readiness::Cold, Fencing::On).unwrap();
    let mut first = host.serve().unwrap();
    let guest = recovery::guest::Guest::boot(host.socket(0), &habits(1)).unwrap();
    let has_worked = || guest.display().completed.load(Ordering::SeqCst) > 100;
    await_within(DEADLINE, has_worked).unwrap();
    let mut second = host.start().unwrap();
    host.hand_over(&mut first, &mut second).unwrap();
    let goes_on = || guest.display().first_completion(1).is_some();
    await_within(DEADLINE, goes_on).unwrap();
    let ledger = guest.end();
    assert!(ledger.summary().is_clean(), "{}", ledger.summary());
    second.signal(Signal::SIGTERM).unwrap();
    assert_eq!(second.ended().unwrap().code(), Some(0));
}

/// Back to the old process too, which has served a disk of this name before.
#[test]
fn disk_goes_from_process_to_process_and_back_under_load() {
    let outcome = upgrade::run(program(), image().path(), &habits(4), 1).unwrap();
    assert_eq!(outcome.failure, None);
    assert!(outcome.oracle.is_clean(), "{}", outcome.oracle);
    assert_eq!((outcome.upgrades.len(), outcome.roll_backs.len()), (2, 1));
}
