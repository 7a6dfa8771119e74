//! Reads and judges a disk's [`Journal`], then goes on with it for as long as the guest lives.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use guest::journal::{Journal, entry};
use guest::oracle::BLOCK_LEN;
use guest::report::Report;

use crate::disk::{self, Aligned};

const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// Returns when something went wrong.
pub(crate) fn run(device: &str, seed: u64, bytes: u64) -> Report {
    let report = |journal: &Journal, life: u64, error: Option<String>| Report::Journal {
        device: device.to_owned(),
        life,
        verified: journal.verified,
        last: journal.last,
        error,
    };
    let (file, mut journal) = match open(device, seed, bytes) {
        Ok(opened) => opened,
        Err(error) => return report(&Journal::default(), 0, Some(error)),
    };
    let life = journal.lives + 1;
    if !journal.wrong.is_empty() {
        let error = journal.wrong.join("; ");
        return report(&journal, life, Some(error));
    }
    report(&journal, life, None).print();
    let blocks = bytes / BLOCK_LEN as u64;
    let mut buffer = Aligned::new(BLOCK_LEN);
    let mut reported = Instant::now();
    loop {
        let number = journal.last + 1;
        let block = entry(seed, blocks, life, number, &mut buffer);
        let written = file.write_all_at(&buffer, block * BLOCK_LEN as u64);
        if let Err(error) = written.and_then(|()| file.sync_data()) {
            return report(&journal, life, Some(format!("write {number}: {error}")));
        }
        journal.last = number;
        if reported.elapsed() >= REPORT_INTERVAL {
            report(&journal, life, None).print();
            reported = Instant::now();
        }
    }
}

fn open(device: &str, seed: u64, bytes: u64) -> Result<(File, Journal), String> {
    let file = disk::open_direct(device, bytes, true)?;
    let mut content = Aligned::new(usize::try_from(bytes).map_err(|error| error.to_string())?);
    let read = file.read_exact_at(&mut content, 0);
    read.map_err(|error| format!("cannot read {device}: {error}"))?;
    Ok((file, Journal::of_bytes(seed, &content)))
}
