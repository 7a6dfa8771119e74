//! What the guest wrote to its console: the last 64 KiB, for any number of readers.
//!
//! Every byte has an offset in the console's whole output. A reader holds the offset it wants
//! next; one that is too slow finds that the oldest held byte lies further on. Writing never
//! waits for readers.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// How much output is kept.
pub const CAPACITY_BYTES: usize = 64 << 10;

/// The console's output.
pub struct Console {
    started: Instant,
    held: Mutex<Held>,
    /// The offset after the last byte, for threads that wait.
    grown: Condvar,
    /// The same, for tasks that wait.
    end: watch::Sender<u64>,
}

#[derive(Default)]
struct Held {
    bytes: VecDeque<u8>,
    /// Offset after the last byte.
    end: u64,
    first_byte_after: Option<Duration>,
    closed: bool,
}

/// Bytes from the console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Offset of the first byte.
    pub offset: u64,
    /// The bytes; may be empty.
    pub data: Vec<u8>,
}

impl Chunk {
    /// Where to read on.
    pub fn end(&self) -> u64 {
        self.offset + self.data.len() as u64
    }
}

impl Console {
    /// An empty console of a process that started at `started`.
    pub fn new(started: Instant) -> Self {
        Self {
            started,
            held: Mutex::default(),
            grown: Condvar::new(),
            end: watch::Sender::new(0),
        }
    }

    /// Takes output of the guest.
    pub fn push(&self, bytes: &[u8]) {
        let mut held = self.lock();
        if held.first_byte_after.is_none() && !bytes.is_empty() {
            held.first_byte_after = Some(self.started.elapsed());
        }
        held.bytes.extend(bytes);
        let excess = held.bytes.len().saturating_sub(CAPACITY_BYTES);
        held.bytes.drain(..excess);
        held.end += bytes.len() as u64;
        self.announce(&held);
    }

    /// No more output will come: readers are told once they have read everything.
    pub fn close(&self) {
        let mut held = self.lock();
        held.closed = true;
        self.announce(&held);
    }

    /// What is held from `offset` on; `None` when there is nothing and never will be.
    pub fn read(&self, offset: u64) -> Option<Chunk> {
        let held = self.lock();
        let chunk = held.from(offset);
        (!chunk.data.is_empty() || !held.closed).then_some(chunk)
    }

    /// Like [`Self::read`], but waits up to `patience` for something.
    pub fn wait_and_read(&self, offset: u64, patience: Duration) -> Option<Chunk> {
        let idle = |held: &mut Held| held.end <= offset && !held.closed;
        let (held, _) = self
            .grown
            .wait_timeout_while(self.lock(), patience, idle)
            .expect("no panic while locked");
        drop(held);
        self.read(offset)
    }

    /// The offset after the last byte.
    pub fn end(&self) -> u64 {
        self.lock().end
    }

    /// Changes whenever there is new output, or none will come any more.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.end.subscribe()
    }

    /// From the start of the process to the first byte.
    pub fn first_byte_after(&self) -> Option<Duration> {
        self.lock().first_byte_after
    }

    fn announce(&self, held: &Held) {
        self.grown.notify_all();
        self.end.send_replace(held.end);
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().expect("no panic while locked")
    }
}

impl Held {
    fn from(&self, offset: u64) -> Chunk {
        let oldest = self.end - self.bytes.len() as u64;
        let offset = offset.clamp(oldest, self.end);
        let skip = (offset - oldest) as usize;
        Chunk {
            offset,
            data: self.bytes.range(skip..).copied().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn console() -> Console {
        Console::new(Instant::now())
    }

    #[test]
    fn reader_gets_what_is_held_from_its_offset() {
        let console = console();
        console.push(b"hello ");
        console.push(b"world");
        assert_eq!(
            console.read(6),
            Some(Chunk {
                offset: 6,
                data: b"world".to_vec()
            })
        );
        assert_eq!(
            console.read(u64::MAX),
            Some(Chunk {
                offset: 11,
                data: vec![]
            })
        );
        assert_eq!(console.end(), 11);
    }

    #[test]
    fn slow_reader_sees_a_jump_in_the_offset() {
        let console = console();
        console.push(&vec![b'a'; CAPACITY_BYTES]);
        console.push(b"bc");
        let chunk = console.read(0).unwrap();
        assert_eq!((chunk.offset, chunk.data.len()), (2, CAPACITY_BYTES));
        assert!(chunk.data.ends_with(b"abc"));
        assert_eq!(chunk.end(), CAPACITY_BYTES as u64 + 2);
    }

    #[test]
    fn waiting_reader_wakes_for_output_and_for_the_end() {
        let console = console();
        let patience = Duration::from_secs(5);
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let first = console.wait_and_read(0, patience).unwrap();
                (first.data, console.wait_and_read(1, patience))
            });
            console.push(b"x");
            console.close();
            assert_eq!(reader.join().unwrap(), (b"x".to_vec(), None));
        });
        assert!(console.first_byte_after().is_some());
    }
}
