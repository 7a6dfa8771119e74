//! Drivers that break requests, which are answered, or the ring, which stops.

use super::*;

const STATUS_GPA: u64 = DATA_GPA + 0x800;

/// Address, length, flags.
type Desc = (u64, u32, u16);

/// Offers `descs` as one chain, answers as a device answers requests that are too short, and
/// returns what was wrong, and whether the status byte was written. A sound request follows.
#[track_caller]
fn fault_of(features: u64, descs: &[Desc]) -> (ChainFault, bool) {
    let mut packed = Packed::new(features);
    let region = packed.region();
    packed.memory.write(STATUS_GPA, &[0xff]);
    let mut ring = packed.ring_with(&region);
    let id = packed.driver.offer(descs).unwrap();
    let chain = ring.pop().unwrap().unwrap();
    let fault = chain.fault().cloned().expect("the chain is broken");
    assert_eq!(chain.readable_len_bytes(), 0, "nothing to read");
    chain.write_at(0, &[1]);
    ring.complete(chain, u32::MAX);
    ring.notify();
    assert_eq!(packed.driver.pop_used(), Some((id, 0)));
    let answered = packed.memory.read(STATUS_GPA, 1) == [1];
    packed.offer(&[3, 3]);
    assert_eq!(names(&mut ring), [3], "the ring goes on");
    (fault, answered)
}

#[test]
fn broken_requests_are_answered_where_they_can_be() {
    let status = (STATUS_GPA - 1, 2, F_WRITE);
    let next = |(gpa, len, flags): Desc| (gpa, len, flags | F_NEXT);
    let cases: [(&[Desc], bool); 8] = [
        (&[(MEMORY_BYTES, 4, F_NEXT), status], true),
        (&[(DATA_GPA, 0, F_NEXT), status], true),
        (&[next(status), (DATA_GPA, 4, 0)], true),
        (&[(DATA_GPA, 4, F_INDIRECT | F_NEXT), status], true),
        (&[next(status), (u64::MAX, 9, F_WRITE)], false),
        (&[(TABLE_GPA, 24, F_INDIRECT)], false),
        (&[(u64::MAX - 15, 32, F_INDIRECT)], false),
        (&[(DATA_GPA, 0, 0)], false),
    ];
    for (descs, expected) in cases {
        let (fault, answered) = fault_of(INDIRECT, descs);
        assert_eq!(answered, expected, "{fault}");
    }
    let (fault, _) = fault_of(0, &[(TABLE_GPA, 32, F_INDIRECT)]);
    assert!(matches!(fault, ChainFault::BadIndirect { .. }), "{fault}");
}

#[test]
fn chain_without_an_end_stops_the_ring() {
    let mut packed = Packed::new(0);
    packed
        .driver
        .write_chain(0, &[(DATA_GPA, 4, F_NEXT); SIZE as usize]);
    let mut ring = packed.ring();
    for _ in 0..2 {
        assert!(matches!(
            ring.pop(),
            Err(RingError::TooManyDescs { size: SIZE })
        ));
    }
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn driver_that_laps_the_device_stops_the_ring() {
    let mut packed = Packed::new(0);
    let mut ring = packed.ring();
    for _ in 0..SIZE {
        packed.driver.write_chain(1, &[(DATA_GPA, 4, 0)]);
    }
    let held: Vec<_> = std::iter::from_fn(|| ring.pop().unwrap()).collect();
    assert_eq!(held.len(), usize::from(SIZE));
    packed.driver.write_chain(1, &[(DATA_GPA, 4, 0)]);
    assert!(matches!(ring.pop(), Err(RingError::TooManyDescs { .. })));
}

#[test]
fn areas_outside_memory_or_misaligned_do_not_start() {
    let packed = Packed::new(0);
    let good = packed.driver.addresses();
    let bad = [
        RingAddresses { desc: 0, ..good },
        RingAddresses {
            desc: good.desc + MEMORY_BYTES - 16,
            ..good
        },
        RingAddresses {
            desc: good.desc + 8,
            ..good
        },
        RingAddresses {
            avail: good.avail + 2,
            ..good
        },
        RingAddresses {
            avail: good.desc + MEMORY_BYTES,
            ..good
        },
        RingAddresses {
            used: u64::MAX - 3,
            ..good
        },
    ];
    for addresses in bad {
        let result = Ring::start(RingConfig {
            addresses,
            ..packed.config()
        });
        assert!(
            matches!(result, Err(RingError::BadArea { .. })),
            "{addresses:x?}"
        );
    }
    for size in [0, 32769] {
        let result = Ring::start(RingConfig {
            size,
            ..packed.config()
        });
        assert!(matches!(result, Err(RingError::BadSize { .. })), "{size}");
    }
    let next_avail = SIZE | 1 << 15;
    let result = Ring::start(RingConfig {
        next_avail,
        ..packed.config()
    });
    assert!(matches!(result, Err(RingError::BadHead { head: SIZE })));
}

#[test]
fn region_of_the_other_format_does_not_start() {
    let packed = Packed::new(0);
    let (region, _) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
    let inflight = region.queue(0, SIZE);
    let result = Ring::start(RingConfig {
        inflight,
        ..packed.config()
    });
    assert!(matches!(result, Err(RingError::NoInflightSlot { .. })));
    let split = Fixture::new(0);
    let inflight = packed.region().queue(0, SIZE);
    let result = Ring::start(RingConfig {
        inflight,
        ..split.config()
    });
    assert!(matches!(result, Err(RingError::NoInflightSlot { .. })));
}

#[test]
fn random_rings_yield_chains_inside_memory() {
    let mut state = 0x6d6f_7274_6973_6503u64;
    let mut random = move |bound: u64| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % bound
    };
    let (mut resolved, mut broken, mut stopped) = (0, 0, 0);
    let packed = Packed::new(EVENT_IDX | INDIRECT);
    for _ in 0..10_000 {
        for at_gpa in (0..2 * u64::from(SIZE)).map(|index| index * 16) {
            let in_table = at_gpa >= u64::from(SIZE) * 16;
            let gpa = match random(16) {
                0 => u64::MAX - random(64),
                1 => MEMORY_BYTES - random(64),
                2 => u64::from(SIZE) * 16 + 64,
                _ => DATA_GPA + random(0x1000),
            };
            let len = [random(64), random(9) * 16, random(1 << 32)][random(3) as usize] as u32;
            let flags = [0, F_NEXT, F_WRITE, F_WRITE | F_NEXT, F_INDIRECT][random(5) as usize];
            let lap = [1 << 7, 1 << 7, 1 << 7, 1 << 15, 0][random(5) as usize];
            let mut bytes = gpa.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend((random(1 << 16) as u16).to_le_bytes());
            bytes.extend((flags | lap).to_le_bytes());
            let skip = if in_table { 64 } else { 0 };
            packed.memory.write(at_gpa + skip, &bytes);
        }
        let region = packed.region();
        let mut ring = packed.ring_with(&region);
        loop {
            match ring.pop() {
                Ok(None) => break,
                Err(RingError::TooManyDescs { .. }) => {
                    stopped += 1;
                    break;
                }
                Err(error) => panic!("{error}"),
                Ok(Some(chain)) => {
                    match chain.fault() {
                        None => resolved += 1,
                        Some(_) => broken += 1,
                    }
                    let mut data = vec![0; chain.readable_len_bytes() as usize];
                    // Touches every byte: outside of memory it would not survive.
                    assert_eq!(chain.read_at(0, &mut data), data.len());
                    if random(4) > 0 {
                        ring.complete(chain, 0);
                    }
                    ring.notify();
                    let _ = ring.enable_notification().unwrap();
                }
            }
        }
        // A region that any driver's chains went into is sound.
        let in_flight = ring.in_flight();
        drop(ring);
        assert_eq!(packed.ring_with(&region).in_flight(), in_flight);
    }
    assert!(
        resolved > 1000 && broken > 1000 && stopped > 5,
        "{resolved} chains resolved, {broken} broken, {stopped} rings stopped"
    );
}
