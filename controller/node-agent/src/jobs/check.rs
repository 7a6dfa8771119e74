//! Looking for errors in a volume's tables.

use api::{device::StartCheckRequest, node::CheckVolume};

use super::{Context, JobError};
use crate::{
    image,
    spec::Format,
    volumes::{VolumeError, io_error},
};

impl Context {
    pub(super) async fn check(&self, work: CheckVolume) -> Result<Vec<String>, JobError> {
        let CheckVolume {
            volume,
            repair_leaks,
        } = work;
        let pool = &self.agent.env.volumes;
        let _changing = pool.change(&volume)?;
        let record = pool.record(&volume)?;
        let layer = record.layers[0].clone();
        if layer.format == Format::Raw {
            return Ok(vec!["a raw image has no tables that could be wrong".into()]);
        }
        let served = self.served(&volume).await?;
        let (corruptions, leaked, repaired, findings) = match served {
            Some(served) => {
                let request = StartCheckRequest {
                    id: served.disk.clone(),
                    job_id: self.daemon_job(),
                    repair_leaks: repair_leaks && !served.read_only,
                };
                served.disks.start_check(request).await?;
                let job = self.follow(&served, || Ok(())).await?;
                let found = job.check.unwrap_or_default();
                (
                    found.corruptions,
                    found.leaked_clusters,
                    found.repaired_clusters,
                    found.findings,
                )
            }
            None => {
                let look = move |agent: &crate::agent::Agent| {
                    check_idle(
                        agent,
                        &volume,
                        &agent.env.volumes.file(&layer),
                        repair_leaks,
                    )
                };
                self.blocking(look).await?
            }
        };
        if corruptions > 0 {
            return Err(JobError::Corrupt {
                corruptions,
                findings: findings.join("; "),
            });
        }
        let mut text = vec![format!("{leaked} leaked clusters, {repaired} repaired")];
        text.extend(findings);
        Ok(text)
    }
}

type Found = (u64, u64, u64, Vec<String>);

fn check_idle(
    agent: &crate::agent::Agent,
    id: &str,
    path: &std::path::Path,
    repair_leaks: bool,
) -> Result<Found, VolumeError> {
    let image = |source| VolumeError::Image {
        id: id.to_owned(),
        source,
    };
    let read_only = !repair_leaks;
    let file = image::open(path, read_only, Format::Qcow2).map_err(image)?;
    let claims = &agent.env.claims;
    let _claim = claims
        .claim(path, &file, "a check", read_only)
        .map_err(image)?;
    image::probe_locks(path, &file, read_only).map_err(image)?;
    let repair = if repair_leaks {
        qcow2::Repair::Leaks
    } else {
        qcow2::Repair::Nothing
    };
    let report = qcow2::check(&file, repair).map_err(|source| VolumeError::Qcow2 {
        id: id.to_owned(),
        action: "checking",
        path: path.to_owned(),
        source,
    })?;
    file.sync_all().map_err(io_error(id, "syncing it"))?;
    Ok((
        report.corruptions,
        report.leaked_clusters,
        report.repaired_clusters,
        report.findings,
    ))
}
