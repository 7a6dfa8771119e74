//! Packed rings: offered where a crash cannot lose their place, and kept across crashes and pauses.

use vhost_user::driver::PackedDriverRing;

use super::*;
use crate::virtio_pci::tests::guest::{BUFFERS_GPA, F_RING_PACKED, RINGS_GPA};
use crate::virtio_pci::tests::scripted::{self, Answer, GET_FEATURES};

const PATIENCE: Duration = Duration::from_secs(5);

/// Sets a packed ring of 7 descriptors up for each of the backend's two queues.
fn drive(guest: &Guest) -> (Driver<'_>, PackedDriverRing) {
    let mut driver = Driver::find(guest);
    driver.negotiate_any(u64::MAX);
    assert_ne!(driver.features & F_RING_PACKED, 0);
    guest.write(driver.msix_control, 2, 0x8000);
    (0..3).for_each(|vector| driver.program_vector(vector, false));
    let enable = |queue: u64| {
        let base_gpa = RINGS_GPA + queue * 0x1000;
        let ring = PackedDriverRing::new(&guest.memory, base_gpa, 7, driver.features);
        let addresses = ring.addresses();
        let to_gpa = |address: u64| address - addresses.desc + base_gpa;
        let areas = [addresses.desc, addresses.avail, addresses.used].map(to_gpa);
        driver.enable_queue(queue, 7, areas);
        ring
    };
    let [ring, _] = [0, 1].map(enable);
    driver.set_status(0xf);
    (driver, ring)
}

#[test]
fn packed_ring_is_served_over_pauses_and_dead_backends() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let echo = Echo::new();
    let mut server = serve(&listener, &echo);
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let (driver, mut ring) = drive(&guest);
    let (question, answer) = (BUFFERS_GPA, BUFFERS_GPA + 0x1000);
    for round in 0..24u8 {
        guest.memory.write(question, &[round; 50]);
        echo.hold.store(round % 4 == 3, Ordering::SeqCst);
        let taken_before = echo.taken.load(Ordering::SeqCst);
        let id = ring.add(&[(question, 50)], &[(answer, 50)]).unwrap();
        ring.ask_for_signal();
        if ring.needs_kick() {
            driver.kick(0);
        }
        if round % 4 == 3 {
            wait_until("the backend has taken the request", || {
                echo.taken.load(Ordering::SeqCst) > taken_before
            });
            kill(server);
            echo.hold.store(false, Ordering::SeqCst);
            server = serve(&listener, &echo);
        }
        let mut used = None;
        wait_until("the request is complete", || {
            used = used.or_else(|| ring.pop_used());
            used.is_some()
        });
        assert_eq!(used, Some((id, 50)), "round {round}");
        assert_eq!(guest.memory.read(answer, 50), [round; 50]);
        if round % 4 == 3 {
            wait_until("the outage is told with its end", || {
                let health = guest.device.health(1);
                let outage = health.outages.last();
                outage.is_some_and(|outage| {
                    outage.in_flight == 1 && outage.first_completion_after.is_some()
                })
            });
        }
        if round % 4 == 1 {
            guest.device.pause(PATIENCE);
            guest.device.resume();
        }
    }
    let health = guest.device.health(8);
    assert!(health.link.incarnations >= 7, "{health:?}");
}

#[test]
fn packed_rings_are_not_offered_without_an_inflight_region() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    scripted::serve(listener, |request| match request {
        GET_FEATURES => Answer::Value(scripted::FEATURES | F_RING_PACKED),
        _ => Answer::Sound,
    });
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut driver = Driver::find(&guest);
    driver.negotiate_any(u64::MAX);
    assert_eq!(driver.features & F_RING_PACKED, 0);
}
