//! The transport, driven as a guest drives it, with backends that work, die and lie.

mod backends;
mod faulty;
mod guest;
mod health;
mod hostile;
mod packed;
mod peers;
mod scripted;
mod third_parties;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use vhost_user::frontend::Events;

use self::backends::{Echo, kill, listen, serve};
use self::guest::{Driver, Guest, TIMEOUTS, wait_until};
use crate::seccomp::ThreadKind;

/// A device number without a driver anywhere, so that nothing here depends on a device type.
const TYPE: &str = "type=42,config-size=16";
const DEVICE_NEEDS_RESET: u8 = 64;

/// Longest that an access of a vCPU may take here; backends that hang do so for seconds.
const PROMPT: Duration = Duration::from_millis(500);

#[test]
fn request_is_served_and_raises_the_queues_interrupt() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let _server = serve(&listener, &Echo::new());
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut driver = guest.drive();
    for round in 0..20u8 {
        let payload = [round; 100];
        let head = driver.submit(&payload);
        assert_eq!(
            driver.complete(head, payload.len()),
            payload,
            "round {round}"
        );
    }
    let health = guest.device.health(8);
    assert!(
        health.link.connected && health.driver_ok && health.link.inflight_tracking,
        "{health:?}"
    );
    assert_eq!(
        (health.link.incarnations, health.link.last_error.as_str()),
        (1, "")
    );
}

#[test]
fn requests_that_a_killed_backend_held_are_completed_by_the_next() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let echo = Echo::new();
    let mut server = serve(&listener, &echo);
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut driver = guest.drive();
    for round in 1..=5u8 {
        echo.hold.store(true, Ordering::SeqCst);
        let taken = echo.taken.load(Ordering::SeqCst);
        let head = driver.submit(&[round; 64]);
        wait_until("the backend took the request", || {
            echo.taken.load(Ordering::SeqCst) > taken
        });
        kill(server);
        echo.hold.store(false, Ordering::SeqCst);
        server = serve(&listener, &echo);
        assert_eq!(driver.complete(head, 64), [round; 64], "round {round}");
        assert_eq!(
            guest.device.health(8).link.incarnations,
            u64::from(round) + 1
        );
    }
}

#[test]
fn kick_during_an_outage_is_not_lost() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let echo = Echo::new();
    let server = serve(&listener, &echo);
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut driver = guest.drive();
    kill(server);
    wait_until("the outage is noticed", || {
        !guest.device.health(8).link.connected
    });
    let head = driver.submit(b"while nobody listens");
    let _server = serve(&listener, &echo);
    assert_eq!(driver.complete(head, 20), b"while nobody listens");
}

#[test]
fn driver_that_starts_during_an_outage_is_served_afterwards() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let echo = Echo::new();
    let server = serve(&listener, &echo);
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    kill(server);
    wait_until("the outage is noticed", || {
        !guest.device.health(8).link.connected
    });
    let mut driver = guest.drive();
    let head = driver.submit(b"patience");
    let _server = serve(&listener, &echo);
    assert_eq!(driver.complete(head, 8), b"patience");
}

#[test]
fn driver_can_reset_and_start_again_and_again() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let _server = serve(&listener, &Echo::new());
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    for round in 0..5u8 {
        let mut driver = guest.drive();
        let head = driver.submit(&[round; 32]);
        assert_eq!(driver.complete(head, 32), [round; 32], "round {round}");
    }
    assert_eq!(
        guest.device.health(8).link.incarnations,
        1,
        "a reset keeps the connection"
    );
}

#[test]
fn reset_during_an_outage_completes_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let echo = Echo::new();
    let server = serve(&listener, &echo);
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let driver = guest.drive();
    kill(server);
    wait_until("the outage is noticed", || {
        !guest.device.health(8).link.connected
    });
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
    let mut driver = guest.drive();
    let _server = serve(&listener, &echo);
    let head = driver.submit(b"again");
    assert_eq!(driver.complete(head, 5), b"again");
}

#[test]
fn backend_that_makes_shared_descriptors_blocking_holds_no_vcpu_up() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let _server = serve(&listener, &Echo::new());
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let (done, finished) = channel();
    thread::spawn(move || {
        let mut driver = guest.drive();
        let head = driver.submit(b"before");
        driver.complete(head, 6);
        guest.fabric.make_blocking();
        driver.program_vector(1, true);
        assert_eq!(
            guest.read(driver.msix_table + 0x1000, 8),
            0,
            "nothing is pending"
        );
        driver.set_status(0);
        wait_until("the reset is complete", || driver.status() == 0);
        let _ = done.send(());
    });
    finished
        .recv_timeout(TIMEOUTS.stop)
        .expect("every access returns");
}

#[test]
fn broken_ring_reported_late_does_not_touch_a_device_that_was_reset() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let _server = serve(&listener, &Echo::new());
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let registers = Arc::clone(&guest.device.registers);
    registers.ring_broken();
    assert_eq!(Driver::find(&guest).status(), 0, "before a driver came");
    let driver = guest.drive();
    guest.fabric.delivered();
    for _ in 0..3 {
        registers.ring_broken();
    }
    assert_eq!(driver.status(), 0xf | DEVICE_NEEDS_RESET);
    let interrupts = guest.fabric.delivered();
    assert!(interrupts.iter().any(|message| message.data == 0x100));
    registers.ring_broken();
    assert_eq!(guest.fabric.delivered(), [], "once is enough");
    driver.set_status(0);
    wait_until("the reset is complete", || driver.status() == 0);
    registers.ring_broken();
    assert_eq!(driver.status(), 0, "a driver waits for this");
}

#[test]
fn requests_held_before_a_reset_never_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let echo = Echo::new();
    echo.hold.store(true, Ordering::SeqCst);
    let server = serve(&listener, &echo);
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut driver = guest.drive();
    driver.submit(b"forgotten");
    wait_until("the backend took the request", || {
        echo.taken.load(Ordering::SeqCst) == 1
    });
    kill(server);
    wait_until("the outage is noticed", || {
        !guest.device.health(8).link.connected
    });
    let mut driver = guest.drive();
    echo.hold.store(false, Ordering::SeqCst);
    let _server = serve(&listener, &echo);
    let head = driver.submit(b"the only one");
    assert_eq!(driver.complete(head, 12), b"the only one");
    assert_eq!(
        driver.rings[0].used_idx(),
        1,
        "nothing but the new request was completed"
    );
}

#[test]
fn paused_device_serves_nothing_until_it_is_resumed() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let echo = Echo::new();
    let _server = serve(&listener, &echo);
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut driver = guest.drive();
    for round in 0..3u8 {
        let head = driver.submit(&[round; 10]);
        driver.complete(head, 10);
        guest.device.pause(TIMEOUTS.stop);
        let taken = echo.taken.load(Ordering::SeqCst);
        let head = driver.submit(&[round + 100; 10]);
        // Twice, so that a second pause is seen to do nothing.
        guest.device.pause(TIMEOUTS.stop);
        assert_eq!(echo.taken.load(Ordering::SeqCst), taken, "round {round}");
        guest.device.resume();
        assert_eq!(
            driver.complete(head, 10),
            [round + 100; 10],
            "round {round}"
        );
    }
}

#[test]
fn backend_killed_while_paused_is_replaced_and_resumed() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let echo = Echo::new();
    let server = serve(&listener, &echo);
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut driver = guest.drive();
    let head = driver.submit(b"first");
    driver.complete(head, 5);
    guest.device.pause(TIMEOUTS.stop);
    kill(server);
    wait_until("the outage is noticed", || {
        !guest.device.health(8).link.connected
    });
    // Neither pausing nor resuming waits for a backend that is not there.
    let started = Instant::now();
    guest.device.pause(TIMEOUTS.stop);
    guest.device.resume();
    assert!(started.elapsed() < PROMPT, "took {:?}", started.elapsed());
    let head = driver.submit(b"second");
    let _server = serve(&listener, &echo);
    assert_eq!(driver.complete(head, 6), b"second");
}

#[test]
fn machine_reset_returns_the_function_to_power_on() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let _server = serve(&listener, &Echo::new());
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    for round in 0..3u8 {
        let mut driver = guest.drive();
        let head = driver.submit(&[round; 32]);
        assert_eq!(driver.complete(head, 32), [round; 32], "round {round}");
        assert_eq!(guest.fabric.doorbell_gpas().len(), 2);
        let control = driver.msix_control;
        guest.device.reset(TIMEOUTS.stop);
        guest.root_bus.place_bars();
        assert_eq!(guest.fabric.doorbell_gpas(), Vec::<u64>::new());
        assert_eq!(guest.read(control, 2) & 0x8000, 0, "MSI-X is off");
        assert_eq!(Driver::find(&guest).status(), 0);
        assert!(!guest.device.health(8).driver_ok);
    }
}

#[test]
fn driver_writes_to_configuration_space_reach_the_backend() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let echo = Echo::new();
    let server = serve(&listener, &echo);
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let driver = guest.drive();
    assert_eq!(guest.read(driver.device_cfg + 4, 4), 0x0706_0504);
    guest.write(driver.device_cfg + 4, 1, 0xaa);
    assert_eq!(
        guest.read(driver.device_cfg + 4, 1),
        0xaa,
        "the driver sees its write at once"
    );
    wait_until("the backend has it", || {
        echo.config.lock().unwrap()[4] == 0xaa
    });
    kill(server);
    wait_until("the outage is noticed", || {
        !guest.device.health(8).link.connected
    });
    guest.write(driver.device_cfg + 5, 1, 0xbb);
    let _server = serve(&listener, &echo);
    wait_until("the next backend has what was written", || {
        echo.config.lock().unwrap()[5] == 0xbb
    });
    assert_eq!(guest.read(driver.device_cfg + 4, 2), 0xbbaa);
}

#[test]
fn changed_configuration_space_interrupts_the_driver() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let echo = Echo::new();
    let server = serve(&listener, &echo);
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let driver = guest.drive();
    // Said by the backend itself, or by somebody who knows.
    let announcements: [(u8, &dyn Fn()); 2] = [
        (99, &|| server.config_changed()),
        (100, &|| guest.device.refresh_config()),
    ];
    for (value, announce) in announcements {
        let generation = guest.read(driver.common + 0x15, 1);
        echo.config.lock().unwrap()[0] = value;
        announce();
        wait_until("the interrupt arrives", || {
            let delivered = guest.fabric.delivered();
            delivered.iter().any(|message| message.data == 0x100)
        });
        assert_eq!(guest.read(driver.device_cfg, 1), u64::from(value));
        assert_ne!(guest.read(driver.common + 0x15, 1), generation);
    }
}

#[test]
fn masked_vector_is_pending_and_delivered_when_it_is_unmasked() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let _server = serve(&listener, &Echo::new());
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut driver = guest.drive();
    driver.program_vector(1, true);
    let head = driver.submit(b"quiet");
    let pba = driver.msix_table + 0x1000;
    wait_until("the vector is pending", || guest.read(pba, 4) == 0b10);
    assert_eq!(
        guest.fabric.delivered(),
        [],
        "nothing is injected while masked"
    );
    assert_eq!(
        guest.read(pba, 4),
        0b10,
        "reading does not clear the pending bit"
    );
    driver.program_vector(1, false);
    assert_eq!(driver.complete(head, 5), b"quiet");
    assert_eq!(guest.read(pba, 4), 0);
}

#[test]
fn backend_without_an_acknowledged_feature_is_refused_until_one_has_it() {
    const FEATURE: u64 = 1 << 5;
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let complete = Echo::with_features(FEATURE);
    let server = serve(&listener, &complete);
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut driver = guest.drive();
    assert_ne!(driver.features & FEATURE, 0);
    kill(server);
    let server = serve(&listener, &Echo::with_features(0));
    wait_until("the lesser backend is refused", || {
        let health = guest.device.health(8);
        !health.link.connected
            && health
                .link
                .last_error
                .contains("no longer offers features 0x20")
    });
    let head = driver.submit(b"later");
    kill(server);
    let _server = serve(&listener, &complete);
    assert_eq!(driver.complete(head, 5), b"later");
}

#[test]
fn ring_outside_memory_leaves_the_device_in_need_of_a_reset() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let _server = serve(&listener, &Echo::new());
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut driver = Driver::find(&guest);
    driver.negotiate(u64::MAX);
    guest.write(driver.common + 0x16, 2, 0);
    guest.write(driver.common + 0x20, 4, 0xffff_f000);
    guest.write(driver.common + 0x1c, 2, 1);
    driver.set_status(0xf);
    assert_ne!(driver.status() & DEVICE_NEEDS_RESET, 0);
    let mut driver = guest.drive();
    let head = driver.submit(b"sane");
    assert_eq!(driver.complete(head, 4), b"sane", "a reset heals it");
}

#[test]
fn ring_that_the_driver_breaks_leaves_the_device_in_need_of_a_reset() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let _server = serve(&listener, &Echo::new());
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut driver = guest.drive();
    // A request that makes no sense is answered.
    driver.rings[0].set_desc(0, u64::MAX - 4, 8, 0, 0);
    driver.rings[0].push_avail(0);
    driver.kick(0);
    wait_until("it comes back", || driver.rings[0].pop_used().is_some());
    assert_eq!(driver.status(), 0xf);
    driver.rings[0].push_avail(999);
    driver.kick(0);
    wait_until("the device needs a reset", || {
        driver.status() & DEVICE_NEEDS_RESET != 0
    });
    let mut driver = guest.drive();
    let head = driver.submit(b"sane");
    assert_eq!(driver.complete(head, 4), b"sane", "a reset heals it");
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let _server = serve(&listener, &Echo::new());
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let driver = Driver::find(&guest);
    let attempt = |low: u64, high: u64| {
        driver.set_status(0);
        driver.set_status(0x3);
        for (select, half) in [low, high].into_iter().enumerate() {
            guest.write(driver.common + 8, 4, select as u64);
            guest.write(driver.common + 0xc, 4, half);
        }
        driver.set_status(0xb);
        driver.status()
    };
    assert_eq!(attempt(0, 1), 0xb, "VERSION_1 alone is enough");
    assert_eq!(attempt(0, 0), 0x3, "VERSION_1 is required");
    assert_eq!(attempt(0, 0b1001), 0x3, "in-order use was not offered");
    assert_eq!(
        attempt(1 << 30, 1),
        0x3,
        "the protocol's own bit is not the guest's"
    );
}

#[test]
fn device_and_guest_outlive_many_backends() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let echo = Echo::new();
    let mut server = serve(&listener, &echo);
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut driver = guest.drive();
    let incarnations = Arc::new(guest.device.health(8).link.incarnations);
    for round in 0..20u8 {
        let head = driver.submit(&[round; 16]);
        kill(server);
        server = serve(&listener, &echo);
        assert_eq!(driver.complete(head, 16), [round; 16], "round {round}");
    }
    assert!(guest.device.health(8).link.incarnations > *incarnations);
}

/// A filter cannot be taken off again, so a child process, this program once more, puts it on.
#[test]
fn link_works_under_the_system_call_filter_of_its_threads() {
    const IN_CHILD: &str = "VMM_CORE_TEST_CONFINED_LINK";
    if std::env::var_os(IN_CHILD).is_none() {
        let name = "virtio_pci::tests::link_works_under_the_system_call_filter_of_its_threads";
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(IN_CHILD, "1")
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {stderr}", output.status);
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let echo = Echo::new();
    let mut server = serve(&listener, &echo);
    sandbox::no_new_privs().unwrap();
    let attach = || {
        ThreadKind::Devices.confine().unwrap();
        Guest::attach(TYPE, &socket, TIMEOUTS).unwrap()
    };
    let guest = thread::scope(|scope| scope.spawn(attach).join().unwrap());
    let mut driver = guest.drive();
    for round in 0..3u8 {
        let head = driver.submit(&[round; 16]);
        kill(server);
        server = serve(&listener, &echo);
        assert_eq!(driver.complete(head, 16), [round; 16], "round {round}");
        guest.device.pause(TIMEOUTS.stop);
        guest.device.resume();
    }
    driver.set_status(0);
    wait_until("the reset is complete", || driver.status() == 0);
}

#[test]
fn moved_bar_takes_its_doorbells_along() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let _server = serve(&listener, &Echo::new());
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    guest.drive();
    let (command, bar) = (guest.config_gpa(0x04), guest.config_gpa(0x10));
    let old = guest.read(bar, 4) & !0xf;
    let doorbells = |bar: u64| vec![bar + 0x3000, bar + 0x3004];
    assert_eq!(guest.fabric.doorbell_gpas(), doorbells(old));
    guest.write(command, 2, 0);
    assert_eq!(guest.fabric.doorbell_gpas(), Vec::<u64>::new());
    guest.write(bar, 4, old + 0x1_0000);
    guest.write(command, 2, 0x6);
    assert_eq!(guest.fabric.doorbell_gpas(), doorbells(old + 0x1_0000));
    let mut driver = guest.drive();
    let head = driver.submit(b"moved");
    assert_eq!(driver.complete(head, 5), b"moved");
}

/// Virtio 1.2 section 4.1.4.9: what firmware uses that cannot map BARs.
#[test]
fn configuration_access_capability_reaches_the_bar() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let _server = serve(&listener, &Echo::new());
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut capability = guest.read(guest.config_gpa(0x34), 1);
    while guest.read(guest.config_gpa(capability as u16 + 3), 1) != 5 {
        capability = guest.read(guest.config_gpa(capability as u16 + 1), 1);
        assert_ne!(capability, 0, "the capability is in the list");
    }
    let register = |offset: u64| guest.config_gpa((capability + offset) as u16);
    let select = |offset: u64, len: u64| {
        guest.write(register(8), 4, offset);
        guest.write(register(12), 4, len);
    };
    select(0x14, 1);
    guest.write(register(16), 1, 0x3);
    assert_eq!(Driver::find(&guest).status(), 0x3);
    assert_eq!(guest.read(register(16), 1), 0x3);
    select(0x2004, 4);
    assert_eq!(
        guest.read(register(16), 4),
        0x0706_0504,
        "device configuration"
    );
    for (offset, len) in [(0x8000, 4), (0x2001, 4), (0, 8), (0xffff_fffc, 4)] {
        select(offset, len);
        guest.read(register(16), 4);
        guest.write(register(16), 4, 0xffff_ffff);
    }
    assert_eq!(
        Driver::find(&guest).status(),
        0x3,
        "impossible accesses reach nothing"
    );
}
