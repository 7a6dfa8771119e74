//! An image whose stretches are of every kind, in odd lengths: what any format may answer.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::sync::atomic::AtomicI64;

use super::*;
use crate::image::{DirectIo, Image, Place, SectorCipher, Task, Ticket, TicketIssuer};

/// Three sectors, so that requests begin and end anywhere in one.
const STRETCH_BYTES: u64 = 1536;
const CAPACITY_BYTES: u64 = CAPACITY_SECTORS * 512;

#[derive(Debug)]
struct Patchwork {
    file: File,
    /// Stretches that were written or zeroed by a worker and are in the file since.
    settled: Mutex<BTreeSet<u64>>,
    tickets: Arc<Tickets>,
    cipher: Option<Xor>,
    tasks: AtomicI64,
}

#[derive(Debug, Default)]
struct Tickets(AtomicI64);

impl TicketIssuer for Tickets {
    fn give_back(&self, _: u64) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Each byte by its place on the disk.
#[derive(Debug)]
struct Xor;

impl Xor {
    fn apply(offset_bytes: u64, sectors: &mut [u8]) {
        for (at, byte) in (offset_bytes..).zip(sectors) {
            *byte ^= (at / 512 * 7 + at % 251) as u8 | 1;
        }
    }
}

impl SectorCipher for Xor {
    fn encrypt(&self, offset_bytes: u64, sectors: &mut [u8]) {
        Self::apply(offset_bytes, sectors);
    }

    fn decrypt(&self, offset_bytes: u64, sectors: &mut [u8]) {
        Self::apply(offset_bytes, sectors);
    }
}

impl Patchwork {
    fn is_settled(&self, stretch: u64) -> bool {
        stretch.is_multiple_of(3) || self.settled.lock().unwrap().contains(&stretch)
    }

    fn settle(&self, offset_bytes: u64, len_bytes: u64) {
        let stretches =
            offset_bytes / STRETCH_BYTES..=(offset_bytes + len_bytes - 1) / STRETCH_BYTES;
        // Held all along: two requests may meet in one stretch.
        let mut settled = self.settled.lock().unwrap();
        for stretch in stretches {
            if stretch.is_multiple_of(3) || !settled.insert(stretch) {
                continue;
            }
            // What was zeroes is zeroes for the guest: stored, they are a cipher's of zeroes.
            let start = stretch * STRETCH_BYTES;
            let mut bytes = vec![0; STRETCH_BYTES.min(CAPACITY_BYTES - start) as usize];
            if self.cipher.is_some() {
                Xor::apply(start, &mut bytes);
            }
            self.store(start, &bytes);
        }
    }

    fn store(&self, offset_bytes: u64, bytes: &[u8]) {
        use std::os::unix::fs::FileExt;
        self.file.write_all_at(bytes, offset_bytes).unwrap();
    }
}

impl Image for Patchwork {
    fn name(&self) -> &str {
        "patchwork"
    }

    fn format(&self) -> &'static str {
        "patchwork"
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn capacity_sectors(&self) -> u64 {
        CAPACITY_SECTORS
    }

    fn physical_block_bytes(&self) -> u32 {
        512
    }

    fn punches_holes(&self) -> bool {
        true
    }

    fn direct(&self) -> Option<DirectIo> {
        None
    }

    fn locate(&self, access: Access, offset_bytes: u64, len_bytes: u64) -> Place {
        let stretch = offset_bytes / STRETCH_BYTES;
        let len_bytes = len_bytes.min((stretch + 1) * STRETCH_BYTES - offset_bytes);
        if self.is_settled(stretch) {
            self.tickets.0.fetch_add(1, Ordering::AcqRel);
            let issuer: Arc<dyn TicketIssuer> = self.tickets.clone();
            return Place::File {
                fd: self.file.as_raw_fd(),
                offset_bytes,
                len_bytes,
                ticket: Some(Ticket::new(issuer, stretch)),
            };
        }
        match access {
            Access::Read if stretch % 3 == 1 => Place::Zeroes { len_bytes },
            Access::Read | Access::Write => Place::Worker { len_bytes },
        }
    }

    fn perform(&self, task: &mut Task<'_>) -> Result<(), i32> {
        self.tasks.fetch_add(1, Ordering::AcqRel);
        let fd = self.file.as_raw_fd();
        match task {
            Task::Read {
                offset_bytes,
                buffers,
            } => {
                self.settle(*offset_bytes, buffers.len_bytes() as u64);
                buffers.read_from(fd, *offset_bytes).map(drop)
            }
            Task::Write {
                offset_bytes,
                buffers,
            } => {
                self.settle(*offset_bytes, buffers.len_bytes() as u64);
                buffers.write_to(fd, *offset_bytes).map(drop)
            }
            Task::WriteZeroes {
                offset_bytes,
                len_bytes,
                ..
            }
            | Task::Discard {
                offset_bytes,
                len_bytes,
            } => {
                self.settle(*offset_bytes, *len_bytes);
                let mut bytes = vec![0; *len_bytes as usize];
                if self.cipher.is_some() {
                    Xor::apply(*offset_bytes, &mut bytes);
                }
                self.store(*offset_bytes, &bytes);
                Ok(())
            }
            Task::Flush => self.file.sync_data().map_err(|_| libc::EIO),
        }
    }

    fn cipher(&self) -> Option<&dyn SectorCipher> {
        self.cipher
            .as_ref()
            .map(|cipher| cipher as &dyn SectorCipher)
    }
}

fn patchwork(cipher: Option<Xor>) -> (Rig, Arc<Patchwork>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(CAPACITY_BYTES).unwrap();
    let image = Arc::new(Patchwork {
        file: file.reopen().unwrap(),
        settled: Mutex::default(),
        tickets: Arc::default(),
        cipher,
        tasks: AtomicI64::new(0),
    });
    if image.cipher.is_some() {
        // The stretches that are in the file from the start hold zeroes for the guest.
        let mut bytes = vec![0; CAPACITY_BYTES as usize];
        Xor::apply(0, &mut bytes);
        image.store(0, &bytes);
    }
    let backend = Backend::new(image.clone(), ServeOptions::default());
    (rig_of(Arc::new(backend), CacheMode::WriteBack, file), image)
}

/// Random requests, a ring full at a time without overlaps, against a copy of what the disk holds.
fn replay(cipher: Option<Xor>, cache: CacheMode) {
    let (mut rig, image) = patchwork(cipher);
    rig.queue.cache = cache;
    let mut model = vec![0u8; CAPACITY_BYTES as usize];
    let mut state = 1u64;
    let mut random = |below: u64| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) % below
    };
    for round in 0..60 {
        let mut reads = BTreeMap::new();
        for slot in 0..8 {
            // Each slot has a part of the disk to itself, so that the order does not matter.
            let part = CAPACITY_SECTORS / 8;
            let sector = slot * part + random(part - 32);
            let len_bytes = (random(31) as usize + 1) * 512;
            let range = sector as usize * 512..sector as usize * 512 + len_bytes;
            match random(4) {
                0 => {
                    let byte = random(255) as u8;
                    rig.offer_at(slot, 1, sector, &vec![byte; len_bytes]);
                    model[range].fill(byte);
                }
                1 => {
                    let kind = if random(2) == 0 { 13 } else { 11 };
                    let mut payload = [0; RANGE_BYTES];
                    payload[..8].copy_from_slice(&sector.to_le_bytes());
                    payload[8..12].copy_from_slice(&(len_bytes as u32 / 512).to_le_bytes());
                    rig.offer(slot, kind, &payload);
                    model[range].fill(0);
                }
                2 if round % 8 == 0 => rig.offer(slot, 4, &[]),
                _ => {
                    rig.offer_read(slot, sector, len_bytes as u32);
                    reads.insert(slot, range);
                }
            }
        }
        rig.complete_all();
        for slot in 0..8 {
            assert_eq!(rig.status(slot), 0, "round {round}, request {slot}");
        }
        for (slot, range) in reads {
            assert!(
                rig.data(slot, range.len()) == model[range.clone()],
                "round {round}: read of {range:?} yields something else"
            );
        }
    }
    assert_eq!(
        image.tickets.0.load(Ordering::Acquire),
        0,
        "tickets are out"
    );
    assert!(image.tasks.load(Ordering::Acquire) > 0);
}

#[test]
fn stretches_of_every_kind_add_up_to_the_disk() {
    replay(None, CacheMode::WriteBack);
}

#[test]
fn stretches_of_every_kind_are_written_through() {
    replay(None, CacheMode::WriteThrough);
}

#[test]
fn cipher_changes_what_is_stored_and_not_what_is_read() {
    replay(Some(Xor), CacheMode::WriteBack);
    let (mut rig, image) = patchwork(Some(Xor));
    rig.offer_at(0, 1, 0, &[0x55; 512]);
    rig.complete_all();
    assert_eq!(rig.status(0), 0);
    use std::os::unix::fs::FileExt;
    let mut stored = [0; 512];
    image.file.read_exact_at(&mut stored, 0).unwrap();
    assert_ne!(stored, [0x55; 512]);
    Xor::apply(0, &mut stored);
    assert_eq!(stored, [0x55; 512]);
}
