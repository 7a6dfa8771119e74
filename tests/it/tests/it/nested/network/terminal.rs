//! A guest that obeys its console, and what it says there.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, ChildStdin};
use std::time::{Duration, Instant};

use guest::plan::{End, Job, Plan};
use guest::report::{Report, UP_LINE};

use crate::guest_run::{self, BOOT_LIMIT};
use crate::nested::fleet::{Fleet, last_lines};

/// The console of one VM whose plan ends with [`End::Obey`].
pub(super) struct Terminal {
    vm: &'static str,
    vmctl: Child,
    input: ChildStdin,
    log: PathBuf,
    /// Plans that are done.
    done: usize,
}

impl Terminal {
    pub(super) fn attach(fleet: &Fleet, vm: &'static str) -> Self {
        let log = fleet.dir.path().join(format!("{vm}.console"));
        let (vmctl, input) = fleet.console_of(vm, &log);
        Self {
            vm,
            vmctl,
            input,
            log,
            done: 0,
        }
    }

    /// Has jobs done and waits for their reports; none may be an error.
    pub(super) fn tell(&mut self, jobs: Vec<Job>) -> Vec<Report> {
        self.begin(jobs);
        self.finish()
    }

    /// Has one job done.
    pub(super) fn ask(&mut self, job: Job) -> Report {
        self.tell(vec![job]).remove(0)
    }

    /// Has jobs done, while something else happens.
    pub(super) fn begin(&mut self, jobs: Vec<Job>) {
        self.write(&Plan {
            jobs,
            end: End::Obey,
            ..Plan::default()
        });
    }

    /// Waits for the reports of the oldest plan that they were not fetched of.
    pub(super) fn finish(&mut self) -> Vec<Report> {
        let reports = self.wait_for("the reports of a plan", |reports| {
            let ends = |report: &&Report| matches!(report, Report::Done { .. });
            (reports.iter().filter(ends).count() > self.done).then_some(())
        });
        let mut plans = reports.split_inclusive(|report| matches!(report, Report::Done { .. }));
        let plan = plans.nth(self.done).expect("counted").to_vec();
        self.done += 1;
        for report in &plan {
            assert_eq!(report.error(), None, "{}: {report:?}", self.vm);
        }
        let own = |report: &Report| !matches!(report, Report::Done { .. } | Report::Served { .. });
        plan.into_iter().filter(own).collect()
    }

    /// Waits until others were served that often, all of them rightly.
    pub(super) fn expect_served(&self, times: usize) {
        let reports = self.wait_for("others to be served", |reports| {
            let served = |report: &&Report| matches!(report, Report::Served { .. });
            (reports.iter().filter(served).count() >= times).then_some(())
        });
        for report in &reports {
            assert_eq!(report.error(), None, "{}: {report:?}", self.vm);
        }
    }

    /// A guest that was reset has forgotten what it was told: no report will come.
    pub(super) fn expect_same_life(&self) {
        let lives = self.text().matches(UP_LINE).count();
        assert!(lives < 2, "{}: the guest came up {lives} times", self.vm);
    }

    pub(super) fn power_off(&mut self) {
        self.write(&Plan::default());
    }

    fn write(&mut self, plan: &Plan) {
        writeln!(self.input, "{plan}").expect("vmctl passes it on");
    }

    fn wait_for(&self, what: &str, found: impl Fn(&[Report]) -> Option<()>) -> Vec<Report> {
        let deadline = Instant::now() + BOOT_LIMIT;
        loop {
            let text = self.text();
            // The last line may still be on its way.
            let whole = text.rfind('\n').map_or("", |end| &text[..end]);
            let reports = guest_run::reports(whole);
            if found(&reports).is_some() {
                return reports;
            }
            self.expect_same_life();
            assert!(Instant::now() < deadline, "{}: waited for {what}", self.vm);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.vmctl.kill();
        let _ = self.vmctl.wait();
        if std::thread::panicking() {
            eprintln!("{}:\n{}", self.vm, last_lines(&self.text(), 12));
        }
    }
}
