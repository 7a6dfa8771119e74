//! What was written and not flushed, kept in memory so that it can be forgotten: a page cache that
//! a machine loses when it loses its power.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// What is written back, or lost, as a whole.
const PAGE_LEN: usize = 4096;

/// The pages of one file, by their numbers.
#[derive(Debug, Default)]
pub(crate) struct Unflushed(BTreeMap<u64, Vec<u8>>);

impl Unflushed {
    /// The file's length is changed at once, as file systems with journals may.
    pub(crate) fn write(&mut self, file: &File, offset_bytes: u64, data: &[u8]) -> io::Result<()> {
        let end = offset_bytes + data.len() as u64;
        if end > file.metadata()?.len() {
            file.set_len(end)?;
        }
        for (number, within, piece) in pieces(offset_bytes, data.len()) {
            let page = match self.0.entry(number) {
                std::collections::btree_map::Entry::Occupied(page) => page.into_mut(),
                std::collections::btree_map::Entry::Vacant(place) => {
                    place.insert(page_underneath(file, number)?)
                }
            };
            page[within.clone()].copy_from_slice(&data[piece]);
        }
        Ok(())
    }

    /// Puts over `data`, which was read underneath, what is newer.
    pub(crate) fn overlay(&self, offset_bytes: u64, data: &mut [u8]) {
        for (number, within, piece) in pieces(offset_bytes, data.len()) {
            if let Some(page) = self.0.get(&number) {
                data[piece].copy_from_slice(&page[within]);
            }
        }
    }

    /// Writes pages back that `choose` takes and drops the others; returns how many were dropped.
    pub(crate) fn write_back(
        &mut self,
        file: &File,
        mut choose: impl FnMut() -> bool,
    ) -> io::Result<u64> {
        let len = file.metadata()?.len();
        let mut dropped = 0;
        for (number, page) in std::mem::take(&mut self.0) {
            if !choose() {
                dropped += 1;
                continue;
            }
            let offset = number * PAGE_LEN as u64;
            let inside = PAGE_LEN.min(len.saturating_sub(offset) as usize);
            file.write_all_at(&page[..inside], offset)?;
        }
        Ok(dropped)
    }
}

fn page_underneath(file: &File, number: u64) -> io::Result<Vec<u8>> {
    let mut page = vec![0; PAGE_LEN];
    let mut filled = 0;
    while filled < PAGE_LEN {
        match file.read_at(
            &mut page[filled..],
            number * PAGE_LEN as u64 + filled as u64,
        )? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(page)
}

/// Number of each page that is touched, where in it, and where in the data.
fn pieces(
    offset_bytes: u64,
    len: usize,
) -> impl Iterator<Item = (u64, std::ops::Range<usize>, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset_bytes + done as u64;
        let within = (at % PAGE_LEN as u64) as usize;
        let count = (PAGE_LEN - within).min(len - done);
        let piece = done..done + count;
        done += count;
        Some((at / PAGE_LEN as u64, within..within + count, piece))
    })
}
