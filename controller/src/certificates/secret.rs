//! What authorities' keys are sealed with in the store: 32 random bytes in a file that its controller alone may
//! read. Every replica needs the same file.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom as _, SystemRandom};
use thiserror::Error;

const LEN: usize = 32;

/// See the module.
pub struct Secret {
    key: LessSafeKey,
    path: PathBuf,
}

impl Secret {
    /// That of a file.
    ///
    /// # Errors
    /// When it is not there, may be read by others, or holds something else.
    pub fn open(path: &Path) -> Result<Self, SecretError> {
        let failed = |source| SecretError::File {
            path: path.to_owned(),
            source,
        };
        let metadata = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(SecretError::Missing {
                    path: path.to_owned(),
                });
            }
            metadata => metadata.map_err(failed)?,
        };
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(SecretError::Open {
                path: path.to_owned(),
                mode,
            });
        }
        let text = fs::read_to_string(path).map_err(failed)?;
        let bytes = from_hex(text.trim()).ok_or_else(|| SecretError::Form {
            path: path.to_owned(),
        })?;
        let key = UnboundKey::new(&AES_256_GCM, &bytes).map_err(|_| SecretError::Form {
            path: path.to_owned(),
        })?;
        Ok(Self {
            key: LessSafeKey::new(key),
            path: path.to_owned(),
        })
    }

    /// The same, or a new one where there is no file.
    ///
    /// # Errors
    /// As [`Secret::open`], or when the file cannot be made.
    pub fn open_or_make(path: &Path) -> Result<Self, SecretError> {
        let failed = |source| SecretError::File {
            path: path.to_owned(),
            source,
        };
        let made = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path);
        match made {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(error)),
            Ok(mut file) => {
                writeln!(file, "{}", hex(&random::<LEN>()?)).map_err(failed)?;
                file.sync_all().map_err(failed)?;
            }
        }
        Self::open(path)
    }

    /// Seals something that is kept under a key of the store.
    ///
    /// # Errors
    /// When the system has no random numbers.
    pub(super) fn seal(&self, plain: &[u8], key: &str) -> Result<Vec<u8>, SecretError> {
        let nonce = random::<NONCE_LEN>()?;
        let mut sealed = plain.to_vec();
        let aad = Aad::from(key.as_bytes());
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), aad, &mut sealed)
            .map_err(|_| SecretError::Random)?;
        Ok([nonce.as_slice(), &sealed].concat())
    }

    /// What was sealed under that key.
    ///
    /// # Errors
    /// When another secret sealed it.
    pub(super) fn unseal(&self, sealed: &[u8], key: &str) -> Result<Vec<u8>, SecretError> {
        let other = || SecretError::Other {
            path: self.path.clone(),
        };
        let (nonce, sealed) = sealed.split_at_checked(NONCE_LEN).ok_or_else(other)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| other())?;
        let mut plain = sealed.to_vec();
        let aad = Aad::from(key.as_bytes());
        let opened = self.key.open_in_place(nonce, aad, &mut plain);
        Ok(opened.map_err(|_| other())?.to_vec())
    }
}

/// Random bytes.
///
/// # Errors
/// When the system has none.
pub(super) fn random<const N: usize>() -> Result<[u8; N], SecretError> {
    let mut bytes = [0; N];
    let filled = SystemRandom::new().fill(&mut bytes);
    filled.map_err(|_| SecretError::Random)?;
    Ok(bytes)
}

/// Lower-case.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<[u8; LEN]> {
    if text.len() != 2 * LEN || !text.is_ascii() {
        return None;
    }
    let mut bytes = [0; LEN];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

/// Why there is no secret.
#[derive(Debug, Error)]
pub enum SecretError {
    /// Made by another controller.
    #[error(
        "the installation's authority is sealed with a secret that is not in {path}: copy that file (ca-secret in the state directory) from a controller that has it, or name it with --ca-secret",
        path = path.display()
    )]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// Of another installation.
    #[error(
        "the secret in {path} is not the one that the installation's authority is sealed with: copy ca-secret from a controller that has it, or name it with --ca-secret",
        path = path.display()
    )]
    Other {
        /// Where this one is.
        path: PathBuf,
    },
    /// Others may read it.
    #[error("{path} has mode {mode:o}, so others may read it; chmod 600 it", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Something else.
    #[error("{path} does not hold 64 hexadecimal digits", path = path.display())]
    Form {
        /// The file.
        path: PathBuf,
    },
    /// No permission, no space.
    #[error("cannot use {path}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The kernel's.
    #[error("the system has no random numbers")]
    Random,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_secret_opens_what_it_sealed_and_only_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca-secret");
        assert!(matches!(
            Secret::open(&path),
            Err(SecretError::Missing { .. })
        ));
        let secret = Secret::open_or_make(&path).unwrap();
        let sealed = secret.seal(b"key", "authorities/1").unwrap();
        assert!(!sealed.windows(3).any(|part| part == b"key"));
        let again = Secret::open_or_make(&path).unwrap();
        assert_eq!(again.unseal(&sealed, "authorities/1").unwrap(), b"key");
        assert!(again.unseal(&sealed, "authorities/2").is_err());
        assert!(again.unseal(b"short", "authorities/1").is_err());
        let other = Secret::open_or_make(&dir.path().join("other")).unwrap();
        let error = other.unseal(&sealed, "authorities/1").unwrap_err();
        assert!(error.to_string().contains("--ca-secret"), "{error}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(
            Secret::open(&path),
            Err(SecretError::Open { mode: 0o640, .. })
        ));
    }
}
