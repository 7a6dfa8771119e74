//! Upgrades of device daemons.

use tonic::Status;

use super::fields::*;
use crate::errors::Violations;
use crate::{controller as pb, names, node};

/// Programs that can be exchanged for another version.
pub const DEVICE_PROGRAMS: [&str; 2] = ["device-blk", "device-net"];
/// A process that takes longer to come up is not waited for.
const MAX_GATE_MS: u32 = 600_000;
/// Guests stall no longer than this for requests that do not complete.
const MAX_DRAIN_MS: u32 = 300_000;
const MAX_VERSION_BYTES: usize = 64;

/// What an upgrade is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpgradeTarget {
    /// One device of a VM.
    Device(names::Name, String),
    /// All devices of a VM.
    Vm(names::Name),
    /// All VMs of a host, by its id.
    Host(String),
}

/// Checks an upgrade, and finds out of what.
///
/// # Errors
/// INVALID_ARGUMENT with the path of each field that cannot be accepted.
pub fn upgrade_devices_request(
    request: &pb::UpgradeDevicesRequest,
) -> Result<UpgradeTarget, Status> {
    let mut found = Violations::new();
    request_id(&mut found, &request.request_id);
    let work = node::UpgradeDaemons {
        binary: request.binary.clone(),
        program: request.program.clone(),
        gate_ms: request.gate_ms,
        watch_ms: request.watch_ms,
        drain_ms: request.drain_ms,
        version: request.version.clone(),
        ..Default::default()
    };
    choices(&mut found, "", &work);
    let target = target(&request.target);
    if target.is_none() {
        found.add(
            "target",
            format!(
                "{:?} must be projects/PROJECT/vms/VM/devices/DEVICE, projects/PROJECT/vms/VM or hosts/HOST",
                request.target
            ),
        );
    }
    found.into_result()?;
    Ok(target.expect("its absence is a violation"))
}

/// Checks what a host is asked to upgrade.
pub(super) fn upgrade_daemons(found: &mut Violations, work: &node::UpgradeDaemons) {
    for (index, vm) in work.vm_ids.iter().enumerate() {
        id(found, &format!("upgrade.vm_ids[{index}]"), vm);
    }
    if !work.device.is_empty() {
        id(found, "upgrade.device", &work.device);
        found.require(work.vm_ids.len() == 1, "upgrade.device", || {
            "needs exactly one of vm_ids".into()
        });
    }
    choices(found, "upgrade.", work);
}

fn choices(found: &mut Violations, prefix: &str, work: &node::UpgradeDaemons) {
    let field = |name: &str| format!("{prefix}{name}");
    if !work.binary.is_empty() {
        absolute(found, &field("binary"), &work.binary);
    }
    let known = work.program.is_empty() || DEVICE_PROGRAMS.contains(&work.program.as_str());
    found.require(known, &field("program"), || {
        format!("{:?} must be device-blk or device-net", work.program)
    });
    at_most(found, &field("gate_ms"), work.gate_ms, MAX_GATE_MS);
    at_most(found, &field("watch_ms"), work.watch_ms, MAX_GATE_MS);
    at_most(found, &field("drain_ms"), work.drain_ms, MAX_DRAIN_MS);
    no_control_characters(found, &field("version"), &work.version);
    let short = work.version.len() <= MAX_VERSION_BYTES;
    found.require(short, &field("version"), || {
        format!("is longer than {MAX_VERSION_BYTES} bytes")
    });
}

fn target(name: &str) -> Option<UpgradeTarget> {
    if let Ok(host) = names::flat_id(name, "hosts") {
        return Some(UpgradeTarget::Host(host.to_owned()));
    }
    match name.rsplit_once("/devices/") {
        Some((vm, device)) if names::is_id(device) => Some(UpgradeTarget::Device(
            names::Name::parse_vm(vm).ok()?,
            device.to_owned(),
        )),
        Some(_) => None,
        None => names::Name::parse_vm(name).ok().map(UpgradeTarget::Vm),
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt;

    use super::*;

    fn request(target: &str) -> pb::UpgradeDevicesRequest {
        pb::UpgradeDevicesRequest {
            target: target.into(),
            binary: "/opt/device-blk".into(),
            ..Default::default()
        }
    }

    #[test]
    fn targets_are_devices_vms_and_hosts() {
        let vm = names::Name::vm("p", "web");
        for (text, wanted) in [
            (
                "projects/p/vms/web/devices/root",
                UpgradeTarget::Device(vm.clone(), "root".into()),
            ),
            ("projects/p/vms/web", UpgradeTarget::Vm(vm)),
            ("hosts/abc", UpgradeTarget::Host("abc".into())),
        ] {
            assert_eq!(upgrade_devices_request(&request(text)).unwrap(), wanted);
        }
        for text in [
            "",
            "web",
            "projects/p/vms/web/devices/",
            "projects/p/volumes/v",
        ] {
            let refused = upgrade_devices_request(&request(text)).unwrap_err();
            assert!(refused.message().contains("target"), "{refused}");
        }
    }

    #[test]
    fn relative_paths_and_foreign_programs_are_refused() {
        let mut wrong = request("hosts/abc");
        wrong.binary = "device-blk".into();
        wrong.program = "vmm-core".into();
        let refused = upgrade_devices_request(&wrong).unwrap_err();
        let bad = refused.get_details_bad_request().expect("details");
        let said: Vec<String> = bad
            .field_violations
            .iter()
            .map(|violation| format!("{}: {}", violation.field, violation.description))
            .collect();
        let [binary, program] = &said[..] else {
            panic!("{said:?}");
        };
        assert!(
            binary.starts_with("binary: ") && binary.contains("absolute"),
            "{binary}"
        );
        assert!(
            program.starts_with("program: ") && program.contains("device-net"),
            "{program}"
        );
    }

    #[test]
    fn device_needs_its_vm() {
        let mut found = Violations::new();
        let work = node::UpgradeDaemons {
            device: "root".into(),
            ..Default::default()
        };
        upgrade_daemons(&mut found, &work);
        assert!(found.into_result().is_err());
    }
}
