//! Drivers that break requests, which are answered, or the ring, which stops; and nothing outside
//! of guest memory.

use super::*;

/// Where the status byte of a request lies.
const STATUS_GPA: u64 = DATA_GPA + 0x800;

/// Offers descriptor 0 after `prepare` made something of the table, answers as a device answers
/// requests that are too short, and returns what was wrong. A sound request follows: the ring goes
/// on.
#[track_caller]
fn fault_of(features: u64, prepare: impl FnOnce(&mut DriverRing)) -> (ChainFault, bool) {
    let mut fixture = Fixture::new(features);
    fixture.memory.write(STATUS_GPA, &[0xff]);
    prepare(&mut fixture.driver);
    fixture.driver.push_avail(0);
    let (region, _file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
    let mut ring = fixture.ring_with(&region);
    let answer = |ring: &mut Ring| {
        let chain = ring.pop().unwrap().unwrap();
        let fault = chain.fault().cloned();
        let status_at = chain.writable_len_bytes().checked_sub(1);
        if let Some(at) = status_at {
            chain.write_at(at as usize, &[1]);
        }
        assert_eq!(chain.readable_len_bytes(), 0, "nothing to read");
        ring.complete(chain, u32::MAX);
        ring.notify();
        fault
    };
    let fault = answer(&mut ring).expect("the chain is broken");
    assert_eq!(ring.in_flight(), 0);
    assert_eq!(
        fixture.driver.pop_used(),
        Some((0, 0)),
        "nothing was written from the start on"
    );
    let answered = fixture.memory.read(STATUS_GPA, 1) == [1];

    fixture.driver.set_desc(0, DATA_GPA, 4, F_WRITE, 0);
    fixture.driver.push_avail(0);
    assert_eq!(answer(&mut ring), None);
    assert_eq!(fixture.driver.pop_used(), Some((0, 4)), "the ring goes on");
    (fault, answered)
}

/// As [`fault_of`], for chains whose status byte cannot be found.
#[track_caller]
fn unanswered(features: u64, prepare: impl FnOnce(&mut DriverRing)) -> ChainFault {
    let (fault, answered) = fault_of(features, prepare);
    assert!(!answered, "{fault}: something was written");
    fault
}

/// As [`fault_of`], for chains that get their answer at [`STATUS_GPA`].
#[track_caller]
fn answered(features: u64, prepare: impl FnOnce(&mut DriverRing)) -> ChainFault {
    let (fault, answered) = fault_of(features, prepare);
    assert!(answered, "{fault}: no answer");
    fault
}

#[test]
fn descriptor_loop_comes_back_empty() {
    let fault = unanswered(0, |driver| {
        driver.set_desc(0, DATA_GPA, 4, F_NEXT | F_WRITE, 1);
        driver.set_desc(1, STATUS_GPA, 1, F_NEXT | F_WRITE, 0);
    });
    assert_eq!(fault, ChainFault::Loop);
}

#[test]
fn next_beyond_the_ring_comes_back_empty() {
    let fault = unanswered(0, |driver| {
        driver.set_desc(0, STATUS_GPA, 1, F_NEXT | F_WRITE, SIZE)
    });
    assert_eq!(fault, ChainFault::BadNext { next: SIZE });
}

#[test]
fn readable_after_writable_is_answered_in_the_last_writable_byte() {
    let at_the_end = answered(0, |driver| {
        driver.set_desc(0, DATA_GPA, 4, F_NEXT | F_WRITE, 1);
        driver.set_desc(1, DATA_GPA, 4, F_NEXT, 2);
        driver.set_desc(2, STATUS_GPA - 3, 4, F_WRITE, 0);
    });
    let before = answered(0, |driver| {
        driver.set_desc(0, STATUS_GPA - 3, 4, F_NEXT | F_WRITE, 1);
        driver.set_desc(1, DATA_GPA, 4, 0, 0);
    });
    assert_eq!(at_the_end, ChainFault::ReadableAfterWritable);
    assert_eq!(before, ChainFault::ReadableAfterWritable);
}

#[test]
fn addresses_outside_memory_are_answered() {
    for (gpa, len_bytes) in [
        (MEMORY_BYTES, 1),
        (MEMORY_BYTES - 1, 2),
        (u64::MAX, 1),
        (u64::MAX - 3, 16),
        (0, 1 << 31),
    ] {
        for direction in [0, F_WRITE] {
            let fault = answered(0, |driver| {
                driver.set_desc(0, gpa, len_bytes, direction | F_NEXT, 1);
                driver.set_desc(1, STATUS_GPA - 1, 2, F_WRITE, 0);
            });
            assert_eq!(fault, ChainFault::BadAddress { gpa, len_bytes });
        }
        let fault = unanswered(0, |driver| {
            driver.set_desc(0, STATUS_GPA, 1, F_WRITE | F_NEXT, 1);
            driver.set_desc(1, gpa, len_bytes, F_WRITE, 0);
        });
        assert_eq!(fault, ChainFault::BadAddress { gpa, len_bytes });
    }
}

#[test]
fn descriptors_without_bytes_are_answered() {
    for empty in [0, 1, 2] {
        let fault = answered(0, |driver| {
            let len = |index, len| if index == empty { 0 } else { len };
            driver.set_desc(0, DATA_GPA, len(0, 16), F_NEXT, 1);
            // The data ends where the status is, in case that is what is empty.
            driver.set_desc(1, STATUS_GPA - 7, len(1, 8), F_NEXT | F_WRITE, 2);
            driver.set_desc(2, STATUS_GPA - 1, len(2, 2), F_WRITE, 0);
        });
        assert_eq!(fault, ChainFault::EmptyBuffer, "descriptor {empty}");
    }
    let nothing = unanswered(0, |driver| driver.set_desc(0, DATA_GPA, 0, F_WRITE, 0));
    assert_eq!(nothing, ChainFault::EmptyBuffer);
}

#[test]
fn lone_status_byte_of_a_broken_request_counts_as_written() {
    let mut fixture = Fixture::new(0);
    let broken = &[(DATA_GPA, 0)];
    let head = fixture.driver.add(broken, &[(DATA_GPA, 1)]).unwrap();
    let mut ring = fixture.ring();
    let chain = ring.pop().unwrap().unwrap();
    assert_eq!(chain.write_at(0, &[1, 2, 3]), 1);
    ring.complete(chain, 3);
    ring.publish();
    assert_eq!(fixture.driver.pop_used(), Some((head, 1)));
}

#[test]
fn four_gibibytes_in_one_chain_are_answered() {
    let memory = GuestMemory::new(1 << 32).unwrap();
    let mut fixture = Fixture::with_memory(memory, 0);
    let status = (0xffff_0000, 1);
    fixture
        .driver
        .add(&[(0, u32::MAX), (0, 1)], &[status])
        .unwrap();
    let chain = fixture.ring().pop().unwrap().unwrap();
    assert_eq!(chain.fault(), Some(&ChainFault::TooManyBytes));
    assert_eq!(chain.write_at(0, &[7]), 1);
    assert_eq!(fixture.memory.read(status.0, 1), [7]);
}

#[test]
fn bad_indirect_tables_come_back_empty() {
    let cases: [(u64, u32, u16); 6] = [
        (0, 16, F_INDIRECT),
        (INDIRECT, 0, F_INDIRECT),
        (INDIRECT, 24, F_INDIRECT),
        (INDIRECT, (MAX_INDIRECT_DESCS + 1) * 16, F_INDIRECT),
        (INDIRECT, 16, F_INDIRECT | F_NEXT),
        (INDIRECT, !15, F_INDIRECT),
    ];
    for (features, len, flags) in cases {
        let fault = unanswered(features, |driver| {
            driver.set_desc(0, TABLE_GPA, len, flags, 1)
        });
        assert!(
            matches!(fault, ChainFault::BadIndirect { .. }),
            "{len:#x} {flags:#x}: {fault}"
        );
    }
    let outside = unanswered(INDIRECT, |driver| {
        driver.set_desc(0, u64::MAX - 15, 32, F_INDIRECT, 0)
    });
    assert!(
        matches!(outside, ChainFault::BadAddress { .. }),
        "{outside}"
    );
}

#[test]
fn bad_address_in_an_indirect_table_is_answered() {
    let fault = answered(INDIRECT, |driver| {
        driver.set_desc(0, TABLE_GPA, 32, F_INDIRECT, 0);
        driver.write_desc(TABLE_GPA, MEMORY_BYTES, 4, F_NEXT, 1);
        driver.write_desc(TABLE_GPA + 16, STATUS_GPA - 1, 2, F_WRITE, 0);
    });
    assert!(matches!(fault, ChainFault::BadAddress { .. }), "{fault}");
}

#[test]
fn nested_and_looping_indirect_tables_come_back_empty() {
    let nested = unanswered(INDIRECT, |driver| {
        driver.set_desc(0, TABLE_GPA, 16, F_INDIRECT, 0);
        driver.write_desc(TABLE_GPA, TABLE_GPA, 16, F_INDIRECT, 0);
    });
    assert!(matches!(nested, ChainFault::BadIndirect { .. }), "{nested}");
    let looping = unanswered(INDIRECT, |driver| {
        driver.set_desc(0, TABLE_GPA, 32, F_INDIRECT, 0);
        driver.write_desc(TABLE_GPA, DATA_GPA, 4, F_NEXT, 1);
        driver.write_desc(TABLE_GPA + 16, DATA_GPA, 4, F_NEXT, 0);
    });
    assert_eq!(looping, ChainFault::Loop);
    let beyond = unanswered(INDIRECT, |driver| {
        driver.set_desc(0, TABLE_GPA, 16, F_INDIRECT, 0);
        driver.write_desc(TABLE_GPA, DATA_GPA, 4, F_NEXT, 1);
    });
    assert_eq!(beyond, ChainFault::BadNext { next: 1 });
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
    // Once it takes nothing new, it still goes to sleep in order, to complete what it has.
    ring.set_intake(Intake::Closed);
    assert!(matches!(ring.enable_notification(), Ok(false)));
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
fn random_rings_yield_chains_inside_memory_and_go_on() {
    let mut state = 0x6d6f_7274_6973_6502u64;
    let mut random = move |bound: u64| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % bound
    };
    let mut fixture = Fixture::new(EVENT_IDX | INDIRECT);
    let (mut resolved, mut broken, mut stopped) = (0, 0, 0);
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
                Err(RingError::BadHead { .. }) => {
                    stopped += 1;
                    break;
                }
                Err(error) => panic!("{error}"),
                Ok(Some(chain)) => {
                    match chain.fault() {
                        None => resolved += 1,
                        Some(_) => broken += 1,
                    }
                    let readable: usize = chain.readable().iter().map(Segment::len).sum();
                    let writable: usize = chain.writable().iter().map(Segment::len).sum();
                    assert_eq!(readable, chain.readable_len_bytes() as usize);
                    assert_eq!(writable, chain.writable_len_bytes() as usize);
                    // Touches every byte: outside of memory it would not survive.
                    let mut data = vec![0; readable];
                    assert_eq!(chain.read_at(0, &mut data), readable);
                    assert_eq!(chain.zero_at(0, usize::MAX), writable);
                    ring.complete(chain, 0);
                    ring.notify();
                }
            }
        }
    }
    assert!(
        resolved > 1000 && broken > 1000 && stopped > 1000,
        "{resolved} chains resolved, {broken} broken, {stopped} rings stopped"
    );
}

#[test]
fn driver_that_offers_a_descriptor_again_before_it_gets_it_back_breaks_nothing() {
    let mut fixture = Fixture::new(0);
    let (region, _file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
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
fn chain_over_hundreds_of_tiny_regions_again_and_again_is_broken() {
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
    let again = ring.pop().unwrap().unwrap();
    assert_eq!(again.fault(), Some(&ChainFault::TooScattered));
    assert_eq!(again.writable_len_bytes(), 1);
    assert_eq!(ring.in_flight(), 2);
}
