//! Versions of device daemons beside the installed one: STATE_DIR/versions/BUILD/PROGRAM, where BUILD is
//! the beginning of the binary's SHA-256. A binary is checked and copied once; what becomes of the original
//! does not matter to the VMs that use it. What no VM uses is removed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use api::validate::DEVICE_PROGRAMS;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;
use tonic::Code;

use crate::record::DaemonKind;

/// Hexadecimal digits of a build's name: no two binaries of one host share 48 bits by chance.
const BUILD_DIGITS: usize = 12;
/// A program says its version without doing anything else.
const VERSION_WITHIN: Duration = Duration::from_secs(5);
const MAX_VERSION_OUTPUT_BYTES: u64 = 4096;
/// A static binary with debug information has a tenth of it.
const MAX_BINARY_BYTES: u64 = 1 << 30;
/// A child that another thread forked holds our write end of the copy until it executes its program.
const BUSY_ATTEMPTS: u32 = 100;
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// A version that a VM's daemon uses instead of the installed one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pinned {
    /// Whose daemon.
    pub(crate) kind: DaemonKind,
    /// The copy.
    pub(crate) path: PathBuf,
    /// Beginning of its SHA-256.
    pub(crate) build: String,
}

/// A binary that may be used: it is what it should be, and a copy of it is kept.
#[derive(Clone, Debug)]
pub(crate) struct Binary {
    /// Of which daemon.
    pub(crate) kind: DaemonKind,
    /// What it says with --version.
    pub(crate) version: String,
    /// What is executed: the copy, or the installed program.
    pub(crate) path: PathBuf,
    /// Empty for the installed program.
    pub(crate) build: String,
    /// Keeps the copy until somebody's record does.
    _in_use: Arc<InUse>,
}

/// Why a binary cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BinaryError {
    /// It is not there.
    #[error("binary {path} does not exist on this host; correct the path", path = .path.display())]
    Missing {
        /// As given.
        path: PathBuf,
    },
    /// It is a directory or the like.
    #[error("binary {path} is no regular file; name the program itself", path = .path.display())]
    NoFile {
        /// As given.
        path: PathBuf,
    },
    /// Its mode forbids it.
    #[error("binary {path} is not executable; chmod +x it", path = .path.display())]
    NotExecutable {
        /// As given.
        path: PathBuf,
    },
    /// It is far larger than any daemon.
    #[error("binary {path} has {len_bytes} bytes, which no device daemon has; correct the path", path = .path.display())]
    TooLarge {
        /// As given.
        path: PathBuf,
        /// Its size.
        len_bytes: u64,
    },
    /// It cannot be read or copied.
    #[error("{action} {path}", path = .path.display())]
    Io {
        /// What was done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It does not start.
    #[error("binary {path} cannot be started: is it a program for this machine?", path = .path.display())]
    Start {
        /// As given.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It does not say its version.
    #[error("binary {path} did not answer --version within {VERSION_WITHIN:?}; correct the path", path = .path.display())]
    Silent {
        /// As given.
        path: PathBuf,
    },
    /// It is something else.
    #[error("binary {path} is not {wanted}: --version says {said:?}; name a device-blk for disks, a device-net for NICs", path = .path.display())]
    Foreign {
        /// As given.
        path: PathBuf,
        /// What it should be.
        wanted: String,
        /// First line of what it said.
        said: String,
    },
}

impl BinaryError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Missing { .. } => Code::NotFound,
            Self::NoFile { .. }
            | Self::NotExecutable { .. }
            | Self::TooLarge { .. }
            | Self::Start { .. }
            | Self::Foreign { .. } => Code::InvalidArgument,
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => Code::PermissionDenied,
                io::ErrorKind::StorageFull => Code::ResourceExhausted,
                _ => Code::Internal,
            },
            Self::Silent { .. } => Code::DeadlineExceeded,
        }
    }
}

/// The directory of versions. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Versions {
    dir: PathBuf,
    bin_dir: PathBuf,
    /// Builds that work under way uses, and how often.
    in_use: Arc<Mutex<BTreeMap<String, usize>>>,
}

#[derive(Debug)]
struct InUse {
    build: String,
    all: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut all = lock(&self.all);
        if let Some(count) = all.get_mut(&self.build) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.build);
            }
        }
    }
}

impl Versions {
    /// Of a state directory, beside the programs installed in `bin_dir`.
    pub(crate) fn of(state_dir: &Path, bin_dir: &Path) -> Self {
        Self {
            dir: state_dir.join("versions"),
            bin_dir: bin_dir.to_owned(),
            in_use: Arc::default(),
        }
    }

    /// Checks that `path` is a device daemon (the one of `wanted`, if that is named), and keeps a copy.
    ///
    /// # Errors
    /// What is wrong with it; nothing is left then.
    pub(crate) async fn admit(
        &self,
        path: &Path,
        wanted: Option<DaemonKind>,
    ) -> Result<Binary, BinaryError> {
        check_file(path)?;
        if let Some(kind) = self.installed(path) {
            let version = self.ask_version(path, path, wanted).await?.1;
            return Ok(self.binary(kind, version, path.to_owned(), String::new()));
        }
        let (versions, original) = (self.clone(), path.to_owned());
        let copied = tokio::task::spawn_blocking(move || versions.copy(&original)).await;
        let (copy, build) = copied.unwrap_or_else(|panic| panic!("copying a binary: {panic}"))?;
        let asked = self.ask_version(&copy, path, wanted).await;
        let (kind, version) = match asked {
            Ok(answer) => answer,
            Err(error) => {
                remove(&copy);
                return Err(error);
            }
        };
        let binary = self.binary(kind, version, self.place(&build, kind), build);
        let place = &binary.path;
        let placed = fs::create_dir_all(self.dir.join(&binary.build))
            .and_then(|()| fs::rename(&copy, place));
        placed.map_err(|source| {
            remove(&copy);
            BinaryError::Io {
                action: "keeping",
                path: place.clone(),
                source,
            }
        })?;
        Ok(binary)
    }

    /// Removes all builds but those that `pins` name or work under way uses.
    pub(crate) fn collect<'a>(&self, pins: impl Iterator<Item = &'a Pinned>) {
        let mut kept: BTreeSet<String> = pins.map(|pin| pin.build.clone()).collect();
        // Held throughout: nobody begins to use what is being removed.
        let in_use = lock(&self.in_use);
        kept.extend(in_use.keys().cloned());
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return;
        };
        for entry in entries.flatten() {
            let is_build = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let name = entry.file_name().to_string_lossy().into_owned();
            if !is_build || kept.contains(&name) {
                continue;
            }
            if let Err(error) = fs::remove_dir_all(entry.path()) {
                tracing::warn!("removing {}: {error}", entry.path().display());
            }
        }
    }

    /// Removes copies that an earlier agent did not finish.
    pub(crate) fn remove_unfinished(&self) {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return;
        };
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_file()) {
                remove(&entry.path());
            }
        }
    }

    fn binary(&self, kind: DaemonKind, version: String, path: PathBuf, build: String) -> Binary {
        *lock(&self.in_use).entry(build.clone()).or_default() += 1;
        Binary {
            kind,
            version,
            path,
            _in_use: Arc::new(InUse {
                build: build.clone(),
                all: self.in_use.clone(),
            }),
            build,
        }
    }

    fn place(&self, build: &str, kind: DaemonKind) -> PathBuf {
        self.dir.join(build).join(kind.program())
    }

    /// Whose installed program this is, if it is one.
    fn installed(&self, path: &Path) -> Option<DaemonKind> {
        let path = fs::canonicalize(path).ok()?;
        [DaemonKind::Blk, DaemonKind::Net].into_iter().find(|kind| {
            fs::canonicalize(self.bin_dir.join(kind.program())).is_ok_and(|found| found == path)
        })
    }

    /// Copies the file under a name of no build's, and tells what its build is.
    fn copy(&self, path: &Path) -> Result<(PathBuf, String), BinaryError> {
        let error = |action, path: &Path| {
            let path = path.to_owned();
            move |source| BinaryError::Io {
                action,
                path,
                source,
            }
        };
        fs::create_dir_all(&self.dir).map_err(error("making", &self.dir))?;
        let copy = self.dir.join(format!("{}.tmp", uuid::Uuid::new_v4()));
        let copying = || -> Result<String, BinaryError> {
            let mut from = File::open(path).map_err(error("opening", path))?;
            let mut to = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o755)
                .open(&copy)
                .map_err(error("creating", &copy))?;
            let mut digest = Sha256::new();
            let mut buffer = vec![0; 1 << 20];
            loop {
                let len = from.read(&mut buffer).map_err(error("reading", path))?;
                if len == 0 {
                    break;
                }
                digest.update(&buffer[..len]);
                to.write_all(&buffer[..len])
                    .map_err(error("writing", &copy))?;
            }
            to.sync_all().map_err(error("writing", &copy))?;
            let digits: String = digest
                .finalize()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            Ok(digits[..BUILD_DIGITS].to_owned())
        };
        match copying() {
            Ok(build) => Ok((copy, build)),
            Err(error) => {
                remove(&copy);
                Err(error)
            }
        }
    }

    /// Asks `program`, which people know as `path`, what it is.
    async fn ask_version(
        &self,
        program: &Path,
        path: &Path,
        wanted: Option<DaemonKind>,
    ) -> Result<(DaemonKind, String), BinaryError> {
        let said = said(program, path).await?;
        daemon_in(&said, wanted).ok_or_else(|| BinaryError::Foreign {
            path: path.to_owned(),
            wanted: match wanted {
                Some(kind) => kind.program().to_owned(),
                None => DEVICE_PROGRAMS.join(" or "),
            },
            said,
        })
    }
}

/// Checks that `path` is a daemon of this kind, without keeping it.
///
/// # Errors
/// What is wrong with it.
pub(crate) async fn says_its_version(path: &Path, kind: DaemonKind) -> Result<String, BinaryError> {
    check_file(path)?;
    let said = first_line(path).await?;
    let found = daemon_in(&said, Some(kind)).map(|(_, version)| version);
    found.ok_or_else(|| BinaryError::Foreign {
        path: path.to_owned(),
        wanted: kind.program().to_owned(),
        said,
    })
}

/// The first line that a program says with --version.
///
/// # Errors
/// When it does not start, or says nothing in time.
pub(crate) async fn first_line(path: &Path) -> Result<String, BinaryError> {
    said(path, path).await
}

/// The same of `program`, which people know as `path`.
async fn said(program: &Path, path: &Path) -> Result<String, BinaryError> {
    let path = path.to_owned();
    match tokio::time::timeout(VERSION_WITHIN, ask(program)).await {
        Ok(Ok(said)) => Ok(said),
        Ok(Err(source)) => Err(BinaryError::Start { path, source }),
        Err(_) => Err(BinaryError::Silent { path }),
    }
}

/// Which daemon says this of itself, and its version.
fn daemon_in(said: &str, wanted: Option<DaemonKind>) -> Option<(DaemonKind, String)> {
    let known = [DaemonKind::Blk, DaemonKind::Net].into_iter();
    let mut fitting = known.filter(|kind| wanted.is_none_or(|wanted| wanted == *kind));
    fitting.find_map(|kind| {
        let version = said.strip_prefix(kind.program())?.strip_prefix(' ')?;
        (!version.is_empty() && !version.contains(' ')).then(|| (kind, version.to_owned()))
    })
}

/// Whether it is a program at all.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check_file(path: &Path) -> Result<(), BinaryError> {
    let path = path.to_owned();
    let metadata = match fs::metadata(&path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(BinaryError::Missing { path });
        }
        Err(source) => {
            return Err(BinaryError::Io {
                action: "looking at",
                path,
                source,
            });
        }
    };
    if !metadata.is_file() {
        return Err(BinaryError::NoFile { path });
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(BinaryError::NotExecutable { path });
    }
    if metadata.len() > MAX_BINARY_BYTES {
        return Err(BinaryError::TooLarge {
            path,
            len_bytes: metadata.len(),
        });
    }
    Ok(())
}

/// The first line that `program --version` says, at most 200 bytes of it. The program is killed when this
/// is dropped.
async fn ask(program: &Path) -> io::Result<String> {
    let mut attempts = 0;
    let mut child = loop {
        let spawned = tokio::process::Command::new(program)
            .arg("--version")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn();
        match spawned {
            Err(error)
                if error.kind() == io::ErrorKind::ExecutableFileBusy
                    && attempts < BUSY_ATTEMPTS =>
            {
                attempts += 1;
                tokio::time::sleep(BUSY_PAUSE).await;
            }
            spawned => break spawned?,
        }
    };
    let output = child.stdout.take().expect("it was made a pipe");
    let mut said = Vec::new();
    output
        .take(MAX_VERSION_OUTPUT_BYTES)
        .read_to_end(&mut said)
        .await?;
    // It may say more than was read, and wait for ever.
    let _ = child.start_kill();
    child.wait().await?;
    let said = String::from_utf8_lossy(&said);
    let line = said.lines().next().unwrap_or_default().trim();
    Ok(line.chars().take(200).collect())
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!("removing {}: {error}", path.display());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Place {
        dir: tempfile::TempDir,
        versions: Versions,
    }

    fn place() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let bin_dir = dir.path().join("bin");
        fs::create_dir(&bin_dir).unwrap();
        let versions = Versions::of(&dir.path().join("state"), &bin_dir);
        Place { dir, versions }
    }

    impl Place {
        fn script(&self, name: &str, text: &str) -> PathBuf {
            let path = self.dir.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        }

        fn kept(&self) -> Vec<PathBuf> {
            let Ok(entries) = fs::read_dir(&self.versions.dir) else {
                return Vec::new();
            };
            entries.map(|entry| entry.unwrap().path()).collect()
        }
    }

    #[tokio::test]
    async fn daemon_is_copied_and_its_copy_outlives_the_original() {
        let place = place();
        let path = place.script("new", "echo device-blk 2.0.1");
        let binary = place.versions.admit(&path, None).await.unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(
            (binary.kind, binary.version.as_str()),
            (DaemonKind::Blk, "2.0.1")
        );
        assert_eq!(binary.build.len(), BUILD_DIGITS);
        assert!(fs::read_to_string(&binary.path).unwrap().contains("2.0.1"));
        place.versions.collect(std::iter::empty());
        assert_eq!(place.kept().len(), 1, "it is in use");
        let pin = Pinned {
            kind: binary.kind,
            path: binary.path.clone(),
            build: binary.build.clone(),
        };
        drop(binary);
        place.versions.collect([&pin].into_iter());
        assert_eq!(place.kept().len(), 1, "a VM uses it");
        place.versions.collect(std::iter::empty());
        assert_eq!(place.kept(), Vec::<PathBuf>::new());
    }

    #[tokio::test]
    async fn installed_program_is_used_where_it_is() {
        let place = place();
        let path = place.script("bin/device-net", "echo device-net 1.0.0");
        let binary = place.versions.admit(&path, None).await.unwrap();
        assert_eq!((binary.path, binary.build.as_str()), (path, ""));
        assert_eq!(place.kept(), Vec::<PathBuf>::new());
    }

    #[tokio::test]
    async fn what_is_no_daemon_is_refused_and_leaves_nothing() {
        let place = place();
        let plain = place.dir.path().join("plain");
        fs::write(&plain, "text").unwrap();
        let scripts = [
            ("foreign", "echo ls 9.1", "is not device-blk or device-net"),
            ("mute", "exit 0", "is not device-blk or device-net"),
            ("garbage", "\u{1}\u{2}", "is not device-blk or device-net"),
            (
                "talker",
                "yes device-blk",
                "is not device-blk or device-net",
            ),
        ];
        let mut cases: Vec<(PathBuf, &str)> = scripts
            .map(|(name, text, problem)| (place.script(name, text), problem))
            .to_vec();
        cases.push((place.dir.path().join("nothing"), "does not exist"));
        cases.push((place.dir.path().to_owned(), "is no regular file"));
        cases.push((plain, "is not executable"));
        for (path, problem) in cases {
            let error = place.versions.admit(&path, None).await.unwrap_err();
            assert!(error.to_string().contains(problem), "{error}");
            assert_eq!(place.kept(), Vec::<PathBuf>::new(), "{}", path.display());
        }
    }

    #[tokio::test]
    async fn daemon_of_the_other_kind_is_refused() {
        let place = place();
        let path = place.script("net", "echo device-net 1.0.0");
        let error = place.versions.admit(&path, Some(DaemonKind::Blk)).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("is not device-blk"), "{error}");
    }
}
