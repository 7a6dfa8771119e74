//! Successors of a backend that ended in the middle of its work.

use super::*;

/// Starts a ring at places before, across and after the end of a lap, with four requests.
fn everywhere(test: impl Fn(Packed, InflightRegion)) {
    for (index, wrap) in [(0, true), (5, true), (SIZE - 1, true), (SIZE - 3, false)] {
        let mut packed = Packed::with_size(0, 2 * SIZE);
        packed.driver.start_at(index, wrap);
        for name in 1..=4 {
            packed.offer(&[name, name, name]);
        }
        let region = packed.region();
        test(packed, region);
    }
}

/// Completes all that is left, and looks whether the driver got every request back once.
fn assert_all_come_back(mut packed: Packed, mut ring: Ring, already: usize) {
    while let Some(chain) = ring.pop().unwrap() {
        ring.complete(chain, 0);
    }
    ring.notify();
    let rest = std::iter::from_fn(|| packed.driver.pop_used()).count();
    assert_eq!(already + rest, 4);
    packed.offer(&[9, 9]);
    assert_eq!(names(&mut ring), [9], "and the ring goes on");
}

#[test]
fn crash_before_completion_resubmits_in_the_order_taken() {
    everywhere(|mut packed, region| {
        let mut ring = packed.ring_with(&region);
        let mut chains: Vec<_> = (0..3).map(|_| ring.pop().unwrap().unwrap()).collect();
        ring.complete(chains.remove(1), 4);
        ring.publish();
        drop((ring, chains));
        assert!(packed.driver.pop_used().is_some());

        let ring = packed.ring_with(&region);
        assert_eq!(ring.in_flight(), 2);
        let mut again = packed.ring_with(&region);
        assert_eq!(
            names(&mut again),
            [1, 3, 4],
            "resubmitted first, then new ones"
        );
        drop((ring, again));
        let ring = packed.ring_with(&region);
        assert_all_come_back(packed, ring, 1);
    });
}

#[test]
fn crash_while_publishing_undoes_or_finishes_the_batch() {
    for step in 1..=5 {
        everywhere(|mut packed, region| {
            let mut ring = packed.ring_with(&region);
            let mut chains: Vec<_> = (0..4).map(|_| ring.pop().unwrap().unwrap()).collect();
            ring.complete(chains.remove(2), 4);
            ring.publish();
            assert!(packed.driver.pop_used().is_some());
            ring.complete(chains.remove(0), 4);
            ring.complete(chains.remove(1), 4);
            ring.packed().publish_up_to(step);
            drop((ring, chains));
            let published = std::iter::from_fn(|| packed.driver.pop_used()).count();
            assert_eq!(published, if step >= 4 { 2 } else { 0 });
            // A driver that is quick uses the places again, in its next lap.
            let expected: &[u8] = match published {
                0 => &[1, 2, 4],
                _ => &[2],
            };
            let mut ring = packed.ring_with(&region);
            assert_eq!(names(&mut ring), expected, "step {step}");
            drop(ring);
            let ring = packed.ring_with(&region);
            assert_all_come_back(packed, ring, 1 + published);
        });
    }
}

#[test]
fn driver_that_reuses_the_places_of_a_batch_at_once_does_not_undo_it() {
    let mut packed = Packed::with_size(0, 4);
    let region = packed.region();
    for round in 0..10u8 {
        let mut ring = packed.ring_with(&region);
        for name in 0..4 {
            let gpa = DATA_GPA + u64::from(name) * 64;
            packed.memory.write(gpa, &[round * 4 + name]);
            packed.driver.add(&[(gpa, 1)], &[]).unwrap();
        }
        let chains: Vec<_> = std::iter::from_fn(|| ring.pop().unwrap()).collect();
        assert_eq!(chains.len(), 4);
        chains
            .into_iter()
            .rev()
            .for_each(|chain| ring.complete(chain, 0));
        // Published, and not noted.
        ring.packed().publish_up_to(5);
        drop(ring);
        for _ in 0..4 {
            assert!(packed.driver.pop_used().is_some(), "round {round}");
        }
    }
}

#[test]
fn draining_ring_yields_what_is_left_to_resubmit_and_nothing_new() {
    everywhere(|packed, region| {
        let mut ring = packed.ring_with(&region);
        let _old = ring.pop().unwrap().unwrap();
        drop(ring);
        let mut ring = packed.ring_with(&region);
        ring.set_intake(Intake::Draining);
        let chain = ring.pop().unwrap().unwrap();
        assert_eq!(text(&chain)[0], 1);
        assert!(ring.pop().unwrap().is_none());
        ring.complete(chain, 0);
        assert_eq!(ring.finish(Successor::Told).in_flight, 0);
    });
}

#[test]
fn resubmitted_buffers_that_were_not_used_become_the_drivers_again() {
    everywhere(|mut packed, region| {
        let mut ring = packed.ring_with(&region);
        let mut chains: Vec<_> = (0..3).map(|_| ring.pop().unwrap().unwrap()).collect();
        ring.complete(chains.remove(0), 4);
        ring.publish();
        drop((ring, chains));
        assert!(packed.driver.pop_used().is_some());

        let mut ring = packed.ring_with(&region);
        let chain = ring.pop().unwrap().unwrap();
        ring.unpop(chain);
        let state = ring.finish(Successor::Told);
        assert_eq!(state.in_flight, 0);
        assert_eq!(state.next_avail, packed.driver.raw_next_used());
        let mut ring = packed.ring_with(&region);
        assert_eq!(names(&mut ring), [2, 3, 4]);
    });
}

#[test]
fn requests_completed_out_of_order_are_not_rewound() {
    everywhere(|packed, region| {
        let mut ring = packed.ring_with(&region);
        let mut chains: Vec<_> = (0..2).map(|_| ring.pop().unwrap().unwrap()).collect();
        ring.complete(chains.remove(1), 4);
        ring.publish();
        drop((ring, chains));
        assert_eq!(
            packed.ring_with(&region).finish(Successor::Told).in_flight,
            1
        );
        assert_eq!(names(&mut packed.ring_with(&region)), [1, 3, 4]);
    });
}

#[test]
fn drained_ring_starts_again_anywhere() {
    let mut packed = Packed::new(0);
    let region = packed.region();
    packed.offer(&[1, 1]);
    let mut ring = packed.ring_with(&region);
    let chain = ring.pop().unwrap().unwrap();
    ring.complete(chain, 0);
    assert_eq!(ring.finish(Successor::Told).in_flight, 0);
    // The guest reset the driver: the ring starts over, the region is the same.
    packed.driver = PackedDriverRing::new(&packed.memory, 0, SIZE, 0);
    packed.offer(&[2, 2]);
    assert_eq!(names(&mut packed.ring_with(&region)), [2]);
}

#[test]
fn driver_session_with_crashes_at_random_loses_and_doubles_nothing() {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |bound: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % bound
    };
    let mut packed = Packed::with_size(EVENT_IDX, 16);
    let region = packed.region();
    let mut ring = packed.ring_with(&region);
    let mut held: Vec<DescChain> = Vec::new();
    let mut at_the_driver = std::collections::HashMap::new();
    let (mut offered, mut returned, mut crashes) = (0u32, 0, 0);
    for _ in 0..60_000 {
        match random(8) {
            0..=2 => {
                let len = 1 + random(3) as usize;
                let buffers: Vec<_> = (0..len as u64).map(|at| (DATA_GPA + at, 1)).collect();
                if let Some(id) = packed.driver.add(&buffers, &[]) {
                    offered += 1;
                    assert_eq!(at_the_driver.insert(id, len), None);
                }
            }
            3 | 4 => held.extend(ring.pop().unwrap()),
            5 if !held.is_empty() => {
                let chain = held.swap_remove(random(held.len() as u64) as usize);
                ring.complete(chain, 0);
            }
            6 => ring.notify(),
            7 if random(30) == 0 => {
                crashes += 1;
                if random(2) == 0 {
                    ring.packed().publish_up_to(random(6) as u32);
                }
                held.clear();
                ring = packed.ring_with(&region);
            }
            _ => {}
        }
        while let Some((id, _)) = packed.driver.pop_used() {
            assert!(
                at_the_driver.remove(&id).is_some(),
                "id {id} came back twice"
            );
            returned += 1;
        }
    }
    held.into_iter().for_each(|chain| ring.complete(chain, 0));
    while let Some(chain) = ring.pop().unwrap() {
        ring.complete(chain, 0);
    }
    ring.publish();
    returned += std::iter::from_fn(|| packed.driver.pop_used()).count() as u32;
    assert_eq!(offered, returned);
    assert!(
        crashes > 100 && offered > 1000,
        "{crashes} crashes, {offered} requests"
    );
}

#[test]
fn rubbish_in_the_region_cannot_lead_outside() {
    use std::os::unix::fs::FileExt;
    let (region, file) = InflightRegion::create(RingFormat::Packed, 1, SIZE).unwrap();
    let packed = Packed::new(0);
    for seed in 0..20_000u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut bytes = [0u8; 32 + 32 * SIZE as usize];
        for (at, byte) in bytes.iter_mut().enumerate() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let is_high_byte = at % 2 == 1;
            *byte = match seed % 2 {
                0 if is_high_byte => 0,
                0 => (state >> 32) as u8 % (SIZE as u8 + 1),
                _ => (state >> 32) as u8,
            };
        }
        bytes[8..10].copy_from_slice(&1u16.to_le_bytes());
        bytes[10..12].copy_from_slice(&SIZE.to_le_bytes());
        file.write_all_at(&bytes, 0).unwrap();
        let mut ring = packed.ring_with(&region);
        assert!(ring.in_flight() <= SIZE, "seed {seed}");
        while let Ok(Some(chain)) = ring.pop() {
            ring.complete(chain, 0);
        }
        ring.notify();
    }
}
