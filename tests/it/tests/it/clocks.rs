//! Who reads the wall clock, which may jump: whoever must tell people a time. Nothing on a guest's path to
//! its disks and networks waits, gives up or decides by it; those clocks go on evenly.

use std::fs;
use std::path::{Path, PathBuf};

/// What a guest depends on, and the tools that its parts are made of.
const ON_THE_WAY: &[&str] = &[
    "controller/lease",
    "controller/node-agent",
    "deploy/sandbox",
    "device-blk",
    "device-net",
    "proto/api",
    "proto/faults",
    "proto/vhost-user",
    "vmm-core",
];

/// Ways to the wall clock.
const WALL_CLOCKS: &[&str] = &[
    "SystemTime::now",
    "CLOCK_REALTIME",
    "Utc::now",
    "libc::time(",
];

/// Files that may, and what for.
const MAY: &[(&str, &str)] = &[
    ("device-net/src/guard.rs", "times of captured frames"),
    (
        "proto/api/src/fault_control.rs",
        "when a fault hit, for people",
    ),
    (
        "proto/vhost-user/src/frontend/link/outage.rs",
        "when an outage began, for people",
    ),
    (
        "controller/node-agent/src/faults/process.rs",
        "steps the clock on purpose",
    ),
    (
        "controller/node-agent/src/faults/experiment.rs",
        "when faults were armed, for people",
    ),
    (
        "controller/node-agent/src/vm/health.rs",
        "since when storage is waited for, for people",
    ),
    (
        "controller/node-agent/src/vm/mod.rs",
        "when a VM was started, for people",
    ),
    (
        "controller/node-agent/src/certificate.rs",
        "when a certificate ends, which is a date",
    ),
    (
        "controller/node-agent/src/import/uploads.rs",
        "age of files that somebody left",
    ),
];

#[test]
fn only_what_people_read_is_told_by_the_wall_clock() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut found = Vec::new();
    for part in ON_THE_WAY {
        let mut sources = Vec::new();
        collect(&root.join(part).join("src"), &mut sources);
        assert!(!sources.is_empty(), "{part} has sources");
        for source in sources {
            let text = fs::read_to_string(&source).expect("a source is read");
            // Unit tests come last.
            let code = text
                .split("#[cfg(test)]\nmod tests {")
                .next()
                .unwrap_or_default();
            if WALL_CLOCKS.iter().any(|clock| code.contains(clock)) {
                let name = source.strip_prefix(&root).expect("it is below");
                found.push(name.display().to_string());
            }
        }
    }
    let may = |name: &str| MAY.iter().any(|(known, _)| *known == name);
    found.retain(|name| !may(name));
    assert_eq!(
        found,
        Vec::<String>::new(),
        "it reads a clock that may jump: what for?"
    );
}

fn collect(dir: &Path, sources: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(dir).expect("a directory of sources");
    for path in entries.map(|entry| entry.expect("an entry").path()) {
        let is_test = path
            .file_name()
            .is_some_and(|name| name == "tests" || name == "tests.rs");
        if is_test {
            continue;
        }
        if path.is_dir() {
            collect(&path, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push(path);
        }
    }
}
