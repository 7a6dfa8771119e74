//! `cargo lab fuzz`: libFuzzer looks for inputs that break what `tests/fuzz` promises.
//!
//! No sanitizer is involved, so the stable compiler can build the programs: coverage is measured by a
//! pass of LLVM's own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::progress::step;
use crate::workspace::{self, Binary};

/// Coverage that libFuzzer understands, and every check that a debug build has.
const RUSTFLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Ccodegen-units=1 \
     -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
     -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares \
     -Cdebug-assertions -Coverflow-checks -Cdebuginfo=line-tables-only";
/// One input may take this long.
const INPUT_LIMIT_SECONDS: u64 = 20;
/// What a program may take beyond its time: reading the corpus, and one last input.
const GRACE: Duration = Duration::from_secs(60);
const MAX_INPUT_BYTES: u32 = 24 << 10;
/// Of a panic: what and where.
const SAID_LINES: usize = 4;
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// The exit code when an input was found that breaks a promise.
const FOUND: i32 = 3;

/// The fuzzing's command line.
#[derive(Debug, Args)]
pub(crate) struct Fuzz {
    /// Targets to run; all of them by default.
    targets: Vec<String>,
    /// How long each target runs.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Only run this input, once.
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
}

/// What is known of one target's run.
struct Outcome {
    name: String,
    log: PathBuf,
    passed: bool,
}

impl Fuzz {
    /// Exit code 0 only if every target kept its promise, [`FOUND`] if one did not.
    pub(crate) fn run(self) -> Result<i32> {
        step("building the fuzz targets");
        let programs = self.wanted(build()?)?;
        if let Some(input) = &self.input {
            let [program] = &programs[..] else {
                bail!("an input is for one target: cargo lab fuzz TARGET --input FILE");
            };
            let status = Command::new(&program.file).arg(input).status()?;
            return Ok(i32::from(!status.success()));
        }
        let at_once = thread::available_parallelism().map_or(1, usize::from);
        let mut outcomes = Vec::new();
        for some in programs.chunks(at_once) {
            let names: Vec<&str> = some.iter().map(|program| program.name.as_str()).collect();
            step(format_args!(
                "{} for {} s",
                names.join(" and "),
                self.seconds
            ));
            let results: Vec<Result<Outcome>> = thread::scope(|scope| {
                let seconds = self.seconds;
                let run = |program| scope.spawn(move || fuzz(program, seconds));
                let running: Vec<_> = some.iter().map(run).collect();
                let join =
                    |handle: thread::ScopedJoinHandle<'_, _>| handle.join().expect("no panic");
                running.into_iter().map(join).collect()
            });
            for result in results {
                outcomes.push(result?);
            }
        }
        println!(
            "{:<16} {:>12} {:>10} {:>10}",
            "target", "inputs", "coverage", "result"
        );
        for outcome in &outcomes {
            outcome.print()?;
        }
        let failed = outcomes.iter().filter(|outcome| !outcome.passed);
        Ok(if failed.count() > 0 { FOUND } else { 0 })
    }

    fn wanted(&self, all: Vec<Binary>) -> Result<Vec<Binary>> {
        let names: Vec<String> = all.iter().map(|program| program.name.clone()).collect();
        for target in &self.targets {
            ensure!(
                names.contains(target),
                "there is no target {target}; there are {}",
                names.join(", ")
            );
        }
        let is_wanted =
            |program: &Binary| self.targets.is_empty() || self.targets.contains(&program.name);
        Ok(all.into_iter().filter(is_wanted).collect())
    }
}

fn fuzz(program: &Binary, seconds: u64) -> Result<Outcome> {
    let name = &program.name;
    let dir = workspace::lab_subdir(&format!("fuzz/{name}"))?;
    let found = workspace::lab_subdir(&format!("fuzz/{name}/corpus"))?;
    let log = dir.join("log");
    let mut child = Command::new(&program.file)
        .arg(found)
        .arg(workspace::root().join("tests/fuzz/corpus").join(name))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={INPUT_LIMIT_SECONDS}"))
        .arg(format!("-max_len={MAX_INPUT_BYTES}"))
        .arg(format!("-artifact_prefix={}/", dir.display()))
        .args(["-print_final_stats=1", "-reload=0"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log)?)
        .spawn()
        .with_context(|| format!("cannot run {}", program.file.display()))?;
    let passed = wait(&mut child, Duration::from_secs(seconds) + GRACE)?;
    Ok(Outcome {
        name: name.clone(),
        log,
        passed,
    })
}

fn build() -> Result<Vec<Binary>> {
    let mut command = workspace::cargo();
    command
        .env("RUSTFLAGS", RUSTFLAGS)
        .env("CARGO_TARGET_DIR", workspace::lab_subdir("fuzz/build")?);
    let args = [
        "build",
        "--release",
        "--bins",
        "--package",
        "fuzz",
        "--features",
        "fuzz/libfuzzer",
    ];
    workspace::build_with(command, &args)
}

/// Whether it ended well; killed when it takes too long.
fn wait(child: &mut Child, limit: Duration) -> Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            return Ok(false);
        }
        thread::sleep(POLL_INTERVAL);
    }
}

impl Outcome {
    fn print(&self) -> Result<()> {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let word = |key| last_number(&text, key).map_or("?".to_owned(), |n| n.to_string());
        let (inputs, coverage) = (word("stat::number_of_executed_units:"), word("cov:"));
        let result = if self.passed { "passed" } else { "FAILED" };
        println!("{:<16} {inputs:>12} {coverage:>10} {result:>10}", self.name);
        if self.passed {
            return Ok(());
        }
        let said = text
            .lines()
            .skip_while(|line| !line.contains("panicked at"));
        for line in said.take(SAID_LINES) {
            println!("    {line}");
        }
        println!("    all it said: {}", self.log.display());
        let dir = self.log.parent().unwrap_or(Path::new("."));
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if is_artifact(&path) {
                let (name, path) = (&self.name, path.display());
                println!("    again: cargo lab fuzz {name} --input {path}");
            }
        }
        Ok(())
    }
}

fn is_artifact(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    ["crash-", "timeout-", "oom-", "leak-"]
        .iter()
        .any(|kind| name.starts_with(kind))
}

/// The number behind the last `key`.
fn last_number(text: &str, key: &str) -> Option<u64> {
    let (_, rest) = text.rsplit_once(key)?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_from_the_last_line_that_has_them() {
        let log =
            "#1 INITED cov: 12 ft: 13\n#9 NEW cov: 40 ft: 55\nstat::number_of_executed_units: 77\n";
        assert_eq!(last_number(log, "cov:"), Some(40));
        assert_eq!(
            last_number(log, "stat::number_of_executed_units:"),
            Some(77)
        );
        assert_eq!(last_number(log, "exec/s:"), None);
    }
}
