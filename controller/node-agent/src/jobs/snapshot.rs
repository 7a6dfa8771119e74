//! Keeping what a volume holds now: it goes on in a new layer.
//!
//! The new layer is noted before anything can be written to it and made the first one afterwards;
//! in between, a crash of anybody is settled by whether the layer holds data
//! ([`crate::volumes::Pool::settle`]).

use api::{device::SnapshotRequest, node::SnapshotDisk};

use super::{Context, JobError, Served};
use crate::{
    spec::Format,
    volumes::{self, Layer, MAX_LAYERS, Pending, VolumeError, VolumeRecord},
};

impl Context {
    pub(super) async fn snapshot(&self, work: SnapshotDisk) -> Result<Vec<String>, JobError> {
        let SnapshotDisk { volume, snapshot } = work;
        let pool = &self.agent.env.volumes;
        let _changing = pool.change(&volume)?;
        let served = self.served(&volume).await?;
        let mut record = pool.record(&volume)?;
        match &served {
            None => pool.settle(&mut record)?,
            Some(served) if record.pending.is_some() => {
                self.settle_served(&mut record, served).await?;
            }
            Some(_) => {}
        }
        let taken = |layer: &Layer| layer.snapshot.as_ref() == Some(&snapshot);
        if record.layers.iter().any(taken) {
            return Err(VolumeError::SnapshotExists {
                id: volume,
                snapshot,
            }
            .into());
        }
        if record.encrypted {
            return Err(VolumeError::Encrypted {
                id: volume,
                what: "a snapshot's new layer",
            }
            .into());
        }
        pool.refuse_frozen(&volume)?;
        let layers = pool.chain(&volume, false)?.layers.len() + 1;
        if layers > MAX_LAYERS {
            return Err(VolumeError::Layers {
                id: volume,
                layers,
                max: MAX_LAYERS,
            }
            .into());
        }
        match served {
            Some(served) if !served.read_only => {
                self.snapshot_served(&mut record, &served, snapshot).await?;
            }
            _ => self.snapshot_idle(record, snapshot).await?,
        }
        Ok(Vec::new())
    }

    /// Nobody writes it: the new layer is made here.
    async fn snapshot_idle(
        &self,
        mut record: VolumeRecord,
        snapshot: String,
    ) -> Result<(), JobError> {
        let make = move |agent: &crate::agent::Agent| -> Result<(), VolumeError> {
            let pool = &agent.env.volumes;
            let top = record.layers[0].clone();
            let size_bytes = pool.capacity_bytes(&record)?;
            let layer = record.new_layer(Format::Qcow2);
            let path = pool.file(&layer);
            let backing = qcow2::BackingRef {
                name: pool.file(&top).display().to_string(),
                format: Some(top.format.name().to_owned()),
            };
            let file = volumes::create_file(&record.id, &path)?;
            volumes::make_overlay(&record.id, &file, &path, size_bytes, backing)?;
            record.push(layer, snapshot);
            pool.save(&record)
        };
        Ok(self.blocking(make).await?)
    }

    async fn snapshot_served(
        &self,
        record: &mut VolumeRecord,
        served: &Served,
        snapshot: String,
    ) -> Result<(), JobError> {
        let pool = &self.agent.env.volumes;
        let top = pool.file(&record.layers[0]);
        let layer = record.new_layer(Format::Qcow2);
        let path = pool.file(&layer);
        let file = volumes::create_file(&record.id, &path)?;
        record.pending = Some(Pending::Snapshot {
            layer: layer.clone(),
            snapshot: snapshot.clone(),
        });
        pool.save(record)?;
        let claimed = file
            .try_clone()
            .map_err(volumes::io_error(&record.id, "claiming it"))?;
        let switched = async {
            let overlay_fd = served.disks.send(file, &served.disk).await?;
            let request = SnapshotRequest {
                id: served.disk.clone(),
                overlay_fd: Some(overlay_fd),
                overlay_name: path.display().to_string(),
            };
            served.disks.snapshot(request).await
        };
        let switched = switched.await;
        if switched.is_err() {
            // Whether it happened is for the daemon to say, or, if it is dead, for its next
            // incarnation to be found out.
            self.settle_served(record, served).await?;
        } else {
            record.pending = None;
            record.push(layer.clone(), snapshot);
            pool.save(record)?;
        }
        if record.layers[0] == layer {
            self.agent.env.claims.follow(&top, &claimed);
            return Ok(());
        }
        Err(switched
            .err()
            .map_or(JobError::DaemonRestarted, JobError::from))
    }

    /// Asks the daemon which image it writes, and makes the record say so.
    pub(super) async fn settle_served(
        &self,
        record: &mut VolumeRecord,
        served: &Served,
    ) -> Result<(), JobError> {
        let pool = &self.agent.env.volumes;
        let image = served.disks.image(&served.disk).await?;
        match record.pending.take() {
            Some(Pending::Snapshot { layer, snapshot }) => {
                let path = pool.file(&layer);
                let happened = image.name == path.display().to_string();
                if happened {
                    record.push(layer, snapshot);
                }
                pool.save(record)?;
                if !happened {
                    let _ = std::fs::remove_file(path);
                }
            }
            Some(Pending::Copy { layer } | Pending::Switch { layer }) => {
                let path = pool.file(&layer);
                if image.name == path.display().to_string() {
                    pool.replace_layers(record, layer)?;
                } else {
                    pool.save(record)?;
                    let _ = std::fs::remove_file(path);
                }
            }
            Some(Pending::Commit) => {
                let below = record.layers.get(1).map(|layer| pool.file(layer));
                if below.is_some_and(|path| image.name == path.display().to_string()) {
                    pool.drop_top_layer(record)?;
                } else {
                    pool.save(record)?;
                }
            }
            None => {}
        }
        Ok(())
    }
}
