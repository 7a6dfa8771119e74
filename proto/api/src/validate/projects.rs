//! Requests about projects.

use tonic::Status;

use crate::controller::{CreateProjectRequest, UpdateProjectRequest};
use crate::errors::{Violations, invalid_field};
use crate::names;

/// Bytes of a display name.
const MAX_DISPLAY_NAME_BYTES: usize = 200;

/// What an update may change.
const PATHS: [&str; 8] = [
    "display_name",
    "quota",
    "quota.vms",
    "quota.vcpus",
    "quota.memory_bytes",
    "quota.volumes",
    "quota.volume_bytes",
    "quota.networks",
];

/// The id in `projects/{project}`.
///
/// # Errors
/// INVALID_ARGUMENT when it is none.
pub fn project_name(name: &str) -> Result<String, Status> {
    let id = name.strip_prefix("projects/").filter(|id| names::is_id(id));
    id.map(str::to_owned)
        .ok_or_else(|| invalid_field("name", "must be projects/{project}"))
}

/// Checks a request.
///
/// # Errors
/// INVALID_ARGUMENT naming everything that cannot be accepted.
pub fn create_project_request(request: &CreateProjectRequest) -> Result<(), Status> {
    let mut violations = Violations::new();
    violations.require(names::is_id(&request.project_id), "project_id", || {
        names::ID_RULE.to_owned()
    });
    super::fields::request_id(&mut violations, &request.request_id);
    if let Some(project) = &request.project {
        display_name(&mut violations, &project.display_name);
    }
    violations.into_result()
}

/// Checks a request; answers the project's id.
///
/// # Errors
/// INVALID_ARGUMENT naming everything that cannot be accepted.
pub fn update_project_request(request: &UpdateProjectRequest) -> Result<String, Status> {
    let mut violations = Violations::new();
    let project = request.project.clone().unwrap_or_default();
    let id = project
        .name
        .strip_prefix("projects/")
        .filter(|id| names::is_id(id));
    violations.require(id.is_some(), "project.name", || {
        "must be projects/{project}".to_owned()
    });
    display_name(&mut violations, &project.display_name);
    let paths = request
        .update_mask
        .as_ref()
        .map(|mask| mask.paths.as_slice())
        .unwrap_or_default();
    violations.require(!paths.is_empty(), "update_mask", || {
        format!("names nothing to change; there are {}", PATHS.join(", "))
    });
    for path in paths {
        violations.require(PATHS.contains(&path.as_str()), "update_mask", || {
            format!("{path} cannot be changed; there are {}", PATHS.join(", "))
        });
    }
    violations.into_result()?;
    Ok(id.unwrap_or_default().to_owned())
}

fn display_name(violations: &mut Violations, name: &str) {
    violations.require(
        name.len() <= MAX_DISPLAY_NAME_BYTES,
        "project.display_name",
        || format!("is longer than {MAX_DISPLAY_NAME_BYTES} bytes"),
    );
}
