//! A fault experiment on real processes: a controller, its agent, `vmm-core` with a guest that writes all the
//! time, and the daemon of its disk, which is killed and slowed down.

use std::path::Path;

use api::controller as pb;
use api::controller::fault_injection::Action;
use api::device::{FaultRule, FaultSelector, FaultTrigger, LatencyFault, fault_rule};
use api::node::{FaultProcess, KillFault, ProcessFault, process_fault};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Response;

use crate::guest;
use crate::harness::{Controller, built, create_vm_of, poll_async, vm_name};

/// Sectors of the guest's disk.
const SECTORS: u64 = 2048;

/// A standalone controller with VMs `web` and `db`, whose guests write.
struct Machine {
    dir: tempfile::TempDir,
    controller: Controller,
}

impl Machine {
    async fn new() -> Self {
        for program in ["node-agent", "vmm-core", "device-blk"] {
            built(program);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let (state_dir, run_dir) = (path("s"), path("r"));
        let args = [
            "--standalone",
            "--allow-faults",
            "--state-dir",
            &state_dir,
            "--run-dir",
            &run_dir,
        ];
        let controller = Controller::start(&args).await;
        let kernel = guest::disk_writer(dir.path());
        for vm in ["web", "db"] {
            let image = std::fs::File::create(path(vm)).unwrap();
            image.set_len(SECTORS * 512).unwrap();
            start(&controller, vm, &kernel, path(vm)).await;
        }
        Self { dir, controller }
    }

    async fn run(&self, id: &str, fault: pb::FaultInjection) -> pb::FaultReport {
        self.run_for(id, 1_500, fault).await
    }

    async fn run_for(
        &self,
        id: &str,
        duration_ms: u32,
        fault: pb::FaultInjection,
    ) -> pb::FaultReport {
        let request = pb::CreateFaultExperimentRequest {
            parent: "projects/default".into(),
            experiment_id: id.into(),
            experiment: Some(pb::FaultExperiment {
                spec: Some(pb::FaultExperimentSpec {
                    duration_ms,
                    faults: vec![fault],
                    expect: Some(pb::FaultExpectations {
                        max_guest_errors: Some(0),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let mut client = self.controller.faults();
        client.create_fault_experiment(request).await.unwrap();
        let name = format!("projects/default/faultExperiments/{id}");
        let look = || async {
            let request = pb::GetFaultExperimentRequest { name: name.clone() };
            let seen = self.controller.faults().get_fault_experiment(request).await;
            seen.map(Response::into_inner).unwrap()
        };
        let is_done = |seen: &pb::FaultExperiment| {
            seen.status.clone().unwrap().state() == pb::FaultExperimentState::Done
        };
        poll_async("the run's end", look, is_done).await;
        let report = client
            .get_fault_report(pb::GetFaultReportRequest { name })
            .await;
        report.unwrap().into_inner()
    }
}

impl Machine {
    fn agent_pid(&self) -> Option<i32> {
        let text = std::fs::read_to_string(self.dir.path().join("r/node-agent.pid")).ok()?;
        text.trim().parse().ok()
    }

    /// (VM, program, pid) of all that serves VMs.
    async fn processes(&self) -> Vec<(String, String, u32)> {
        let request = pb::ListVmsRequest {
            parent: "projects/default".into(),
            ..Default::default()
        };
        let listed = self.controller.vms().list_vms(request).await.unwrap();
        let mut found = Vec::new();
        for vm in listed.into_inner().vms {
            for process in vm.status.unwrap_or_default().processes {
                found.push((vm.name.clone(), process.name, process.pid));
            }
        }
        found.sort();
        found
    }
}

impl Drop for Machine {
    /// VMs and their agent outlive the controller, also that of a test that failed.
    fn drop(&mut self) {
        let ours = self.dir.path().to_str().unwrap().to_owned();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let cmdline = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let pid = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            if let (Some(pid), true) = (pid, String::from_utf8_lossy(&cmdline).contains(&ours)) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

async fn start(controller: &Controller, vm: &str, kernel: &Path, image: String) {
    let spec = pb::VmSpec {
        kernel: kernel.to_str().unwrap().to_owned(),
        memory_bytes: 64 << 20,
        disks: vec![pb::Disk {
            name: "root".into(),
            source: Some(pb::disk::Source::Path(image)),
            ..Default::default()
        }],
        ..Default::default()
    };
    let made = controller
        .vms()
        .create_vm(create_vm_of(vm, spec))
        .await
        .unwrap();
    controller.succeeded(made.into_inner()).await;
    let started = controller.start_vm(vm).await;
    controller.succeeded(started).await;
}

async fn stop(controller: &Controller, vm: &str) {
    let request = pb::StopVmRequest {
        name: vm_name(vm),
        force: true,
        ..Default::default()
    };
    let stopped = controller.vms().stop_vm(request).await.unwrap();
    controller.succeeded(stopped.into_inner()).await;
}

fn on_web(id: &str, every_ms: u32, action: Action) -> pb::FaultInjection {
    pb::FaultInjection {
        id: id.into(),
        target: Some(pb::FaultTarget {
            vm: vm_name("web"),
            device: "root".into(),
            ..Default::default()
        }),
        schedule: Some(pb::FaultSchedule {
            every_ms,
            ..Default::default()
        }),
        action: Some(action),
    }
}

/// Requests that touch one sector are 1 ms slower.
fn slow_sector(sector: u64) -> Action {
    Action::Rule(FaultRule {
        selector: Some(FaultSelector {
            first_sector: sector,
            num_sectors: 1,
            ..Default::default()
        }),
        trigger: Some(FaultTrigger::default()),
        action: Some(fault_rule::Action::Latency(LatencyFault {
            latency_us: 1_000,
            jitter_us: 0,
        })),
        ..Default::default()
    })
}

fn verdict(report: &pb::FaultReport) -> pb::FaultVerdict {
    let experiment = report.experiment.clone().unwrap();
    experiment.status.unwrap().verdict()
}

fn hits(report: &pb::FaultReport) -> u64 {
    let experiment = report.experiment.clone().unwrap();
    experiment
        .status
        .unwrap()
        .hits
        .iter()
        .map(|hits| hits.hits)
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_and_slow_requests_hit_their_target_and_nobody_else() {
    let machine = Machine::new().await;
    let crash = ProcessFault {
        action: Some(process_fault::Action::Kill(KillFault::default())),
    };
    let storm = machine
        .run("storm", on_web("kill", 500, Action::Process(crash)))
        .await;
    assert_eq!(
        verdict(&storm),
        pb::FaultVerdict::Pass,
        "{:?}",
        storm.checks
    );
    assert!(hits(&storm) >= 2, "{:?}", storm.checks);
    let target = storm.devices.iter().find(|device| device.targeted).unwrap();
    assert_eq!(target.vm, vm_name("web"));
    assert!(target.outages.len() as u64 >= 2, "{:?}", target.outages);
    assert!(
        target
            .outages
            .iter()
            .all(|outage| outage.ended_ms > outage.began_ms)
    );
    let other = storm
        .devices
        .iter()
        .find(|device| device.vm == vm_name("db"))
        .unwrap();
    assert_eq!(other.touched, "");
    assert!(
        other.samples.iter().any(|sample| sample.completed > 0),
        "it wrote all the time"
    );

    // The guest writes the first sector alone.
    let slow = machine.run("slow", on_web("slow", 0, slow_sector(0))).await;
    assert_eq!(verdict(&slow), pb::FaultVerdict::Pass, "{:?}", slow.checks);
    assert!(hits(&slow) > 0);
    let nothing = machine
        .run("nothing", on_web("slow", 0, slow_sector(SECTORS - 1)))
        .await;
    assert_eq!(
        verdict(&nothing),
        pb::FaultVerdict::Inconclusive,
        "{:?}",
        nothing.checks
    );
    assert_eq!(hits(&nothing), 0);
    for vm in ["web", "db"] {
        stop(&machine.controller, vm).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_of_the_agent_hit_it_and_no_vm_notices() {
    let machine = Machine::new().await;
    let serving = machine.processes().await;
    assert_eq!(serving.len(), 4, "{serving:?}");
    let first = machine.agent_pid();
    let crash = ProcessFault {
        action: Some(process_fault::Action::Kill(KillFault::default())),
    };
    let fault = pb::FaultInjection {
        id: "agent".into(),
        target: Some(pb::FaultTarget {
            process: FaultProcess::Agent.into(),
            ..Default::default()
        }),
        schedule: Some(pb::FaultSchedule {
            every_ms: 2_000,
            ..Default::default()
        }),
        action: Some(Action::Process(crash)),
    };
    let report = machine.run_for("masterless", 5_000, fault).await;
    assert_eq!(
        verdict(&report),
        pb::FaultVerdict::Pass,
        "{:?}",
        report.checks
    );
    assert!(hits(&report) >= 2, "{:?}", report.checks);
    assert_ne!(machine.agent_pid(), first, "another agent");
    let seen = || machine.processes();
    poll_async("the same processes as before", seen, |now| *now == serving).await;
    for vm in ["web", "db"] {
        stop(&machine.controller, vm).await;
    }
}
