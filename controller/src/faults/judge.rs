//! The verdict: a pure function of what was seen.
//!
//! A check fails when something is shown to be wrong, and is inconclusive when nothing was shown. The
//! worst check is the verdict: one failure fails the run, else one inconclusive check leaves it open.

use api::controller::{
    DeviceReport, FaultCheck, FaultExpectations, FaultExperimentSpec, FaultHits, FaultVerdict,
    GuestReport, StallBucket, StallSummary,
};

/// Bounds of a histogram of stalls, in milliseconds: three for each power of ten.
const BOUNDS_MS: [f64; 18] = [
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    20.0,
    50.0,
    100.0,
    200.0,
    500.0,
    1e3,
    2e3,
    5e3,
    1e4,
    1e5,
    f64::MAX,
];

/// What a run showed.
pub(crate) struct Evidence<'a> {
    pub(crate) spec: &'a FaultExperimentSpec,
    pub(crate) hits: &'a [FaultHits],
    pub(crate) devices: &'a [DeviceReport],
    pub(crate) guests: &'a [GuestReport],
    pub(crate) stalls: &'a StallSummary,
    pub(crate) recoveries: &'a StallSummary,
    /// Probes that did not hold: id and the first words.
    pub(crate) broken_probes: &'a [(String, String)],
    /// VMs that are targets and did not stay up, in words.
    pub(crate) vm_troubles: &'a [String],
    /// Why it was ended before its time.
    pub(crate) stopped: Option<&'a str>,
    /// VMs that had to verify something.
    pub(crate) target_vms: usize,
}

/// All checks, and the verdict.
pub(crate) fn judge(evidence: &Evidence) -> (Vec<FaultCheck>, FaultVerdict) {
    let expect = evidence.spec.expect.clone().unwrap_or_default();
    let mut checks = Vec::new();
    if let Some(reason) = evidence.stopped {
        checks.push(open("complete", format!("ended early: {reason}")));
    }
    checks.extend(evidence.hits.iter().map(|hits| check_hits(hits, &expect)));
    // What was away before anything was done is not the faults' doing.
    if evidence.hits.iter().any(|hits| hits.begun > 0) {
        checks.push(check_recovered(evidence));
    }
    checks.extend(check_oracle(evidence, &expect));
    checks.extend(check_guest_errors(evidence, &expect));
    let limits = [
        ("stall p99", expect.stall_p99_ms, evidence.stalls, false),
        ("stall max", expect.stall_max_ms, evidence.stalls, true),
        (
            "recovery p99",
            expect.recovery_p99_ms,
            evidence.recoveries,
            false,
        ),
        (
            "recovery max",
            expect.recovery_max_ms,
            evidence.recoveries,
            true,
        ),
    ];
    for (name, limit_ms, summary, max) in limits {
        checks.extend(limit_ms.map(|limit_ms| check_limit(name, limit_ms, summary, max)));
    }
    if !expect.others_may_be_touched {
        checks.push(check_others(evidence.devices));
    }
    for (id, detail) in evidence.broken_probes {
        checks.push(wrong("probe", format!("{id}: {detail}")));
    }
    let verdict = worst(&checks);
    (checks, verdict)
}

fn worst(checks: &[FaultCheck]) -> FaultVerdict {
    let any = |verdict| checks.iter().any(|check| check.verdict() == verdict);
    if any(FaultVerdict::Fail) {
        FaultVerdict::Fail
    } else if any(FaultVerdict::Inconclusive) {
        FaultVerdict::Inconclusive
    } else {
        FaultVerdict::Pass
    }
}

fn check_hits(hits: &FaultHits, expect: &FaultExpectations) -> FaultCheck {
    let own = expect.min_hits_of.get(&hits.id).copied();
    // Without a hit nothing was shown, whatever was asked for.
    let least = own.unwrap_or(expect.min_hits).max(1);
    let words = format!(
        "{}: {} hits, begun {} times, at least {least} hits wanted",
        hits.id, hits.hits, hits.begun
    );
    match hits.hits >= least {
        true => right("hits", words),
        false if hits.problem.is_empty() => open("hits", words),
        false => open("hits", format!("{words}; {}", hits.problem)),
    }
}

fn check_recovered(evidence: &Evidence) -> FaultCheck {
    const NAME: &str = "recovered";
    let mut away = Vec::new();
    let targets = evidence.devices.iter().filter(|device| device.targeted);
    for device in targets {
        let last = device.samples.last();
        let lasting = device.outages.iter().any(|outage| outage.ended_ms == 0.0);
        if lasting || last.is_some_and(|sample| !sample.connected) {
            away.push(format!("{} of {}", device.device, device.vm));
        }
    }
    away.extend(evidence.vm_troubles.iter().cloned());
    match away.is_empty() {
        true => right(NAME, "every target serves again".into()),
        false => wrong(NAME, format!("at the end: {}", away.join(", "))),
    }
}

/// What the guests' verifiers found counts whether or not it was asked for.
fn check_oracle(evidence: &Evidence, expect: &FaultExpectations) -> Option<FaultCheck> {
    const NAME: &str = "oracle";
    let guests = evidence.guests;
    let wrong_blocks = |guest: &GuestReport| {
        guest.lost + guest.torn + guest.misplaced + guest.foreign + guest.unanswered
    };
    if let Some(guest) = guests.iter().find(|guest| wrong_blocks(guest) > 0) {
        let first = guest.findings.first().map(String::as_str);
        return Some(wrong(
            NAME,
            format!(
                "{} of {}: {} lost, {} torn, {} misplaced, {} foreign, {} unanswered; {}",
                guest.device,
                guest.vm,
                guest.lost,
                guest.torn,
                guest.misplaced,
                guest.foreign,
                guest.unanswered,
                first.unwrap_or("no details"),
            ),
        ));
    }
    if !expect.oracle {
        return None;
    }
    let silent = evidence.target_vms.saturating_sub(vms_heard(guests));
    Some(if guests.is_empty() || silent > 0 {
        open(
            NAME,
            format!("no verifier was heard in {} VMs", silent.max(1)),
        )
    } else if let Some(guest) = guests.iter().find(|guest| !guest.finished) {
        let words = "did not say its last word in time; raise settle, or let it end earlier";
        open(
            NAME,
            format!("the verifier of {} in {} {words}", guest.device, guest.vm),
        )
    } else {
        let writes: u64 = guests.iter().map(|guest| guest.writes).sum();
        let reads: u64 = guests.iter().map(|guest| guest.reads).sum();
        match writes.min(reads) {
            0 => open(NAME, "the verifiers did nothing".into()),
            _ => right(
                NAME,
                format!(
                    "{writes} acknowledged writes, {reads} blocks read and compared, all as promised"
                ),
            ),
        }
    })
}

fn vms_heard(guests: &[GuestReport]) -> usize {
    let vms: std::collections::BTreeSet<&str> =
        guests.iter().map(|guest| guest.vm.as_str()).collect();
    vms.len()
}

fn check_guest_errors(evidence: &Evidence, expect: &FaultExpectations) -> Option<FaultCheck> {
    let most = expect.max_guest_errors?;
    let targets = evidence.devices.iter().filter(|device| device.targeted);
    let by_devices: u64 = targets.map(|device| device.errors).sum();
    let by_guests: u64 = evidence.guests.iter().map(|guest| guest.errors).sum();
    // Both count the same requests, where both look.
    let errors = by_devices.max(by_guests);
    let words = format!("{errors} requests failed in guests, at most {most} may");
    Some(match errors <= most {
        true => right("guest errors", words),
        false => wrong("guest errors", words),
    })
}

fn check_limit(name: &str, limit_ms: u32, summary: &StallSummary, max: bool) -> FaultCheck {
    let found_ms = if max { summary.max_ms } else { summary.p99_ms };
    let words = format!(
        "{found_ms:.1} ms of {} measured, at most {limit_ms} ms wanted",
        summary.count
    );
    match summary.count {
        0 => open(name, "nothing was measured".into()),
        _ if found_ms <= f64::from(limit_ms) => right(name, words),
        _ => wrong(name, words),
    }
}

fn check_others(devices: &[DeviceReport]) -> FaultCheck {
    const NAME: &str = "others";
    let touched: Vec<String> = devices
        .iter()
        .filter(|device| !device.touched.is_empty())
        .map(|device| format!("{} of {}: {}", device.device, device.vm, device.touched))
        .collect();
    let others = devices.iter().filter(|device| !device.targeted).count();
    match touched.is_empty() {
        true => right(NAME, format!("{others} other devices, none touched")),
        false => wrong(NAME, touched.join("; ")),
    }
}

fn right(name: &str, detail: String) -> FaultCheck {
    check(name, FaultVerdict::Pass, detail)
}

fn wrong(name: &str, detail: String) -> FaultCheck {
    check(name, FaultVerdict::Fail, detail)
}

fn open(name: &str, detail: String) -> FaultCheck {
    check(name, FaultVerdict::Inconclusive, detail)
}

fn check(name: &str, verdict: FaultVerdict, detail: String) -> FaultCheck {
    FaultCheck {
        name: name.to_owned(),
        verdict: verdict as i32,
        detail,
    }
}

/// Times in milliseconds, summed up.
pub(crate) fn summarise(mut times_ms: Vec<f64>) -> StallSummary {
    times_ms.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let rank = (times_ms.len() as f64 * share).ceil() as usize;
        times_ms.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
    };
    let mut buckets = Vec::new();
    let mut from = 0;
    for bound in BOUNDS_MS {
        let to = times_ms.partition_point(|time| *time <= bound);
        if to > from || (!buckets.is_empty() && to < times_ms.len()) {
            buckets.push(StallBucket {
                up_to_ms: bound,
                count: (to - from) as u64,
            });
        }
        from = to;
    }
    StallSummary {
        count: times_ms.len() as u64,
        p50_ms: at(0.5),
        p99_ms: at(0.99),
        max_ms: times_ms.last().copied().unwrap_or(0.0),
        buckets,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::controller::{DeviceSample, Outage};

    struct Run {
        spec: FaultExperimentSpec,
        hits: Vec<FaultHits>,
        devices: Vec<DeviceReport>,
        guests: Vec<GuestReport>,
        stopped: Option<&'static str>,
        probes: Vec<(String, String)>,
    }

    /// A run that is as it should be.
    fn sound() -> Run {
        let device = |vm: &str, targeted| DeviceReport {
            vm: vm.into(),
            device: "root".into(),
            targeted,
            samples: vec![DeviceSample {
                connected: true,
                ..Default::default()
            }],
            ..Default::default()
        };
        Run {
            spec: FaultExperimentSpec {
                expect: Some(FaultExpectations {
                    oracle: true,
                    max_guest_errors: Some(0),
                    stall_max_ms: Some(100),
                    ..Default::default()
                }),
                ..Default::default()
            },
            hits: vec![FaultHits {
                id: "kill".into(),
                begun: 3,
                hits: 3,
                ..Default::default()
            }],
            devices: vec![device("web", true), device("db", false)],
            guests: vec![GuestReport {
                vm: "web".into(),
                device: "vda".into(),
                finished: true,
                writes: 10,
                reads: 10,
                ..Default::default()
            }],
            stopped: None,
            probes: Vec::new(),
        }
    }

    fn verdict(change: impl FnOnce(&mut Run)) -> (FaultVerdict, String) {
        let mut run = sound();
        change(&mut run);
        let (checks, verdict) = judge(&Evidence {
            spec: &run.spec,
            hits: &run.hits,
            devices: &run.devices,
            guests: &run.guests,
            stalls: &summarise(vec![10.0, 50.0]),
            recoveries: &summarise(vec![5.0]),
            broken_probes: &run.probes,
            vm_troubles: &[],
            stopped: run.stopped,
            target_vms: 1,
        });
        let bad = checks.iter().filter(|check| check.verdict() == verdict);
        let names: Vec<&str> = bad.map(|check| check.name.as_str()).collect();
        (verdict, names.join(","))
    }

    #[test]
    fn a_sound_run_passes() {
        assert_eq!(verdict(|_| {}).0, FaultVerdict::Pass);
    }

    #[test]
    fn no_hit_is_inconclusive_and_never_a_pass() {
        let open = |name: &str| (FaultVerdict::Inconclusive, name.to_owned());
        assert_eq!(verdict(|run| run.hits[0].hits = 0), open("hits"));
        let few = |run: &mut Run| {
            let expect = run.spec.expect.as_mut().unwrap();
            expect.min_hits_of.insert("kill".into(), 4);
        };
        assert_eq!(verdict(few), open("hits"));
    }

    #[test]
    fn an_oracle_that_said_nothing_shows_nothing() {
        let open = (FaultVerdict::Inconclusive, "oracle".to_owned());
        assert_eq!(verdict(|run| run.guests.clear()), open);
        assert_eq!(verdict(|run| run.guests[0].finished = false), open);
        assert_eq!(verdict(|run| run.guests[0].reads = 0), open);
    }

    #[test]
    fn a_wrong_byte_fails_even_if_nobody_asked_for_the_oracle() {
        let lost = |run: &mut Run| {
            run.guests[0].lost = 1;
            run.spec.expect.as_mut().unwrap().oracle = false;
        };
        assert_eq!(verdict(lost), (FaultVerdict::Fail, "oracle".to_owned()));
    }

    #[test]
    fn each_thing_that_went_wrong_fails_the_run() {
        let fail = |name: &str| (FaultVerdict::Fail, name.to_owned());
        assert_eq!(
            verdict(|run| run.guests[0].errors = 1),
            fail("guest errors")
        );
        assert_eq!(
            verdict(|run| run.spec.expect.as_mut().unwrap().stall_max_ms = Some(40)),
            fail("stall max")
        );
        assert_eq!(
            verdict(|run| run.devices[1].touched = "1 outages".into()),
            fail("others")
        );
        assert_eq!(
            verdict(|run| run.devices[0].outages = vec![Outage::default()]),
            fail("recovered")
        );
        assert_eq!(
            verdict(|run| run.probes = vec![("vm".into(), "is off".into())]),
            fail("probe")
        );
    }

    #[test]
    fn a_run_that_was_stopped_never_passes() {
        let stopped = verdict(|run| run.stopped = Some("somebody said so"));
        assert_eq!(stopped, (FaultVerdict::Inconclusive, "complete".into()));
    }

    #[test]
    fn what_was_away_before_anything_was_done_is_no_failure() {
        let away = |run: &mut Run| {
            run.hits[0].begun = 0;
            run.hits[0].hits = 0;
            run.stopped = Some("a probe of the start did not hold");
            run.devices[0].samples[0].connected = false;
        };
        assert_eq!(verdict(away).0, FaultVerdict::Inconclusive);
    }

    #[test]
    fn failure_outweighs_what_is_open() {
        let both = |run: &mut Run| {
            run.hits[0].hits = 0;
            run.guests[0].torn = 1;
        };
        assert_eq!(verdict(both).0, FaultVerdict::Fail);
    }

    #[test]
    fn percentiles_and_buckets_have_every_time() {
        let summary = summarise((1..=100).map(f64::from).collect());
        assert_eq!(
            (summary.p50_ms, summary.p99_ms, summary.max_ms),
            (50.0, 99.0, 100.0)
        );
        let counts: u64 = summary.buckets.iter().map(|bucket| bucket.count).sum();
        assert_eq!(counts, 100);
        assert_eq!(summarise(Vec::new()), StallSummary::default());
    }
}
