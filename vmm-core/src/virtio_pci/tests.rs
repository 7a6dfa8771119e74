//! The transport, driven as a guest drives it, with backends that work, die and lie.

mod backends;
mod guest;

use std::sync::atomic::Ordering;
use std::time::Duration;

use vhost_user::frontend::Timeouts;

use self::backends::{Echo, kill, listen, serve};
use self::guest::{Driver, Guest, TIMEOUTS, wait_until};
use super::AttachError;

/// A device number without a driver anywhere, so that nothing here depends on a device type.
const TYPE: &str = "type=42,config-size=16";

#[test]
fn request_is_served_and_raises_the_queues_interrupt() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, socket) = listen(directory.path());
    let echo = Echo::new();
    let _server = serve(&listener, &echo);
    let guest = Guest::attach(TYPE, &socket, TIMEOUTS).unwrap();
    let mut driver = guest.drive();
    for round in 0..20u8 {
        let payload = [round; 100];
        let head = driver.submit(&payload);
        assert_eq!(
            driver.complete(head, payload.len()),
            payload,
            "round {round}"
        );
    }
    let health = guest.device.health();
    assert!(
        health.connected && health.driver_ok && health.inflight_tracking,
        "{health:?}"
    );
    assert_eq!((health.incarnations, health.last_error.as_str()), (1, ""));
}
