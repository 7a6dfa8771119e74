//! Packed rings in memory: the same promises as split ones, in another format.

mod hostile;
mod recovery;

use super::*;
use crate::driver::PackedDriverRing;
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

const PACKED: u64 = 1 << VIRTIO_F_RING_PACKED;

struct Packed {
    memory: Arc<GuestMemory>,
    driver: PackedDriverRing,
    call: EventFd,
    features: u64,
    size: u16,
}

impl Packed {
    fn new(features: u64) -> Packed {
        Packed::with_size(features, SIZE)
    }

    fn with_size(features: u64, size: u16) -> Packed {
        let memory = Arc::new(GuestMemory::new(MEMORY_BYTES).unwrap());
        Packed {
            driver: PackedDriverRing::new(&memory, 0, size, features),
            memory,
            call: EventFd::new().unwrap(),
            features: features | PACKED,
            size,
        }
    }

    fn config(&self) -> RingConfig {
        RingConfig {
            index: 0,
            size: self.size,
            features: self.features,
            addresses: self.driver.addresses(),
            memory: self.memory.table().unwrap(),
            next_avail: self.driver.raw_next_used(),
            inflight: None,
            call: Doorbell::new(self.call.try_clone().unwrap().into_fd()).ok(),
        }
    }

    fn ring(&self) -> Ring {
        let mut ring = Ring::start(self.config()).unwrap();
        // A predecessor may have died before signalling: the first look signals in any case.
        ring.notify();
        self.was_called();
        ring
    }

    fn ring_with(&self, region: &InflightRegion) -> Ring {
        Ring::start(RingConfig {
            inflight: region.queue(0, self.size),
            ..self.config()
        })
        .unwrap()
    }

    fn region(&self) -> InflightRegion {
        InflightRegion::create(RingFormat::Packed, 1, self.size)
            .unwrap()
            .0
    }

    fn was_called(&self) -> bool {
        self.call.take().unwrap()
    }

    /// Offers a request that is known by what it says.
    fn offer(&mut self, text: &[u8]) -> u16 {
        let slot = DATA_GPA + u64::from(text[0]) * 64;
        self.memory.write(slot, text);
        let half = text.len() as u32 / 2;
        let readable = [
            (slot, half),
            (slot + u64::from(half), text.len() as u32 - half),
        ];
        self.driver.add(&readable, &[(slot + 32, 16)]).unwrap()
    }
}

fn text(chain: &DescChain) -> Vec<u8> {
    let mut bytes = vec![0; chain.readable_len_bytes() as usize];
    chain.read_at(0, &mut bytes);
    bytes
}

/// First byte of each request.
fn names(ring: &mut Ring) -> Vec<u8> {
    std::iter::from_fn(|| ring.pop().unwrap().map(|chain| text(&chain)[0])).collect()
}

#[test]
fn chain_is_read_written_and_given_back() {
    let mut packed = Packed::new(0);
    let id = packed.offer(b"\x01hello");
    let mut ring = packed.ring();
    let chain = ring.pop().unwrap().unwrap();
    assert_eq!(text(&chain), b"\x01hello");
    assert_eq!((chain.readable().len(), chain.writable().len()), (2, 1));
    assert_eq!(chain.write_at(0, b"answer"), 6);
    ring.complete(chain, 6);
    assert_eq!(packed.driver.pop_used(), None, "not published yet");
    ring.notify();
    assert!(packed.was_called());
    assert_eq!(packed.driver.pop_used(), Some((id, 6)));
    assert_eq!(packed.memory.read(DATA_GPA + 64 + 32, 6), b"answer");
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn requests_complete_in_any_order_over_many_laps_in_rings_of_any_size() {
    for size in [5, 8, 12] {
        let mut packed = Packed::with_size(EVENT_IDX, size);
        let mut ring = packed.ring();
        let mut held = VecDeque::new();
        let mut expected = Vec::new();
        for round in 0..200u32 {
            let name = (round % 40) as u8;
            let id = packed.offer(&[name, 1, 2, 3]);
            let chain = ring.pop().unwrap().unwrap();
            assert_eq!(text(&chain)[0], name);
            held.push_back((chain, id, round % 16));
            // Never room for another one of three: complete the newer one, then the older.
            if held.len() == 1 && size >= 6 {
                continue;
            }
            for (chain, id, written) in held.drain(..).rev() {
                ring.complete(chain, written);
                expected.push((id, written));
            }
            assert_eq!(packed.driver.pop_used(), None);
            ring.notify();
            for expected in expected.drain(..) {
                assert_eq!(packed.driver.pop_used(), Some(expected), "{size}, {round}");
            }
        }
        assert_eq!(ring.pop().unwrap().map(drop), None);
    }
}

#[test]
fn indirect_chain_longer_than_the_ring_is_resolved() {
    let mut packed = Packed::new(INDIRECT);
    let writable: Vec<_> = (0..100).map(|index| (DATA_GPA + index * 16, 16)).collect();
    let id = packed
        .driver
        .add_indirect(TABLE_GPA, &[(DATA_GPA, 8)], &writable);
    let mut ring = packed.ring();
    let chain = ring.pop().unwrap().unwrap();
    assert_eq!((chain.readable().len(), chain.writable().len()), (1, 100));
    ring.complete(chain, 1600);
    ring.publish();
    assert_eq!(packed.driver.pop_used(), id.map(|id| (id, 1600)));
}

#[test]
fn full_ring_has_nothing_more() {
    let mut packed = Packed::new(0);
    for _ in 0..SIZE {
        packed.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    }
    let mut ring = packed.ring();
    let chains: Vec<_> = std::iter::from_fn(|| ring.pop().unwrap()).collect();
    assert_eq!(chains.len(), usize::from(SIZE));
    assert!(!ring.has_available());
    assert!(!ring.enable_notification().unwrap());
    for chain in chains {
        ring.complete(chain, 4);
    }
    ring.notify();
    for _ in 0..SIZE {
        assert!(packed.driver.pop_used().is_some());
    }
    assert!(!ring.has_available());
}

#[test]
fn driver_is_signalled_as_it_wishes() {
    let mut packed = Packed::new(0);
    let mut ring = packed.ring();
    for (flags, expected) in [(0, true), (1, false), (0, true)] {
        packed.driver.set_driver_event(0, flags);
        packed.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
        let chain = ring.pop().unwrap().unwrap();
        ring.complete(chain, 4);
        ring.notify();
        assert_eq!(packed.was_called(), expected, "flags {flags}");
        packed.driver.pop_used().unwrap();
    }
    ring.notify();
    assert!(!packed.was_called(), "nothing new was completed");
}

#[test]
fn event_position_signals_once_when_it_is_passed() {
    // Before, across and after the end of a lap.
    for (index, wrap) in [(0, true), (SIZE - 2, true), (SIZE - 1, false), (3, false)] {
        let mut packed = Packed::new(EVENT_IDX);
        packed.driver.start_at(index, wrap);
        let mut ring = packed.ring();
        let position = Position::of_raw(packed.driver.raw_next_used()).advanced(2, SIZE);
        packed.driver.set_driver_event(position.raw(), 2);
        let mut complete = || {
            packed.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
            let chain = ring.pop().unwrap().unwrap();
            ring.complete(chain, 4);
            ring.notify();
            packed.driver.pop_used().unwrap();
            packed.call.take().unwrap()
        };
        let called: Vec<bool> = (0..6).map(|_| complete()).collect();
        let expected = [false, false, true, false, false, false];
        assert_eq!(called, expected, "from {index} {wrap}");
    }
}

#[test]
fn batch_signals_when_the_event_position_is_anywhere_in_it() {
    for offset in 0..6 {
        let mut packed = Packed::new(EVENT_IDX);
        packed.driver.start_at(SIZE - 3, true);
        let mut ring = packed.ring();
        let position = Position::of_raw(packed.driver.raw_next_used()).advanced(offset, SIZE);
        packed.driver.set_driver_event(position.raw(), 2);
        for _ in 0..2 {
            packed.offer(&[7, 7, 7]);
        }
        while let Some(chain) = ring.pop().unwrap() {
            ring.complete(chain, 0);
        }
        ring.notify();
        assert_eq!(packed.was_called(), offset < 6, "offset {offset}");
    }
}

#[test]
fn driver_kicks_exactly_when_the_device_sleeps() {
    for features in [0, EVENT_IDX] {
        for (index, wrap) in [(0, true), (SIZE - 1, true), (SIZE - 2, false)] {
            let mut packed = Packed::new(features);
            packed.driver.start_at(index, wrap);
            let mut ring = packed.ring();
            for round in 0..10 {
                assert!(!ring.enable_notification().unwrap());
                packed.driver.add(&[(DATA_GPA, 4)], &[]).unwrap();
                assert!(packed.driver.needs_kick(), "round {round}: asleep");
                ring.disable_notification();
                let chain = ring.pop().unwrap().unwrap();
                ring.complete(chain, 0);
                packed.driver.add(&[(DATA_GPA, 4)], &[]).unwrap();
                assert!(!packed.driver.needs_kick(), "round {round}: awake");
                // What came without a kick shows when notifications are enabled again.
                assert!(ring.enable_notification().unwrap());
                let chain = ring.pop().unwrap().unwrap();
                ring.complete(chain, 0);
                ring.publish();
                while packed.driver.pop_used().is_some() {}
            }
        }
    }
}

#[test]
fn buffers_left_on_purpose_do_not_keep_the_worker_awake() {
    let mut packed = Packed::new(EVENT_IDX);
    let mut ring = packed.ring();
    for _ in 0..3 {
        packed.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    }
    assert!(ring.has_new().unwrap());
    assert!(!ring.enable_notification().unwrap(), "seen, and left");
    assert!(ring.has_available());
    let chain = ring.pop().unwrap().unwrap();
    assert!(!ring.enable_notification().unwrap());
    ring.unpop(chain);
    assert!(!ring.enable_notification().unwrap());
    packed.driver.add(&[], &[(DATA_GPA, 4)]).unwrap();
    assert!(packed.driver.needs_kick());
    assert!(ring.enable_notification().unwrap());
}

#[test]
fn unpopped_chains_come_again_in_their_order() {
    let mut packed = Packed::new(0);
    packed.driver.start_at(SIZE - 2, true);
    let region = packed.region();
    packed.offer(&[1, 1]);
    packed.offer(&[2, 2]);
    let mut ring = packed.ring_with(&region);
    let before = ring.state();
    let chains = [ring.pop().unwrap().unwrap(), ring.pop().unwrap().unwrap()];
    assert_eq!(ring.in_flight(), 2);
    for chain in chains.into_iter().rev() {
        ring.unpop(chain);
    }
    assert_eq!(ring.state(), before);
    assert_eq!(names(&mut ring), [1, 2]);
    drop(ring);
    assert_eq!(names(&mut packed.ring_with(&region)), [1, 2]);
}

#[test]
fn chain_unpopped_out_of_order_comes_again_first() {
    let mut packed = Packed::new(0);
    packed.offer(&[1, 1]);
    packed.offer(&[2, 2]);
    let mut ring = packed.ring();
    let [first, second] = [ring.pop().unwrap().unwrap(), ring.pop().unwrap().unwrap()];
    ring.complete(second, 0);
    ring.unpop(first);
    assert_eq!(ring.in_flight(), 1);
    let first = ring.pop().unwrap().unwrap();
    assert_eq!(text(&first), [1, 1]);
    ring.complete(first, 0);
    ring.publish();
    assert!(packed.driver.pop_used().is_some() && packed.driver.pop_used().is_some());
}

#[test]
fn ring_goes_on_where_it_stopped_with_its_wrap_counter() {
    let mut packed = Packed::new(0);
    let mut base = packed.driver.raw_next_used();
    for round in 0..20u8 {
        packed.offer(&[round, 9, 9]);
        let mut ring = Ring::start(RingConfig {
            next_avail: base,
            ..packed.config()
        })
        .unwrap();
        let chain = ring.pop().unwrap().unwrap();
        assert_eq!(text(&chain)[0], round);
        ring.complete(chain, 0);
        let state = ring.finish(Successor::Told);
        assert_eq!((state.in_flight, state.next_avail), (0, state.used_idx));
        base = state.next_avail;
        assert!(packed.driver.pop_used().is_some());
        assert_eq!(base, packed.driver.raw_next_used());
    }
}

#[test]
fn memory_change_moves_the_ring() {
    let mut packed = Packed::new(0);
    packed.offer(&[1, 1]);
    let mut ring = packed.ring();
    let chain = ring.pop().unwrap().unwrap();
    ring.set_memory(packed.memory.table().unwrap()).unwrap();
    assert_eq!(text(&chain), [1, 1], "the chain holds the old mapping");
    ring.complete(chain, 0);
    ring.publish();
    assert!(packed.driver.pop_used().is_some());
}
