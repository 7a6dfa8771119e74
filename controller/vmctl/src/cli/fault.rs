//! `vmctl fault`: what can be typed.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

/// `vmctl fault ...`
#[derive(Debug, Subcommand)]
pub(crate) enum FaultCommand {
    /// Run a campaign: break things on purpose, watch what guests notice, judge
    #[command(
        long_about = "Run a campaign: break things on purpose, watch what guests notice, judge.

CAMPAIGN is a file, - for stdin, or the name of one from `vmctl fault library`. The controller must
have been started with --allow-faults. Interrupting this command stops the run.

Exit status: 0 pass, 1 fail or not done, 2 command line not understood, 3 inconclusive: nothing was
shown, for example because no fault hit anything.",
        after_help = "Examples:
  vmctl fault run crash-storm --vm web
  vmctl fault run campaign.yaml --html report.html --junit report.xml
  vmctl fault run campaign.yaml --dry-run             only check it
  vmctl fault run --again storm-1 --seed 42           the same once more, as its report says"
    )]
    Run(Box<RunArgs>),
    /// Check a campaign's file, without a controller
    #[command(after_help = "Examples:
  vmctl fault validate campaign.yaml
  vmctl fault validate - < campaign.yaml")]
    Validate {
        /// Its file, - for stdin, or a name from the library
        campaign: String,
        #[command(flatten)]
        choice: ChoiceArgs,
    },
    /// List runs
    List {
        /// Of all projects
        #[arg(long)]
        all_projects: bool,
    },
    /// Show one run: its state, hits and verdict
    Show {
        /// Its name
        name: String,
    },
    /// Stop a run; its faults end at once
    Stop {
        /// Its name
        name: String,
    },
    /// Print or write the report of a run
    #[command(after_help = "Examples:
  vmctl fault report storm-1
  vmctl fault report storm-1 --html report.html --junit report.xml
  vmctl fault report storm-1 -o json | jq .checks")]
    Report {
        /// The run's name
        name: String,
        #[command(flatten)]
        files: ReportFiles,
    },
    /// Forget a run and its report
    Delete {
        /// Its name
        name: String,
    },
    /// List the campaigns in this program, or print one of them as a file to begin with
    #[command(after_help = "Examples:
  vmctl fault library
  vmctl fault library crash-storm > campaign.yaml")]
    Library {
        /// The one to print
        name: Option<String>,
    },
    /// List the kinds of faults and their parameters
    Kinds,
    /// Look at, or turn, the switch for all faults; off ends everything at once
    #[command(after_help = "Examples:
  vmctl fault switch
  vmctl fault switch off")]
    Switch {
        /// Turn it
        #[arg(value_enum)]
        state: Option<SwitchState>,
    },
}

/// `vmctl fault run`
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// A file, - for stdin, or a name from the library
    #[arg(required_unless_present = "again", conflicts_with = "again")]
    pub(crate) campaign: Option<String>,
    /// Run the campaign of an earlier run
    #[arg(long, value_name = "RUN")]
    pub(crate) again: Option<String>,
    #[command(flatten)]
    pub(crate) choice: ChoiceArgs,
    /// Name of the run [default: the campaign's, with a number]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Only check it, with what the controller has now
    #[arg(long, visible_alias = "validate-only")]
    pub(crate) dry_run: bool,
    /// Return once it runs
    #[arg(short, long)]
    pub(crate) detach: bool,
    #[command(flatten)]
    pub(crate) files: ReportFiles,
}

/// What is said instead of the campaign's file.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ChoiceArgs {
    /// The VM, for faults and probes that name none of their own; '*' for all of the project
    #[arg(long)]
    pub(crate) vm: Option<String>,
    /// Its disk or NIC, likewise
    #[arg(long)]
    pub(crate) device: Option<String>,
    /// Of all that is left to chance [default: the file's, or a new one]
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// How long there are faults, such as 30s or 5m
    #[arg(long)]
    pub(crate) duration: Option<String>,
    /// Program on the host that upgrades go to
    #[arg(long, value_name = "FILE")]
    pub(crate) binary: Option<String>,
}

/// Where else a report goes.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ReportFiles {
    /// Write a page with plots, which needs nothing else
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// Write JUnit's XML
    #[arg(long, value_name = "FILE")]
    pub(crate) junit: Option<PathBuf>,
    /// Write the whole report as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

/// Of the switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SwitchState {
    /// Faults may be run
    On,
    /// All faults end, and none is begun
    Off,
}
