//! How devices take it: samples of their figures, their outages, and whether those that are no targets
//! noticed anything.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use api::controller::{DeviceReport, DeviceSample, Outage};
use api::device::LatencyBucket;
use api::node::{DeviceDetails, DeviceStatus, DiskStatus, VmPhase};
use api::vmm::DeviceConnection;
use tonic::Code;

use super::scope::{Scope, Vm};
use super::series::Series;
use crate::hosts::Hosts;
use crate::plan::Observed;

/// Of one device; a run of a day with a kill each second has more, and its report the first ones.
const MAX_OUTAGES: usize = 4_096;
/// As many as vmm-core keeps of a device.
const ASKED_OUTAGES: u32 = 256;

/// The start of an experiment, by both clocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Began {
    pub(crate) at: Instant,
    wall: SystemTime,
}

impl Began {
    pub(crate) fn now() -> Self {
        Self {
            at: Instant::now(),
            wall: SystemTime::now(),
        }
    }

    pub(crate) fn elapsed_ms(&self) -> f64 {
        self.at.elapsed().as_secs_f64() * 1000.0
    }

    /// A host's time as milliseconds since the start; negative before it. Hosts keep their clocks
    /// together.
    pub(crate) fn to_ms(self, time: &prost_types::Timestamp) -> f64 {
        let time = SystemTime::try_from(*time).unwrap_or(self.wall);
        match time.duration_since(self.wall) {
            Ok(after) => millis(after),
            Err(before) => -millis(before.duration()),
        }
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Everything that was seen of all devices.
pub(crate) struct Observer {
    began: Began,
    devices: BTreeMap<(String, String), Seen>,
    vms: BTreeMap<String, SeenVm>,
}

/// A VM: what it was at first, and what became of it.
#[derive(Debug, Default)]
struct SeenVm {
    was_running: bool,
    resets: u64,
    trouble: Option<String>,
}

/// One device.
#[derive(Default)]
struct Seen {
    report: DeviceReport,
    samples: Series<DeviceSample>,
    before: Option<Figures>,
    outages: BTreeMap<u64, Outage>,
    /// The first count of this process, to see what was added.
    first_restarts: Option<u64>,
}

/// Counts of a device at one time.
#[derive(Debug, Clone, Default)]
struct Figures {
    completed: u64,
    errors: u64,
    inflight: u64,
    buckets: Vec<LatencyBucket>,
}

impl Observer {
    pub(crate) fn new(began: Began) -> Self {
        Self {
            began,
            devices: BTreeMap::new(),
            vms: BTreeMap::new(),
        }
    }

    /// Looks at all targets, and with `others` at everything else.
    pub(crate) async fn look(&mut self, hosts: &Hosts, scope: &Scope, others: bool) {
        let fleet = hosts.fleet();
        for vm in &scope.vms {
            if !others
                && !vm
                    .devices
                    .iter()
                    .any(|d| scope.is_target(&vm.name, &d.name))
            {
                continue;
            }
            let observed = fleet.of(&vm.host);
            self.look_at_vm(vm, observed);
            let Some(node) = hosts.get(&vm.host) else {
                continue;
            };
            let details = match node.device_details(&vm.node_id, ASKED_OUTAGES).await {
                Ok(details) => details,
                Err(status) if status.code() == Code::Unimplemented => {
                    from_status(observed, &vm.node_id)
                }
                Err(_) => continue,
            };
            let disks = match vm.devices.iter().any(|device| device.kind == "blk") {
                true => node.get_disks(vm.node_id.clone()).await.unwrap_or_default(),
                false => Vec::new(),
            };
            let nics = match vm.devices.iter().any(|device| device.kind == "net") {
                true => node.get_nics(vm.node_id.clone()).await.unwrap_or_default(),
                false => Vec::new(),
            };
            let at_ms = self.began.elapsed_ms();
            for device in &vm.devices {
                let figures = match device.kind.as_str() {
                    "net" => nics
                        .iter()
                        .find(|nic| nic.name == device.name)
                        .and_then(nic_figures),
                    _ => disks
                        .iter()
                        .find(|disk| disk.name == device.name)
                        .and_then(disk_figures),
                };
                let details = details.iter().find(|details| details.name == device.name);
                let key = (vm.name.clone(), device.name.clone());
                let seen = self.devices.entry(key).or_insert_with(|| Seen {
                    report: DeviceReport {
                        vm: vm.name.clone(),
                        device: device.name.clone(),
                        r#type: device.kind.clone(),
                        targeted: scope.is_target(&vm.name, &device.name),
                        ..Default::default()
                    },
                    ..Seen::default()
                });
                seen.add(&self.began, at_ms, figures, details);
            }
        }
    }

    fn look_at_vm(&mut self, vm: &Vm, observed: &Observed) {
        let Some(status) = observed.vms.get(&vm.node_id) else {
            return;
        };
        let running = status.phase() == VmPhase::Running;
        let seen = self.vms.entry(vm.name.clone()).or_insert(SeenVm {
            was_running: running,
            resets: status.resets,
            trouble: None,
        });
        if seen.trouble.is_some() || !seen.was_running {
            return;
        }
        if status.resets > seen.resets {
            seen.trouble = Some("the VM was reset".to_owned());
        } else if !running && status.phase() != VmPhase::Paused {
            let phase = status.phase().as_str_name().trim_start_matches("VM_PHASE_");
            seen.trouble = Some(format!("the VM is {}", phase.to_lowercase()));
        }
    }

    /// What went wrong with a VM that ran at first.
    pub(crate) fn vm_trouble(&self, vm: &str) -> Option<&str> {
        self.vms.get(vm)?.trouble.as_deref()
    }

    /// Connected when it was looked at last.
    pub(crate) fn is_connected(&self, vm: &str, device: &str) -> Option<bool> {
        let seen = self.devices.get(&(vm.to_owned(), device.to_owned()))?;
        seen.samples.last().map(|sample| sample.connected)
    }

    /// Its last sample completed something.
    pub(crate) fn progresses(&self, vm: &str, device: &str) -> Option<bool> {
        let seen = self.devices.get(&(vm.to_owned(), device.to_owned()))?;
        seen.samples.last().map(|sample| sample.completed > 0)
    }

    /// A figure by its name in the API.
    pub(crate) fn figure(&self, vm: &str, device: &str, figure: &str) -> Option<f64> {
        let seen = self.devices.get(&(vm.to_owned(), device.to_owned()))?;
        let last = seen.samples.last()?;
        Some(match figure {
            "errors" => seen.report.errors as f64,
            "latency-p99-us" => last.latency_p99_us,
            "latency-max-us" => last.latency_max_us,
            "inflight" => last.inflight as f64,
            _ => seen.longest_outage_ms(self.began.elapsed_ms()),
        })
    }

    /// The devices' part of the report. `cause` says which fault came last before a time on a device.
    pub(crate) fn reports(
        &self,
        cause: impl Fn(&str, &str, f64) -> Option<String>,
    ) -> Vec<DeviceReport> {
        let mut reports = Vec::with_capacity(self.devices.len());
        for seen in self.devices.values() {
            let mut report = seen.report.clone();
            report.samples = seen.samples.to_vec();
            report.outages = seen.outages.values().cloned().collect();
            for outage in &mut report.outages {
                let fault = cause(&report.vm, &report.device, outage.began_ms);
                outage.fault = fault.unwrap_or_default();
            }
            if !report.targeted {
                report.touched = touched(&report, self.vm_trouble(&report.vm));
            }
            reports.push(report);
        }
        reports
    }
}

/// Why a device that is no target counts as touched.
fn touched(report: &DeviceReport, vm_trouble: Option<&str>) -> String {
    let mut reasons = Vec::new();
    if !report.outages.is_empty() {
        reasons.push(format!("{} outages", report.outages.len()));
    }
    if report.errors > 0 {
        reasons.push(format!("{} errors", report.errors));
    }
    if report.restarts > 0 {
        reasons.push(format!("{} restarts", report.restarts));
    }
    reasons.extend(vm_trouble.map(str::to_owned));
    reasons.join(", ")
}

impl Seen {
    fn add(
        &mut self,
        began: &Began,
        at_ms: f64,
        figures: Option<Figures>,
        details: Option<&DeviceDetails>,
    ) {
        let health = details.and_then(|details| details.health.as_ref());
        let connected =
            health.is_some_and(|health| health.connection() == DeviceConnection::Connected);
        let mut sample = DeviceSample {
            at_ms,
            connected,
            inflight: health.map_or(0, |health| health.in_flight),
            ..Default::default()
        };
        if let Some(figures) = figures {
            if let Some(before) = &self.before {
                let window = figures.since(before);
                sample.completed = window.completed;
                sample.latency_p50_us = quantile_us(&window.buckets, 0.5);
                sample.latency_p99_us = quantile_us(&window.buckets, 0.99);
                sample.latency_max_us = quantile_us(&window.buckets, 1.0);
                self.report.errors += window.errors;
            }
            sample.inflight = sample.inflight.max(figures.inflight);
            self.before = Some(figures);
        }
        self.samples.push(sample);
        let Some(details) = details else { return };
        let first = *self.first_restarts.get_or_insert(details.restarts);
        self.report.restarts = details.restarts.saturating_sub(first);
        for outage in health.iter().flat_map(|health| &health.outages) {
            let Some(start) = &outage.start_time else {
                continue;
            };
            let began_ms = began.to_ms(start);
            let known = self.outages.contains_key(&outage.number);
            if began_ms < 0.0 || (!known && self.outages.len() == MAX_OUTAGES) {
                continue;
            }
            let after = |us: Option<u64>| us.map_or(0.0, |us| began_ms + us as f64 / 1000.0);
            let ended_us = match outage.in_flight {
                0 => outage.first_completion_us.or(outage.replayed_us),
                _ => outage.first_completion_us,
            };
            self.outages.insert(
                outage.number,
                Outage {
                    began_ms,
                    ended_ms: after(ended_us),
                    cause: outage.cause.clone(),
                    fault: String::new(),
                    replayed_ms: after(outage.replayed_us),
                    in_flight: outage.in_flight,
                },
            );
        }
        self.join_outages();
    }

    /// A device that was lost again before it completed anything was away until the later outage ended.
    fn join_outages(&mut self) {
        let mut later_ended_ms = 0.0;
        for outage in self.outages.values_mut().rev() {
            if outage.ended_ms == 0.0 {
                outage.ended_ms = later_ended_ms;
            }
            later_ended_ms = outage.ended_ms;
        }
    }

    fn longest_outage_ms(&self, now_ms: f64) -> f64 {
        let lengths = self.outages.values().map(|outage| {
            let ended_ms = match outage.ended_ms {
                0.0 => now_ms,
                ended_ms => ended_ms,
            };
            ended_ms - outage.began_ms
        });
        lengths.fold(0.0, f64::max)
    }
}

impl Figures {
    /// What was added since `before`; all of it when the process is another one, which counts from zero.
    fn since(&self, before: &Self) -> Self {
        let count_before = |up_to_ns: u64| {
            let mut buckets = before.buckets.iter();
            buckets
                .find(|bucket| bucket.up_to_ns == up_to_ns)
                .map_or(0, |bucket| bucket.count)
        };
        let starts_anew = self.completed < before.completed || self.errors < before.errors;
        if starts_anew {
            return self.clone();
        }
        let buckets = self.buckets.iter().map(|bucket| LatencyBucket {
            up_to_ns: bucket.up_to_ns,
            count: bucket.count.saturating_sub(count_before(bucket.up_to_ns)),
        });
        Self {
            completed: self.completed - before.completed,
            errors: self.errors - before.errors,
            inflight: self.inflight,
            buckets: buckets.filter(|bucket| bucket.count > 0).collect(),
        }
    }
}

/// A time that this share of the requests did not exceed.
fn quantile_us(buckets: &[LatencyBucket], share: f64) -> f64 {
    let total: u64 = buckets.iter().map(|bucket| bucket.count).sum();
    let rank = ((total as f64 * share).ceil() as u64).max(1);
    let mut passed = 0;
    for bucket in buckets {
        passed += bucket.count;
        if passed >= rank {
            return bucket.up_to_ns as f64 / 1000.0;
        }
    }
    0.0
}

fn disk_figures(disk: &DiskStatus) -> Option<Figures> {
    disk.served.then(|| Figures {
        completed: disk.latency_buckets.iter().map(|bucket| bucket.count).sum(),
        errors: disk.errors,
        inflight: disk.inflight,
        buckets: disk.latency_buckets.clone(),
    })
}

/// A NIC has no requests that fail: what was dropped is told apart by its reasons.
fn nic_figures(nic: &api::node::NicStatus) -> Option<Figures> {
    let stats = nic.nic.as_ref()?.stats.as_ref()?;
    Some(Figures {
        completed: stats.rx_packets + stats.tx_packets,
        ..Figures::default()
    })
}

/// What an agent that has no Devices service tells.
fn from_status(observed: &Observed, vm_id: &str) -> Vec<DeviceDetails> {
    let Some(vm) = observed.vms.get(vm_id) else {
        return Vec::new();
    };
    let restarts = |device: &DeviceStatus| {
        let serves = |process: &&api::node::ProcessStatus| process.devices.contains(&device.name);
        let process = vm.processes.iter().find(serves);
        process.map_or(0, |process| process.restarts)
    };
    vm.devices
        .iter()
        .map(|device| DeviceDetails {
            name: device.name.clone(),
            r#type: device.r#type.clone(),
            restarts: restarts(device),
            health: Some(api::vmm::DeviceHealth {
                connection: match device.connected {
                    true => DeviceConnection::Connected as i32,
                    false => DeviceConnection::Reconnecting as i32,
                },
                ..Default::default()
            }),
            ..Default::default()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buckets(counts: &[(u64, u64)]) -> Vec<LatencyBucket> {
        let counts = counts.iter();
        counts
            .map(|(up_to_ns, count)| LatencyBucket {
                up_to_ns: *up_to_ns,
                count: *count,
            })
            .collect()
    }

    fn figures(counts: &[(u64, u64)]) -> Figures {
        Figures {
            completed: counts.iter().map(|(_, count)| count).sum(),
            buckets: buckets(counts),
            ..Figures::default()
        }
    }

    #[test]
    fn percentiles_are_of_the_span_alone() {
        let before = figures(&[(1_000, 1_000_000)]);
        let after = figures(&[(1_000, 1_000_050), (5_000_000, 50)]);
        let window = after.since(&before);
        assert_eq!(window.completed, 100);
        assert_eq!(quantile_us(&window.buckets, 0.5), 1.0);
        assert_eq!(quantile_us(&window.buckets, 0.99), 5_000.0);
    }

    #[test]
    fn another_process_counts_from_zero() {
        let window = figures(&[(1_000, 5)]).since(&figures(&[(1_000, 500)]));
        assert_eq!(window.completed, 5);
    }

    #[test]
    fn an_outage_with_requests_in_flight_lasts_until_one_is_completed() {
        let began = Began::now();
        let start = prost_types::Timestamp::from(began.wall + Duration::from_secs(1));
        let outage = |in_flight, first_completion_us| api::vmm::Outage {
            number: 1,
            start_time: Some(start),
            in_flight,
            replayed_us: Some(10_000),
            first_completion_us,
            ..Default::default()
        };
        let seen = |outage| {
            let mut seen = Seen::default();
            let details = DeviceDetails {
                health: Some(api::vmm::DeviceHealth {
                    outages: vec![outage],
                    ..Default::default()
                }),
                ..Default::default()
            };
            seen.add(&began, 0.0, None, Some(&details));
            seen.outages[&1].clone()
        };
        assert_eq!(seen(outage(4, None)).ended_ms, 0.0, "it lasts");
        assert_eq!(seen(outage(4, Some(12_000))).ended_ms.round(), 1012.0);
        assert_eq!(seen(outage(0, None)).ended_ms.round(), 1010.0);
    }

    #[test]
    fn an_outage_without_a_completion_ends_with_the_next_one() {
        let mut seen = Seen::default();
        for (number, began_ms, ended_ms) in [(1, 10.0, 20.0), (2, 30.0, 0.0), (3, 40.0, 0.0)] {
            let outage = Outage {
                began_ms,
                ended_ms,
                in_flight: 1,
                ..Default::default()
            };
            seen.outages.insert(number, outage);
        }
        seen.join_outages();
        let ends = |seen: &Seen| {
            seen.outages
                .values()
                .map(|o| o.ended_ms)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            ends(&seen),
            [20.0, 0.0, 0.0],
            "the newest lasts, so does the one before"
        );
        seen.outages.get_mut(&3).unwrap().ended_ms = 55.0;
        seen.join_outages();
        assert_eq!(ends(&seen), [20.0, 55.0, 55.0]);
    }

    #[test]
    fn what_happened_before_the_start_is_not_the_experiments() {
        let began = Began::now();
        let early = prost_types::Timestamp::from(began.wall - Duration::from_secs(1));
        assert_eq!(began.to_ms(&early).round(), -1000.0);
    }
}
