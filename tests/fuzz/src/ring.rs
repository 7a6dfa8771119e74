//! A driver that may write anything into its ring: nothing outside its memory is touched, no more is
//! in flight than the ring holds, and what is counted adds up.

use std::ops::Range;
use std::sync::Arc;

use vhost_user::driver::GuestMemory;
use vhost_user::memory::MemoryTable;
use vhost_user::ring::{Batch, DescChain, Ring, RingAddresses, RingConfig, Segment, Successor};
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::input::Input;

const REGION_BYTES: u64 = 0x4000;
/// Two regions with a gap between them.
const REGIONS: [u64; 2] = [0, 0x8000];
const AVAIL: u64 = 0x400;
const USED: u64 = 0x500;
/// So that the areas do not overlap.
const MAX_SIZE_LOG2: u8 = 6;

/// A guest's memory, and what of it a device has mapped.
pub(crate) struct Guest {
    memory: GuestMemory,
    pub(crate) table: Arc<MemoryTable>,
}

impl Guest {
    fn new() -> Self {
        let memory = GuestMemory::with_regions(&REGIONS.map(|gpa| (gpa, REGION_BYTES)));
        let memory = memory.expect("memory");
        let table = memory.table().expect("regions that do not overlap");
        Self { memory, table }
    }

    /// Begins with `image`; the rest is zeroes.
    fn load(&self, image: &[u8]) {
        let zeroes = [0; REGION_BYTES as usize];
        for gpa in REGIONS {
            self.memory.write(gpa, &zeroes);
        }
        let len = image.len().min(REGION_BYTES as usize);
        self.memory.write(0, &image[..len]);
    }

    fn mapped(&self) -> impl Iterator<Item = Range<usize>> {
        self.table.regions().iter().map(|region| {
            let start = region.mapping().as_ptr().as_ptr().addr();
            start..start + region.mapping().len_bytes()
        })
    }

    fn assert_mapped(&self, segments: &[Segment]) {
        for segment in segments {
            let (start, len) = (segment.as_ptr().addr(), segment.len());
            let inside =
                |mapped: Range<usize>| mapped.contains(&start) && start + len <= mapped.end;
            assert!(
                len > 0 && self.mapped().any(inside),
                "a segment outside of guest memory"
            );
        }
    }

    pub(crate) fn touch(&self, chain: &DescChain) {
        self.assert_mapped(chain.readable());
        self.assert_mapped(chain.writable());
        let mut head = [0; 64];
        let read = chain.read_at(0, &mut head);
        assert!(read <= chain.readable_len_bytes() as usize);
        let written = chain.write_at(0, &head);
        assert!(written <= chain.writable_len_bytes() as usize);
    }
}

thread_local! {
    static GUEST: Guest = Guest::new();
}

/// Does something with a guest whose memory begins with `image`.
pub(crate) fn with_guest(image: &[u8], act: impl FnOnce(&Guest)) {
    GUEST.with(|guest| {
        guest.load(image);
        act(guest);
    });
}

/// A ring at the fixed addresses, as the input's next four bytes shape it.
pub(crate) fn config(input: &mut Input<'_>, guest: &Guest) -> RingConfig {
    let flags = input.byte();
    let feature = |flag: u8, bit: u32| u64::from(flags >> flag & 1) << bit;
    RingConfig {
        index: 0,
        size: 1 << (input.byte() % (MAX_SIZE_LOG2 + 1)),
        features: feature(0, VIRTIO_F_RING_PACKED)
            | feature(1, VIRTIO_RING_F_EVENT_IDX)
            | feature(2, VIRTIO_RING_F_INDIRECT_DESC),
        addresses: addresses(),
        memory: Arc::clone(&guest.table),
        next_avail: input.half(),
        inflight: None,
        call: None,
    }
}

fn addresses() -> RingAddresses {
    GUEST.with(|guest| {
        let user_addr = guest.memory.layouts()[0].user_addr;
        RingAddresses {
            desc: user_addr,
            avail: user_addr + AVAIL,
            used: user_addr + USED,
        }
    })
}

/// The ring's shape, how many steps, the steps, and what is in memory.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let shape = input.bytes(4);
    let len = usize::from(input.byte());
    let steps = input.bytes(len);
    with_guest(input.0, |guest| {
        let config = config(&mut Input(shape), guest);
        if let Ok(ring) = Ring::start(config) {
            Device::new(guest, ring).run(Input(steps));
        }
    });
}

/// What holds requests and completes them.
struct Device<'a> {
    guest: &'a Guest,
    ring: Ring,
    held: Vec<DescChain>,
}

impl<'a> Device<'a> {
    fn new(guest: &'a Guest, ring: Ring) -> Self {
        let held = Vec::new();
        Self { guest, ring, held }
    }

    /// Until the steps end, or the driver broke the ring.
    fn run(mut self, mut steps: Input<'_>) {
        while !steps.is_empty() {
            if self.step(&mut steps).is_none() {
                break;
            }
            let in_flight = usize::from(self.ring.in_flight());
            assert!(
                in_flight <= usize::from(self.ring.size()),
                "{in_flight} in flight"
            );
            let known = self.held.len() + usize::from(self.ring.left_to_resubmit());
            assert_eq!(in_flight, known, "requests in flight");
        }
        for chain in std::mem::take(&mut self.held) {
            self.ring.complete(chain, 1);
        }
        let state = self.ring.finish(Successor::Told);
        assert_eq!(
            state.in_flight, state.left_to_resubmit,
            "all others were completed"
        );
    }

    fn step(&mut self, steps: &mut Input<'_>) -> Option<()> {
        match steps.byte() % 11 {
            0 | 1 => {
                if let Some(chain) = self.ring.pop().ok()? {
                    self.guest.touch(&chain);
                    self.held.push(chain);
                }
            }
            2 if !self.held.is_empty() => {
                let chain = self.held.remove(0);
                self.ring.complete(chain, steps.byte().into());
            }
            3 => {
                if let Some(chain) = self.held.pop() {
                    self.ring.complete(chain, u32::MAX);
                }
            }
            4 => {
                if let Some(chain) = self.held.pop() {
                    self.ring.unpop(chain);
                }
            }
            5 => self.ring.notify(),
            6 => {
                self.ring.has_available();
                self.ring.has_new().ok()?;
            }
            7 => drop(self.ring.enable_notification().ok()?),
            8 => self.ring.disable_notification(),
            9 => {
                // The driver writes while the device works.
                let gpa = u64::from(steps.half()) % (REGION_BYTES - 1);
                self.guest.memory.write(gpa, &steps.half().to_le_bytes());
            }
            10 => self.take_batch(steps.byte().into())?,
            _ => {}
        }
        Some(())
    }

    fn take_batch(&mut self, max: usize) -> Option<()> {
        let mut batch = Batch::new();
        let taken = self.ring.pop_batch(&mut batch, max);
        for index in 0..batch.len() {
            let chain = batch.chain(index);
            self.guest.assert_mapped(chain.readable());
            self.guest.assert_mapped(chain.writable());
        }
        self.ring.complete_all(&mut batch);
        taken.ok()?;
        Some(())
    }
}
