//! The file of tokens: JSON, an array of
//! `{"name": ..., "sha256": ..., "roles": [...], "projects": [...]}`. It holds digests, so reading it
//! gives nobody a token. A changed file is read again by itself; one that cannot be read changes
//! nothing.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use super::{Principal, Role, UnknownRole};

/// How often it is looked whether the file has changed.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A file of 10,000 tokens takes 2 MiB.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// The tokens of a file.
#[derive(Debug)]
pub struct Tokens {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    known: HashMap<[u8; 32], Principal>,
    stamp: Option<Stamp>,
    looked: Instant,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    sha256: String,
    roles: Vec<String>,
    projects: Option<Vec<String>>,
}

impl Tokens {
    /// Reads the file.
    ///
    /// # Errors
    /// When it cannot be read or has something in it that is not understood.
    pub fn open(path: &Path) -> Result<Self, TokensError> {
        let stamp = stamp(path);
        Ok(Self {
            path: path.to_owned(),
            state: Mutex::new(State {
                known: read(path)?,
                stamp,
                looked: Instant::now(),
            }),
        })
    }

    /// Whose token it is. Found by its digest, so how long that takes says nothing about tokens.
    pub fn find(&self, token: &str) -> Option<Principal> {
        let mut state = self.state.lock().expect("nothing panics while it is held");
        if state.looked.elapsed() >= LOOK_INTERVAL {
            state.looked = Instant::now();
            let stamp = stamp(&self.path);
            if stamp != state.stamp {
                match read(&self.path) {
                    Ok(known) => {
                        tracing::info!(file = %self.path.display(), tokens = known.len(), "tokens were read again");
                        state.known = known;
                        state.stamp = stamp;
                    }
                    Err(error) => tracing::warn!(
                        error = %crate::with_source(&error),
                        "the tokens known before stay valid"
                    ),
                }
            }
        }
        let digest: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        state.known.get(&digest).cloned()
    }
}

/// What a file's stamp is made of: when it was written, its inode, its length in bytes.
type Stamp = (SystemTime, u64, u64);

/// Changes with the file.
fn stamp(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.ino(), metadata.len()))
}

fn read(path: &Path) -> Result<HashMap<[u8; 32], Principal>, TokensError> {
    let failed = |source| TokensError::Read {
        path: path.to_owned(),
        source,
    };
    if fs::metadata(path).map_err(failed)?.len() > MAX_FILE_BYTES {
        return Err(TokensError::TooLarge {
            path: path.to_owned(),
        });
    }
    let text = fs::read(path).map_err(failed)?;
    let entries: Vec<Entry> =
        serde_json::from_slice(&text).map_err(|source| TokensError::Parse {
            path: path.to_owned(),
            source,
        })?;
    let mut known = HashMap::with_capacity(entries.len());
    for entry in entries {
        let digest = digest(&entry.sha256).ok_or_else(|| TokensError::Digest {
            name: entry.name.clone(),
        })?;
        let roles: Result<_, _> = entry
            .roles
            .iter()
            .map(|role| role.parse::<Role>())
            .collect();
        let principal = Principal {
            roles: roles.map_err(|source| TokensError::Role {
                name: entry.name.clone(),
                source,
            })?,
            projects: entry
                .projects
                .map(|projects| projects.into_iter().collect()),
            name: entry.name,
        };
        known.insert(digest, principal);
    }
    Ok(known)
}

fn digest(hex: &str) -> Option<[u8; 32]> {
    if hex.len() != 64 || !hex.is_ascii() {
        return None;
    }
    let mut digest = [0; 32];
    for (index, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(digest)
}

/// Why there are no tokens.
#[derive(Debug, Error)]
pub enum TokensError {
    /// Not there, no permission.
    #[error("cannot read the tokens in {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Some other file.
    #[error("{path} is larger than 16 MiB; that is no file of tokens", path = path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Not of the form.
    #[error(
        r#"{path} is not [{{"name": "ci", "sha256": "...", "roles": ["operator"], "projects": ["p"]}}, ...]"#,
        path = path.display()
    )]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where.
        #[source]
        source: serde_json::Error,
    },
    /// No SHA-256.
    #[error("the sha256 of token {name} is not 64 hexadecimal digits; printf %s TOKEN | sha256sum")]
    Digest {
        /// Whose.
        name: String,
    },
    /// No such role.
    #[error("a role of token {name} is not known")]
    Role {
        /// Whose.
        name: String,
        /// Which.
        #[source]
        source: UnknownRole,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, token: &str, roles: &str) -> String {
        let digest = Sha256::digest(token.as_bytes());
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        format!(r#"{{"name": "{name}", "sha256": "{hex}", "roles": [{roles}]}}"#)
    }

    #[test]
    fn tokens_are_found_and_a_changed_file_counts() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens.json");
        fs::write(
            &file,
            format!("[{}]", entry("ci", "secret", r#""operator""#)),
        )
        .unwrap();
        let tokens = Tokens::open(&file).unwrap();
        let found = tokens.find("secret").unwrap();
        assert_eq!(
            (found.name.as_str(), found.has(Role::Operator)),
            ("ci", true)
        );
        assert_eq!(tokens.find("secre"), None);

        // Withdrawn: another one takes its place, by renaming as careful people do.
        let new = dir.path().join("new");
        fs::write(&new, format!("[{}]", entry("ci2", "other", r#""viewer""#))).unwrap();
        fs::rename(&new, &file).unwrap();
        tokens.state.lock().unwrap().looked = Instant::now() - LOOK_INTERVAL;
        assert_eq!(tokens.find("secret"), None);
        assert_eq!(tokens.find("other").unwrap().name, "ci2");

        // A file that is not understood takes nothing away.
        fs::write(&file, "[{").unwrap();
        tokens.state.lock().unwrap().looked = Instant::now() - LOOK_INTERVAL;
        assert_eq!(tokens.find("other").unwrap().name, "ci2");
    }

    #[test]
    fn what_is_wrong_in_the_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens.json");
        let refused = |text: String| {
            fs::write(&file, text).unwrap();
            let error = Tokens::open(&file).unwrap_err();
            crate::with_source(&error)
        };
        let role = refused(format!("[{}]", entry("ci", "s", r#""root""#)));
        assert!(
            role.contains("token ci") && role.contains("\"root\" is no role"),
            "{role}"
        );
        let digest = refused(r#"[{"name": "ci", "sha256": "ab", "roles": []}]"#.into());
        assert!(digest.contains("sha256sum"), "{digest}");
        let field = refused(r#"[{"name": "ci", "token": "ab", "roles": []}]"#.into());
        assert!(field.contains("token"), "{field}");
        assert!(Tokens::open(&dir.path().join("none")).is_err());
    }
}
