//! Making a volume larger, and the disk of whoever uses it.

use api::node::ResizeVolume;

use super::{Context, JobError};
use crate::{
    spec::Format,
    volumes::{self, VolumeError},
};

impl Context {
    pub(super) async fn resize(&self, work: ResizeVolume) -> Result<Vec<String>, JobError> {
        let ResizeVolume { volume, size_bytes } = work;
        let pool = &self.agent.env.volumes;
        let _changing = pool.change(&volume)?;
        let served = self.served(&volume).await?;
        let mut record = pool.record(&volume)?;
        if served.is_none() {
            pool.settle(&mut record)?;
        } else if record.pending.is_some() {
            return Err(VolumeError::Busy { id: volume }.into());
        }
        pool.refuse_frozen(&volume)?;
        let now_bytes = pool.capacity_bytes(&record)?;
        if size_bytes < now_bytes {
            return Err(VolumeError::Shrink {
                id: volume,
                size_bytes: now_bytes,
            }
            .into());
        }
        let layer = record.layers[0].clone();
        // A qcow2 image belongs to the daemon that has it open; a raw one is grown first, so that
        // the daemon finds it as large as it is told.
        if served.is_none() || layer.format == Format::Raw {
            let id = volume.clone();
            let grow = move |agent: &crate::agent::Agent| {
                volumes::grow_layer(
                    &agent.env.volumes,
                    &id,
                    &layer,
                    record.encrypted,
                    size_bytes,
                )
            };
            self.blocking(grow).await?;
        }
        let Some(served) = served else {
            return Ok(Vec::new());
        };
        served.disks.resize(&served.disk, size_bytes).await?;
        let dir = self.agent.env.vm_dir(&served.vm);
        // The daemon tells vmm-core as well; the guest hears of it once.
        if let Err(error) = crate::vm::refresh_device(&dir, &served.disk).await {
            tracing::warn!(
                vm = served.vm,
                "telling the guest of its disk's new size: {}",
                crate::vm::error_chain(&error)
            );
        }
        Ok(Vec::new())
    }
}
