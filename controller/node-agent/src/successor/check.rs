//! Whether a binary can take the agent's place: a program that says it is a node-agent, answers about
//! itself in time, and whose protocol the controller understands.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use api::node::UpgradeAgentRequest;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;
use tonic::Code;

use super::{PROBE, probe};
use crate::{
    record::DaemonKind,
    versions::{BinaryError, check_file, first_line, says_its_version},
};

/// A program that takes longer to answer about itself hangs; the records of 4,096 VMs take a second.
const PROBE_WITHIN: Duration = Duration::from_secs(20);
const MAX_OUTPUT_BYTES: u64 = 4096;
const NAME: &str = "node-agent";

/// Which file a path led to, so that another one is not executed in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    device: u64,
    inode: u64,
    len_bytes: u64,
    modified: (i64, i64),
}

impl Stamp {
    /// As it is now.
    ///
    /// # Errors
    /// When it is not there.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            len_bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

/// A binary that can take the agent's place.
#[derive(Debug)]
pub(crate) struct Candidate {
    pub(crate) path: PathBuf,
    pub(crate) stamp: Stamp,
    pub(crate) version: String,
    pub(crate) protocol: u32,
}

/// Why a binary cannot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CheckError {
    /// It is no program, or does not say its version.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// It is something else.
    #[error("binary {path} is not node-agent: --version says {said:?}; correct the path", path = .path.display())]
    Foreign {
        /// As given.
        path: PathBuf,
        /// First line of what it said.
        said: String,
    },
    /// It does not answer about itself.
    #[error("binary {path} did not say within {PROBE_WITHIN:?} whether it can take over; it may be damaged", path = .path.display())]
    Mute {
        /// As given.
        path: PathBuf,
    },
    /// It says that it cannot, or does not know the question.
    #[error("binary {path} cannot take over: {why}", path = .path.display())]
    Unfit {
        /// As given.
        path: PathBuf,
        /// In its words.
        why: String,
    },
    /// The controller would not understand it.
    #[error("binary {path} speaks protocol {protocol}, and the controller {controller}: only neighbours understand each other; upgrade in steps, the controller first", path = .path.display())]
    Protocol {
        /// As given.
        path: PathBuf,
        /// Its protocol.
        protocol: u32,
        /// The controller's.
        controller: u32,
    },
}

impl CheckError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            // Asking again does not help.
            Self::Binary(BinaryError::Silent { .. })
            | Self::Mute { .. }
            | Self::Unfit { .. }
            | Self::Protocol { .. } => Code::FailedPrecondition,
            Self::Binary(error) => error.code(),
            Self::Foreign { .. } => Code::InvalidArgument,
        }
    }
}

/// Checks all binaries of a request; answers the agent's, if there is one.
///
/// # Errors
/// What is wrong with the first that is not right.
pub(super) async fn all(
    request: &UpgradeAgentRequest,
    state_dir: &Path,
) -> Result<Option<Candidate>, CheckError> {
    for (path, kind) in [
        (&request.device_blk, DaemonKind::Blk),
        (&request.device_net, DaemonKind::Net),
    ] {
        if !path.is_empty() {
            says_its_version(Path::new(path), kind).await?;
        }
    }
    match request.binary.as_str() {
        "" => Ok(None),
        path => agent(Path::new(path), request.protocol, state_dir)
            .await
            .map(Some),
    }
}

async fn agent(path: &Path, controller: u32, state_dir: &Path) -> Result<Candidate, CheckError> {
    check_file(path)?;
    let stamp = Stamp::of(path).map_err(|source| BinaryError::Io {
        action: "looking at",
        path: path.to_owned(),
        source,
    })?;
    let said = first_line(path).await?;
    if said
        .strip_prefix(NAME)
        .is_none_or(|rest| !rest.starts_with(' '))
    {
        let path = path.to_owned();
        return Err(CheckError::Foreign { path, said });
    }
    let (version, protocol) = ask(path, state_dir).await?;
    if protocol.abs_diff(controller) > 1 {
        return Err(CheckError::Protocol {
            path: path.to_owned(),
            protocol,
            controller,
        });
    }
    Ok(Candidate {
        path: path.to_owned(),
        stamp,
        version,
        protocol,
    })
}

/// Asks it about itself, with the arguments that it would get.
async fn ask(path: &Path, state_dir: &Path) -> Result<(String, u32), CheckError> {
    let start = |source| BinaryError::Start {
        path: path.to_owned(),
        source,
    };
    let mut child = tokio::process::Command::new(path)
        .arg(PROBE)
        .arg(state_dir)
        .args(std::env::args_os().skip(1))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(start)?;
    let output = child.stdout.take().expect("it was made a pipe");
    let errors = child.stderr.take().expect("it was made a pipe");
    let (mut said, mut complaint) = (String::new(), String::new());
    let answering = async {
        let (mut output, mut errors) =
            (output.take(MAX_OUTPUT_BYTES), errors.take(MAX_OUTPUT_BYTES));
        // What is not text is no answer.
        let _ = tokio::join!(
            output.read_to_string(&mut said),
            errors.read_to_string(&mut complaint)
        );
    };
    let answered = tokio::time::timeout(PROBE_WITHIN, answering).await;
    // It may have more to say, or stay for other reasons.
    let _ = child.start_kill();
    let _ = child.wait().await;
    if answered.is_err() {
        let path = path.to_owned();
        return Err(CheckError::Mute { path });
    }
    let line = said.lines().next().unwrap_or_default();
    probe::parse(line).ok_or_else(|| {
        let complaint = complaint.trim();
        let why = match complaint.is_empty() {
            true => {
                "it does not say anything about itself; it may be older than this way of upgrading"
            }
            false => complaint,
        };
        CheckError::Unfit {
            path: path.to_owned(),
            why: why.lines().take(3).collect::<Vec<_>>().join(" "),
        }
    })
}
