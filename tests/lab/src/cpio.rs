//! Writes "newc" cpio archives, the format of an initramfs.
//!
//! Format: Documentation/driver-api/early-userspace/buffer-format.rst in the Linux tree. Archives
//! may be concatenated; the kernel unpacks one after the other.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// An archive being written. Parent directories are added as they are needed.
pub(crate) struct Cpio<W: Write> {
    out: W,
    inode: u32,
    directories: BTreeSet<String>,
}

impl<W: Write> Cpio<W> {
    pub(crate) fn new(out: W) -> Self {
        Self {
            out,
            inode: 0,
            directories: BTreeSet::new(),
        }
    }

    /// Adds a directory and its parents; a second time it does nothing.
    pub(crate) fn directory(&mut self, path: &str) -> io::Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || self.directories.contains(path) {
            return Ok(());
        }
        self.parents(path)?;
        self.directories.insert(path.to_owned());
        self.header(path, DIRECTORY | 0o755, 0)
    }

    /// Adds a regular file with these contents.
    pub(crate) fn bytes(&mut self, path: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
        let path = path.trim_matches('/');
        self.parents(path)?;
        self.header(path, REGULAR | mode, len_u32(path, contents.len() as u64)?)?;
        self.out.write_all(contents)?;
        self.pad(contents.len() as u64)
    }

    /// Adds a copy of a file of the host, with its permissions.
    pub(crate) fn copy(&mut self, path: &str, from: &Path) -> io::Result<()> {
        let path = path.trim_matches('/');
        self.parents(path)?;
        let mut source = File::open(from)?;
        let metadata = source.metadata()?;
        let mode = metadata.permissions().mode() & 0o777;
        self.header(path, REGULAR | mode, len_u32(path, metadata.len())?)?;
        let copied = io::copy(&mut source, &mut self.out)?;
        if copied != metadata.len() {
            return Err(io::Error::other(format!(
                "{} changed while it was packed; run again when nothing writes to it",
                from.display()
            )));
        }
        self.pad(copied)
    }

    /// Adds a symbolic link.
    pub(crate) fn symlink(&mut self, path: &str, to: &str) -> io::Result<()> {
        let path = path.trim_matches('/');
        self.parents(path)?;
        self.header(path, SYMLINK | 0o777, len_u32(path, to.len() as u64)?)?;
        self.out.write_all(to.as_bytes())?;
        self.pad(to.len() as u64)
    }

    /// Ends the archive and gives the writer back.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.header("TRAILER!!!", 0, 0)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parents(&mut self, path: &str) -> io::Result<()> {
        match path.rsplit_once('/') {
            Some((parent, _)) => self.directory(parent),
            None => Ok(()),
        }
    }

    fn header(&mut self, name: &str, mode: u32, size_bytes: u32) -> io::Result<()> {
        self.inode += 1;
        let links = 1;
        let name_len = name.len() as u32 + 1;
        let fields = [
            self.inode, mode, 0, 0, links, 0, size_bytes, 0, 0, 0, 0, name_len, 0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        header.push_str(name);
        header.push('\0');
        self.out.write_all(header.as_bytes())?;
        self.pad(header.len() as u64)
    }

    fn pad(&mut self, written: u64) -> io::Result<()> {
        let missing = written.next_multiple_of(4) - written;
        self.out.write_all(&[0; 3][..missing as usize])
    }
}

/// The format's size fields have 32 bits.
fn len_u32(path: &str, len: u64) -> io::Result<u32> {
    u32::try_from(len)
        .map_err(|_| io::Error::other(format!("{path} is too large for an initramfs (4 GiB)")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads back (name, mode, contents) by the documented layout.
    fn entries(archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let field = |at: usize, index: usize| {
            let start = at + 6 + index * 8;
            let text = std::str::from_utf8(&archive[start..start + 8]).unwrap();
            u32::from_str_radix(text, 16).unwrap() as usize
        };
        let mut found = Vec::new();
        let mut at = 0;
        while at < archive.len() {
            assert_eq!(&archive[at..at + 6], b"070701", "magic at {at}");
            let (mode, size, name_len) = (field(at, 1), field(at, 6), field(at, 11));
            let name = String::from_utf8(archive[at + 110..at + 110 + name_len - 1].to_vec());
            let data = (at + 110 + name_len).next_multiple_of(4);
            let contents = archive[data..data + size].to_vec();
            found.push((name.unwrap(), mode as u32, contents));
            at = (data + size).next_multiple_of(4);
        }
        found
    }

    #[test]
    fn entries_read_back_with_parents_first() {
        let mut cpio = Cpio::new(Vec::new());
        cpio.bytes("/etc/conf/a", 0o644, b"hello").unwrap();
        cpio.bytes("etc/conf/b", 0o600, b"").unwrap();
        cpio.symlink("bin/sh", "busybox").unwrap();
        let found = entries(&cpio.finish().unwrap());
        let names: Vec<&str> = found.iter().map(|(name, _, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "etc",
                "etc/conf",
                "etc/conf/a",
                "etc/conf/b",
                "bin",
                "bin/sh",
                "TRAILER!!!"
            ]
        );
        assert_eq!(found[0].1, 0o040_755);
        assert_eq!(found[2].1, 0o100_644);
        assert_eq!(found[2].2, b"hello");
        assert_eq!(found[5], ("bin/sh".into(), 0o120_777, b"busybox".to_vec()));
    }

    #[test]
    fn a_host_file_keeps_its_mode() {
        let source = std::env::current_exe().unwrap();
        let mut cpio = Cpio::new(Vec::new());
        cpio.copy("init", &source).unwrap();
        let found = entries(&cpio.finish().unwrap());
        assert_eq!(found[0].1 & 0o111, 0o111 & found[0].1);
        assert_eq!(found[0].2.len() as u64, source.metadata().unwrap().len());
    }
}
