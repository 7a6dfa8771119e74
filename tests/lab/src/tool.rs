//! Runs the system's own tools and turns their failures into one clear error.

use std::ffi::OsStr;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Where a tool is, if it is installed.
pub(crate) fn find(tool: &str) -> Option<PathBuf> {
    // A user's PATH often lacks the sbin directories, where mke2fs is.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(system)
        .map(|dir| dir.join(tool))
        .find(|file| file.is_file())
}

/// Runs a command to its end and returns what it printed.
///
/// # Errors
/// When it can't be started or fails; the error carries its last lines on stderr.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", name.display()))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = stderr
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        let tail = lines[lines.len().saturating_sub(3)..].join("; ");
        let args: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
        bail!(
            "{} {} failed ({}): {tail}",
            name.display(),
            args.join(" "),
            output.status
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Feeds `input` through a system tool. Bytes after the compressed stream make such tools exit
/// with a warning status, so the output decides.
pub(crate) fn filter(tool: &str, args: &[&str], input: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new(tool)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run {tool}; install it with: apt-get install {tool}"))?;
    let mut stdin = child.stdin.take().context("no pipe to the tool")?;
    let output = std::thread::scope(|scope| {
        // A tool that met the end of its stream closes the pipe early; that is no failure.
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output()
    })?;
    ensure!(
        !output.stdout.is_empty(),
        "{tool} could not decompress the data"
    );
    Ok(output.stdout)
}
