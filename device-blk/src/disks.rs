//! The service `Disks`: what is asked of disks while they are served. Handlers validate, find the
//! disk and leave the async runtime; the work is [`crate::disk`]'s and [`crate::jobs`]'.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api::daemon::{DeviceTable, ServedDevice, blocking};
use api::device::disks_server::Disks;
use api::device::{
    Bitmap, CancelJobRequest, CompleteJobRequest, CreateBitmapRequest, DeleteBitmapRequest,
    DeleteBitmapResponse, Device, FdRef, GetImageRequest, GetJobRequest, Image, Job,
    ListBitmapsRequest, ListBitmapsResponse, ListJobsRequest, ListJobsResponse, ResizeRequest,
    SetLimitsRequest, SetPollingRequest, SnapshotRequest, StartBackupRequest, StartCheckRequest,
    StartCommitRequest, StartMirrorRequest, Target,
};
use api::validate;
use tonic::{Request, Response, Status};

use crate::disk::Disk;
use crate::disk::operations::TargetFds;
use crate::jobs::target::Extent;
use crate::jobs::{Control, StartError};

/// How long CancelJob waits for the job's end before it answers how far it is.
const CANCEL_PATIENCE: Duration = Duration::from_secs(10);

/// See the module's description.
pub(crate) struct DiskService {
    table: Arc<DeviceTable>,
    /// How long a target or overlay that is in use is waited for.
    lock_patience: Duration,
}

type Answer<T> = Result<Response<T>, Status>;

impl DiskService {
    pub(crate) fn new(table: Arc<DeviceTable>, lock_patience: Duration) -> Self {
        Self {
            table,
            lock_patience,
        }
    }

    /// Runs `act` with the disk, outside the async runtime.
    async fn with<T: Send + 'static>(
        &self,
        id: String,
        act: impl FnOnce(&DeviceTable, &Arc<Disk>) -> Result<T, Status> + Send + 'static,
    ) -> Answer<T> {
        blocking(&self.table, move |table| {
            let disk = table.attached::<Disk>(&id)?;
            act(table, &disk)
        })
        .await
    }
}

#[tonic::async_trait]
impl Disks for DiskService {
    async fn get_image(&self, request: Request<GetImageRequest>) -> Answer<Image> {
        let request = request.into_inner();
        validate::disk_request(&request.id)?;
        self.with(request.id, |_, disk| Ok(disk.describe_image()))
            .await
    }

    async fn resize(&self, request: Request<ResizeRequest>) -> Answer<Device> {
        let request = request.into_inner();
        validate::resize_request(&request)?;
        self.with(request.id.clone(), move |_, disk| {
            disk.resize(request.capacity_bytes)?;
            Ok(describe(&request.id, disk))
        })
        .await
    }

    async fn set_limits(&self, request: Request<SetLimitsRequest>) -> Answer<Device> {
        let request = request.into_inner();
        validate::set_limits_request(&request)?;
        self.with(request.id.clone(), move |_, disk| {
            disk.set_limits(request.limits.unwrap_or_default());
            Ok(describe(&request.id, disk))
        })
        .await
    }

    async fn set_polling(&self, request: Request<SetPollingRequest>) -> Answer<Device> {
        let request = request.into_inner();
        validate::set_polling_request(&request)?;
        self.with(request.id.clone(), move |_, disk| {
            disk.set_polling(request.polling());
            Ok(describe(&request.id, disk))
        })
        .await
    }

    async fn snapshot(&self, request: Request<SnapshotRequest>) -> Answer<Image> {
        let request = request.into_inner();
        validate::snapshot_request(&request)?;
        let patience = self.lock_patience;
        self.with(request.id.clone(), move |table, disk| {
            let reference = request.overlay_fd.unwrap_or_default();
            let overlay = table.take_fd(&reference, "overlay_fd")?;
            disk.snapshot(overlay, &request.overlay_name, patience)?;
            Ok(disk.describe_image())
        })
        .await
    }

    async fn start_mirror(&self, request: Request<StartMirrorRequest>) -> Answer<Job> {
        let request = request.into_inner();
        validate::start_mirror_request(&request)?;
        let patience = self.lock_patience;
        self.with(request.id.clone(), move |table, disk| {
            let target = request.target.clone().unwrap_or_default();
            let fds = take_target(table, &target)?;
            let open = || disk.open_target(&target, fds, Extent::Whole, patience);
            let job = disk.start_mirror(&request, open)?;
            Ok(told(&request.id, &job))
        })
        .await
    }

    async fn start_backup(&self, request: Request<StartBackupRequest>) -> Answer<Job> {
        let request = request.into_inner();
        validate::start_backup_request(&request)?;
        let patience = self.lock_patience;
        self.with(request.id.clone(), move |table, disk| {
            let target = request.target.clone().unwrap_or_default();
            let fds = take_target(table, &target)?;
            let extent = if request.bitmap.is_empty() {
                Extent::Whole
            } else {
                Extent::Changes
            };
            let open = || disk.open_target(&target, fds, extent, patience);
            let job = disk.start_backup(&request, open)?;
            Ok(told(&request.id, &job))
        })
        .await
    }

    async fn start_commit(&self, request: Request<StartCommitRequest>) -> Answer<Job> {
        let request = request.into_inner();
        validate::job_request(&request.id, &request.job_id)?;
        let patience = self.lock_patience;
        self.with(request.id.clone(), move |table, disk| {
            let base = request.base_fd.as_ref();
            let base = base.map(|reference| table.take_fd(reference, "base_fd"));
            let job = disk.start_commit(&request.job_id, base.transpose()?, patience)?;
            Ok(told(&request.id, &job))
        })
        .await
    }

    async fn start_check(&self, request: Request<StartCheckRequest>) -> Answer<Job> {
        let request = request.into_inner();
        validate::job_request(&request.id, &request.job_id)?;
        self.with(request.id.clone(), move |_, disk| {
            let job = disk.start_check(&request.job_id, request.repair_leaks)?;
            Ok(told(&request.id, &job))
        })
        .await
    }

    async fn get_job(&self, request: Request<GetJobRequest>) -> Answer<Job> {
        let request = request.into_inner();
        validate::job_request(&request.id, &request.job_id)?;
        self.with(request.id.clone(), move |_, disk| {
            let job = find(disk, &request.job_id)?;
            Ok(told(&request.id, &job))
        })
        .await
    }

    async fn list_jobs(&self, request: Request<ListJobsRequest>) -> Answer<ListJobsResponse> {
        let request = request.into_inner();
        if !request.id.is_empty() {
            validate::disk_request(&request.id)?;
        }
        blocking(&self.table, move |table| {
            let disks = if request.id.is_empty() {
                table.all_attached::<Disk>()
            } else {
                let disk = table.attached::<Disk>(&request.id)?;
                vec![(request.id, disk)]
            };
            let jobs = disks.iter().flat_map(|(id, disk)| {
                let jobs = disk.jobs.all().into_iter();
                jobs.map(|job| told(id, &job)).collect::<Vec<_>>()
            });
            Ok(ListJobsResponse {
                jobs: jobs.collect(),
            })
        })
        .await
    }

    async fn complete_job(&self, request: Request<CompleteJobRequest>) -> Answer<Job> {
        let request = request.into_inner();
        validate::job_request(&request.id, &request.job_id)?;
        self.with(request.id.clone(), move |_, disk| {
            let job = find(disk, &request.job_id)?;
            if !job.complete() {
                let job = told(&request.id, &job);
                return Err(Status::failed_precondition(format!(
                    "job {:?} is {} and not JOB_STATE_READY; only a mirror that keeps up can be \
                     completed",
                    request.job_id,
                    job.state().as_str_name()
                )));
            }
            Ok(told(&request.id, &job))
        })
        .await
    }

    async fn cancel_job(&self, request: Request<CancelJobRequest>) -> Answer<Job> {
        let request = request.into_inner();
        validate::job_request(&request.id, &request.job_id)?;
        self.with(request.id.clone(), move |_, disk| {
            let job = find(disk, &request.job_id)?;
            disk.jobs.cancel(&job, Instant::now() + CANCEL_PATIENCE);
            Ok(told(&request.id, &job))
        })
        .await
    }

    async fn create_bitmap(&self, request: Request<CreateBitmapRequest>) -> Answer<Bitmap> {
        let request = request.into_inner();
        validate::create_bitmap_request(&request)?;
        self.with(request.id.clone(), move |_, disk| {
            disk.create_bitmap(&request.bitmap, request.granularity_bytes)
        })
        .await
    }

    async fn delete_bitmap(
        &self,
        request: Request<DeleteBitmapRequest>,
    ) -> Answer<DeleteBitmapResponse> {
        let request = request.into_inner();
        validate::bitmap_request(&request.id, &request.bitmap)?;
        self.with(request.id.clone(), move |_, disk| {
            let bitmap = disk.tracker.find(&request.bitmap).ok_or_else(|| {
                Status::not_found(format!("the disk has no bitmap {:?}", request.bitmap))
            })?;
            disk.tracker.remove(&bitmap);
            Ok(DeleteBitmapResponse {})
        })
        .await
    }

    async fn list_bitmaps(
        &self,
        request: Request<ListBitmapsRequest>,
    ) -> Answer<ListBitmapsResponse> {
        let request = request.into_inner();
        validate::disk_request(&request.id)?;
        self.with(request.id.clone(), |_, disk| {
            Ok(ListBitmapsResponse {
                bitmaps: disk.bitmaps(),
            })
        })
        .await
    }
}

fn describe(id: &str, disk: &Arc<Disk>) -> Device {
    Device {
        id: id.to_owned(),
        ..ServedDevice::describe(&**disk)
    }
}

fn told(id: &str, job: &Control) -> Job {
    Job {
        id: id.to_owned(),
        ..job.describe()
    }
}

fn find(disk: &Disk, job_id: &str) -> Result<Arc<Control>, Status> {
    disk.jobs.find(job_id).ok_or_else(|| {
        Status::not_found(format!(
            "the disk has no job {job_id:?}; jobs end with the daemon's process"
        ))
    })
}

fn take_target(table: &DeviceTable, target: &Target) -> Result<TargetFds, Status> {
    let take = |reference: Option<&FdRef>, field| {
        reference
            .map(|reference| table.take_fd(reference, field))
            .transpose()
    };
    let tls = target.nbd.as_ref().and_then(|nbd| nbd.tls_fd.as_ref());
    Ok(TargetFds {
        image: take(target.image_fd.as_ref(), "target.image_fd")?,
        nbd_tls: take(tls, "target.nbd.tls_fd")?,
        key: take(target.key_fd.as_ref(), "target.key_fd")?,
    })
}

impl From<StartError> for Status {
    fn from(error: StartError) -> Self {
        let message = error.to_string();
        match error {
            StartError::Busy { .. } => Status::failed_precondition(message),
            StartError::Taken { .. } => Status::already_exists(message),
            StartError::Ending => Status::aborted(message),
            StartError::Thread(source) => {
                Status::resource_exhausted(format!("{message}: {source}"))
            }
        }
    }
}
