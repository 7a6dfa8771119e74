//! Faults that are armed at the agent, under a guest that writes to its disk all the time.

use std::time::Duration;

use api::{
    device::{
        CrashFault, DisconnectFault, ErrorFault, FaultOp, FaultRule, FaultSelector, FaultTrigger,
        LateKickFault, LateReconnectFault, fault_rule::Action,
    },
    node::{
        ArmFaultsRequest, ControllerPartitionFault, DisarmFaultsRequest, Fault, FaultEventKind,
        FaultProcess, FaultState, FaultStatus, FaultTarget, FdExhaustionFault, FreezeFault,
        HostFault, KillFault, ListFaultsRequest, OutOfMemoryFault, OutageAction, OutagePolicy,
        ProcessFault, SetFaultSwitchRequest, SlowStartFault, StoreLossFault, VersionSkewFault,
        VmSpec, WatchFaultsRequest, fault, faults_client::FaultsClient, host_fault, process_fault,
    },
};
use nix::sys::signal::Signal;
use tonic::{Code, Status, transport::Channel};

use crate::{
    guest,
    harness::{Agent, built, disk, kill_hard, pid, poll, spec},
};

const ALLOW: &str = "--allow-faults\n--hang-after\n60\n";

/// A VM that writes, and where its console has been read to.
struct Rig {
    agent: Agent,
    vm: VmSpec,
    faults: FaultsClient<Channel>,
    offset: u64,
}

impl Rig {
    async fn start(args: &str) -> Self {
        let script = format!("exec {} \"$@\"", built("device-blk").display());
        let mut agent = Agent::start_with_args("device-blk", &script, args).await;
        let mut vm = spec("web", &guest::disk_writer(agent.path()));
        vm.disks = vec![disk("root", &agent.image("root.raw"))];
        agent.run(&vm).await;
        let faults = client(&agent).await;
        let mut rig = Self {
            agent,
            vm,
            faults,
            offset: 0,
        };
        rig.prints("00").await;
        rig
    }

    /// Waits until what comes on the console has `wanted`.
    async fn prints(&mut self, wanted: &str) {
        let mut seen = String::new();
        for _ in 0..200 {
            let (end, text) = self.agent.console("web", self.offset).await;
            self.offset = end;
            seen.push_str(&text);
            if seen.contains(wanted) {
                return;
            }
        }
        panic!("{wanted:?} did not come: {seen:?}");
    }

    async fn arm(&mut self, id: &str, fault: fault::Fault) -> Result<FaultStatus, Status> {
        self.arm_in(FaultProcess::Daemon, id, fault).await
    }

    async fn arm_in(
        &mut self,
        process: FaultProcess,
        id: &str,
        fault: fault::Fault,
    ) -> Result<FaultStatus, Status> {
        let request = ArmFaultsRequest {
            experiment_id: "run".to_owned(),
            faults: vec![Fault {
                id: id.to_owned(),
                target: Some(FaultTarget {
                    vm_id: "web".to_owned(),
                    device: "root".to_owned(),
                    process: process.into(),
                }),
                fault: Some(fault),
            }],
            ttl_ms: 60_000,
            seed: 1,
        };
        let armed = self.faults.arm_faults(request).await?.into_inner();
        let mut faults = armed.faults.into_iter();
        Ok(faults.find(|fault| fault.fault_id == id).unwrap())
    }

    async fn status(&mut self, id: &str) -> FaultStatus {
        let listed = self.faults.list_faults(ListFaultsRequest::default()).await;
        let mut faults = listed.unwrap().into_inner().faults.into_iter();
        faults.find(|fault| fault.fault_id == id).unwrap()
    }

    async fn until_hits(&mut self, id: &str, wanted: u64) -> FaultStatus {
        for _ in 0..500 {
            let status = self.status(id).await;
            if status.hits >= wanted {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{id} has no {wanted} hits: {:?}", self.status(id).await);
    }

    async fn disarm(&mut self, ids: &[&str]) -> Vec<FaultStatus> {
        let request = DisarmFaultsRequest {
            experiment_id: "run".to_owned(),
            fault_ids: ids.iter().map(|&id| id.to_owned()).collect(),
        };
        let ended = self.faults.disarm_faults(request).await;
        ended.unwrap().into_inner().faults
    }

    async fn blk(&mut self) -> i32 {
        pid(&self.agent.status("web").await, "device-blk")
    }

    async fn until_replaced(&mut self, before: i32) {
        self.agent
            .until("web", "served by another process", |status| {
                let now = pid_or_none(status);
                now != 0 && now != before
            })
            .await;
    }
}

fn pid_or_none(status: &api::node::VmStatus) -> i32 {
    let mut processes = status.processes.iter();
    let blk = processes.find(|process| process.name == "device-blk");
    blk.map_or(0, |process| process.pid as i32)
}

async fn client(agent: &Agent) -> FaultsClient<Channel> {
    let socket = agent.path().join("agent.sock");
    let channel = api::connect::unix(&socket, Duration::from_secs(5)).await;
    FaultsClient::new(channel.unwrap())
}

fn rule(action: Action, max_hits: u64) -> fault::Fault {
    fault::Fault::Rule(FaultRule {
        selector: Some(FaultSelector {
            ops: vec![FaultOp::Write.into()],
            ..FaultSelector::default()
        }),
        trigger: Some(FaultTrigger {
            max_hits,
            ..FaultTrigger::default()
        }),
        action: Some(action),
        ..FaultRule::default()
    })
}

/// About no request.
fn of_the_link(action: Action, max_hits: u64) -> fault::Fault {
    match rule(action, max_hits) {
        fault::Fault::Rule(rule) => fault::Fault::Rule(FaultRule {
            selector: None,
            ..rule
        }),
        other => other,
    }
}

fn process(action: process_fault::Action) -> fault::Fault {
    fault::Fault::Process(ProcessFault {
        action: Some(action),
    })
}

fn host(action: host_fault::Action) -> fault::Fault {
    fault::Fault::Host(HostFault {
        action: Some(action),
    })
}

fn errors() -> fault::Fault {
    rule(Action::Error(ErrorFault::default()), 0)
}

#[tokio::test]
async fn faults_need_the_command_lines_word() {
    let mut rig = Rig::start("").await;
    let status = rig.arm("errors", errors()).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(
        api::errors::reason(&status).as_deref(),
        Some("FAULTS_NOT_ALLOWED")
    );
}

#[tokio::test]
async fn rule_reaches_each_incarnation_and_its_hits_add_up() {
    let mut rig = Rig::start(ALLOW).await;
    rig.arm("errors", errors()).await.unwrap();
    rig.prints("11").await;
    let before = rig.until_hits("errors", 1).await;
    assert_eq!(before.targets[0].device, "root");
    let first = rig.blk().await;
    kill_hard(first);
    rig.until_replaced(first).await;
    let second = rig.blk().await as u32;
    poll("the next process has the rule", || async {
        let mut faults = client(&rig.agent).await;
        let listed = faults
            .list_faults(ListFaultsRequest::default())
            .await
            .ok()?;
        let fault = listed.into_inner().faults.into_iter().next()?;
        (fault.targets[0].pid == second && fault.hits > before.hits).then_some(())
    })
    .await;
    let ended = rig.disarm(&["errors"]).await;
    assert_eq!(ended[0].state(), FaultState::Disarmed);
    assert!(ended[0].hits > before.hits && ended[0].seen >= ended[0].hits);
    assert!(!ended[0].targets[0].last_hits.is_empty());
    rig.prints("00").await;
    let left = rig.faults.list_faults(ListFaultsRequest::default()).await;
    assert!(left.unwrap().into_inner().faults.is_empty(), "forgotten");
}

#[tokio::test]
async fn crash_is_a_hit_though_nobody_could_be_asked() {
    let mut rig = Rig::start(ALLOW).await;
    let first = rig.blk().await;
    rig.arm("crash", rule(Action::Crash(CrashFault {}), 1))
        .await
        .unwrap();
    rig.until_replaced(first).await;
    let status = rig.until_hits("crash", 1).await;
    assert_eq!(status.hits, 1);
    rig.prints("00").await;
    assert_eq!(rig.status("crash").await.hits, 1, "not once more");
}

#[tokio::test]
async fn vmm_core_does_its_end_wrong_and_the_guest_goes_on() {
    let mut rig = Rig::start(ALLOW).await;
    let vmm = FaultProcess::Vmm;
    let late = of_the_link(Action::LateKick(LateKickFault { delay_ms: 20 }), 3);
    rig.arm_in(vmm, "late-kick", late).await.unwrap();
    let kicked = rig.until_hits("late-kick", 3).await;
    assert_eq!(kicked.targets[0].device, "root");
    let closes = of_the_link(Action::Disconnect(DisconnectFault {}), 1);
    rig.arm_in(vmm, "closes", closes).await.unwrap();
    let later = of_the_link(
        Action::LateReconnect(LateReconnectFault { delay_ms: 300 }),
        1,
    );
    rig.arm_in(vmm, "later", later).await.unwrap();
    kill_hard(rig.blk().await);
    rig.until_hits("closes", 1).await;
    rig.until_hits("later", 1).await;
    rig.prints("00").await;
    rig.disarm(&[]).await;
    rig.prints("00").await;
    let refused = rig.arm(
        "late-kick",
        rule(Action::LateKick(LateKickFault { delay_ms: 1 }), 1),
    );
    assert_eq!(refused.await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn processes_are_killed_frozen_and_started_late() {
    let mut rig = Rig::start(ALLOW).await;
    let delay_ms = 500;
    let slow = process_fault::Action::SlowStart(SlowStartFault { delay_ms });
    rig.arm("slow", process(slow)).await.unwrap();
    let first = rig.blk().await;
    let kill = process_fault::Action::Kill(KillFault::default());
    let killed = rig.arm("kill.1", process(kill)).await.unwrap();
    assert_eq!((killed.hits, killed.targets[0].pid), (1, first as u32));
    rig.until_replaced(first).await;
    assert_eq!(rig.until_hits("slow", 1).await.hits, 1);
    rig.prints("00").await;
    let freeze = process_fault::Action::Freeze(FreezeFault { duration_ms: 300 });
    rig.arm("freeze", process(freeze)).await.unwrap();
    let frozen = rig.blk().await;
    let state = |pid: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit(')').next().unwrap().trim().chars().next()
    };
    assert_eq!(state(frozen), Some('T'));
    poll("it goes on by itself", || async {
        (state(frozen) != Some('T')).then_some(())
    })
    .await;
    assert_eq!(rig.blk().await, frozen);
    rig.prints("00").await;
    let fds = process_fault::Action::FdExhaustion(FdExhaustionFault { duration_ms: 0 });
    let limits = || std::fs::read_to_string(format!("/proc/{frozen}/limits")).unwrap();
    let before = limits();
    assert_eq!(rig.arm("fds", process(fds)).await.unwrap().hits, 1);
    assert_ne!(limits(), before);
    rig.disarm(&["fds"]).await;
    assert_eq!(limits(), before);
    rig.prints("00").await;
}

#[tokio::test]
async fn next_agent_undoes_what_a_dead_one_left() {
    let mut rig = Rig::start(ALLOW).await;
    let freeze = process_fault::Action::Freeze(FreezeFault { duration_ms: 0 });
    rig.arm("freeze", process(freeze)).await.unwrap();
    rig.agent.end(Signal::SIGKILL);
    rig.agent.start_again().await;
    rig.prints("00").await;
}

#[tokio::test]
async fn switch_ends_everything_and_stays_off() {
    let mut rig = Rig::start(ALLOW).await;
    rig.arm("errors", errors()).await.unwrap();
    rig.prints("11").await;
    let off = SetFaultSwitchRequest { on: false };
    let switch = rig.faults.set_fault_switch(off).await.unwrap().into_inner();
    assert!(switch.allowed && !switch.on);
    rig.prints("00").await;
    assert_eq!(rig.status("errors").await.state(), FaultState::Disarmed);
    let refused = rig.arm("again", errors()).await.unwrap_err();
    assert_eq!(api::errors::reason(&refused).as_deref(), Some("FAULTS_OFF"));
    rig.agent.end(Signal::SIGTERM);
    rig.agent.start_again().await;
    rig.faults = client(&rig.agent).await;
    let refused = rig.arm("again", errors()).await.unwrap_err();
    assert_eq!(api::errors::reason(&refused).as_deref(), Some("FAULTS_OFF"));
    let on = SetFaultSwitchRequest { on: true };
    assert!(
        rig.faults
            .set_fault_switch(on)
            .await
            .unwrap()
            .into_inner()
            .on
    );
    rig.arm("again", errors()).await.unwrap();
}

#[tokio::test]
async fn agent_is_cut_off_and_loses_its_store_for_a_while() {
    let mut rig = Rig::start(ALLOW).await;
    let mut events = rig
        .faults
        .watch_faults(WatchFaultsRequest::default())
        .await
        .unwrap()
        .into_inner();
    let loss = host_fault::Action::StoreLoss(StoreLossFault { duration_ms: 300 });
    rig.arm("store", host(loss)).await.unwrap();
    let mut vm = spec("db", &guest::disk_writer(rig.agent.path()));
    vm.generation = 1;
    let refused = rig.agent.apply(&vm).await.unwrap_err();
    assert_eq!(refused.code(), Code::Internal, "{refused}");
    let cut =
        host_fault::Action::ControllerPartition(ControllerPartitionFault { duration_ms: 300 });
    rig.arm("cut", host(cut)).await.unwrap();
    let unheard = rig.faults.list_faults(ListFaultsRequest::default()).await;
    assert_eq!(unheard.unwrap_err().code(), Code::Unavailable);
    poll("it is heard again", || async {
        let mut faults = client(&rig.agent).await;
        faults.list_faults(ListFaultsRequest::default()).await.ok()
    })
    .await;
    rig.prints("00").await;
    let first = events.message().await.unwrap().unwrap();
    assert_eq!(first.kind(), FaultEventKind::Armed);
    assert_eq!(first.fault_id, "store");
}

#[tokio::test]
async fn daemon_that_runs_out_of_memory_is_killed_by_the_kernel_and_replaced() {
    let mut rig = Rig::start(ALLOW).await;
    let first = rig.blk().await;
    let action = process_fault::Action::OutOfMemory(OutOfMemoryFault { limit_bytes: 0 });
    let armed = rig.arm("oom", process(action)).await.unwrap();
    if armed.targets[0].error.contains("no memory cgroup") {
        eprintln!("skipped: {}", armed.targets[0].error);
        return;
    }
    assert_eq!(armed.hits, 1, "{armed:?}");
    rig.until_replaced(first).await;
    let log = std::fs::read_to_string(rig.agent.path().join("agent.log")).unwrap();
    assert!(
        log.contains("signal: 9") || log.contains("SIGKILL"),
        "{log}"
    );
    rig.disarm(&["oom"]).await;
    rig.prints("00").await;
}

#[tokio::test]
async fn daemons_of_two_versions_take_turns_and_the_guest_goes_on() {
    let mut rig = Rig::start(ALLOW).await;
    let other = rig.agent.path().join("other-device-blk");
    std::fs::copy(built("device-blk"), &other).unwrap();
    let program = |pid: i32| std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    let first = rig.blk().await;
    assert_ne!(program(first), other);
    let binary = other.display().to_string();
    let skew = process_fault::Action::VersionSkew(VersionSkewFault { binary });
    rig.arm("skew", process(skew)).await.unwrap();
    kill_hard(first);
    rig.until_replaced(first).await;
    assert_eq!(rig.until_hits("skew", 1).await.hits, 1);
    let second = rig.blk().await;
    assert_eq!(program(second), other);
    rig.prints("00").await;
    rig.disarm(&["skew"]).await;
    kill_hard(second);
    rig.until_replaced(second).await;
    assert_ne!(program(rig.blk().await), other);
    rig.prints("00").await;
}

#[tokio::test]
async fn requests_fail_while_vmm_core_gets_nowhere_with_a_daemon_that_is_there() {
    let mut rig = Rig::start(ALLOW).await;
    let mut vm = rig.vm.clone();
    vm.generation += 1;
    vm.outage_policies = vec![OutagePolicy {
        device: "root".into(),
        action: OutageAction::ErrorAfter.into(),
        error_after_ms: 1000,
    }];
    rig.agent.apply(&vm).await.unwrap();
    // No handshake succeeds any more, and what there is ends with the next write.
    let selectors = [
        FaultSelector {
            messages: vec!["GET_FEATURES".to_owned()],
            ..FaultSelector::default()
        },
        FaultSelector {
            ops: vec![FaultOp::Write.into()],
            ..FaultSelector::default()
        },
    ];
    for (id, selector) in ["handshake", "session"].into_iter().zip(selectors) {
        let rule = FaultRule {
            selector: Some(selector),
            action: Some(Action::Disconnect(DisconnectFault {})),
            ..FaultRule::default()
        };
        rig.arm(id, fault::Fault::Rule(rule)).await.unwrap();
    }
    let refused = rig.blk().await;
    rig.prints("11").await;
    let status = rig
        .agent
        .until("web", "failing", |status| {
            status.devices[0].failing_requests
        })
        .await;
    let process = status
        .processes
        .iter()
        .find(|process| process.name == "device-blk");
    let why = &process.unwrap().last_error;
    assert!(why.contains("was refused by vmm-core"), "{why}");
    rig.disarm(&["handshake", "session"]).await;
    rig.agent
        .until("web", "served again", |status| {
            let now = pid_or_none(status);
            now != 0 && now != refused && !status.devices[0].failing_requests
        })
        .await;
    rig.prints("000").await;
}
