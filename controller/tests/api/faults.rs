//! Fault experiments on a host that counts hits as it is told to.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use api::controller as pb;
use api::controller::fault_injection::Action;
use api::node::devices_server::{Devices, DevicesServer};
use api::node::faults_server::{Faults, FaultsServer};
use api::node::*;
use api::serve::Services;
use api::vmm::{DeviceConnection, DeviceHealth, Outage};
use nix::sys::signal::Signal;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

use crate::harness::{Controller, create_vm, poll_async, vm_name};
use crate::simulated::Host;

/// What the host does when it is told to do wrong.
#[derive(Clone, Default)]
struct Breaker(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// By experiment and fault.
    armed: BTreeMap<(String, String), FaultStatus>,
    /// Outages of `root`, by VM.
    outages: BTreeMap<String, Vec<Outage>>,
    /// Nothing that is armed hits.
    misses: bool,
    /// Every fault is felt by this VM, too.
    also_hurts: Option<String>,
    /// Experiments that were ended as a whole.
    ended: Vec<String>,
    is_off: bool,
}

impl State {
    fn outage(&mut self, vm: &str) {
        let outages = self.outages.entry(vm.to_owned()).or_default();
        outages.push(Outage {
            number: outages.len() as u64 + 1,
            start_time: Some(std::time::SystemTime::now().into()),
            cause: "hung up".into(),
            in_flight: 4,
            replayed_us: Some(10_000),
            first_completion_us: Some(12_000),
            ..Default::default()
        });
    }
}

#[tonic::async_trait]
impl Faults for Breaker {
    async fn arm_faults(
        &self,
        request: Request<ArmFaultsRequest>,
    ) -> Result<Response<ArmFaultsResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        if state.is_off {
            let words = "faults are off on this host";
            return Err(api::errors::status(
                Code::FailedPrecondition,
                "FAULTS_OFF",
                words,
                &[],
            ));
        }
        let mut faults = Vec::new();
        for fault in request.faults {
            let vm = fault.target.unwrap_or_default().vm_id;
            let hits = u64::from(!state.misses);
            if hits > 0 {
                state.outage(&vm);
                if let Some(other) = state.also_hurts.clone() {
                    state.outage(&other);
                }
            }
            let status = FaultStatus {
                experiment_id: request.experiment_id.clone(),
                fault_id: fault.id.clone(),
                seen: hits,
                hits,
                ..Default::default()
            };
            let key = (request.experiment_id.clone(), fault.id);
            state.armed.insert(key, status.clone());
            faults.push(status);
        }
        Ok(Response::new(ArmFaultsResponse { faults }))
    }

    async fn disarm_faults(
        &self,
        request: Request<DisarmFaultsRequest>,
    ) -> Result<Response<DisarmFaultsResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        if request.fault_ids.is_empty() {
            state.ended.push(request.experiment_id.clone());
        }
        let mut faults = Vec::new();
        state.armed.retain(|(experiment, fault), status| {
            let named = request.fault_ids.is_empty() || request.fault_ids.contains(fault);
            let ends = *experiment == request.experiment_id && named;
            if ends {
                faults.push(status.clone());
            }
            !ends
        });
        Ok(Response::new(DisarmFaultsResponse { faults }))
    }

    async fn list_faults(
        &self,
        _request: Request<ListFaultsRequest>,
    ) -> Result<Response<ListFaultsResponse>, Status> {
        let faults = self.0.lock().unwrap().armed.values().cloned().collect();
        Ok(Response::new(ListFaultsResponse { faults }))
    }

    type WatchFaultsStream = ReceiverStream<Result<FaultEvent, Status>>;

    async fn watch_faults(
        &self,
        _request: Request<WatchFaultsRequest>,
    ) -> Result<Response<Self::WatchFaultsStream>, Status> {
        Err(Status::unimplemented("nobody watches here"))
    }

    async fn set_fault_switch(
        &self,
        request: Request<SetFaultSwitchRequest>,
    ) -> Result<Response<FaultSwitch>, Status> {
        let mut state = self.0.lock().unwrap();
        state.is_off = !request.into_inner().on;
        let on = !state.is_off;
        Ok(Response::new(FaultSwitch { on, allowed: true }))
    }

    async fn get_fault_switch(
        &self,
        _request: Request<GetFaultSwitchRequest>,
    ) -> Result<Response<FaultSwitch>, Status> {
        let on = !self.0.lock().unwrap().is_off;
        Ok(Response::new(FaultSwitch { on, allowed: true }))
    }
}

#[tonic::async_trait]
impl Devices for Breaker {
    async fn get_devices(
        &self,
        request: Request<GetDevicesRequest>,
    ) -> Result<Response<GetDevicesResponse>, Status> {
        let vm = request.into_inner().vm_id;
        let state = self.0.lock().unwrap();
        let health = DeviceHealth {
            connection: DeviceConnection::Connected as i32,
            outages: state.outages.get(&vm).cloned().unwrap_or_default(),
            ..Default::default()
        };
        let root = DeviceDetails {
            name: "root".into(),
            r#type: "blk".into(),
            health: Some(health),
            ..Default::default()
        };
        Ok(Response::new(GetDevicesResponse {
            devices: vec![root],
            ..Default::default()
        }))
    }
}

/// A controller, a host that breaks things, and VMs `web` and `db` that run on it.
struct Lab {
    dir: tempfile::TempDir,
    breaker: Breaker,
    controller: Controller,
    _host: Host,
}

impl Lab {
    async fn new(allowed: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let breaker = Breaker::default();
        let services = Services::new()
            .with(FaultsServer::new(breaker.clone()))
            .with(DevicesServer::new(breaker.clone()));
        let host = Host::serve_beside(&dir.path().join("agent.sock"), services);
        let controller = Self::controller(dir.path(), allowed).await;
        for vm in ["web", "db"] {
            let mut request = create_vm(vm);
            let spec = request.vm.as_mut().unwrap().spec.as_mut().unwrap();
            spec.disks.push(pb::Disk {
                name: "root".into(),
                source: Some(pb::disk::Source::Path(format!("/images/{vm}.raw"))),
                ..Default::default()
            });
            let made = controller.vms().create_vm(request).await.unwrap();
            controller.succeeded(made.into_inner()).await;
            let started = controller.start_vm(vm).await;
            controller.succeeded(started).await;
        }
        Self {
            dir,
            breaker,
            controller,
            _host: host,
        }
    }

    async fn controller(dir: &std::path::Path, allowed: bool) -> Controller {
        let node = format!("unix:{}", dir.join("agent.sock").display());
        let state_dir = dir.join("state");
        let mut args = vec!["--node", &node, "--state-dir", state_dir.to_str().unwrap()];
        args.extend(allowed.then_some("--allow-faults"));
        Controller::start(&args).await
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.breaker.0.lock().unwrap());
    }

    async fn begin(
        &self,
        id: &str,
        spec: pb::FaultExperimentSpec,
    ) -> Result<pb::FaultExperiment, Status> {
        let request = pb::CreateFaultExperimentRequest {
            parent: "projects/default".into(),
            experiment_id: id.into(),
            experiment: Some(pb::FaultExperiment {
                spec: Some(spec),
                ..Default::default()
            }),
            ..Default::default()
        };
        let begun = self
            .controller
            .faults()
            .create_fault_experiment(request)
            .await;
        begun.map(Response::into_inner)
    }

    async fn get(&self, id: &str) -> pb::FaultExperiment {
        let request = pb::GetFaultExperimentRequest { name: name(id) };
        let found = self.controller.faults().get_fault_experiment(request).await;
        found.unwrap().into_inner()
    }

    async fn in_state(&self, id: &str, state: pb::FaultExperimentState) -> pb::FaultExperiment {
        let what = format!("{id} in state {state:?}");
        let is_there = |seen: &pb::FaultExperiment| seen.status.clone().unwrap().state() == state;
        poll_async(&what, || self.get(id), is_there).await
    }

    async fn report(&self, id: &str) -> pb::FaultReport {
        let request = pb::GetFaultReportRequest { name: name(id) };
        let report = self.controller.faults().get_fault_report(request).await;
        report.unwrap().into_inner()
    }

    /// Runs it to its end.
    async fn run(
        &self,
        id: &str,
        spec: pb::FaultExperimentSpec,
    ) -> (pb::FaultVerdict, pb::FaultReport) {
        self.begin(id, spec).await.unwrap();
        let ended = self.in_state(id, pb::FaultExperimentState::Done).await;
        (ended.status.unwrap().verdict(), self.report(id).await)
    }
}

fn name(id: &str) -> String {
    format!("projects/default/faultExperiments/{id}")
}

/// Kills of `web`'s disk daemon, every 200 ms for 900 ms.
fn storm() -> pb::FaultExperimentSpec {
    let kill = ProcessFault {
        action: Some(process_fault::Action::Kill(KillFault::default())),
    };
    pb::FaultExperimentSpec {
        seed: 7,
        duration_ms: 900,
        settle_ms: 5_000,
        faults: vec![pb::FaultInjection {
            id: "kill".into(),
            target: Some(pb::FaultTarget {
                vm: vm_name("web"),
                device: "root".into(),
                ..Default::default()
            }),
            schedule: Some(pb::FaultSchedule {
                every_ms: 200,
                ..Default::default()
            }),
            action: Some(Action::Process(kill)),
        }],
        probes: vec![pb::FaultProbe {
            id: "runs".into(),
            kind: pb::FaultProbeKind::VmRunning as i32,
            at_start: true,
            during: true,
            at_end: true,
            stop: true,
            ..Default::default()
        }],
        expect: Some(pb::FaultExpectations {
            stall_max_ms: Some(1_000),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// So long that it does not end by itself while a test looks.
fn endless() -> pb::FaultExperimentSpec {
    pb::FaultExperimentSpec {
        duration_ms: 600_000,
        ..storm()
    }
}

fn detail<'a>(report: &'a pb::FaultReport, check: &str) -> (pb::FaultVerdict, &'a str) {
    let checks = &report.checks;
    let found = checks.iter().find(|found| found.name == check);
    let found = found.unwrap_or_else(|| panic!("no {check} in {checks:?}"));
    (found.verdict(), &found.detail)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_passes_and_its_report_outlives_the_controller() {
    let mut lab = Lab::new(true).await;
    let (verdict, report) = lab.run("storm", storm()).await;
    assert_eq!(verdict, pb::FaultVerdict::Pass, "{:?}", report.checks);
    let stalls = report.stalls.clone().unwrap();
    assert!(stalls.count >= 4, "one for each kill: {stalls:?}");
    assert_eq!(stalls.max_ms.round(), 12.0);
    assert_eq!(report.recoveries.clone().unwrap().max_ms.round(), 10.0);
    assert_eq!(report.replay, "vmctl fault run --again storm --seed 7");
    let root = &report
        .devices
        .iter()
        .find(|device| device.targeted)
        .unwrap();
    assert_eq!(
        (root.vm.as_str(), root.device.as_str()),
        (vm_name("web").as_str(), "root")
    );
    assert!(root.outages.iter().all(|outage| outage.fault == "kill"));
    assert!(
        detail(&report, "others")
            .1
            .contains("1 other devices, none touched")
    );

    lab.controller.signal(Signal::SIGKILL);
    lab.controller.wait();
    lab.controller = Lab::controller(lab.dir.path(), true).await;
    let kept = lab.report("storm").await;
    assert_eq!(kept.checks, report.checks);
    assert_eq!(kept.devices, report.devices);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_hits_nothing_is_inconclusive() {
    let lab = Lab::new(true).await;
    lab.set(|state| state.misses = true);
    let (verdict, report) = lab.run("storm", storm()).await;
    assert_eq!(verdict, pb::FaultVerdict::Inconclusive);
    assert!(detail(&report, "hits").1.contains("kill: 0 hits"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bystander_that_is_touched_fails_the_run() {
    let lab = Lab::new(true).await;
    lab.set(|state| state.also_hurts = Some("db".into()));
    let (verdict, report) = lab.run("storm", storm()).await;
    assert_eq!(verdict, pb::FaultVerdict::Fail);
    let (_, others) = detail(&report, "others");
    assert!(
        others.contains("root of projects/default/vms/db"),
        "{others}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_broken_without_the_role() {
    let lab = Lab::new(false).await;
    let refused = lab.begin("storm", storm()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(
        refused.message().contains("--allow-faults"),
        "{}",
        refused.message()
    );
    let switch = lab
        .controller
        .faults()
        .get_fault_switch(pb::GetFaultSwitchRequest {})
        .await;
    let switch = switch.unwrap().into_inner();
    assert!(!switch.on && !switch.allowed);
    assert!(lab.breaker.0.lock().unwrap().armed.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_switch_ends_a_run_and_refuses_the_next() {
    let lab = Lab::new(true).await;
    lab.begin("storm", endless()).await.unwrap();
    lab.in_state("storm", pb::FaultExperimentState::Running)
        .await;
    let turn = |on| pb::SetFaultSwitchRequest { on };
    lab.controller
        .faults()
        .set_fault_switch(turn(false))
        .await
        .unwrap();
    // The answer means that it is over.
    let ended = lab.get("storm").await.status.unwrap();
    assert_eq!(ended.verdict(), pb::FaultVerdict::Inconclusive);
    assert!(lab.breaker.0.lock().unwrap().armed.is_empty());
    let refused = lab.begin("again", storm()).await.unwrap_err();
    assert_eq!(api::errors::reason(&refused).as_deref(), Some("FAULTS_OFF"));
    lab.controller
        .faults()
        .set_fault_switch(turn(true))
        .await
        .unwrap();
    let host_is_on = || async { !lab.breaker.0.lock().unwrap().is_off };
    poll_async("the host's switch", host_is_on, |on| *on).await;
    let (verdict, _) = lab.run("again", storm()).await;
    assert_eq!(verdict, pb::FaultVerdict::Pass);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_loses_its_controller_is_ended_and_never_passes() {
    let mut lab = Lab::new(true).await;
    let begun = lab.begin("storm", endless()).await.unwrap();
    lab.in_state("storm", pb::FaultExperimentState::Running)
        .await;
    lab.controller.signal(Signal::SIGKILL);
    lab.controller.wait();
    lab.controller = Lab::controller(lab.dir.path(), true).await;
    let ended = lab
        .in_state("storm", pb::FaultExperimentState::Stopped)
        .await;
    let status = ended.status.unwrap();
    assert_eq!(status.verdict(), pb::FaultVerdict::Inconclusive);
    assert_eq!(status.progress, "the controller was restarted");
    let host_was_told = || async { lab.breaker.0.lock().unwrap().ended.contains(&begun.uid) };
    poll_async("the end of its faults", host_was_told, |told| *told).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_runs_on_one_vm_are_refused_and_stop_and_delete_work() {
    let lab = Lab::new(true).await;
    lab.begin("first", endless()).await.unwrap();
    let refused = lab.begin("second", storm()).await.unwrap_err();
    assert_eq!(
        api::errors::reason(&refused).as_deref(),
        Some("FAULTS_OVERLAP")
    );
    let mut client = lab.controller.faults();
    let delete = pb::DeleteFaultExperimentRequest {
        name: name("first"),
    };
    let refused = client
        .delete_fault_experiment(delete.clone())
        .await
        .unwrap_err();
    assert!(
        refused.message().contains("vmctl fault stop first"),
        "{}",
        refused.message()
    );
    let stop = pb::StopFaultExperimentRequest {
        name: name("first"),
    };
    let stopped = client
        .stop_fault_experiment(stop.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        stopped.status.unwrap().state(),
        pb::FaultExperimentState::Stopped
    );
    client
        .stop_fault_experiment(stop)
        .await
        .expect("it is idempotent");
    client.delete_fault_experiment(delete).await.unwrap();
    let list = pb::ListFaultExperimentsRequest {
        parent: "projects/default".into(),
        ..Default::default()
    };
    let left = client
        .list_fault_experiments(list)
        .await
        .unwrap()
        .into_inner();
    assert!(left.experiments.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_is_not_there_is_named_before_anything_is_done() {
    let lab = Lab::new(true).await;
    let mut spec = storm();
    spec.faults[0].target.as_mut().unwrap().vm = vm_name("gone");
    let refused = lab.begin("storm", spec).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(
        refused.message().contains("vms/gone"),
        "{}",
        refused.message()
    );
}
