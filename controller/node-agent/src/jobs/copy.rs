//! Copying a disk while its guest uses it: a mirror goes on with the copy, a backup leaves it.

use std::path::{Path, PathBuf};

use api::{
    device::{StartBackupRequest, StartMirrorRequest, Target},
    node::{BackupDisk, MirrorDisk},
};

use super::{Context, JobError, Served};
use crate::{
    spec::Format,
    volumes::{self, Layer, Pending, VolumeError, VolumeRecord},
};

impl Context {
    pub(super) async fn mirror(&self, work: MirrorDisk) -> Result<Vec<String>, JobError> {
        let volume = &work.volume;
        let pool = &self.agent.env.volumes;
        let _changing = pool.change(volume)?;
        let Some(served) = self
            .served(volume)
            .await?
            .filter(|served| !served.read_only)
        else {
            return Err(JobError::NotServed {
                what: format!("mirroring volume {volume:?}"),
            });
        };
        let mut record = pool.record(volume)?;
        if record.pending.is_some() {
            self.settle_served(&mut record, &served).await?;
        }
        if record.encrypted {
            return Err(VolumeError::Encrypted {
                id: volume.clone(),
                what: "a mirror",
            }
            .into());
        }
        pool.refuse_clones(volume)?;
        let format = match work.format.as_str() {
            "" => record.layers[0].format,
            name => Format::from_validated(name),
        };
        let mut layer = record.new_layer(format);
        if !work.path.is_empty() {
            layer.file = PathBuf::from(&work.path);
        }
        let path = pool.file(&layer);
        let file = volumes::create_new(volume, &path)?;
        record.pending = Some(Pending::Copy {
            layer: layer.clone(),
        });
        if let Err(error) = pool.save(&record) {
            let _ = std::fs::remove_file(&path);
            return Err(error.into());
        }
        let before = pool.file(&record.layers[0]);
        let claimed = file
            .try_clone()
            .map_err(volumes::io_error(volume, "claiming the copy"))?;
        let copied = self.copy(&work, &served, &mut record, &layer, file).await;
        match copied {
            Ok(()) => pool.replace_layers(&mut record, layer)?,
            Err(error) => {
                // A daemon that is dead leaves it to its next incarnation.
                let asked = self.settle_served(&mut record, &served).await;
                if asked.is_err() || record.layers[0] != layer {
                    return Err(error);
                }
            }
        }
        self.agent.env.claims.follow(&before, &claimed);
        Ok(Vec::new())
    }

    async fn copy(
        &self,
        work: &MirrorDisk,
        served: &Served,
        record: &mut VolumeRecord,
        layer: &Layer,
        file: std::fs::File,
    ) -> Result<(), JobError> {
        let pool = &self.agent.env.volumes;
        let request = StartMirrorRequest {
            id: served.disk.clone(),
            job_id: self.daemon_job(),
            target: Some(
                self.target(served, layer.format, &pool.file(layer), file)
                    .await?,
            ),
            // The record comes before the switch.
            auto_complete: false,
            bytes_per_second: work.bytes_per_second,
        };
        served.disks.start_mirror(request).await?;
        if work.auto_complete {
            self.entry.wish.send_replace(super::Wish::Complete);
        }
        let on_switch = || {
            record.pending = Some(Pending::Switch {
                layer: layer.clone(),
            });
            Ok(pool.save(record)?)
        };
        self.follow(served, on_switch).await.map(drop)
    }

    pub(super) async fn backup(&self, work: BackupDisk) -> Result<Vec<String>, JobError> {
        let no_disk = || JobError::NoDisk {
            vm: work.vm_id.clone(),
            disk: work.disk.clone(),
        };
        let vm = self.agent.find(&work.vm_id).await.map_err(|_| no_disk())?;
        if !vm.spec().disks.iter().any(|disk| disk.name == work.disk) {
            return Err(no_disk());
        }
        let served = self.served_disk(&vm, work.disk.clone())?;
        let served = served.ok_or_else(|| JobError::NotServed {
            what: format!("a backup of disk {:?} of VM {:?}", work.disk, work.vm_id),
        })?;
        let format = Format::from_validated(&work.format);
        let path = PathBuf::from(&work.path);
        let updates = !work.bitmap.is_empty() && format == Format::Raw && path.exists();
        let file = if updates {
            std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .map_err(volumes::io_error(&work.disk, "opening the backup"))?
        } else {
            volumes::create_new(&work.disk, &path)?
        };
        let synced = file
            .try_clone()
            .map_err(volumes::io_error(&work.disk, "opening the backup"))?;
        let copied = async {
            let request = StartBackupRequest {
                id: served.disk.clone(),
                job_id: self.daemon_job(),
                target: Some(self.target(&served, format, &path, file).await?),
                bitmap: work.bitmap.clone(),
                new_bitmap: work.new_bitmap.clone(),
                bytes_per_second: work.bytes_per_second,
            };
            served.disks.start_backup(request).await?;
            self.follow(&served, || Ok(())).await
        };
        if let Err(error) = copied.await {
            if !updates {
                // Half a backup is none.
                let _ = std::fs::remove_file(&path);
            }
            return Err(error);
        }
        let disk = work.disk.clone();
        self.blocking(move |_| {
            synced
                .sync_all()
                .map_err(volumes::io_error(&disk, "syncing"))
        })
        .await?;
        Ok(Vec::new())
    }

    async fn target(
        &self,
        served: &Served,
        format: Format,
        path: &Path,
        file: std::fs::File,
    ) -> Result<Target, JobError> {
        Ok(Target {
            image_fd: Some(served.disks.send(file, &served.disk).await?),
            format: format.name().to_owned(),
            name: path.display().to_string(),
            ..Target::default()
        })
    }
}
