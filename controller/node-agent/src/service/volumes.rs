//! Volumes in the API's words.

use api::node::{self, CreateVolumeRequest, VolumeStatus};
use tonic::Status;

use crate::{
    import::ImportRequest,
    spec::Format,
    volumes::{self, Base, Content, LayerInfo, Preallocation, Request, Volume},
};

/// Of a request that `api::validate` let through.
pub(super) fn request_from_validated(request: CreateVolumeRequest) -> Request {
    let preallocation = match request.preallocation() {
        node::Preallocation::Unspecified if request.preallocate => Preallocation::Falloc,
        node::Preallocation::Unspecified | node::Preallocation::Off => Preallocation::Off,
        node::Preallocation::Metadata => Preallocation::Metadata,
        node::Preallocation::Falloc => Preallocation::Falloc,
        node::Preallocation::Full => Preallocation::Full,
    };
    let not_empty = |text: String| (!text.is_empty()).then_some(text);
    let is_clone = !request.base.is_empty();
    let content = if let Some(import) = request.import {
        Content::Import(ImportRequest {
            upload: import.upload,
            format: import.format,
            file: import.file,
            sha256: import.sha256,
        })
    } else if is_clone {
        Content::Clone(Base {
            volume: request.base,
            snapshot: not_empty(request.base_snapshot),
        })
    } else if let Some(source) = not_empty(request.source_path) {
        Content::Copy(source.into())
    } else {
        Content::Nothing
    };
    Request {
        id: request.id,
        size_bytes: request.size_bytes,
        format: match is_clone {
            true => Format::Qcow2,
            false => Format::from_validated(&request.format),
        },
        preallocation,
        cluster_bytes: request.cluster_bytes,
        encrypted: request.encrypted,
        content,
    }
}

pub(super) fn status(volume: Volume, attached_to: String) -> VolumeStatus {
    let creating = volume.creating;
    let progress = creating.unwrap_or_default();
    let own = volume.layers.iter().take(volume.own_layers);
    VolumeStatus {
        path: volume
            .layers
            .first()
            .map(|layer| layer.path.display().to_string())
            .unwrap_or_default(),
        allocated_bytes: own.map(|layer| layer.allocated_bytes).sum(),
        attached_to,
        creating: creating.is_some(),
        copied_bytes: progress.done_bytes,
        total_bytes: progress.total_bytes,
        stage: progress.stage.to_owned(),
        size_bytes: volume.size_bytes,
        format: volume.format.name().to_owned(),
        base: volume.base.unwrap_or_default(),
        clones: volume.clones,
        layers: volume.layers.iter().map(layer).collect(),
        encrypted: volume.encrypted,
        key_present: volume.key_present,
        cluster_bytes: volume.cluster_bytes,
        id: volume.id,
    }
}

pub(super) fn layer(info: &LayerInfo) -> node::Layer {
    let at_ms = info.created_at_ms;
    node::Layer {
        path: info.path.display().to_string(),
        format: info.format.name().to_owned(),
        allocated_bytes: info.allocated_bytes,
        snapshot: info.snapshot.clone().unwrap_or_default(),
        create_time: (at_ms > 0).then(|| prost_types::Timestamp {
            seconds: (at_ms / 1000) as i64,
            nanos: (at_ms % 1000) as i32 * 1_000_000,
        }),
    }
}

/// The key could not be kept.
pub(super) fn key_error(id: &str) -> impl FnOnce(std::io::Error) -> Status {
    let error = volumes::io_error(id, "keeping its key");
    |source| error(source).into()
}
