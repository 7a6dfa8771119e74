//! Are the CPUs there, and do they run at the same time?

use std::sync::Barrier;
use std::thread;

use guest::report::Report;
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;

/// Runs one pinned thread per CPU; all meet at a barrier, so each must really run.
pub(crate) fn check(cpus: u32) -> Report {
    let online = online();
    let barrier = &Barrier::new(cpus as usize);
    let ran: Vec<Result<usize, String>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..cpus as usize)
            .map(|cpu| scope.spawn(move || run_on(cpu, barrier)))
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|_| Err("a thread panicked".into()))
            })
            .collect()
    });
    let used = ran
        .iter()
        .zip(0..)
        .filter(|(result, cpu)| result.as_ref() == Ok(cpu))
        .count();
    let failure = ran.into_iter().find_map(Result::err);
    let error = match failure {
        Some(failure) => Some(failure),
        None if online != cpus => Some(format!("{online} CPUs are online, not {cpus}")),
        None if used != cpus as usize => Some(format!("{used} CPUs ran, not {cpus}")),
        None => None,
    };
    Report::Smp {
        online,
        used: used as u32,
        error,
    }
}

fn run_on(cpu: usize, barrier: &Barrier) -> Result<usize, String> {
    let mut only = CpuSet::new();
    let pinned = only
        .set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &only));
    // The others wait at the barrier even if this thread could not be pinned.
    barrier.wait();
    pinned.map_err(|error| format!("cannot run on CPU {cpu}: {error}"))?;
    sched_getcpu().map_err(|error| error.to_string())
}

fn online() -> u32 {
    // SAFETY: sysconf only returns a number.
    let count = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    u32::try_from(count).unwrap_or(0)
}
