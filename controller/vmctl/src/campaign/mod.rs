//! Campaigns: files that say what is to be broken, when, and what must be seen.
//!
//! ```text
//! schema    what a file may say       kinds     faults, in the API's words
//! problems  what is wrong, and where  words     times, ranges, slips of the finger
//! library   campaigns that are in this program
//! ```

use api::controller as pb;
use api::controller::fault_injection::Action;
use api::device::{FaultOp, FaultSelector, FaultTrigger};
use api::node::FaultProcess;
use serde_saphyr::Spanned;

use crate::spec;
use problems::Problems;
use schema::{File, Probe, Schedule, Target};

pub(crate) mod kinds;
pub(crate) mod library;
mod problems;
mod schema;
mod words;

/// Stands for all VMs of the project.
const ALL_VMS: &str = "*";

/// What the command line says instead of the file.
#[derive(Debug, Clone, Default)]
pub(crate) struct Overrides {
    pub(crate) vm: Option<String>,
    pub(crate) device: Option<String>,
    pub(crate) seed: Option<u64>,
    pub(crate) duration: Option<String>,
    pub(crate) binary: Option<String>,
}

/// A campaign in the API's words.
#[derive(Debug)]
pub(crate) struct Campaign {
    pub(crate) name: String,
    pub(crate) spec: pb::FaultExperimentSpec,
}

/// Reads a campaign.
///
/// # Errors
/// `file:line:column: field: what is wrong` and what to write instead, a line each.
pub(crate) fn parse(
    text: &str,
    file: &str,
    project: &str,
    overrides: &Overrides,
) -> Result<Campaign, String> {
    if text.len() > api::validate::MAX_CAMPAIGN_BYTES {
        let most = api::validate::MAX_CAMPAIGN_BYTES;
        return Err(format!("{file}: is longer than {most} bytes"));
    }
    let options = serde_saphyr::options! { with_snippet: false };
    let parsed: File = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let at = error.location();
        let at = at.map(|at| format!(":{}:{}", at.line(), at.column()));
        let words = error.to_string();
        format!("{file}{}: {words}", at.unwrap_or_default())
    })?;
    let mut reader = Reader {
        project,
        overrides,
        problems: Problems::default(),
    };
    let campaign = reader.campaign(&parsed, text);
    reader.problems.into_result(file)?;
    Ok(campaign)
}

struct Reader<'a> {
    project: &'a str,
    overrides: &'a Overrides,
    problems: Problems,
}

impl Reader<'_> {
    fn campaign(&mut self, file: &File, source: &str) -> Campaign {
        if !api::names::is_id(&file.name.value) {
            let words = format!("{:?} {}", file.name.value, api::names::ID_RULE);
            self.problems.add(&file.name, "name", words);
        }
        let duration_ms = match &self.overrides.duration {
            Some(given) => {
                let us = words::duration_us(given).map_err(|words| format!("--duration: {words}"));
                self.problems.take(&file.duration, "duration", us) as u32 / 1000
            }
            None => self.ms(Some(&file.duration), "duration"),
        };
        let mut faults = Vec::new();
        for (index, fault) in file.faults.iter().enumerate() {
            let at = format!("faults[{index}]");
            faults.extend(self.fault(fault, &at, file));
        }
        if self.overrides.duration.is_some() {
            squeeze(
                &mut faults,
                duration_ms,
                self.ms(Some(&file.duration), "duration"),
            );
        }
        if faults.is_empty() && file.faults.is_empty() {
            self.problems
                .add(&file.name, "faults", "are missing".into());
        }
        let probes = file.probes.iter().enumerate();
        let probes = probes
            .map(|(index, probe)| self.probe(probe, &format!("probes[{index}]"), file))
            .collect();
        let expect = self.expect(file);
        let spec = pb::FaultExperimentSpec {
            description: file.description.trim().to_owned(),
            seed: self.overrides.seed.or(file.seed).unwrap_or(0),
            duration_ms,
            settle_ms: self.ms(file.settle.as_ref(), "settle"),
            ttl_ms: self.ms(file.ttl.as_ref(), "ttl"),
            faults,
            probes,
            expect: Some(expect),
            source: source.to_owned(),
        };
        Campaign {
            name: file.name.value.clone(),
            spec,
        }
    }

    fn fault(
        &mut self,
        fault: &Spanned<schema::Fault>,
        at: &str,
        file: &File,
    ) -> Option<pb::FaultInjection> {
        let given = &fault.value;
        let mut action = kinds::action(given, at, &mut self.problems)?;
        if let (Action::Upgrade(upgrade), Some(binary)) = (&mut action, &self.overrides.binary) {
            upgrade.binary = binary.clone();
        }
        let own = &given.target;
        let field = format!("{at}.target");
        match &mut action {
            Action::Rule(rule) => {
                rule.selector = Some(self.selector(own, &field));
                rule.trigger = Some(FaultTrigger {
                    nth: own.nth.unwrap_or(0),
                    every: own.every.unwrap_or(0),
                    probability: own.probability.unwrap_or(0.0),
                    max_hits: own.max_hits.unwrap_or(0),
                });
            }
            _ if has_selector(own) => {
                let words = format!(
                    "{} hits a whole process or host: queues, ops, lba, messages, nth, every, probability and max-hits are for faults of requests",
                    given.kind.value
                );
                self.problems.add(&given.kind, &field, words);
            }
            _ => {}
        }
        let process = self.process(own, &field, file);
        let hosts = matches!(action, Action::Host(_));
        let target = match (hosts, process) {
            (true, _) => pb::FaultTarget::default(),
            (false, FaultProcess::Agent) => pb::FaultTarget {
                process: process as i32,
                ..Default::default()
            },
            (false, _) => pb::FaultTarget {
                vm: self.vm(fault, own.vm.as_ref(), &field, file),
                device: self.device(own.device.as_ref(), &field, file),
                process: process as i32,
                ..Default::default()
            },
        };
        Some(pb::FaultInjection {
            id: given.id.value.clone(),
            target: Some(target),
            schedule: Some(self.schedule(&given.schedule, &format!("{at}.schedule"))),
            action: Some(action),
        })
    }

    fn selector(&mut self, target: &Target, at: &str) -> FaultSelector {
        let mut ops = Vec::new();
        for op in &target.ops {
            match fault_op(&op.value) {
                Some(known) => ops.push(known as i32),
                None => {
                    let words = format!(
                        "{:?} must be read, write, flush, discard, write-zeroes, receive or transmit",
                        op.value
                    );
                    self.problems.add(op, &format!("{at}.ops"), words);
                }
            }
        }
        let (first_sector, num_sectors) = match &target.lba {
            None => (0, 0),
            Some(lba) => {
                let range = words::sectors(&lba.value);
                let (first, last) = self.problems.take(lba, &format!("{at}.lba"), range);
                (first, last - first + 1)
            }
        };
        FaultSelector {
            device: String::new(),
            queues: target.queues.clone(),
            ops,
            first_sector,
            num_sectors,
            messages: target.messages.clone(),
        }
    }

    /// `at` is what names no VM, if none does.
    fn vm<T>(
        &mut self,
        at: &Spanned<T>,
        own: Option<&Spanned<String>>,
        field: &str,
        file: &File,
    ) -> String {
        let given = match (own, &self.overrides.vm, &file.target.vm) {
            (Some(own), _, _) => own.value.clone(),
            (None, Some(given), _) => given.clone(),
            (None, None, Some(shared)) => shared.value.clone(),
            (None, None, None) => {
                let words = "no VM is named; give --vm NAME, or write target: {vm: NAME}; \"*\" means all VMs of the project";
                self.problems.add(at, &format!("{field}.vm"), words.into());
                return String::new();
            }
        };
        if given == ALL_VMS {
            return String::new();
        }
        let name = spec::vm_name(&given, self.project).map_err(|error| format!("{error:#}"));
        match name {
            Ok(name) => name.to_string(),
            Err(words) => {
                self.problems.add(at, &format!("{field}.vm"), words);
                String::new()
            }
        }
    }

    fn device(&mut self, own: Option<&Spanned<String>>, field: &str, file: &File) -> String {
        let shared = file.target.device.as_ref();
        let named = match (own, &self.overrides.device) {
            (Some(own), _) => Some(own.clone()),
            (None, Some(given)) => return given.clone(),
            (None, None) => shared.cloned(),
        };
        let Some(named) = named else {
            return String::new();
        };
        if named.value == ALL_VMS {
            return String::new();
        }
        if !api::names::is_id(&named.value) {
            let words = format!("{:?} {}", named.value, api::names::ID_RULE);
            self.problems.add(&named, &format!("{field}.device"), words);
        }
        named.value
    }

    fn process(&mut self, own: &Target, field: &str, file: &File) -> FaultProcess {
        let Some(named) = own.process.as_ref().or(file.target.process.as_ref()) else {
            return FaultProcess::Unspecified;
        };
        match named.value.as_str() {
            "daemon" => FaultProcess::Daemon,
            "vmm" => FaultProcess::Vmm,
            "agent" => FaultProcess::Agent,
            other => {
                let words = format!("{other:?} must be daemon, vmm or agent");
                self.problems.add(named, &format!("{field}.process"), words);
                FaultProcess::Unspecified
            }
        }
    }

    fn schedule(&mut self, schedule: &Schedule, at: &str) -> pb::FaultSchedule {
        pb::FaultSchedule {
            after_ms: self.ms(schedule.after.as_ref(), &format!("{at}.after")),
            every_ms: self.ms(schedule.every.as_ref(), &format!("{at}.every")),
            jitter_ms: self.ms(schedule.jitter.as_ref(), &format!("{at}.jitter")),
            times: schedule.times.unwrap_or(0),
            for_ms: self.ms(schedule.lasts.as_ref(), &format!("{at}.for")),
        }
    }

    fn probe(&mut self, probe: &Spanned<Probe>, at: &str, file: &File) -> pb::FaultProbe {
        let given = &probe.value;
        let mut read = pb::FaultProbe {
            id: given.id.value.clone(),
            stop: given.stop,
            contains: given.contains.clone().unwrap_or_default(),
            figure: given.figure.clone().unwrap_or_default(),
            at_most: given.at_most.unwrap_or(0.0),
            ..Default::default()
        };
        let kind = format!(
            "FAULT_PROBE_KIND_{}",
            given.check.value.replace('-', "_").to_uppercase()
        );
        match pb::FaultProbeKind::from_str_name(&kind) {
            Some(kind) if kind != pb::FaultProbeKind::Unspecified => read.kind = kind as i32,
            _ => {
                let words = format!(
                    "{:?} must be vm-running, device-connected, guest-line, guest-verifies, figure or progress",
                    given.check.value
                );
                self.problems
                    .add(&given.check, &format!("{at}.check"), words);
            }
        }
        for edge in &given.at {
            match edge.value.as_str() {
                "start" => read.at_start = true,
                "during" => read.during = true,
                "end" => read.at_end = true,
                other => {
                    let words = format!("{other:?} must be start, during or end");
                    self.problems.add(edge, &format!("{at}.at"), words);
                }
            }
        }
        let of_devices = !matches!(
            read.kind(),
            pb::FaultProbeKind::VmRunning
                | pb::FaultProbeKind::GuestLine
                | pb::FaultProbeKind::GuestVerifies
        );
        // Without a VM it is about the targets.
        if let Some(vm) = &given.vm {
            read.vm = self.vm(probe, Some(vm), at, file);
        }
        if of_devices {
            read.device = self.device(given.device.as_ref(), at, file);
        }
        read
    }

    fn expect(&mut self, file: &File) -> pb::FaultExpectations {
        let expect = &file.expect;
        for (id, hits) in &expect.hits {
            let known = file.faults.iter().any(|fault| fault.value.id.value == *id);
            if !known {
                let words = format!("no fault is called {id:?}");
                self.problems.add(hits, &format!("expect.hits.{id}"), words);
            }
        }
        let others_may_be_touched = match &expect.others {
            None => false,
            Some(others) => match others.value.as_str() {
                "untouched" => false,
                "may-change" => true,
                other => {
                    let words = format!("{other:?} must be untouched or may-change");
                    self.problems.add(others, "expect.others", words);
                    false
                }
            },
        };
        let hits = expect.hits.iter();
        pb::FaultExpectations {
            min_hits: expect.min_hits.unwrap_or(0),
            min_hits_of: hits.map(|(id, hits)| (id.clone(), hits.value)).collect(),
            oracle: expect.oracle,
            max_guest_errors: expect.guest_errors,
            stall_p99_ms: self.limit(expect.stall_p99.as_ref(), "expect.stall-p99"),
            stall_max_ms: self.limit(expect.stall_max.as_ref(), "expect.stall-max"),
            recovery_p99_ms: self.limit(expect.recovery_p99.as_ref(), "expect.recovery-p99"),
            recovery_max_ms: self.limit(expect.recovery_max.as_ref(), "expect.recovery-max"),
            others_may_be_touched,
        }
    }

    fn limit(&mut self, text: Option<&Spanned<String>>, field: &str) -> Option<u32> {
        text.map(|text| self.ms(Some(text), field))
    }

    fn ms(&mut self, text: Option<&Spanned<String>>, field: &str) -> u32 {
        let Some(text) = text else { return 0 };
        let us = self
            .problems
            .take(text, field, words::duration_us(&text.value));
        (us / 1000).min(u64::from(u32::MAX)) as u32
    }
}

/// Where a duration is too short for all faults to begin, the whole schedule becomes faster.
fn squeeze(faults: &mut [pb::FaultInjection], duration_ms: u32, usual_ms: u32) {
    let schedules = faults
        .iter_mut()
        .filter_map(|fault| fault.schedule.as_mut());
    let mut schedules: Vec<&mut pb::FaultSchedule> = schedules.collect();
    let is_long_enough = schedules
        .iter()
        .all(|schedule| schedule.after_ms < duration_ms);
    // A file whose own duration is too short has a mistake, which is told.
    if is_long_enough || duration_ms >= usual_ms {
        return;
    }
    let scaled = |ms: u32| match ms {
        0 => 0,
        ms => (u64::from(ms) * u64::from(duration_ms) / u64::from(usual_ms)).max(1) as u32,
    };
    for schedule in &mut schedules {
        let pb::FaultSchedule {
            after_ms,
            every_ms,
            jitter_ms,
            times: _,
            for_ms,
        } = schedule;
        for ms in [after_ms, every_ms, jitter_ms, for_ms] {
            *ms = scaled(*ms);
        }
    }
}

fn has_selector(target: &Target) -> bool {
    !target.queues.is_empty()
        || !target.ops.is_empty()
        || !target.messages.is_empty()
        || target.lba.is_some()
        || target.nth.is_some()
        || target.every.is_some()
        || target.probability.is_some()
        || target.max_hits.is_some()
}

fn fault_op(name: &str) -> Option<FaultOp> {
    let name = format!("FAULT_OP_{}", name.replace('-', "_").to_uppercase());
    FaultOp::from_str_name(&name).filter(|op| *op != FaultOp::Unspecified)
}

#[cfg(test)]
mod tests;
