//! Memory that data is read into and written from. The caller's may be a guest's, which is not
//! a Rust slice.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Where data that is read goes.
pub trait Sink {
    /// Bytes to be filled.
    fn len_bytes(&self) -> usize;
    /// Copies `data` to the bytes from `at` on.
    fn put(&mut self, at: usize, data: &[u8]);
    /// Fills bytes with zeroes.
    fn put_zeroes(&mut self, at: usize, len_bytes: usize);
    /// Reads from a file. Returns how much there was, which is less only at the file's end.
    ///
    /// # Errors
    /// The kernel's.
    fn read_from(
        &mut self,
        at: usize,
        len_bytes: usize,
        file: &File,
        offset_bytes: u64,
    ) -> io::Result<usize>;
}

/// What is to be written.
pub trait Source {
    /// Bytes there are.
    fn len_bytes(&self) -> usize;
    /// Copies the bytes from `at` on.
    fn get(&self, at: usize, into: &mut [u8]);
    /// Writes all `len_bytes` to a file.
    ///
    /// # Errors
    /// The kernel's.
    fn write_to(
        &self,
        at: usize,
        len_bytes: usize,
        file: &File,
        offset_bytes: u64,
    ) -> io::Result<()>;
}

impl Sink for &mut [u8] {
    fn len_bytes(&self) -> usize {
        self.len()
    }

    fn put(&mut self, at: usize, data: &[u8]) {
        self[at..at + data.len()].copy_from_slice(data);
    }

    fn put_zeroes(&mut self, at: usize, len_bytes: usize) {
        self[at..at + len_bytes].fill(0);
    }

    fn read_from(
        &mut self,
        at: usize,
        len_bytes: usize,
        file: &File,
        offset_bytes: u64,
    ) -> io::Result<usize> {
        let mut done = 0;
        while done < len_bytes {
            let into = &mut self[at + done..at + len_bytes];
            match file.read_at(into, offset_bytes + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if !done.is_multiple_of(512) {
                break;
            }
        }
        Ok(done)
    }
}

impl Source for &[u8] {
    fn len_bytes(&self) -> usize {
        self.len()
    }

    fn get(&self, at: usize, into: &mut [u8]) {
        into.copy_from_slice(&self[at..at + into.len()]);
    }

    fn write_to(
        &self,
        at: usize,
        len_bytes: usize,
        file: &File,
        offset_bytes: u64,
    ) -> io::Result<()> {
        file.write_all_at(&self[at..at + len_bytes], offset_bytes)
    }
}
