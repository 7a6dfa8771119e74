//! What faults did: hits of all their beginnings added up, and the marks on the time line.

use std::collections::BTreeMap;

use api::controller::{FaultHits, FaultInjection, FaultMark, FaultMarkKind};
use api::node::FaultStatus;

use super::observe::Began;

/// On one time line; hits beyond are counted and not drawn.
const MAX_MARKS: usize = 4_000;
/// A host and the controller note the same instant in turn.
const SLACK_MS: f64 = 100.0;

/// See the module.
pub(crate) struct Ledger {
    faults: Vec<FaultHits>,
    /// Faults on the host by their ids there.
    open: BTreeMap<String, Open>,
    marks: Vec<FaultMark>,
}

/// One beginning on one VM.
struct Open {
    /// Of the experiment's faults.
    fault: usize,
    vm: String,
    device: String,
    seen: u64,
    hits: u64,
    /// Highest number of a hit that has its mark, by device.
    marked: BTreeMap<String, u64>,
}

impl Ledger {
    pub(crate) fn new(faults: &[FaultInjection]) -> Self {
        let faults = faults.iter().map(|fault| FaultHits {
            id: fault.id.clone(),
            ..Default::default()
        });
        Self {
            faults: faults.collect(),
            open: BTreeMap::new(),
            marks: Vec::new(),
        }
    }

    /// A fault begins.
    pub(crate) fn begin(&mut self, fault: usize, at_ms: f64) {
        self.faults[fault].begun += 1;
        let id = self.faults[fault].id.clone();
        self.mark(at_ms, &id, FaultMarkKind::Begin, "", "", String::new());
    }

    /// The host will know this beginning by `host_id`.
    pub(crate) fn open(&mut self, host_id: &str, fault: usize, vm: &str, device: &str) {
        let open = Open {
            fault,
            vm: vm.to_owned(),
            device: device.to_owned(),
            seen: 0,
            hits: 0,
            marked: BTreeMap::new(),
        };
        self.open.insert(host_id.to_owned(), open);
    }

    /// It could not be done.
    pub(crate) fn problem(&mut self, fault: usize, words: String) {
        self.faults[fault].problem = words;
    }

    /// Something was done that no host counts.
    pub(crate) fn hit(&mut self, fault: usize, at_ms: f64, vm: &str, device: &str, words: String) {
        self.faults[fault].seen += 1;
        self.faults[fault].hits += 1;
        let id = self.faults[fault].id.clone();
        self.mark(at_ms, &id, FaultMarkKind::Hit, vm, device, words);
    }

    /// What the host says of beginnings that are open.
    pub(crate) fn update(&mut self, statuses: &[FaultStatus], began: &Began) {
        for status in statuses {
            let Some(open) = self.open.get_mut(&status.fault_id) else {
                continue;
            };
            let fault = open.fault;
            let (vm, id) = (open.vm.clone(), self.faults[fault].id.clone());
            let more = status.hits.saturating_sub(open.hits);
            open.seen = open.seen.max(status.seen);
            open.hits = open.hits.max(status.hits);
            let mut marks = Vec::new();
            for target in &status.targets {
                let marked = open.marked.entry(target.device.clone()).or_default();
                for hit in target.last_hits.iter().filter(|hit| hit.number > *marked) {
                    let at_ms = hit.time.as_ref().map(|time| began.to_ms(time));
                    let device = target.device.clone();
                    marks.push((at_ms.unwrap_or_else(|| began.elapsed_ms()), device));
                }
                let newest = target.last_hits.iter().map(|hit| hit.number).max();
                *marked = newest.unwrap_or(0).max(*marked);
            }
            // What is done to a process is counted, and not told one by one.
            if marks.is_empty() && more > 0 {
                marks.push((began.elapsed_ms(), open.device.clone()));
            }
            for (at_ms, device) in marks {
                self.mark(at_ms, &id, FaultMarkKind::Hit, &vm, &device, String::new());
            }
            let errors = status.targets.iter().map(|target| &target.error);
            let error = std::iter::once(&status.error)
                .chain(errors)
                .find(|error| !error.is_empty());
            // A process that was just killed is no problem once the next one is there.
            self.faults[fault].problem = error.cloned().unwrap_or_default();
        }
    }

    /// A beginning is over; its counts stay.
    pub(crate) fn close(&mut self, host_id: &str, at_ms: f64) {
        let Some(open) = self.open.remove(host_id) else {
            return;
        };
        let hits = &mut self.faults[open.fault];
        hits.seen += open.seen;
        hits.hits += open.hits;
        let id = hits.id.clone();
        self.mark(
            at_ms,
            &id,
            FaultMarkKind::End,
            &open.vm,
            &open.device,
            String::new(),
        );
    }

    /// Of each fault, so far.
    pub(crate) fn hits(&self) -> Vec<FaultHits> {
        let mut all = self.faults.clone();
        for open in self.open.values() {
            all[open.fault].seen += open.seen;
            all[open.fault].hits += open.hits;
        }
        all
    }

    /// All marks, in the order of their times.
    pub(crate) fn marks(&self) -> Vec<FaultMark> {
        let mut marks = self.marks.clone();
        marks.sort_by(|one, other| one.at_ms.total_cmp(&other.at_ms));
        marks
    }

    /// The fault that was begun or hit last before something happened to a device.
    pub(crate) fn cause(&self, vm: &str, device: &str, at_ms: f64) -> Option<String> {
        let fits = |mark: &&FaultMark| {
            mark.kind() != FaultMarkKind::End
                && mark.at_ms <= at_ms + SLACK_MS
                && (mark.vm.is_empty() || mark.vm == vm)
                && (mark.device.is_empty() || mark.device == device)
        };
        let last = self.marks.iter().filter(fits);
        last.max_by(|one, other| one.at_ms.total_cmp(&other.at_ms))
            .map(|mark| mark.id.clone())
    }

    fn mark(
        &mut self,
        at_ms: f64,
        id: &str,
        kind: FaultMarkKind,
        vm: &str,
        device: &str,
        detail: String,
    ) {
        if self.marks.len() == MAX_MARKS {
            return;
        }
        self.marks.push(FaultMark {
            at_ms,
            id: id.to_owned(),
            kind: kind as i32,
            vm: vm.to_owned(),
            device: device.to_owned(),
            detail,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::device::FaultHit;
    use api::node::FaultTargetStatus;

    fn ledger() -> Ledger {
        let fault = |id: &str| FaultInjection {
            id: id.into(),
            ..Default::default()
        };
        Ledger::new(&[fault("kill"), fault("slow")])
    }

    fn status(id: &str, hits: u64, numbers: &[u64]) -> FaultStatus {
        let hit = |number: &u64| FaultHit {
            number: *number,
            ..Default::default()
        };
        FaultStatus {
            fault_id: id.into(),
            seen: hits + 1,
            hits,
            targets: vec![FaultTargetStatus {
                device: "root".into(),
                last_hits: numbers.iter().map(hit).collect(),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    fn hit_marks(ledger: &Ledger) -> usize {
        let marks = ledger.marks();
        let hits = marks
            .iter()
            .filter(|mark| mark.kind() == FaultMarkKind::Hit);
        hits.count()
    }

    #[test]
    fn hits_of_all_beginnings_add_up_also_after_their_end() {
        let (mut ledger, began) = (ledger(), Began::now());
        for (id, hits) in [("kill.1", 1), ("kill.2", 2)] {
            ledger.begin(0, 0.0);
            ledger.open(id, 0, "web", "root");
            ledger.update(&[status(id, hits, &[])], &began);
        }
        ledger.close("kill.1", 5.0);
        // What a host says of a beginning that is over changes nothing.
        ledger.update(&[status("kill.1", 9, &[])], &began);
        let hits = ledger.hits();
        assert_eq!((hits[0].begun, hits[0].hits, hits[0].seen), (2, 3, 5));
        assert_eq!(hits[1].hits, 0);
    }

    #[test]
    fn each_hit_is_marked_once() {
        let (mut ledger, began) = (ledger(), Began::now());
        ledger.open("slow.1", 1, "web", "root");
        ledger.update(&[status("slow.1", 2, &[1, 2])], &began);
        ledger.update(&[status("slow.1", 3, &[1, 2, 3])], &began);
        assert_eq!(hit_marks(&ledger), 3);
        ledger.open("kill.1", 0, "web", "root");
        ledger.update(&[status("kill.1", 1, &[])], &began);
        ledger.update(&[status("kill.1", 1, &[])], &began);
        assert_eq!(
            hit_marks(&ledger),
            4,
            "a hit that is only counted has a mark, too"
        );
    }

    #[test]
    fn the_cause_is_what_came_last_to_that_device() {
        let mut ledger = ledger();
        ledger.hit(0, 100.0, "web", "root", String::new());
        ledger.hit(1, 200.0, "web", "data", String::new());
        let cause = |device, at| ledger.cause("web", device, at);
        assert_eq!(cause("root", 250.0).as_deref(), Some("kill"));
        assert_eq!(cause("data", 250.0).as_deref(), Some("slow"));
        assert_eq!(cause("root", -5.0), None, "before anything was done");
        assert_eq!(ledger.cause("db", "root", 250.0), None);
    }
}
