//! Rate limits, latencies and the log of slow requests.

use std::time::{Duration, Instant};

use api::device::{RateLimit, RateLimits, SetLimitsRequest};
use tonic::Code;

use crate::control::Manager;
use crate::daemon::{Daemon, Place, await_true};
use crate::driver::{Client, all_features};

/// A daemon with one disk `a` and these options, and its manager.
fn limited(options: &str) -> (Daemon, Manager) {
    let place = Place::new();
    place.image("a.img", 64 << 10);
    let daemon = Daemon::start(&place, &[&format!("{},{options}", place.disk("a"))]);
    (daemon, Manager::of(place))
}

fn set_limits(manager: &mut Manager, limits: RateLimits) {
    let request = SetLimitsRequest {
        id: "a".into(),
        limits: Some(limits),
    };
    let device = manager
        .disks(async |disks| disks.set_limits(request).await)
        .unwrap();
    assert_eq!(device.blk.unwrap().limits, Some(limits));
}

/// Does `count` requests of `len` bytes, `depth` at a time; how long they took.
fn time(client: &mut Client, write: bool, count: usize, depth: usize, len: usize) -> Duration {
    let began = Instant::now();
    let mut sent = 0;
    for done in 0..count {
        while sent < count && sent - done < depth {
            let offset = (sent % 64 * len) as u64;
            if write {
                client.submit_write(0, offset, 0, len, sent);
            } else {
                client.submit_read(0, offset, sent % depth * len, len, sent);
            }
            sent += 1;
        }
        client.kick(0);
        assert_eq!(client.completion(0).1, 0);
    }
    began.elapsed()
}

/// At least what the limit says, and not for ever.
fn assert_about(took: Duration, seconds: f64, what: &str) {
    let took = took.as_secs_f64();
    assert!(
        took >= seconds * 0.95 && took <= seconds * 2.0 + 1.0,
        "{what}: {took:.3} s for {seconds:.3} s"
    );
}

#[test]
fn requests_a_second_hold_for_each_direction() {
    let (_daemon, mut manager) = limited("write-iops=200,write-iops-burst=20,read-iops=500");
    let mut client = Client::connect(&manager.place.socket("a"));
    assert_about(time(&mut client, true, 180, 16, 4096), 0.8, "writes");
    let began = Instant::now();
    let reads = time(&mut client, false, 500, 16, 4096);
    assert!(
        reads < Duration::from_secs(5),
        "the burst of reads: {reads:?}"
    );
    time(&mut client, false, 300, 1, 4096);
    // From the burst's begin on: what is unused during it is there afterwards.
    assert_about(began.elapsed(), 0.6, "reads");
    let stats = manager.get("a").blk.unwrap();
    assert!(stats.throttled > 100, "{}", stats.throttled);
    assert_eq!(stats.errors, 0);
}

#[test]
fn bytes_a_second_hold_for_large_requests() {
    let (_daemon, manager) = limited("read-bps=8M,read-bps-burst=1M");
    let mut client = Client::connect(&manager.place.socket("a"));
    let took = time(&mut client, false, 9 * 16 - 64, 8, 64 << 10);
    assert_about(took, 0.5, "5 MiB at 8 MiB/s with 1 MiB at once");
    // What was unused in between may be one burst.
    let took = time(&mut client, false, 3, 1, 1 << 20);
    assert_about(took, 0.25, "above the burst");
}

#[test]
fn writes_that_wait_do_not_hold_up_reads() {
    let (_daemon, manager) = limited("write-iops=1,write-iops-burst=1");
    let mut client = Client::connect(&manager.place.socket("a"));
    for id in 0..4 {
        client.submit_write(0, 0, 0, 4096, 1000 + id);
    }
    for id in 0..500 {
        client.submit_read(0, 0, 4096, 512, id);
        client.kick(0);
        let (mut done, mut result) = client.completion(0);
        while done >= 1000 {
            (done, result) = client.completion(0);
        }
        assert_eq!((done, result), (id, 0));
    }
}

#[test]
fn changed_limits_hold_at_once_also_for_what_waits() {
    let (_daemon, mut manager) = limited("write-iops=1,write-iops-burst=1");
    let mut client = Client::connect(&manager.place.socket("a"));
    for id in 0..40 {
        client.submit_write(0, 0, 0, 4096, id);
    }
    client.kick(0);
    assert_eq!(client.completion(0).1, 0);
    let began = Instant::now();
    set_limits(&mut manager, RateLimits::default());
    for _ in 0..39 {
        assert_eq!(client.completion(0).1, 0);
    }
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    let limits = RateLimits {
        read: None,
        write: Some(RateLimit {
            iops: 100,
            burst_ios: 10,
            ..RateLimit::default()
        }),
    };
    set_limits(&mut manager, limits);
    assert_about(time(&mut client, true, 60, 8, 4096), 0.6, "set again");
    let unknown = SetLimitsRequest {
        id: "b".into(),
        limits: Some(limits),
    };
    let error = manager
        .disks(async |disks| disks.set_limits(unknown).await)
        .unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
}

#[test]
fn queues_share_a_limit_fairly() {
    let (_daemon, manager) = limited("queues=2,write-iops=200,write-iops-burst=4");
    let socket = manager.place.socket("a");
    let mut client = Client::connect_with(&socket, 2, all_features());
    // Queue 0 always has 40 requests waiting, queue 1 twelve.
    for id in 0..40 {
        client.submit_write(0, 0, 0, 4096, id);
    }
    client.kick(0);
    for id in 0..12 {
        client.submit_write(1, 0, 0, 4096, id);
    }
    let mut of_busy = 0;
    for _ in 0..60 {
        client.kick(1);
        assert_eq!(client.completion(1).1, 0);
        client.submit_write(1, 0, 0, 4096, 0);
        while client.poll_completion(0).is_some() {
            of_busy += 1;
            client.submit_write(0, 0, 0, 4096, 0);
        }
        client.kick(0);
    }
    assert!(
        (20..=150).contains(&of_busy),
        "{of_busy} of the busy queue while the other had 60"
    );
}

#[test]
fn detach_does_not_wait_for_limits() {
    let place = Place::new();
    place.image("a.img", 64);
    let daemon = format!("{},write-iops=1,write-iops-burst=1", place.disk("a"));
    let mut daemon = Daemon::start(&place, &[&daemon]);
    let mut client = Client::connect(&place.socket("a"));
    for id in 0..40 {
        client.submit_write(0, 0, 0, 4096, id);
    }
    client.kick(0);
    assert_eq!(client.completion(0).1, 0);
    let mut manager = Manager::of(place);
    await_true("the others wait", || {
        manager.get("a").blk.unwrap().throttled > 0
    });
    let began = Instant::now();
    manager.detach("a").unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(15),
        "{:?}",
        began.elapsed()
    );
    for _ in 0..39 {
        assert_eq!(client.completion(0).1, 0);
    }
    daemon.assert_alive();
}

#[test]
fn slow_requests_are_logged_counted_and_measured() {
    let (daemon, mut manager) = limited("write-iops=5,write-iops-burst=1,slow-ms=100");
    let mut client = Client::connect(&manager.place.socket("a"));
    assert_eq!(client.read(0, 4096).len(), 4096);
    for sector in [0, 8, 16, 24] {
        assert_eq!(client.write(sector * 512, &[1; 4096]), 0);
    }
    assert_eq!(client.write_at(0, 1 << 40, 0, 512), -libc::EIO);
    let stats = manager.get("a").blk.unwrap();
    assert!(
        (2..=4).contains(&stats.slow_requests),
        "{}",
        stats.slow_requests
    );
    assert_eq!(stats.errors_by_op.get("write"), Some(&1));
    let latency = stats.latency.unwrap();
    assert!(latency.count >= 5, "{latency:?}");
    assert!(
        latency.max_us >= 100_000.0 && latency.max_us < 30e6,
        "{latency:?}"
    );
    assert!(latency.p50_us <= latency.p99_us && latency.p99_us <= latency.max_us);
    let log = daemon.log();
    let line = log.lines().find(|line| line.contains("slow request"));
    let line = line.expect("a line about it");
    for part in ["op", "write", "sector", "queue", "ms"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    let metrics = manager.metrics();
    for line in [
        "mortise_blk_request_duration_seconds_count{daemon=\"device-blk\",device=\"a\",queue=\"0\",op=\"write\"} 4",
        "op=\"read\"} 1",
        "mortise_blk_errors_by_op_total{daemon=\"device-blk\",device=\"a\",op=\"write\"} 1",
        "le=\"+Inf\"",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
}
