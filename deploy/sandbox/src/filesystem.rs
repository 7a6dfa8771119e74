//! No files beyond those that are open: landlock, and an empty root where landlock is missing.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath,
    PathFd, PathFdError, RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError,
    RulesetStatus, Scope,
};

use crate::Achieved;

/// What may be done with an allowed path and, for a directory, with everything beneath it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read files, list directories.
    Read,
    /// Read files, list directories, run programs.
    ReadExecute,
    /// Everything but running programs.
    ReadWrite,
}

/// The newest landlock version this crate knows how to ask for. Older kernels give what they can.
const WANTED_ABI: ABI = ABI::V6;

/// Denies the calling thread, and the threads it starts, the whole file system except `allowed`.
/// Descriptors that are open already keep working.
///
/// Where the kernel has no landlock and `allowed` is empty, the thread gets an empty read-only
/// root directory instead, if it is permitted to. Otherwise the result says what is missing.
///
/// # Errors
/// An allowed path cannot be opened, or the kernel has landlock and refused the rules.
pub fn deny_filesystem(allowed: &[(PathBuf, Access)]) -> Result<Achieved, FilesystemError> {
    let status = restrict(allowed)?;
    Ok(match (&status.ruleset, &status.landlock) {
        (RulesetStatus::NotEnforced, _) if allowed.is_empty() => match enter_empty_root() {
            Ok(()) => Achieved::of("empty-root"),
            Err(source) => Achieved::missing(
                "filesystem",
                format!("no landlock, no empty root: {source}"),
            ),
        },
        (RulesetStatus::NotEnforced, _) => Achieved::missing(
            "landlock",
            "not enabled in this kernel (boot it with lsm=landlock,...)",
        ),
        (_, LandlockStatus::Available { effective_abi, .. }) => {
            Achieved::of(format!("landlock:v{}", *effective_abi as i32))
        }
        _ => Achieved::of("landlock"),
    })
}

fn restrict(allowed: &[(PathBuf, Access)]) -> Result<RestrictionStatus, FilesystemError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(WANTED_ABI))?
        .scope(Scope::Signal | Scope::AbstractUnixSocket)?
        .create()?;
    for (path, access) in allowed {
        ruleset = ruleset.add_rule(rule(path, *access)?)?;
    }
    Ok(ruleset.restrict_self()?)
}

fn rule(path: &Path, access: Access) -> Result<PathBeneath<PathFd>, FilesystemError> {
    let fd = PathFd::new(path).map_err(|source| FilesystemError::OpenPath {
        path: path.to_owned(),
        source,
    })?;
    let mut rights: BitFlags<AccessFs> = match access {
        Access::Read => AccessFs::ReadFile | AccessFs::ReadDir,
        Access::ReadExecute => AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::Execute,
        Access::ReadWrite => AccessFs::from_all(WANTED_ABI) & !BitFlags::from(AccessFs::Execute),
    };
    if !path.is_dir() {
        rights &= AccessFs::from_file(WANTED_ABI);
    }
    Ok(PathBeneath::new(fd, rights))
}

/// Puts an empty read-only tmpfs where `/` was. Moving the mount instead of `pivot_root` also
/// works where the root is an initramfs.
fn enter_empty_root() -> io::Result<()> {
    // SAFETY: unshare reads no memory; it gives this thread its own root, working directory
    // and mount table.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_FS) })?;
    mount(None, c"/", None, libc::MS_REC | libc::MS_PRIVATE)?;
    // `/proc` exists wherever a Linux process can have been started by a service manager.
    let base = c"/proc";
    let flags = libc::MS_NODEV | libc::MS_NOEXEC | libc::MS_NOSUID | libc::MS_RDONLY;
    mount(Some(c"mortise-empty"), base, Some(c"tmpfs"), flags)?;
    // SAFETY: the paths are NUL-terminated constants, here and below.
    check(unsafe { libc::chdir(base.as_ptr()) })?;
    mount(Some(c"."), c"/", None, libc::MS_MOVE)?;
    // SAFETY: see above.
    check(unsafe { libc::chroot(c".".as_ptr()) })?;
    // SAFETY: see above.
    check(unsafe { libc::chdir(c"/".as_ptr()) })
}

fn mount(
    source: Option<&std::ffi::CStr>,
    target: &std::ffi::CStr,
    fstype: Option<&std::ffi::CStr>,
    flags: libc::c_ulong,
) -> io::Result<()> {
    let pointer = |text: Option<&std::ffi::CStr>| text.map_or(std::ptr::null(), |t| t.as_ptr());
    // SAFETY: each pointer is null where mount(2) allows it, or a live NUL-terminated string.
    check(unsafe {
        libc::mount(
            pointer(source),
            target.as_ptr(),
            pointer(fstype),
            flags,
            std::ptr::null(),
        )
    })
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The file system could not be denied.
#[derive(Debug, thiserror::Error)]
pub enum FilesystemError {
    /// A path that is to stay usable is not there.
    #[error("cannot open {} to keep it usable inside the sandbox", path.display())]
    OpenPath {
        /// The path as it was given.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: PathFdError,
    },
    /// The kernel has landlock but refused the rules.
    #[error("landlock refused the file system rules")]
    Ruleset(#[from] RulesetError),
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// A root cannot be left again: a child process, this program once more, enters it.
    #[test]
    fn empty_root_shows_no_file_and_takes_none() {
        const IN_CHILD: &str = "SANDBOX_TEST_IN_CHILD";
        if std::env::var_os(IN_CHILD).is_some() {
            if let Err(error) = enter_empty_root() {
                eprintln!("not tried: an empty root is not permitted here: {error}");
                std::process::exit(0);
            }
            assert_eq!(std::fs::read_dir("/").unwrap().count(), 0);
            assert_eq!(std::fs::read_dir("/..").unwrap().count(), 0);
            assert!(std::fs::write("/file", "x").is_err());
            std::process::exit(0);
        }
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["empty_root_shows", "--nocapture"])
            .env(IN_CHILD, "1")
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        eprint!("{stderr}");
    }
}
