//! The control socket of a device daemon, the same for every kind of device: a table of attached
//! devices behind the `DeviceDaemon` service, and metrics.
//!
//! A daemon brings one function that turns [`Parts`] (a request with its descriptors) into a
//! [`ServedDevice`]. Attaching and detaching block (a detach drains rings), so they run outside
//! the async runtime; a device that is being attached or detached keeps its place in the table:
//!
//! ```text
//! (none) --Attach--> Attaching --ok--> Attached --Detach--> Detaching --> (none)
//!                        `---failed---> (none)
//! ```

mod metrics;

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};
use std::os::fd::AsRawFd;
use tonic::{Request, Response, Status};

use crate::device::attach_request::{Device as DeviceConfig, Listener as ListenerConfig};
use crate::device::device_daemon_server::{DeviceDaemon, DeviceDaemonServer};
use crate::device::{
    AttachRequest, BlkConfig, DaemonInfo, DetachRequest, DetachResponse, Device, FdRef,
    GetDaemonRequest, GetDeviceRequest, GetMetricsRequest, ListDevicesRequest, ListDevicesResponse,
    MetricsResponse, NetConfig,
};
use crate::fds::Inbox;
use crate::listen::Listener;
use crate::serve::{self, ServeError, Services};
use crate::validate;

/// Devices of one daemon process at most. A host's NICs; far below the descriptor limit.
const MAX_DEVICES: usize = 256;

/// How long requests in flight have to complete when a device is detached or the daemon ends.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Threads for attaches and detaches in progress.
const MAX_BLOCKING_THREADS: usize = 8;

/// A device that this process serves. A daemon's own services get back to what it attached with
/// [`DeviceTable::attached`].
pub trait ServedDevice: Any + Send + Sync {
    /// Its state and statistics now; `id` is filled in by the table.
    fn describe(&self) -> Device;
    /// What it measured, for the metrics.
    fn histograms(&self) -> Vec<DeviceHistogram> {
        Vec::new()
    }
    /// Lets what is in flight complete within `drain`, ends its session and stops its threads; blocks until
    /// that is done.
    ///
    /// # Errors
    /// Requests were not completed in time, or a thread does not end. The device keeps its place
    /// in the table; a second call says whether it has come to an end since.
    fn stop(&self, drain: Duration) -> Result<(), Status>;
}

/// A distribution that a device measured since it was attached.
#[derive(Clone, Debug, Default)]
pub struct DeviceHistogram {
    /// Queue of a disk, queue pair of a NIC.
    pub queue: u16,
    /// Kind of request; of a NIC `rx` or `tx`.
    pub op: &'static str,
    /// Upper bounds in seconds, ascending, and how many values are in each bucket; the last is
    /// infinite.
    pub buckets: Vec<(f64, u64)>,
    /// Sum of all values in seconds.
    pub sum_seconds: f64,
}

/// What a device is made from.
#[derive(Debug)]
pub struct Parts {
    /// The request as it was made.
    pub request: AttachRequest,
    /// The vhost-user socket, listening.
    pub listener: UnixListener,
    /// What the request names by tokens, in this order: a disk's image, its backing images, its
    /// key, its TLS credentials; a NIC's taps or packet sockets.
    pub fds: Vec<OwnedFd>,
}

/// Makes a device; a `Status` is the answer to the caller.
pub type Attach = Box<dyn Fn(Parts) -> Result<Arc<dyn ServedDevice>, Status> + Send + Sync>;

/// The devices of this process.
pub struct DeviceTable {
    info: DaemonInfo,
    attach: Attach,
    inbox: Option<Inbox>,
    slots: Mutex<BTreeMap<String, Slot>>,
}

struct Slot {
    request: AttachRequest,
    state: SlotState,
}

enum SlotState {
    Attaching,
    Attached(Arc<dyn ServedDevice>),
    Detaching(Arc<dyn ServedDevice>),
}

/// Devices could not be stopped: see [`ServedDevice::stop`].
#[derive(Debug, thiserror::Error)]
#[error("not all devices could be drained: {what}")]
pub struct NotStopped {
    /// Each device and its reason.
    pub what: String,
}

impl DeviceTable {
    /// An empty table of the daemon `name`, confined by `sandbox`. Without an `inbox` no request
    /// can name descriptors, so that nothing can be attached over gRPC.
    pub fn new(
        name: &str,
        sandbox: Vec<String>,
        inbox: Option<Inbox>,
        attach: impl Fn(Parts) -> Result<Arc<dyn ServedDevice>, Status> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            info: DaemonInfo {
                name: name.to_owned(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                pid: std::process::id(),
                sandbox,
            },
            attach: Box::new(attach),
            inbox,
            slots: Mutex::default(),
        })
    }

    /// Attaches a device whose parts this process opened itself.
    ///
    /// # Errors
    /// What the daemon's attach function says; `ALREADY_EXISTS` when the id is taken.
    pub fn attach(&self, parts: Parts) -> Result<Device, Status> {
        let id = parts.request.id.clone();
        match self.reserve(&parts.request)? {
            Reserved::Slot => self.fill(&id, (self.attach)(parts)),
            Reserved::SameAsBefore(device) => Ok(describe(&id, &*device)),
        }
    }

    /// Stops all devices, at the same time.
    ///
    /// # Errors
    /// Names those that could not be drained.
    pub fn stop_all(&self) -> Result<(), NotStopped> {
        let devices: Vec<_> = std::mem::take(&mut *self.slots())
            .into_iter()
            .filter_map(|(id, slot)| match slot.state {
                SlotState::Attached(device) => Some((id, device)),
                SlotState::Attaching | SlotState::Detaching(_) => None,
            })
            .collect();
        let failed: Vec<String> = thread::scope(|scope| {
            let stopping: Vec<_> = devices
                .into_iter()
                .map(|(id, device)| (id, scope.spawn(move || device.stop(DRAIN_TIMEOUT))))
                .collect();
            stopping
                .into_iter()
                .filter_map(|(id, thread)| match thread.join() {
                    Ok(Ok(())) => None,
                    Ok(Err(status)) => Some(format!("{id}: {}", status.message())),
                    Err(_) => Some(format!("{id}: its thread panicked")),
                })
                .collect()
        });
        if failed.is_empty() {
            Ok(())
        } else {
            let what = failed.join("; ");
            Err(NotStopped { what })
        }
    }

    /// The device `id`, which the daemon's attach function made as a `D`.
    ///
    /// # Errors
    /// `NOT_FOUND`, or `ABORTED` while it is being attached or detached.
    pub fn attached<D: ServedDevice>(&self, id: &str) -> Result<Arc<D>, Status> {
        let slots = self.slots();
        let slot = slots.get(id).ok_or_else(|| not_found(id))?;
        let SlotState::Attached(device) = &slot.state else {
            return Err(busy(id));
        };
        let device: Arc<dyn Any + Send + Sync> = device.clone();
        device
            .downcast()
            .map_err(|_| Status::unimplemented(format!("device {id:?} is of another kind")))
    }

    /// Ids and devices that are attached now, as `D`s.
    pub fn all_attached<D: ServedDevice>(&self) -> Vec<(String, Arc<D>)> {
        self.served()
            .into_iter()
            .filter_map(|(id, device)| {
                let device: Arc<dyn Any + Send + Sync> = device;
                Some((id, device.downcast().ok()?))
            })
            .collect()
    }

    /// Takes the one descriptor that `reference`, found in `field` of a request, stands for.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION` when none waits, `INVALID_ARGUMENT` when there are several.
    pub fn take_fd(&self, reference: &FdRef, field: &str) -> Result<OwnedFd, Status> {
        self.take_one(reference, field)
    }

    /// All metrics in Prometheus' text format.
    pub fn metrics(&self) -> String {
        let histograms: Vec<_> = self
            .served()
            .into_iter()
            .map(|(id, device)| (id, device.histograms()))
            .collect();
        metrics::render(&self.info.name, &self.list(), histograms)
    }

    fn attach_request(&self, request: AttachRequest) -> Result<Device, Status> {
        validate::attach_request(&request)?;
        let id = request.id.clone();
        match self.reserve(&request)? {
            Reserved::Slot => {
                let built = self.collect(request).and_then(|parts| (self.attach)(parts));
                self.fill(&id, built)
            }
            Reserved::SameAsBefore(device) => Ok(describe(&id, &*device)),
        }
    }

    /// Takes the request's descriptors out of the inbox.
    fn collect(&self, request: AttachRequest) -> Result<Parts, Status> {
        let listener = match &request.listener {
            Some(ListenerConfig::SocketFd(reference)) => {
                let fd = self.take_one(reference, "socket_fd")?;
                listening_socket(fd)?
            }
            Some(ListenerConfig::SocketPath(path)) => {
                return Err(Status::failed_precondition(format!(
                    "this daemon is sandboxed and cannot bind {path:?}; send the listening socket \
                     to its descriptor socket and name the token in socket_fd"
                )));
            }
            None => return Err(Status::invalid_argument("listener: missing")),
        };
        let fds = match &request.device {
            Some(DeviceConfig::Blk(blk)) => self.collect_blk(blk)?,
            Some(DeviceConfig::Net(net)) => self.collect_net(net)?,
            None => Vec::new(),
        };
        Ok(Parts {
            request,
            listener,
            fds,
        })
    }

    /// In the order that [`Parts::fds`] promises.
    fn collect_blk(&self, blk: &BlkConfig) -> Result<Vec<OwnedFd>, Status> {
        let backing = blk.backing.iter().enumerate().map(|(index, image)| {
            let field = format!("blk.backing[{index}].image_fd");
            (image.image_fd.as_ref(), field)
        });
        let tls = blk.nbd.as_ref().and_then(|nbd| nbd.tls_fd.as_ref());
        [(blk.image_fd.as_ref(), "blk.image_fd".to_owned())]
            .into_iter()
            .chain(backing)
            .chain([
                (blk.key_fd.as_ref(), "blk.key_fd".to_owned()),
                (tls, "blk.nbd.tls_fd".to_owned()),
            ])
            .filter_map(|(reference, field)| Some(self.take_one(reference?, &field)))
            .collect()
    }

    /// The taps or the packet sockets.
    fn collect_net(&self, net: &NetConfig) -> Result<Vec<OwnedFd>, Status> {
        let taps = net.tap_fds.iter().map(|fd| (fd, "net.tap_fds"));
        let sockets = net.packet_fds.iter().map(|fd| (fd, "net.packet_fds"));
        let fds = taps
            .chain(sockets)
            .map(|(reference, field)| self.take(reference, field))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(fds.into_iter().flatten().collect())
    }

    fn take_one(&self, reference: &FdRef, field: &str) -> Result<OwnedFd, Status> {
        let mut fds = self.take(reference, field)?;
        match (fds.pop(), fds.is_empty()) {
            (Some(fd), true) => Ok(fd),
            (_, _) => Err(Status::invalid_argument(format!(
                "{field}: token {:?} stands for several descriptors, one is wanted",
                reference.token
            ))),
        }
    }

    fn take(&self, reference: &FdRef, field: &str) -> Result<Vec<OwnedFd>, Status> {
        let inbox = self.inbox.as_ref().ok_or_else(|| {
            Status::failed_precondition(
                "this daemon has no descriptor socket; start it with --fd-socket PATH",
            )
        })?;
        inbox.take(&reference.token).ok_or_else(|| {
            Status::failed_precondition(format!(
                "{field}: no descriptors wait under token {:?}; send them to the descriptor \
                 socket first, at most 60 s before this request",
                reference.token
            ))
        })
    }

    fn reserve(&self, request: &AttachRequest) -> Result<Reserved, Status> {
        let mut slots = self.slots();
        if let Some(slot) = slots.get(&request.id) {
            return match &slot.state {
                SlotState::Attached(device) if slot.request == *request => {
                    Ok(Reserved::SameAsBefore(device.clone()))
                }
                SlotState::Attached(_) => Err(Status::already_exists(format!(
                    "device {:?} is attached with another configuration; detach it first",
                    request.id
                ))),
                SlotState::Attaching | SlotState::Detaching(_) => Err(busy(&request.id)),
            };
        }
        if slots.len() >= MAX_DEVICES {
            return Err(Status::resource_exhausted(format!(
                "this daemon serves {MAX_DEVICES} devices already; start another daemon"
            )));
        }
        let slot = Slot {
            request: request.clone(),
            state: SlotState::Attaching,
        };
        slots.insert(request.id.clone(), slot);
        Ok(Reserved::Slot)
    }

    /// Ends `Attaching`. The slot can be gone: then the daemon is shutting down.
    fn fill(
        &self,
        id: &str,
        built: Result<Arc<dyn ServedDevice>, Status>,
    ) -> Result<Device, Status> {
        let mut slots = self.slots();
        match (built, slots.get_mut(id)) {
            (Ok(device), Some(slot)) => {
                slot.state = SlotState::Attached(device.clone());
                drop(slots);
                Ok(describe(id, &*device))
            }
            (Ok(device), None) => {
                drop(slots);
                device.stop(DRAIN_TIMEOUT)?;
                Err(Status::unavailable("the daemon is shutting down"))
            }
            (Err(status), _) => {
                slots.remove(id);
                Err(status)
            }
        }
    }

    fn detach(&self, id: &str, drain: Duration) -> Result<(), Status> {
        let device = {
            let mut slots = self.slots();
            let slot = slots.get_mut(id).ok_or_else(|| not_found(id))?;
            let SlotState::Attached(device) = &slot.state else {
                return Err(busy(id));
            };
            let device = device.clone();
            slot.state = SlotState::Detaching(device.clone());
            device
        };
        let stopped = device.stop(drain);
        let mut slots = self.slots();
        match (&stopped, slots.get_mut(id)) {
            (Ok(()), _) => drop(slots.remove(id)),
            (Err(_), Some(slot)) => slot.state = SlotState::Attached(device),
            (Err(_), None) => {}
        }
        stopped
    }

    fn list(&self) -> Vec<Device> {
        self.served()
            .into_iter()
            .map(|(id, device)| describe(&id, &*device))
            .collect()
    }

    fn get(&self, id: &str) -> Result<Device, Status> {
        let served = self.served();
        let device = served.get(id).ok_or_else(|| not_found(id))?;
        Ok(describe(id, &**device))
    }

    fn served(&self) -> BTreeMap<String, Arc<dyn ServedDevice>> {
        self.slots()
            .iter()
            .filter_map(|(id, slot)| match &slot.state {
                SlotState::Attached(device) | SlotState::Detaching(device) => {
                    Some((id.clone(), device.clone()))
                }
                SlotState::Attaching => None,
            })
            .collect()
    }

    fn slots(&self) -> MutexGuard<'_, BTreeMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for DeviceTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceTable")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

enum Reserved {
    Slot,
    SameAsBefore(Arc<dyn ServedDevice>),
}

/// Serves `table`, and beside it `services` of the daemon's own, on the bound `control` socket (and
/// its metrics on `metrics`) until SIGTERM or SIGINT, then stops all devices. Starts its own
/// runtime: call it once the process is confined.
///
/// # Errors
/// When the sockets fail, or devices could not be drained.
pub fn run(
    table: &Arc<DeviceTable>,
    services: Services,
    control: Listener,
    metrics: Option<Listener>,
) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .build()
        .map_err(RunError::Runtime)?;
    let served = runtime.block_on(async {
        if let Some(listener) = metrics {
            let table = table.clone();
            tokio::spawn(crate::metrics::serve_http(listener, move || {
                table.metrics()
            }));
        }
        let service = DeviceDaemonServer::new(Control(table.clone()));
        serve::on(control, services.with(service), serve::terminated()).await
    });
    let stopped = table.stop_all();
    served?;
    Ok(stopped?)
}

/// Answers a call with what `act` says, outside the async runtime.
///
/// # Errors
/// What `act` says.
pub async fn blocking<T: Send + 'static>(
    table: &Arc<DeviceTable>,
    act: impl FnOnce(&DeviceTable) -> Result<T, Status> + Send + 'static,
) -> Result<Response<T>, Status> {
    let table = table.clone();
    tokio::task::spawn_blocking(move || act(&table))
        .await
        .unwrap_or_else(|error| Err(Status::internal(error.to_string())))
        .map(Response::new)
}

/// The service; all it does is leave the async runtime.
struct Control(Arc<DeviceTable>);

#[tonic::async_trait]
impl DeviceDaemon for Control {
    async fn get_daemon(
        &self,
        _: Request<GetDaemonRequest>,
    ) -> Result<Response<DaemonInfo>, Status> {
        Ok(Response::new(self.0.info.clone()))
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Result<Response<Device>, Status> {
        blocking(&self.0, |table| table.attach_request(request.into_inner())).await
    }

    async fn detach(
        &self,
        request: Request<DetachRequest>,
    ) -> Result<Response<DetachResponse>, Status> {
        blocking(&self.0, move |table| {
            let request = request.into_inner();
            validate::detach_request(&request)?;
            let drain = match request.drain_ms {
                0 => DRAIN_TIMEOUT,
                wanted => Duration::from_millis(wanted.into()),
            };
            table.detach(&request.id, drain)?;
            Ok(DetachResponse {})
        })
        .await
    }

    async fn list_devices(
        &self,
        _: Request<ListDevicesRequest>,
    ) -> Result<Response<ListDevicesResponse>, Status> {
        let devices = self.0.list();
        Ok(Response::new(ListDevicesResponse { devices }))
    }

    async fn get_device(
        &self,
        request: Request<GetDeviceRequest>,
    ) -> Result<Response<Device>, Status> {
        let request = request.into_inner();
        validate::get_device_request(&request)?;
        Ok(Response::new(self.0.get(&request.id)?))
    }

    async fn get_metrics(
        &self,
        _: Request<GetMetricsRequest>,
    ) -> Result<Response<MetricsResponse>, Status> {
        let text = self.0.metrics();
        Ok(Response::new(MetricsResponse { text }))
    }
}

/// `fd` as a listening Unix stream socket.
///
/// # Errors
/// `INVALID_ARGUMENT` when it is something else.
fn listening_socket(fd: OwnedFd) -> Result<UnixListener, Status> {
    let refuse = |what: &str| {
        Err(Status::invalid_argument(format!(
            "socket_fd: the descriptor is {what}; a listening Unix stream socket is wanted"
        )))
    };
    let Ok(address) = getsockname::<SockaddrStorage>(fd.as_raw_fd()) else {
        return refuse("no socket");
    };
    if address.family() != Some(AddressFamily::Unix) {
        return refuse("no Unix socket");
    }
    match getsockopt(&fd, sockopt::AcceptConn) {
        Ok(true) => Ok(UnixListener::from(fd)),
        _ => refuse("not listening"),
    }
}

fn describe(id: &str, device: &dyn ServedDevice) -> Device {
    Device {
        id: id.to_owned(),
        ..device.describe()
    }
}

fn busy(id: &str) -> Status {
    Status::aborted(format!(
        "device {id:?} is being attached or detached; try again"
    ))
}

fn not_found(id: &str) -> Status {
    Status::not_found(format!("no device {id:?} is attached here"))
}

/// Why a daemon's control socket could not be served.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No async runtime.
    #[error("cannot start the control socket's runtime")]
    Runtime(#[source] io::Error),
    /// See [`ServeError`].
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// See [`NotStopped`].
    #[error(transparent)]
    NotStopped(#[from] NotStopped),
}

#[cfg(test)]
mod tests;
