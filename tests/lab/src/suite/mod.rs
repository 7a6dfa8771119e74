//! `cargo lab test`: all tests, the fast ones first, with one count at the end.

mod count;

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use crate::artifacts::Program;
use crate::initramfs::Tool;
use crate::inside::test_run::{PREFIX, needs_two_hosts};
use crate::job::{Event, Job, Outcome, TestResult};
use crate::kvm::Ground;
use crate::progress::step;
use crate::runner::{Kit, Run};
use crate::{tool, workspace, wrappers};
use count::Count;

/// The test run's command line.
#[derive(Debug, Args)]
pub(crate) struct Suite {
    /// Also the long ones (marked `#[ignore]`).
    #[arg(long)]
    all: bool,
    /// Use a nested host even where hardware KVM is there.
    #[arg(long)]
    nested: bool,
    /// Run each test that needs a KVM so often, until it fails: for what fails seldom.
    #[arg(long, default_value_t = 1, value_name = "TIMES", value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Show the nested host's console.
    #[arg(long, short)]
    verbose: bool,
    /// Only tests whose names contain this.
    filter: Option<String>,
}

impl Suite {
    /// Exit code 0 only if no test failed and all stages could run.
    pub(crate) fn run(self) -> Result<i32> {
        let kit = Kit::prepare()?;
        step("building the tests");
        let on_kvm = self.tests_on_kvm()?;
        let mut total = Count::default();
        let mut complete = true;
        if !self.filter().starts_with(PREFIX) {
            step("tests that need no VM");
            let (count, success) = self.native(&kit, &on_kvm)?;
            complete &= success || count.failed > 0;
            total.add(&count);
        }
        for (two_hosts, wanted) in [(false, on_kvm.wanted), (true, on_kvm.wanted_of_two_hosts)] {
            if wanted == 0 {
                continue;
            }
            let (count, result) = self.on_kvm(&kit, &on_kvm, two_hosts);
            total.add(&count);
            if let Err(error) = result {
                eprintln!("lab: error: {error:#}");
                // What did not run cannot have passed.
                let wanted = wanted * u64::from(self.repeat);
                total.failed += wanted.saturating_sub(count.sum()).max(1);
            }
        }
        if !complete {
            eprintln!("lab: error: a test runner failed without naming a test; see above");
        }
        println!("{total}");
        Ok(i32::from(total.failed > 0 || !complete))
    }

    fn filter(&self) -> &str {
        self.filter.as_deref().unwrap_or_default()
    }

    fn tests_on_kvm(&self) -> Result<OnKvm> {
        let scope: &[&str] = match self.filter().starts_with(PREFIX) {
            true => &["--package", "it"],
            false => &["--workspace"],
        };
        let built = workspace::build(&[&["test", "--no-run"], scope].concat())?;
        let binary = built.into_iter().find(|binary| binary.name == "it");
        let binary = binary.context("cargo built no integration tests")?.file;
        let list = tool::output(Command::new(&binary).args(["--list", "--format", "terse"]))?;
        let names: Vec<&str> = list
            .lines()
            .filter_map(|line| line.strip_suffix(": test"))
            .filter(|name| name.starts_with(PREFIX))
            .collect();
        let (two_hosts, one_host): (Vec<&str>, Vec<&str>) = names
            .iter()
            .filter(|name| name.contains(self.filter()))
            .partition(|name| needs_two_hosts(name));
        Ok(OnKvm {
            binary,
            all: names.len() as u64,
            wanted: one_host.len() as u64,
            wanted_of_two_hosts: two_hosts.len() as u64,
        })
    }

    fn native(&self, kit: &Kit, on_kvm: &OnKvm) -> Result<(Count, bool)> {
        let has_nextest = tool::find("cargo-nextest").is_some();
        let mut command = if has_nextest {
            let mut command = workspace::cargo();
            command.args([
                "nextest",
                "run",
                "--workspace",
                "--no-fail-fast",
                "--no-tests=pass",
            ]);
            command.args(["-E", &format!("not test(/^{PREFIX}/)")]);
            if self.all {
                command.args(["--run-ignored", "all"]);
            }
            command.args(&self.filter);
            command
        } else {
            let mut command = workspace::cargo();
            command
                .args(["test", "--workspace", "--no-fail-fast"])
                .args(&self.filter);
            command.args(["--", "--skip", PREFIX]);
            if self.all {
                command.arg("--include-ignored");
            }
            command
        };
        command
            .envs(kit.site().variables())
            .envs(wrappers::variables(&kit.artifacts)?);
        let (text, success) = relay(&mut command)?;
        let mut count = Count::from_runner(&text);
        if has_nextest {
            // It counts what a filter leaves out as skipped; the next stage runs those of ours.
            count.skipped = match self.filter {
                Some(_) => 0,
                None => count.skipped.saturating_sub(on_kvm.all),
            };
        }
        Ok((count, success))
    }

    fn on_kvm(&self, kit: &Kit, tests: &OnKvm, two_hosts: bool) -> (Count, Result<()>) {
        let ground = match two_hosts {
            true => Ground::Nested("they need two hosts".to_owned()),
            false => Ground::choose(self.nested),
        };
        match &ground {
            Ground::Direct => step("tests on hardware KVM"),
            Ground::Nested(why) => step(format_args!("tests in a nested host: {why}")),
        }
        let mut count = Count::default();
        let done = RefCell::new(Vec::new());
        let run = self.kvm_run(kit, &ground, tests, two_hosts);
        let result = run.and_then(|run| {
            let make = |site| Job::Tests {
                site,
                binary: if ground == Ground::Direct {
                    tests.binary.clone()
                } else {
                    "/usr/bin/it".into()
                },
                filter: self.filter().to_owned(),
                two_hosts,
                long: self.all,
                times: self.repeat,
                done: done.borrow().clone(),
            };
            run.job(kit, make, |event| match event {
                Event::Step { text } => step(text),
                Event::Test(result) => {
                    print_result(result);
                    done.borrow_mut().push(result.name.clone());
                    count.one(result.outcome);
                }
                _ => {}
            })
        });
        (count, result.map(drop))
    }

    fn kvm_run<'a>(
        &self,
        kit: &Kit,
        ground: &'a Ground,
        tests: &OnKvm,
        two_hosts: bool,
    ) -> Result<Run<'a>> {
        let file = workspace::stripped(&tests.binary)?;
        let program = Program {
            file,
            library_dirs: Vec::new(),
        };
        let hours = if self.all { 10 } else { 1 };
        let mut extra_tools = vec![Tool {
            name: "it".into(),
            program,
        }];
        let mut extra_files = Vec::new();
        // Only long tests set others' VMMs beside ours.
        if self.all && !two_hosts {
            let qemu = &kit.artifacts.qemu;
            extra_tools.push(Tool {
                name: qemu.program.name(),
                program: qemu.program.clone(),
            });
            extra_files = qemu.firmware();
        }
        Ok(Run {
            ground,
            extra_tools,
            extra_files,
            third_parties: true,
            memory_mib: if two_hosts { 3072 } else { 6144 },
            timeout: Duration::from_secs(hours * 3600 / 2),
            show_console: self.verbose,
            log_name: if two_hosts { "test-two-hosts" } else { "test" },
            neighbour: two_hosts,
        })
    }
}

/// The tests that need a KVM.
struct OnKvm {
    binary: PathBuf,
    all: u64,
    /// Of one host.
    wanted: u64,
    wanted_of_two_hosts: u64,
}

fn print_result(result: &TestResult) {
    let word = match result.outcome {
        Outcome::Passed => "PASS",
        Outcome::Failed => "FAIL",
        Outcome::Skipped => "SKIP",
    };
    println!(
        "        {word} [{:>8.3}s] {}",
        result.elapsed_ms as f64 / 1000.0,
        result.name
    );
    if !result.output.is_empty() {
        for line in result.output.lines() {
            println!("    {line}");
        }
    }
}

/// Runs a command, shows its output and returns it, with its success.
fn relay(command: &mut Command) -> Result<(String, bool)> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let stdout = child.stdout.take().context("no pipe")?;
    let stderr = child.stderr.take().context("no pipe")?;
    let text = thread::scope(|scope| {
        let errors = scope.spawn(move || copy(stderr, std::io::stderr()));
        let mut text = copy(stdout, std::io::stdout());
        text.push_str(&errors.join().unwrap_or_default());
        text
    });
    Ok((text, child.wait()?.success()))
}

fn copy(from: impl Read, mut to: impl Write) -> String {
    let mut text = String::new();
    let mut lines = BufReader::new(from);
    let mut line = Vec::new();
    while matches!(lines.read_until(b'\n', &mut line), Ok(1..)) {
        let _ = to.write_all(&line);
        text.push_str(&String::from_utf8_lossy(&line));
        line.clear();
    }
    text
}
