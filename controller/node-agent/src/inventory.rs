//! What a scheduler wants to know of this host: its CPU, its NUMA nodes, its huge pages, the programs that
//! run VMs, and what people call it. Read from /proc and /sys, once, but for what changes.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, OnceLock},
    time::Duration,
};

use api::node::{HostStatus, HugePages, InstalledProgram, NumaNode};

use crate::host;

/// What runs VMs, beside the agent.
const PROGRAMS: [&str; 3] = ["vmm-core", "device-blk", "device-net"];
/// A program says its version at once; a machine under load may take a while to start it.
const VERSION_PATIENCE: Duration = Duration::from_secs(10);
const KIB: u64 = 1024;

/// What does not change as long as the agent lives. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Inventory {
    zone: String,
    labels: BTreeMap<String, String>,
    cpu: Cpu,
    state_dir: PathBuf,
    /// Known a moment after the start.
    programs: Arc<OnceLock<Vec<InstalledProgram>>>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Cpu {
    model: String,
    vendor: String,
    features: Vec<String>,
}

impl Inventory {
    /// Finds out; asks the programs in the background.
    pub(crate) fn open(
        state_dir: &Path,
        bin_dir: &Path,
        zone: String,
        labels: BTreeMap<String, String>,
    ) -> Self {
        let inventory = Self {
            zone,
            labels,
            cpu: cpu(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            state_dir: state_dir.to_owned(),
            programs: Arc::default(),
        };
        let (programs, bin_dir) = (inventory.programs.clone(), bin_dir.to_owned());
        tokio::spawn(async move {
            let mut found = Vec::new();
            for name in PROGRAMS {
                let version = version(&bin_dir.join(name)).await;
                found.extend(version.map(|version| InstalledProgram {
                    name: name.to_owned(),
                    version,
                }));
            }
            let _ = programs.set(found);
        });
        inventory
    }

    /// Adds all of it to what the agent says of the host.
    pub(crate) fn add_to(&self, status: &mut HostStatus) {
        status.zone = self.zone.clone();
        status.labels = self.labels.clone();
        status.cpu_model = self.cpu.model.clone();
        status.cpu_vendor = self.cpu.vendor.clone();
        status.cpu_features = self.cpu.features.clone();
        status.numa_nodes = numa_nodes(Path::new("/sys/devices/system/node"));
        status.huge_pages = huge_pages(Path::new("/sys/kernel/mm/hugepages"));
        status.programs = self.programs.get().cloned().unwrap_or_default();
        if let Ok(pool) = nix::sys::statvfs::statvfs(&self.state_dir) {
            let block = pool.fragment_size();
            status.pool_bytes = pool.blocks().saturating_mul(block);
            status.pool_free_bytes = pool.blocks_available().saturating_mul(block);
        }
    }
}

/// What a program that is installed says with --version, without its name; `None` if it is not there.
async fn version(program: &Path) -> Option<String> {
    if !program.is_file() {
        return None;
    }
    let output = tokio::process::Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let said = match tokio::time::timeout(VERSION_PATIENCE, output).await {
        Ok(Ok(output)) if output.status.success() => output.stdout,
        _ => Vec::new(),
    };
    let said = String::from_utf8_lossy(&said);
    let version = said.lines().next().and_then(|line| line.split(' ').nth(1));
    Some(version.unwrap_or_default().to_owned())
}

/// The first CPU's: hosts with different ones in one machine are not made.
fn cpu(cpuinfo: &str) -> Cpu {
    let field = |name: &str| {
        let lines = cpuinfo.lines().take_while(|line| !line.is_empty());
        let mut fields = lines.filter_map(|line| line.split_once(':'));
        let found = fields.find(|(key, _)| key.trim() == name);
        found.map(|(_, value)| value.trim().to_owned())
    };
    let mut features: Vec<String> = field("flags")
        .unwrap_or_default()
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    features.sort_unstable();
    Cpu {
        model: field("model name").unwrap_or_default(),
        vendor: field("vendor_id").unwrap_or_default(),
        features,
    }
}

fn numa_nodes(dir: &Path) -> Vec<NumaNode> {
    let mut nodes = Vec::new();
    for (number, path) in numbered(dir, "node", "") {
        let read = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
        // "Node 0 MemTotal:  1000 kB"
        let meminfo = read("meminfo").replace(&format!("Node {number} "), "");
        nodes.push(NumaNode {
            node: u32::try_from(number).unwrap_or(u32::MAX),
            cpus: read("cpulist").trim().to_owned(),
            memory_bytes: host::parse_meminfo_bytes(&meminfo, "MemTotal"),
        });
    }
    nodes
}

fn huge_pages(dir: &Path) -> Vec<HugePages> {
    let mut sizes = Vec::new();
    for (kib, path) in numbered(dir, "hugepages-", "kB") {
        let read = |file: &str| {
            let text = fs::read_to_string(path.join(file)).unwrap_or_default();
            text.trim().parse().unwrap_or(0)
        };
        sizes.push(HugePages {
            page_bytes: kib.saturating_mul(KIB),
            pages: read("nr_hugepages"),
            free_pages: read("free_hugepages"),
        });
    }
    sizes
}

/// Entries whose name is a number between these words, in order.
fn numbered(dir: &Path, before: &str, after: &str) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let number = name.strip_prefix(before)?.strip_suffix(after)?;
            Some((number.parse().ok()?, entry.path()))
        })
        .collect();
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_is_read_from_its_first_paragraph() {
        let text = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Example: 9\n\
                    flags\t\t: sse4_2 avx2\n\nprocessor\t: 1\nflags\t\t: none\n";
        let expected = Cpu {
            model: "Example: 9".into(),
            vendor: "GenuineIntel".into(),
            features: vec!["avx2".into(), "sse4_2".into()],
        };
        assert_eq!(cpu(text), expected);
        assert_eq!(cpu(""), Cpu::default());
    }

    #[test]
    fn nodes_and_pages_are_read_in_order() {
        let dir = tempfile::tempdir().unwrap();
        for node in [10, 2] {
            let path = dir.path().join(format!("node{node}"));
            fs::create_dir(&path).unwrap();
            fs::write(path.join("cpulist"), "0-3\n").unwrap();
            let meminfo = format!("Node {node} MemTotal:  1000 kB\nNode {node} MemFree: 1 kB\n");
            fs::write(path.join("meminfo"), meminfo).unwrap();
        }
        let nodes = numa_nodes(dir.path());
        assert_eq!(nodes.iter().map(|n| n.node).collect::<Vec<_>>(), [2, 10]);
        assert_eq!(nodes[0].memory_bytes, 1000 * KIB);
        let pages = dir.path().join("hugepages-2048kB");
        fs::create_dir(&pages).unwrap();
        fs::write(pages.join("nr_hugepages"), "7\n").unwrap();
        fs::write(pages.join("free_hugepages"), "3\n").unwrap();
        let found = huge_pages(dir.path());
        assert_eq!((found[0].page_bytes, found[0].pages), (2048 * KIB, 7));
        assert_eq!(found[0].free_pages, 3);
    }
}
