//! What a process takes, from /proc.

use std::fs;

/// Guest RAM is a memfd of this name in `vmm-core`, and is mapped from it by the daemons.
const GUEST_RAM: &str = "memfd:mortise-ram";

/// Resident and proportional set of one process, guest RAM not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Resident.
    pub(crate) rss_kib: u64,
    /// Resident, shared pages divided by their users.
    pub(crate) pss_kib: u64,
}

/// Reads /proc/PID/smaps; zero for a process that is gone.
pub(crate) fn of(pid: i32) -> Usage {
    fs::read_to_string(format!("/proc/{pid}/smaps"))
        .map(|smaps| parse_smaps(&smaps))
        .unwrap_or_default()
}

fn parse_smaps(smaps: &str) -> Usage {
    let mut usage = Usage::default();
    let mut counted = true;
    for line in smaps.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        // A mapping's first line starts with its address range; all others with a key.
        if key.contains('-') && !key.contains(|c: char| c.is_ascii_uppercase()) {
            counted = !line.contains(GUEST_RAM);
        } else if counted {
            let kib = || {
                value
                    .trim()
                    .strip_suffix(" kB")
                    .and_then(|kib| kib.parse().ok())
                    .unwrap_or(0)
            };
            match key {
                "Rss" => usage.rss_kib += kib(),
                "Pss" => usage.pss_kib += kib(),
                _ => {}
            }
        }
    }
    usage
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_not_counted() {
        let smaps = "\
55d0c0a00000-55d0c0b00000 r-xp 00000000 08:01 42   /usr/bin/vmm-core
Rss:                 100 kB
Pss:                  60 kB
Pss_Dirty:             5 kB
7f0000000000-7f0020000000 rw-s 00000000 00:01 77   /memfd:mortise-ram (deleted)
Rss:              300000 kB
Pss:              200000 kB
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0    [stack]
Rss:                  20 kB
Pss:                  20 kB
";
        assert_eq!(
            parse_smaps(smaps),
            Usage {
                rss_kib: 120,
                pss_kib: 80
            }
        );
    }

    #[test]
    fn own_process_takes_something() {
        let usage = of(std::process::id() as i32);
        assert!(
            usage.rss_kib >= usage.pss_kib && usage.pss_kib > 0,
            "{usage:?}"
        );
    }
}
