//! What a backend is told, replayed as one transaction on every connection.
//!
//! ```text
//!  connect ─ handshake ─────────────────────────────── start ──────────────────────── stop
//!            owner, features, protocol features,        features, memory, in-flight    GET_VRING_BASE
//!            queue number, configuration space          region, rings, enable          of each ring
//! ```
//!
//! `handshake` needs nothing but a connection. `start` needs what the driver chose, an
//! [`Activation`]: plain data, and all there is to replay on the next incarnation of a backend.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use vhost::VringConfigData;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use vmm_sys_util::eventfd::EventFd;

use super::connection::{Connection, RequestError};
use super::memory::MemoryTable;
use crate::ring::RingFormat;

/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// The protocol features this end makes use of.
const WANTED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
/// Offset of `idx` in the used ring (Virtio 1.2 section 2.7.8).
const USED_IDX_OFFSET: u64 = 2;
/// 256 rings of 32768 descriptors need 128 MiB; nobody needs more.
const INFLIGHT_LIMIT_BYTES: u64 = 128 << 20;

/// One ring as the driver set it up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Index of the virtqueue.
    pub index: u16,
    /// Descriptors in the ring.
    pub size: u16,
    /// Descriptor area, a guest physical address.
    pub desc_gpa: u64,
    /// Driver area (available ring).
    pub driver_gpa: u64,
    /// Device area (used ring).
    pub device_gpa: u64,
    /// Where the ring goes on if it was stopped in order, as SET_VRING_BASE has it; `None` after a
    /// loss of the backend: then the used ring in guest memory tells, or for a packed ring the
    /// in-flight region.
    pub base: Option<u32>,
}

/// What the driver chose when it set DRIVER_OK.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activation {
    /// Acknowledged virtio features.
    pub features: u64,
    /// The enabled rings.
    pub queues: Vec<QueueState>,
}

/// The descriptors of one ring.
#[derive(Debug)]
pub struct QueueEvents {
    /// Signalled by the driver's doorbell.
    pub kick: EventFd,
    /// Raises the driver's interrupt.
    pub call: EventFd,
}

/// What a backend offers, learnt by [`handshake`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Virtio features, with the transport's own bits.
    pub features: u64,
    /// Protocol features that are in use on this connection.
    pub protocol_features: VhostUserProtocolFeatures,
    /// GET_QUEUE_NUM's answer, if the backend offers MQ.
    pub queue_num: Option<u64>,
    /// Device configuration space, if the backend serves one.
    pub config: Option<Vec<u8>>,
}

impl Offer {
    /// Whether requests in flight survive a crash of the backend.
    #[must_use]
    pub fn tracks_inflight(&self) -> bool {
        self.protocol_features
            .contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    }
}

/// The shared region in which a backend notes what it works on. Outlives backends.
#[derive(Clone)]
pub struct InflightRegion {
    description: VhostUserInflight,
    file: Arc<File>,
}

/// A session could not be set up or taken down.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A request failed.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// Features that the guest uses are gone.
    #[error(
        "the backend no longer offers features {missing:#x} that the guest's driver uses: \
         start a backend that offers at least features {acked:#x}"
    )]
    FeaturesLost {
        /// What the guest acknowledged.
        acked: u64,
        /// What of it is not offered.
        missing: u64,
    },
    /// The backend's in-flight region is none.
    #[error("the backend's in-flight region is not usable: {0}")]
    Inflight(&'static str),
    /// The in-flight region could not be made tamper-proof.
    #[error("cannot make a sealed copy of the in-flight region")]
    SealInflight(#[source] io::Error),
    /// Nobody knows where a packed ring stands.
    #[error(
        "the backend was lost and kept no in-flight region, so nobody knows where the packed ring of \
         queue {index} stands: the guest's driver must reset the device"
    )]
    PackedRingLost {
        /// The queue.
        index: u16,
    },
    /// A used ring lies outside memory.
    #[error("cannot read the used ring of queue {index}")]
    UsedRing {
        /// The queue.
        index: u16,
        /// The read's error.
        #[source]
        source: io::Error,
    },
}

/// Claims the backend and learns what it offers, with the first `config_len` bytes of the device
/// configuration space.
///
/// # Errors
/// A request failed.
pub fn handshake(connection: &mut Connection, config_len: u16) -> Result<Offer, SessionError> {
    connection.set_owner()?;
    let features = connection.features()?;
    let mut offer = Offer {
        features,
        protocol_features: VhostUserProtocolFeatures::empty(),
        queue_num: None,
        config: None,
    };
    if features & F_PROTOCOL_FEATURES == 0 {
        return Ok(offer);
    }
    offer.protocol_features = connection.protocol_features()? & WANTED;
    connection.set_protocol_features(offer.protocol_features)?;
    // Before the configuration is read: no change goes unnoticed.
    if offer
        .protocol_features
        .contains(VhostUserProtocolFeatures::BACKEND_REQ)
    {
        connection.open_channel()?;
    }
    if offer
        .protocol_features
        .contains(VhostUserProtocolFeatures::MQ)
    {
        offer.queue_num = Some(connection.queue_num()?);
    }
    if offer
        .protocol_features
        .contains(VhostUserProtocolFeatures::CONFIG)
        && config_len > 0
    {
        offer.config = Some(connection.config(config_len)?);
    }
    Ok(offer)
}

/// Starts the rings of `activation`. `told_memory` says whether this connection has the memory table
/// already, and is updated.
///
/// Rings are enabled before a kick descriptor starts the first of them, which the specification leaves
/// open. A network backend that is kicked for its transmit ring while its receive ring is not enabled
/// yet loses the answer, and passt then answers no more.
///
/// # Errors
/// A request failed, or the backend does not fit what the driver chose; the connection must then
/// be dropped, for the backend is in between.
pub fn start(
    connection: &mut Connection,
    offer: &Offer,
    activation: &mut Activation,
    inflight: &mut Option<InflightRegion>,
    resources: &Resources<'_>,
    told_memory: &mut bool,
) -> Result<(), SessionError> {
    let missing = activation.features & !offer.features;
    if missing != 0 {
        return Err(SessionError::FeaturesLost {
            acked: activation.features,
            missing,
        });
    }
    connection.set_features(activation.features | offer.features & F_PROTOCOL_FEATURES)?;
    if !*told_memory {
        if offer
            .protocol_features
            .contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
        {
            connection.add_mem_regions(resources.memory)?;
        } else {
            connection.set_mem_table(resources.memory)?;
        }
        *told_memory = true;
    }
    match offer.tracks_inflight() {
        true => share_inflight(connection, activation, inflight)?,
        // What an earlier backend noted says nothing once one has served that notes nothing.
        false => *inflight = None,
    }
    let format = RingFormat::of(activation.features);
    for queue in &activation.queues {
        let base = base_of(queue, format, inflight.is_some(), resources)?;
        set_up_queue(connection, queue, base, resources)?;
    }
    if offer.features & F_PROTOCOL_FEATURES != 0 {
        for queue in &activation.queues {
            connection.set_vring_enable(queue.index, true)?;
        }
    }
    // From here on a ring moves, so that its noted base holds no longer: guest memory says where a split one
    // is. Of a packed one the region does, but not before the backend has begun.
    let keeps_base = format == RingFormat::Packed && inflight.is_some();
    for queue in &mut activation.queues {
        if !keeps_base {
            queue.base = None;
        }
        let kick = &resources.queues[usize::from(queue.index)].kick;
        connection.set_vring_kick(queue.index, kick)?;
    }
    // Without REPLY_ACK only a request with an answer tells that all the others arrived.
    connection.features()?;
    for queue in &mut activation.queues {
        queue.base = None;
    }
    Ok(())
}

/// Stops the rings and notes where they stopped.
///
/// # Errors
/// A request failed; the connection must then be dropped, which stops the rings too.
pub fn stop(connection: &mut Connection, activation: &mut Activation) -> Result<(), SessionError> {
    for queue in &mut activation.queues {
        queue.base = Some(connection.vring_base(queue.index)?);
    }
    Ok(())
}

/// What of this process a backend shares.
pub struct Resources<'a> {
    /// Guest memory.
    pub memory: &'a MemoryTable,
    /// By queue index.
    pub queues: &'a [QueueEvents],
    /// Signalled by a backend when a ring is broken.
    pub err: &'a EventFd,
}

/// Where a ring goes on.
fn base_of(
    queue: &QueueState,
    format: RingFormat,
    tracks_inflight: bool,
    resources: &Resources<'_>,
) -> Result<u32, SessionError> {
    let index = queue.index;
    match (queue.base, format) {
        (Some(base), _) => Ok(base),
        (None, RingFormat::Split) => resources
            .memory
            .read_u16(queue.device_gpa + USED_IDX_OFFSET)
            .map(u32::from)
            .map_err(|source| SessionError::UsedRing { index, source }),
        // The backend goes on where the region says.
        (None, RingFormat::Packed) if tracks_inflight => Ok(first_base(format)),
        (None, RingFormat::Packed) => Err(SessionError::PackedRingLost { index }),
    }
}

/// Where a ring starts that a driver just set up, as SET_VRING_BASE has it: at 0, and in a packed
/// ring with both wrap counters set.
#[must_use]
pub fn first_base(format: RingFormat) -> u32 {
    match format {
        RingFormat::Split => 0,
        RingFormat::Packed => 1 << 31 | 1 << 15,
    }
}

fn set_up_queue(
    connection: &mut Connection,
    queue: &QueueState,
    base: u32,
    resources: &Resources<'_>,
) -> Result<(), SessionError> {
    let index = queue.index;
    let events = &resources.queues[usize::from(index)];
    connection.set_vring_num(index, queue.size)?;
    connection.set_vring_base(index, base)?;
    connection.set_vring_addr(
        index,
        &VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: queue.desc_gpa,
            used_ring_addr: queue.device_gpa,
            avail_ring_addr: queue.driver_gpa,
            log_addr: None,
        },
    )?;
    connection.set_vring_err(index, resources.err)?;
    connection.set_vring_call(index, &events.call)?;
    Ok(())
}

/// Gets the in-flight region from the first backend and shows it to each.
fn share_inflight(
    connection: &mut Connection,
    activation: &Activation,
    inflight: &mut Option<InflightRegion>,
) -> Result<(), SessionError> {
    let num_queues = activation
        .queues
        .iter()
        .map(|queue| queue.index + 1)
        .max()
        .unwrap_or(0);
    let queue_size = activation
        .queues
        .iter()
        .map(|queue| queue.size)
        .max()
        .unwrap_or(0);
    if num_queues == 0 {
        return Ok(());
    }
    if inflight.is_none() {
        let (description, file) = connection.inflight_fd(num_queues, queue_size)?;
        *inflight = Some(InflightRegion::accept(description, file)?);
    }
    if let Some(region) = inflight {
        let description = VhostUserInflight {
            num_queues,
            queue_size,
            ..region.description
        };
        connection.set_inflight_fd(&description, &region.file)?;
    }
    Ok(())
}

impl InflightRegion {
    /// Checks a backend's region and makes sure that no holder can truncate it under another.
    fn accept(description: VhostUserInflight, file: File) -> Result<Self, SessionError> {
        let end = description.mmap_offset.checked_add(description.mmap_size);
        let end = end.filter(|end| (1..=INFLIGHT_LIMIT_BYTES).contains(end));
        let end = end.ok_or(SessionError::Inflight("its size is 0 or more than 128 MiB"))?;
        // By seeking, because asking for metadata is a system call that filters forbid.
        let file_len = (&file)
            .seek(SeekFrom::End(0))
            .map_err(SessionError::SealInflight)?;
        if file_len < end {
            return Err(SessionError::Inflight(
                "its file is shorter than the region",
            ));
        }
        let file = match seal(&file) {
            Ok(()) => file,
            Err(_) => sealed_copy(&file, end).map_err(SessionError::SealInflight)?,
        };
        Ok(Self {
            description,
            file: Arc::new(file),
        })
    }

    /// Descriptors of each queue that it has room for.
    pub(super) fn queue_size(&self) -> u16 {
        self.description.queue_size
    }

    pub(super) fn len_bytes(&self) -> u64 {
        self.description.mmap_size
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Where it starts in its file.
    pub(super) fn file_offset(&self) -> u64 {
        self.description.mmap_offset
    }
}

/// Fails for files that are no memfd, or were made without permission to seal.
fn seal(file: &File) -> nix::Result<()> {
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    let present = SealFlag::from_bits_retain(fcntl(file, FcntlArg::F_GET_SEALS)?);
    if present.contains(SealFlag::F_SEAL_SHRINK) {
        return Ok(());
    }
    fcntl(file, FcntlArg::F_ADD_SEALS(seals)).map(drop)
}

fn sealed_copy(file: &File, len: u64) -> io::Result<File> {
    const CHUNK: usize = 1 << 20;
    let copy = File::from(memfd_create(
        c"vhost-user-inflight",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )?);
    copy.set_len(len)?;
    let mut buffer = vec![0; CHUNK.min(len as usize)];
    let mut at = 0;
    while at < len {
        let part = (len - at).min(buffer.len() as u64) as usize;
        file.read_exact_at(&mut buffer[..part], at)?;
        copy.write_all_at(&buffer[..part], at)?;
        at += part as u64;
    }
    seal(&copy)?;
    Ok(copy)
}
