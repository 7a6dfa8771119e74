//! Unit tests of [`super`].

use serde_json::{Value, json};

use super::*;

fn spec(verdict: Verdict) -> RowSpec {
    RowSpec {
        case: "file-odirect/randread-4k/qd32".into(),
        unit: "iops",
        better: Better::Higher,
        verdict,
        ..RowSpec::default()
    }
}

fn limit(values: &[f64]) -> Series {
    Series {
        name: "raw-io_uring".into(),
        values: values.to_vec(),
    }
}

fn against_limit(value: f64) -> Verdict {
    Verdict::Target {
        value,
        peer: Some("raw-io_uring".into()),
    }
}

#[test]
fn median_is_the_middle() {
    assert_eq!(median(&[]), None);
    assert_eq!(median(&[3.0]), Some(3.0));
    assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
    assert_eq!(median(&[9.0, 1.0, 2.0, 4.0]), Some(3.0));
}

#[test]
fn ratio_is_taken_within_rounds() {
    // The machine was twice as fast in the second round. The ratio of the medians would be 1.5.
    let peers = [limit(&[100.0, 200.0, 100.0])];
    let ours = [100.0, 200.0, 150.0];
    let row = Row::new(&spec(against_limit(1.0)), &ours, &peers, &[0.0; 3]);
    assert_eq!(row.ratio["raw-io_uring"], 1.0);
    let ours = row.ours.unwrap();
    assert_eq!((ours.min, ours.median, ours.max), (100.0, 150.0, 200.0));
}

#[test]
fn row_has_the_shape_that_programs_read() {
    let peers = [limit(&[100.0, 200.0])];
    let row = Row::new(
        &spec(against_limit(1.25)),
        &[125.0, 250.0],
        &peers,
        &[0.01, 0.2],
    );
    let expected = json!({
        "case": "file-odirect/randread-4k/qd32", "unit": "iops", "better": "higher",
        "ours": {"min": 125.0, "median": 187.5, "max": 250.0},
        "peers": {"raw-io_uring": {"min": 100.0, "median": 150.0, "max": 200.0}},
        "ratio": {"raw-io_uring": 1.25},
        "foreign_cpu": 0.105, "rounds": 2, "noisy_rounds": 1,
        "target": 1.25, "target_peer": "raw-io_uring", "met": true,
    });
    assert_eq!(serde_json::to_value(&row).unwrap(), expected);
}

#[test]
fn target_without_peer_is_held_against_our_median() {
    let verdict = Verdict::Target {
        value: 4.5,
        peer: None,
    };
    let spec = RowSpec {
        better: Better::Lower,
        ..spec(verdict)
    };
    let judged = |ours: f64| serde_json::to_value(Row::new(&spec, &[ours], &[], &[0.0])).unwrap();
    assert_eq!(judged(4.5)["met"], Value::Bool(true));
    assert_eq!(judged(4.6)["met"], Value::Bool(false));
    assert_eq!(judged(4.5)["target_peer"], Value::Null);
}

#[test]
fn row_without_target_says_so() {
    let row = serde_json::to_value(Row::new(&spec(Verdict::Info), &[1.0], &[], &[0.0])).unwrap();
    assert_eq!(row["info"], Value::Bool(true));
    assert!(row.get("met").is_none() && row.get("target").is_none());
}

#[test]
fn failed_case_meets_no_target() {
    let row = Row::failed(&spec(against_limit(0.1)), "no such disk");
    let json = serde_json::to_value(&row).unwrap();
    assert_eq!(
        (&json["met"], &json["ours"]),
        (&Value::Bool(false), &Value::Null)
    );
    assert!(row.summary().contains("no such disk"));
}

#[test]
fn table_has_a_line_for_each_row_and_a_sum() {
    let mut report = Report::new("blk", Some("a machine".into()));
    let peers = [limit(&[2000.0])];
    for target in [0.5, 2.0] {
        let spec = spec(against_limit(target));
        report
            .rows
            .push(Row::new(&spec, &[2500.0], &peers, &[0.01]));
    }
    let text = report.to_string();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert!(lines[1].contains("2.5k") && lines[1].contains("1.25") && lines[1].contains("yes"));
    assert!(lines[2].contains(">= 2") && lines[2].contains("NO"));
    assert!(lines[3].starts_with("1 of 2 targets met"), "{text}");
}
