//! MSI-X (PCI 3.0 section 6.8.2): table, pending bits, masking.
//!
//! A function has *sources* (a queue, a configuration change), each with an eventfd that anybody
//! may signal, and *vectors* that the guest programs and binds to sources. A source whose vector
//! can be delivered is tied to KVM by irqfd, so no code of ours runs for an interrupt.
//!
//! While it cannot be delivered (vector or function masked, MSI-X off) the route is masked:
//! signals then stay counted in the eventfd, which is the pending bit, and [`InterruptFabric`]
//! delivers them once when the route is unmasked.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vhost_user::eventfd;
use vhost_user::log_limit::LogLimit;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::kvm::interrupts::{InterruptFabric, MsiMessage, MsiRoute};

/// "No vector": the source raises no interrupt (Virtio 1.2 section 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;
/// Bytes of a table entry.
pub const ENTRY_LEN: u64 = 16;

/// What the guest programmed, apart from descriptors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// MSI-X Enable of the message control register.
    pub enabled: bool,
    /// Function Mask of the message control register.
    pub function_masked: bool,
    /// The table.
    pub entries: Vec<MsixEntry>,
    /// The vector of each source, or [`NO_VECTOR`].
    pub vectors: Vec<u16>,
}

/// One entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixEntry {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Mask bit of the vector control register.
    pub masked: bool,
}

/// Reset value: all vectors are masked (PCI 3.0 section 6.8.2.9).
impl Default for MsixEntry {
    fn default() -> Self {
        Self {
            address: 0,
            data: 0,
            masked: true,
        }
    }
}

/// MSI-X of one function.
pub struct Msix {
    state: MsixState,
    sources: Vec<Source>,
    fabric: Arc<dyn InterruptFabric>,
    /// The guest programs vectors at will.
    complaints: LogLimit,
}

struct Source {
    irqfd: EventFd,
    route: MsiRoute,
    /// What the route delivers now.
    message: Option<MsiMessage>,
}

impl Msix {
    /// As many vectors as sources, everything masked.
    ///
    /// # Errors
    /// No descriptor or no route is left.
    pub fn new(sources: u16, fabric: Arc<dyn InterruptFabric>) -> io::Result<Self> {
        let count = usize::from(sources);
        let sources = (0..count)
            .map(|_| {
                let irqfd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
                let route = fabric.add_msi_route(&irqfd)?;
                Ok(Source {
                    irqfd,
                    route,
                    message: None,
                })
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            state: MsixState::reset(count),
            sources,
            fabric,
            complaints: LogLimit::new(),
        })
    }

    /// What the guest programmed.
    #[must_use]
    pub fn state(&self) -> &MsixState {
        &self.state
    }

    /// Vectors in the table.
    #[must_use]
    pub fn table_len(&self) -> u16 {
        self.state.entries.len() as u16
    }

    /// The eventfd that raises the interrupt of `source`.
    #[must_use]
    pub fn irqfd(&self, source: u16) -> &EventFd {
        &self.sources[usize::from(source)].irqfd
    }

    /// The vector of `source`, or [`NO_VECTOR`], also when there is no such source.
    #[must_use]
    pub fn vector(&self, source: u16) -> u16 {
        self.state
            .vectors
            .get(usize::from(source))
            .copied()
            .unwrap_or(NO_VECTOR)
    }

    /// Binds `source` to `vector`; a vector that is not in the table unbinds it.
    pub fn set_vector(&mut self, source: u16, vector: u16) {
        let exists = usize::from(vector) < self.state.entries.len();
        let previous = std::mem::replace(
            &mut self.state.vectors[usize::from(source)],
            if exists { vector } else { NO_VECTOR },
        );
        if previous == NO_VECTOR {
            // What was signalled while nobody wanted an interrupt is not pending.
            self.sources[usize::from(source)].drain();
        }
        self.update_routes();
    }

    /// Takes the bits of the message control register.
    pub fn set_control(&mut self, enabled: bool, function_masked: bool) {
        self.state.enabled = enabled;
        self.state.function_masked = function_masked;
        self.update_routes();
    }

    /// Nothing is bound or pending any more; the table stays.
    pub fn unbind(&mut self) {
        self.state.vectors.fill(NO_VECTOR);
        self.update_routes();
        self.sources.iter().for_each(Source::drain);
    }

    /// Back to the power-on state: MSI-X off, all vectors masked, nothing bound or pending.
    pub fn reset(&mut self) {
        self.state = MsixState::reset(self.sources.len());
        self.unbind();
    }

    /// Fills `data` (4 or 8 bytes, aligned) from the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        read_dwords(offset, data, |dword| {
            let entry = self.state.entries.get(usize::try_from(dword / 4).ok()?)?;
            Some(match dword % 4 {
                0 => entry.address as u32,
                1 => (entry.address >> 32) as u32,
                2 => entry.data,
                _ => u32::from(entry.masked),
            })
        });
    }

    /// Takes a write (4 or 8 bytes, aligned) to the table.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        for (dword, bytes) in (offset / 4..).zip(data.chunks_exact(4)) {
            let Some(entry) = self.state.entries.get_mut((dword / 4) as usize) else {
                continue;
            };
            let value = u32::from_le_bytes(bytes.try_into().expect("chunks of 4 bytes"));
            match dword % 4 {
                0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !0b11),
                1 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
                2 => entry.data = value,
                _ => entry.masked = value & 1 != 0,
            }
        }
        self.update_routes();
    }

    /// Fills `data` (4 or 8 bytes, aligned) from the pending bits.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        read_dwords(offset, data, |dword| {
            let first = u16::try_from(dword.checked_mul(32)?).ok()?;
            (first < self.table_len()).then(|| {
                (0..32)
                    .filter(|bit| self.is_pending(first + bit))
                    .fold(0, |bits, bit| bits | 1 << bit)
            })
        });
    }

    /// Whether a source of `vector` was signalled and could not be delivered.
    fn is_pending(&self, vector: u16) -> bool {
        self.sources
            .iter()
            .zip(&self.state.vectors)
            .any(|(source, bound)| {
                *bound == vector && source.message.is_none() && source.is_signalled()
            })
    }

    /// Makes KVM's routes follow the guest's table.
    fn update_routes(&mut self) {
        for (source, vector) in self.sources.iter_mut().zip(&self.state.vectors) {
            let deliverable = self.state.enabled && !self.state.function_masked;
            let message = self
                .state
                .entries
                .get(usize::from(*vector))
                .filter(|entry| deliverable && !entry.masked)
                .map(|entry| MsiMessage {
                    address: entry.address,
                    data: entry.data,
                });
            if message == source.message {
                continue;
            }
            match self
                .fabric
                .set_msi_route(source.route, &source.irqfd, message)
            {
                Ok(()) => source.message = message,
                Err(error) => {
                    if let Some(withheld) = self.complaints.admit() {
                        tracing::error!(%error, vector, withheld, "cannot route an MSI-X vector: the guest will miss interrupts");
                    }
                }
            }
        }
    }
}

impl MsixState {
    fn reset(count: usize) -> Self {
        Self {
            enabled: false,
            function_masked: false,
            entries: vec![MsixEntry::default(); count],
            vectors: vec![NO_VECTOR; count],
        }
    }
}

impl Source {
    fn is_signalled(&self) -> bool {
        eventfd::is_signalled(&self.irqfd)
    }

    fn drain(&self) {
        // Nothing to take is the usual case.
        let _ = eventfd::take(&self.irqfd);
    }
}

/// Reads aligned dwords; registers that do not exist read as zeros.
fn read_dwords(offset: u64, data: &mut [u8], register: impl Fn(u64) -> Option<u32>) {
    data.fill(0);
    if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
        return;
    }
    for (dword, bytes) in (offset / 4..).zip(data.chunks_exact_mut(4)) {
        bytes.copy_from_slice(&register(dword).unwrap_or(0).to_le_bytes());
    }
}
