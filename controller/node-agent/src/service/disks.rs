//! A VM's disks in the API's words: what its spec wants, with what the daemon says.

use std::sync::Arc;

use api::node::{self, Bitmap, DiskStatus, VmPhase};

use super::{blocking, volumes};
use crate::{
    agent::Agent,
    spec::{Disk, DiskSource},
    vm::{Vm, disks::Disks},
    volumes::LayerInfo,
};

pub(super) async fn describe(agent: &Arc<Agent>, vm: &Vm) -> Vec<DiskStatus> {
    let spec = vm.spec();
    let runs = matches!(vm.status().phase(), VmPhase::Running | VmPhase::Paused);
    let disks = Disks::of(&agent.env.vm_dir(&spec.id));
    let mut described = Vec::new();
    for disk in &spec.disks {
        let mut status = at_rest(agent, disk).await;
        if runs {
            add_figures(&disks, disk, &mut status).await;
        }
        described.push(status);
    }
    described
}

async fn at_rest(agent: &Arc<Agent>, disk: &Disk) -> DiskStatus {
    let limits = disk.tuning.limits();
    let mut status = DiskStatus {
        name: disk.name.clone(),
        read_only: disk.read_only,
        format: disk.format.name().to_owned(),
        limits: Some(rate_limits(&limits)),
        polling: disk.tuning.polling() as i32,
        ..DiskStatus::default()
    };
    match &disk.source {
        DiskSource::Volume(id) => {
            status.volume = id.clone();
            let (pool, id) = (agent.env.volumes.clone(), id.clone());
            if let Ok(volume) = blocking(move || pool.get(&id)).await {
                status.format = volume.format.name().to_owned();
                status.capacity_bytes = volume.size_bytes;
                status.encrypted = volume.encrypted;
                status.layers = volume.layers.iter().map(volumes::layer).collect();
            }
        }
        DiskSource::Path(path) => {
            let metadata = std::fs::metadata(path).ok();
            status.layers = vec![volumes::layer(&LayerInfo {
                path: path.clone(),
                format: disk.format,
                allocated_bytes: metadata.map_or(0, |metadata| {
                    std::os::unix::fs::MetadataExt::blocks(&metadata) * 512
                }),
                snapshot: None,
                created_at_ms: 0,
            })];
        }
        DiskSource::Nbd(nbd) => {
            status.format = "nbd".to_owned();
            status.layers = vec![node::Layer {
                path: format!("{}/{}", nbd.address, nbd.export),
                format: "nbd".to_owned(),
                ..node::Layer::default()
            }];
        }
    }
    status
}

async fn add_figures(disks: &Disks, disk: &Disk, status: &mut DiskStatus) {
    let Ok(device) = disks.device(&disk.name).await else {
        return;
    };
    let Some(blk) = device.blk else {
        return;
    };
    status.served = true;
    status.capacity_bytes = blk.capacity_bytes;
    status.direct_io = blk.direct_io;
    status.inflight = device.inflight;
    if let Some(limits) = &blk.limits {
        status.limits = Some(rate_limits(limits));
    }
    status.read_requests = blk.read_requests;
    status.read_bytes = blk.read_bytes;
    status.write_requests = blk.write_requests;
    status.write_bytes = blk.write_bytes;
    status.flush_requests = blk.flush_requests;
    status.errors = blk.errors;
    status.throttled = blk.throttled;
    status.slow_requests = blk.slow_requests;
    let latency = blk.latency.unwrap_or_default();
    status.latency_p50_us = latency.p50_us;
    status.latency_p99_us = latency.p99_us;
    status.latency_p999_us = latency.p999_us;
    status.latency_max_us = latency.max_us;
    status.latency_buckets = blk.latency_buckets;
    if let Ok(bitmaps) = disks.bitmaps(&disk.name).await {
        status.bitmaps = bitmaps
            .into_iter()
            .map(|bitmap| Bitmap {
                bitmap: bitmap.bitmap,
                granularity_bytes: bitmap.granularity_bytes,
                dirty_bytes: bitmap.dirty_bytes,
            })
            .collect();
    }
}

fn rate_limits(limits: &api::device::RateLimits) -> node::RateLimits {
    let rate = |limit: &Option<api::device::RateLimit>| {
        limit.as_ref().map(|limit| node::RateLimit {
            iops: limit.iops,
            bytes_per_second: limit.bytes_per_second,
            burst_ios: limit.burst_ios,
            burst_bytes: limit.burst_bytes,
        })
    };
    node::RateLimits {
        read: rate(&limits.read),
        write: rate(&limits.write),
    }
}
