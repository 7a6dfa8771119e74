//! Scripts that run the unpacked third-party programs with their libraries and firmware.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::artifacts::{Artifacts, chromium, passt};
use crate::{initramfs, workspace};

/// Where the scripts are.
pub(crate) fn dir() -> PathBuf {
    workspace::lab_dir().join("bin")
}

/// The variables by which tests on this machine find third-party programs.
pub(crate) fn variables(artifacts: &Artifacts) -> Result<Vec<(&'static str, OsString)>> {
    let mut found: Vec<(&'static str, OsString)> = vec![
        ("QEMU", qemu(artifacts)?.into()),
        (
            "QEMU_STORAGE_DAEMON",
            script("qemu-storage-daemon", &artifacts.storage_daemon.command())?.into(),
        ),
        ("MKE2FS", artifacts.mke2fs.clone().into()),
        etcd(artifacts)?,
        (
            "GUEST_TOOLS_ROOTFS",
            initramfs::guest_tools_rootfs(artifacts)?.into(),
        ),
    ];
    // Called by name: the scripts' folder leads the PATH.
    let called_by_name = artifacts
        .qemu_utils
        .iter()
        .chain(&artifacts.cryptsetup)
        .chain(&artifacts.network_tools);
    for program in called_by_name {
        script(&program.name(), &program.command())?;
    }
    if let Some(virtiofsd) = &artifacts.virtiofsd {
        found.push((
            "VIRTIOFSD",
            script("virtiofsd", &virtiofsd.command())?.into(),
        ));
    }
    if let Some(browser) = chromium::obtain(&workspace::lab_subdir("artifacts")?) {
        found.push((
            "MORTISE_CHROMIUM",
            script("chromium", &browser.command())?.into(),
        ));
    }
    if let Some(passt) = passt::obtain(&workspace::lab_subdir("artifacts")?) {
        found.push(("PASST", passt.into()));
    }
    Ok(found)
}

/// The emulator.
pub(crate) fn qemu(artifacts: &Artifacts) -> Result<PathBuf> {
    script("qemu-system-x86_64", &artifacts.qemu.command())
}

/// Programs that are called by name, in [`dir`].
pub(crate) fn network_tools(artifacts: &Artifacts) -> Result<()> {
    for program in &artifacts.network_tools {
        script(&program.name(), &program.command())?;
    }
    Ok(())
}

/// The variable by which etcd is found.
pub(crate) fn etcd(artifacts: &Artifacts) -> Result<(&'static str, OsString)> {
    Ok(("ETCD", script("etcd", &artifacts.etcd.command())?.into()))
}

fn script(name: &str, command: &Command) -> Result<PathBuf> {
    fs::create_dir_all(dir())?;
    let path = dir().join(name);
    let mut text = String::from("#!/bin/sh\nunset LD_LIBRARY_PATH\n");
    for (key, value) in command.get_envs() {
        if let Some(value) = value {
            text.push_str(&format!("export {}={}\n", key.display(), quoted(value)?));
        }
    }
    text.push_str(&format!("exec {}", quoted(command.get_program())?));
    for arg in command.get_args() {
        text.push_str(&format!(" {}", quoted(arg)?));
    }
    text.push_str(" \"$@\"\n");
    if fs::read_to_string(&path).is_ok_and(|old| old == text) {
        return Ok(path);
    }
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    fs::write(&partial, text)?;
    fs::set_permissions(&partial, fs::Permissions::from_mode(0o755))?;
    fs::rename(&partial, &path)?;
    Ok(path)
}

fn quoted(text: &std::ffi::OsStr) -> Result<String> {
    let text = text
        .to_str()
        .with_context(|| format!("{} is not UTF-8", text.display()))?;
    Ok(format!("'{}'", text.replace('\'', r"'\''")))
}
