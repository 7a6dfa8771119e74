//! Who may write: the latest owner alone.
//!
//! ```text
//! claim            generation lower ............................. refused
//!                  generation higher ............................ everybody before is fenced
//!                  same generation, another instance
//!                      its first session (epoch 0) .............. everybody before is fenced
//!                      a later one .............................. refused: it was taken over
//!                  same instance, epoch lower ................... refused
//!                  same instance, epoch higher .................. its former session is fenced
//!                  same instance, same epoch .................... a sibling
//! ```
//!
//! To fence a connection is to let none of its writes begin any more, and to wait until those
//! that have begun are complete. Only then is the newcomer let in, so an old write never lands
//! on a new one.
//!
//! The highest generation, and who holds it, outlive the server in a small file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::wire::{Claim, be64};

/// `MORTGENS`
const RECORD_MAGIC: u64 = 0x4d4f_5254_4745_4e53;
const RECORD_BYTES: usize = 48;
/// Written in turn, so that a torn write leaves the other.
const SLOT_OFFSETS: [u64; 2] = [0, 4096];
/// How long a newcomer waits for the writes of those before it.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);

/// Orders the owners of one disk.
#[derive(Debug)]
pub struct Fence {
    file: File,
    state: Mutex<State>,
    refused: Arc<Refused>,
}

/// What earlier owners asked for in vain.
#[derive(Debug, Default)]
struct Refused {
    clients: AtomicU64,
    writes: AtomicU64,
}

/// How much was refused because the disk has another owner by now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    /// Clients that were not let in.
    pub clients: u64,
    /// Writes and the like, of clients that were let in before.
    pub writes: u64,
}

#[derive(Debug)]
struct State {
    record: Record,
    /// Of the instance's current session; unknown after a start of the server.
    epoch: Option<u64>,
    leases: Vec<Weak<Standing>>,
}

/// What is kept in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Record {
    /// Which of the slots is newer.
    sequence: u64,
    generation: u64,
    instance: u128,
}

/// Why a claim is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error(
        "generation {claimed} is stale, {highest} has been here; this disk has another owner now"
    )]
    Stale { claimed: u64, highest: u64 },
    #[error("generation {generation} is used by another client, which took over from this one")]
    TakenOver { generation: u64 },
    #[error("writes of an earlier owner are still under way; try again")]
    Busy,
    #[error("the generation cannot be recorded ({0}); try again")]
    Record(io::Error),
}

impl Refusal {
    /// Trying again is of no use.
    pub(crate) fn is_final(&self) -> bool {
        matches!(self, Self::Stale { .. } | Self::TakenOver { .. })
    }
}

impl Fence {
    /// Uses `file`, which is empty at first, to remember. One server uses it at a time.
    ///
    /// # Errors
    /// It cannot be read, or holds something else.
    pub fn open(file: File) -> io::Result<Self> {
        let record = Record::read(&file)?;
        Ok(Self {
            file,
            state: Mutex::new(State {
                record,
                epoch: None,
                leases: Vec::new(),
            }),
            refused: Arc::default(),
        })
    }

    /// What was refused since the server began.
    pub fn refusals(&self) -> Refusals {
        Refusals {
            clients: self.refused.clients.load(Ordering::Relaxed),
            writes: self.refused.writes.load(Ordering::Relaxed),
        }
    }

    /// The highest generation that has been here.
    pub fn generation(&self) -> crate::Generation {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        crate::Generation(state.record.generation)
    }

    /// Lets a claimant in, after everybody before it has been fenced.
    pub(crate) fn admit(&self, claim: Claim) -> Result<Lease, Refusal> {
        let admitted = self.try_admit(claim);
        if admitted.as_ref().is_err_and(Refusal::is_final) {
            self.refused.clients.fetch_add(1, Ordering::Relaxed);
        }
        admitted
    }

    fn try_admit(&self, claim: Claim) -> Result<Lease, Refusal> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.leases.retain(|lease| lease.strong_count() > 0);
        let record = state.record;
        let is_same_owner =
            claim.generation == record.generation && claim.instance == record.instance;
        if claim.generation < record.generation {
            return Err(Refusal::Stale {
                claimed: claim.generation,
                highest: record.generation,
            });
        }
        if is_same_owner && state.epoch.is_some_and(|epoch| claim.epoch < epoch)
            || !is_same_owner && claim.generation == record.generation && claim.epoch > 0
        {
            return Err(Refusal::TakenOver {
                generation: claim.generation,
            });
        }
        let is_sibling = is_same_owner && state.epoch == Some(claim.epoch);
        if !is_same_owner {
            let newer = Record {
                sequence: record.sequence + 1,
                generation: claim.generation,
                instance: claim.instance,
            };
            newer.write(&self.file).map_err(Refusal::Record)?;
            state.record = newer;
        }
        if !is_sibling {
            state.epoch = None;
            fence_all(&state.leases)?;
            state.leases.clear();
            state.epoch = Some(claim.epoch);
        }
        let standing = Arc::new(Standing {
            refused: Arc::clone(&self.refused),
            ..Standing::default()
        });
        state.leases.push(Arc::downgrade(&standing));
        Ok(Lease(standing))
    }
}

fn fence_all(leases: &[Weak<Standing>]) -> Result<(), Refusal> {
    let standings: Vec<_> = leases.iter().filter_map(Weak::upgrade).collect();
    for standing in &standings {
        standing.is_fenced.store(true, Ordering::SeqCst);
    }
    let deadline = Instant::now() + DRAIN_TIMEOUT;
    for standing in &standings {
        if !standing.await_quiet(deadline) {
            return Err(Refusal::Busy);
        }
    }
    Ok(())
}

/// One connection's right to write.
#[derive(Clone, Debug)]
pub(crate) struct Lease(Arc<Standing>);

#[derive(Debug, Default)]
struct Standing {
    is_fenced: AtomicBool,
    /// Writes that have begun.
    under_way: AtomicUsize,
    quiet_lock: Mutex<()>,
    quiet: Condvar,
    refused: Arc<Refused>,
}

impl Lease {
    /// Begins a write; `None` when fenced. No lock is taken.
    pub(crate) fn enter(&self) -> Option<Entry> {
        // The order matters against `fence_all`: either it sees us, or we see it.
        self.0.under_way.fetch_add(1, Ordering::SeqCst);
        let entry = Entry(Arc::clone(&self.0));
        if self.is_fenced() {
            self.0.refused.writes.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(entry)
    }

    pub(crate) fn is_fenced(&self) -> bool {
        self.0.is_fenced.load(Ordering::SeqCst)
    }
}

impl Standing {
    fn await_quiet(&self, deadline: Instant) -> bool {
        let mut guard = self
            .quiet_lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        while self.under_way.load(Ordering::SeqCst) > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            guard = self
                .quiet
                .wait_timeout(guard, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }
}

/// A write under way; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Entry(Arc<Standing>);

impl Drop for Entry {
    fn drop(&mut self) {
        let left = self.0.under_way.fetch_sub(1, Ordering::SeqCst) - 1;
        if left == 0 && self.0.is_fenced.load(Ordering::SeqCst) {
            let guard = self.0.quiet_lock.lock();
            self.0.quiet.notify_all();
            drop(guard);
        }
    }
}

impl Record {
    fn read(file: &File) -> io::Result<Self> {
        if file.metadata()?.len() == 0 {
            return Ok(Self::default());
        }
        let slots = SLOT_OFFSETS.map(|offset| {
            let mut bytes = [0; RECORD_BYTES];
            file.read_exact_at(&mut bytes, offset).ok()?;
            Self::decode(&bytes)
        });
        slots
            .into_iter()
            .flatten()
            .max_by_key(|record| record.sequence)
            .ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the file is not empty and holds no generation; give an empty one, unless it \
                     was damaged: then one with the generation of the disk's owner is needed",
                )
            })
    }

    fn write(&self, file: &File) -> io::Result<()> {
        let slot = (self.sequence % SLOT_OFFSETS.len() as u64) as usize;
        file.write_all_at(&self.encode(), SLOT_OFFSETS[slot])?;
        file.sync_all()
    }

    fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[0..8].copy_from_slice(&RECORD_MAGIC.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.generation.to_be_bytes());
        bytes[24..40].copy_from_slice(&self.instance.to_be_bytes());
        let sum = checksum(&bytes[..40]);
        bytes[40..48].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    fn decode(bytes: &[u8; RECORD_BYTES]) -> Option<Self> {
        let is_sound = be64(bytes, 0) == RECORD_MAGIC && be64(bytes, 40) == checksum(&bytes[..40]);
        is_sound.then(|| Self {
            sequence: be64(bytes, 8),
            generation: be64(bytes, 16),
            instance: u128::from(be64(bytes, 24)) << 64 | u128::from(be64(bytes, 32)),
        })
    }
}

/// FNV-1a, against torn writes.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(generation: u64, instance: u128, epoch: u64) -> Claim {
        Claim {
            generation,
            instance,
            epoch,
        }
    }

    #[test]
    fn newer_owner_fences_older_and_outlives_a_restart() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let fence = Fence::open(file.reopen().unwrap()).unwrap();
        let old = fence.admit(claim(5, 1, 0)).unwrap();
        let sibling = fence.admit(claim(5, 1, 0)).unwrap();
        assert!(old.enter().is_some() && sibling.enter().is_some());
        let new = fence.admit(claim(6, 2, 0)).unwrap();
        assert!(old.enter().is_none() && sibling.enter().is_none());
        assert!(new.enter().is_some());
        assert!(matches!(
            fence.admit(claim(5, 1, 1)),
            Err(Refusal::Stale {
                claimed: 5,
                highest: 6
            })
        ));
        let refused = Refusals {
            clients: 1,
            writes: 2,
        };
        assert_eq!(fence.refusals(), refused);
        drop(fence);

        let fence = Fence::open(file.reopen().unwrap()).unwrap();
        assert_eq!(fence.generation(), crate::Generation(6));
        assert!(matches!(
            fence.admit(claim(5, 1, 7)),
            Err(Refusal::Stale { .. })
        ));
        fence.admit(claim(6, 2, 4)).unwrap();
    }

    #[test]
    fn within_a_generation_the_latest_client_stays() {
        let file = tempfile::tempfile().unwrap();
        let fence = Fence::open(file).unwrap();
        let crashed = fence.admit(claim(3, 1, 0)).unwrap();
        let successor = fence.admit(claim(3, 2, 0)).unwrap();
        assert!(crashed.is_fenced() && !successor.is_fenced());
        assert!(matches!(
            fence.admit(claim(3, 1, 1)),
            Err(Refusal::TakenOver { generation: 3 })
        ));
        let again = fence.admit(claim(3, 2, 1)).unwrap();
        assert!(successor.is_fenced() && !again.is_fenced());
        assert!(matches!(
            fence.admit(claim(3, 2, 0)),
            Err(Refusal::TakenOver { .. })
        ));
    }

    #[test]
    fn newcomer_waits_for_writes_that_have_begun() {
        let fence = Arc::new(Fence::open(tempfile::tempfile().unwrap()).unwrap());
        let old = fence.admit(claim(1, 1, 0)).unwrap();
        let write = old.enter().unwrap();
        let newcomer = {
            let fence = Arc::clone(&fence);
            std::thread::spawn(move || fence.admit(claim(2, 2, 0)).is_ok())
        };
        let give_up = Instant::now() + Duration::from_secs(10);
        while !old.is_fenced() {
            assert!(Instant::now() < give_up);
            std::thread::yield_now();
        }
        assert!(!newcomer.is_finished());
        drop(write);
        assert!(newcomer.join().unwrap());
    }

    #[test]
    fn torn_record_leaves_the_one_before() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let fence = Fence::open(file.reopen().unwrap()).unwrap();
        for generation in 1..=3 {
            fence.admit(claim(generation, 1, 0)).unwrap();
        }
        // Generation 3 has sequence 3, which is slot 1.
        file.as_file()
            .write_all_at(&[0xff; 8], SLOT_OFFSETS[1] + 20)
            .unwrap();
        let fence = Fence::open(file.reopen().unwrap()).unwrap();
        assert_eq!(fence.generation(), crate::Generation(2));
        file.as_file()
            .write_all_at(&[0xff; 8], SLOT_OFFSETS[0] + 20)
            .unwrap();
        assert!(Fence::open(file.reopen().unwrap()).is_err());
    }
}
