//! Pseudo-random messages from a seed: whatever a frontend sends, the next one is served.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use super::peers::{Guest, Raw, addresses, message, state, words};
use super::*;
use crate::eventfd::EventFd;

const MESSAGES: u32 = 20_000;
const SEED: u64 = 0x6d6f_7274_6973_6501;

/// xorshift64*
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// Mostly plausible, sometimes extreme.
    fn number(&mut self, plausible: &[u64]) -> u64 {
        match self.below(8) {
            0 => self.pick(&[0, 1, u64::MAX, 1 << 31, 1 << 32, u64::MAX - 4095]),
            1 => self.next(),
            _ => self.pick(plausible),
        }
    }
}

/// A request of any kind, with fields that are right more often than not: else nothing behind
/// the first checks would be reached.
fn any_message(random: &mut Random, user_addr: u64) -> (u32, Vec<u8>) {
    let code = match random.below(40) {
        0 => random.next() as u32,
        1 => 1 + random.below(44) as u32,
        _ => random.pick(&[
            1, 5, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 24, 25, 31, 32, 34, 36, 37, 38,
        ]),
    };
    let index = random.number(&[0, 1]) as u32;
    let area = |random: &mut Random, offset: u64| random.number(&[user_addr + offset]);
    let region = |random: &mut Random| {
        words(&[
            random.number(&[0, 0x10_0000]),
            random.number(&[0x10_0000, 0x1000]),
            random.number(&[user_addr, 0x7000_0000]),
            random.number(&[0, 0x1000]),
        ])
    };
    let payload = match code {
        2 => words(&[random.number(&[1 << 30 | 1 << 32, 1 << 32, 1 << 29 | 1 << 30 | 1 << 32])]),
        16 => words(&[random.number(&[0b1001, 0b1001_0010_0000_1001])]),
        5 => {
            let count = random.number(&[1, 1, 2]) as u32;
            let mut payload = state(count, 0);
            (0..count.min(8)).for_each(|_| payload.extend(region(random)));
            payload
        }
        37 | 38 => [words(&[0]), region(random)].concat(),
        8 => state(index, random.number(&[16, 64]) as u32),
        9 => {
            let (desc, used, avail) = (area(random, 0), area(random, 0x3000), area(random, 0x2000));
            addresses(index, desc, used, avail)
        }
        10 => state(index, random.number(&[0, 5]) as u32),
        11 | 18 => state(index, random.number(&[0, 1]) as u32),
        12..=14 => words(&[u64::from(index) | random.number(&[0, 0, 0x100])]),
        24 | 25 => {
            let size = random.number(&[8, 60]) as u32;
            let mut payload = state(random.number(&[0, 4]) as u32, size);
            payload.extend(0u32.to_ne_bytes());
            payload.extend(vec![0; size.min(300) as usize]);
            payload
        }
        31 | 32 => words(&[
            random.number(&[0x1000]),
            random.number(&[0, 0x1000]),
            random.number(&[1 | 16 << 16, 2 | 16 << 16]),
        ]),
        _ => match random.below(4) {
            0 => (0..random.below(64)).map(|_| random.next() as u8).collect(),
            _ => Vec::new(),
        },
    };
    (code, payload)
}

#[test]
fn random_messages_never_keep_the_next_frontend_out() {
    let served = Served::new();
    let mut random = Random(SEED);
    let guest = Guest::new();
    let user_addr = guest.memory.layouts()[0].user_addr;
    let event = EventFd::new().unwrap();
    let fds = [guest.memory.file().as_raw_fd(), event.as_fd().as_raw_fd()];
    let deadline = Instant::now() + PATIENCE * 3;
    let mut sent = 0;
    while sent < MESSAGES && Instant::now() < deadline {
        let raw = Raw::connect(&served);
        if random.below(4) > 0 {
            raw.negotiate();
        }
        if random.below(4) > 0 {
            raw.request(5, 1, &words(&[1, 0, 0x10_0000, user_addr, 0]), &fds[..1]);
            // Whatever the driver wrote there.
            let rubbish: Vec<u8> = (0..0x200).map(|_| random.below(20) as u8).collect();
            guest.memory.write(0, &rubbish);
        }
        if random.below(4) > 0 {
            raw.request(8, 1, &state(0, 16), &[]);
            let areas = [0, 0x3000, 0x2000].map(|offset| user_addr + offset);
            raw.request(9, 1, &addresses(0, areas[0], areas[1], areas[2]), &[]);
            raw.request(12, 1, &words(&[0]), &fds[1..]);
            raw.request(18, 1, &state(0, 1), &[]);
        }
        raw.stream.set_nonblocking(true).unwrap();
        for _ in 0..1 + random.below(60) {
            let (code, payload) = any_message(&mut random, user_addr);
            let flags = random.number(&[1, 9, 9]) as u32;
            let mut bytes = message(code, flags, &payload);
            if random.below(20) == 0 {
                bytes.truncate(random.below(bytes.len() as u64) as usize);
            }
            let wanted_fds = match code {
                5 if payload.len() > 4 => (payload[0] as usize).min(8),
                12..=14 | 32 | 37 => 1,
                _ => 0,
            };
            let count = if random.below(10) == 0 {
                random.below(4) as usize
            } else {
                wanted_fds
            };
            let fd = if (12..=14).contains(&code) {
                fds[1]
            } else {
                random.pick(&[fds[0], fds[0], fds[0], fds[1]])
            };
            sent += 1;
            if send_all(&raw, &bytes, &vec![fd; count]).is_none() {
                break;
            }
        }
    }
    assert!(
        sent >= MESSAGES / 4,
        "only {sent} messages in the time given"
    );
    // Else nothing but the first checks was tried.
    let sessions = served.status().sessions;
    let queues_started = served.device.queues_started.load(Ordering::SeqCst);
    assert!(
        sessions > 50 && queues_started > 50,
        "{sessions} sessions, {queues_started} queues"
    );
    served.assert_serves();
}

/// Sends a message and reads whatever comes back; None when the backend has hung up.
fn send_all(raw: &Raw, bytes: &[u8], fds: &[RawFd]) -> Option<()> {
    let mut answers = [0; 4096];
    loop {
        let sent = raw.send(bytes, fds);
        match (&raw.stream).read(&mut answers) {
            Ok(0) => return None,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return None,
        }
        match sent {
            Ok(_) => return Some(()),
            Err(nix::Error::EAGAIN) => thread::yield_now(),
            Err(_) => return None,
        }
    }
}
