//! The initramfs of test guests and of nested hosts.
//!
//! Guest: `/init` is the static `guest` binary; it loads sets of modules from `/modules/SET`. Nested host: `/init` is this lab binary, with busybox for everything else.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::artifacts::{self, Artifacts, Program, modules};
use crate::cpio::Cpio;
use crate::job::Job;
use crate::nested::RunDir;
use crate::{tool, workspace};

/// Inside nested hosts.
pub(crate) const GUEST_KERNEL: &str = "/boot/vmlinux";
/// Inside nested hosts.
pub(crate) const GUEST_BZIMAGE: &str = "/boot/vmlinuz";
/// Inside nested hosts.
pub(crate) const GUEST_INITRD: &str = "/boot/guest.cpio";
/// Inside nested hosts.
pub(crate) const GUEST_ROOTFS: &str = "/boot/guest.ext4";
/// Inside nested hosts: what `/init` runs.
pub(crate) const JOB_FILE: &str = "/lab/job.json";
/// Inside nested hosts: module files, one a line, in loading order.
pub(crate) const HOST_MODULE_SET: &str = "/modules/host";

/// The guest loads the first set always, the others when its plan needs them.
const GUEST_MODULE_SETS: &[(&str, &[&str])] = &[
    (
        "/modules/devices",
        &["virtio_pci", "virtio_blk", "virtio_net"],
    ),
    ("/modules/folder", &["virtiofs"]),
    ("/modules/seed", &["isofs"]),
    ("/modules/button", &["button", "evdev"]),
];
const HOST_MODULES: &[&str] = &[
    "kvm",
    "kvm_amd",
    "tun",
    "bridge",
    "veth",
    "vxlan",
    "nf_tables",
    "nf_conntrack",
    "nft_chain_nat",
    "nft_ct",
    "nft_fib_inet",
    "nft_masq",
    "nft_meta_bridge",
    "nft_nat",
    "loop",
    "fuse",
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "ext4",
];

/// Room for the guest, iperf3 and some writing.
const ROOTFS_BYTES: u64 = 48 << 20;
/// The same beside the tools and their libraries.
const TOOLS_ROOTFS_BYTES: u64 = 160 << 20;

/// A program to have in a nested host.
#[derive(Clone, Debug)]
pub(crate) struct Tool {
    /// In `/usr/bin`.
    pub(crate) name: String,
    pub(crate) program: Program,
}

impl Tool {
    /// A static binary of ours.
    pub(crate) fn of_binary(binary: &workspace::Binary) -> Result<Self> {
        let file = workspace::stripped(&binary.file)?;
        Ok(Self {
            name: binary.name.clone(),
            program: Program {
                file,
                library_dirs: Vec::new(),
            },
        })
    }

    /// A program of this machine: a path, or a name to look up.
    pub(crate) fn of_system(name: &str) -> Result<Self> {
        let file = if name.contains('/') {
            Some(PathBuf::from(name))
        } else {
            tool::find(name)
        };
        let file = file.filter(|file| file.is_file()).with_context(|| {
            format!("{name} is neither a package of this workspace nor an installed program")
        })?;
        let name = file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Ok(Self {
            name,
            program: Program {
                file,
                library_dirs: Vec::new(),
            },
        })
    }
}

/// Builds the guest's initramfs; cached until kernel or guest binary change.
pub(crate) fn guest(artifacts: &Artifacts) -> Result<PathBuf> {
    let init = guest_binary()?;
    let path =
        workspace::lab_subdir("guest")?.join(format!("guest-{}.cpio", artifacts.kernel.release));
    if newer(&path, &[&init, &artifacts.kernel.vmlinux]) {
        return Ok(path);
    }
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    let mut cpio = create(&partial)?;
    cpio.copy("init", &init)?;
    cpio.copy("bin/busybox", &artifacts.busybox)?;
    cpio.symlink("bin/sh", "busybox")?;
    for dir in ["proc", "sys", "dev", "mnt", "tmp"] {
        cpio.directory(dir)?;
    }
    for (set, wanted) in GUEST_MODULE_SETS {
        add_modules(&mut cpio, artifacts, set, wanted)?;
    }
    cpio.finish()?;
    fs::rename(&partial, &path)?;
    Ok(path)
}

/// Builds an ext4 image with a guest in it, for `mortise.root=`; cached like its initramfs.
pub(crate) fn guest_rootfs(artifacts: &Artifacts) -> Result<PathBuf> {
    let iperf = std::slice::from_ref(&artifacts.iperf);
    root_disk(artifacts, "guest.ext4", ROOTFS_BYTES, iperf)
}

/// The same with fio and the tools of ext4.
pub(crate) fn guest_tools_rootfs(artifacts: &Artifacts) -> Result<PathBuf> {
    root_disk(
        artifacts,
        "guest-tools.ext4",
        TOOLS_ROOTFS_BYTES,
        &artifacts.guest_tools,
    )
}

fn root_disk(
    artifacts: &Artifacts,
    name: &str,
    len_bytes: u64,
    programs: &[Program],
) -> Result<PathBuf> {
    let init = guest_binary()?;
    let path = workspace::lab_subdir("guest")?.join(name);
    if newer(&path, &[&init, &artifacts.busybox]) {
        return Ok(path);
    }
    let staging = RunDir::create()?;
    let tree = staging.0.join("tree");
    for dir in ["sbin", "bin", "usr/bin", "proc", "sys", "dev", "mnt", "tmp"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    fs::copy(&init, tree.join("sbin/init"))?;
    fs::copy(&artifacts.busybox, tree.join("bin/busybox"))?;
    for program in programs {
        fs::copy(&program.file, tree.join("usr/bin").join(program.name()))?;
        for (place, file) in artifacts::libraries(program)? {
            let place = tree.join(place);
            fs::create_dir_all(place.parent().unwrap_or(&tree))?;
            fs::copy(&file, &place).with_context(|| format!("cannot pack {}", file.display()))?;
        }
    }
    let image = staging.0.join("image");
    File::create(&image)?.set_len(len_bytes)?;
    tool::output(
        Command::new(&artifacts.mke2fs)
            .args(["-q", "-F", "-t", "ext4", "-d"])
            .arg(&tree)
            .arg(&image),
    )?;
    fs::rename(&image, &path)?;
    Ok(path)
}

/// Builds a nested host's initramfs at `path`.
pub(crate) fn nested_host(
    path: &Path,
    artifacts: &Artifacts,
    tools: &[Tool],
    files: &[(PathBuf, String)],
    job: &Job,
) -> Result<()> {
    let mut cpio = create(path)?;
    cpio.copy("init", &workspace::own_stripped()?)?;
    cpio.copy("bin/busybox", &artifacts.busybox)?;
    cpio.symlink("bin/sh", "busybox")?;
    for dir in [
        "proc", "sys", "dev", "mnt", "tmp", "run", "root", "sbin", "var/lib", "usr/bin",
    ] {
        cpio.directory(dir)?;
    }
    cpio.bytes(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    )?;
    cpio.bytes("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?;
    cpio.bytes("etc/hosts", 0o644, b"127.0.0.1 localhost\n")?;
    add_modules(&mut cpio, artifacts, HOST_MODULE_SET, HOST_MODULES)?;
    cpio.copy(GUEST_KERNEL, &artifacts.kernel.vmlinux)?;
    cpio.copy(GUEST_BZIMAGE, &artifacts.kernel.bzimage)?;
    cpio.copy(GUEST_INITRD, &guest(artifacts)?)?;
    let mut packed = std::collections::BTreeSet::new();
    for tool in tools {
        cpio.copy(&format!("usr/bin/{}", tool.name), &tool.program.file)
            .with_context(|| format!("cannot pack {}", tool.program.file.display()))?;
        for (place, file) in artifacts::libraries(&tool.program)? {
            if packed.insert(place.clone()) {
                cpio.copy(&place, &file)
                    .with_context(|| format!("cannot pack {}", file.display()))?;
            }
        }
    }
    for (from, to) in files {
        cpio.copy(to, from)
            .with_context(|| format!("cannot pack {}", from.display()))?;
    }
    cpio.bytes(JOB_FILE, 0o644, &serde_json::to_vec(job)?)?;
    cpio.finish()?;
    Ok(())
}

fn guest_binary() -> Result<PathBuf> {
    let binaries = workspace::build(&["build", "--package", "guest"])?;
    workspace::stripped(
        &binaries
            .first()
            .context("cargo built no guest binary")?
            .file,
    )
}

fn create(path: &Path) -> Result<Cpio<BufWriter<File>>> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    Ok(Cpio::new(BufWriter::with_capacity(1 << 20, file)))
}

fn add_modules(
    cpio: &mut Cpio<BufWriter<File>>,
    artifacts: &Artifacts,
    set: &str,
    wanted: &[&str],
) -> Result<()> {
    let mut order = String::new();
    for module in modules::resolve(&artifacts.kernel.modules_dir, wanted)? {
        let path = format!("/modules/{}.ko", module.name);
        cpio.bytes(&path, 0o644, &module.image)?;
        order.push_str(&path);
        order.push('\n');
    }
    cpio.bytes(set, 0o644, order.as_bytes())?;
    Ok(())
}

/// Whether `made` is younger than all it was made from, this lab included.
fn newer(made: &Path, sources: &[&Path]) -> bool {
    let modified = |path: &Path| {
        fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            .ok()
    };
    let Some(time) = modified(made) else {
        return false;
    };
    sources
        .iter()
        .chain([&Path::new(workspace::OWN_BINARY)])
        .all(|source| modified(source).is_some_and(|t| t < time))
}
