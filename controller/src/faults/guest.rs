//! What guests say: a follower of a VM's console, and the reports of the verifier in it.
//!
//! A guest is not trusted: its lines are cut, its numbers are numbers, and it can only speak of
//! itself.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api::controller::{GuestReport, GuestSample, StallSummary};
use api::node::ConsoleInput;
use serde_json::Value;
use tokio::task::AbortHandle;
use tokio_stream::StreamExt as _;

use super::scope::Vm;
use super::series::Series;
use crate::hosts::Hosts;

/// Before each report on the console.
const PREFIX: &str = "mortise-guest: ";
/// A report with its first violations.
const MAX_LINE_BYTES: usize = 16 << 10;
/// Lines that are kept for probes that come later.
const MAX_LINES: usize = 512;
/// Verifiers in one guest.
const MAX_REPORTS: usize = 32;
const MAX_FINDINGS: usize = 16;
/// Stalls of one guest; the first ones are kept.
const MAX_STALLS: usize = 20_000;
/// A console that was lost (its VM's host, or the VM, went away) is looked for again.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// Only new output.
const FROM_NOW: u64 = u64::MAX;

/// Follows one VM's console until it is dropped.
pub(crate) struct Listener {
    heard: Arc<Mutex<Heard>>,
    task: AbortHandle,
}

impl Listener {
    /// Listens from now on; `began` is the experiment's start.
    pub(crate) fn new(hosts: Hosts, vm: &Vm, began: Instant) -> Self {
        let heard = Arc::new(Mutex::new(Heard::new(vm.name.clone())));
        let task = tokio::spawn(listen(hosts, vm.clone(), began, heard.clone()));
        Self {
            heard,
            task: task.abort_handle(),
        }
    }

    /// Whether a line had this in it.
    pub(crate) fn said(&self, text: &str) -> bool {
        let heard = self.heard.lock().expect("nobody panics with it");
        heard.lines.iter().any(|line| line.contains(text))
    }

    /// Requests that took longer than a guest should wait, as its verifiers told.
    pub(crate) fn stalls_ms(&self) -> Vec<f64> {
        let heard = self.heard.lock().expect("nobody panics with it");
        heard.stalls_ms.clone()
    }

    /// What its verifiers reported, so far.
    pub(crate) fn reports(&self) -> Vec<GuestReport> {
        let heard = self.heard.lock().expect("nobody panics with it");
        heard.reports.iter().map(Verifier::report).collect()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen(hosts: Hosts, vm: Vm, began: Instant, heard: Arc<Mutex<Heard>>) {
    let mut from_offset = FROM_NOW;
    loop {
        let hello = ConsoleInput {
            vm_id: vm.node_id.clone(),
            data: Vec::new(),
            from_offset,
        };
        // The stream of input stays open, or the console would end.
        let input = tokio_stream::once(hello).chain(tokio_stream::pending());
        if let Some(node) = hosts.get(&vm.host)
            && let Ok(mut output) = node.console(input).await
        {
            while let Some(Ok(message)) = output.next().await {
                from_offset = message.offset + message.data.len() as u64;
                let mut heard = heard.lock().expect("nobody panics with it");
                heard.add(&message.data, began.elapsed());
            }
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

/// What one guest said.
struct Heard {
    vm: String,
    partial: Vec<u8>,
    lines: VecDeque<String>,
    reports: Vec<Verifier>,
    stalls_ms: Vec<f64>,
}

/// One verifier.
struct Verifier {
    report: GuestReport,
    samples: Series<GuestSample>,
}

impl Verifier {
    fn report(&self) -> GuestReport {
        GuestReport {
            samples: self.samples.to_vec(),
            ..self.report.clone()
        }
    }
}

impl Heard {
    fn new(vm: String) -> Self {
        Self {
            vm,
            partial: Vec::new(),
            lines: VecDeque::new(),
            reports: Vec::new(),
            stalls_ms: Vec::new(),
        }
    }

    fn add(&mut self, data: &[u8], at: Duration) {
        for byte in data {
            match byte {
                b'\n' => {
                    let line = String::from_utf8_lossy(&self.partial).trim().to_owned();
                    self.partial.clear();
                    self.line(line, at);
                }
                byte if self.partial.len() < MAX_LINE_BYTES => self.partial.push(*byte),
                _ => {}
            }
        }
    }

    fn line(&mut self, line: String, at: Duration) {
        let report = line.split_once(PREFIX).map(|(_, json)| json);
        if let Some(report) = report.and_then(|json| serde_json::from_str(json).ok()) {
            self.report(&report, at);
        }
        if self.lines.len() == MAX_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    fn report(&mut self, said: &Value, at: Duration) {
        if said["job"] != "oracle" {
            return;
        }
        let device = cut(said["device"].as_str().unwrap_or_default());
        let known = self
            .reports
            .iter()
            .position(|verifier| verifier.report.device == device);
        let index = match known {
            Some(index) => index,
            None if self.reports.len() == MAX_REPORTS => return,
            None => {
                let report = GuestReport {
                    vm: self.vm.clone(),
                    device,
                    ..Default::default()
                };
                self.reports.push(Verifier {
                    report,
                    samples: Series::default(),
                });
                self.reports.len() - 1
            }
        };
        let stalls = said["stalls"].as_array().into_iter().flatten();
        let stalls_us = stalls.filter_map(Value::as_u64);
        let room = MAX_STALLS - self.stalls_ms.len();
        let stalls_ms = stalls_us.map(|us| us as f64 / 1000.0).take(room);
        self.stalls_ms.extend(stalls_ms);
        let verifier = &mut self.reports[index];
        take(&mut verifier.report, said);
        let window = &said["window"];
        if window.is_object() {
            verifier.samples.push(GuestSample {
                at_ms: at.as_secs_f64() * 1000.0,
                completed: number(window, "count"),
                latency_p50_us: figure(window, "p50_us"),
                latency_p99_us: figure(window, "p99_us"),
                latency_max_us: figure(window, "max_us"),
            });
        }
    }
}

/// Takes a verifier's words over.
fn take(report: &mut GuestReport, said: &Value) {
    let summary = &said["summary"];
    report.finished |= said["last"] == true;
    report.writes = number(summary, "writes");
    report.flushes = number(summary, "flushes");
    report.reads = number(summary, "reads");
    report.lost = number(summary, "lost");
    report.torn = number(summary, "torn");
    report.misplaced = number(summary, "misplaced");
    report.foreign = number(summary, "foreign").saturating_add(number(summary, "unasked"));
    report.errors = number(summary, "errors");
    report.unanswered = number(summary, "unanswered");
    let latency = &said["latency"];
    if latency.is_object() {
        report.latency = Some(StallSummary {
            count: number(latency, "count"),
            p50_ms: figure(latency, "p50_us") / 1000.0,
            p99_ms: figure(latency, "p99_us") / 1000.0,
            max_ms: figure(latency, "max_us") / 1000.0,
            buckets: Vec::new(),
        });
    }
    let violations = summary["violations"].as_array();
    let violations = violations.into_iter().flatten().map(Value::to_string);
    let error = said["error"].as_str().map(str::to_owned);
    report.findings = error
        .into_iter()
        .chain(violations)
        .take(MAX_FINDINGS)
        .map(|finding| cut(&finding))
        .collect();
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_default()
}

fn figure(value: &Value, key: &str) -> f64 {
    let figure = value[key].as_f64().unwrap_or_default();
    if figure.is_finite() {
        figure.max(0.0)
    } else {
        0.0
    }
}

/// A guest's words, short and without what a terminal would obey.
fn cut(text: &str) -> String {
    const MAX_CHARS: usize = 200;
    let plain = text.chars().filter(|c| !c.is_control());
    plain.take(MAX_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(text: &str) -> Heard {
        let mut heard = Heard::new("projects/p/vms/web".into());
        // In pieces, as consoles come.
        for piece in text.as_bytes().chunks(7) {
            heard.add(piece, Duration::from_millis(1500));
        }
        heard
    }

    #[test]
    fn a_verifiers_words_become_a_report() {
        let heard = heard(
            "[ 1.0] noise\r\nmortise-guest: {\"job\":\"oracle\",\"device\":\"vda\",\"last\":false,\
             \"summary\":{\"writes\":7,\"flushes\":2,\"reads\":3,\"lost\":0},\
             \"latency\":{\"count\":10,\"p50_us\":1000,\"p99_us\":2000,\"max_us\":30000},\
             \"stalls\":[30000,25000],\"window\":{\"count\":5,\"p50_us\":900,\"p99_us\":2000,\"max_us\":30000}}\r\n",
        );
        let report = heard.reports[0].report();
        assert_eq!((report.writes, report.flushes, report.reads), (7, 2, 3));
        assert!(!report.finished);
        assert_eq!(report.latency.unwrap().max_ms, 30.0);
        assert_eq!(report.samples[0].at_ms, 1500.0);
        assert_eq!(report.samples[0].completed, 5);
        assert_eq!(heard.stalls_ms, [30.0, 25.0]);
    }

    #[test]
    fn violations_are_told_in_the_guests_words_without_control_characters() {
        let heard = heard(
            "mortise-guest: {\"job\":\"oracle\",\"device\":\"vd\\u001ba\",\"last\":true,\"error\":\"block \\u0007 9\",\
             \"summary\":{\"lost\":1,\"violations\":[{\"lost\":{\"block\":9}}]}}\n",
        );
        let report = heard.reports[0].report();
        assert!(report.finished);
        assert_eq!(report.device, "vda");
        assert_eq!(report.findings[0], "block  9");
        assert!(report.findings[1].contains("\"block\":9"));
    }

    #[test]
    fn nonsense_is_a_line_and_no_report() {
        let heard = heard("mortise-guest: {\"job\":\nmortise-guest: userspace up\n");
        assert!(heard.reports.is_empty());
        assert_eq!(heard.lines.len(), 2);
    }

    #[test]
    fn a_guest_cannot_make_the_controller_keep_more_than_its_share() {
        let mut heard = heard(&"x".repeat(3 * MAX_LINE_BYTES));
        assert_eq!(heard.partial.len(), MAX_LINE_BYTES);
        for index in 0..2 * MAX_LINES {
            let line = format!("mortise-guest: {{\"job\":\"oracle\",\"device\":\"{index}\"}}\n");
            heard.add(line.as_bytes(), Duration::ZERO);
        }
        assert_eq!(heard.lines.len(), MAX_LINES);
        assert!(heard.reports.len() <= MAX_REPORTS);
    }
}
