//! What demo, tests and nested hosts need from outside: a kernel, QEMU, busybox.
//!
//! Everything lands under `target/lab`, in directories named by version, and is described by
//! one stamp file. While the files of the stamp are there, nothing touches the network.

mod apt;
pub(crate) mod chromium;
pub(crate) mod dpdk;
pub(crate) mod modules;
pub(crate) mod passt;
mod vmlinux;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::progress::step;
use crate::{tool, workspace};
use apt::{Apt, Package};

/// Raised when a lab needs more than an older lab's stamp promises.
const STAMP_VERSION: u32 = 6;

/// Where everything is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Artifacts {
    stamp_version: u32,
    pub(crate) kernel: Kernel,
    pub(crate) qemu: Qemu,
    /// Statically linked.
    pub(crate) busybox: PathBuf,
    pub(crate) mke2fs: PathBuf,
    pub(crate) storage_daemon: Program,
    pub(crate) virtiofsd: Option<Program>,
    /// qemu-img, qemu-io and qemu-nbd.
    pub(crate) qemu_utils: Vec<Program>,
    /// What encrypted volumes are compared with.
    pub(crate) cryptsetup: Vec<Program>,
    /// fio, mke2fs and e2fsck, for a guest's root disk.
    pub(crate) guest_tools: Vec<Program>,
    /// What guests send to each other with.
    pub(crate) iperf: Program,
    /// What hosts make networks with (nft, dnsmasq and ip), and what captures are read by.
    pub(crate) network_tools: Vec<Program>,
    /// Where several controllers keep their state.
    pub(crate) etcd: Program,
}

/// A Debian cloud kernel; nested hosts and guests run the same one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Kernel {
    /// As in `uname -r`.
    pub(crate) release: String,
    pub(crate) bzimage: PathBuf,
    pub(crate) vmlinux: PathBuf,
    pub(crate) modules_dir: PathBuf,
}

/// A program and where its libraries are, if not on the system.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Program {
    pub(crate) file: PathBuf,
    pub(crate) library_dirs: Vec<PathBuf>,
}

/// The emulator.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Qemu {
    pub(crate) program: Program,
    /// Firmware directories, for `-L`.
    pub(crate) data_dirs: Vec<PathBuf>,
}

impl Program {
    /// A command that finds its libraries.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.file);
        command.env_remove("LD_LIBRARY_PATH");
        if let Some(path) = self.library_path() {
            command.env("LD_LIBRARY_PATH", path);
        }
        command
    }

    /// As it is called.
    pub(crate) fn name(&self) -> String {
        let name = self.file.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// The value of `LD_LIBRARY_PATH`, if one is needed.
    pub(crate) fn library_path(&self) -> Option<std::ffi::OsString> {
        (!self.library_dirs.is_empty()).then(|| std::env::join_paths(&self.library_dirs).ok())?
    }
}

impl Qemu {
    /// A command that finds its libraries and firmware.
    pub(crate) fn command(&self) -> Command {
        let mut command = self.program.command();
        for dir in &self.data_dirs {
            command.arg("-L").arg(dir);
        }
        command
    }

    /// What a VM without display and network cards needs, for a nested host: (file here, path there).
    pub(crate) fn firmware(&self) -> Vec<(PathBuf, String)> {
        const NAMES: [&str; 5] = [
            "bios-256k.bin",
            "kvmvapic.bin",
            "linuxboot.bin",
            "linuxboot_dma.bin",
            "pvh.bin",
        ];
        let system = ["/usr/share/qemu", "/usr/share/seabios"].map(PathBuf::from);
        let dirs = || self.data_dirs.iter().chain(&system);
        let find = |name: &str| dirs().map(|dir| dir.join(name)).find(|file| file.is_file());
        NAMES
            .iter()
            .filter_map(|name| Some((find(name)?, format!("/usr/share/qemu/{name}"))))
            .collect()
    }
}

impl Artifacts {
    /// What the stamp describes, or else fetches what is missing.
    ///
    /// # Errors
    /// One line that names what could not be had and what to install instead.
    pub(crate) fn obtain() -> Result<Self> {
        let dir = workspace::lab_subdir("artifacts")?;
        let stamp = dir.join("stamp.json");
        // A second lab waits here instead of fetching the same files.
        let lock = fs::File::create(dir.join("lock"))?;
        lock.lock()
            .context("cannot lock target/lab/artifacts/lock")?;
        if let Some(artifacts) = Self::from_stamp(&stamp) {
            return Ok(artifacts);
        }
        let artifacts = Fetcher::new(&dir)?.fetch()?;
        fs::write(&stamp, serde_json::to_vec_pretty(&artifacts)?)?;
        step(format_args!("artifacts are ready in {}", dir.display()));
        Ok(artifacts)
    }

    fn from_stamp(stamp: &Path) -> Option<Self> {
        let artifacts: Self = serde_json::from_slice(&fs::read(stamp).ok()?).ok()?;
        let kernel = &artifacts.kernel;
        let programs = artifacts
            .qemu_utils
            .iter()
            .chain(&artifacts.cryptsetup)
            .chain(&artifacts.guest_tools)
            .chain(&artifacts.network_tools);
        let files = [
            &kernel.bzimage,
            &kernel.vmlinux,
            &kernel.modules_dir,
            &artifacts.qemu.program.file,
            &artifacts.busybox,
            &artifacts.mke2fs,
            &artifacts.storage_daemon.file,
            &artifacts.iperf.file,
            &artifacts.etcd.file,
        ];
        let complete = artifacts.stamp_version == STAMP_VERSION
            && files
                .into_iter()
                .chain(programs.map(|program| &program.file))
                .all(|file| file.exists());
        complete.then_some(artifacts)
    }
}

struct Fetcher {
    dir: PathBuf,
    apt: Apt,
}

impl Fetcher {
    fn new(dir: &Path) -> Result<Self> {
        Ok(Self {
            dir: dir.to_owned(),
            apt: Apt::open(&dir.join("apt"))?,
        })
    }

    fn fetch(&mut self) -> Result<Artifacts> {
        let kernel = self.kernel()?;
        let busybox = self.file_of("busybox-static", &["bin/busybox", "usr/bin/busybox"])?;
        let mke2fs = match tool::find("mke2fs") {
            Some(file) => file,
            None => self.file_of("e2fsprogs", &["sbin/mke2fs", "usr/sbin/mke2fs"])?,
        };
        let (qemu, qemu_root) = self.qemu()?;
        let storage_daemon = self.storage_daemon(&qemu_root)?;
        let virtiofsd = find_virtiofsd(&qemu_root);
        let qemu_utils = self.programs("qemu-utils", &["qemu-img", "qemu-io", "qemu-nbd"])?;
        let cryptsetup = self.programs("cryptsetup-bin", &["cryptsetup"])?;
        let mut guest_tools = self.programs("fio", &["fio"])?;
        guest_tools.extend(self.programs("e2fsprogs", &["mke2fs", "e2fsck"])?);
        let iperf = self.programs("iperf3", &["iperf3"])?.remove(0);
        let mut network_tools = self.programs("nftables", &["nft"])?;
        network_tools.extend(self.programs("dnsmasq-base", &["dnsmasq"])?);
        network_tools.extend(self.programs("iproute2", &["ip"])?);
        network_tools.extend(self.programs("tcpdump", &["tcpdump"])?);
        network_tools.extend(self.programs("tshark", &["tshark"])?);
        let etcd = self.programs("etcd-server", &["etcd"])?.remove(0);
        Ok(Artifacts {
            stamp_version: STAMP_VERSION,
            kernel,
            qemu,
            busybox,
            mke2fs,
            storage_daemon,
            virtiofsd,
            qemu_utils,
            cryptsetup,
            guest_tools,
            iperf,
            network_tools,
            etcd,
        })
    }

    /// The system's programs if it has them all, else the package's.
    fn programs(&mut self, package: &str, names: &[&str]) -> Result<Vec<Program>> {
        let installed: Option<Vec<Program>> = names
            .iter()
            .map(|name| {
                tool::find(name).map(|file| Program {
                    file,
                    library_dirs: Vec::new(),
                })
            })
            .collect();
        if let Some(programs) = installed {
            return Ok(programs);
        }
        let root = self.packages(package, &[package])?;
        let program = |name: &&str| {
            ["usr/bin", "usr/sbin", "bin", "sbin"]
                .map(|dir| root.join(dir).join(name))
                .into_iter()
                .find(|file| file.is_file())
                .map(|file| unpacked_program(&root, file))
                .with_context(|| format!("the package {package} has no {name}"))
        };
        names.iter().map(program).collect()
    }

    fn kernel(&mut self) -> Result<Kernel> {
        let (_, depends) = self.apt.candidate("linux-image-cloud-amd64")?;
        let name = depends
            .iter()
            .find(|name| name.starts_with("linux-image-"))
            .context("linux-image-cloud-amd64 names no kernel package; install one by hand")?;
        let root = self.package(name)?;
        let release = name.trim_start_matches("linux-image-").to_owned();
        let bzimage = root.join("boot").join(format!("vmlinuz-{release}"));
        let vmlinux = root.join("boot").join(format!("vmlinux-{release}"));
        if !vmlinux.exists() {
            step("taking the ELF kernel out of its bzImage");
            let image = fs::read(&bzimage)
                .with_context(|| format!("{name} has no {}", bzimage.display()))?;
            let elf = vmlinux::extract(&image)
                .with_context(|| format!("cannot use {}", bzimage.display()))?;
            let partial = vmlinux.with_extension("partial");
            fs::write(&partial, elf)?;
            fs::rename(partial, &vmlinux)?;
        }
        let modules_dir = ["lib/modules", "usr/lib/modules"]
            .map(|dir| root.join(dir).join(&release))
            .into_iter()
            .find(|dir| dir.is_dir())
            .with_context(|| format!("{name} has no modules"))?;
        Ok(Kernel {
            release,
            bzimage,
            vmlinux,
            modules_dir,
        })
    }

    /// The system's QEMU if there is one, else Debian's; and where the latter was unpacked.
    fn qemu(&mut self) -> Result<(Qemu, PathBuf)> {
        if let Some(file) = tool::find("qemu-system-x86_64") {
            let program = Program {
                file,
                library_dirs: Vec::new(),
            };
            return Ok((
                Qemu {
                    program,
                    data_dirs: Vec::new(),
                },
                PathBuf::from("/"),
            ));
        }
        let root = self.packages("qemu-system-x86", &["qemu-system-x86"])?;
        let program = unpacked_program(&root, root.join("usr/bin/qemu-system-x86_64"));
        let data_dirs = ["usr/share/qemu", "usr/share/seabios"]
            .map(|dir| root.join(dir))
            .into_iter()
            .filter(|dir| dir.is_dir())
            .collect();
        Ok((Qemu { program, data_dirs }, root))
    }

    fn storage_daemon(&mut self, qemu_root: &Path) -> Result<Program> {
        const NAME: &str = "qemu-storage-daemon";
        if let Some(file) = tool::find(NAME) {
            return Ok(Program {
                file,
                library_dirs: Vec::new(),
            });
        }
        let beside_qemu = qemu_root.join("usr/bin").join(NAME);
        if beside_qemu.exists() {
            return Ok(unpacked_program(qemu_root, beside_qemu));
        }
        let root = self.packages("qemu-utils", &["qemu-utils"])?;
        let file = root.join("usr/bin").join(NAME);
        Ok(unpacked_program(&root, file))
    }

    fn file_of(&mut self, package: &str, paths: &[&str]) -> Result<PathBuf> {
        let root = self.package(package)?;
        paths
            .iter()
            .map(|path| root.join(path))
            .find(|file| file.is_file())
            .with_context(|| format!("the package {package} has no {}", paths[0]))
    }

    /// One package alone.
    fn package(&mut self, name: &str) -> Result<PathBuf> {
        self.fresh(name, |apt| Ok(vec![apt.candidate(name)?.0]))
    }

    /// Packages with all they need.
    fn packages(&mut self, label: &str, names: &[&str]) -> Result<PathBuf> {
        self.fresh(label, |apt| apt.closure(names))
    }

    /// Unpacks what `choose` picks; if the system's package lists turn out to be stale, again
    /// with fresh ones.
    fn fresh(
        &mut self,
        label: &str,
        choose: impl Fn(&Apt) -> Result<Vec<Package>>,
    ) -> Result<PathBuf> {
        match self.unpacked(label, &choose) {
            Err(error) if self.apt.may_be_stale() => {
                step(format_args!("{label}: {error:#}"));
                self.apt.update()?;
                self.unpacked(label, &choose)
            }
            result => result,
        }
        .with_context(|| {
            format!("cannot fetch {label}; install it by hand: apt-get install {label}")
        })
    }

    fn unpacked(
        &self,
        label: &str,
        choose: impl Fn(&Apt) -> Result<Vec<Package>>,
    ) -> Result<PathBuf> {
        let packages = choose(&self.apt)?;
        let main = packages
            .iter()
            .find(|package| package.name.starts_with(label))
            .or(packages.first())
            .with_context(|| format!("apt would install nothing for {label}"))?;
        // A colon ends a directory in library paths.
        let version = main.version.replace(':', ".");
        let root = self.dir.join(format!("{label}_{version}"));
        if !root.is_dir() {
            let others = match packages.len() - 1 {
                0 => String::new(),
                count => format!(" and {count} packages it needs"),
            };
            step(format_args!(
                "fetching {} {}{others}",
                main.name, main.version
            ));
            self.apt.unpack(&packages, &root)?;
        }
        Ok(root)
    }
}

fn unpacked_program(root: &Path, file: PathBuf) -> Program {
    // Installed, Ceph's private library is found by an absolute path.
    let library_dirs = [
        "usr/lib/x86_64-linux-gnu",
        "lib/x86_64-linux-gnu",
        "usr/lib/x86_64-linux-gnu/ceph",
    ]
    .map(|dir| root.join(dir))
    .into_iter()
    .filter(|dir| dir.is_dir())
    .collect();
    Program { file, library_dirs }
}

/// Debian 12 ships the daemon with QEMU, later releases apart from it.
fn find_virtiofsd(qemu_root: &Path) -> Option<Program> {
    let installed = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"].map(PathBuf::from);
    let on_path = tool::find("virtiofsd");
    if let Some(file) = on_path
        .into_iter()
        .chain(installed)
        .find(|file| file.is_file())
    {
        return Some(Program {
            file,
            library_dirs: Vec::new(),
        });
    }
    let file = qemu_root.join("usr/lib/qemu/virtiofsd");
    file.is_file().then(|| unpacked_program(qemu_root, file))
}

/// The shared libraries and the loader a program needs, as (path for the loader, file).
///
/// # Errors
/// When a library is missing.
pub(crate) fn libraries(program: &Program) -> Result<BTreeSet<(String, PathBuf)>> {
    let mut command = Command::new("ldd");
    if let Some(path) = program.library_path() {
        command.env("LD_LIBRARY_PATH", path);
    }
    let Ok(text) = tool::output(command.arg(&program.file)) else {
        // ldd refuses static programs.
        return Ok(BTreeSet::new());
    };
    parse_ldd(&text).with_context(|| format!("{} cannot run", program.file.display()))
}

/// Lines are `NAME => FILE (ADDRESS)`, `LOADER (ADDRESS)` or `linux-vdso.so.1 (ADDRESS)`.
fn parse_ldd(text: &str) -> Result<BTreeSet<(String, PathBuf)>> {
    let mut found = BTreeSet::new();
    for line in text.lines().map(str::trim) {
        let mut words = line.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some(name), Some("=>"), Some("not")) => {
                anyhow::bail!("its library {name} is not there; install the package that has it")
            }
            (Some(name), Some("=>"), Some(file)) => {
                found.insert((format!("lib/x86_64-linux-gnu/{name}"), file.into()));
            }
            (Some(loader), _, _) if loader.starts_with('/') => {
                found.insert((loader.trim_start_matches('/').to_owned(), loader.into()));
            }
            _ => {}
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_lines_become_places_and_files() {
        let text = "\tlinux-vdso.so.1 (0x0)\n\tlibfdt.so.1 => /x/libfdt.so.1 (0x1)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x2)\n";
        let found: Vec<_> = parse_ldd(text).unwrap().into_iter().collect();
        assert_eq!(
            found,
            [
                (
                    "lib/x86_64-linux-gnu/libfdt.so.1".into(),
                    "/x/libfdt.so.1".into()
                ),
                (
                    "lib64/ld-linux-x86-64.so.2".to_owned(),
                    "/lib64/ld-linux-x86-64.so.2".into()
                ),
            ]
        );
    }

    #[test]
    fn a_library_that_is_not_found_is_named() {
        let error = parse_ldd("\tlibaio.so.1 => not found\n").unwrap_err();
        assert!(error.to_string().contains("libaio.so.1"), "{error}");
    }
}
