//! The `Disks` service.

use api::controller::disks_server::Disks;
use api::controller::*;
use api::errors::invalid_field;
use api::names::Name;
use api::node::{self, start_job_request::Work};
use api::validate;
use tonic::{Request, Response, Status};

use super::{Api, caller, command_status, mask::apply_limit, reach};
use crate::commands::{self, CommandError, RequestKey};
use crate::model;

#[tonic::async_trait]
impl Disks for Api {
    async fn get_disk(&self, request: Request<GetDiskRequest>) -> Result<Response<VmDisk>, Status> {
        let (vm, disk) = validate::vm_disk_request(&request.into_inner().name, "")?;
        let stored = commands::get_vm(&self.store, &vm)
            .await
            .map_err(command_status)?;
        let spec = stored.record.vm.spec.clone().unwrap_or_default();
        commands::find_disk(&spec, &vm, &disk).map_err(command_status)?;
        let mut disks = self.disks(&vm).await?;
        disks.retain(|found| found.name.ends_with(&format!("/disks/{disk}")));
        disks
            .pop()
            .map(Response::new)
            .ok_or_else(|| Status::not_found(format!("disk {disk} was removed meanwhile")))
    }

    async fn list_disks(
        &self,
        request: Request<ListDisksRequest>,
    ) -> Result<Response<ListDisksResponse>, Status> {
        let parent = request.into_inner().parent;
        let vm =
            Name::parse_vm(&parent).map_err(|error| invalid_field("parent", error.to_string()))?;
        let disks = self.disks(&vm).await?;
        Ok(Response::new(ListDisksResponse { disks }))
    }

    async fn update_disk(
        &self,
        request: Request<UpdateDiskRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let name = validate::update_disk_request(&request)?;
        let project = &name.0.project;
        let key = RequestKey::new(project, &request.request_id, "UpdateDisk", &request);
        let given = request.disk.unwrap_or_default();
        let wanted = given.spec.unwrap_or_default();
        let mask = request.update_mask.unwrap_or_default().paths;
        // What comes out is checked before anything is stored.
        let stored = commands::get_vm(&self.store, &name.0)
            .await
            .map_err(command_status)?;
        let spec = stored.record.vm.spec.unwrap_or_default();
        let found = commands::find_disk(&spec, &name.0, &name.1).map_err(command_status)?;
        let mut changed = found.clone();
        apply_mask(&mut changed, &wanted, &mask);
        validate::disk_limits(&changed.limits.unwrap_or_default())?;
        let operation = commands::update_disk(
            &self.store,
            &name,
            &given.etag,
            &key,
            request.validate_only,
            |disk| {
                apply_mask(disk, &wanted, &mask);
                Ok::<(), CommandError>(())
            },
        );
        operation.await.map(Response::new).map_err(command_status)
    }

    async fn snapshot_disk(
        &self,
        request: Request<SnapshotDiskRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let name = validate::snapshot_disk_request(&request)?;
        let key = RequestKey::new(
            &name.0.project,
            &request.request_id,
            "SnapshotDisk",
            &request,
        );
        let kind = OperationKind::SnapshotDisk;
        let operation =
            commands::disk_job(&self.store, &name, kind, Some("snapshots"), &key, |disk| {
                Work::Snapshot(node::SnapshotDisk {
                    volume: disk.volume_id,
                    snapshot: request.snapshot_id.clone(),
                })
            });
        operation.await.map(Response::new).map_err(command_status)
    }

    async fn commit_disk(
        &self,
        request: Request<CommitDiskRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let name = validate::vm_disk_request(&request.name, &request.request_id)?;
        let key = RequestKey::new(&name.0.project, &request.request_id, "CommitDisk", &request);
        let kind = OperationKind::CommitDisk;
        let operation =
            commands::disk_job(&self.store, &name, kind, Some("snapshots"), &key, |disk| {
                Work::Commit(node::CommitDisk {
                    volume: disk.volume_id,
                })
            });
        operation.await.map(Response::new).map_err(command_status)
    }

    async fn mirror_disk(
        &self,
        request: Request<MirrorDiskRequest>,
    ) -> Result<Response<Operation>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        reach::path(&caller, &request.path, "path")?;
        let name = validate::mirror_disk_request(&request)?;
        let key = RequestKey::new(&name.0.project, &request.request_id, "MirrorDisk", &request);
        let kind = OperationKind::MirrorDisk;
        let operation =
            commands::disk_job(&self.store, &name, kind, Some("mirrors"), &key, |disk| {
                Work::Mirror(node::MirrorDisk {
                    volume: disk.volume_id,
                    format: request.format.clone(),
                    path: request.path.clone(),
                    auto_complete: request.auto_complete,
                    bytes_per_second: request.bytes_per_second,
                })
            });
        operation.await.map(Response::new).map_err(command_status)
    }

    async fn complete_mirror(
        &self,
        request: Request<CompleteMirrorRequest>,
    ) -> Result<Response<Operation>, Status> {
        let name = request.into_inner().operation;
        validate::flat_name(&name, "operations")?;
        let operation = commands::complete_mirror(&self.store, &name).await;
        operation.map(Response::new).map_err(command_status)
    }

    async fn backup_disk(
        &self,
        request: Request<BackupDiskRequest>,
    ) -> Result<Response<Operation>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        reach::path(&caller, &request.path, "path")?;
        let name = validate::backup_disk_request(&request)?;
        let key = RequestKey::new(&name.0.project, &request.request_id, "BackupDisk", &request);
        let kind = OperationKind::BackupDisk;
        let operation = commands::disk_job(&self.store, &name, kind, None, &key, |disk| {
            Work::Backup(node::BackupDisk {
                vm_id: disk.vm_id,
                disk: name.1.clone(),
                path: request.path.clone(),
                format: request.format.clone(),
                bitmap: request.bitmap.clone(),
                new_bitmap: request.new_bitmap.clone(),
                bytes_per_second: request.bytes_per_second,
            })
        });
        operation.await.map(Response::new).map_err(command_status)
    }
}

impl Api {
    async fn disks(&self, vm: &Name) -> Result<Vec<VmDisk>, Status> {
        let stored = commands::get_vm(&self.store, vm)
            .await
            .map_err(command_status)?;
        let record = stored.record;
        let host = self.hosts.reach(&record.host)?;
        let seen = host.get_disks(record.node_id.clone()).await?;
        let etag = model::etag(&record.vm.uid, record.vm.generation);
        let disks = record.vm.spec.unwrap_or_default().disks;
        Ok(disks
            .into_iter()
            .map(|disk| VmDisk {
                name: format!("{vm}/disks/{}", disk.name),
                etag: etag.clone(),
                status: seen
                    .iter()
                    .find(|seen| seen.name == disk.name)
                    .map(model::disk_status),
                spec: Some(disk),
            })
            .collect())
    }
}

/// Copies what the mask names, whose paths were validated.
fn apply_mask(disk: &mut Disk, wanted: &Disk, mask: &[String]) {
    let limits = wanted.limits.unwrap_or_default();
    for path in mask {
        match path.as_str() {
            "spec.polling" => disk.polling = wanted.polling,
            "spec.limits" => disk.limits = wanted.limits,
            _ => {
                let own = disk.limits.get_or_insert_default();
                let path = path.strip_prefix("spec.limits.").unwrap_or_default();
                let read = ("read", &mut own.read, limits.read);
                let write = ("write", &mut own.write, limits.write);
                apply_limit(path, [read, write], copy_figure);
            }
        }
    }
}

fn copy_figure(own: &mut RateLimit, wanted: &RateLimit, figure: &str) {
    match figure {
        "iops" => own.iops = wanted.iops,
        "bytes_per_second" => own.bytes_per_second = wanted.bytes_per_second,
        "burst_ios" => own.burst_ios = wanted.burst_ios,
        "burst_bytes" => own.burst_bytes = wanted.burst_bytes,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mask_changes_what_it_names_and_nothing_else() {
        let rate = |iops, bytes_per_second| {
            Some(RateLimit {
                iops,
                bytes_per_second,
                ..Default::default()
            })
        };
        let mut disk = Disk {
            serial: "s".into(),
            limits: Some(RateLimits {
                read: rate(1, 2),
                write: rate(3, 4),
            }),
            ..Default::default()
        };
        let wanted = Disk {
            serial: "other".into(),
            polling: Polling::Always as i32,
            limits: Some(RateLimits {
                read: rate(10, 20),
                write: None,
            }),
            ..Default::default()
        };
        let mask = ["spec.limits.read.iops", "spec.limits.write"].map(str::to_owned);
        apply_mask(&mut disk, &wanted, &mask);
        let limits = disk.limits.unwrap();
        assert_eq!((limits.read, limits.write), (rate(10, 2), None));
        assert_eq!((disk.serial.as_str(), disk.polling), ("s", 0));
    }
}
