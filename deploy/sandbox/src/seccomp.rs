//! Deny-by-default system call filters.
//!
//! A [`Profile`] has a name and the union of [`Syscalls`] sets (see [`sets`]). What is in no set
//! kills the process. A set can also *refuse* a system call: it fails with an error number, for
//! calls that libraries make on the side and cope without.
//!
//! The environment variable `MORTISE_SECCOMP` changes what happens to a forbidden call, for
//! debugging only: `log` (the kernel logs it and lets it pass), `trap` (its number is printed to
//! standard error and the process aborts), `off` (no filter at all).

pub mod sets;
mod trap;

use std::collections::{BTreeMap, BTreeSet};
use std::env;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::Achieved;

/// A named system call filter.
#[derive(Clone, Debug)]
pub struct Profile {
    name: &'static str,
    syscalls: Syscalls,
}

impl Profile {
    /// Allows `syscalls` and nothing else.
    pub fn new(name: &'static str, syscalls: Syscalls) -> Self {
        Self { name, syscalls }
    }

    /// Filters the calling thread and the threads it starts from now on.
    ///
    /// # Errors
    /// `MORTISE_SECCOMP` has an unknown value, or the kernel refused the filter.
    pub fn apply_to_this_thread(&self) -> Result<Achieved, SeccompError> {
        self.apply(seccompiler::apply_filter)
    }

    /// Filters every thread of the process, and those that start from now on.
    ///
    /// # Errors
    /// As [`Self::apply_to_this_thread`]; also if a thread has a filter of its own already.
    pub fn apply_to_all_threads(&self) -> Result<Achieved, SeccompError> {
        self.apply(seccompiler::apply_filter_all_threads)
    }

    fn apply(
        &self,
        install: fn(&[seccompiler::sock_filter]) -> Result<(), seccompiler::Error>,
    ) -> Result<Achieved, SeccompError> {
        let mode = Mode::from_env()?;
        let forbidden = match mode {
            Mode::Kill => SeccompAction::KillProcess,
            Mode::Log => SeccompAction::Log,
            Mode::Trap => SeccompAction::Trap,
            Mode::Off => {
                eprintln!(
                    "WARNING: MORTISE_SECCOMP=off: {} runs WITHOUT its system call filter",
                    self.name
                );
                return Ok(Achieved::missing("seccomp", "off by MORTISE_SECCOMP"));
            }
        };
        if mode != Mode::Kill {
            eprintln!(
                "WARNING: MORTISE_SECCOMP is set: {} does not die of forbidden system calls as it should",
                self.name
            );
        }
        if mode == Mode::Trap {
            trap::install_handler();
        }
        let failed = |source| SeccompError::Install {
            profile: self.name,
            source,
        };
        // The filter that kills comes last, since it forbids installing another.
        for program in self
            .programs(forbidden)
            .map_err(|source| failed(source.into()))?
        {
            install(&program).map_err(failed)?;
        }
        Ok(match mode {
            Mode::Kill => Achieved::of(format!("seccomp:{}", self.name)),
            _ => Achieved::missing("seccomp", format!("{} only observed", self.name)),
        })
    }

    /// One program for each error number that refused calls get, then the one that allows.
    /// The kernel takes the strictest verdict of all.
    fn programs(
        &self,
        forbidden: SeccompAction,
    ) -> Result<Vec<BpfProgram>, seccompiler::BackendError> {
        let Syscalls { allowed, refused } = &self.syscalls;
        let mut main_rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for (&syscall, condition) in allowed {
            main_rules.insert(syscall, condition.rules()?);
        }
        let mut by_errno: BTreeMap<u32, BTreeMap<i64, Vec<SeccompRule>>> = BTreeMap::new();
        for (&syscall, refusal) in refused {
            if !allowed.contains_key(&syscall) {
                main_rules.insert(syscall, Vec::new());
                let rules = by_errno.entry(refusal.errno).or_default();
                rules.insert(syscall, refusal.when.rules()?);
            }
        }
        let mut programs = Vec::with_capacity(by_errno.len() + 1);
        for (errno, rules) in by_errno {
            programs.push(compile(
                rules,
                SeccompAction::Allow,
                SeccompAction::Errno(errno),
            )?);
        }
        programs.push(compile(main_rules, forbidden, SeccompAction::Allow)?);
        Ok(programs)
    }
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    on_match: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(rules, otherwise, on_match, TargetArch::x86_64)?.try_into()
}

/// What happens to a system call that the profile does not contain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Kill,
    Log,
    Trap,
    Off,
}

impl Mode {
    fn from_env() -> Result<Self, SeccompError> {
        let value = env::var_os("MORTISE_SECCOMP").unwrap_or_default();
        match value.to_str() {
            Some("" | "kill") => Ok(Self::Kill),
            Some("log") => Ok(Self::Log),
            Some("trap") => Ok(Self::Trap),
            Some("off") => Ok(Self::Off),
            _ => Err(SeccompError::UnknownMode(
                value.to_string_lossy().into_owned(),
            )),
        }
    }
}

/// A set of system calls; sets add up with [`Syscalls::with`].
#[derive(Clone, Debug, Default)]
pub struct Syscalls {
    allowed: BTreeMap<i64, Condition>,
    refused: BTreeMap<i64, Refusal>,
}

impl Syscalls {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Allows each of `syscalls` (`libc::SYS_*`), whatever the arguments.
    pub fn allow(mut self, syscalls: &[i64]) -> Self {
        for &syscall in syscalls {
            self.allowed.insert(syscall, Condition::Always);
        }
        self
    }

    /// Allows `syscall` when all of `args` hold. Several such rules for one call are alternatives;
    /// an unconditional one wins over all.
    pub fn allow_if(mut self, syscall: i64, args: &[Arg]) -> Self {
        self.insert(syscall, Condition::AnyOf(BTreeSet::from([args.to_vec()])));
        self
    }

    /// Allows `ioctl` for each of `requests`.
    pub fn allow_ioctls(self, requests: &[u64]) -> Self {
        requests.iter().fold(self, |set, &request| {
            set.allow_if(libc::SYS_ioctl, &[Arg::Int(1, request as u32)])
        })
    }

    /// Makes each of `syscalls` fail with `errno` instead of killing; any rule that allows the
    /// call, from whatever set, wins.
    pub fn refuse(mut self, syscalls: &[i64], errno: i32) -> Self {
        for &syscall in syscalls {
            let refusal = Refusal::new(Condition::Always, errno);
            self.refused.insert(syscall, refusal);
        }
        self
    }

    /// Makes `syscall` fail with `errno` when all of `args` hold and lets it pass otherwise; any
    /// rule that allows the call, from whatever set, wins.
    pub fn refuse_if(mut self, syscall: i64, args: &[Arg], errno: i32) -> Self {
        let when = Condition::AnyOf(BTreeSet::from([args.to_vec()]));
        self.refused.insert(syscall, Refusal::new(when, errno));
        self
    }

    /// The union of both sets.
    pub fn with(mut self, other: Self) -> Self {
        for (syscall, condition) in other.allowed {
            self.insert(syscall, condition);
        }
        self.refused.extend(other.refused);
        self
    }

    fn insert(&mut self, syscall: i64, condition: Condition) {
        let entry = self
            .allowed
            .entry(syscall)
            .or_insert_with(|| Condition::AnyOf(BTreeSet::new()));
        match (entry, condition) {
            (Condition::AnyOf(rules), Condition::AnyOf(more)) => rules.extend(more),
            (entry, Condition::Always) => *entry = Condition::Always,
            (Condition::Always, _) => {}
        }
    }
}

/// A condition on one argument of a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arg {
    /// The 32-bit argument with this index (from 0) has this value.
    Int(u8, u32),
    /// The bits `mask` of the 64-bit argument `index` are `value`.
    Bits {
        /// From 0.
        index: u8,
        /// Which bits count.
        mask: u64,
        /// What those bits must be.
        value: u64,
    },
}

/// A system call that fails with `errno` in the case `when`.
#[derive(Clone, Debug)]
struct Refusal {
    when: Condition,
    errno: u32,
}

impl Refusal {
    fn new(when: Condition, errno: i32) -> Self {
        Self {
            when,
            errno: errno.unsigned_abs(),
        }
    }
}

#[derive(Clone, Debug)]
enum Condition {
    Always,
    AnyOf(BTreeSet<Vec<Arg>>),
}

impl Condition {
    /// An empty list matches always.
    fn rules(&self) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
        match self {
            Self::Always => Ok(Vec::new()),
            Self::AnyOf(rules) => rules
                .iter()
                .map(|args| {
                    SeccompRule::new(args.iter().map(Arg::condition).collect::<Result<_, _>>()?)
                })
                .collect(),
        }
    }
}

impl Arg {
    fn condition(&self) -> Result<SeccompCondition, seccompiler::BackendError> {
        match *self {
            Self::Int(index, value) => SeccompCondition::new(
                index,
                SeccompCmpArgLen::Dword,
                SeccompCmpOp::Eq,
                u64::from(value),
            ),
            Self::Bits { index, mask, value } => SeccompCondition::new(
                index,
                SeccompCmpArgLen::Qword,
                SeccompCmpOp::MaskedEq(mask),
                value,
            ),
        }
    }
}

/// A filter could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The environment asks for something that does not exist.
    #[error("MORTISE_SECCOMP={0:?} is unknown; use kill, log, trap or off")]
    UnknownMode(String),
    /// The kernel refused, or the filter cannot be compiled.
    #[error("cannot install the system call filter {profile:?}")]
    Install {
        /// The profile's name.
        profile: &'static str,
        /// What went wrong.
        #[source]
        source: seccompiler::Error,
    },
}
