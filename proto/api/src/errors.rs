//! Errors as the API gives them (AIP-193): a code, a message for people, and details for programs.
//! A request that cannot be accepted carries `google.rpc.BadRequest` with the path of each field;
//! everything else carries `google.rpc.ErrorInfo` with a stable reason in the domain [`DOMAIN`].

use std::fmt::Write as _;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

/// The `domain` of every `ErrorInfo`.
pub const DOMAIN: &str = "mortise";

/// A `Status` with `ErrorInfo`: `reason` is UPPER_SNAKE_CASE and stable, `metadata` holds the
/// operands that the message names.
pub fn status(
    code: Code,
    reason: &str,
    message: impl Into<String>,
    metadata: &[(&str, &str)],
) -> Status {
    let metadata: std::collections::HashMap<String, String> = metadata
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
    let details = ErrorDetails::with_error_info(reason, DOMAIN, metadata);
    Status::with_error_details(code, message, details)
}

/// The `reason` of a status made by [`status`].
pub fn reason(status: &Status) -> Option<String> {
    let info = status.get_details_error_info()?;
    (info.domain == DOMAIN).then_some(info.reason)
}

/// Everything that is wrong with a request, so that a caller can mend it in one go.
#[derive(Debug, Default)]
pub struct Violations(Vec<FieldViolation>);

impl Violations {
    /// Nothing wrong yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Records that `field` (a path such as `vm.disks[0].path`) cannot be accepted.
    pub fn add(&mut self, field: impl Into<String>, problem: impl Into<String>) {
        self.0.push(FieldViolation::new(field, problem));
    }

    /// Records `problem` unless `holds`.
    pub fn require(&mut self, holds: bool, field: &str, problem: impl FnOnce() -> String) {
        if !holds {
            self.add(field, problem());
        }
    }

    /// # Errors
    /// INVALID_ARGUMENT naming every violation, if there is one.
    pub fn into_result(self) -> Result<(), Status> {
        let Some(first) = self.0.first() else {
            return Ok(());
        };
        let mut message = format!("{}: {}", first.field, first.description);
        if self.0.len() > 1 {
            let _ = write!(message, " (and {} more)", self.0.len() - 1);
        }
        let details = ErrorDetails::with_bad_request(self.0);
        Err(Status::with_error_details(
            Code::InvalidArgument,
            message,
            details,
        ))
    }
}

/// INVALID_ARGUMENT for one field.
pub fn invalid_field(field: impl Into<String>, problem: impl Into<String>) -> Status {
    let mut violations = Violations::new();
    violations.add(field, problem);
    violations.into_result().expect_err("there is a violation")
}

/// What a person should read about `status`: one line, or one line for each field violation.
pub fn explain(status: &Status) -> String {
    if let Some(bad) = status.get_details_bad_request()
        && !bad.field_violations.is_empty()
    {
        let lines: Vec<String> = bad
            .field_violations
            .iter()
            .map(|violation| format!("{}: {}", violation.field, violation.description))
            .collect();
        return lines.join("\n");
    }
    if status.message().is_empty() {
        return status.code().description().to_owned();
    }
    status.message().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_violations_arrive_with_their_paths() {
        let mut violations = Violations::new();
        violations.add("vm.spec.kernel", "is missing");
        violations.add("vm.spec.disks[0].path", "must be absolute");
        let status = violations.into_result().unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "vm.spec.kernel: is missing (and 1 more)");
        let bad = status.get_details_bad_request().unwrap();
        assert_eq!(bad.field_violations[1].field, "vm.spec.disks[0].path");
        assert_eq!(
            explain(&status),
            "vm.spec.kernel: is missing\nvm.spec.disks[0].path: must be absolute"
        );
    }

    #[test]
    fn nothing_wrong_is_no_error() {
        assert!(Violations::new().into_result().is_ok());
    }

    #[test]
    fn reason_and_metadata_travel_in_error_info() {
        let status = status(
            Code::FailedPrecondition,
            "VM_RUNNING",
            "vm a is running",
            &[("vm", "a")],
        );
        assert_eq!(reason(&status).as_deref(), Some("VM_RUNNING"));
        let info = status.get_details_error_info().unwrap();
        assert_eq!(info.domain, DOMAIN);
        assert_eq!(info.metadata["vm"], "a");
        assert_eq!(explain(&status), "vm a is running");
    }
}
