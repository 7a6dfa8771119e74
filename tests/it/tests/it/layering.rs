//! Who may know whom: the workspace's dependency edges are the ones ARCHITECTURE.md draws.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Every edge between two crates of the workspace, tests' own dependencies left out.
const ALLOWED: &[(&str, &[&str])] = &[
    ("faults", &[]),
    ("telemetry", &[]),
    ("api", &["faults"]),
    ("vhost-user", &["faults"]),
    ("sandbox", &[]),
    ("vmm-core", &["api", "faults", "sandbox", "vhost-user"]),
    (
        "device-blk",
        &[
            "api",
            "faults",
            "luks",
            "nbd",
            "qcow2",
            "request",
            "sandbox",
            "vhost-user",
        ],
    ),
    ("luks", &[]),
    ("nbd", &[]),
    ("qcow2", &[]),
    ("request", &[]),
    ("bench", &[]),
    ("failover", &["api", "etcd", "guest", "nbd"]),
    ("etcd", &[]),
    ("faultfs", &[]),
    ("fleet", &["api", "etcd"]),
    ("recovery", &["api", "guest"]),
    (
        "device-net",
        &["api", "faults", "filter", "sandbox", "vhost-user"],
    ),
    ("filter", &[]),
    ("lease", &[]),
    ("pki", &[]),
    ("store", &[]),
    ("gate", &["api", "store", "telemetry"]),
    (
        "controller",
        &["api", "gate", "lease", "pki", "store", "telemetry"],
    ),
    (
        "node-agent",
        &[
            "api",
            "lease",
            "luks",
            "pki",
            "qcow2",
            "sandbox",
            "telemetry",
        ],
    ),
    ("vmctl", &["api", "pki"]),
    ("guest", &[]),
    ("fuzz", &["filter", "qcow2", "request", "vhost-user"]),
    ("lab", &["bench", "guest"]),
    ("it", &[]),
];

/// Crates that must stay out of the process that runs vCPUs, and why.
const NEVER_IN_VMM_CORE: &[(&str, &str)] = &[
    ("io-uring", "vmm-core does no block I/O"),
    ("qcow2", "vmm-core knows no image format"),
    ("rtnetlink", "vmm-core knows no tap"),
    ("redb", "vmm-core knows no store"),
    ("device-blk", "devices are other processes"),
    ("device-net", "devices are other processes"),
    ("controller", "vmm-core knows no controller"),
    ("node-agent", "vmm-core knows no agent"),
];

fn metadata(args: &[&str]) -> Value {
    let output = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()))
        .args(["metadata", "--format-version", "1", "--offline"])
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo metadata runs");
    assert!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON")
}

fn normal_dependencies(package: &Value) -> BTreeSet<String> {
    let dependencies = package["dependencies"]
        .as_array()
        .expect("a list of dependencies");
    dependencies
        .iter()
        .filter(|dependency| dependency["kind"].is_null())
        .map(|dependency| dependency["name"].as_str().expect("a name").to_owned())
        .collect()
}

#[test]
fn crates_know_only_whom_the_architecture_allows() {
    let metadata = metadata(&["--no-deps"]);
    let packages = metadata["packages"].as_array().expect("a list of packages");
    let allowed: BTreeMap<&str, BTreeSet<&str>> = ALLOWED
        .iter()
        .map(|(name, may_know)| (*name, may_know.iter().copied().collect()))
        .collect();
    let members: BTreeSet<&str> = packages
        .iter()
        .map(|package| package["name"].as_str().expect("a name"))
        .collect();
    assert_eq!(
        members,
        allowed.keys().copied().collect(),
        "every crate has its line in ALLOWED"
    );
    for package in packages {
        let name = package["name"].as_str().expect("a name");
        for dependency in normal_dependencies(package) {
            if members.contains(dependency.as_str()) {
                assert!(
                    allowed[name].contains(dependency.as_str()),
                    "{name} must not know {dependency}"
                );
            }
        }
    }
}

#[test]
fn vmm_core_links_no_disk_packet_store_or_controller_code() {
    let metadata = metadata(&["--filter-platform", "x86_64-unknown-linux-gnu"]);
    let nodes = metadata["resolve"]["nodes"]
        .as_array()
        .expect("a resolved graph");
    let by_id: BTreeMap<&str, &Value> = nodes
        .iter()
        .map(|node| (node["id"].as_str().expect("an id"), node))
        .collect();
    let names: BTreeMap<&str, &str> = metadata["packages"]
        .as_array()
        .expect("a list of packages")
        .iter()
        .map(|package| {
            (
                package["id"].as_str().expect("an id"),
                package["name"].as_str().expect("a name"),
            )
        })
        .collect();
    let root = *names
        .iter()
        .find(|(_, name)| **name == "vmm-core")
        .expect("vmm-core is a member")
        .0;

    let mut linked = BTreeSet::new();
    let mut todo = vec![root];
    while let Some(id) = todo.pop() {
        if !linked.insert(id) {
            continue;
        }
        for dependency in by_id[id]["deps"].as_array().expect("dependencies") {
            let kinds = dependency["dep_kinds"].as_array().expect("kinds");
            if kinds.iter().any(|kind| kind["kind"].is_null()) {
                todo.push(dependency["pkg"].as_str().expect("an id"));
            }
        }
    }
    let linked: BTreeSet<&str> = linked.into_iter().map(|id| names[id]).collect();
    assert!(
        linked.contains("kvm-ioctls"),
        "the walk reached vmm-core's dependencies"
    );
    for (never, why) in NEVER_IN_VMM_CORE {
        assert!(!linked.contains(never), "vmm-core links {never}: {why}");
    }
}

#[test]
fn architecture_names_files_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let text = std::fs::read_to_string(root.join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let paths: Vec<&str> = text
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|quoted| quoted.contains("/src/") || quoted.ends_with(".rs"))
        .collect();
    assert!(paths.len() > 20, "the code map names files: {paths:?}");
    for path in paths {
        assert!(root.join(path).exists(), "ARCHITECTURE.md names {path}");
    }
}
