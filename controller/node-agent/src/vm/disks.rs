//! The disks of a running VM as its device-blk serves them: one call each, with a deadline.

use std::{
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

use api::{
    connect,
    device::{
        Bitmap, CancelJobRequest, CompleteJobRequest, Device, FdRef, GetDeviceRequest,
        GetImageRequest, GetJobRequest, Image, Job, JobState, ListBitmapsRequest, ListJobsRequest,
        ResizeRequest, SetLimitsRequest, SetPollingRequest, SnapshotRequest, StartBackupRequest,
        StartCheckRequest, StartCommitRequest, StartMirrorRequest,
        device_daemon_client::DeviceDaemonClient, disks_client::DisksClient,
    },
    fds,
};
use tonic::{Code, Status, transport::Channel};

use super::daemon::{DaemonError, with_deadline};
use crate::{record::DaemonKind, spec::Tuning};

const PROGRAM: &str = "device-blk";
/// Answered from memory.
const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// Requests in flight complete first, and a slow disk may hold these.
const SWITCH_DEADLINE: Duration = Duration::from_secs(60);
const SEND_DEADLINE: Duration = Duration::from_secs(5);

/// A VM's device-blk. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Disks {
    dir: PathBuf,
}

impl Disks {
    /// Of the VM whose sockets are in `dir`.
    pub(crate) fn of(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    /// Sends a file beforehand, for a request that names it.
    pub(crate) async fn send(&self, file: std::fs::File, disk: &str) -> Result<FdRef, DaemonError> {
        let socket = self.socket("fds");
        let device = disk.to_owned();
        let sending = tokio::task::spawn_blocking(move || {
            let token = uuid::Uuid::new_v4().to_string();
            fds::send(&socket, &token, &[file.as_fd()], SEND_DEADLINE)
                .map(|()| FdRef { token })
                .map_err(|source| DaemonError::Send {
                    program: PROGRAM,
                    device,
                    source,
                })
        });
        sending
            .await
            .unwrap_or_else(|panic| panic!("sending a file: {panic}"))
    }

    /// Sets limits and polling.
    pub(super) async fn tune(&self, disk: &str, tuning: &Tuning) -> Result<(), DaemonError> {
        let mut client = self.client().await?;
        let limits = SetLimitsRequest {
            id: disk.to_owned(),
            limits: Some(tuning.limits()),
        };
        let answer = client
            .set_limits(with_deadline(limits, CALL_DEADLINE))
            .await;
        answer.map_err(refused("to set limits"))?;
        let polling = SetPollingRequest {
            id: disk.to_owned(),
            polling: tuning.polling() as i32,
        };
        let answer = client
            .set_polling(with_deadline(polling, CALL_DEADLINE))
            .await;
        answer.map_err(refused("to set polling")).map(drop)
    }

    /// Figures of one disk.
    pub(crate) async fn device(&self, disk: &str) -> Result<Device, DaemonError> {
        let mut client = DeviceDaemonClient::new(self.channel().await?);
        let request = GetDeviceRequest {
            id: disk.to_owned(),
        };
        let answer = client
            .get_device(with_deadline(request, CALL_DEADLINE))
            .await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(refused("GetDevice"))
    }

    /// What the daemon writes and reads.
    pub(crate) async fn image(&self, disk: &str) -> Result<Image, DaemonError> {
        let request = GetImageRequest {
            id: disk.to_owned(),
        };
        let mut client = self.client().await?;
        let answer = client
            .get_image(with_deadline(request, CALL_DEADLINE))
            .await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(refused("GetImage"))
    }

    /// What is noted of writes.
    pub(crate) async fn bitmaps(&self, disk: &str) -> Result<Vec<Bitmap>, DaemonError> {
        let request = ListBitmapsRequest {
            id: disk.to_owned(),
        };
        let mut client = self.client().await?;
        let answer = client
            .list_bitmaps(with_deadline(request, CALL_DEADLINE))
            .await;
        answer
            .map(|answer| answer.into_inner().bitmaps)
            .map_err(refused("ListBitmaps"))
    }

    /// Makes the disk larger.
    pub(crate) async fn resize(&self, disk: &str, capacity_bytes: u64) -> Result<(), DaemonError> {
        let request = ResizeRequest {
            id: disk.to_owned(),
            capacity_bytes,
        };
        let mut client = self.client().await?;
        let answer = client.resize(with_deadline(request, SWITCH_DEADLINE)).await;
        answer.map(drop).map_err(refused("to resize the disk"))
    }

    /// Writes go to an overlay from now on.
    pub(crate) async fn snapshot(&self, request: SnapshotRequest) -> Result<(), DaemonError> {
        let mut client = self.client().await?;
        let answer = client
            .snapshot(with_deadline(request, SWITCH_DEADLINE))
            .await;
        answer.map(drop).map_err(refused("the snapshot"))
    }

    /// Begins a job.
    pub(crate) async fn start_mirror(
        &self,
        request: StartMirrorRequest,
    ) -> Result<Job, DaemonError> {
        let mut client = self.client().await?;
        let answer = client
            .start_mirror(with_deadline(request, SWITCH_DEADLINE))
            .await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(refused("the mirror"))
    }

    /// Begins a job.
    pub(crate) async fn start_backup(
        &self,
        request: StartBackupRequest,
    ) -> Result<Job, DaemonError> {
        let mut client = self.client().await?;
        let answer = client
            .start_backup(with_deadline(request, SWITCH_DEADLINE))
            .await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(refused("the backup"))
    }

    /// Begins a job.
    pub(crate) async fn start_commit(
        &self,
        request: StartCommitRequest,
    ) -> Result<Job, DaemonError> {
        let mut client = self.client().await?;
        let answer = client
            .start_commit(with_deadline(request, SWITCH_DEADLINE))
            .await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(refused("the commit"))
    }

    /// Begins a job.
    pub(crate) async fn start_check(&self, request: StartCheckRequest) -> Result<Job, DaemonError> {
        let mut client = self.client().await?;
        let answer = client
            .start_check(with_deadline(request, SWITCH_DEADLINE))
            .await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(refused("the check"))
    }

    /// How far a job is; `None` when the daemon knows none of this id.
    pub(crate) async fn job(&self, disk: &str, job: &str) -> Result<Option<Job>, DaemonError> {
        let request = GetJobRequest {
            id: disk.to_owned(),
            job_id: job.to_owned(),
        };
        let mut client = self.client().await?;
        match client.get_job(with_deadline(request, CALL_DEADLINE)).await {
            Ok(answer) => Ok(Some(answer.into_inner())),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(refused("GetJob")(status)),
        }
    }

    /// Switches a mirror over.
    pub(crate) async fn complete(&self, disk: &str, job: &str) -> Result<Job, DaemonError> {
        let request = CompleteJobRequest {
            id: disk.to_owned(),
            job_id: job.to_owned(),
        };
        let mut client = self.client().await?;
        let answer = client
            .complete_job(with_deadline(request, SWITCH_DEADLINE))
            .await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(refused("to switch over"))
    }

    /// What the daemon does beside serving the disk.
    pub(super) async fn jobs_under_way(&self, disk: &str) -> Result<Vec<Job>, DaemonError> {
        let request = ListJobsRequest {
            id: disk.to_owned(),
        };
        let mut client = self.client().await?;
        let answer = client
            .list_jobs(with_deadline(request, CALL_DEADLINE))
            .await;
        let mut jobs = answer.map_err(refused("ListJobs"))?.into_inner().jobs;
        jobs.retain(|job| matches!(job.state(), JobState::Running | JobState::Ready));
        Ok(jobs)
    }

    /// Ends a job, or forgets one that is over.
    pub(crate) async fn cancel(&self, disk: &str, job: &str) -> Result<(), DaemonError> {
        let request = CancelJobRequest {
            id: disk.to_owned(),
            job_id: job.to_owned(),
        };
        let mut client = self.client().await?;
        match client
            .cancel_job(with_deadline(request, SWITCH_DEADLINE))
            .await
        {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(refused("to cancel")(status)),
        }
    }

    async fn client(&self) -> Result<DisksClient<Channel>, DaemonError> {
        self.channel().await.map(DisksClient::new)
    }

    async fn channel(&self) -> Result<Channel, DaemonError> {
        connect::unix(&self.socket("sock"), CALL_DEADLINE)
            .await
            .map_err(|source| DaemonError::Connect {
                program: PROGRAM,
                source,
            })
    }

    fn socket(&self, extension: &str) -> PathBuf {
        self.dir
            .join(format!("{}.{extension}", DaemonKind::Blk.stem()))
    }
}

fn refused(call: &'static str) -> impl FnOnce(Status) -> DaemonError {
    move |status| DaemonError::Call {
        program: PROGRAM,
        call: call.to_owned(),
        code: status.code(),
        message: status.message().to_owned(),
    }
}
