//! Taking over a VM that an earlier agent left: its record says what existed, the kernel says
//! what still does.

use api::device::DaemonInfo;

use super::{
    Actor, Env, Next,
    daemon::{self, Plan},
    disk, error_chain,
    machine::{Daemon, Machine},
    passt, ports, remove_dir,
    restart::Wait,
    stop::{self, StopHow, sweep},
};
use crate::{
    image::Claim,
    process::{Exit, Identity, Process},
    record::{Assets, DaemonRecord, State},
    spec::{Power, Spec},
};

pub(super) async fn adopt(actor: &mut Actor) -> Next {
    match actor.record.state.clone() {
        State::Stopped { .. } | State::Failed(_) => Next::Rest,
        State::Starting(assets) => {
            undo_start(actor, &assets).await;
            // One that had nothing yet does not say of which boot it is.
            let is_old = !assets.boot_id.is_empty() && assets.boot_id != actor.env.boot_id;
            if is_old && !actor.record.spec.comes_back() {
                return actor.finish("host-reboot");
            }
            if actor.record.spec.power == Power::On {
                Next::Start
            } else {
                actor.finish("stop-request")
            }
        }
        State::Running(assets) | State::Stopping(assets) if assets.boot_id != actor.env.boot_id => {
            let dir = actor.env.vm_dir(&actor.record.spec.id);
            stop::remove_sockets(&dir);
            match actor.record.state.ran() && actor.record.spec.comes_back() {
                true => Next::StartAfter(Wait::Turn(actor.record.spec.autostart_order)),
                false => actor.finish("host-reboot"),
            }
        }
        State::Running(assets) => match adopt_machine(actor, &assets).await {
            Ok(mut machine) => {
                machine.keep_spares(actor.wants_spares());
                machine.refresh().await;
                let _ = actor.enter(State::Running(machine.assets()), Some(&machine));
                match actor.record.spec.power {
                    Power::On => Next::Run(machine),
                    Power::Off => Next::Stop(machine, StopHow::Ask),
                    Power::OffNow => Next::Stop(machine, StopHow::Now),
                }
            }
            Err(state) => settle(actor, state),
        },
        State::Stopping(assets) => match adopt_machine(actor, &assets).await {
            Ok(machine) => {
                let how = match actor.record.spec.power {
                    Power::OffNow => StopHow::Now,
                    Power::Off | Power::On => StopHow::Ask,
                };
                Next::Stop(machine, how)
            }
            Err(state) => {
                settle(actor, state);
                actor.rest_or_restart(true)
            }
        },
    }
}

async fn undo_start(actor: &Actor, assets: &Assets) {
    let id = &actor.record.spec.id;
    let dir = actor.env.vm_dir(id);
    sweep(&dir, &[]).await;
    actor.env.networks.withdraw(id).await;
    if assets.boot_id == actor.env.boot_id {
        stop::remove_taps(id, &assets.taps).await;
    }
    if let Err(error) = remove_dir(&dir) {
        tracing::warn!(vm = id, "removing {}: {error}", dir.display());
    }
}

fn settle(actor: &mut Actor, state: State) -> Next {
    match state {
        State::Failed(failure) => match actor.restart(&failure.message) {
            Some(next) => next,
            None => actor.fail(failure),
        },
        State::Stopped { reason } => actor.finish(&reason),
        other => unreachable!("a VM that ended is {other:?}"),
    }
}

/// The running machine, or what became of it (everything else is removed then).
async fn adopt_machine(actor: &Actor, assets: &Assets) -> Result<Box<Machine>, State> {
    let env = &actor.env;
    let spec = &ports::joined_as_known(env, &actor.record.spec);
    let dir = env.vm_dir(&spec.id);
    let known: Vec<Identity> = assets
        .daemons
        .iter()
        .filter_map(|daemon| daemon.process)
        .chain(assets.vmm)
        .collect();
    sweep(&dir, &known).await;
    let mut daemons = Vec::new();
    let passt = passt::find(env.passt.as_deref(), &env.bin_dir, spec).await;
    // One that is gone is looked for by its name until it is back.
    let passt = passt.unwrap_or_else(|_| passt::PROGRAM.into());
    let plans = daemon::plans(
        spec,
        &env.bin_dir,
        &passt,
        &dir,
        &env.volumes,
        &env.networks,
    );
    for mut plan in plans {
        plan.use_pin(&actor.record.pins);
        plan.use_knobs(&env.knobs);
        plan.use_leases(spec, &env.leases);
        let record = assets
            .daemons
            .iter()
            .find(|record| record.kind == plan.kind);
        daemons.push(adopt_daemon(plan, record).await);
    }
    let Some(vmm) = assets.vmm.and_then(Process::adopt) else {
        let wished = spec.power != Power::On;
        let state = stop::ended_state(&dir, Exit::Unknown, wished);
        let processes = daemons
            .iter_mut()
            .filter_map(|daemon| daemon.process.take());
        stop::terminate(processes.collect()).await;
        env.networks.withdraw(&spec.id).await;
        stop::remove_taps(&spec.id, &assets.taps).await;
        stop::remove_sockets(&dir);
        return Err(state);
    };
    tracing::info!(vm = spec.id, pid = vmm.pid(), "adopted");
    let mut machine = Machine::new(
        dir,
        vmm,
        daemons,
        assets.taps.clone(),
        claim_images(env, spec),
        env.boot_id.clone(),
        assets.started_at_ms,
    );
    for index in 0..machine.daemons.len() {
        if machine.daemons[index].process.is_none() {
            machine.restart(index);
        }
    }
    Ok(Box::new(machine))
}

/// A daemon that lives and serves all its devices is kept; any other is to be restarted.
async fn adopt_daemon(plan: Plan, record: Option<&DaemonRecord>) -> Daemon {
    let restarts = record.map_or(0, |record| record.restarts);
    let process = record
        .and_then(|record| record.process)
        .and_then(Process::adopt);
    let Some(process) = process else {
        return Daemon::adopted(plan, None, restarts, DaemonInfo::default());
    };
    match plan.check(process.pid()).await {
        Ok(Some(info)) => Daemon::adopted(plan, Some(process), restarts, info),
        incomplete => {
            let problem = match incomplete {
                Err(error) => error_chain(&error),
                Ok(_) => "it does not serve all its devices".to_owned(),
            };
            tracing::warn!(
                pid = process.pid(),
                "{}: {problem}; restarting it",
                plan.kind.program()
            );
            process.kill().await;
            Daemon::adopted(plan, None, restarts, DaemonInfo::default())
        }
    }
}

/// The images are in use already: a claim that cannot be had is worth a warning, not an end.
fn claim_images(env: &Env, spec: &Spec) -> Vec<Claim> {
    spec.disks
        .iter()
        .flat_map(|disk| disk::claim_adopted(disk, &env.volumes, &env.claims, &spec.id))
        .collect()
}
