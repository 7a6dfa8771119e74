//! Kernel settings of single interfaces. Nothing that holds for the whole host is changed where the
//! kernel has it by interface.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::error::NetworkError;

/// Of one interface and family.
pub(super) fn path(family: &str, interface: &str, name: &str) -> PathBuf {
    Path::new("/proc/sys/net")
        .join(family)
        .join("conf")
        .join(interface)
        .join(name)
}

/// Sets it unless it is so already; what it was before. Settings that this kernel does not have are
/// left alone.
pub(super) fn set(id: &str, path: &Path, value: &str) -> Result<Option<String>, NetworkError> {
    let before = match fs::read_to_string(path) {
        Ok(before) => before.trim().to_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(NetworkError::io(id, "reading", path)(error)),
    };
    if before == value {
        return Ok(None);
    }
    fs::write(path, value).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            NetworkError::NotPermitted {
                id: id.to_owned(),
                action: "changing settings of its interfaces in /proc/sys/net",
            }
        }
        _ => NetworkError::io(id, "writing", path)(error),
    })?;
    Ok(Some(before))
}

/// The interfaces that packets to elsewhere leave by: those of default routes, or else all that have
/// a carrier.
pub(super) fn uplinks() -> Vec<String> {
    let mut found = Vec::new();
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    for line in routes.lines().skip(1) {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        if let [name, "00000000", ..] = fields[..] {
            found.push(name.to_owned());
        }
    }
    let routes = fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    for line in routes.lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        if let (Some(&"00"), Some(name)) = (fields.get(1), fields.get(9))
            && *name != "lo"
        {
            found.push((*name).to_owned());
        }
    }
    found.sort();
    found.dedup();
    found
}
