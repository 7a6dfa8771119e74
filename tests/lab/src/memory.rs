//! What a process keeps in memory, guest RAM not counted.

use std::fs;

use anyhow::{Context, Result};

/// Resident and proportional set of a process in KiB, without memfds, of which guest RAM is one.
///
/// # Errors
/// When there is no such process.
pub(crate) fn sets_kib(pid: u32) -> Result<(u64, u64)> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))
        .with_context(|| format!("there is no process {pid}"))?;
    Ok(without_memfds(&smaps))
}

fn without_memfds(smaps: &str) -> (u64, u64) {
    let (mut rss, mut pss, mut counted) = (0, 0, true);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (first, second) = (
            words.next().unwrap_or_default(),
            words.next().unwrap_or_default(),
        );
        match first {
            "Rss:" if counted => rss += second.parse::<u64>().unwrap_or(0),
            "Pss:" if counted => pss += second.parse::<u64>().unwrap_or(0),
            _ if !first.ends_with(':') => counted = !line.contains("/memfd:"),
            _ => {}
        }
    }
    (rss, pss)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_not_counted() {
        let smaps = "00400000-00500000 r-xp 00000000 00:01 5 /usr/bin/vmm-core\n\
            Rss:                 100 kB\nPss:                  60 kB\nPss_Dirty: 9 kB\n\
            7f0000000000-7f0010000000 rw-s 00000000 00:01 9 /memfd:guest (deleted)\n\
            Rss:              200000 kB\nPss:              100000 kB\n\
            7f0010000000-7f0010001000 rw-p 00000000 00:00 0\n\
            Rss:                   4 kB\nPss:                   4 kB\n";
        assert_eq!(without_memfds(smaps), (104, 64));
    }
}
