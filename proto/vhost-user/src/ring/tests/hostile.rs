//! Drivers that break the ring: errors, and nothing outside of guest memory.

use super::*;

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
