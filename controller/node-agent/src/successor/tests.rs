//! What an agent says of exchanges; the exchange itself is a test of real processes.

use std::future::{Ready, ready};
use std::os::unix::fs::PermissionsExt as _;

use super::*;

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn successor(&self) -> Arc<Successor> {
        Successor::open(self.dir.path(), Path::new("/bin"), None)
    }

    /// A program that says this when it is asked about itself.
    fn program(&self, probe: &str) -> UpgradeAgentRequest {
        let path = self.dir.path().join("new");
        let text = format!(
            "#!/bin/sh\ncase \"$1\" in\n--version) echo node-agent 2.0.0;;\nprobe) {probe};;\nesac\n"
        );
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        UpgradeAgentRequest {
            upgrade_id: "u1".into(),
            binary: path.display().to_string(),
            protocol: 5,
            ..Default::default()
        }
    }
}

/// A host that may be left alone.
fn idle() -> Ready<Option<String>> {
    ready(None)
}

#[tokio::test]
async fn binary_is_asked_before_anything_is_touched() {
    let place = Place::new();
    let successor = place.successor();
    for (probe, problem) in [
        ("echo node-agent 2.0.0 protocol 7", "upgrade in steps"),
        ("echo node-agent 2.0.0 protocol 3", "upgrade in steps"),
        (
            "echo bad record >&2; exit 1",
            "cannot take over: bad record",
        ),
        ("exit 1", "may be older than this way of upgrading"),
    ] {
        let request = place.program(probe);
        let refused = successor.upgrade(&request, idle()).await.unwrap_err();
        assert!(refused.to_string().contains(problem), "{refused}");
    }
    for (path, problem) in [
        ("/bin/false", "is not node-agent"),
        ("/bin/sleep", "is not node-agent"),
        ("/nowhere", "does not exist"),
    ] {
        let request = UpgradeAgentRequest {
            binary: path.into(),
            ..place.program("exit 0")
        };
        let refused = successor.upgrade(&request, idle()).await.unwrap_err();
        assert!(refused.to_string().contains(problem), "{refused}");
    }
    assert!(!successor.is_leaving());
    assert_eq!(successor.status().state(), AgentUpgradeState::Unspecified);
}

#[tokio::test]
async fn neighbour_is_taken_unless_it_is_only_checked_or_the_host_is_busy() {
    let place = Place::new();
    let successor = place.successor();
    let request = place.program("echo node-agent 2.0.0 protocol 6");
    let only_checked = UpgradeAgentRequest {
        validate_only: true,
        ..request.clone()
    };
    let checked = successor
        .upgrade(&only_checked, ready(Some("a job".into())))
        .await;
    assert_eq!(checked.unwrap().state(), AgentUpgradeState::Checked);
    let busy = successor
        .upgrade(&request, ready(Some("a job".into())))
        .await;
    assert_eq!(busy.unwrap_err().code(), Code::Unavailable);
    assert!(!successor.is_leaving());
    let begun = successor.upgrade(&request, idle()).await.unwrap();
    assert_eq!(begun.state(), AgentUpgradeState::Exchanging);
    assert_eq!((begun.to_version.as_str(), begun.protocol), ("2.0.0", 6));
    assert!(successor.is_leaving());
    let again = successor.upgrade(&request, idle()).await.unwrap();
    assert_eq!(again.state(), AgentUpgradeState::Exchanging);
    let other = UpgradeAgentRequest {
        upgrade_id: "u2".into(),
        ..request
    };
    let refused = successor.upgrade(&other, idle()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    // Whoever begins on that without a guard was left alone in the middle.
    let next = place.successor().status();
    assert_eq!(next.state(), AgentUpgradeState::RolledBack);
    assert!(next.error.contains("interrupted"), "{}", next.error);
}

#[tokio::test]
async fn nobody_is_confirmed_who_is_not_on_trial() {
    let place = Place::new();
    let refused = place.successor().confirm("u1").unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
}
