//! Devices of VMs in requests, and what is done in their outages.

use super::machine::Machine;
use super::*;
use crate::{controller as pb, node};

/// `error_after_ms`: shorter is not looked at more often than this, longer is for ever.
const ERROR_AFTER_MS: std::ops::RangeInclusive<u32> = 1000..=86_400_000;
const ERROR_AFTER: i32 = node::OutageAction::ErrorAfter as i32;

/// Checks the name of a VM's device.
///
/// # Errors
/// As [`attach_request`].
pub fn vm_device_request(name: &str) -> Result<(names::Name, String), Status> {
    device_name(Violations::new(), "name", name)
}

/// Checks a change of a device; [`outage_policy`] checks what comes out.
///
/// # Errors
/// As [`attach_request`].
pub fn update_device_request(
    request: &pb::UpdateDeviceRequest,
) -> Result<(names::Name, String), Status> {
    let mut found = Violations::new();
    request_id(&mut found, &request.request_id);
    let paths = request.update_mask.as_ref().map(|mask| &mask.paths[..]);
    let paths = paths.unwrap_or_default();
    let is_right = paths.iter().all(|path| path == "outage_policy") && !paths.is_empty();
    found.require(is_right, "update_mask", || {
        "must be outage_policy: nothing else can be changed".into()
    });
    let device = request.device.clone().unwrap_or_default();
    device_name(found, "device.name", &device.name)
}

/// Checks what is to be done in outages of a device that is a disk, or is not.
///
/// # Errors
/// As [`attach_request`].
pub fn outage_policy(policy: &pb::OutagePolicy, is_disk: bool) -> Result<(), Status> {
    let mut found = Violations::new();
    let at = "device.outage_policy";
    check(
        &mut found,
        at,
        policy.action,
        policy.error_after_ms,
        is_disk,
    );
    found.into_result()
}

impl Machine<'_> {
    /// Checks policies of the devices that were named before: device, action and time.
    pub(super) fn outage_policies<'a>(
        &mut self,
        policies: impl Iterator<Item = (&'a str, i32, u32)>,
    ) {
        let mut seen = std::collections::HashSet::new();
        for (index, (device, action, error_after_ms)) in policies.enumerate() {
            let at = format!("{}.outage_policies[{index}]", self.at);
            let named = self.names.iter().find(|(_, name)| name == device);
            let is_first = seen.insert(device);
            let Some((field, _)) = named.filter(|_| is_first && !device.is_empty()) else {
                let problem = match is_first {
                    true => format!("{device:?} is no name that a device of this VM was given"),
                    false => format!("{device:?} has a policy already"),
                };
                self.found.add(format!("{at}.device"), problem);
                continue;
            };
            let is_disk = field.contains(".disks[");
            check(self.found, &at, action, error_after_ms, is_disk);
        }
    }
}

fn check(found: &mut Violations, at: &str, action: i32, error_after_ms: u32, is_disk: bool) {
    let is_known = node::OutageAction::try_from(action).is_ok();
    found.require(is_known, &format!("{at}.action"), || {
        format!("{action} is none of stall, error-after and pause-vm")
    });
    let fails = action == ERROR_AFTER;
    found.require(is_disk || !fails, &format!("{at}.action"), || {
        "error-after is for disks of this host's own daemons; choose stall or pause-vm".into()
    });
    let fits = match fails {
        true => ERROR_AFTER_MS.contains(&error_after_ms),
        false => error_after_ms == 0,
    };
    found.require(fits, &format!("{at}.error_after_ms"), || {
        format!(
            "must be {} to {} with error-after and 0 otherwise, not {error_after_ms}",
            ERROR_AFTER_MS.start(),
            ERROR_AFTER_MS.end()
        )
    });
}

fn device_name(
    mut found: Violations,
    field: &str,
    name: &str,
) -> Result<(names::Name, String), Status> {
    match names::Name::parse_device(name) {
        Ok(name) => found.into_result().map(|()| name),
        Err(error) => {
            found.add(field, error.to_string());
            Err(found.into_result().expect_err("there is a violation"))
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt;

    use super::*;

    fn policy(action: pb::OutageAction, error_after_ms: u32) -> pb::OutagePolicy {
        pb::OutagePolicy {
            device: String::new(),
            action: action as i32,
            error_after_ms,
        }
    }

    #[test]
    fn errors_are_for_disks_and_need_a_time() {
        use pb::OutageAction::{ErrorAfter, PauseVm, Stall};
        for (action, ms, is_disk, is_right) in [
            (Stall, 0, false, true),
            (Stall, 1000, true, false),
            (PauseVm, 0, false, true),
            (ErrorAfter, 1000, true, true),
            (ErrorAfter, 999, true, false),
            (ErrorAfter, 86_400_001, true, false),
            (ErrorAfter, 1000, false, false),
        ] {
            let outcome = outage_policy(&policy(action, ms), is_disk);
            assert_eq!(outcome.is_ok(), is_right, "{action:?} {ms} {is_disk}");
        }
    }

    #[test]
    fn policy_names_a_device_of_the_vm_once() {
        let mut found = Violations::new();
        let mut machine = Machine::new(&mut found, "vm.spec");
        machine.device("disks", 0, "root");
        machine.device("nics", 0, "eth0");
        let stall = pb::OutageAction::Stall as i32;
        let fails = pb::OutageAction::ErrorAfter as i32;
        machine.outage_policies(
            [
                ("root", fails, 5000),
                ("root", stall, 0),
                ("data", stall, 0),
                ("eth0", fails, 5000),
            ]
            .into_iter(),
        );
        let status = found.into_result().unwrap_err();
        let bad = status.get_details_bad_request().expect("details");
        let fields: Vec<&str> = bad
            .field_violations
            .iter()
            .map(|v| v.field.as_str())
            .collect();
        let of = |field| format!("vm.spec.outage_policies{field}");
        assert_eq!(fields, ["[1].device", "[2].device", "[3].action"].map(of));
    }
}
