//! NICs of VMs in requests of the controller and of the node agent. What filters mean is the daemon's to
//! say.

use super::nic_policy::filter;
use super::*;
use crate::controller as pb;

/// What UpdateNic can change.
const NIC_MASK: [&str; 14] = [
    "spec.port_forwards",
    "spec.security_groups",
    "spec.link_down",
    "spec.limits",
    "spec.limits.ingress",
    "spec.limits.egress",
    "spec.limits.ingress.bits_per_second",
    "spec.limits.ingress.packets_per_second",
    "spec.limits.ingress.burst_bits",
    "spec.limits.ingress.burst_packets",
    "spec.limits.egress.bits_per_second",
    "spec.limits.egress.packets_per_second",
    "spec.limits.egress.burst_bits",
    "spec.limits.egress.burst_packets",
];

/// Checks a NIC's name, and parses it: the VM and the NIC.
///
/// # Errors
/// As [`attach_request`].
pub fn vm_nic_request(name: &str) -> Result<(names::Name, String), Status> {
    nic_name(Violations::new(), "name", name)
}

/// Checks a change of a NIC; [`nic_limits`] checks what comes out.
///
/// # Errors
/// As [`attach_request`].
pub fn update_nic_request(request: &pb::UpdateNicRequest) -> Result<(names::Name, String), Status> {
    let mut found = Violations::new();
    request_id(&mut found, &request.request_id);
    let paths = request.update_mask.as_ref().map(|mask| &mask.paths[..]);
    let paths = paths.unwrap_or_default();
    let can_be_changed = || NIC_MASK.join(", ");
    found.require(!paths.is_empty(), "update_mask", || {
        format!("is empty; name what is to change: {}", can_be_changed())
    });
    for path in paths {
        found.require(NIC_MASK.contains(&path.as_str()), "update_mask", || {
            format!(
                "{path:?} cannot be changed; these can: {}",
                can_be_changed()
            )
        });
    }
    let name = request.nic.as_ref().map_or("", |nic| nic.name.as_str());
    nic_name(found, "nic.name", name)
}

/// Checks a NIC as an update makes it.
///
/// # Errors
/// As [`attach_request`].
pub fn updated_nic(nic: &pb::Nic) -> Result<(), Status> {
    let mut found = Violations::new();
    changeable(&mut found, "nic.spec", nic);
    super::networks::nic_network(&mut found, "nic.spec", nic);
    found.into_result()
}

/// Checks what may change while the VM runs.
pub(super) fn changeable(found: &mut Violations, at: &str, nic: &pb::Nic) {
    let limits = nic.limits.unwrap_or_default();
    for (direction, limit) in [("ingress", limits.ingress), ("egress", limits.egress)] {
        let limit = limit.unwrap_or_default();
        for (burst_name, burst, rate_name, rate) in [
            (
                "burst_bits",
                limit.burst_bits,
                "bits_per_second",
                limit.bits_per_second,
            ),
            (
                "burst_packets",
                limit.burst_packets,
                "packets_per_second",
                limit.packets_per_second,
            ),
        ] {
            let field = format!("{at}.limits.{direction}.{burst_name}");
            found.require(burst == 0 || rate > 0, &field, || {
                format!("means nothing without {rate_name}")
            });
        }
    }
    let has_any = nic
        .limits
        .is_some_and(|limits| limits != Default::default())
        || nic.link_down
        || nic.track_flows;
    found.require(nic.user.is_none() || !has_any, at, || {
        "is of a user network: passt has no limits, no link to unplug and no table of flows".into()
    });
}

/// Checks which flows are asked for.
///
/// # Errors
/// As [`attach_request`].
pub fn vm_nic_flows_request(
    request: &pb::ListFlowsRequest,
) -> Result<(names::Name, String), Status> {
    let mut found = Violations::new();
    at_most(&mut found, "max_flows", request.max_flows, MAX_LISTED_FLOWS);
    filter(&mut found, &request.filter);
    nic_name(found, "name", &request.name)
}

/// Checks what is to be captured.
///
/// # Errors
/// As [`attach_request`].
pub fn capture_nic_request(
    request: &pb::CaptureNicRequest,
) -> Result<(names::Name, String), Status> {
    let mut found = Violations::new();
    filter(&mut found, &request.filter);
    let direction = pb::CaptureDirection::try_from(request.direction);
    found.require(direction.is_ok(), "direction", || {
        "is of an unknown kind".into()
    });
    let frames = pb::CapturedFrames::try_from(request.frames);
    found.require(frames.is_ok(), "frames", || "is of an unknown kind".into());
    nic_name(found, "name", &request.name)
}

fn nic_name(
    mut found: Violations,
    field: &str,
    name: &str,
) -> Result<(names::Name, String), Status> {
    match names::Name::parse_nic(name) {
        Ok(name) => found.into_result().map(|()| name),
        Err(error) => {
            found.add(field, error.to_string());
            Err(found.into_result().expect_err("there is a violation"))
        }
    }
}

/// Checks which flows of a VM's NIC a host is asked for.
///
/// # Errors
/// As [`attach_request`].
pub fn node_nic_flows_request(request: &node::ListNicFlowsRequest) -> Result<(), Status> {
    one_id("vm_id", &request.vm_id)?;
    list_flows_request(request.flows.as_ref().unwrap_or(&Default::default()))
}

/// Checks what a host is asked to capture.
///
/// # Errors
/// As [`attach_request`].
pub fn node_capture_nic_request(request: &node::CaptureNicRequest) -> Result<(), Status> {
    one_id("vm_id", &request.vm_id)?;
    capture_request(request.capture.as_ref().unwrap_or(&Default::default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_changed_is_taken() {
        let request = |name: &str, path: &str| pb::UpdateNicRequest {
            nic: Some(pb::VmNic {
                name: name.into(),
                ..Default::default()
            }),
            update_mask: Some(prost_types::FieldMask {
                paths: vec![path.into()],
            }),
            ..Default::default()
        };
        let name = "projects/p/vms/web/nics/eth0";
        let (vm, nic) = update_nic_request(&request(name, "spec.link_down")).unwrap();
        assert_eq!((vm.id.as_str(), nic.as_str()), ("web", "eth0"));
        let error = update_nic_request(&request(name, "spec.mac")).unwrap_err();
        assert!(error.message().contains("spec.limits"), "{error}");
        let error = update_nic_request(&request("eth0", "spec.limits")).unwrap_err();
        assert!(error.message().contains("/nics/{nic}"), "{error}");
    }

    #[test]
    fn user_networks_have_no_limits() {
        let mut nic = pb::Nic {
            link_down: true,
            ..Default::default()
        };
        updated_nic(&nic).unwrap();
        nic.user = Some(Default::default());
        assert!(updated_nic(&nic).unwrap_err().message().contains("passt"));
    }
}
