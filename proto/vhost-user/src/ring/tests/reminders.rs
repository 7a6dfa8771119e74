//! Signals that were lost are made up for, once.

use super::*;
use crate::driver::PackedDriverRing;
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

#[test]
fn driver_that_missed_its_signal_is_reminded_once() {
    for features in [0, EVENT_IDX] {
        let mut fixture = Fixture::new(features);
        let mut ring = fixture.ring();
        ring.remind();
        ring.remind();
        assert!(!fixture.was_called(), "nothing was ever completed");
        for round in 0..3 {
            fixture.driver.ask_for_signal();
            fixture.driver.add(&[(DATA_GPA, 5)], &[]).unwrap();
            let chain = ring.pop().unwrap().unwrap();
            ring.complete(chain, 0);
            ring.notify();
            assert!(
                fixture.was_called(),
                "round {round}: the signal, which is lost"
            );
            ring.remind();
            assert!(!fixture.was_called(), "round {round}: it is given time");
            ring.remind();
            assert!(fixture.was_called(), "round {round}: it is reminded");
            ring.remind();
            assert!(!fixture.was_called(), "round {round}: once");
            fixture.driver.pop_used().unwrap();
        }
    }
}

#[test]
fn driver_that_heard_its_signal_or_wants_none_is_left_alone() {
    let mut fixture = Fixture::new(EVENT_IDX);
    let mut ring = fixture.ring();
    for _ in 0..3 {
        fixture.driver.ask_for_signal();
        fixture.driver.add(&[(DATA_GPA, 5)], &[]).unwrap();
        let chain = ring.pop().unwrap().unwrap();
        ring.complete(chain, 0);
        ring.notify();
        assert!(fixture.was_called());
        fixture.driver.pop_used().unwrap();
        fixture.driver.ask_for_signal();
        (0..3).for_each(|_| ring.remind());
        assert!(!fixture.was_called());
    }
    let mut fixture = Fixture::new(0);
    let mut ring = fixture.ring();
    fixture.driver.set_avail_flags(1);
    fixture.driver.add(&[(DATA_GPA, 5)], &[]).unwrap();
    let chain = ring.pop().unwrap().unwrap();
    ring.complete(chain, 0);
    ring.notify();
    (0..3).for_each(|_| ring.remind());
    assert!(!fixture.was_called(), "it polls");
}

#[test]
fn packed_ring_reminds_wherever_its_laps_begin() {
    let features = EVENT_IDX | 1 << VIRTIO_F_RING_PACKED;
    let fixture = Fixture::new(0);
    let mut driver = PackedDriverRing::new(&fixture.memory, 0x8000, SIZE, features);
    let mut ring = Ring::start(RingConfig {
        features,
        addresses: driver.addresses(),
        next_avail: 1 << 15,
        ..fixture.config()
    })
    .unwrap();
    for round in 0..5 * SIZE {
        driver.ask_for_signal();
        driver.add(&[(DATA_GPA, 5)], &[]).unwrap();
        let chain = ring.pop().unwrap().unwrap();
        ring.complete(chain, 0);
        ring.notify();
        assert!(fixture.was_called(), "round {round}: the signal");
        ring.remind();
        ring.remind();
        assert!(fixture.was_called(), "round {round}: the reminder");
        driver.pop_used().unwrap();
        driver.ask_for_signal();
        (0..3).for_each(|_| ring.remind());
        assert!(!fixture.was_called(), "round {round}: it has heard");
    }
    driver.set_driver_event(0, 1);
    driver.add(&[(DATA_GPA, 5)], &[]).unwrap();
    let chain = ring.pop().unwrap().unwrap();
    ring.complete(chain, 0);
    ring.notify();
    (0..3).for_each(|_| ring.remind());
    assert!(!fixture.was_called(), "it wants none");
}
