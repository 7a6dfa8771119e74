//! Which files a foreign disk consists of. The disks' descriptors are read here only to find the
//! files beside them; the host's converter reads them for what they are.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail};

use super::{Foreign, Part, head};
use crate::cli::volume::ForeignFormat;

/// Descriptors of VMDKs are a few KiB.
const MAX_DESCRIPTOR_BYTES: u64 = 1 << 20;
/// What tells formats apart is in here.
const HEAD_BYTES: usize = 1024;
const PARALLELS_DESCRIPTOR: &str = "DiskDescriptor.xml";

/// The format and the files of the disk at `path`.
pub(super) fn find(path: &Path, format: ForeignFormat) -> anyhow::Result<Foreign> {
    let shown = path.display();
    let metadata =
        fs::metadata(path).with_context(|| format!("cannot open {shown}; correct the path"))?;
    if metadata.is_dir() {
        if !matches!(format, ForeignFormat::Auto | ForeignFormat::Parallels) {
            bail!("{shown} is a folder; only Parallels' disks are folders");
        }
        return parallels_folder(path);
    }
    let head = head(path, HEAD_BYTES).with_context(|| format!("cannot read {shown}"))?;
    let is_descriptor = is_vmdk_descriptor(&head);
    let format = match format {
        ForeignFormat::Auto => recognise(path, &head, metadata.len())?,
        ForeignFormat::Vmdk => "vmdk",
        ForeignFormat::Vhd => "vpc",
        ForeignFormat::Vhdx => "vhdx",
        ForeignFormat::Vdi => "vdi",
        ForeignFormat::Parallels => "parallels",
        ForeignFormat::Qcow2 => "qcow2",
        ForeignFormat::Raw => "raw",
    };
    let mut parts = vec![Part {
        name: plain_name(path, is_descriptor)?,
        path: path.to_owned(),
    }];
    if format == "vmdk" && is_descriptor {
        parts.extend(vmdk_extents(path, metadata.len())?);
    }
    Ok(Foreign { format, parts })
}

fn recognise(path: &Path, head: &[u8], len_bytes: u64) -> anyhow::Result<&'static str> {
    let begins = |magic: &[u8]| head.starts_with(magic);
    if is_vmdk_descriptor(head) || begins(b"KDMV") || begins(b"COWD") {
        return Ok("vmdk");
    }
    if begins(b"conectix") {
        return Ok("vpc");
    }
    if begins(b"vhdxfile") {
        return Ok("vhdx");
    }
    if begins(b"QFI\xfb") {
        return Ok("qcow2");
    }
    if begins(b"WithoutFreeSpace") || begins(b"WithouFreSpacExt") {
        return Ok("parallels");
    }
    if head.get(0x40..0x44) == Some(&[0x7f, 0x10, 0xda, 0xbe]) {
        return Ok("vdi");
    }
    // A fixed VHD is the disk's bytes and a footer.
    if footer(path, len_bytes).is_ok_and(|footer| footer.starts_with(b"conectix")) {
        return Ok("vpc");
    }
    let extension = path.extension().and_then(|extension| extension.to_str());
    match extension.map(str::to_ascii_lowercase).as_deref() {
        Some("raw" | "img" | "iso" | "dd") => Ok("raw"),
        Some("vmdk") => bail!(
            "{} holds a disk's bytes only; name its descriptor, the small .vmdk file beside it",
            path.display()
        ),
        _ => bail!(
            "cannot tell what {} is; name its format, such as --format raw",
            path.display()
        ),
    }
}

fn footer(path: &Path, len_bytes: u64) -> std::io::Result<Vec<u8>> {
    use std::os::unix::fs::FileExt as _;
    const FOOTER_BYTES: u64 = 512;
    let mut bytes = vec![0; FOOTER_BYTES as usize];
    let at = len_bytes.saturating_sub(FOOTER_BYTES);
    fs::File::open(path)?.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

fn is_vmdk_descriptor(head: &[u8]) -> bool {
    head.starts_with(b"# Disk DescriptorFile")
}

/// Its own name if the host takes that and others refer to it, else one that the host takes.
fn plain_name(path: &Path, referred_to: bool) -> anyhow::Result<String> {
    let name = path.file_name().and_then(|name| name.to_str());
    let fits = |name: &&str| {
        !name.starts_with(['.', '-'])
            && !name.contains([',', ':', '\\'])
            && !name.contains(|c: char| c.is_control())
    };
    match name.filter(fits) {
        Some(name) => Ok(name.to_owned()),
        None if referred_to => bail!(
            "{} has a name that cannot be used; rename it",
            path.display()
        ),
        None => Ok("image".to_owned()),
    }
}

/// The files that a VMDK's descriptor names, which lie beside it.
fn vmdk_extents(descriptor: &Path, len_bytes: u64) -> anyhow::Result<Vec<Part>> {
    let shown = descriptor.display();
    if len_bytes > MAX_DESCRIPTOR_BYTES {
        bail!("{shown} is too long for a descriptor");
    }
    let bytes = fs::read(descriptor).with_context(|| format!("cannot read {shown}"))?;
    let text = String::from_utf8_lossy(&bytes);
    let dir = descriptor.parent().unwrap_or(Path::new("."));
    let mut parts: Vec<Part> = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(parent) = line.strip_prefix("parentCID=")
            && !parent.trim().eq_ignore_ascii_case("ffffffff")
        {
            bail!(
                "{shown} is a snapshot's difference from another disk; delete the snapshot or clone the disk in the hypervisor first"
            );
        }
        let Some(name) = extent_name(line) else {
            continue;
        };
        if name.contains(['/', '\\']) {
            bail!("{shown} names {name:?} elsewhere; put all files of the disk into one folder");
        }
        if parts.iter().any(|part| part.name == name) {
            continue;
        }
        let path = dir.join(name);
        if !path.is_file() {
            bail!("{shown} needs {name:?}, which is not beside it; copy it there");
        }
        parts.push(Part {
            name: name.to_owned(),
            path,
        });
    }
    Ok(parts)
}

/// Of `RW 4192256 SPARSE "disk-s001.vmdk"`.
fn extent_name(line: &str) -> Option<&str> {
    let access = line.split_whitespace().next()?;
    if !matches!(access, "RW" | "RDONLY" | "NOACCESS") {
        return None;
    }
    let (_, rest) = line.split_once('"')?;
    let (name, _) = rest.split_once('"')?;
    (!name.is_empty()).then_some(name)
}

/// A Parallels disk without snapshots: its descriptor names one image.
fn parallels_folder(dir: &Path) -> anyhow::Result<Foreign> {
    let shown = dir.display();
    let descriptor = dir.join(PARALLELS_DESCRIPTOR);
    let text = fs::read_to_string(&descriptor).with_context(|| {
        format!("{shown} is no Parallels disk: cannot read {PARALLELS_DESCRIPTOR}")
    })?;
    let images: Vec<&str> = elements(&text, "Image").collect();
    let image = match images.as_slice() {
        [image] => *image,
        [] => bail!("{shown}: {PARALLELS_DESCRIPTOR} names no image"),
        more => bail!(
            "{shown} has {} images: delete its snapshots in Parallels, or merge its parts (prl_disk_tool merge), first",
            more.len()
        ),
    };
    let file = elements(image, "File").next().unwrap_or_default().trim();
    let kind = elements(image, "Type").next().unwrap_or_default().trim();
    if file.is_empty() || file.contains(['/', '\\']) {
        bail!("{shown}: {PARALLELS_DESCRIPTOR} names {file:?}, which is not in the folder");
    }
    let path = dir.join(file);
    if !path.is_file() {
        bail!("{shown} needs {file:?}, which is not in it; copy it there");
    }
    let format = match kind {
        "Plain" => "raw",
        _ => "parallels",
    };
    let part = Part {
        name: plain_name(&path, false)?,
        path,
    };
    Ok(Foreign {
        format,
        parts: vec![part],
    })
}

/// The contents of all elements of a name; none lies in another of the same name.
fn elements<'a>(text: &'a str, name: &'a str) -> impl Iterator<Item = &'a str> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let mut rest = text;
    std::iter::from_fn(move || {
        let (_, after) = rest.split_once(open.as_str())?;
        let (content, after) = after.split_once(close.as_str())?;
        rest = after;
        Some(content)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(dir: &Path, name: &str, bytes: &[u8]) -> std::path::PathBuf {
        let path = dir.join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn formats_are_known_by_their_first_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let mut vdi = vec![0; 1024];
        vdi[0x40..0x44].copy_from_slice(&0xbeda_107f_u32.to_le_bytes());
        let mut fixed = vec![0; 4096];
        fixed[4096 - 512..][..8].copy_from_slice(b"conectix");
        for (bytes, format) in [
            (b"KDMV".as_slice(), "vmdk"),
            (b"conectix", "vpc"),
            (b"vhdxfile", "vhdx"),
            (b"QFI\xfb", "qcow2"),
            (b"WithoutFreeSpace", "parallels"),
            (&vdi, "vdi"),
            (&fixed, "vpc"),
        ] {
            let path = file(dir.path(), "disk", bytes);
            let found = find(&path, ForeignFormat::Auto).unwrap();
            assert_eq!(found.format, format);
        }
        let unknown = file(dir.path(), "disk", &[0; 4096]);
        let error = find(&unknown, ForeignFormat::Auto).unwrap_err().to_string();
        assert!(error.contains("--format raw"), "{error}");
        let raw = file(dir.path(), "disk.img", &[0; 4096]);
        assert_eq!(find(&raw, ForeignFormat::Auto).unwrap().format, "raw");
    }

    #[test]
    fn vmdk_descriptor_brings_its_extents() {
        let dir = tempfile::tempdir().unwrap();
        let text = "# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\n\
                    RW 8192 SPARSE \"a-s001.vmdk\"\nRW 8192 ZERO\nRW 64 FLAT \"a-f.vmdk\" 0\n";
        let path = file(dir.path(), "a.vmdk", text.as_bytes());
        file(dir.path(), "a-s001.vmdk", b"x");
        let error = find(&path, ForeignFormat::Auto).unwrap_err().to_string();
        assert!(error.contains("a-f.vmdk"), "{error}");
        file(dir.path(), "a-f.vmdk", b"x");
        let found = find(&path, ForeignFormat::Auto).unwrap();
        let names: Vec<&str> = found.parts.iter().map(|part| part.name.as_str()).collect();
        assert_eq!(names, ["a.vmdk", "a-s001.vmdk", "a-f.vmdk"]);
    }

    #[test]
    fn references_out_of_the_folder_and_snapshots_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (line, word) in [
            ("RW 1 FLAT \"/etc/passwd\" 0", "/etc/passwd"),
            ("RW 1 FLAT \"../x\" 0", "../x"),
            ("parentCID=12345678", "snapshot"),
        ] {
            let text = format!("# Disk DescriptorFile\n{line}\n");
            let path = file(dir.path(), "a.vmdk", text.as_bytes());
            let error = find(&path, ForeignFormat::Vmdk).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn parallels_folder_has_one_image() {
        let dir = tempfile::tempdir().unwrap();
        let image = |kind: &str| {
            format!("<Image><GUID>{{1}}</GUID><Type>{kind}</Type><File>root.hds</File></Image>")
        };
        file(dir.path(), "root.hds", b"x");
        for (kind, format) in [("Compressed", "parallels"), ("Plain", "raw")] {
            file(dir.path(), PARALLELS_DESCRIPTOR, image(kind).as_bytes());
            let found = find(dir.path(), ForeignFormat::Auto).unwrap();
            assert_eq!(
                (found.format, found.parts[0].name.as_str()),
                (format, "root.hds")
            );
        }
        let two = image("Compressed").repeat(2);
        file(dir.path(), PARALLELS_DESCRIPTOR, two.as_bytes());
        let error = find(dir.path(), ForeignFormat::Auto)
            .unwrap_err()
            .to_string();
        assert!(error.contains("snapshots"), "{error}");
    }
}
