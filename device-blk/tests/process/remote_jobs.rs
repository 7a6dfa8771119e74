//! Disks that go to other hosts and leave them: mirrors, backups, outages at the wrong moment.

use std::fs::File;
use std::time::Instant;

use api::device::{GetImageRequest, JobState, NbdSource, Target};
use nix::sys::signal::Signal;
use tonic::Code;

use crate::control::Manager;
use crate::daemon::{DEADLINE, Daemon, Place, await_true, read_image};
use crate::driver::Client;
use crate::jobs::{
    BLOCK, DISK_BLOCKS, DISK_BYTES, Writer, assert_is_an_instant, assert_is_final, await_job,
    backup, cancel, complete, image_of, job, mirror,
};
use crate::remote::{Server, remote_disk};

/// A daemon with an empty disk `a` that may connect to the server of `copy.img`.
fn disk_and_server() -> (Daemon, Manager, Server) {
    let place = Place::new();
    for name in ["a.img", "copy.img"] {
        let image = File::create(place.path(name)).unwrap();
        image.set_len(DISK_BYTES).unwrap();
    }
    let server = Server::own(&place, "copy", &[]);
    let fds = place.fds().display().to_string();
    let remote = format!("unix:{}", place.path("copy.nbd").display());
    let more = ["--fd-socket", &fds, "--remote", &remote];
    let daemon = Daemon::start_with(&place, &[&place.disk("a")], &more);
    (daemon, Manager::of(place), server)
}

fn target(manager: &Manager) -> Target {
    Target {
        name: "copy".into(),
        nbd: Some(NbdSource {
            address: format!("unix:{}", manager.place.path("copy.nbd").display()),
            export: "copy".into(),
            ..NbdSource::default()
        }),
        ..Target::default()
    }
}

#[test]
fn mirror_to_another_host_goes_on_there_without_losing_a_write() {
    let (mut daemon, mut manager, server) = disk_and_server();
    let writer = Writer::start(&manager.place.socket("a"), DISK_BLOCKS / 2);
    writer.await_more(300);
    let to = target(&manager);
    mirror(&mut manager, "m", to, false).unwrap();
    await_job(&mut manager, "m", JobState::Ready);
    complete(&mut manager, "m");
    let image =
        manager.disks(async |disks| disks.get_image(GetImageRequest { id: "a".into() }).await);
    assert_eq!(image.unwrap().format, "nbd");
    writer.await_more(300);
    // The server's restart is survived, as that of any disk's server.
    server.end(Signal::SIGKILL);
    let server = Server::own(&manager.place, "copy", &[]);
    writer.await_more(100);
    let log = writer.stop();
    assert!(daemon.end(Signal::SIGTERM).success(), "{}", daemon.log());
    assert_eq!(server.end(Signal::SIGTERM), Some(0));
    assert_is_final(&image_of(&manager.place.path("copy.img")), &log);
}

#[test]
fn backup_to_another_host_is_the_disk_of_one_instant() {
    let (_daemon, mut manager, _server) = disk_and_server();
    let writer = Writer::start(&manager.place.socket("a"), DISK_BLOCKS / 2);
    writer.await_more(300);
    let to = target(&manager);
    backup(&mut manager, "b", to, "", "").unwrap();
    await_job(&mut manager, "b", JobState::Done);
    writer.await_more(50);
    let log = writer.stop();
    let writes = assert_is_an_instant(&image_of(&manager.place.path("copy.img")), &log);
    assert!(writes >= 300, "{writes}");
}

#[test]
fn target_that_is_away_keeps_neither_the_guest_nor_a_cancellation() {
    let (mut daemon, mut manager, server) = disk_and_server();
    let writer = Writer::start(&manager.place.socket("a"), DISK_BLOCKS / 2);
    let to = target(&manager);
    mirror(&mut manager, "m", to, false).unwrap();
    await_job(&mut manager, "m", JobState::Ready);
    server.end(Signal::SIGKILL);
    // The job runs into the outage with what is written now.
    writer.await_more(200);
    let began = Instant::now();
    let cancelled = cancel(&mut manager, "m").unwrap();
    assert!(began.elapsed() < DEADLINE / 3, "{:?}", began.elapsed());
    assert_eq!(cancelled.state(), JobState::Cancelled);
    writer.await_more(100);
    let log = writer.stop();
    assert_is_final(&image_of(&manager.place.path("a.img")), &log);
    assert_eq!(job(&mut manager, "m").unwrap().state(), JobState::Cancelled);
    daemon.assert_alive();
}

fn has_thread(daemon: &Daemon, name: &str) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok())
        .any(|comm| comm.starts_with(name))
}

/// Its writes belong to nobody any more when the server is back.
#[test]
fn disk_detached_in_an_outage_writes_nothing_afterwards() {
    let place = Place::new();
    let image = place.image("a.img", 4096);
    let server = Server::own(&place, "a", &[]);
    let mut daemon = Daemon::start(&place, &[&remote_disk(&place, "")]);
    let mut client = Client::connect(&place.socket("a"));
    assert_eq!(client.write(0, &[1; 512]), 0);
    server.end(Signal::SIGKILL);
    client.buffer()[..BLOCK].fill(2);
    client.submit_write(0, 0, 0, BLOCK, 0);
    client.kick(0);
    await_true("the outage is noticed", || {
        daemon.log().contains("connecting again")
    });
    assert!(has_thread(&daemon, "nbd-"));
    let mut manager = Manager::of(place);
    let told = manager.detach("a").unwrap_err();
    assert_eq!(told.code(), Code::DeadlineExceeded, "{told}");
    manager.detach("a").unwrap();
    let server = Server::own(&manager.place, "a", &[]);
    await_true("nobody connects any more", || !has_thread(&daemon, "nbd-"));
    assert_eq!(server.end(Signal::SIGTERM), Some(0));
    assert_eq!(read_image(&image, 0, 512), [1; 512]);
    assert!(daemon.end(Signal::SIGTERM).success(), "{}", daemon.log());
}
