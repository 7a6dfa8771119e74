//! Reports of a made-up run, in every form.

use super::*;

/// A storm with everything in it; guests say what they like.
fn storm() -> pb::FaultReport {
    let vm = |name: &str| format!("projects/default/vms/{name}");
    let outages = (0..8).map(|index| {
        let began_ms = 2_000.0 + 3_000.0 * f64::from(index);
        let length = 12.0 * f64::from(index + 1);
        pb::Outage {
            began_ms,
            ended_ms: began_ms + length,
            cause: "hung up".into(),
            fault: "kill".into(),
            replayed_ms: began_ms + length - 3.0,
            in_flight: 32,
        }
    });
    let outages: Vec<pb::Outage> = outages.collect();
    let device = |vm_name: &str, device: &str, targeted| pb::DeviceReport {
        vm: vm(vm_name),
        device: device.into(),
        r#type: "blk".into(),
        targeted,
        ..Default::default()
    };
    let samples = (0..120).map(|index| {
        let at_ms = f64::from(index) * 250.0;
        let away = outages
            .iter()
            .any(|outage| (outage.began_ms - at_ms).abs() < 250.0);
        pb::GuestSample {
            at_ms,
            completed: if away {
                900
            } else {
                4_000 + 37 * u64::from(index % 7_u32)
            },
            latency_p50_us: 180.0 + f64::from(index % 5) * 9.0,
            latency_p99_us: if away { 20_000.0 } else { 900.0 },
            latency_max_us: if away { 90_000.0 } else { 2_400.0 },
        }
    });
    let samples: Vec<pb::GuestSample> = samples.collect();
    let marks = outages.iter().enumerate().flat_map(|(index, outage)| {
        let mark = |kind: pb::FaultMarkKind, at_ms| pb::FaultMark {
            at_ms,
            id: if index % 3 == 2 { "slow" } else { "kill" }.into(),
            kind: kind as i32,
            vm: vm("web"),
            device: "root".into(),
            ..Default::default()
        };
        [
            mark(pb::FaultMarkKind::Begin, outage.began_ms - 5.0),
            mark(pb::FaultMarkKind::Hit, outage.began_ms),
            mark(pb::FaultMarkKind::End, outage.began_ms + 1_500.0),
        ]
    });
    let marks: Vec<pb::FaultMark> = marks.collect();
    let bucket = |up_to_ms, count| pb::StallBucket { up_to_ms, count };
    let check = |name: &str, verdict: pb::FaultVerdict, detail: &str| pb::FaultCheck {
        name: name.into(),
        verdict: verdict as i32,
        detail: detail.into(),
    };
    let fault = |id: &str| pb::FaultInjection {
        id: id.into(),
        ..Default::default()
    };
    pb::FaultReport {
        experiment: Some(pb::FaultExperiment {
            name: "projects/default/faultExperiments/storm-1".into(),
            spec: Some(pb::FaultExperimentSpec {
                description: "Kills & slow requests <while> the guest works.".into(),
                seed: 42,
                faults: vec![fault("kill"), fault("slow")],
                source: "name: storm\nduration: 30s\n".into(),
                ..Default::default()
            }),
            status: Some(pb::FaultExperimentStatus {
                state: pb::FaultExperimentState::Done as i32,
                verdict: pb::FaultVerdict::Fail as i32,
                elapsed_ms: 30_000,
                hits: vec![pb::FaultHits {
                    id: "kill".into(),
                    begun: 8,
                    seen: 8,
                    hits: 8,
                    ..Default::default()
                }],
                ..Default::default()
            }),
            ..Default::default()
        }),
        replay: "vmctl fault run --again storm-1 --seed 42".into(),
        checks: vec![
            check("hits", pb::FaultVerdict::Pass, "kill: 8 hits"),
            check(
                "oracle",
                pb::FaultVerdict::Fail,
                "vda of web: 1 lost; block 9 \"old\"",
            ),
            check(
                "stall max",
                pb::FaultVerdict::Inconclusive,
                "nothing was measured",
            ),
        ],
        marks,
        devices: vec![
            pb::DeviceReport {
                outages,
                restarts: 8,
                ..device("web", "root", true)
            },
            device("web", "data", true),
            device("web", "nic0", false),
            device("db", "root", false),
            pb::DeviceReport {
                touched: "1 outages".into(),
                ..device("db", "nic0", false)
            },
        ],
        guests: vec![pb::GuestReport {
            vm: vm("web"),
            device: "vda".into(),
            finished: true,
            writes: 120_000,
            flushes: 900,
            reads: 80_000,
            lost: 1,
            samples,
            findings: vec!["<script>alert(1)</script>".into()],
            ..Default::default()
        }],
        stalls: Some(pb::StallSummary {
            count: 8,
            p50_ms: 48.0,
            p99_ms: 96.0,
            max_ms: 96.0,
            buckets: vec![bucket(20.0, 1), bucket(50.0, 3), bucket(100.0, 4)],
        }),
        recoveries: Some(pb::StallSummary {
            count: 8,
            p50_ms: 45.0,
            p99_ms: 93.0,
            max_ms: 93.0,
            buckets: Vec::new(),
        }),
        stalls_from: "devices".into(),
        controller_version: "0.1.0".into(),
        probes: vec![pb::ProbeLook {
            at_ms: 1_000.0,
            id: "vm-runs".into(),
            holds: true,
            ..Default::default()
        }],
    }
}

#[test]
fn text_says_verdict_seed_replay_and_what_was_wrong() {
    let text = terminal(&storm(), false);
    for words in [
        "storm-1: FAIL",
        "42",
        "vmctl fault run --again storm-1 --seed 42",
        "p50 48 ms, p99 96 ms, max 96 ms of 8 (by devices)",
        "fail         oracle",
        "inconclusive stall max",
        "db/nic0                 TOUCHED",
        "web/vda                 120000 writes",
    ] {
        assert!(text.contains(words), "{words:?} is not in\n{text}");
    }
    assert!(!text.contains('\x1b'));
    assert!(terminal(&storm(), true).contains("\x1b[31m"));
}

#[test]
fn junit_counts_what_showed_nothing_as_an_error() {
    let xml = junit(&storm());
    assert!(
        xml.contains("tests=\"3\" failures=\"1\" errors=\"1\" time=\"30.000\""),
        "{xml}"
    );
    assert!(xml.contains("block 9 &quot;old&quot;"), "{xml}");
    assert!(
        xml.contains("<property name=\"seed\" value=\"42\"/>"),
        "{xml}"
    );
    assert_eq!(xml.matches("<testcase").count(), 3);
}

#[test]
fn a_page_needs_nothing_from_elsewhere_and_trusts_no_guest() {
    let page = html(&storm());
    for forbidden in [
        "<script", "http://", "https://", "url(", "src=", "@import", "<link",
    ] {
        let without_namespace = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!without_namespace.contains(forbidden), "{forbidden}");
    }
    assert!(page.contains("&lt;script&gt;alert(1)"));
    assert!(page.contains("Kills &amp; slow requests &lt;while&gt;"));
}

#[test]
fn a_page_has_all_plots() {
    let page = html(&storm());
    for id in ["timeline", "histogram", "matrix"] {
        assert!(page.contains(&format!("<svg id=\"{id}\"")), "{id}");
    }
    assert_eq!(
        page.matches("<title>root of web for").count(),
        8,
        "an area for each outage"
    );
    assert_eq!(page.matches("class=\"hit\"").count(), 8);
    assert_eq!(page.matches("class=\"bar\"").count(), 3);
    assert_eq!(page.matches("class=\"cell ").count(), 5);
    assert_eq!(page.matches("class=\"cell touched\"").count(), 1);
}

#[test]
fn a_run_of_which_nothing_is_known_has_a_report_too() {
    let empty = pb::FaultReport::default();
    assert!(html(&empty).contains("no stall was measured"));
    assert!(junit(&empty).contains("tests=\"0\""));
    assert!(terminal(&empty, false).contains("CHECKS"));
}

#[test]
fn figures_no_plot_can_show_are_drawn_within_it() {
    let mut report = storm();
    report.guests[0].samples[3].latency_max_us = f64::MAX;
    report.guests[0].samples[4].latency_p50_us = f64::MIN_POSITIVE;
    report.marks[0].at_ms = -1e300;
    let page = html(&report);
    assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
}

/// Shows a page in a real browser and looks at what it painted.
#[test]
fn a_browser_draws_the_plots() {
    let Some(browser) = std::env::var_os("MORTISE_CHROMIUM") else {
        eprintln!("skipped: no browser; `cargo lab test` has one");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (page, picture) = (
        dir.path().join("report.html"),
        dir.path().join("report.png"),
    );
    std::fs::write(&page, html(&storm())).unwrap();
    let run = |what: &str| {
        let output = std::process::Command::new(&browser)
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
            ])
            .args([
                "--no-first-run",
                "--disable-dev-shm-usage",
                "--window-size=1200,2100",
            ])
            .arg(format!(
                "--user-data-dir={}",
                dir.path().join("profile").display()
            ))
            .arg(what)
            .arg(format!("file://{}", page.display()))
            .env("HOME", dir.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    // What the browser made of it: an element that it did not understand would not be an SVG's.
    let document = run("--dump-dom");
    for id in ["timeline", "histogram", "matrix"] {
        assert!(document.contains(&format!("<svg id=\"{id}\"")), "{id}");
    }
    run(&format!("--screenshot={}", picture.display()));
    let painted = pixels(&std::fs::read(&picture).unwrap());
    // Lines, bars, areas and cells have colours that the page has nowhere else.
    for (what, colour) in [
        ("the line of p50 or a bar", [0x00, 0x72, 0xb2]),
        ("the line of p99", [0xe6, 0x9f, 0x00]),
        ("the line of max, and hits", [0xd5, 0x5e, 0x00]),
        ("throughput", [0x00, 0x9e, 0x73]),
    ] {
        let near = painted.iter().filter(|pixel| {
            pixel
                .iter()
                .zip(colour)
                .all(|(is, wanted)| is.abs_diff(wanted) <= 24)
        });
        let near = near.count();
        assert!(near > 150, "{what}: {near} pixels");
    }
    if let Some(keep) = std::env::var_os("MORTISE_KEEP_SCREENSHOT") {
        std::fs::copy(&picture, keep).unwrap();
    }
}

/// Red, green and blue of each pixel of a PNG as browsers write them: 8 bits, with or without alpha.
fn pixels(png: &[u8]) -> Vec<[u8; 3]> {
    assert_eq!(&png[..8], b"\x89PNG\r\n\x1a\n");
    let (mut at, mut packed) = (8, Vec::new());
    let (mut width, mut channels) = (0, 0);
    while at + 8 <= png.len() {
        let len = u32::from_be_bytes(png[at..at + 4].try_into().unwrap()) as usize;
        let (kind, data) = (&png[at + 4..at + 8], &png[at + 8..at + 8 + len]);
        match kind {
            b"IHDR" => {
                width = u32::from_be_bytes(data[..4].try_into().unwrap()) as usize;
                channels = if data[9] == 6 { 4 } else { 3 };
                assert_eq!(data[8], 8, "8 bits a channel");
            }
            b"IDAT" => packed.extend_from_slice(data),
            _ => {}
        }
        at += len + 12;
    }
    let raw = miniz_oxide::inflate::decompress_to_vec_zlib(&packed).unwrap();
    let stride = width * channels;
    let mut above = vec![0u8; stride];
    let mut found = Vec::new();
    for line in raw.chunks_exact(stride + 1) {
        let mut row = line[1..].to_vec();
        for index in 0..stride {
            let left = if index >= channels {
                row[index - channels]
            } else {
                0
            };
            let corner = if index >= channels {
                above[index - channels]
            } else {
                0
            };
            let up = above[index];
            let guess = match line[0] {
                0 => 0,
                1 => left,
                2 => up,
                3 => ((u16::from(left) + u16::from(up)) / 2) as u8,
                _ => paeth(left, up, corner),
            };
            row[index] = row[index].wrapping_add(guess);
        }
        found.extend(
            row.chunks_exact(channels)
                .map(|pixel| [pixel[0], pixel[1], pixel[2]]),
        );
        above = row;
    }
    found
}

/// PNG's fourth filter.
fn paeth(left: u8, up: u8, corner: u8) -> u8 {
    let guess = i16::from(left) + i16::from(up) - i16::from(corner);
    let far = |value: u8| (guess - i16::from(value)).abs();
    match () {
        () if far(left) <= far(up) && far(left) <= far(corner) => left,
        () if far(up) <= far(corner) => up,
        () => corner,
    }
}
