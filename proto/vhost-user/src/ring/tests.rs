//! Rings in memory, driven by [`DriverRing`], by honest and hostile drivers.

use std::sync::Arc;

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
            call: Some(Doorbell::new(self.call.try_clone().unwrap().into_fd())),
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
fn zero_length_descriptors_yield_no_segments() {
    let mut fixture = Fixture::new(0);
    fixture
        .driver
        .add(&[(DATA_GPA, 0), (DATA_GPA, 4)], &[(u64::MAX, 0)])
        .unwrap();
    let chain = fixture.ring().pop().unwrap().unwrap();
    assert_eq!((chain.readable().len(), chain.writable().len()), (1, 0));
}

/// Offers descriptor 0 after `prepare` made something of the table, and returns the error.
fn error_of(features: u64, prepare: impl FnOnce(&mut DriverRing)) -> RingError {
    let mut fixture = Fixture::new(features);
    prepare(&mut fixture.driver);
    fixture.driver.push_avail(0);
    let mut ring = fixture.ring();
    let error = ring.pop().unwrap_err();
    assert_eq!(ring.state().in_flight, 0, "a broken chain is not in flight");
    assert!(ring.pop().is_err(), "the error stays");
    error
}

#[test]
fn descriptor_loop_is_refused() {
    let error = error_of(0, |driver| {
        driver.set_desc(0, DATA_GPA, 4, F_NEXT, 1);
        driver.set_desc(1, DATA_GPA, 4, F_NEXT, 0);
    });
    assert!(matches!(error, RingError::Loop { head: 0 }), "{error}");
}

#[test]
fn next_beyond_the_ring_is_refused() {
    let error = error_of(0, |driver| driver.set_desc(0, DATA_GPA, 4, F_NEXT, SIZE));
    assert!(
        matches!(error, RingError::BadNext { next: SIZE, .. }),
        "{error}"
    );
}

#[test]
fn readable_after_writable_is_refused() {
    let error = error_of(0, |driver| {
        driver.set_desc(0, DATA_GPA, 4, F_NEXT | F_WRITE, 1);
        driver.set_desc(1, DATA_GPA, 4, 0, 0);
    });
    assert!(
        matches!(error, RingError::ReadableAfterWritable { .. }),
        "{error}"
    );
}

#[test]
fn addresses_outside_memory_are_refused() {
    for (gpa, len) in [
        (MEMORY_BYTES, 1),
        (MEMORY_BYTES - 1, 2),
        (u64::MAX, 1),
        (u64::MAX - 3, 16),
        (0, u32::MAX),
    ] {
        let error = error_of(0, |driver| driver.set_desc(0, gpa, len, 0, 0));
        assert!(
            matches!(error, RingError::BadAddress { .. }),
            "{gpa:#x}+{len:#x}: {error}"
        );
    }
}

#[test]
fn four_gibibytes_in_one_chain_are_refused() {
    let memory = GuestMemory::new(1 << 32).unwrap();
    let mut fixture = Fixture::with_memory(memory, 0);
    fixture.driver.add(&[(0, u32::MAX), (0, 1)], &[]).unwrap();
    let error = fixture.ring().pop().unwrap_err();
    assert!(matches!(error, RingError::TooManyBytes { .. }), "{error}");
}

#[test]
fn bad_indirect_tables_are_refused() {
    let cases: [(u64, u32, u16); 6] = [
        (0, 16, F_INDIRECT),
        (INDIRECT, 0, F_INDIRECT),
        (INDIRECT, 24, F_INDIRECT),
        (INDIRECT, (MAX_INDIRECT_DESCS + 1) * 16, F_INDIRECT),
        (INDIRECT, 16, F_INDIRECT | F_NEXT),
        (INDIRECT, !15, F_INDIRECT),
    ];
    for (features, len, flags) in cases {
        let error = error_of(features, |driver| {
            driver.set_desc(0, TABLE_GPA, len, flags, 1)
        });
        assert!(
            matches!(error, RingError::BadIndirect { .. }),
            "{len:#x} {flags:#x}: {error}"
        );
    }
    let outside = error_of(INDIRECT, |driver| {
        driver.set_desc(0, u64::MAX - 15, 32, F_INDIRECT, 0)
    });
    assert!(matches!(outside, RingError::BadAddress { .. }), "{outside}");
}

#[test]
fn nested_and_looping_indirect_tables_are_refused() {
    let nested = error_of(INDIRECT, |driver| {
        driver.set_desc(0, TABLE_GPA, 16, F_INDIRECT, 0);
        driver.write_desc(TABLE_GPA, TABLE_GPA, 16, F_INDIRECT, 0);
    });
    assert!(matches!(nested, RingError::BadIndirect { .. }), "{nested}");
    let looping = error_of(INDIRECT, |driver| {
        driver.set_desc(0, TABLE_GPA, 32, F_INDIRECT, 0);
        driver.write_desc(TABLE_GPA, DATA_GPA, 4, F_NEXT, 1);
        driver.write_desc(TABLE_GPA + 16, DATA_GPA, 4, F_NEXT, 0);
    });
    assert!(matches!(looping, RingError::Loop { .. }), "{looping}");
    let beyond = error_of(INDIRECT, |driver| {
        driver.set_desc(0, TABLE_GPA, 16, F_INDIRECT, 0);
        driver.write_desc(TABLE_GPA, DATA_GPA, 4, F_NEXT, 1);
    });
    assert!(
        matches!(beyond, RingError::BadNext { next: 1, .. }),
        "{beyond}"
    );
}

#[test]
fn avail_index_jump_and_bad_head_are_refused() {
    let mut fixture = Fixture::new(0);
    fixture.driver.set_avail_idx(SIZE + 1);
    let error = fixture.ring().pop().unwrap_err();
    assert!(
        matches!(
            error,
            RingError::AvailIdxJump {
                avail_idx: 9,
                next_avail: 0,
                size: SIZE
            }
        ),
        "{error}"
    );

    let mut fixture = Fixture::new(0);
    fixture.driver.push_avail(SIZE);
    let error = fixture.ring().pop().unwrap_err();
    assert!(
        matches!(error, RingError::BadHead { head: SIZE }),
        "{error}"
    );
}

#[test]
fn avail_index_that_goes_backwards_is_refused() {
    let mut fixture = Fixture::new(0);
    fixture.driver.start_at(100);
    let mut ring = fixture.ring();
    fixture.driver.set_avail_idx(99);
    assert!(matches!(ring.pop(), Err(RingError::AvailIdxJump { .. })));
    assert!(matches!(
        ring.enable_notification(),
        Err(RingError::AvailIdxJump { .. })
    ));
}

#[test]
fn head_offered_twice_is_refused() {
    let mut fixture = Fixture::new(0);
    let head = fixture.driver.add(&[(DATA_GPA, 4)], &[]).unwrap();
    fixture.driver.push_avail(head);
    let mut ring = fixture.ring();
    let _chain = ring.pop().unwrap().unwrap();
    let error = ring.pop().unwrap_err();
    assert!(matches!(error, RingError::HeadInFlight { .. }), "{error}");
}

#[test]
fn areas_outside_memory_or_misaligned_do_not_start() {
    let fixture = Fixture::new(0);
    let good = fixture.driver.addresses();
    let bad = [
        RingAddresses { desc: 0, ..good },
        RingAddresses {
            desc: good.desc + MEMORY_BYTES - 16,
            ..good
        },
        RingAddresses {
            used: u64::MAX - 3,
            ..good
        },
        RingAddresses {
            avail: good.desc + MEMORY_BYTES,
            ..good
        },
        RingAddresses {
            desc: good.desc + 8,
            ..good
        },
        RingAddresses {
            used: good.used + 2,
            ..good
        },
        RingAddresses {
            avail: good.avail + 1,
            ..good
        },
    ];
    for addresses in bad {
        let result = Ring::start(RingConfig {
            addresses,
            ..fixture.config()
        });
        assert!(
            matches!(result, Err(RingError::BadArea { .. })),
            "{addresses:x?}"
        );
    }
    for size in [0, 3, 100, 65535] {
        let result = Ring::start(RingConfig {
            size,
            ..fixture.config()
        });
        assert!(matches!(result, Err(RingError::BadSize { .. })), "{size}");
    }
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
    let (region, _file) = InflightRegion::create(1, SIZE).unwrap();
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

#[test]
fn crash_before_completion_resubmits_in_the_order_taken() {
    let mut fixture = Fixture::new(0);
    let all: Vec<u16> = (0..5)
        .map(|_| fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap())
        .collect();
    let (region, _file) = InflightRegion::create(1, SIZE).unwrap();
    let mut ring = fixture.ring_with(&region);
    let mut chains: Vec<_> = (0..4).map(|_| ring.pop().unwrap().unwrap()).collect();
    // Completed out of order: the second one.
    ring.complete(chains.remove(1), 4);
    ring.publish();
    drop((ring, chains));

    let mut ring = fixture.ring_with(&region);
    assert_eq!(ring.state().in_flight, 3);
    assert_eq!(
        heads(&mut ring),
        [all[0], all[2], all[3], all[4]],
        "resubmitted first, then new ones"
    );
}

#[test]
fn draining_ring_yields_what_is_left_to_resubmit_and_nothing_new() {
    let mut fixture = Fixture::new(0);
    let old = fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    let (region, _file) = InflightRegion::create(1, SIZE).unwrap();
    let mut ring = fixture.ring_with(&region);
    assert_eq!(heads(&mut ring), [old]);
    drop(ring);
    fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    let mut ring = fixture.ring_with(&region);
    ring.set_intake(Intake::Closed);
    assert_eq!(heads(&mut ring), [] as [u16; 0]);
    assert_eq!(ring.left_to_resubmit(), 1);
    ring.set_intake(Intake::Draining);
    assert!(ring.has_available());
    let chain = ring.pop().unwrap().unwrap();
    assert_eq!(chain.head(), old);
    assert!(ring.pop().unwrap().is_none());
    ring.complete(chain, 4);
    assert_eq!(ring.finish().in_flight, 0);
}

#[test]
fn resubmitted_buffers_that_were_not_used_become_the_drivers_again() {
    let mut fixture = Fixture::new(0);
    let all: Vec<u16> = (0..4)
        .map(|_| fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap())
        .collect();
    let (region, _file) = InflightRegion::create(1, SIZE).unwrap();
    let mut ring = fixture.ring_with(&region);
    let mut chains: Vec<_> = (0..3).map(|_| ring.pop().unwrap().unwrap()).collect();
    ring.complete(chains.remove(0), 4);
    ring.publish();
    drop((ring, chains));

    let mut ring = fixture.ring_with(&region);
    let chain = ring.pop().unwrap().unwrap();
    ring.unpop(chain);
    let stopped = RingState {
        next_avail: 1,
        used_idx: 1,
        in_flight: 0,
        left_to_resubmit: 0,
    };
    assert_eq!(ring.finish(), stopped);
    assert_eq!(heads(&mut fixture.ring_with(&region)), all[1..]);
}

#[test]
fn requests_completed_out_of_order_are_not_rewound() {
    let mut fixture = Fixture::new(0);
    let all: Vec<u16> = (0..2)
        .map(|_| fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap())
        .collect();
    let (region, _file) = InflightRegion::create(1, SIZE).unwrap();
    let mut ring = fixture.ring_with(&region);
    let mut chains: Vec<_> = (0..2).map(|_| ring.pop().unwrap().unwrap()).collect();
    ring.complete(chains.remove(1), 4);
    ring.publish();
    drop((ring, chains));
    assert_eq!(fixture.ring_with(&region).finish().in_flight, 1);
    assert_eq!(
        heads(&mut fixture.ring_with(&region)),
        all[..1],
        "still in the region"
    );
}

#[test]
fn crash_between_publishing_and_clearing_does_not_run_the_batch_again() {
    let mut fixture = Fixture::new(0);
    let all: Vec<u16> = (0..4)
        .map(|_| fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap())
        .collect();
    let (region, _file) = InflightRegion::create(1, SIZE).unwrap();
    let mut ring = fixture.ring_with(&region);
    let mut chains: Vec<_> = (0..4).map(|_| ring.pop().unwrap().unwrap()).collect();
    ring.complete(chains.remove(2), 4);
    ring.complete(chains.remove(0), 4);
    // The crash: used->idx moves, the region does not hear of it.
    ring.areas.set_used_idx(2);
    drop((ring, chains));

    let mut ring = fixture.ring_with(&region);
    assert_eq!(heads(&mut ring), [all[1], all[3]]);
}

#[test]
fn crash_before_publishing_runs_the_batch_again() {
    let mut fixture = Fixture::new(0);
    let all: Vec<u16> = (0..3)
        .map(|_| fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap())
        .collect();
    let (region, _file) = InflightRegion::create(1, SIZE).unwrap();
    for _ in 0..3 {
        let mut ring = fixture.ring_with(&region);
        let chains: Vec<_> = (0..3).map(|_| ring.pop().unwrap().unwrap()).collect();
        assert_eq!(chains.iter().map(DescChain::head).collect::<Vec<_>>(), all);
        for chain in chains.into_iter().rev() {
            ring.complete(chain, 4);
        }
    }
}

#[test]
fn drained_ring_starts_again_anywhere() {
    let mut fixture = Fixture::new(0);
    let (region, _file) = InflightRegion::create(1, SIZE).unwrap();
    fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    let mut ring = fixture.ring_with(&region);
    let chain = ring.pop().unwrap().unwrap();
    ring.complete(chain, 4);
    assert_eq!(
        ring.finish(),
        RingState {
            next_avail: 1,
            used_idx: 1,
            in_flight: 0,
            left_to_resubmit: 0
        }
    );

    // The guest reset the driver: indices start at 0 again, the region is the same.
    fixture.driver = DriverRing::new(&fixture.memory, 0, SIZE, 0);
    let head = fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    assert_eq!(heads(&mut fixture.ring_with(&region)), [head]);
}

#[test]
fn guest_reset_during_an_outage_replays_nothing() {
    let mut fixture = Fixture::new(0);
    let (region, _file) = InflightRegion::create(1, SIZE).unwrap();
    fixture.driver.start_at(1000);
    for _ in 0..3 {
        fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    }
    let mut ring = fixture.ring_with(&region);
    assert_eq!(heads(&mut ring).len(), 3);
    drop(ring);

    fixture.driver = DriverRing::new(&fixture.memory, 0, SIZE, 0);
    let mut ring = fixture.ring_with(&region);
    assert_eq!(heads(&mut ring), [] as [u16; 0]);
    let head = fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    assert_eq!(heads(&mut ring), [head]);
}

#[test]
fn random_rings_yield_errors_or_chains_inside_memory() {
    let mut state = 0x6d6f_7274_6973_6502u64;
    let mut random = move |bound: u64| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % bound
    };
    let mut fixture = Fixture::new(EVENT_IDX | INDIRECT);
    let (mut resolved, mut refused) = (0, 0);
    for _ in 0..20_000 {
        for index in 0..SIZE {
            let table = random(4) == 0;
            for at_gpa in [u64::from(index) * 16, TABLE_GPA + u64::from(index) * 16] {
                let gpa = match random(16) {
                    0 => u64::MAX - random(64),
                    1 => MEMORY_BYTES - random(64),
                    _ if table => TABLE_GPA,
                    _ => DATA_GPA + random(0x1000),
                };
                let len = match random(16) {
                    0 => random(1 << 32) as u32,
                    _ if table => random(9) as u32 * 16,
                    _ => random(64) as u32,
                };
                let flags = [0, 0, F_NEXT, F_NEXT, F_WRITE, F_WRITE | F_NEXT][random(6) as usize];
                let flags = flags
                    | if table && random(2) == 0 {
                        F_INDIRECT
                    } else {
                        0
                    };
                fixture.driver.write_desc(
                    at_gpa,
                    gpa,
                    len,
                    flags,
                    random(u64::from(SIZE) + 1) as u16,
                );
            }
        }
        fixture.driver.start_at(random(1 << 16) as u16);
        for _ in 0..random(u64::from(SIZE)) {
            fixture
                .driver
                .push_avail(random(u64::from(SIZE) + 1) as u16);
        }
        let mut ring = fixture.ring();
        loop {
            match ring.pop() {
                Ok(None) => break,
                Err(_) => {
                    refused += 1;
                    break;
                }
                Ok(Some(chain)) => {
                    resolved += 1;
                    let readable: usize = chain.readable().iter().map(Segment::len).sum();
                    let writable: usize = chain.writable().iter().map(Segment::len).sum();
                    assert_eq!(readable, chain.readable_len_bytes() as usize);
                    assert_eq!(writable, chain.writable_len_bytes() as usize);
                    // Touches every byte: outside of memory it would not survive.
                    let mut data = vec![0; readable];
                    assert_eq!(chain.read_at(0, &mut data), readable);
                    ring.complete(chain, 0);
                    ring.notify();
                }
            }
        }
    }
    assert!(
        resolved > 1000 && refused > 1000,
        "{resolved} chains resolved, {refused} refused"
    );
}

#[test]
fn driver_that_offers_a_descriptor_again_before_it_gets_it_back_breaks_nothing() {
    let mut fixture = Fixture::new(0);
    let (region, _file) = InflightRegion::create(1, SIZE).unwrap();
    let mut ring = fixture.ring_with(&region);
    fixture.driver.set_desc(0, DATA_GPA, 16, F_WRITE, 0);
    // More than an index can count, in one batch of a device that never publishes.
    for _ in 0..70_000 {
        fixture.driver.push_avail(0);
        let chain = ring.pop().unwrap().unwrap();
        ring.complete(chain, 0);
    }
    ring.publish();
    assert_eq!(ring.state().in_flight, 0);
    assert_eq!(fixture.driver.used_idx(), fixture.driver.avail_idx());
    drop(ring);
    let successor = fixture.ring_with(&region);
    assert_eq!(successor.left_to_resubmit(), 0);
}

#[test]
fn chain_over_hundreds_of_tiny_regions_again_and_again_is_refused() {
    const PAGE: u64 = 0x1000;
    let regions: Vec<_> = (0..500).map(|page| (page * PAGE, PAGE)).collect();
    let mut fixture = Fixture::with_memory(GuestMemory::with_regions(&regions).unwrap(), INDIRECT);
    let all = (2 * PAGE, 498 * PAGE as u32);
    fixture.driver.add(&[], &[all]).unwrap();
    let table = PAGE;
    fixture
        .driver
        .add_indirect(table, &[], &[all; 200])
        .unwrap();
    let mut ring = fixture.ring();
    let once = ring.pop().unwrap().unwrap();
    assert_eq!(once.writable().len(), 498, "once is sound");
    let error = ring.pop().unwrap_err();
    assert!(matches!(error, RingError::TooScattered { .. }), "{error}");
    assert_eq!(ring.in_flight(), 1);
}
