//! passt that serves vhost-user: newer than Debian 12's. Where the system has none such, the next release's
//! is unpacked together with that release's C library, whose loader starts it.
//!
//! Not part of the stamp: tests that need it are skipped without it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::Program;
use crate::progress::step;
use crate::tool;

/// The first release whose passt does.
const RELEASE: &str = "trixie";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// A program to call; `None`, with the reason told once, where it cannot be had.
pub(crate) fn obtain(dir: &Path) -> Option<PathBuf> {
    if let Some(installed) = tool::find("passt").filter(|program| serves_vhost_user(program)) {
        return Some(installed);
    }
    let root = dir.join(format!("passt_{RELEASE}"));
    let launcher = root.join("passt");
    let given_up = dir.join("passt.unavailable");
    if launcher.exists() {
        return Some(launcher);
    }
    if given_up.exists() {
        return None;
    }
    match fetch(dir, &root) {
        Ok(()) => Some(launcher),
        // Another lab was faster.
        Err(_) if launcher.exists() => Some(launcher),
        Err(error) => {
            step(format_args!(
                "tests of user networks are skipped: {error:#}"
            ));
            let _ = fs::write(
                given_up,
                format!("{error:#}\nremove this file to try again\n"),
            );
            None
        }
    }
}

/// The same in a nested host: (file here, path there), for [`crate::nested::Options`]; nothing where it
/// cannot be had.
pub(crate) fn files_for_nested(dir: &Path) -> Result<Vec<(PathBuf, String)>> {
    let Some(program) = obtain(dir) else {
        return Ok(Vec::new());
    };
    let root = dir.join(format!("passt_{RELEASE}"));
    if program != root.join("passt") {
        let program = Program {
            file: program,
            library_dirs: Vec::new(),
        };
        let mut files: Vec<(PathBuf, String)> = super::libraries(&program)?
            .into_iter()
            .map(|(there, here)| (here, format!("/{there}")))
            .collect();
        files.push((program.file, "/usr/bin/passt".to_owned()));
        return Ok(files);
    }
    let there = Path::new("/opt/passt");
    let script = root.join("passt.nested");
    fs::write(&script, launcher(there))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let mut files = vec![(script, "/usr/bin/passt".to_owned())];
    for name in ["ld-linux-x86-64.so.2", "libc.so.6"] {
        let path = Path::new(LIBRARIES).join(name);
        files.push((root.join(&path), there.join(&path).display().to_string()));
    }
    let path = Path::new("usr/bin/passt");
    files.push((root.join(path), there.join(path).display().to_string()));
    Ok(files)
}

fn serves_vhost_user(program: &Path) -> bool {
    let help = tool::output(Command::new(program).arg("--help"));
    help.is_ok_and(|text| text.contains("--vhost-user"))
}

fn fetch(dir: &Path, root: &Path) -> Result<()> {
    step(format_args!("fetching passt of Debian {RELEASE}"));
    let work = dir.join(format!("passt.partial-{}", std::process::id()));
    let tree = work.join("tree");
    fs::create_dir_all(&tree)?;
    let result = unpack(&work, &tree).and_then(|()| {
        fs::write(tree.join("passt"), launcher(root))?;
        fs::set_permissions(tree.join("passt"), fs::Permissions::from_mode(0o755))?;
        fs::rename(&tree, root).context("cannot put it in its place")
    });
    let _ = fs::remove_dir_all(&work);
    result?;
    ensure!(
        serves_vhost_user(&root.join("passt")),
        "the passt that was fetched does not run here"
    );
    Ok(())
}

fn unpack(work: &Path, tree: &Path) -> Result<()> {
    let sources = work.join("sources.list");
    let mirror = mirror()?;
    let line = format!("deb [signed-by={KEYRING}] {mirror} {RELEASE} main\n");
    fs::write(&sources, line)?;
    for sub in ["lists/partial", "cache/archives/partial", "debs"] {
        fs::create_dir_all(work.join(sub))?;
    }
    let apt = || {
        let path = |sub: &str| work.join(sub).display().to_string();
        let mut command = Command::new("apt-get");
        command.env("LC_ALL", "C").current_dir(work.join("debs"));
        for option in [
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            format!("Dir::Etc::SourceList={}", sources.display()),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={}", path("lists")),
            format!("Dir::Cache={}", path("cache")),
        ] {
            command.args(["-o", &option]);
        }
        command
    };
    tool::output(apt().args(["-q", "update"]))?;
    tool::output(apt().args(["-q", "download", "passt", "libc6"]))?;
    for deb in fs::read_dir(work.join("debs"))? {
        tool::output(Command::new("dpkg").arg("-x").arg(deb?.path()).arg(tree))?;
    }
    Ok(())
}

/// Where the system's own packages come from.
fn mirror() -> Result<String> {
    let text = tool::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI)",
        "Created-By: Packages",
        "Component: main",
    ]))?;
    let is_main = |uri: &&str| uri.contains("debian") && !uri.contains("security");
    let found = text.lines().map(str::trim).find(is_main);
    found
        .map(str::to_owned)
        .context("the apt sources name no Debian mirror")
}

fn launcher(root: &Path) -> String {
    let root = root.display();
    format!(
        "#!/bin/sh\nexec '{root}/{LIBRARIES}/ld-linux-x86-64.so.2' --library-path '{root}/{LIBRARIES}' '{root}/usr/bin/passt' \"$@\"\n"
    )
}
