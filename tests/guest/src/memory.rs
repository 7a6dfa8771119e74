//! Is the memory there?

use guest::report::Report;

/// Memory that the kernel may use has to reach `mib`.
pub(crate) fn check(mib: u64) -> Report {
    match total_mib() {
        Ok(total) if total < mib => Report::Memory {
            mib: total,
            error: Some(format!("{total} MiB of memory, not {mib}")),
        },
        Ok(total) => Report::Memory {
            mib: total,
            error: None,
        },
        Err(error) => Report::Memory {
            mib: 0,
            error: Some(error),
        },
    }
}

/// MemTotal of proc_meminfo(5).
fn total_mib() -> Result<u64, String> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").map_err(|error| error.to_string())?;
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .map(|kib| kib / 1024)
        .ok_or_else(|| "/proc/meminfo has no MemTotal".into())
}
