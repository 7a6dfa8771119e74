use api::boottime;
use api::device::NetLimit;

use super::*;

const SECOND: u64 = 1_000_000_000;

fn guard() -> Guard {
    Guard::new("52:54:00:12:34:56".parse().expect("a MAC"))
}

fn packets(packets_per_second: u64, burst_packets: u64) -> NetLimits {
    NetLimits {
        ingress: None,
        egress: Some(NetLimit {
            packets_per_second,
            burst_packets,
            ..NetLimit::default()
        }),
    }
}

/// Frames of this length that go until `until_ns`, by somebody who asks when he is told to.
fn run(limiter: &Limiter, len_bytes: usize, mut now_ns: u64, until_ns: u64) -> u64 {
    let mut went = 0;
    while now_ns < until_ns {
        match limiter.admit(Direction::Egress, len_bytes, now_ns) {
            Ok(()) => went += 1,
            Err(at_ns) => {
                assert!(at_ns > now_ns && at_ns <= now_ns + 100_000_000, "{at_ns}");
                now_ns = at_ns;
            }
        }
    }
    went
}

#[test]
fn stricter_of_bits_and_packets_holds() {
    for (limit, len_bytes, expected) in [
        (packets(1000, 10), 64, 10_000),
        (
            NetLimits {
                ingress: None,
                egress: Some(NetLimit {
                    bits_per_second: 8_000_000,
                    packets_per_second: 1_000_000,
                    ..NetLimit::default()
                }),
            },
            1000,
            10_000,
        ),
    ] {
        let limiter = Limiter::default();
        limiter.set(limit, SECOND);
        let went = run(&limiter, len_bytes, SECOND, 11 * SECOND);
        assert!(went.abs_diff(expected) <= 101, "{went} of {expected}");
        assert!(limiter.throttled(Direction::Egress) > 0);
        // The other direction is free.
        assert_eq!(limiter.admit(Direction::Ingress, len_bytes, SECOND), Ok(()));
    }
}

#[test]
fn frame_larger_than_the_burst_goes_and_is_paid_for_afterwards() {
    let limiter = Limiter::default();
    let bits = |bits_per_second, burst_bits| NetLimits {
        ingress: None,
        egress: Some(NetLimit {
            bits_per_second,
            burst_bits,
            ..NetLimit::default()
        }),
    };
    limiter.set(bits(8_000_000, 8_000), SECOND);
    let went = run(&limiter, 65_000, SECOND, 14 * SECOND);
    assert!((198..=202).contains(&went), "{went}");
}

#[test]
fn setting_limits_again_and_again_gives_no_bursts() {
    let limiter = Limiter::default();
    let mut went = 0;
    for step in 0..100 {
        let now_ns = SECOND + step * SECOND / 10;
        limiter.set(packets(100 + step % 2, 50), now_ns);
        went += run(&limiter, 64, now_ns, now_ns + SECOND / 10);
    }
    assert!((900..=1110).contains(&went), "{went}");
    limiter.set(NetLimits::default(), 20 * SECOND);
    assert!(!limiter.is_limited(Direction::Egress));
}

#[test]
fn guard_looks_at_frames_only_while_something_is_set() {
    let guard = Arc::new(guard());
    assert!(!guard.is_active());
    guard.set_limits(packets(1, 1));
    assert!(guard.is_active());
    guard.set_limits(NetLimits::default());
    assert!(!guard.is_active());
    let policy = Policy {
        track_flows: true,
        ..Policy::default()
    };
    guard.set_policy(Some(policy)).unwrap();
    assert!(guard.is_active());
    guard.set_policy(Some(Policy::default())).unwrap();
    assert!(!guard.is_active());
    let captures: Vec<_> = (0..MAX_CAPTURES)
        .map(|_| guard.capture(capture::Request::default(), || {}))
        .collect();
    assert!(captures.iter().all(Option::is_some) && guard.is_active());
    let one_more = guard.capture(capture::Request::default(), || {});
    assert!(one_more.is_none());
    drop(captures);
    assert!(!guard.is_active());
}

#[test]
fn frames_that_cannot_wait_are_dropped_and_counted() {
    let guard = guard();
    guard.set_limits(packets(1, 1));
    let now_ns = monotonic_ns();
    let went = (0..10).filter(|_| guard.police(Direction::Egress, 64, now_ns).is_ok());
    assert!(went.count() <= 2);
    let drops: Vec<_> = guard.drops(Direction::Egress).collect();
    assert_eq!(drops.len(), 1);
    assert!(drops[0].0 == "rate_limit" && drops[0].1 >= 8, "{drops:?}");
    assert_eq!(guard.drops(Direction::Ingress).count(), 0);
}

#[test]
fn policy_that_cannot_be_understood_changes_nothing() {
    let guard = guard();
    let sound = Policy {
        anti_spoofing: Some(api::device::AntiSpoofing::default()),
        ..Policy::default()
    };
    guard.set_policy(Some(sound.clone())).unwrap();
    let broken = Policy {
        anti_spoofing: Some(api::device::AntiSpoofing {
            addresses: vec!["nowhere".into()],
            ..Default::default()
        }),
        ..Policy::default()
    };
    let error = guard.set_policy(Some(broken)).unwrap_err();
    assert!(error.to_string().contains("nowhere"), "{error}");
    assert_eq!(guard.policy(), Some(sound));
    assert!(guard.is_active());
}

#[test]
fn frames_are_dropped_both_ways_while_the_lease_is_over() {
    let guard = guard();
    let frame = Frame {
        head: &[0xff; 64],
        bytes: &&[0xff; 64][..],
        len_bytes: 64,
        checksum_at: None,
    };
    assert!(!guard.is_leased());
    guard.lease(u64::MAX);
    assert!(guard.is_leased() && !guard.is_active());
    guard.lease(0);
    assert!(guard.is_active() && guard.is_over());
    for direction in Direction::ALL {
        let dropped = guard.check(direction, &frame, SECOND);
        assert_eq!(dropped, Err(DropReason::LeaseEnded));
        let drops: Vec<_> = guard.drops(direction).collect();
        assert_eq!(drops, [("lease_ended", 1)]);
        // One that was looked at before waits.
        assert!(guard.admit(direction, 64, SECOND).is_err());
    }
    let soon = boottime::now_ns() + SECOND;
    guard.extend_lease(soon);
    assert!(!guard.is_active());
    guard.extend_lease(0);
    assert!(!guard.is_over(), "it is never shortened");
    assert_eq!(guard.check(Direction::Ingress, &frame, SECOND), Ok(()));
}
