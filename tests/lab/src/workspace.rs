//! Where the workspace and the lab's own directories are, and how its binaries get built.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::tool;

/// The directory of the workspace's Cargo.toml.
pub(crate) fn root() -> PathBuf {
    // Cargo sets the variable at run time; the compiled-in value serves a lab started by hand.
    let manifest_dir = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest_dir
        .parent()
        .and_then(Path::parent)
        .unwrap_or(Path::new("."))
        .to_owned()
}

/// `target/lab`: artifacts, logs, runs.
pub(crate) fn lab_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root().join("target"), PathBuf::from)
        .join("lab")
}

/// Creates a directory of the lab.
pub(crate) fn lab_subdir(name: &str) -> Result<PathBuf> {
    let dir = lab_dir().join(name);
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir)
}

/// Cargo, as the user started it, without what `cargo run` put into the environment.
pub(crate) fn cargo() -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(root()).env_remove("LD_LIBRARY_PATH");
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&*name);
        }
    }
    command
}

/// A built binary: the target's name and its file.
#[derive(Clone, Debug)]
pub(crate) struct Binary {
    pub(crate) name: String,
    pub(crate) file: PathBuf,
}

/// Builds with `cargo ARGS` and returns the executables made. Compiler messages go to stderr.
///
/// With `LAB_NO_BUILD` set it takes binaries as they are, which spares waiting for other builds.
pub(crate) fn build(args: &[&str]) -> Result<Vec<Binary>> {
    if std::env::var_os("LAB_NO_BUILD").is_some() && args[0] == "build" {
        return built_before(args.last().copied());
    }
    build_always(args)
}

/// The same whatever `LAB_NO_BUILD` says: what it means by binaries as they are is not optimised.
pub(crate) fn build_always(args: &[&str]) -> Result<Vec<Binary>> {
    build_with(cargo(), args)
}

/// The same with a [`cargo`] that has an environment of its own.
pub(crate) fn build_with(mut cargo: Command, args: &[&str]) -> Result<Vec<Binary>> {
    let output = cargo
        .args(args)
        .args(["--quiet", "--message-format=json-render-diagnostics"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(
        output.status.success(),
        "cargo {} failed; see above",
        args.join(" ")
    );
    let mut binaries = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<serde_json::Value>(line) else {
            continue;
        };
        if let Some(file) = message["executable"].as_str() {
            let name = message["target"]["name"]
                .as_str()
                .unwrap_or_default()
                .to_owned();
            binaries.push(Binary {
                name,
                file: file.into(),
            });
        }
    }
    Ok(binaries)
}

/// The binaries beside this one; only the package's own if the arguments end with its name.
fn built_before(package: Option<&str>) -> Result<Vec<Binary>> {
    let lab = std::env::current_exe()?;
    let dir = lab.parent().context("this binary is in no directory")?;
    let mut binaries = Vec::new();
    for entry in fs::read_dir(dir)? {
        let file = entry?.path();
        let name = file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let wanted = matches!(package, Some("build")) || package == Some(&name);
        let is_helper = name == "lab" || name == "guest";
        if file.is_file() && !name.contains('.') && wanted && (!is_helper || package == Some(&name))
        {
            binaries.push(Binary { name, file });
        }
    }
    Ok(binaries)
}

/// Whether this workspace has a package of that name.
pub(crate) fn is_package(name: &str) -> bool {
    let package = format!("path+file://{}", root().display());
    tool::output(cargo().args(["pkgid", "--package", name]))
        .is_ok_and(|id| id.starts_with(&package))
}

/// This process's program. Cargo may have put another file in its place since it began, as building
/// all tests does; this link leads to the one that runs.
pub(crate) const OWN_BINARY: &str = "/proc/self/exe";

/// A copy of [`OWN_BINARY`] without debug information.
pub(crate) fn own_stripped() -> Result<PathBuf> {
    let copy = lab_subdir("own")?.join("lab");
    let partial = copy.with_extension(format!("partial-{}", std::process::id()));
    fs::copy(OWN_BINARY, &partial).context("cannot read the lab's own binary")?;
    fs::rename(&partial, &copy)?;
    stripped(&copy)
}

/// A copy without debug information, which is most of a debug build; cached until the original
/// changes. Without `strip` on the system, the file itself.
pub(crate) fn stripped(file: &Path) -> Result<PathBuf> {
    let Some(strip) = tool::find("strip") else {
        return Ok(file.to_owned());
    };
    let Some(name) = file.file_name() else {
        bail!("{} is no file", file.display())
    };
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
    let copy = lab_subdir("stripped")?.join(name);
    let original_time =
        modified(file).with_context(|| format!("cannot read {}", file.display()))?;
    if modified(&copy).is_ok_and(|time| time > original_time) {
        return Ok(copy);
    }
    let partial = copy.with_extension(format!("partial-{}", std::process::id()));
    tool::output(Command::new(strip).arg("-o").arg(&partial).arg(file))?;
    fs::rename(&partial, &copy)?;
    Ok(copy)
}
