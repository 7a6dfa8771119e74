//! What reaches into hosts, and who may ask for it. Files, interfaces and sockets of a host belong to no
//! project: who has projects cannot name them, and code for hosts is an admin's to bring.

use ::api::controller::{NetworkSpec, UpgradeDevicesRequest, VmSpec, VolumeSpec, disk};
use ::api::errors::status;
use gate::auth::{Principal, Role};
use tonic::{Code, Status};

/// Where kernels are that everybody may boot.
const BOOT: &str = "/boot/";

/// Refuses a VM that names what is its host's.
pub(super) fn vm(caller: &Principal, spec: &VmSpec) -> Result<(), Status> {
    if caller.projects.is_none() {
        return Ok(());
    }
    let boots = |path: &str| path.is_empty() || (path.starts_with(BOOT) && !path.contains("/../"));
    if !boots(&spec.kernel) || !boots(&spec.initramfs) {
        let what = "a kernel or initramfs that is not below /boot";
        return Err(refused(caller, what));
    }
    for disk in &spec.disks {
        if matches!(disk.source, Some(disk::Source::Path(_))) {
            return Err(refused(caller, "a file of a host (disks.path)"));
        }
        if disk.nbd.is_some() {
            return Err(refused(caller, "a server of disks (disks.nbd)"));
        }
    }
    for nic in &spec.nics {
        let own = [&nic.tap, &nic.bridge, &nic.host_cidr];
        if own.iter().any(|own| !own.is_empty()) {
            let what = "an interface, bridge or address of a host (nics.tap, bridge, host_cidr)";
            return Err(refused(caller, what));
        }
    }
    match spec.vhost_user.is_empty() {
        true => Ok(()),
        false => Err(refused(caller, "a socket of a host (vhost_user)")),
    }
}

/// Refuses a volume that is filled from a file of a host.
pub(super) fn volume(caller: &Principal, spec: &VolumeSpec) -> Result<(), Status> {
    path(caller, &spec.source_path, "source_path")
}

/// Refuses a network that is led onto an interface of hosts.
pub(super) fn network(caller: &Principal, spec: &NetworkSpec) -> Result<(), Status> {
    let own = [&spec.bridge, &spec.uplink];
    match caller.projects.is_some() && own.iter().any(|own| !own.is_empty()) {
        true => Err(refused(
            caller,
            "a bridge or interface of hosts (bridge, uplink)",
        )),
        false => Ok(()),
    }
}

/// Refuses a file of a host.
pub(super) fn path(caller: &Principal, path: &str, field: &str) -> Result<(), Status> {
    match caller.projects.is_some() && !path.is_empty() {
        true => Err(refused(caller, &format!("a file of a host ({field})"))),
        false => Ok(()),
    }
}

/// Refuses all but admins to bring hosts a program, or to exchange what is on whole hosts.
pub(super) fn upgrade(caller: &Principal, request: &UpgradeDevicesRequest) -> Result<(), Status> {
    let whole = request.target.starts_with("hosts/");
    if (!whole && request.binary.is_empty()) || caller.has(Role::Admin) {
        return Ok(());
    }
    let message = format!(
        "UpgradeDevices with a binary, or of a whole host, needs the role admin, and {} has {}: it decides what runs on hosts",
        caller.name,
        caller.roles_in_words()
    );
    let metadata = [("role", "admin"), ("caller", caller.name.as_str())];
    Err(status(
        Code::PermissionDenied,
        "ROLE_MISSING",
        message,
        &metadata,
    ))
}

fn refused(caller: &Principal, what: &str) -> Status {
    let message = format!(
        "{} has projects, and {what} belongs to none: use volumes and networks, or ask an admin",
        caller.name
    );
    let metadata = [("caller", caller.name.as_str())];
    status(
        Code::PermissionDenied,
        "HOST_RESOURCE_DENIED",
        message,
        &metadata,
    )
}

#[cfg(test)]
mod tests {
    use ::api::controller::{Disk, NbdSource, Nic, VhostUserDevice};

    use super::*;

    fn caller(roles: &[Role], projects: Option<&[&str]>) -> Principal {
        Principal {
            name: "a".into(),
            roles: roles.iter().copied().collect(),
            projects: projects.map(|ids| ids.iter().map(|id| (*id).to_owned()).collect()),
        }
    }

    #[test]
    fn who_has_projects_names_nothing_of_hosts() {
        let bound = caller(&[Role::Operator], Some(&["p"]));
        let free = caller(&[Role::Operator], None);
        let plain = VmSpec {
            kernel: "/boot/vmlinuz".into(),
            disks: vec![Disk {
                source: Some(disk::Source::Volume("projects/p/volumes/v".into())),
                ..Default::default()
            }],
            nics: vec![Nic {
                network: "projects/p/networks/n".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        vm(&bound, &plain).unwrap();
        let changes: [fn(&mut VmSpec); 8] = [
            |spec| spec.kernel = "/etc/shadow".into(),
            |spec| spec.initramfs = "/boot/../etc/shadow".into(),
            |spec| spec.disks[0].source = Some(disk::Source::Path("/dev/sda".into())),
            |spec| spec.disks[0].nbd = Some(NbdSource::default()),
            |spec| spec.nics[0].tap = "tap0".into(),
            |spec| spec.nics[0].bridge = "br0".into(),
            |spec| spec.nics[0].host_cidr = "10.0.0.1/8".into(),
            |spec| spec.vhost_user.push(VhostUserDevice::default()),
        ];
        for (index, change) in changes.iter().enumerate() {
            let mut spec = plain.clone();
            change(&mut spec);
            let error = vm(&bound, &spec).expect_err(&index.to_string());
            assert_eq!(error.code(), Code::PermissionDenied);
            vm(&free, &spec).unwrap();
        }
        let copied = VolumeSpec {
            source_path: "/etc/shadow".into(),
            ..Default::default()
        };
        assert!(volume(&bound, &copied).is_err() && volume(&free, &copied).is_ok());
        let led = NetworkSpec {
            uplink: "eth0".into(),
            ..Default::default()
        };
        assert!(network(&bound, &led).is_err() && network(&free, &led).is_ok());
        assert!(path(&bound, "/a", "path").is_err() && path(&bound, "", "path").is_ok());
    }

    #[test]
    fn code_for_hosts_is_an_admins_to_bring() {
        let operator = caller(&[Role::Operator], None);
        let admin = caller(&[Role::Admin], None);
        let renewed = UpgradeDevicesRequest {
            target: "projects/p/vms/v".into(),
            ..Default::default()
        };
        upgrade(&operator, &renewed).unwrap();
        let brought = UpgradeDevicesRequest {
            binary: "/tmp/device-blk".into(),
            ..renewed.clone()
        };
        let whole = UpgradeDevicesRequest {
            target: "hosts/-".into(),
            ..renewed
        };
        for request in [brought, whole] {
            let error = upgrade(&operator, &request).unwrap_err();
            assert!(error.message().contains("needs the role admin"), "{error}");
            upgrade(&admin, &request).unwrap();
        }
    }
}
