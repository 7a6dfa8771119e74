//! Successors of a backend that ended in the middle of its work.

use super::*;

#[test]
fn crash_before_completion_resubmits_in_the_order_taken() {
    let mut fixture = Fixture::new(0);
    let all: Vec<u16> = (0..5)
        .map(|_| fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap())
        .collect();
    let (region, _file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
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
    let (region, _file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
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
    assert_eq!(ring.finish(Successor::Told).in_flight, 0);
}

#[test]
fn resubmitted_buffers_that_were_not_used_become_the_drivers_again() {
    let mut fixture = Fixture::new(0);
    let all: Vec<u16> = (0..4)
        .map(|_| fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap())
        .collect();
    let (region, _file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
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
    assert_eq!(ring.finish(Successor::Told), stopped);
    assert_eq!(heads(&mut fixture.ring_with(&region)), all[1..]);
}

#[test]
fn requests_completed_out_of_order_are_not_rewound() {
    let mut fixture = Fixture::new(0);
    let all: Vec<u16> = (0..2)
        .map(|_| fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap())
        .collect();
    let (region, _file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
    let mut ring = fixture.ring_with(&region);
    let mut chains: Vec<_> = (0..2).map(|_| ring.pop().unwrap().unwrap()).collect();
    ring.complete(chains.remove(1), 4);
    ring.publish();
    drop((ring, chains));
    assert_eq!(
        fixture.ring_with(&region).finish(Successor::Told).in_flight,
        1
    );
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
    let (region, _file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
    let mut ring = fixture.ring_with(&region);
    let mut chains: Vec<_> = (0..4).map(|_| ring.pop().unwrap().unwrap()).collect();
    ring.complete(chains.remove(2), 4);
    ring.complete(chains.remove(0), 4);
    // The crash: used->idx moves, the region does not hear of it.
    ring.split().publish_half();
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
    let (region, _file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
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
    let (region, _file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
    fixture.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    let mut ring = fixture.ring_with(&region);
    let chain = ring.pop().unwrap().unwrap();
    ring.complete(chain, 4);
    assert_eq!(
        ring.finish(Successor::Told),
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
    let (region, _file) = InflightRegion::create(RingFormat::Split, 1, SIZE).unwrap();
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
