//! Where data cannot be.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use crate::entry;
use crate::error::Error;
use crate::header::Header;

/// Clusters that hold tables, and where the file ends: nothing else is taken for data.
#[derive(Debug, Default)]
pub(crate) struct Metadata {
    clusters: RwLock<HashSet<u64>>,
    /// Clusters of the file.
    pub(super) end: AtomicU64,
}

impl Metadata {
    /// Whether a data cluster can be here.
    pub(crate) fn admits(&self, cluster: u64) -> bool {
        cluster < self.end.load(Ordering::Acquire) && !self.contains(cluster)
    }

    pub(super) fn contains(&self, cluster: u64) -> bool {
        self.clusters
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&cluster)
    }

    pub(crate) fn add(&self, clusters: impl IntoIterator<Item = u64>) {
        self.clusters
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(clusters);
    }

    pub(crate) fn remove(&self, clusters: impl IntoIterator<Item = u64>) {
        let mut set = self
            .clusters
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        for cluster in clusters {
            set.remove(&cluster);
        }
    }
}

/// Numbers of the clusters that hold the header and the tables of an image.
///
/// # Errors
/// Two tables lie in the same cluster.
pub(super) fn tables_of(
    header: &Header,
    refcount_table: &[u64],
    l1: &[u64],
) -> Result<HashSet<u64>, Error> {
    let cluster_bits = header.cluster_bits;
    let l1_clusters = (u64::from(header.l1_entries) * 8).div_ceil(header.cluster_bytes());
    let l1_first = header.l1_offset >> cluster_bits;
    let table_first = header.refcount_table_offset >> cluster_bits;
    let mut clusters = HashSet::from([0]);
    let mut add = |cluster| {
        if clusters.insert(cluster) {
            return Ok(());
        }
        Err(Error::corrupt(format!(
            "two tables in the cluster at {:#x}",
            cluster << cluster_bits
        )))
    };
    (l1_first..l1_first + l1_clusters).try_for_each(&mut add)?;
    (table_first..table_first + u64::from(header.refcount_table_clusters))
        .try_for_each(&mut add)?;
    for &block in refcount_table.iter().filter(|&&block| block != 0) {
        add(block >> cluster_bits)?;
    }
    for &l1_entry in l1 {
        if let Some(table) = entry::l2_table(l1_entry, cluster_bits)? {
            if l1_entry & entry::COPIED == 0 {
                return Err(Error::corrupt(
                    "an L2 table that is shared, without a snapshot",
                ));
            }
            add(table >> cluster_bits)?;
        }
    }
    Ok(clusters)
}
