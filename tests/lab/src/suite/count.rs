//! Counts of tests, and how to read them from a test runner's output.

use std::fmt;

use crate::job::Outcome;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Count {
    pub(super) passed: u64,
    pub(super) failed: u64,
    pub(super) skipped: u64,
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        match self.skipped {
            0 => Ok(()),
            skipped => write!(f, ", {skipped} skipped"),
        }
    }
}

impl Count {
    pub(super) fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    pub(super) fn one(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Passed => self.passed += 1,
            Outcome::Failed => self.failed += 1,
            Outcome::Skipped => self.skipped += 1,
        }
    }

    pub(super) fn sum(&self) -> u64 {
        self.passed + self.failed + self.skipped
    }

    /// Adds up the summaries of nextest or of every binary that `cargo test` ran.
    pub(super) fn from_runner(text: &str) -> Self {
        let mut count = Self::default();
        for line in text.lines() {
            let line = without_colours(line);
            // Summary [   0.1s] 5 tests run: 4 passed (1 slow), 1 failed, 2 skipped
            let nextest = line
                .trim_start()
                .strip_prefix("Summary [")
                .and_then(|rest| rest.split_once(':'));
            // test result: ok. 4 passed; 0 failed; 1 ignored; 0 measured; 9 filtered out; ...
            let libtest = line
                .strip_prefix("test result: ")
                .and_then(|rest| rest.split_once('.'));
            let Some((_, figures)) = nextest.or(libtest) else {
                continue;
            };
            for figure in figures.split([',', ';']) {
                let mut words = figure.split_whitespace();
                let Some(Ok(number)) = words.next().map(str::parse::<u64>) else {
                    continue;
                };
                match words.next() {
                    Some("passed") => count.passed += number,
                    Some("failed" | "timed") => count.failed += number,
                    Some("skipped" | "ignored") => count.skipped += number,
                    _ => {}
                }
            }
        }
        count
    }
}

/// Drops ANSI sequences of the form ESC [ ... m.
fn without_colours(line: &str) -> String {
    let mut parts = line.split('\x1b');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        plain.push_str(part.split_once('m').map_or(part, |(_, rest)| rest));
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nextest_summary_is_read_with_and_without_colours() {
        let expected = Count {
            passed: 4,
            failed: 1,
            skipped: 2,
        };
        let plain =
            "     Summary [   0.100s] 5 tests run: 4 passed (1 slow), 1 failed, 2 skipped\n";
        assert_eq!(Count::from_runner(plain), expected);
        let coloured = "\x1b[31;1m     Summary\x1b[0m [   0.1s] \x1b[1m5\x1b[0m tests run: \
            \x1b[1m4\x1b[0m \x1b[32;1mpassed\x1b[0m, \x1b[1m1\x1b[0m \x1b[31;1mfailed\x1b[0m, 2 skipped";
        assert_eq!(Count::from_runner(coloured), expected);
    }

    #[test]
    fn cargo_test_results_are_added_up() {
        let text = "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.00s\n\
            noise\n\
            test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s\n";
        assert_eq!(
            Count::from_runner(text),
            Count {
                passed: 4,
                failed: 2,
                skipped: 1
            }
        );
    }

    #[test]
    fn the_count_line_names_skipped_tests_only_if_there_are_any() {
        let count = Count {
            passed: 2,
            failed: 0,
            skipped: 0,
        };
        assert_eq!(count.to_string(), "2 passed, 0 failed");
        let count = Count {
            skipped: 3,
            ..count
        };
        assert_eq!(count.to_string(), "2 passed, 0 failed, 3 skipped");
    }
}
