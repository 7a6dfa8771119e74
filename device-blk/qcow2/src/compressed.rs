//! Compressed clusters, which are only read: a write puts the cluster elsewhere.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};

use crate::entry::Compressed;
use crate::storage::{SECTOR_BYTES, Storage};

/// Inflated clusters that are kept, because requests are smaller than clusters.
const MAX_KEPT_BYTES: usize = 1 << 20;

/// Clusters that were inflated last, known by file and place. Nothing new is compressed, so a
/// place that had compressed data never gets other compressed data.
#[derive(Debug, Default)]
pub(crate) struct Inflated {
    /// Newest last.
    clusters: VecDeque<(Key, Arc<[u8]>)>,
}

type Key = (usize, Compressed);

/// The whole cluster that `stretch` was made of.
pub(crate) fn inflate(
    storage: &Storage,
    stretch: Compressed,
    cluster_bytes: usize,
    kept: &Mutex<Inflated>,
) -> io::Result<Arc<[u8]>> {
    let key = (Arc::as_ptr(storage.file()).addr(), stretch);
    {
        let kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, cluster)) = kept.clusters.iter().find(|(other, _)| *other == key) {
            return Ok(Arc::clone(cluster));
        }
    }
    let start = stretch.offset / SECTOR_BYTES * SECTOR_BYTES;
    let skip = (stretch.offset - start) as usize;
    let len = (skip + stretch.len_bytes as usize).next_multiple_of(SECTOR_BYTES as usize);
    let deflated = storage.read_new(start, len)?;
    let deflated = &deflated[skip..skip + stretch.len_bytes as usize];
    let mut cluster = vec![0; cluster_bytes];
    let (status, _, inflated) = decompress(
        &mut DecompressorOxide::new(),
        deflated,
        &mut cluster,
        0,
        TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
    );
    // As QEMU: a full cluster is enough, whatever follows.
    let enough = matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput);
    if !enough || inflated != cluster_bytes {
        tracing::warn!(
            offset = stretch.offset,
            ?status,
            "a compressed cluster cannot be inflated"
        );
        return Err(io::Error::from_raw_os_error(libc::EIO));
    }
    let cluster: Arc<[u8]> = cluster.into();
    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
    let max = (MAX_KEPT_BYTES / cluster_bytes).max(1);
    if kept.clusters.len() >= max {
        kept.clusters.pop_front();
    }
    kept.clusters.push_back((key, Arc::clone(&cluster)));
    Ok(cluster)
}
