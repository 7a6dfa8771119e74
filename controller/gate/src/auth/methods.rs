//! Which role each method of the API needs. A method that is not in the table is refused to everybody;
//! a test compares the table with the compiled-in descriptors.

use std::collections::HashMap;
use std::sync::LazyLock;

use super::Role;

/// What a method needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Nothing: it looks at the caller's credentials itself.
    Open,
    /// One of these.
    AnyOf(&'static [Role]),
}

const VIEWER: Need = Need::AnyOf(&[Role::Viewer]);
const OPERATOR: Need = Need::AnyOf(&[Role::Operator]);
const ADMIN: Need = Need::AnyOf(&[Role::Admin]);
const FAULT_INJECTOR: Need = Need::AnyOf(&[Role::FaultInjector]);
/// Whoever may break things or mend them may end what is broken on purpose.
const ENDS_FAULTS: Need = Need::AnyOf(&[Role::FaultInjector, Role::Operator]);

/// By service of `mortise.controller.v1`.
const METHODS: &[(&str, &[(&str, Need)])] = &[
    (
        "AuditLog",
        &[("ListAuditEntries", ADMIN), ("WatchAuditEntries", ADMIN)],
    ),
    (
        "Certificates",
        &[
            ("ListAuthorities", VIEWER),
            ("RotateAuthority", ADMIN),
            ("DeleteAuthority", ADMIN),
            ("IssueUserCertificate", ADMIN),
            ("CreateHostToken", ADMIN),
            ("ListHostTokens", ADMIN),
            ("DeleteHostToken", ADMIN),
            // By a token.
            ("JoinHost", Need::Open),
            // By the host's certificate.
            ("RenewHostCertificate", Need::Open),
        ],
    ),
    ("DeviceUpgrades", &[("UpgradeDevices", OPERATOR)]),
    (
        "Devices",
        &[
            ("GetDevice", VIEWER),
            ("ListDevices", VIEWER),
            ("UpdateDevice", OPERATOR),
        ],
    ),
    (
        "Disks",
        &[
            ("GetDisk", VIEWER),
            ("ListDisks", VIEWER),
            ("UpdateDisk", OPERATOR),
            ("SnapshotDisk", OPERATOR),
            ("CommitDisk", OPERATOR),
            ("MirrorDisk", OPERATOR),
            ("CompleteMirror", OPERATOR),
            ("BackupDisk", OPERATOR),
        ],
    ),
    ("Events", &[("ListEvents", VIEWER), ("WatchEvents", VIEWER)]),
    (
        "FaultExperiments",
        &[
            ("CreateFaultExperiment", FAULT_INJECTOR),
            ("GetFaultExperiment", VIEWER),
            ("ListFaultExperiments", VIEWER),
            ("StopFaultExperiment", ENDS_FAULTS),
            ("DeleteFaultExperiment", FAULT_INJECTOR),
            ("GetFaultReport", VIEWER),
            ("GetFaultSwitch", VIEWER),
            ("SetFaultSwitch", FAULT_INJECTOR),
        ],
    ),
    ("HostUpgrades", &[("UpgradeHosts", ADMIN)]),
    (
        "Hosts",
        &[
            ("GetHost", VIEWER),
            ("ListHosts", VIEWER),
            ("UpdateHost", ADMIN),
            ("DeleteHost", ADMIN),
            ("CordonHost", ADMIN),
            ("UncordonHost", ADMIN),
            ("DrainHost", ADMIN),
        ],
    ),
    (
        "Networks",
        &[
            ("GetNetwork", VIEWER),
            ("ListNetworks", VIEWER),
            ("CreateNetwork", OPERATOR),
            ("UpdateNetwork", OPERATOR),
            ("DeleteNetwork", OPERATOR),
        ],
    ),
    (
        "Nics",
        &[
            ("GetNic", VIEWER),
            ("ListNics", VIEWER),
            ("UpdateNic", OPERATOR),
            // Whom a guest talks to, and what about.
            ("ListFlows", OPERATOR),
            ("CaptureNic", OPERATOR),
        ],
    ),
    (
        "Operations",
        &[
            ("GetOperation", VIEWER),
            ("ListOperations", VIEWER),
            ("WaitOperation", VIEWER),
            ("CancelOperation", OPERATOR),
        ],
    ),
    (
        "Pools",
        &[
            ("GetPool", VIEWER),
            ("ListPools", VIEWER),
            ("CreatePool", ADMIN),
            ("DeletePool", ADMIN),
        ],
    ),
    (
        "Projects",
        &[
            ("GetProject", VIEWER),
            ("ListProjects", VIEWER),
            ("CreateProject", ADMIN),
            ("UpdateProject", ADMIN),
            ("DeleteProject", ADMIN),
        ],
    ),
    (
        "SecurityGroups",
        &[
            ("GetSecurityGroup", VIEWER),
            ("ListSecurityGroups", VIEWER),
            ("CreateSecurityGroup", OPERATOR),
            ("UpdateSecurityGroup", OPERATOR),
            ("DeleteSecurityGroup", OPERATOR),
        ],
    ),
    (
        "States",
        &[
            ("GetControllerStatus", VIEWER),
            ("BackupState", ADMIN),
            ("RestoreState", ADMIN),
        ],
    ),
    (
        "Uploads",
        &[
            ("CreateUpload", OPERATOR),
            ("GetUpload", VIEWER),
            ("DeleteUpload", OPERATOR),
            ("WriteUpload", OPERATOR),
        ],
    ),
    (
        "Vms",
        &[
            ("GetVm", VIEWER),
            ("ListVms", VIEWER),
            ("CreateVm", OPERATOR),
            ("DeleteVm", OPERATOR),
            ("StartVm", OPERATOR),
            ("StopVm", OPERATOR),
            ("ResetVm", OPERATOR),
            // A console is a keyboard.
            ("ConsoleVm", OPERATOR),
        ],
    ),
    (
        "Volumes",
        &[
            ("GetVolume", VIEWER),
            ("ListVolumes", VIEWER),
            ("CreateVolume", OPERATOR),
            ("UpdateVolume", OPERATOR),
            ("DeleteVolume", OPERATOR),
            ("CheckVolume", OPERATOR),
            ("SetVolumeKey", OPERATOR),
        ],
    ),
    ("Watches", &[("WatchResources", VIEWER)]),
];

static TABLE: LazyLock<HashMap<String, Need>> = LazyLock::new(|| {
    let mut table = HashMap::new();
    for (service, methods) in METHODS {
        for (method, need) in *methods {
            table.insert(format!("mortise.controller.v1.{service}/{method}"), *need);
        }
    }
    table
});

/// What `mortise.controller.v1.Vms/GetVm` needs; `None` if nobody may call it.
pub fn need(method: &str) -> Option<Need> {
    TABLE.get(method).copied()
}

/// Whether a call changes nothing, so that only its refusal is worth an audit entry.
pub fn only_reads(need: Need) -> bool {
    need == VIEWER
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;

    #[test]
    fn every_method_of_the_api_has_its_role() {
        let files = FileDescriptorSet::decode(api::FILE_DESCRIPTOR_SET).unwrap();
        let mut there = BTreeSet::new();
        for file in &files.file {
            if file.package() != "mortise.controller.v1" {
                continue;
            }
            for service in &file.service {
                for method in &service.method {
                    there.insert(format!(
                        "mortise.controller.v1.{}/{}",
                        service.name(),
                        method.name()
                    ));
                }
            }
        }
        let known: BTreeSet<String> = TABLE.keys().cloned().collect();
        let missing: Vec<_> = there.difference(&known).collect();
        let gone: Vec<_> = known.difference(&there).collect();
        assert!(
            missing.is_empty(),
            "add to METHODS in auth/methods.rs: {missing:?}"
        );
        assert!(gone.is_empty(), "remove from METHODS: {gone:?}");
    }

    #[test]
    fn what_changes_something_needs_more_than_looking() {
        for (method, need) in TABLE.iter() {
            let (_, verb) = method.split_once('/').unwrap();
            let reads = ["Get", "List", "Watch", "Wait"]
                .iter()
                .any(|prefix| verb.starts_with(prefix));
            assert!(reads || !only_reads(*need), "{method} changes something");
        }
    }

    #[test]
    fn breaking_things_needs_a_role_of_its_own() {
        let create = need("mortise.controller.v1.FaultExperiments/CreateFaultExperiment");
        assert_eq!(create, Some(FAULT_INJECTOR));
        assert_eq!(need("mortise.controller.v1.Vms/Unknown"), None);
    }
}
