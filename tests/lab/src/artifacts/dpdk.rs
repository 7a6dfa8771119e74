//! DPDK and the Open vSwitch that uses it: what NICs are measured with and against.
//!
//! They have a stamp of their own, since only `cargo lab bench net` needs them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{Apt, Fetcher, Program, unpacked_program};
use crate::workspace;

/// Raised when more is needed than an older stamp promises.
const STAMP_VERSION: u32 = 2;

/// The package with testpmd; its headers and static libraries are not wanted.
const TESTPMD_PACKAGE: &str = "dpdk-dev";
/// In the tree of unpacked packages, and how deep.
const TESTPMD: &str = "usr/bin/dpdk-testpmd";
const PROGRAM_DEPTH: usize = 3;
const OPEN_VSWITCH_PACKAGE: &str = "openvswitch-switch-dpdk";
/// Drivers are loaded at run time, so testpmd does not depend on them all.
const DRIVER_PACKAGES: [&str; 5] = [
    "librte-net-virtio23",
    "librte-net-vhost23",
    "librte-net-tap23",
    "librte-net-af-packet23",
    "librte-net-pcap23",
];

/// Where everything is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Dpdk {
    stamp_version: u32,
    pub(crate) testpmd: Program,
    /// For `-d`: where drivers are. DPDK refuses a directory that others may write to.
    pub(crate) driver_dir: PathBuf,
    pub(crate) open_vswitch: OpenVswitch,
}

/// Open vSwitch with DPDK.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct OpenVswitch {
    pub(crate) vswitchd: Program,
    pub(crate) database_server: Program,
    pub(crate) database_tool: Program,
    pub(crate) control: Program,
    pub(crate) flow_control: Program,
    pub(crate) schema: PathBuf,
}

impl Dpdk {
    /// What the stamp describes, or else fetches it.
    ///
    /// # Errors
    /// One line that names what could not be had.
    pub(crate) fn obtain() -> Result<Self> {
        let dir = workspace::lab_subdir("artifacts")?;
        let lock = fs::File::create(dir.join("lock"))?;
        lock.lock()
            .context("cannot lock target/lab/artifacts/lock")?;
        let stamp = dir.join("dpdk.json");
        if let Some(dpdk) = Self::from_stamp(&stamp) {
            return Ok(dpdk);
        }
        discard(&stamp, &dir)?;
        let root = Fetcher::new(&dir)?.fresh("dpdk", packages)?;
        let dpdk = Self::in_tree(&root)?;
        fs::write(&stamp, serde_json::to_vec_pretty(&dpdk)?)?;
        Ok(dpdk)
    }

    fn from_stamp(stamp: &Path) -> Option<Self> {
        let dpdk: Self = serde_json::from_slice(&fs::read(stamp).ok()?).ok()?;
        let is_complete = dpdk.stamp_version == STAMP_VERSION
            && dpdk.testpmd.file.exists()
            && dpdk.driver_dir.exists()
            && dpdk.open_vswitch.schema.exists();
        is_complete.then_some(dpdk)
    }

    fn in_tree(root: &Path) -> Result<Self> {
        let libraries = root.join("usr/lib/x86_64-linux-gnu/dpdk");
        let program = |path: &str| -> Result<Program> {
            let file = root.join(path);
            anyhow::ensure!(file.is_file(), "DPDK's packages have no {path}");
            Ok(unpacked_program(root, file))
        };
        Ok(Self {
            stamp_version: STAMP_VERSION,
            testpmd: program(TESTPMD)?,
            driver_dir: only_directory_in(&libraries)?,
            open_vswitch: OpenVswitch {
                vswitchd: program("usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk")?,
                database_server: program("usr/sbin/ovsdb-server")?,
                database_tool: program("usr/bin/ovsdb-tool")?,
                control: program("usr/bin/ovs-vsctl")?,
                flow_control: program("usr/bin/ovs-ofctl")?,
                schema: root.join("usr/share/openvswitch/vswitch.ovsschema"),
            },
        })
    }
}

/// Removes what an older stamp describes: it is incomplete, and would be taken for the same packages.
fn discard(stamp: &Path, dir: &Path) -> Result<()> {
    let Ok(bytes) = fs::read(stamp) else {
        return Ok(());
    };
    if let Ok(old) = serde_json::from_slice::<Dpdk>(&bytes)
        && let Some(root) = old.testpmd.file.ancestors().nth(PROGRAM_DEPTH)
        && root.starts_with(dir)
        && root != dir
        && root.is_dir()
    {
        fs::remove_dir_all(root).with_context(|| format!("cannot remove {}", root.display()))?;
    }
    fs::remove_file(stamp).with_context(|| format!("cannot remove {}", stamp.display()))
}

/// The packages, with the libraries that testpmd and the drivers need.
fn packages(apt: &Apt) -> Result<Vec<super::apt::Package>> {
    let (testpmd, depends) = apt.candidate(TESTPMD_PACKAGE)?;
    let mut names: Vec<&str> = depends
        .iter()
        .map(String::as_str)
        .filter(|name| !name.ends_with("-dev") && !name.starts_with("python3"))
        .collect();
    names.extend(DRIVER_PACKAGES);
    names.push(OPEN_VSWITCH_PACKAGE);
    let mut packages = apt.closure(&names)?;
    packages.push(testpmd);
    Ok(packages)
}

/// Its name has a version.
fn only_directory_in(dir: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .flatten();
    let entry = entries.next();
    let entry = entry.with_context(|| format!("{} is empty", dir.display()))?;
    Ok(entry.path())
}
