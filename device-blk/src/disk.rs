//! An attached disk: its device, who may connect to it, and what was asked of it since.

mod layers;
pub(crate) mod operations;

use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use api::daemon::{DeviceHistogram, Parts, ServedDevice};
use api::device::attach_request::Device as DeviceConfig;
use api::device::{BlkConfig, BlkStats, Device, Polling, QueueHealth, RateLimits};
use api::latency::Distribution;
use faults::{DeviceFaults, Faults};
use tonic::Status;
use vhost_user::backend::{self, Server};

use crate::assembly::{self, Files, assemble};
use crate::cli::MAX_QUEUES;
use crate::device::{BlkDevice, serial_id};
use crate::engine::allowance::Allowance;
use crate::engine::backend::ServeOptions;
use crate::image::failing::FailingImage;
use crate::image::lock::Attachment;
use crate::image::{Image, SECTOR_BYTES};
use crate::jobs::Jobs;
use crate::latency::SlowThreshold;
use crate::limiter::Limiter;
use crate::remote;
use crate::tracking::Tracker;
use request::OpKind;

/// How long a job has to end before its disk does: a block to slow storage, and a switch.
const JOB_TIMEOUT: Duration = Duration::from_secs(20);

/// An attached disk.
pub(crate) struct Disk {
    pub(crate) device: Arc<BlkDevice>,
    pub(crate) limiter: Arc<Limiter>,
    pub(crate) tracker: Arc<Tracker>,
    pub(crate) jobs: Jobs,
    /// As attached.
    pub(crate) config: BlkConfig,
    /// What files that become part of the disk later are marked with.
    pub(crate) attachment: Attachment,
    serving: Mutex<Serving>,
}

enum Serving {
    Running(Server),
    /// What its server said last.
    Stopped(backend::Status),
}

impl Disk {
    /// Serves `opened`, or else what is made of the descriptors among `parts`.
    pub(crate) fn attach(
        parts: Parts,
        opened: Option<(Arc<dyn Image>, Attachment)>,
        lock_patience: Duration,
        faults: Option<&Arc<Faults>>,
    ) -> Result<Arc<dyn ServedDevice>, Status> {
        let Parts {
            request,
            listener,
            fds,
        } = parts;
        let Some(DeviceConfig::Blk(config)) = request.device else {
            return Err(Status::invalid_argument(
                "blk: missing; this daemon serves disks alone",
            ));
        };
        let num_queues = match u16::try_from(config.num_queues) {
            Ok(0) => 1,
            Ok(queues) if queues <= MAX_QUEUES => queues,
            _ => {
                return Err(Status::invalid_argument(format!(
                    "blk.num_queues: 1 to {MAX_QUEUES} are possible"
                )));
            }
        };
        let or_id = |text: &str| match text {
            "" => request.id.clone(),
            text => text.to_owned(),
        };
        let name = or_id(&config.image_name);
        let (image, attachment) = match opened {
            Some(opened) => opened,
            None => {
                let files = Files::of_request(&config, fds);
                let attachment = attachment_of(&listener);
                let image = assemble(&config, &name, files, Some(attachment), lock_patience)?;
                (image, attachment)
            }
        };
        let image = match config.fail_requests {
            true => Arc::new(FailingImage::new(image)) as Arc<dyn Image>,
            false => image,
        };
        tracing::info!(
            disk = request.id,
            image = name,
            format = image.format(),
            capacity_bytes = image.capacity_sectors() * SECTOR_BYTES,
            read_only = image.is_read_only(),
            direct_io = image.direct().is_some(),
            discard = image.punches_holes(),
            "attached"
        );
        let limiter = Limiter::new(config.limits.unwrap_or_default());
        let tracker = Arc::<Tracker>::default();
        let options = ServeOptions {
            serial: serial_id(&or_id(&config.serial)),
            block_bytes: assembly::block_bytes(&config),
            polling: polling(config.polling()),
            cpus: config.cpus.iter().map(|&cpu| cpu as usize).collect(),
            admission: limiter.clone(),
            observer: tracker.clone(),
            slow: SlowThreshold::new(config.slow_request_ms),
            faults: faults.map_or_else(DeviceFaults::none, |faults| faults.device(&request.id)),
            allowance: Arc::new(match config.leased {
                true => Allowance::leased(config.io_until_boottime_ns),
                false => Allowance::always(),
            }),
        };
        let device = Arc::new(BlkDevice::new(image, num_queues, options));
        let server = Server::spawn(&request.id, listener, device.clone())
            .map_err(|error| Status::resource_exhausted(format!("cannot serve: {error}")))?;
        Ok(Arc::new(Self {
            device,
            limiter,
            tracker,
            jobs: Jobs::default(),
            config,
            attachment,
            serving: Mutex::new(Serving::Running(server)),
        }))
    }

    /// Replaces the rate limits, also for requests that wait.
    pub(crate) fn set_limits(&self, limits: RateLimits) {
        self.limiter.set(limits);
        self.device.backend().wake_queues();
    }

    pub(crate) fn set_polling(&self, mode: Polling) {
        self.device.backend().set_polling(polling(mode));
    }

    /// Lets it do I/O until a moment of `CLOCK_BOOTTIME`.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION` when it may for ever.
    pub(crate) fn allow_io(&self, id: &str, until_boottime_ns: u64) -> Result<(), Status> {
        let backend = self.device.backend();
        if !backend.allowance().is_leased() {
            return Err(Status::failed_precondition(format!(
                "device {id:?} was not attached as leased: it needs no leave"
            )));
        }
        if backend.allowance().extend(until_boottime_ns) {
            backend.wake_queues();
        }
        Ok(())
    }

    fn serving(&self) -> MutexGuard<'_, Serving> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The socket outlives daemons, and no two disks have the same one.
fn attachment_of(listener: &UnixListener) -> Attachment {
    let address = listener.local_addr().ok();
    let path = address.as_ref().and_then(|address| address.as_pathname());
    Attachment::at(path.map_or(&[][..], |path| path.as_os_str().as_bytes()))
}

fn polling(mode: Polling) -> backend::Polling {
    match mode {
        Polling::Unspecified | Polling::Adaptive => backend::Polling::Adaptive,
        Polling::Never => backend::Polling::Never,
        Polling::Always => backend::Polling::Always,
    }
}

impl ServedDevice for Disk {
    fn describe(&self) -> Device {
        let status = match &*self.serving() {
            Serving::Running(server) => server.status(),
            Serving::Stopped(last) => last.clone(),
        };
        let stats = self.device.stats();
        let image = self.device.image();
        let (read, write) = (stats.op(OpKind::Read), stats.op(OpKind::Write));
        let errors_by_op = stats
            .errors_by_op()
            .map(|(op, errors)| (op.to_owned(), errors))
            .collect();
        Device {
            id: String::new(),
            r#type: "blk".to_owned(),
            connected: status.connected,
            sessions: status.sessions,
            queues_running: status.queues_running,
            queues: status
                .queues
                .iter()
                .map(|queue| QueueHealth {
                    index: queue.index.into(),
                    in_flight: queue.inflight.into(),
                    completed_total: queue.completed,
                    unresponsive_ms: queue.unresponsive.as_millis() as u64,
                })
                .collect(),
            inflight: stats.inflight,
            last_session_end: status.last_session_end.unwrap_or_default(),
            blk: Some(BlkStats {
                read_requests: read.requests,
                read_bytes: read.bytes,
                write_requests: write.requests,
                write_bytes: write.bytes,
                flush_requests: stats.op(OpKind::Flush).requests,
                discard_requests: stats.op(OpKind::Discard).requests,
                write_zeroes_requests: stats.op(OpKind::WriteZeroes).requests,
                errors: stats.errors(),
                capacity_bytes: image.capacity_sectors() * SECTOR_BYTES,
                direct_io: image.direct().is_some(),
                format: image.format().to_owned(),
                encrypted: image.cipher().is_some(),
                errors_by_op,
                throttled: self.limiter.throttled(),
                slow_requests: stats.slow_requests,
                latency: Some(stats.latency.summary()),
                latency_buckets: stats.latency.buckets(),
                limits: Some(self.limiter.limits()),
                nbd: image.remote_status().map(remote::describe),
            }),
            net: None,
            io_stopped: self.device.backend().allowance().is_over(),
        }
    }

    fn histograms(&self) -> Vec<DeviceHistogram> {
        let mut histograms = Vec::new();
        for (index, queue) in self.device.queues().iter().enumerate() {
            for op in OpKind::ALL {
                let Some(latency) = queue.latency(op) else {
                    continue;
                };
                let latency = Distribution::of([latency]);
                histograms.push(DeviceHistogram {
                    queue: index as u16,
                    op: op.name(),
                    buckets: latency.metric_buckets(),
                    sum_seconds: latency.sum_seconds(),
                });
            }
        }
        histograms
    }

    /// Ends the jobs first: they would exchange the image of a disk that is gone.
    fn stop(&self, drain: Duration) -> Result<(), Status> {
        if !self.jobs.end(Instant::now() + JOB_TIMEOUT) {
            return Err(Status::deadline_exceeded(
                "a job of the disk does not end; its target may hang. Try again later",
            ));
        }
        let mut serving = self.serving();
        let Serving::Running(server) = &*serving else {
            // What was not completed was told once; whoever asks again wants to be rid of it.
            return Ok(());
        };
        let stopped = Serving::Stopped(backend::Status {
            connected: false,
            queues_running: 0,
            ..server.status()
        });
        let running = std::mem::replace(&mut *serving, stopped);
        drop(serving);
        let Serving::Running(server) = running else {
            unreachable!("it was running a moment ago");
        };
        let stopped = server.stop(drain);
        // Whether or not all was completed: nothing of this disk may reach its server later, when
        // it is somebody else's.
        self.device.image().abandon();
        stopped.map_err(|error| Status::deadline_exceeded(error.to_string()))?;
        // Now: the process may end before whoever holds the image last has let go of it.
        if let Some(qcow2) = self.device.image().as_qcow2()
            && let Err(error) = qcow2.chain().settle()
        {
            tracing::warn!(%error, "clusters that were reserved are leaked");
        }
        Ok(())
    }
}
