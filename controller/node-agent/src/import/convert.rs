//! Reading foreign images with qemu-img: always with an explicit format, never through a reference
//! to something that was not uploaded, and confined.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::{
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{ImportError, ImportRequest, UploadFile, confine::Confined, io_error, uploads};
use crate::{spec::Format, volumes::Creation};

const SECTOR_BYTES: u64 = 512;
const HASH_CHUNK_BYTES: usize = 1 << 20;
/// Looking at an image reads its tables.
const INSPECT_WITHIN: Duration = Duration::from_secs(60);
/// A converter that does not move for so long is stopped; the slowest medium moves a percent of a
/// terabyte in this time.
const STUCK_AFTER: Duration = Duration::from_secs(30 * 60);
/// What a program may say.
const MAX_OUTPUT_BYTES: u64 = 4 << 20;
/// For tables of a target, beyond its data.
const TARGET_SLACK_BYTES: u64 = 1 << 30;
/// Parts of 100 that qemu-img counts in.
const PERCENT: f64 = 100.0;

/// An image that was looked at.
pub(crate) struct ImportSource {
    dir: PathBuf,
    file: PathBuf,
    format: String,
    size_bytes: u64,
    qemu_img: Option<PathBuf>,
}

/// What `qemu-img info --output=json` says.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    virtual_size: u64,
    #[serde(default)]
    backing_filename: Option<String>,
    #[serde(default)]
    encrypted: bool,
    #[serde(default)]
    format_specific: Option<Specific>,
}

#[derive(Debug, Deserialize)]
struct Specific {
    #[serde(default)]
    data: SpecificData,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct SpecificData {
    #[serde(default)]
    data_file: Option<String>,
    #[serde(default)]
    extents: Vec<Extent>,
}

#[derive(Debug, Deserialize)]
struct Extent {
    #[serde(default)]
    filename: String,
}

/// Compares every file with its checksum.
pub(super) fn verify(
    dir: &Path,
    files: &[UploadFile],
    wanted: &[Vec<u8>],
    creation: &Creation,
) -> Result<(), ImportError> {
    let total = files
        .iter()
        .fold(0, |sum: u64, file| sum.saturating_add(file.size_bytes));
    creation.begin("verifying", total);
    for (file, wanted) in files.iter().zip(wanted) {
        let found = hash(&dir.join(&file.name), creation.done_bytes())?;
        if found != *wanted {
            return Err(ImportError::Checksum {
                file: file.name.clone(),
                found: hex(&found),
                wanted: hex(wanted),
            });
        }
    }
    Ok(())
}

fn hash(path: &Path, done: &AtomicU64) -> Result<Vec<u8>, ImportError> {
    let mut file = uploads::open_file(path)?;
    let mut sum = Sha256::new();
    let mut buffer = vec![0; HASH_CHUNK_BYTES];
    loop {
        let read = file.read(&mut buffer).map_err(io_error("reading", path))?;
        if read == 0 {
            return Ok(sum.finalize().to_vec());
        }
        sum.update(&buffer[..read]);
        done.fetch_add(read as u64, Ordering::Relaxed);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl ImportSource {
    /// Looks at an image of verified files.
    pub(super) fn inspect(
        qemu_img: Option<&Path>,
        dir: &Path,
        import: &ImportRequest,
        target: Format,
    ) -> Result<Self, ImportError> {
        let file = dir.join(&import.file);
        let raw = import.format == "raw";
        let mut source = Self {
            dir: dir.to_owned(),
            file,
            format: import.format.clone(),
            size_bytes: 0,
            qemu_img: qemu_img.map(Path::to_owned),
        };
        if !(raw && target == Format::Raw) && qemu_img.is_none() {
            return Err(ImportError::NoProgram);
        }
        if raw {
            let len = fs::metadata(&source.file)
                .map_err(io_error("measuring", &source.file))?
                .len();
            source.size_bytes = len.next_multiple_of(SECTOR_BYTES);
        } else {
            source.size_bytes = source.look()?;
        }
        Ok(source)
    }

    /// What a guest will see.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Makes the image at `path`, which lies in the pool beside the uploads.
    ///
    /// # Errors
    /// When it cannot be converted; what is at `path` then is for the caller to remove.
    pub(crate) fn make(
        &self,
        path: &Path,
        target: Format,
        cluster_bytes: u32,
        free_bytes: u64,
        creation: &Creation,
    ) -> Result<(), ImportError> {
        if self.format == "raw" && target == Format::Raw {
            creation.begin("moving", 0);
            return self.take(path);
        }
        creation.begin("converting", self.size_bytes);
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .map_err(io_error("creating", path))?;
        let mut args: Vec<OsString> = ["convert", "-p", "-f", self.format.as_str(), "-O"]
            .map(OsString::from)
            .to_vec();
        args.push(target.name().into());
        if target == Format::Qcow2 && cluster_bytes > 0 {
            args.extend(["-o".into(), format!("cluster_size={cluster_bytes}").into()]);
        }
        args.extend([self.file.clone().into(), path.into()]);
        let limit = self
            .size_bytes
            .min(free_bytes)
            .saturating_add(TARGET_SLACK_BYTES);
        let program = self.program()?;
        let mut child = Confined::new(&program)
            .read(&self.dir)
            .write(path)
            .file_bytes(limit.max(self.size_bytes.saturating_add(TARGET_SLACK_BYTES)))
            .command(&args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| ImportError::Run {
                program: program.clone(),
                source,
            })?;
        let done = |percent: f64| {
            let bytes = self.size_bytes as f64 * (percent / PERCENT);
            creation.done_bytes().store(bytes as u64, Ordering::Relaxed);
        };
        let ended = follow(&mut child, STUCK_AFTER, done);
        let (success, message) = ended.map_err(|source| match source {
            Waiting::Stuck => ImportError::Stuck {
                minutes: STUCK_AFTER.as_secs() / 60,
            },
            Waiting::Io(source) => ImportError::Run { program, source },
        })?;
        if success {
            Ok(())
        } else {
            Err(self.refused(&message))
        }
    }

    /// A raw image is the volume already.
    fn take(&self, path: &Path) -> Result<(), ImportError> {
        fs::rename(&self.file, path).map_err(io_error("moving", &self.file))?;
        OpenOptions::new()
            .write(true)
            .open(path)
            .and_then(|file| file.set_len(self.size_bytes))
            .map_err(io_error("sizing", path))
    }

    fn look(&self) -> Result<u64, ImportError> {
        let program = self.program()?;
        let args: Vec<OsString> = vec![
            "info".into(),
            "--output=json".into(),
            "-f".into(),
            self.format.clone().into(),
            self.file.clone().into(),
        ];
        let run = |source| ImportError::Run {
            program: program.clone(),
            source,
        };
        let mut child = Confined::new(&program)
            .read(&self.dir)
            .command(&args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(run)?;
        let output = collect(&mut child, INSPECT_WITHIN).map_err(|error| match error {
            Waiting::Stuck => ImportError::Stuck {
                minutes: INSPECT_WITHIN.as_secs() / 60,
            },
            Waiting::Io(source) => run(source),
        })?;
        if !output.success {
            return Err(self.refused(&output.stderr));
        }
        let info: Info = serde_json::from_slice(&output.stdout)
            .map_err(|error| self.refused(&format!("qemu-img info says {error}")))?;
        self.refuse_references(&info)?;
        Ok(info.virtual_size.next_multiple_of(SECTOR_BYTES))
    }

    fn refuse_references(&self, info: &Info) -> Result<(), ImportError> {
        if info.encrypted {
            return Err(ImportError::Encrypted);
        }
        if let Some(name) = &info.backing_filename {
            return Err(ImportError::Reference {
                what: "its backing file",
                name: name.clone(),
                remedy: "merge both first (qemu-img convert, or deleting the snapshot in the hypervisor)",
            });
        }
        let data = info.format_specific.as_ref().map(|specific| &specific.data);
        if let Some(name) = data.and_then(|data| data.data_file.as_ref()) {
            return Err(ImportError::Reference {
                what: "its data file",
                name: name.clone(),
                remedy: "convert it to an image of one file first: qemu-img convert -O qcow2",
            });
        }
        let extents = data.map(|data| data.extents.as_slice()).unwrap_or_default();
        for extent in extents {
            let path = Path::new(&extent.filename);
            // qemu-img puts the image's directory in front of what the descriptor says.
            if path.parent() != Some(self.dir.as_path()) {
                return Err(ImportError::Reference {
                    what: "an extent",
                    name: extent.filename.clone(),
                    remedy: "put all files of the disk into one directory, named in its descriptor without a path",
                });
            }
        }
        Ok(())
    }

    fn program(&self) -> Result<PathBuf, ImportError> {
        self.qemu_img.clone().ok_or(ImportError::NoProgram)
    }

    fn refused(&self, message: &str) -> ImportError {
        let line = message
            .lines()
            .rev()
            .map(str::trim)
            .find(|line| !line.is_empty())
            .unwrap_or("qemu-img failed without a word");
        ImportError::Refused {
            format: self.format.clone(),
            // The host's directories are nobody's business.
            message: line
                .trim_start_matches("qemu-img: ")
                .replace(&format!("{}/", self.dir.display()), ""),
        }
    }
}

enum Waiting {
    Stuck,
    Io(io::Error),
}

struct Output {
    success: bool,
    stdout: Vec<u8>,
    stderr: String,
}

/// Waits for a child and what it says.
fn collect(child: &mut Child, within: Duration) -> Result<Output, Waiting> {
    let stdout = child.stdout.take().expect("piped");
    let stderr = child.stderr.take().expect("piped");
    let said = reader(stdout);
    let errors = reader(stderr);
    let deadline = Instant::now() + within;
    let success = wait(child, deadline)?;
    let text = |said: mpsc::Receiver<Vec<u8>>| said.iter().flatten().collect::<Vec<u8>>();
    Ok(Output {
        success,
        stdout: text(said),
        stderr: String::from_utf8_lossy(&text(errors)).into_owned(),
    })
}

/// Waits for a child that prints how far it is; stops one that does not move.
fn follow(
    child: &mut Child,
    patience: Duration,
    mut percent: impl FnMut(f64),
) -> Result<(bool, String), Waiting> {
    let stdout = child.stdout.take().expect("piped");
    let stderr = child.stderr.take().expect("piped");
    let said = reader(stdout);
    let errors = reader(stderr);
    let mut line = String::new();
    let mut last = -1.0;
    let mut moved_at = Instant::now();
    loop {
        match said.recv_timeout(Duration::from_secs(1)) {
            Ok(bytes) => {
                line.push_str(&String::from_utf8_lossy(&bytes));
                if let Some(now) = parse_percent(&line) {
                    percent(now);
                    if now != last {
                        last = now;
                        moved_at = Instant::now();
                    }
                }
                let keep = line.len().saturating_sub(64);
                if let Some(tail) = line.get(keep..) {
                    line = tail.to_owned();
                } else {
                    line.clear();
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
        if moved_at.elapsed() > patience {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Waiting::Stuck);
        }
    }
    let success = wait(child, Instant::now() + patience)?;
    let message: Vec<u8> = errors.iter().flatten().collect();
    Ok((success, String::from_utf8_lossy(&message).into_owned()))
}

fn wait(child: &mut Child, deadline: Instant) -> Result<bool, Waiting> {
    const POLL_INTERVAL: Duration = Duration::from_millis(5);
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status.success()),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(POLL_INTERVAL),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Waiting::Stuck);
            }
            Err(error) => return Err(Waiting::Io(error)),
        }
    }
}

/// What a pipe yields, read by a thread that ends with the pipe.
fn reader(pipe: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut pipe = pipe.take(MAX_OUTPUT_BYTES);
        let mut buffer = [0; 4096];
        while let Ok(read) = pipe.read(&mut buffer)
            && read > 0
        {
            if sender.send(buffer[..read].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// The last of `    (12.34/100%)`.
fn parse_percent(text: &str) -> Option<f64> {
    let end = text.rfind("/100%)")?;
    let begin = text[..end].rfind('(')? + 1;
    text[begin..end].trim().parse().ok()
}

/// qemu-img beside this program, or in PATH.
pub(crate) fn find_qemu_img(bin_dir: &Path) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(bin_dir.to_owned())
        .chain(std::env::split_paths(&path))
        .map(|dir| dir.join("qemu-img"))
        .find(|program| program.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_the_last_one_printed() {
        assert_eq!(
            parse_percent("    (0.00/100%)\r    (12.50/100%)\r    (13."),
            Some(12.5)
        );
        assert_eq!(parse_percent("    (12."), None);
    }
}
