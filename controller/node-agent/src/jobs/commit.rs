//! Merging the newest snapshot's layer and what was written since.

use api::{device::StartCommitRequest, node::CommitDisk};

use super::{Context, JobError};
use crate::{
    image,
    volumes::{Pending, VolumeError},
};

impl Context {
    pub(super) async fn commit(&self, work: CommitDisk) -> Result<Vec<String>, JobError> {
        let CommitDisk { volume } = work;
        let pool = &self.agent.env.volumes;
        let _changing = pool.change(&volume)?;
        let Some(served) = self
            .served(&volume)
            .await?
            .filter(|served| !served.read_only)
        else {
            return Err(JobError::NotServed {
                what: format!("merging layers of volume {volume:?}"),
            });
        };
        let mut record = pool.record(&volume)?;
        if record.pending.is_some() {
            self.settle_served(&mut record, &served).await?;
        }
        if record.layers.len() < 2 {
            return Err(JobError::NoSnapshot { volume });
        }
        pool.refuse_clones(&volume)?;
        pool.unmark(&record.layers[1])
            .map_err(crate::volumes::io_error(&volume, "preparing the merge"))?;
        record.pending = Some(Pending::Commit);
        pool.save(&record)?;
        let below = record.layers[1].clone();
        let path = pool.file(&below);
        let merged = async {
            // What the daemon has open of the layer below may be for reading only.
            let file =
                image::open(&path, false, below.format).map_err(|source| VolumeError::Image {
                    id: volume.clone(),
                    source,
                })?;
            let request = StartCommitRequest {
                id: served.disk.clone(),
                job_id: self.daemon_job(),
                base_fd: Some(served.disks.send(file, &served.disk).await?),
            };
            served.disks.start_commit(request).await?;
            self.follow(&served, || Ok(())).await
        };
        match merged.await {
            Ok(_) => {
                record.pending = None;
                pool.drop_top_layer(&mut record)?;
                Ok(Vec::new())
            }
            Err(error) => {
                // A daemon that is dead leaves it to its next incarnation.
                let _ = self.settle_served(&mut record, &served).await;
                Err(match error {
                    JobError::Volume(VolumeError::Busy { .. }) => JobError::DaemonRestarted,
                    other => other,
                })
            }
        }
    }
}
