//! What the next agent has to know of networks: one file for each in STATE_DIR/networks, replaced
//! atomically. The specification is kept as the protocol has it, whose fields stay readable.

use std::{fs, io::Write as _, path::Path};

use api::node::NetworkSpec;
use prost::Message;

use super::error::NetworkError;
use crate::record::sync_dir;

/// A version of the switch that is used instead of the installed one.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Pin {
    /// The copy.
    #[prost(string, tag = "1")]
    pub(super) path: String,
    /// Beginning of its SHA-256.
    #[prost(string, tag = "2")]
    pub(super) build: String,
}

/// One network.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Record {
    /// As last applied; what it names may exist.
    #[prost(message, optional, tag = "1")]
    pub(super) spec: Option<NetworkSpec>,
    /// Of its switch.
    #[prost(message, optional, tag = "2")]
    pub(super) pin: Option<Pin>,
}

/// All records. Half-written files of a dead agent are removed.
pub(super) fn load(dir: &Path) -> Result<Vec<Record>, NetworkError> {
    let mut records = Vec::new();
    for entry in fs::read_dir(dir).map_err(NetworkError::io("*", "reading", dir))? {
        let path = entry.map_err(NetworkError::io("*", "reading", dir))?.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("network") => {
                let bytes = fs::read(&path).map_err(NetworkError::io("*", "reading", &path))?;
                let record = Record::decode(bytes.as_slice()).map_err(|error| {
                    NetworkError::io("*", "understanding", &path)(std::io::Error::other(error))
                })?;
                records.push(record);
            }
            Some("tmp") => {
                fs::remove_file(&path).map_err(NetworkError::io("*", "removing", &path))?;
            }
            _ => {}
        }
    }
    Ok(records)
}

/// Replaces a network's record; on return it is durable.
pub(super) fn save(dir: &Path, spec: &NetworkSpec, pin: Option<&Pin>) -> Result<(), NetworkError> {
    let record = Record {
        spec: Some(spec.clone()),
        pin: pin.cloned(),
    };
    write(&dir.join(format!("{}.network", spec.id)), &record)
}

/// Forgets a network. One that is not known is no error.
pub(super) fn remove(dir: &Path, id: &str) -> Result<(), NetworkError> {
    let path = dir.join(format!("{id}.network"));
    match fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(NetworkError::io(id, "removing", &path)(error))
        }
        _ => Ok(sync_dir(dir)?),
    }
}

/// Replaces a file; on return it is durable.
pub(super) fn write(path: &Path, message: &impl Message) -> Result<(), NetworkError> {
    let temporary = path.with_extension("tmp");
    let failed = || NetworkError::io("*", "writing", &temporary);
    let mut file = fs::File::create(&temporary).map_err(failed())?;
    file.write_all(&message.encode_to_vec())
        .and_then(|()| file.sync_all())
        .map_err(failed())?;
    fs::rename(&temporary, path).map_err(NetworkError::io("*", "replacing", path))?;
    Ok(sync_dir(
        path.parent().expect("records are in a directory"),
    )?)
}
