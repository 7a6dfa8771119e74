//! One frontend's session: the requests of the protocol, turned into ring state and workers.
//!
//! A request that is refused (a SET that makes no sense) leaves everything as it was; the
//! connection decides whether the session goes on. A ring runs while it has size, areas, a kick
//! descriptor and memory, and is enabled:
//!
//! ```text
//!   stopped --SET_VRING_KICK + enabled--> running <--SET_VRING_ENABLE--> paused
//!      ^                                     |                             |
//!      +------ GET_VRING_BASE, RESET_DEVICE, end of session (drain) -------+
//! ```

mod requests;

use std::error::Error as StdError;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostUserInflight, VhostUserMemoryRegion, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Error, Result};
use virtio_bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::Device;
use faults::{DeviceFaults, Point};

use super::channel::ConfigNotice;
use super::misbehaviour;
use super::server::Shared;
use super::worker::{Worker, WorkerError};
use crate::eventfd::{Doorbell, EventFd};
use crate::inflight::{InflightError, InflightRegion};
use crate::memory::{MemoryError, MemoryTable, Region, RegionLayout, is_sealed_against_shrinking};
use crate::ring::{Ring, RingAddresses, RingConfig, RingError, RingFormat, Successor};

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// Feature bits that this crate brings to every device.
const RING_FEATURES: u64 = (1 << VIRTIO_F_VERSION_1)
    | (1 << VIRTIO_RING_F_EVENT_IDX)
    | (1 << VIRTIO_RING_F_INDIRECT_DESC)
    | (1 << VIRTIO_F_RING_PACKED)
    | F_PROTOCOL_FEATURES;

/// How long requests in flight may take when the frontend stops a ring, resets the device or
/// hangs up.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a request was refused.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("the session has no owner yet: SET_OWNER comes first")]
    NoOwner,
    #[error("the session has an owner already")]
    OwnedAlready,
    #[error("features {0:#x} were not offered")]
    FeaturesNotOffered(u64),
    #[error("features cannot change while rings run")]
    FeaturesWhileRunning,
    #[error("queue {0} does not exist")]
    NoSuchQueue(u32),
    #[error("queue {index}: {request} while the ring runs")]
    WhileRunning { index: u16, request: &'static str },
    #[error(
        "queue {index}: ring size {size} is more than {max}, zero, or a split ring's and no power of two"
    )]
    RingSize { index: u16, size: u32, max: u16 },
    #[error("queue {index}: no ring can go on from base {base:#x}")]
    RingBase { index: u16, base: u32 },
    #[error("queue {0}: rings without a kick descriptor are not supported")]
    NoKick(u16),
    #[error("queue {index}: the memory table would lose the ring's areas")]
    LosesRing { index: u16 },
    #[error("{files} descriptors for {regions} memory regions")]
    DescriptorCount { files: usize, regions: usize },
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Inflight(#[from] InflightError),
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Worker(#[from] WorkerError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What the frontend said about one ring, and who serves it.
#[derive(Debug, Default)]
struct Vring {
    size: u16,
    base: u16,
    addresses: Option<RingAddresses>,
    kick: Option<EventFd>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    enabled: bool,
    worker: Option<Worker>,
}

/// See the module's description.
pub(super) struct Session {
    name: String,
    device: Arc<dyn Device>,
    shared: Arc<Shared>,
    owned: bool,
    acked_features: u64,
    acked_protocol_features: u64,
    memory: Option<Arc<MemoryTable>>,
    inflight: Option<InflightRegion>,
    /// Rung when the frontend's files turn out shorter than they were.
    truncated: Arc<EventFd>,
    vrings: Vec<Vring>,
    notice: ConfigNotice,
    /// The last request was refused by this handler, not by the protocol's parser.
    refused: bool,
    faults: Option<Arc<DeviceFaults>>,
    /// Features that a fault keeps from being offered.
    refused_features: u64,
}

impl Session {
    pub(super) fn new(
        name: &str,
        device: Arc<dyn Device>,
        shared: Arc<Shared>,
        truncated: Arc<EventFd>,
    ) -> Session {
        let vrings = (0..device.num_queues()).map(|_| Vring::default()).collect();
        let faults = device.faults();
        Session {
            name: name.to_owned(),
            device,
            shared,
            owned: false,
            acked_features: 0,
            acked_protocol_features: 0,
            memory: None,
            inflight: None,
            truncated,
            vrings,
            notice: ConfigNotice::default(),
            refused: false,
            faults,
            refused_features: 0,
        }
    }

    /// Whether the last failed request was refused, leaving the session as it was.
    pub(super) fn take_refusal(&mut self) -> bool {
        std::mem::take(&mut self.refused)
    }

    /// SET_FEATURES has yet to come, but the protocol's features were negotiated.
    pub(super) fn may_enable_before_features(&self) -> bool {
        self.acked_features & F_PROTOCOL_FEATURES == 0 && self.acked_protocol_features != 0
    }

    /// Whether a refusal can be told to the frontend.
    pub(super) fn acknowledges(&self) -> bool {
        self.acked_protocol_features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    /// Whether a SET_BACKEND_REQ_FD may come.
    pub(super) fn has_channel(&self) -> bool {
        self.acked_protocol_features & VhostUserProtocolFeatures::BACKEND_REQ.bits() != 0
    }

    /// SET_BACKEND_REQ_FD.
    pub(super) fn open_channel(&mut self, socket: OwnedFd) -> io::Result<()> {
        let acknowledges = self.acknowledges();
        self.notice.open(socket, acknowledges)
    }

    /// Tells the frontend of changes to the device configuration.
    pub(super) fn notice(&mut self) -> &mut ConfigNotice {
        &mut self.notice
    }

    fn ring_format(&self) -> RingFormat {
        RingFormat::of(self.acked_features)
    }

    /// Drains and stops all rings and forgets the driver's state. Returns only when no worker
    /// and no I/O of this session is left.
    pub(super) fn end(&mut self) {
        let deadline = Instant::now() + self.drain_timeout();
        if let Err(error) = self.stop_all(deadline, Successor::Alone) {
            let error = &error as &dyn StdError;
            tracing::warn!(device = self.name, error, "rings did not end in order");
        }
        self.device.reset();
    }

    fn drain_timeout(&self) -> Duration {
        self.shared
            .drain_limit()
            .map_or(DRAIN_TIMEOUT, |limit| limit.min(DRAIN_TIMEOUT))
    }

    fn offered_features(&self) -> u64 {
        (self.device.features() | RING_FEATURES) & !self.refused_features
    }

    /// What is to go wrong at `point`, if anything is.
    fn armed(&self, point: Point) -> Option<&DeviceFaults> {
        let faults = self.faults.as_deref();
        faults.filter(|faults| faults.is_armed(point))
    }

    /// What is to go wrong with messages, if anything is.
    pub(super) fn message_faults(&self) -> Option<Arc<DeviceFaults>> {
        self.armed(Point::Message)?;
        self.faults.clone()
    }

    /// Logs a refusal and makes the protocol's error of it.
    fn refuse(&mut self, request: &'static str, refusal: Refusal) -> Error {
        if let Some(withheld) = self.shared.admit_complaint() {
            let error = &refusal as &dyn StdError;
            tracing::warn!(
                device = self.name,
                request,
                error,
                withheld,
                "request refused"
            );
        }
        // A worker that does not answer leaves the session in an unknown state: that ends it.
        self.refused = !matches!(refusal, Refusal::Worker(_));
        Error::ReqHandlerError(io::Error::other(refusal))
    }

    fn answer<T>(
        &mut self,
        request: &'static str,
        result: std::result::Result<T, Refusal>,
    ) -> Result<T> {
        result.map_err(|refusal| self.refuse(request, refusal))
    }

    fn require_owner(&self) -> std::result::Result<(), Refusal> {
        if self.owned {
            Ok(())
        } else {
            Err(Refusal::NoOwner)
        }
    }

    fn vring(&mut self, index: u32) -> std::result::Result<(u16, &mut Vring), Refusal> {
        self.require_owner()?;
        let found = usize::try_from(index)
            .ok()
            .and_then(|position| self.vrings.get_mut(position));
        found
            .map(|vring| (index as u16, vring))
            .ok_or(Refusal::NoSuchQueue(index))
    }

    fn stopped_vring(
        &mut self,
        index: u32,
        request: &'static str,
    ) -> std::result::Result<(u16, &mut Vring), Refusal> {
        let (index, vring) = self.vring(index)?;
        match vring.worker {
            Some(_) => Err(Refusal::WhileRunning { index, request }),
            None => Ok((index, vring)),
        }
    }

    fn try_set_features(&mut self, features: u64) -> std::result::Result<(), Refusal> {
        let unknown = features & !self.offered_features();
        if unknown != 0 {
            return Err(Refusal::FeaturesNotOffered(unknown));
        }
        let runs = self.vrings.iter().any(|vring| vring.worker.is_some());
        if runs && features != self.acked_features {
            return Err(Refusal::FeaturesWhileRunning);
        }
        if RingFormat::of(features) != self.ring_format() {
            // What was said of rings was said of others.
            self.inflight = None;
        }
        self.acked_features = features;
        // vhost-user, "Ring states": without protocol features rings start enabled.
        if features & F_PROTOCOL_FEATURES == 0 {
            for index in 0..self.vrings.len() {
                self.vrings[index].enabled = true;
                self.start_if_ready(index as u16)?;
            }
        }
        Ok(())
    }

    fn try_set_mem_table(
        &mut self,
        descriptions: &[VhostUserMemoryRegion],
        files: &[File],
    ) -> std::result::Result<(), Refusal> {
        self.require_owner()?;
        if descriptions.len() != files.len() {
            return Err(Refusal::DescriptorCount {
                files: files.len(),
                regions: descriptions.len(),
            });
        }
        let regions = descriptions
            .iter()
            .zip(files)
            .map(|(description, file)| Region::map(layout_of(description), file))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        self.use_memory(MemoryTable::new(regions)?)
    }

    /// Goes over to another memory table, unless a running ring is not in it.
    fn use_memory(&mut self, memory: MemoryTable) -> std::result::Result<(), Refusal> {
        memory.guard(&self.truncated);
        let memory = Arc::new(memory);
        let format = self.ring_format();
        for (index, vring) in (0..).zip(&self.vrings) {
            let Some(addresses) = vring.addresses.filter(|_| vring.worker.is_some()) else {
                continue;
            };
            Ring::check_areas(format, &memory, &addresses, vring.size)
                .map_err(|_| Refusal::LosesRing { index })?;
        }
        for (index, vring) in (0..).zip(&self.vrings) {
            let Some(worker) = &vring.worker else {
                continue;
            };
            if let Some(faults) = self.armed(Point::Memory) {
                misbehaviour::amid_memory_change(faults, index);
            }
            worker.set_memory(Arc::clone(&memory))?;
        }
        self.shared
            .set_memory_sealed(memory.regions().iter().all(Region::is_sealed));
        self.memory = Some(memory);
        for index in 0..self.vrings.len() {
            self.start_if_ready(index as u16)?;
        }
        Ok(())
    }

    fn try_set_vring_num(&mut self, index: u32, size: u32) -> std::result::Result<(), Refusal> {
        let max = self.device.max_queue_size();
        let format = self.ring_format();
        let (index, vring) = self.stopped_vring(index, "SET_VRING_NUM")?;
        let is_possible = match format {
            RingFormat::Split => size.is_power_of_two(),
            RingFormat::Packed => size > 0,
        };
        if !is_possible || size > u32::from(max) {
            return Err(Refusal::RingSize { index, size, max });
        }
        vring.size = size as u16;
        Ok(())
    }

    fn try_set_vring_addr(
        &mut self,
        index: u32,
        addresses: RingAddresses,
    ) -> std::result::Result<(), Refusal> {
        let memory = self.memory.clone();
        let format = self.ring_format();
        let (index, vring) = self.vring(index)?;
        if vring.worker.is_some() && vring.addresses != Some(addresses) {
            return Err(Refusal::WhileRunning {
                index,
                request: "SET_VRING_ADDR",
            });
        }
        if let (Some(memory), true) = (memory, vring.size > 0) {
            Ring::check_areas(format, &memory, &addresses, vring.size)?;
        }
        vring.addresses = Some(addresses);
        self.start_if_ready(index)
    }

    /// The base of a packed ring has the position of the next descriptor to take in its lower half,
    /// and of the next one to use in its upper half. Where they differ, requests were in flight of
    /// which nobody knows any more what they were, unless the in-flight region does.
    fn try_set_vring_base(&mut self, index: u32, base: u32) -> std::result::Result<(), Refusal> {
        let format = self.ring_format();
        let knows_in_flight = self.inflight.is_some();
        let (index, vring) = self.stopped_vring(index, "SET_VRING_BASE")?;
        let (next_avail, rest) = (base as u16, base >> 16);
        let is_possible = match format {
            RingFormat::Split => rest == 0,
            RingFormat::Packed => rest == u32::from(next_avail) || knows_in_flight,
        };
        if !is_possible {
            return Err(Refusal::RingBase { index, base });
        }
        vring.base = next_avail;
        Ok(())
    }

    fn try_get_vring_base(&mut self, index: u32) -> std::result::Result<u32, Refusal> {
        let format = self.ring_format();
        let deadline = Instant::now() + self.drain_timeout();
        let (_, vring) = self.vring(index)?;
        // vhost-user, "Ring states": the ring starts again with the next SET_VRING_KICK.
        vring.kick = None;
        if let Some(worker) = &vring.worker {
            // An undrained ring keeps its worker and its entries in the in-flight region: the
            // failure ends the session, and the next one resubmits them.
            vring.base = worker
                .begin_stop(deadline, Successor::Told)
                .wait()?
                .next_avail;
            if let Some(worker) = vring.worker.take() {
                worker.join();
            }
        }
        let base = u32::from(vring.base);
        Ok(match format {
            RingFormat::Split => base,
            // Nothing is in flight.
            RingFormat::Packed => base | base << 16,
        })
    }

    fn try_set_vring_kick(
        &mut self,
        index: u8,
        file: Option<File>,
    ) -> std::result::Result<(), Refusal> {
        let (index, vring) = self.vring(u32::from(index))?;
        let kick = EventFd::from_kick(file.ok_or(Refusal::NoKick(index))?.into())?;
        if let Some(worker) = &vring.worker {
            worker.set_kick(kick.try_clone()?);
        }
        vring.kick = Some(kick);
        self.start_if_ready(index)
    }

    fn try_set_vring_call(
        &mut self,
        index: u8,
        file: Option<File>,
    ) -> std::result::Result<(), Refusal> {
        let (_, vring) = self.vring(u32::from(index))?;
        let call = file.map(OwnedFd::from);
        doorbell(&call)?;
        vring.call = call;
        if let Some(worker) = &vring.worker {
            worker.set_call(doorbell(&vring.call)?);
        }
        Ok(())
    }

    fn try_set_vring_err(
        &mut self,
        index: u8,
        file: Option<File>,
    ) -> std::result::Result<(), Refusal> {
        let (_, vring) = self.vring(u32::from(index))?;
        let err = file.map(OwnedFd::from);
        doorbell(&err)?;
        vring.err = err;
        if let Some(worker) = &vring.worker {
            worker.set_err(doorbell(&vring.err)?);
        }
        Ok(())
    }

    fn try_set_vring_enable(
        &mut self,
        index: u32,
        enabled: bool,
    ) -> std::result::Result<(), Refusal> {
        let (index, vring) = self.vring(index)?;
        vring.enabled = enabled;
        if let Some(worker) = &vring.worker {
            worker.set_enabled(enabled)?;
        }
        self.start_if_ready(index)
    }

    fn try_set_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
        file: &File,
    ) -> std::result::Result<(), Refusal> {
        self.require_owner()?;
        if let Some(index) = self.vrings.iter().position(|vring| vring.worker.is_some()) {
            return Err(Refusal::WhileRunning {
                index: index as u16,
                request: "SET_INFLIGHT_FD",
            });
        }
        if self
            .armed(Point::Inflight)
            .is_some_and(misbehaviour::loses_inflight)
        {
            self.inflight = None;
            return Ok(());
        }
        let VhostUserInflight {
            mmap_size,
            mmap_offset,
            num_queues,
            queue_size,
        } = *inflight;
        let region = InflightRegion::map(
            file,
            mmap_offset,
            mmap_size,
            self.ring_format(),
            num_queues,
            queue_size,
        )?;
        if !is_sealed_against_shrinking(file.as_fd()) {
            region.guard(&self.truncated);
        }
        self.inflight = Some(region);
        Ok(())
    }

    /// Starts a ring when nothing is missing any more.
    fn start_if_ready(&mut self, index: u16) -> std::result::Result<(), Refusal> {
        let vring = &mut self.vrings[usize::from(index)];
        let (Some(memory), Some(addresses), Some(kick)) =
            (&self.memory, vring.addresses, &vring.kick)
        else {
            return Ok(());
        };
        if vring.worker.is_some() || !vring.enabled || vring.size == 0 {
            return Ok(());
        }
        let inflight = match &self.inflight {
            Some(region) => {
                let slot = region.queue(index, vring.size);
                Some(slot.ok_or(RingError::NoInflightSlot {
                    index,
                    size: vring.size,
                })?)
            }
            None => None,
        };
        let ring = Ring::start(RingConfig {
            index,
            size: vring.size,
            features: self.acked_features,
            addresses,
            memory: Arc::clone(memory),
            next_avail: vring.base,
            inflight,
            call: doorbell(&vring.call)?,
        })?;
        let stats = self.shared.queue(index);
        let (kick, err) = (kick.try_clone()?, doorbell(&vring.err)?);
        vring.worker = Some(Worker::start(
            &self.name,
            Arc::clone(&self.device),
            ring,
            kick,
            err,
            stats,
        )?);
        Ok(())
    }

    /// Stops all rings at once and waits for their threads.
    fn stop_all(
        &mut self,
        deadline: Instant,
        successor: Successor,
    ) -> std::result::Result<(), WorkerError> {
        let workers: Vec<_> = self
            .vrings
            .iter_mut()
            .filter_map(|vring| {
                let worker = vring.worker.take()?;
                let stop = worker.begin_stop(deadline, successor);
                let doorbells = [vring.call.as_ref(), vring.err.as_ref()];
                Some((worker, stop, doorbells))
            })
            .collect();
        let mut result = Ok(());
        for (worker, stop, doorbells) in workers {
            let stopped = stop.wait();
            match stopped {
                Err(WorkerError::Silent { .. }) => {
                    let doorbells: Vec<_> = doorbells.into_iter().flatten().collect();
                    worker.release_and_join(&doorbells);
                }
                _ => worker.join(),
            }
            result = result.and(stopped.map(|_| ()));
        }
        result
    }

    /// Back to the state of a fresh session, but for owner, memory and negotiated features of
    /// the protocol.
    fn reset_rings(&mut self) -> std::result::Result<(), Refusal> {
        self.stop_all(Instant::now() + self.drain_timeout(), Successor::Told)?;
        self.vrings
            .iter_mut()
            .for_each(|vring| *vring = Vring::default());
        Ok(())
    }
}

fn layout_of(description: &VhostUserMemoryRegion) -> RegionLayout {
    RegionLayout {
        gpa: description.guest_phys_addr,
        len_bytes: description.memory_size,
        user_addr: description.user_addr,
        mmap_offset: description.mmap_offset,
    }
}

fn doorbell(fd: &Option<OwnedFd>) -> io::Result<Option<Doorbell>> {
    fd.as_ref()
        .map(|fd| fd.try_clone().and_then(Doorbell::new))
        .transpose()
}
