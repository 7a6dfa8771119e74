//! The files that the headers of a chain name, opened before the process gives up the file
//! system.
//!
//! Only for the command line, whose user vouches for the images: a name in a header is a path
//! that whoever made the image chose. Managers pass descriptors instead.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ::qcow2::{BackingRef, Error, Format, Header, MAX_LAYERS};

use super::ImageError;
use super::qcow2::Backing;
use super::raw::open_file;

/// Opens what `top` is based on, nearest first.
///
/// # Errors
/// A header is broken, names something that is no local file or leaves its format to guessing;
/// a file cannot be opened; the chain runs in a circle.
pub(crate) fn follow(top: &File, path: &Path) -> Result<Vec<Backing>, ImageError> {
    let mut chain: Vec<Backing> = Vec::new();
    let mut above = path.to_owned();
    let mut seen = vec![identity(top, path)?];
    let mut backing = backing_of(top, path)?;
    while let Some(reference) = backing {
        let refused = |what: String| {
            Err(ImageError::Format {
                name: above.display().to_string(),
                source: Error::Invalid(what),
            })
        };
        if chain.len() + 1 >= MAX_LAYERS {
            return refused(format!("its chain has more than {MAX_LAYERS} images"));
        }
        let format = match reference.format.as_deref() {
            Some("raw") => Format::Raw,
            Some("qcow2") => Format::Qcow2,
            Some(other) => {
                return refused(format!(
                    "its backing image {:?} is in the {other} format; convert it to raw or qcow2",
                    reference.name
                ));
            }
            None => {
                return refused(format!(
                    "it does not say in which format its backing image {:?} is, and guessing is \
                     not safe; say it with backing=PATH:FORMAT or `qemu-img rebase -u -F FORMAT`",
                    reference.name
                ));
            }
        };
        let Some(path) = resolve(&reference.name, &above) else {
            return refused(format!(
                "its backing image {:?} is no local file; name the file with backing=PATH:FORMAT",
                reference.name
            ));
        };
        let file = open_file(&path, true)?;
        let identity = identity(&file, &path)?;
        if seen.contains(&identity) {
            return refused(format!(
                "its chain of backing images comes back to {}",
                path.display()
            ));
        }
        seen.push(identity);
        backing = match format {
            Format::Raw => None,
            Format::Qcow2 => backing_of(&file, &path)?,
        };
        chain.push(Backing {
            file,
            format,
            name: path.display().to_string(),
        });
        above = path;
    }
    Ok(chain)
}

fn backing_of(file: &File, path: &Path) -> Result<Option<BackingRef>, ImageError> {
    let header = Header::read(file).map_err(|source| ImageError::Format {
        name: path.display().to_string(),
        source,
    })?;
    Ok(header.backing().cloned())
}

/// Relative names are relative to the image that has them. `None` for what is not a path to
/// QEMU: a protocol, or options in JSON.
fn resolve(name: &str, above: &Path) -> Option<PathBuf> {
    let name = match name.strip_prefix("file:") {
        Some(rest) => rest,
        None => {
            let protocol = name
                .split('/')
                .next()
                .is_some_and(|first| first.contains(':'));
            if protocol {
                return None;
            }
            name
        }
    };
    let dir = above.parent().unwrap_or(Path::new(""));
    Some(dir.join(name))
}

/// Device and inode.
fn identity(file: &File, path: &Path) -> Result<(u64, u64), ImageError> {
    let meta = file.metadata().map_err(|source| ImageError::Io {
        name: path.display().to_string(),
        action: "be inspected",
        source,
    })?;
    Ok((meta.dev(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use ::qcow2::CreateOptions;

    use super::*;

    fn overlay(path: &Path, name: &str, format: &str) -> File {
        let options = &mut File::options();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .unwrap();
        let create = CreateOptions {
            capacity_bytes: 1 << 20,
            backing: Some(BackingRef {
                name: name.into(),
                format: Some(format.into()),
            }),
            ..CreateOptions::default()
        };
        ::qcow2::create(&file, &create).unwrap();
        file
    }

    #[test]
    fn names_are_followed_from_where_they_stand() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("bases");
        std::fs::create_dir(&base).unwrap();
        std::fs::write(base.join("raw.img"), [0; 4096]).unwrap();
        overlay(&base.join("mid.qcow2"), "raw.img", "raw");
        let path = dir.path().join("top.qcow2");
        let top = overlay(&path, "bases/mid.qcow2", "qcow2");
        let chain = follow(&top, &path).unwrap();
        let names: Vec<_> = chain.iter().map(|image| image.name.as_str()).collect();
        assert_eq!(names.len(), 2);
        assert!(names[0].ends_with("bases/mid.qcow2") && names[1].ends_with("bases/raw.img"));
        assert_eq!(chain[1].format, Format::Raw);
    }

    #[test]
    fn circles_and_protocols_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let top = overlay(&a, "b", "qcow2");
        overlay(&b, "a", "qcow2");
        let error = follow(&top, &a).unwrap_err();
        assert!(matches!(error, ImageError::Format { .. }), "{error}");
        for name in ["nbd:localhost:1", "json:{}", "https://x/y"] {
            let top = overlay(&a, name, "raw");
            let error = follow(&top, &a).unwrap_err();
            assert!(matches!(error, ImageError::Format { .. }), "{error}");
        }
    }
}
