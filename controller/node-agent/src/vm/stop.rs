//! Ending a VM: the guest is asked, then vmm-core is, then it is killed; whatever way it ended,
//! all that was made for it goes.

use std::{path::Path, time::Duration};

use nix::sys::signal::Signal;
use tokio::time::Instant;
use tonic::Code;

use lease::Stage;

use super::{
    Actor, Command, Next, Refusal, ending, error_chain,
    leased::{self, LOST},
    machine::Machine,
    reply, vmm,
};
use crate::{
    process::{self, Exit, Identity, Process},
    record::{Failure, State},
    spec::Power,
    tap,
};

/// Between pressing the power button again: a guest that is still booting misses it.
const PRESS_INTERVAL: Duration = Duration::from_secs(5);
/// vmm-core stops its vCPUs and exits.
const STOP_WITHIN: Duration = Duration::from_secs(5);
/// A daemon drains its rings; a slow disk needs some time.
const DRAIN_WITHIN: Duration = Duration::from_secs(10);

/// Whether the guest is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StopHow {
    /// Power button first.
    Ask,
    /// Without the guest.
    Now,
    /// At once, by its processes' end: the host's lease is lost.
    Lost,
}

impl Actor {
    /// Stopping, as wished.
    pub(super) async fn stop(&mut self, mut machine: Box<Machine>, how: StopHow) -> Next {
        let _ = self.enter(State::Stopping(machine.assets()), Some(&machine));
        let exit = match how {
            StopHow::Ask => self.ask_guest(&mut machine).await,
            StopHow::Now | StopHow::Lost => None,
        };
        let lost = how == StopHow::Lost || (self.is_leased() && !self.holds_lease());
        let state = match exit {
            Some(exit) => ended_state(&machine.dir, exit, true),
            None if lost => {
                machine.kill_all().await;
                State::Stopped {
                    reason: LOST.to_owned(),
                }
            }
            None => ended_state(&machine.dir, stop_hard(&machine).await, true),
        };
        self.clean_up(*machine).await;
        let _ = self.enter(state, None);
        // Who lost the lease does not know what is wished of the VM now.
        match lost {
            true => Next::Rest,
            false => self.rest_or_restart(true),
        }
    }

    /// vmm-core ended by itself.
    pub(super) async fn ended(&mut self, machine: Machine, exit: Exit) -> Next {
        let state = ended_state(&machine.dir, exit, false);
        // Still Running in the record: the next agent would find vmm-core gone and get here again.
        self.clean_up(machine).await;
        match state {
            State::Failed(failure) => match self.restart(&failure.message) {
                Some(next) => next,
                None => self.fail(failure),
            },
            State::Stopped { reason } => self.finish(&reason),
            other => unreachable!("a VM that ended is {other:?}"),
        }
    }

    fn holds_lease(&self) -> bool {
        matches!(self.env.leases.stage(), Stage::Held { .. })
    }

    /// Presses the power button and waits for the guest; `None` when it does not react in time.
    /// Daemons go on being restarted: the guest is writing its last blocks.
    async fn ask_guest(&mut self, machine: &mut Machine) -> Option<Exit> {
        let asked_at = Instant::now();
        let mut press = tokio::time::interval(PRESS_INTERVAL);
        let vmm = machine.vmm.clone();
        let (env, spec) = (self.env.clone(), self.record.spec.clone());
        let lapse = leased::lapse(&env, &spec);
        tokio::pin!(lapse);
        let mut lease = self.env.leases.watch();
        lease.mark_changed();
        loop {
            let grace = Duration::from_millis(u64::from(self.record.spec.shutdown_grace_ms));
            tokio::select! {
                exit = vmm.exited() => return Some(exit),
                () = &mut lapse => return None,
                // Its disks need leave for its last blocks, too.
                Ok(()) = lease.changed(), if self.is_leased() => {
                    if !self.follow_lease(machine).await {
                        return None;
                    }
                }
                () = tokio::time::sleep_until(asked_at + grace) => return None,
                _ = machine.daemon_event(&self.env) => {
                    self.note_pins(machine);
                    let _ = self.enter(State::Stopping(machine.assets()), Some(machine));
                    machine.answer_upgrades();
                }
                _ = press.tick() => {
                    if let Err(error) = vmm::power_button(&machine.dir).await
                        && machine.vmm.exit().is_none()
                    {
                        tracing::warn!(vm = self.id(), "{}; stopping it hard", error_chain(&error));
                        return None;
                    }
                }
                command = self.commands.recv() => {
                    self.command_while_stopping(command?, machine);
                    if self.record.spec.power == Power::OffNow {
                        return None;
                    }
                }
            }
        }
    }

    /// A wish to run again is kept and acted upon afterwards.
    fn command_while_stopping(&mut self, command: Command, machine: &Machine) {
        match command {
            Command::Apply(spec, answer) => {
                let accepted = self.accept_unchanged_machine(*spec);
                self.publish(Some(machine));
                reply(answer, accepted);
            }
            Command::Reset(answer) => reply(answer, Err(Refusal::NotRunning { id: self.id() })),
            Command::Delete(answer) => reply(answer, Err(Refusal::Running { id: self.id() })),
            Command::Upgrade(_, answer) => self.refuse_upgrade(answer),
        }
    }

    /// Ends the daemons and removes sockets and taps. Logs stay until the VM is started again or
    /// deleted.
    pub(super) async fn clean_up(&self, mut machine: Machine) {
        machine.restarting.shutdown().await;
        machine.upgrading.shutdown().await;
        machine.sparing.shutdown().await;
        for daemon in &mut machine.daemons {
            daemon.spare = None;
        }
        let daemons = machine
            .daemons
            .iter_mut()
            .filter_map(|daemon| daemon.process.take());
        terminate(daemons.collect()).await;
        self.env.networks.withdraw(&self.id()).await;
        sweep(&machine.dir, &[]).await;
        remove_taps(&self.id(), &machine.taps).await;
        remove_sockets(&machine.dir);
        // Other VMs may have the images only now that nobody writes them any more.
        drop(machine.claims);
    }
}

impl Machine {
    /// Ends all processes without asking them.
    async fn kill_all(&mut self) {
        self.restarting.shutdown().await;
        self.upgrading.shutdown().await;
        let daemons = self.daemons.iter_mut();
        for process in daemons.filter_map(|daemon| daemon.process.take()) {
            process.kill().await;
        }
        self.vmm.kill().await;
    }
}

/// Stop by RPC, then SIGKILL.
async fn stop_hard(machine: &Machine) -> Exit {
    if let Err(error) = vmm::stop(&machine.dir).await {
        tracing::warn!("{}: {}", machine.dir.display(), error_chain(&error));
    } else if let Some(exit) = machine.vmm.exited_within(STOP_WITHIN).await {
        return exit;
    }
    machine.vmm.kill().await;
    machine.vmm.exit().unwrap_or(Exit::Unknown)
}

/// What a VM is whose vmm-core ended.
pub(super) fn ended_state(dir: &Path, exit: Exit, wished: bool) -> State {
    let failed = |message: String, stop_reason: &str| {
        State::Failed(Failure {
            code: Code::Internal as i32,
            message,
            stop_reason: stop_reason.to_owned(),
        })
    };
    match vmm::exit_note(dir) {
        Some(note) if note.reason == "vmm-error" => {
            failed(format!("vmm-core: {}", note.message), "vmm-error")
        }
        Some(note) => State::Stopped {
            reason: note.reason,
        },
        None if wished => State::Stopped {
            reason: "killed".into(),
        },
        None => {
            let reason = if matches!(exit, Exit::Code(_)) {
                "vmm-error"
            } else {
                "killed"
            };
            failed(ending("vmm-core", exit, &vmm::log(dir)), reason)
        }
    }
}

/// SIGTERM to all, then SIGKILL to those that do not end in time.
pub(super) async fn terminate(processes: Vec<Process>) {
    for process in &processes {
        process.signal(Signal::SIGTERM);
    }
    let deadline = Instant::now() + DRAIN_WITHIN;
    for process in &processes {
        let left = deadline.saturating_duration_since(Instant::now());
        if process.exited_within(left).await.is_none() {
            process.kill().await;
        }
    }
}

/// Kills all processes that serve a control socket in `dir`, except `known` ones: an agent that
/// died may have started some without having noted them.
pub(super) async fn sweep(dir: &Path, known: &[Identity]) {
    for pid in process::pids_serving(dir) {
        if known.iter().any(|identity| identity.pid == pid) {
            continue;
        }
        let Some(start_ticks) = process::start_ticks(pid) else {
            continue;
        };
        if let Some(process) = Process::adopt(Identity { pid, start_ticks }) {
            tracing::warn!(pid, "killing a process left behind in {}", dir.display());
            process.kill().await;
        }
    }
}

pub(super) async fn remove_taps(vm: &str, taps: &[String]) {
    for name in taps {
        if let Err(error) = tap::remove(name).await {
            tracing::warn!(vm, "{}", error_chain(&error));
        }
    }
}

/// Leaves the logs and the exit note.
pub(super) fn remove_sockets(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let kept = path
            .extension()
            .is_some_and(|extension| extension == "log" || extension == "json");
        if !kept && let Err(error) = std::fs::remove_file(&path) {
            tracing::warn!("removing {}: {error}", path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir_with_note(note: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(vmm::exit_file(dir.path()), note).unwrap();
        dir
    }

    #[test]
    fn exit_note_decides_what_a_vm_became() {
        let dir = dir_with_note(r#"{"reason":"guest-shutdown","message":""}"#);
        assert_eq!(
            ended_state(dir.path(), Exit::Unknown, false),
            State::Stopped {
                reason: "guest-shutdown".into()
            }
        );
        let dir = dir_with_note(r#"{"reason":"vmm-error","message":"triple fault"}"#);
        let State::Failed(failure) = ended_state(dir.path(), Exit::Code(1), false) else {
            panic!("an error is a failure");
        };
        assert_eq!(
            (failure.message.as_str(), failure.stop_reason.as_str()),
            ("vmm-core: triple fault", "vmm-error")
        );
    }

    #[test]
    fn killed_vmm_core_is_a_failure_unless_it_was_wished() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(vmm::log(dir.path()), "started\nlast words\n").unwrap();
        let State::Failed(failure) = ended_state(dir.path(), Exit::Signal(libc::SIGKILL), false)
        else {
            panic!("a crash is a failure");
        };
        assert_eq!(
            failure.message,
            "vmm-core was killed by SIGKILL: last words"
        );
        assert_eq!(failure.stop_reason, "killed");
        assert_eq!(
            ended_state(dir.path(), Exit::Signal(libc::SIGKILL), true),
            State::Stopped {
                reason: "killed".into()
            }
        );
    }

    #[test]
    fn logs_and_note_survive_the_sockets() {
        let dir = dir_with_note("{}");
        for name in ["vmm.sock", "root.vu", "vmm.log"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        remove_sockets(dir.path());
        let mut left: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["exit.json", "vmm.log"]);
    }
}
