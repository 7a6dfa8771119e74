use std::collections::HashMap;
use std::sync::atomic::AtomicBool;

use super::*;

fn mac(number: u32) -> [u8; 6] {
    let [a, b, c, d] = number.to_be_bytes();
    [0x52, 0x54, a, b, c, d]
}

const SHARE: usize = 256;

fn learn(table: &MacTable, key: Key, port: PortNumber, now_s: u32) -> bool {
    table.learn(key, port, now_s, SHARE)
}

/// A generator of numbers that come again with the same seed (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[test]
fn address_moves_ages_and_is_refreshed() {
    let table = MacTable::new();
    let key = Key::new(mac(1), 0);
    assert_eq!(table.port_of(key, 0), None);
    assert!(learn(&table, key, 3, 0));
    assert_eq!(table.port_of(key, AGING_SECONDS), Some(3));
    assert_eq!(table.port_of(key, AGING_SECONDS + 1), None, "aged");
    assert!(learn(&table, key, 4, 10));
    assert_eq!(table.port_of(key, 10), Some(4), "moved");
    assert!(learn(&table, key, 4, 200));
    assert_eq!(
        table.port_of(key, 10 + AGING_SECONDS + 1),
        Some(4),
        "seen again"
    );
    assert_eq!(
        table.port_of(Key::new(mac(1), 7), 200),
        None,
        "of another VLAN"
    );
    table.forget(4);
    assert_eq!(table.port_of(key, 200), None);
}

#[test]
fn address_that_a_port_was_given_cannot_be_taken_from_it() {
    let table = MacTable::new();
    let key = Key::new(mac(1), 5);
    assert!(learn(&table, key, 9, 0));
    table.pin(key, 1).unwrap();
    assert!(!learn(&table, key, 9, 1), "somebody pretends to be it");
    assert_eq!(table.port_of(key, u32::MAX), Some(1));
    assert_eq!(table.pin(key, 2), Err(PinError::Taken));
    table.forget(2);
    assert_eq!(table.port_of(key, 0), Some(1));
    table.forget(1);
    assert_eq!(table.port_of(key, 0), None);
}

#[test]
fn guest_that_makes_addresses_up_forgets_only_its_own() {
    let table = MacTable::new();
    for honest in 0..500 {
        table.pin(Key::new(mac(honest), 0), 1).unwrap();
        learn(
            &table,
            Key::new(mac(10_000 + honest), 0),
            (10 + honest % 100) as u16,
            0,
        );
    }
    for made_up in 0..200_000 {
        learn(&table, Key::new(mac(1_000_000 + made_up), 0), 2, 1);
    }
    let mut known = 0;
    for honest in 0..500 {
        assert_eq!(table.port_of(Key::new(mac(honest), 0), 1), Some(1));
        known += usize::from(
            table
                .port_of(Key::new(mac(10_000 + honest), 0), 1)
                .is_some(),
        );
    }
    assert!(known >= 495, "{known} of 500 are known");
    assert!(table.lock()[2] <= SHARE);
    // Once they are old, it may have new ones.
    assert!(learn(&table, Key::new(mac(5), 9), 2, 2 + AGING_SECONDS));
    assert_eq!(
        table.port_of(Key::new(mac(5), 9), 2 + AGING_SECONDS),
        Some(2)
    );
}

#[test]
fn table_says_what_a_plain_map_says_or_nothing() {
    for seed in 1..=20 {
        let table = MacTable::new();
        let mut model: HashMap<Key, (PortNumber, u32, bool)> = HashMap::new();
        let mut numbers = Numbers(seed);
        let mut now_s = 0;
        let mut forgotten = 0;
        for _ in 0..5000 {
            let key = Key::new(mac(numbers.below(600) as u32), numbers.below(3) as u16);
            let port = numbers.below(12) as PortNumber;
            match numbers.below(100) {
                0 => now_s += numbers.below(200) as u32,
                1 => {
                    table.forget(port);
                    model.retain(|_, (at, ..)| *at != port);
                }
                2..=4 => {
                    let others = model
                        .get(&key)
                        .is_some_and(|known| known.2 && known.0 != port);
                    let pinned = table.pin(key, port);
                    assert_eq!(pinned.is_err(), others);
                    if !others {
                        model.insert(key, (port, 0, true));
                    }
                }
                5..=60 => {
                    let is_pinned = model.get(&key).is_some_and(|known| known.2);
                    let may = !is_pinned || model[&key].0 == port;
                    assert_eq!(learn(&table, key, port, now_s), may);
                    if !is_pinned {
                        model.insert(key, (port, now_s, false));
                    }
                }
                _ => {
                    let expected = model.get(&key).filter(|(_, seen_s, is_pinned)| {
                        *is_pinned || now_s - seen_s <= AGING_SECONDS
                    });
                    let found = table.port_of(key, now_s);
                    match (found, expected) {
                        (Some(port), Some(known)) => assert_eq!(port, known.0),
                        (Some(port), None) => panic!("{key:?} at {port}, unknown to the model"),
                        (None, known) => forgotten += u32::from(known.is_some()),
                    }
                }
            }
        }
        // A bucket may be full of others.
        assert!(forgotten < 50, "seed {seed}: {forgotten} forgotten");
    }
}

#[test]
fn lookup_beside_a_writer_never_tells_of_another_address() {
    let table = MacTable::new();
    let ends = AtomicBool::new(false);
    // Address n is only ever at port n % 7.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut numbers = Numbers(99);
            while !ends.load(Ordering::Relaxed) {
                let number = numbers.below(3000) as u32;
                learn(&table, Key::new(mac(number), 0), (number % 7) as u16, 0);
                if number.is_multiple_of(1000) {
                    table.forget((number / 1000 % 7) as u16);
                }
            }
        });
        let mut numbers = Numbers(7);
        let mut found = 0;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while found < 100_000 && std::time::Instant::now() < deadline {
            let number = numbers.below(3000) as u32;
            if let Some(port) = table.port_of(Key::new(mac(number), 0), 0) {
                assert_eq!(u32::from(port), number % 7);
                found += 1;
            }
        }
        ends.store(true, Ordering::Relaxed);
        assert!(found >= 100_000, "{found}");
    });
}
