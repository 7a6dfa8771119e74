//! Running a program that parses foreign bytes: this very program is executed once more, gives up
//! all it can (network, files, capabilities, memory), and becomes that program.

use std::{
    ffi::{OsStr, OsString},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use nix::sys::resource::{Resource, setrlimit};
use sandbox::Access;

/// First argument of the second execution.
const MARK: &str = "--run-confined";
/// qemu-img maps its libraries and some buffers.
const MAX_MEMORY_BYTES: u64 = 4 << 30;
/// Extents of a VMDK are open all at once.
const MAX_OPEN_FILES: u64 = 2048;
/// Below everything that serves a guest.
const NICENESS: i32 = 10;
/// Where programs and their libraries are.
const SYSTEM_DIRS: [&str; 5] = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"];

/// A program and all that it will see.
#[derive(Debug)]
pub(super) struct Confined {
    program: PathBuf,
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
    file_bytes: u64,
}

impl Confined {
    /// Sees itself and the system's libraries.
    pub(super) fn new(program: &Path) -> Self {
        Self {
            program: program.to_owned(),
            read: Vec::new(),
            write: Vec::new(),
            file_bytes: 0,
        }
    }

    /// Lets it read a file, or a directory and all beneath it.
    pub(super) fn read(mut self, path: &Path) -> Self {
        self.read.push(path.to_owned());
        self
    }

    /// Lets it write a file that is there.
    pub(super) fn write(mut self, path: &Path) -> Self {
        self.write.push(path.to_owned());
        self
    }

    /// No file that it writes gets longer.
    pub(super) fn file_bytes(mut self, limit: u64) -> Self {
        self.file_bytes = limit;
        self
    }

    /// The command that confines itself and becomes the program.
    pub(super) fn command(self, args: &[OsString]) -> Command {
        // What runs now, also if the file was replaced meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.arg(MARK).arg(self.file_bytes.to_string());
        for path in &self.read {
            command.arg("r").arg(path);
        }
        for path in &self.write {
            command.arg("w").arg(path);
        }
        command.arg("--").arg(self.program).args(args);
        command.current_dir("/").env_remove("LD_LIBRARY_PATH");
        command
    }
}

/// Becomes the program if this is the second execution; returns only if it is not, or failed.
pub(crate) fn enter_if_asked() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    if args.next().as_deref() != Some(OsStr::new(MARK)) {
        return None;
    }
    let error = match enter(args) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    eprintln!("{error:#}");
    Some(ExitCode::FAILURE)
}

fn enter(mut args: impl Iterator<Item = OsString>) -> anyhow::Result<std::convert::Infallible> {
    use anyhow::Context as _;
    let file_bytes: u64 = args
        .next()
        .and_then(|text| text.to_str()?.parse().ok())
        .context("no limit")?;
    let mut allowed: Vec<(PathBuf, Access)> = Vec::new();
    loop {
        let kind = args.next().context("no program")?;
        if kind == "--" {
            break;
        }
        let access = if kind == "w" {
            Access::ReadWrite
        } else {
            Access::Read
        };
        allowed.push((args.next().context("no path")?.into(), access));
    }
    let program = PathBuf::from(args.next().context("no program")?);
    let dirs = SYSTEM_DIRS
        .iter()
        .map(PathBuf::from)
        .chain(prefix(&program));
    allowed.extend(
        dirs.filter(|dir| dir.exists())
            .map(|dir| (dir, Access::ReadExecute)),
    );
    allowed.push(("/dev/null".into(), Access::ReadWrite));

    // SAFETY: prctl with these arguments touches no memory; the agent's end is then this one's.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // SAFETY: nice takes its argument by value; that it cannot be lower is no failure.
    unsafe { libc::nice(NICENESS) };
    setrlimit(Resource::RLIMIT_AS, MAX_MEMORY_BYTES, MAX_MEMORY_BYTES)
        .context("limiting memory")?;
    setrlimit(Resource::RLIMIT_NOFILE, MAX_OPEN_FILES, MAX_OPEN_FILES).context("limiting files")?;
    setrlimit(Resource::RLIMIT_FSIZE, file_bytes, file_bytes).context("limiting the target")?;
    sandbox::no_core_dumps().context("giving up core dumps")?;
    sandbox::deny_network();
    sandbox::deny_filesystem(&allowed).context("giving up the file system")?;
    sandbox::drop_capabilities(&[]).context("giving up capabilities")?;
    sandbox::no_new_privs().context("giving up privileges")?;
    let error = Command::new(&program).args(args).exec();
    Err(error).with_context(|| format!("starting {}", program.display()))
}

/// PREFIX of PREFIX/bin/program, where its libraries are if it came from elsewhere than the system.
fn prefix(program: &Path) -> Option<PathBuf> {
    let program = program.canonicalize().ok()?;
    let dir = program.parent()?;
    match dir.parent() {
        Some(prefix) if prefix.parent().is_some() => Some(prefix.to_owned()),
        _ => Some(dir.to_owned()),
    }
}
