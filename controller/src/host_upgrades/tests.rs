//! What an upgrade says of itself.

use super::*;

fn record(stages: &[(UpgradeStage, &str)]) -> HostUpgradeRecord {
    let hosts = stages.iter().enumerate().map(|(index, (stage, note))| {
        let mut progress = HostProgress {
            host: format!("h{index}"),
            note: (*note).to_owned(),
            ..Default::default()
        };
        progress.set_stage(*stage);
        progress
    });
    HostUpgradeRecord {
        operation: "operations/0-1".into(),
        hosts: hosts.collect(),
        ..Default::default()
    }
}

#[test]
fn failure_names_what_failed_what_is_done_and_what_was_not_begun() {
    let record = record(&[
        (UpgradeStage::Done, ""),
        (UpgradeStage::Failed, "rolled back"),
        (UpgradeStage::Waiting, ""),
    ]);
    let error = error(&record).unwrap();
    assert_eq!(error.message, "h1: rolled back; done: h0; not begun: h2");
    assert_eq!(error.reason, "HOST_UPGRADE_FAILED");
    assert_eq!(
        findings(&record),
        [
            "h0: nothing to do",
            "h1: failed: rolled back",
            "h2: not begun"
        ]
    );
    let words = progress(&record);
    assert_eq!(words, "1 of 3 hosts done, 1 failed; h1: rolled back");
}

#[test]
fn cancelled_upgrade_that_was_complete_has_no_error() {
    let mut whole = record(&[(UpgradeStage::Done, "")]);
    whole.cancel = true;
    assert_eq!(error(&whole), None);
    let mut part = record(&[(UpgradeStage::Done, ""), (UpgradeStage::Waiting, "")]);
    part.cancel = true;
    assert_eq!(error(&part).unwrap().reason, "CANCELLED");
}

#[test]
fn host_is_well_when_it_is_itself_and_has_no_new_problem() {
    let progress = HostProgress {
        host: "h0".into(),
        ..Default::default()
    };
    let mut seen = Observed {
        host: Some(api::node::HostStatus {
            host_id: "h0".into(),
            ..Default::default()
        }),
        connected: true,
        ..Default::default()
    };
    is_host_well(&progress, &seen).unwrap();
    seen.host.as_mut().unwrap().problem = "no KVM".into();
    assert!(is_host_well(&progress, &seen).is_err());
    let as_before = HostProgress {
        problem_before: "no KVM".into(),
        ..progress.clone()
    };
    is_host_well(&as_before, &seen).unwrap();
    seen.connected = false;
    assert!(is_host_well(&as_before, &seen).is_err());
}

#[test]
fn findings_of_a_host_are_shortened_between_characters() {
    assert_eq!(shortened("short"), "short");
    let long = shortened(&format!("a{}", "é".repeat(LONGEST_FINDING)));
    assert_eq!(long.len(), LONGEST_FINDING - 1 + "…".len());
    assert!(long.ends_with("é…"), "{long}");
}
