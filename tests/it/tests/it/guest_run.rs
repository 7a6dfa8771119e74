//! What a guest prints, awaited with deadlines.

use std::time::{Duration, Instant};

use guest::report::{PREFIX, Report};

use crate::process::Process;

/// An emulated guest boots in 8 s on an idle machine and in several times that on a busy one.
pub(crate) const BOOT_LIMIT: Duration = Duration::from_secs(150);

/// Waits until the guest's `times`-th line that contains `text`.
pub(crate) fn wait_for_line(vmm: &mut Process, text: &str, times: usize) {
    let deadline = Instant::now() + BOOT_LIMIT;
    while vmm
        .output()
        .lines()
        .filter(|line| line.contains(text))
        .count()
        < times
    {
        assert!(
            Instant::now() < deadline,
            "no {text:?} from the guest:\n{}",
            vmm.output()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits for the guest to power itself off and returns its reports; none of them may be an error.
pub(crate) fn finish(vmm: &mut Process) -> Vec<Report> {
    let status = vmm.wait(BOOT_LIMIT);
    let output = vmm.output();
    assert!(status.success(), "{status}\n{output}");
    let reports = reports(&output);
    assert!(
        matches!(
            reports.last(),
            Some(Report::Done {
                failed: 0,
                error: None
            })
        ),
        "the guest's jobs did not all succeed:\n{output}"
    );
    reports
}

/// The reports in what a guest printed.
pub(crate) fn reports(output: &str) -> Vec<Report> {
    output
        .lines()
        .filter(|line| line.contains(PREFIX))
        .filter_map(Report::from_line)
        .collect()
}
