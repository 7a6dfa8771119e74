//! Runs a job on the chosen ground with everything it needs there.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use crate::artifacts::{Artifacts, passt};
use crate::initramfs::{self, Tool};
use crate::inside::{self, Events};
use crate::job::{Event, Job, Site};
use crate::kvm::Ground;
use crate::nested::{self, Cable, HostLost, Neighbour, RunDir};
use crate::progress::step;
use crate::workspace::{self, Binary};
use crate::wrappers;

/// Nested hosts that may be used up by one job: while guests exchange much over networks, emulated
/// hosts' kernels have died twice within five minutes ("corrupted stack end" in a vCPU's thread).
const NESTED_BOOTS: u32 = 8;

/// Room for the host's files and one guest.
const NEIGHBOUR_MEMORY_MIB: u32 = 2560;

/// What agents and tests of a nested host make networks with, and read captures by.
const NETWORK_TOOLS: &[&str] = &["nft", "dnsmasq", "ip", "tshark"];

/// What a job may use.
pub(crate) struct Kit {
    pub(crate) artifacts: Artifacts,
    /// Of the workspace's default members.
    pub(crate) binaries: Vec<Binary>,
    guest_initrd: PathBuf,
    guest_rootfs: PathBuf,
}

impl Kit {
    /// Fetches, builds.
    pub(crate) fn prepare() -> Result<Self> {
        let artifacts = Artifacts::obtain()?;
        step("building");
        let binaries = workspace::build(&["build"])?;
        let guest_initrd = initramfs::guest(&artifacts)?;
        let guest_rootfs = initramfs::guest_rootfs(&artifacts)?;
        Ok(Self {
            artifacts,
            binaries,
            guest_initrd,
            guest_rootfs,
        })
    }

    /// This machine's files.
    pub(crate) fn site(&self) -> Site {
        let bin_dir = self
            .binaries
            .first()
            .and_then(|binary| binary.file.parent());
        let kernel = &self.artifacts.kernel;
        Site {
            bin_dir: bin_dir.unwrap_or(Path::new(".")).to_owned(),
            tools_dir: wrappers::dir(),
            kernel: kernel.vmlinux.clone(),
            bzimage: kernel.bzimage.clone(),
            initrd: self.guest_initrd.clone(),
            rootfs: self.guest_rootfs.clone(),
            busybox: self.artifacts.busybox.clone(),
            kernel_release: kernel.release.clone(),
        }
    }

    /// The same in a nested host.
    fn nested_site(&self) -> Site {
        Site {
            bin_dir: "/usr/bin".into(),
            tools_dir: "/usr/bin".into(),
            kernel: initramfs::GUEST_KERNEL.into(),
            bzimage: initramfs::GUEST_BZIMAGE.into(),
            initrd: initramfs::GUEST_INITRD.into(),
            rootfs: initramfs::GUEST_ROOTFS.into(),
            busybox: "/bin/busybox".into(),
            kernel_release: self.artifacts.kernel.release.clone(),
        }
    }

    /// The workspace's binaries and the third-party daemons, for a nested host.
    fn tools(&self) -> Result<Vec<Tool>> {
        let mut tools: Vec<Tool> = self
            .binaries
            .iter()
            .map(Tool::of_binary)
            .collect::<Result<_>>()?;
        let storage_daemon = self.artifacts.storage_daemon.clone();
        tools.push(Tool {
            name: "qemu-storage-daemon".into(),
            program: storage_daemon,
        });
        let network_tools = self.artifacts.network_tools.iter();
        tools.extend(
            network_tools
                .filter(|program| NETWORK_TOOLS.contains(&program.name().as_str()))
                .map(|program| Tool {
                    name: program.name(),
                    program: program.clone(),
                }),
        );
        if let Some(virtiofsd) = self.artifacts.virtiofsd.clone() {
            tools.push(Tool {
                name: "virtiofsd".into(),
                program: virtiofsd,
            });
        }
        Ok(tools)
    }
}

impl Kit {
    /// A second host, at the far end of a cable.
    fn neighbour(&self, options: &nested::Options, cable: Cable) -> Result<Neighbour> {
        let options = nested::Options {
            memory_mib: NEIGHBOUR_MEMORY_MIB,
            log_name: format!("{}-neighbour", options.log_name),
            cable: Some(cable),
            ..options.clone()
        };
        let site = self.nested_site();
        Neighbour::start(&self.artifacts, &options, &Job::Neighbour { site })
    }
}

/// How a job is run.
pub(crate) struct Run<'a> {
    pub(crate) ground: &'a Ground,
    /// Also wanted in a nested host.
    pub(crate) extra_tools: Vec<Tool>,
    /// Also wanted there: (file here, path there).
    pub(crate) extra_files: Vec<(PathBuf, String)>,
    /// Also wanted there: the third-party daemons.
    pub(crate) third_parties: bool,
    pub(crate) memory_mib: u32,
    pub(crate) timeout: Duration,
    pub(crate) show_console: bool,
    pub(crate) log_name: &'a str,
    /// With a second host beside it.
    pub(crate) neighbour: bool,
}

impl Run<'_> {
    /// Makes the job for the site it runs at and runs it; returns its exit code. Where a nested
    /// host's own kernel dies, what is then left of the job is made and run in another.
    pub(crate) fn job(
        self,
        kit: &Kit,
        make: impl Fn(Site) -> Job,
        mut on_event: impl FnMut(&Event),
    ) -> Result<i32> {
        match self.ground {
            Ground::Direct => inside::run(&make(kit.site()), &mut Events::to(&mut on_event)),
            Ground::Nested(_) => {
                let mut tools = kit.tools()?;
                if !self.third_parties {
                    tools.truncate(kit.binaries.len());
                }
                tools.extend(self.extra_tools);
                let mut files = self.extra_files;
                files.push((kit.guest_rootfs.clone(), initramfs::GUEST_ROOTFS.into()));
                if self.third_parties {
                    let artifacts = workspace::lab_subdir("artifacts")?;
                    files.extend(passt::files_for_nested(&artifacts)?);
                }
                let options = nested::Options {
                    cpus: 2,
                    memory_mib: self.memory_mib,
                    timeout: self.timeout,
                    show_console: self.show_console,
                    tools,
                    files,
                    log_name: self.log_name.to_owned(),
                    cable: None,
                };
                // A socket path may have 107 bytes, which a deep checkout exceeds; so it lies in /tmp.
                let sockets = RunDir::create_in(&std::env::temp_dir())?;
                let (_neighbour, options) = match self.neighbour {
                    true => {
                        let [near, far] = Cable::pair(&sockets.0);
                        let neighbour = kit.neighbour(&options, far)?;
                        let cable = Some(near);
                        (Some(neighbour), nested::Options { cable, ..options })
                    }
                    false => (None, options),
                };
                let mut boots = 1;
                loop {
                    let job = make(kit.nested_site());
                    match nested::run(&kit.artifacts, &options, &job, &mut on_event) {
                        Err(error) if error.is::<HostLost>() && boots < NESTED_BOOTS => {
                            step(format_args!("{error}; going on in another"));
                            boots += 1;
                        }
                        outcome => return outcome,
                    }
                }
            }
        }
    }
}
