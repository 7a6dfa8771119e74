//! Resource names: `projects/{project}/vms/{vm}` and its `…/disks/{disk}` and `…/nics/{nic}`,
//! `projects/{project}/volumes/{volume}`, `projects/{project}/uploads/{upload}`,
//! `projects/{project}/networks/{network}`, `projects/{project}/securityGroups/{group}`,
//! `projects/{project}/faultExperiments/{experiment}`,
//! `hosts/{host}`, `operations/{operation}`.

use std::fmt;

use thiserror::Error;

/// The project of whoever names none.
pub const DEFAULT_PROJECT: &str = "default";

/// Bytes of an id: a DNS label, so that ids can become host names, file names and interface names.
pub const MAX_ID_BYTES: usize = 63;

/// Whether `id` is `[a-z][a-z0-9-]{0,62}`.
pub fn is_id(id: &str) -> bool {
    id.len() <= MAX_ID_BYTES
        && id.starts_with(|first: char| first.is_ascii_lowercase())
        && id
            .bytes()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
}

/// What an id must look like, for messages.
pub const ID_RULE: &str =
    "must be a lower-case letter followed by at most 62 of a-z, 0-9 and hyphen";

/// `projects/{project}/{collection}/{id}`
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    /// Whose it is.
    pub project: String,
    /// vms, volumes ...
    pub collection: &'static str,
    /// Unique in the project's collection.
    pub id: String,
}

/// Collection of VMs.
pub const VMS: &str = "vms";
/// Collection of volumes.
pub const VOLUMES: &str = "volumes";
/// Collection of uploads.
pub const UPLOADS: &str = "uploads";
/// Collection of networks.
pub const NETWORKS: &str = "networks";
/// Collection of security groups.
pub const SECURITY_GROUPS: &str = "securityGroups";
/// Collection of fault experiments.
pub const FAULT_EXPERIMENTS: &str = "faultExperiments";

impl Name {
    /// A VM's name.
    pub fn vm(project: &str, id: &str) -> Self {
        Self {
            project: project.to_owned(),
            collection: VMS,
            id: id.to_owned(),
        }
    }

    /// A volume's name.
    pub fn volume(project: &str, id: &str) -> Self {
        Self {
            project: project.to_owned(),
            collection: VOLUMES,
            id: id.to_owned(),
        }
    }

    /// An upload's name.
    pub fn upload(project: &str, id: &str) -> Self {
        Self {
            project: project.to_owned(),
            collection: UPLOADS,
            id: id.to_owned(),
        }
    }

    /// A network's name.
    pub fn network(project: &str, id: &str) -> Self {
        Self {
            project: project.to_owned(),
            collection: NETWORKS,
            id: id.to_owned(),
        }
    }

    /// A security group's name.
    pub fn security_group(project: &str, id: &str) -> Self {
        Self {
            project: project.to_owned(),
            collection: SECURITY_GROUPS,
            id: id.to_owned(),
        }
    }

    /// A fault experiment's name.
    pub fn fault_experiment(project: &str, id: &str) -> Self {
        Self {
            project: project.to_owned(),
            collection: FAULT_EXPERIMENTS,
            id: id.to_owned(),
        }
    }

    /// Parses a fault experiment's name.
    ///
    /// # Errors
    /// When `name` is not `projects/{project}/faultExperiments/{experiment}`.
    pub fn parse_fault_experiment(name: &str) -> Result<Self, NameError> {
        Self::parse(name, FAULT_EXPERIMENTS)
    }

    /// Parses a network's name.
    ///
    /// # Errors
    /// When `name` is not `projects/{project}/networks/{network}`.
    pub fn parse_network(name: &str) -> Result<Self, NameError> {
        Self::parse(name, NETWORKS)
    }

    /// Parses a security group's name.
    ///
    /// # Errors
    /// When `name` is not `projects/{project}/securityGroups/{group}`.
    pub fn parse_security_group(name: &str) -> Result<Self, NameError> {
        Self::parse(name, SECURITY_GROUPS)
    }

    /// Parses an upload's name.
    ///
    /// # Errors
    /// When `name` is not `projects/{project}/uploads/{upload}`.
    pub fn parse_upload(name: &str) -> Result<Self, NameError> {
        Self::parse(name, UPLOADS)
    }

    /// Parses the name of a VM's disk: the VM, and the disk's name in its spec.
    ///
    /// # Errors
    /// When `name` is not `projects/{project}/vms/{vm}/disks/{disk}`.
    pub fn parse_disk(name: &str) -> Result<(Self, String), NameError> {
        name.rsplit_once("/disks/")
            .filter(|(_, disk)| is_id(disk))
            .and_then(|(vm, disk)| Some((Self::parse_vm(vm).ok()?, disk.to_owned())))
            .ok_or_else(|| NameError {
                name: name.to_owned(),
                pattern: "projects/{project}/vms/{vm}/disks/{disk}",
            })
    }

    /// Parses the name of a VM's device, whatever kind it is: the VM, and the device's own name.
    ///
    /// # Errors
    /// When `name` is not `projects/{project}/vms/{vm}/devices/{device}`.
    pub fn parse_device(name: &str) -> Result<(Self, String), NameError> {
        name.rsplit_once("/devices/")
            .filter(|(_, device)| is_id(device))
            .and_then(|(vm, device)| Some((Self::parse_vm(vm).ok()?, device.to_owned())))
            .ok_or_else(|| NameError {
                name: name.to_owned(),
                pattern: "projects/{project}/vms/{vm}/devices/{device}",
            })
    }

    /// Parses the name of a VM's NIC: the VM, and the NIC's own name.
    ///
    /// # Errors
    /// When `name` is not `projects/{project}/vms/{vm}/nics/{nic}`.
    pub fn parse_nic(name: &str) -> Result<(Self, String), NameError> {
        name.rsplit_once("/nics/")
            .filter(|(_, nic)| is_id(nic))
            .and_then(|(vm, nic)| Some((Self::parse_vm(vm).ok()?, nic.to_owned())))
            .ok_or_else(|| NameError {
                name: name.to_owned(),
                pattern: "projects/{project}/vms/{vm}/nics/{nic}",
            })
    }

    /// Parses a VM's name.
    ///
    /// # Errors
    /// When `name` is not `projects/{project}/vms/{vm}`.
    pub fn parse_vm(name: &str) -> Result<Self, NameError> {
        Self::parse(name, VMS)
    }

    /// Parses a volume's name.
    ///
    /// # Errors
    /// When `name` is not `projects/{project}/volumes/{volume}`.
    pub fn parse_volume(name: &str) -> Result<Self, NameError> {
        Self::parse(name, VOLUMES)
    }

    fn parse(name: &str, collection: &'static str) -> Result<Self, NameError> {
        let error = || NameError {
            name: name.to_owned(),
            pattern: pattern(collection),
        };
        let parts: Vec<&str> = name.split('/').collect();
        match parts[..] {
            ["projects", project, found, id]
                if found == collection && is_id(project) && is_id(id) =>
            {
                Ok(Self {
                    project: project.to_owned(),
                    collection,
                    id: id.to_owned(),
                })
            }
            _ => Err(error()),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "projects/{}/{}/{}",
            self.project, self.collection, self.id
        )
    }
}

/// The `parent` of a collection: one project, or all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parent {
    /// `projects/{project}`
    Project(String),
    /// `projects/-`
    All,
}

impl Parent {
    /// Parses `projects/{project}` or `projects/-`.
    ///
    /// # Errors
    /// When it is neither.
    pub fn parse(name: &str) -> Result<Self, NameError> {
        match name.strip_prefix("projects/") {
            Some("-") => Ok(Self::All),
            Some(project) if is_id(project) => Ok(Self::Project(project.to_owned())),
            _ => Err(NameError {
                name: name.to_owned(),
                pattern: "projects/{project}",
            }),
        }
    }

    /// The project, unless it stands for all.
    ///
    /// # Errors
    /// For `projects/-`.
    pub fn project(self) -> Result<String, NameError> {
        match self {
            Self::Project(project) => Ok(project),
            Self::All => Err(NameError {
                name: "projects/-".to_owned(),
                pattern: "projects/{project}",
            }),
        }
    }
}

/// The id in `{collection}/{id}`, such as `operations/…`; lower-case hexadecimal ids are fine too.
///
/// # Errors
/// When `name` is of another collection or has no acceptable id.
pub fn flat_id<'a>(name: &'a str, collection: &'static str) -> Result<&'a str, NameError> {
    name.strip_prefix(collection)
        .and_then(|rest| rest.strip_prefix('/'))
        .filter(|id| {
            (1..=MAX_ID_BYTES).contains(&id.len())
                && id
                    .bytes()
                    .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        })
        .ok_or_else(|| NameError {
            name: name.to_owned(),
            pattern: pattern(collection),
        })
}

fn pattern(collection: &str) -> &'static str {
    match collection {
        VMS => "projects/{project}/vms/{vm}",
        VOLUMES => "projects/{project}/volumes/{volume}",
        UPLOADS => "projects/{project}/uploads/{upload}",
        NETWORKS => "projects/{project}/networks/{network}",
        SECURITY_GROUPS => "projects/{project}/securityGroups/{group}",
        FAULT_EXPERIMENTS => "projects/{project}/faultExperiments/{experiment}",
        "hosts" => "hosts/{host}",
        "operations" => "operations/{operation}",
        _ => "{collection}/{id}",
    }
}

/// A string that is no name of the kind wanted.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "{name:?} must look like {pattern}; ids are a lower-case letter followed by at most 62 of a-z, 0-9 and hyphen"
)]
pub struct NameError {
    name: String,
    pattern: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_dns_labels() {
        assert!(is_id("a") && is_id("web-1") && is_id(&"a".repeat(63)));
        for bad in [
            "",
            "1a",
            "-a",
            "A",
            "a_b",
            "a/b",
            "a.",
            "ä",
            &"a".repeat(64),
        ] {
            assert!(!is_id(bad), "{bad}");
        }
    }

    #[test]
    fn names_parse_and_print() {
        let name = Name::parse_vm("projects/default/vms/web").unwrap();
        assert_eq!(name, Name::vm("default", "web"));
        assert_eq!(name.to_string(), "projects/default/vms/web");
    }

    #[test]
    fn disks_belong_to_vms() {
        let (vm, disk) = Name::parse_disk("projects/p/vms/web/disks/root").unwrap();
        assert_eq!((vm, disk.as_str()), (Name::vm("p", "web"), "root"));
        for bad in ["projects/p/vms/web", "projects/p/vms/web/disks/", "disks/a"] {
            let error = Name::parse_disk(bad).unwrap_err().to_string();
            assert!(error.contains("/disks/{disk}"), "{error}");
        }
    }

    #[test]
    fn other_shapes_are_refused_with_the_pattern() {
        for bad in [
            "web",
            "projects/default/volumes/web",
            "projects/default/vms/",
            "projects//vms/web",
            "projects/default/vms/web/x",
            "projects/default/vms/../web",
        ] {
            let error = Name::parse_vm(bad).unwrap_err().to_string();
            assert!(error.contains("projects/{project}/vms/{vm}"), "{error}");
        }
    }

    #[test]
    fn parents_name_one_project_or_all() {
        assert_eq!(Parent::parse("projects/p"), Ok(Parent::Project("p".into())));
        assert_eq!(Parent::parse("projects/-"), Ok(Parent::All));
        assert!(Parent::parse("p").is_err());
        assert!(Parent::All.project().is_err());
    }

    #[test]
    fn flat_names_give_their_id() {
        assert_eq!(flat_id("operations/0ab-1", "operations"), Ok("0ab-1"));
        assert!(flat_id("operations/", "operations").is_err());
        assert!(flat_id("hosts/a", "operations").is_err());
    }
}
