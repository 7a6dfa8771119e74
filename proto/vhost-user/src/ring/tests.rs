//! Rings in memory, driven by [`DriverRing`], by honest and hostile drivers.

mod hostile;
mod packed;
mod recovery;
mod reminders;

use std::sync::Arc;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::*;
use crate::driver::{DriverRing, GuestMemory};
use crate::eventfd::EventFd;
use crate::inflight::InflightRegion;

const SIZE: u16 = 8;
const DATA_GPA: u64 = 0x10000;
const TABLE_GPA: u64 = 0x20000;
const MEMORY_BYTES: u64 = 0x40000;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

struct Fixture {
    memory: Arc<GuestMemory>,
    driver: DriverRing,
    call: EventFd,
    features: u64,
}

impl Fixture {
    fn new(features: u64) -> Fixture {
        Fixture::with_memory(GuestMemory::new(MEMORY_BYTES).unwrap(), features)
    }

    fn with_memory(memory: GuestMemory, features: u64) -> Fixture {
        let memory = Arc::new(memory);
        let driver = DriverRing::new(&memory, 0, SIZE, features);
        Fixture {
            memory,
            driver,
            call: EventFd::new().unwrap(),
            features,
        }
    }

    fn config(&self) -> RingConfig {
        RingConfig {
            index: 0,
            size: SIZE,
            features: self.features,
            addresses: self.driver.addresses(),
            memory: self.memory.table().unwrap(),
            next_avail: self.driver.used_idx(),
            inflight: None,
            call: Doorbell::new(self.call.try_clone().unwrap().into_fd()).ok(),
        }
    }

    fn ring(&self) -> Ring {
        Ring::start(self.config()).unwrap()
    }

    fn ring_with(&self, region: &InflightRegion) -> Ring {
        let config = RingConfig {
            inflight: region.queue(0, SIZE),
            ..self.config()
        };
        Ring::start(config).unwrap()
    }

    fn was_called(&self) -> bool {
        self.call.take().unwrap()
    }
}

fn heads(ring: &mut Ring) -> Vec<u16> {
    std::iter::from_fn(|| ring.pop().unwrap().map(|chain| chain.head())).collect()
}

#[test]
fn chain_yields_readable_then_writable_bytes_and_completion_reaches_the_driver() {
    let mut fixture = Fixture::new(0);
    fixture.memory.write(DATA_GPA, b"hello world");
    let head = fixture.driver.add(
        &[(DATA_GPA, 5), (DATA_GPA + 5, 6)],
        &[(DATA_GPA + 64, 4), (DATA_GPA + 128, 8)],
    );
    let mut ring = fixture.ring();

    let chain = ring.pop().unwrap().unwrap();
    assert_eq!(Some(chain.head()), head);
    assert_eq!(
        (chain.readable_len_bytes(), chain.writable_len_bytes()),
        (11, 12)
    );
    let mut bytes = [0; 11];
    assert_eq!(chain.read_at(0, &mut bytes), 11);
    assert_eq!(&bytes, b"hello world");
    assert_eq!(chain.read_at(4, &mut bytes[..3]), 3);
    assert_eq!(&bytes[..3], b"o w");
    assert_eq!(chain.read_at(11, &mut bytes), 0);
    assert_eq!(chain.write_at(2, b"abcdefghijklm"), 10);
    assert_eq!(
        chain
            .writable_range(3, 2)
            .map(|segment| segment.len())
            .collect::<Vec<_>>(),
        [1, 1]
    );

    ring.complete(chain, 12);
    assert_eq!(fixture.driver.pop_used(), None, "not published yet");
    ring.notify();
    assert_eq!(fixture.driver.pop_used(), Some((head.unwrap(), 12)));
    assert_eq!(fixture.memory.read(DATA_GPA + 64, 4), b"\0\0ab");
    assert_eq!(fixture.memory.read(DATA_GPA + 128, 8), b"cdefghij");
    assert!(fixture.was_called());
}

#[test]
fn written_length_never_exceeds_the_writable_bytes() {
    let mut fixture = Fixture::new(0);
    fixture.driver.add(&[], &[(DATA_GPA, 16)]).unwrap();
    let mut ring = fixture.ring();
    let chain = ring.pop().unwrap().unwrap();
    ring.complete(chain, u32::MAX);
    ring.publish();
    assert_eq!(fixture.driver.pop_used().unwrap().1, 16);
}

#[test]
fn indices_wrap_around_without_losing_requests() {
    let mut fixture = Fixture::new(EVENT_IDX);
    fixture.driver.start_at(u16::MAX - 10);
    let mut ring = fixture.ring();
    for round in 0..40u32 {
        let head = fixture.driver.add(&[], &[(DATA_GPA, 64)]).unwrap();
        let chain = ring.pop().unwrap().unwrap();
        assert_eq!(chain.head(), head);
        ring.complete(chain, round);
        ring.notify();
        assert_eq!(
            fixture.driver.pop_used(),
            Some((head, round)),
            "round {round}"
        );
    }
    assert_eq!(ring.state().in_flight, 0);
}

#[test]
fn indirect_chain_longer_than_the_ring_is_resolved() {
    let mut fixture = Fixture::new(INDIRECT);
    let writable: Vec<_> = (0..100).map(|index| (DATA_GPA + index * 16, 16)).collect();
    fixture
        .driver
        .add_indirect(TABLE_GPA, &[(DATA_GPA, 8)], &writable)
        .unwrap();
    let mut ring = fixture.ring();
    let chain = ring.pop().unwrap().unwrap();
    assert_eq!(chain.readable().len(), 1);
    assert_eq!(chain.writable().len(), 100);
    assert_eq!(chain.writable_len_bytes(), 1600);
    ring.complete(chain, 0);
    ring.publish();
    assert!(fixture.driver.pop_used().is_some());
}

#[test]
fn buffer_across_adjacent_regions_becomes_two_segments() {
    let memory = GuestMemory::with_regions(&[(0, 0x20000), (0x20000, 0x20000)]).unwrap();
    let mut fixture = Fixture::with_memory(memory, 0);
    fixture.driver.add(&[(0x20000 - 16, 48)], &[]).unwrap();
    let mut ring = fixture.ring();
    let chain = ring.pop().unwrap().unwrap();
    assert_eq!(
        chain
            .readable()
            .iter()
            .map(Segment::len)
            .collect::<Vec<_>>(),
        [16, 32]
    );
}

#[test]
fn without_event_idx_the_avail_flag_suppresses_signals() {
    let mut fixture = Fixture::new(0);
    let mut ring = fixture.ring();
    for (flags, expected) in [(0, true), (1, false), (0, true)] {
        fixture.driver.set_avail_flags(flags);
        fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
        let chain = ring.pop().unwrap().unwrap();
        ring.complete(chain, 4);
        ring.notify();
        assert_eq!(fixture.was_called(), expected, "flags {flags}");
        fixture.driver.pop_used().unwrap();
    }
    ring.notify();
    assert!(!fixture.was_called(), "nothing new was completed");
}

#[test]
fn event_idx_signals_only_when_used_event_is_passed() {
    // Near the wrap-around, and away from it.
    for start in [0u16, 100, u16::MAX - 2] {
        let mut fixture = Fixture::new(EVENT_IDX);
        fixture.driver.start_at(start);
        let mut ring = fixture.ring();
        ring.notify();
        fixture.was_called();
        // The driver wants to hear of the third completion from here.
        fixture.driver.set_used_event(start.wrapping_add(2));
        let called: Vec<bool> = (0..5)
            .map(|_| {
                fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
                let chain = ring.pop().unwrap().unwrap();
                ring.complete(chain, 4);
                ring.notify();
                fixture.driver.pop_used().unwrap();
                fixture.was_called()
            })
            .collect();
        assert_eq!(called, [false, false, true, false, false], "from {start}");
    }
}

#[test]
fn event_idx_batch_signals_once_when_it_passes_used_event() {
    let mut fixture = Fixture::new(EVENT_IDX);
    let mut ring = fixture.ring();
    fixture.driver.set_used_event(1);
    for _ in 0..3 {
        fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    }
    while let Some(chain) = ring.pop().unwrap() {
        ring.complete(chain, 4);
    }
    assert_eq!(
        fixture.driver.used_idx(),
        0,
        "completions are published as a batch"
    );
    ring.notify();
    assert_eq!(fixture.driver.used_idx(), 3);
    assert!(fixture.was_called());
}

#[test]
fn driver_kicks_exactly_when_the_device_sleeps() {
    for features in [0, EVENT_IDX] {
        for start in [0u16, u16::MAX - 1] {
            let mut fixture = Fixture::new(features);
            fixture.driver.start_at(start);
            let mut ring = fixture.ring();
            for round in 0..4 {
                assert!(!ring.enable_notification().unwrap());
                fixture.driver.add(&[(DATA_GPA, 4)], &[]).unwrap();
                assert!(
                    fixture.driver.needs_kick(),
                    "round {round} from {start}: asleep"
                );
                ring.disable_notification();
                let chain = ring.pop().unwrap().unwrap();
                ring.complete(chain, 0);
                fixture.driver.add(&[(DATA_GPA, 4)], &[]).unwrap();
                assert!(
                    !fixture.driver.needs_kick(),
                    "round {round} from {start}: awake"
                );
                // What came without a kick shows when notifications are enabled again.
                assert!(ring.enable_notification().unwrap());
                let chain = ring.pop().unwrap().unwrap();
                ring.complete(chain, 0);
                ring.publish();
                while fixture.driver.pop_used().is_some() {}
            }
        }
    }
}

#[test]
fn buffers_left_on_purpose_do_not_keep_the_worker_awake() {
    let mut fixture = Fixture::new(EVENT_IDX);
    let mut ring = fixture.ring();
    fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    assert!(ring.enable_notification().unwrap());
    assert!(!ring.enable_notification().unwrap(), "seen, and left");
    assert!(ring.has_available());
}

#[test]
fn ring_resumed_in_mid_life_signals_what_its_predecessor_may_not_have() {
    let mut fixture = Fixture::new(EVENT_IDX);
    fixture.driver.start_at(5);
    let mut ring = fixture.ring();
    fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    fixture.driver.set_used_event(1000);
    ring.notify();
    assert!(fixture.was_called());
}

#[test]
fn paused_ring_yields_nothing_but_completes() {
    let mut fixture = Fixture::new(0);
    fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    let mut ring = fixture.ring();
    let chain = ring.pop().unwrap().unwrap();
    ring.set_intake(Intake::Closed);
    assert!(ring.pop().unwrap().is_none());
    assert!(!ring.has_available());
    ring.complete(chain, 4);
    ring.notify();
    assert!(fixture.driver.pop_used().is_some());
    ring.set_intake(Intake::Open);
    assert!(ring.pop().unwrap().is_some());
}

#[test]
fn memory_change_keeps_chains_in_flight_mapped() {
    let mut fixture = Fixture::new(0);
    fixture.memory.write(DATA_GPA, b"still here");
    fixture.driver.add(&[(DATA_GPA, 10)], &[]).unwrap();
    let mut config = fixture.config();
    let table = std::mem::take(&mut config.memory);
    let first_mapping = Arc::downgrade(table.regions()[0].mapping());
    config.memory = table;
    let mut ring = Ring::start(config).unwrap();
    let chain = ring.pop().unwrap().unwrap();
    ring.set_memory(fixture.memory.table().unwrap()).unwrap();
    assert!(
        first_mapping.upgrade().is_some(),
        "the chain holds the old mapping"
    );
    let mut bytes = [0; 10];
    assert_eq!(chain.read_at(0, &mut bytes), 10);
    assert_eq!(&bytes, b"still here");
    let pin = chain.pin();
    ring.complete(chain, 0);
    assert!(first_mapping.upgrade().is_some(), "the pin holds it still");
    drop(pin);
    assert!(
        first_mapping.upgrade().is_none(),
        "nobody needs it any more"
    );
    ring.publish();
    assert!(
        fixture.driver.pop_used().is_some(),
        "the ring works in the new table"
    );
}

#[test]
fn unpopped_chain_comes_again_and_is_not_in_flight() {
    let mut fixture = Fixture::new(0);
    let first = fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    let second = fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    let (region, _file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
    let mut ring = fixture.ring_with(&region);
    let chains = [ring.pop().unwrap().unwrap(), ring.pop().unwrap().unwrap()];
    for chain in chains.into_iter().rev() {
        ring.unpop(chain);
    }
    assert_eq!(
        ring.state(),
        RingState {
            next_avail: 0,
            used_idx: 0,
            in_flight: 0,
            left_to_resubmit: 0
        }
    );
    assert_eq!(heads(&mut ring), [first, second]);
    drop(ring);
    assert_eq!(heads(&mut fixture.ring_with(&region)), [first, second]);
}
