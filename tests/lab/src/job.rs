//! What is run on real KVM, and what it reports: the same directly and in a nested host.

use std::ffi::OsString;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "job", rename_all = "snake_case")]
pub(crate) enum Job {
    /// A developer's command, on the host's console.
    Command { argv: Vec<String> },
    /// The main job, verified from end to end.
    Demo { site: Site, by_hand: bool },
    /// Be a second host: a node agent, for tests that run in the first.
    Neighbour { site: Site },
    /// The integration tests whose names start with `nested::` and contain `filter`.
    Tests {
        site: Site,
        binary: PathBuf,
        filter: String,
        /// Those that need a [`Job::Neighbour`], or else the others.
        two_hosts: bool,
        long: bool,
        /// Each runs so often, until it fails.
        times: u32,
        /// These have run, each as often as it is named.
        done: Vec<String>,
    },
}

/// Where things are on the machine on which a job runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Site {
    /// vmm-core and the others.
    pub(crate) bin_dir: PathBuf,
    /// Third-party daemons.
    pub(crate) tools_dir: PathBuf,
    /// The ELF kernel.
    pub(crate) kernel: PathBuf,
    pub(crate) bzimage: PathBuf,
    pub(crate) initrd: PathBuf,
    /// An ext4 file system with a guest in it.
    pub(crate) rootfs: PathBuf,
    pub(crate) busybox: PathBuf,
    /// As in `uname -r`.
    pub(crate) kernel_release: String,
}

impl Site {
    /// The variables by which integration tests find these files.
    pub(crate) fn variables(&self) -> [(&'static str, OsString); 7] {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::iter::once(self.tools_dir.clone()).chain(std::env::split_paths(&path));
        [
            // Only a colon in a directory's name can make this fail.
            ("PATH", std::env::join_paths(dirs).unwrap_or(path)),
            ("MORTISE_BIN_DIR", self.bin_dir.clone().into()),
            ("GUEST_KERNEL", self.kernel.clone().into()),
            ("GUEST_BZIMAGE", self.bzimage.clone().into()),
            ("GUEST_INITRD", self.initrd.clone().into()),
            ("GUEST_ROOTFS", self.rootfs.clone().into()),
            ("BUSYBOX", self.busybox.clone().into()),
        ]
    }
}

/// One line of JSON from a running job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// A step began, for people.
    Step { text: String },
    /// The demo's measurements.
    Demo(DemoReport),
    /// A test ended.
    Test(TestResult),
    /// The job ended; nothing follows.
    End { code: i32, error: Option<String> },
}

/// What the demo saw.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct DemoReport {
    /// Release of the kernel that the guest booted.
    pub(crate) guest_kernel: String,
    /// From exec of vmm-core to the guest's first userspace line.
    pub(crate) boot_ms: u64,
    /// CPUs that the guest had running at the same time.
    pub(crate) vcpus_used: u32,
    /// Written, flushed and read back in the guest, and found in the image by the host afterwards.
    pub(crate) disk_verified: bool,
    pub(crate) disk_bytes: u64,
    /// Both ways, hashes equal on both sides.
    pub(crate) net_verified: bool,
    /// Sum of both ways.
    pub(crate) net_bytes: u64,
    /// The guest powered itself off after the power button, and nothing was left behind.
    pub(crate) clean_shutdown: bool,
    pub(crate) processes: Vec<Process>,
    /// Start of the first process to the end of the last.
    pub(crate) elapsed_ms: u64,
    /// Whatever was not as it should be.
    pub(crate) problems: Vec<String>,
}

/// One process of the running VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub(crate) name: String,
    pub(crate) pid: u32,
    /// Guest RAM not counted.
    pub(crate) rss_kib: u64,
    /// Guest RAM not counted.
    pub(crate) pss_kib: u64,
    /// What the kernel says of it: no_new_privs, seccomp, and what the process itself reports.
    pub(crate) sandbox: Vec<String>,
}

/// How one test went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TestResult {
    pub(crate) name: String,
    pub(crate) outcome: Outcome,
    pub(crate) elapsed_ms: u64,
    /// What a failed test printed, its end.
    pub(crate) output: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    Passed,
    Failed,
    Skipped,
}
