//! A disk under verified load, past the page cache, for as long as the plan says or until the console
//! says [`ENOUGH`]: what outages, crashes and upgrades of the disk's daemon look like from here.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use guest::oracle::{BLOCK_LEN, Latencies, Ledger, Summary, digest, examine};
use guest::plan::ENOUGH;
use guest::report::Report;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::disk::{self, Aligned};

/// Requests in flight, a thread for each.
const THREADS: u64 = 8;
/// Of a hundred requests, writes.
const WRITES_PERCENT: u64 = 60;
/// One flush for so many requests of a thread.
const FLUSH_EVERY: u64 = 200;
const REPORT_INTERVAL: Duration = Duration::from_millis(500);
/// Requests that take longer are told one by one.
const STALL_US: u64 = 20_000;
const STALLS_LIMIT: usize = 32;

/// Writes, reads, flushes and verifies for `seconds`, then reads all of it again.
pub(crate) fn run(device: &str, seed: u64, bytes: u64, seconds: u64) -> Report {
    let started = Instant::now();
    let opened = disk::open_direct(device, bytes, true);
    let blank = opened.and_then(|file| disk::zero_out(&file, [0, bytes]).map(|()| file));
    let file = match blank {
        Ok(file) => file,
        Err(error) => return broken(device, error),
    };
    let stress = Stress {
        device,
        file,
        started,
        ledger: Mutex::new(Ledger::new(seed, bytes / BLOCK_LEN as u64)),
        window: Mutex::default(),
        is_over: AtomicBool::new(false),
        at_work: AtomicU64::new(THREADS),
    };
    stress.run(seed, Duration::from_secs(seconds))
}

/// After a reboot: every block is whole and in its place; the digest tells whether it is also the
/// same as before.
pub(crate) fn check(device: &str, seed: u64, bytes: u64) -> Report {
    let started = Instant::now();
    let file = match disk::open_direct(device, bytes, false) {
        Ok(file) => file,
        Err(error) => return broken(device, error),
    };
    // Whoever has no ledger expects of a block only that it is one.
    let mut summary = Ledger::new(seed, bytes / BLOCK_LEN as u64);
    let mut sum = 0;
    let read = each_block(&file, bytes, |block, content| {
        sum ^= digest(block, examine(seed, content));
        summary.check_anything(block, content);
    });
    let summary = summary.summary().clone();
    Report::Oracle {
        device: device.to_owned(),
        elapsed_ms: started.elapsed().as_millis() as u64,
        last: true,
        error: read.err().or_else(|| complaint(&summary)),
        summary,
        latency: Latencies::default().spread(),
        window: Latencies::default().spread(),
        stalls: Vec::new(),
        digest: format!("{sum:016x}"),
    }
}

struct Stress<'a> {
    device: &'a str,
    file: File,
    started: Instant,
    ledger: Mutex<Ledger>,
    window: Mutex<Window>,
    is_over: AtomicBool,
    at_work: AtomicU64,
}

/// Since the last report.
#[derive(Default)]
struct Window {
    latencies: Latencies,
    stalls: Vec<u64>,
}

impl Stress<'_> {
    fn run(self, seed: u64, duration: Duration) -> Report {
        let mut all = Latencies::default();
        thread::scope(|scope| {
            let stress = &self;
            for thread in 0..THREADS {
                scope.spawn(move || stress.work(seed ^ (thread + 1) << 32));
            }
            // Requests in flight at the end are waited for, however long an outage takes.
            while stress.at_work.load(Ordering::SeqCst) > 0 {
                thread::sleep(REPORT_INTERVAL);
                if stress.started.elapsed() >= duration || is_told_enough() {
                    stress.is_over.store(true, Ordering::SeqCst);
                }
                stress.report(&mut all, None).print();
            }
        });
        let bytes = self.ledger().blocks() * BLOCK_LEN as u64;
        let mut sum = 0;
        let read = each_block(&self.file, bytes, |block, content| {
            self.ledger().check(block, content);
            sum ^= digest(block, examine(seed, content));
        });
        self.report(&mut all, Some((read, sum)))
    }

    /// One request after the other.
    fn work(&self, seed: u64) {
        let mut state = seed;
        let mut buffer = Aligned::new(BLOCK_LEN);
        let blocks = self.ledger().blocks();
        for request in 1_u64.. {
            if self.is_over.load(Ordering::SeqCst) {
                break;
            }
            let began = Instant::now();
            if request % FLUSH_EVERY == 0 {
                self.flush();
            } else {
                let block = below(&mut state, blocks);
                let wants_write = below(&mut state, 100) < WRITES_PERCENT;
                self.transfer(block, wants_write, &mut buffer);
            }
            self.note(began.elapsed());
        }
        self.at_work.fetch_sub(1, Ordering::SeqCst);
    }

    fn transfer(&self, block: u64, wants_write: bool, buffer: &mut [u8]) {
        let offset = block * BLOCK_LEN as u64;
        let write = match wants_write {
            true => self.ledger().begin_write(block, buffer),
            false => None,
        };
        if let Some(write) = write {
            let written = self.file.write_all_at(buffer, offset);
            let mut ledger = self.ledger();
            return match written {
                Ok(()) => ledger.end_write(write),
                Err(_) => ledger.fail_write(write),
            };
        }
        let read = self.ledger().begin_read(block);
        let outcome = self.file.read_exact_at(buffer, offset);
        let mut ledger = self.ledger();
        match outcome {
            Ok(()) => ledger.end_read(read, buffer),
            Err(_) => ledger.fail_read(read),
        }
    }

    fn flush(&self) {
        let flush = self.ledger().begin_flush();
        let outcome = self.file.sync_data();
        let mut ledger = self.ledger();
        match outcome {
            Ok(()) => ledger.end_flush(flush),
            Err(_) => ledger.fail_flush(flush),
        }
    }

    fn note(&self, took: Duration) {
        let us = took.as_micros() as u64;
        let mut window = lock(&self.window);
        window.latencies.note(us);
        if us > STALL_US && window.stalls.len() < STALLS_LIMIT {
            window.stalls.push(us);
        }
    }

    fn report(&self, all: &mut Latencies, end: Option<(Result<(), String>, u64)>) -> Report {
        let Window { latencies, stalls } = std::mem::take(&mut *lock(&self.window));
        all.add(&latencies);
        let summary = self.ledger().summary().clone();
        let (last, error, digest) = match end {
            None => (false, None, String::new()),
            Some((read, sum)) => (
                true,
                read.err().or_else(|| complaint(&summary)),
                format!("{sum:016x}"),
            ),
        };
        Report::Oracle {
            device: self.device.to_owned(),
            elapsed_ms: self.started.elapsed().as_millis() as u64,
            last,
            summary,
            latency: all.spread(),
            window: latencies.spread(),
            stalls,
            digest,
            error,
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.ledger)
    }
}

/// Looks at what came on the console since the last look.
fn is_told_enough() -> bool {
    let console = std::io::stdin();
    let mut polls = [PollFd::new(console.as_fd(), PollFlags::POLLIN)];
    if !matches!(poll(&mut polls, PollTimeout::ZERO), Ok(1)) {
        return false;
    }
    let mut input = [0; 256];
    match nix::unistd::read(&console, &mut input) {
        Ok(count) => String::from_utf8_lossy(&input[..count]).contains(ENOUGH),
        Err(_) => false,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn broken(device: &str, error: String) -> Report {
    Report::Oracle {
        device: device.to_owned(),
        elapsed_ms: 0,
        last: true,
        summary: Summary::default(),
        latency: Latencies::default().spread(),
        window: Latencies::default().spread(),
        stalls: Vec::new(),
        digest: String::new(),
        error: Some(error),
    }
}

fn complaint(summary: &Summary) -> Option<String> {
    (!summary.is_clean()).then(|| summary.to_string())
}

fn each_block(file: &File, bytes: u64, mut see: impl FnMut(u64, &[u8])) -> Result<(), String> {
    const CHUNK_BLOCKS: usize = 64;
    let mut buffer = Aligned::new(CHUNK_BLOCKS * BLOCK_LEN);
    let mut offset = 0;
    while offset < bytes {
        let len = buffer.len().min((bytes - offset) as usize);
        file.read_exact_at(&mut buffer[..len], offset)
            .map_err(|error| format!("read at {offset}: {error}"))?;
        let first = offset / BLOCK_LEN as u64;
        for (block, content) in (first..).zip(buffer[..len].chunks_exact(BLOCK_LEN)) {
            see(block, content);
        }
        offset += len as u64;
    }
    Ok(())
}

/// A number below `bound`, which is not 0.
fn below(state: &mut u64, bound: u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state % bound
}
