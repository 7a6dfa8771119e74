//! VMs that are restarted elsewhere: they run under the host's lease alone. And VMs that their host starts
//! again.

use std::{
    fs,
    time::{Duration, Instant},
};

use api::{
    connect,
    device::{Device, GetDeviceRequest, device_daemon_client::DeviceDaemonClient},
    node::{
        LeaseStage, NicSpec, Power, RenewLeaseRequest, RenewLeaseResponse, RestartPolicy, VmPhase,
        VmSpec, leases_client::LeasesClient,
    },
    vmm::{GetVmmRequest, VmmInfo, VmmState, vmm_client::VmmClient},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tonic::{Code, transport::Channel};

use crate::{
    guest,
    harness::{Agent, disk, gone, kill_hard, may_make_taps, pid, spec},
};

/// Long enough for a loaded machine to come back to renewing it.
const LEASE_MS: u32 = 6_000;
const GRACE_MS: u32 = 1_500;
const PATIENCE: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The controller's end.
struct Controller {
    client: LeasesClient<Channel>,
    ticket: RenewLeaseResponse,
    grace_ms: u32,
}

impl Controller {
    async fn of(agent: &Agent) -> Self {
        let socket = agent.path().join("agent.sock");
        let channel = connect::unix(&socket, PATIENCE).await.unwrap();
        let mut client = LeasesClient::new(channel);
        let ticket = client.renew_lease(RenewLeaseRequest::default()).await;
        Self {
            client,
            ticket: ticket.unwrap().into_inner(),
            grace_ms: GRACE_MS,
        }
    }

    async fn renew(&mut self) -> &RenewLeaseResponse {
        let request = RenewLeaseRequest {
            session: self.ticket.session.clone(),
            ticket_boottime_ns: self.ticket.ticket_boottime_ns,
            lease_ms: LEASE_MS,
            grace_ms: self.grace_ms,
            settle_ms: 5_000,
        };
        let answer = self.client.renew_lease(request).await;
        self.ticket = answer.unwrap().into_inner();
        &self.ticket
    }

    /// Renews the lease until the VM is as wanted.
    async fn keep_until(&mut self, agent: &mut Agent, id: &str, wanted: VmPhase) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.renew().await;
            let status = agent.status(id).await;
            if status.phase() == wanted {
                return;
            }
            assert!(Instant::now() < deadline, "{status:#?}");
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

/// A VM that writes its disk all the time, and may run elsewhere.
fn roaming(agent: &Agent, controller: &Controller) -> VmSpec {
    let mut spec = spec("roam", &guest::disk_writer(agent.path()));
    spec.disks = vec![disk("root", &agent.image("root.raw"))];
    spec.set_restart_policy(RestartPolicy::Anywhere);
    spec.lease_session = controller.ticket.session.clone();
    spec
}

async fn device(agent: &Agent, id: &str) -> Device {
    device_of(agent, id, "blk.sock", "root").await
}

async fn device_of(agent: &Agent, id: &str, socket: &str, name: &str) -> Device {
    let socket = agent.vm_dir(id).join(socket);
    let channel = connect::unix(&socket, PATIENCE).await.unwrap();
    let request = GetDeviceRequest { id: name.into() };
    let answer = DeviceDaemonClient::new(channel).get_device(request).await;
    answer.unwrap().into_inner()
}

async fn vmm(agent: &Agent, id: &str) -> VmmInfo {
    let socket = agent.vm_dir(id).join("vmm.sock");
    let channel = connect::unix(&socket, PATIENCE).await.unwrap();
    let answer = VmmClient::new(channel).get_vmm(GetVmmRequest {}).await;
    answer.unwrap().into_inner()
}

fn writes(device: &Device) -> u64 {
    device.blk.as_ref().unwrap().write_requests
}

#[tokio::test]
async fn host_that_lost_contact_stops_what_may_run_elsewhere_and_nothing_else() {
    let mut agent = Agent::start().await;
    let mut controller = Controller::of(&agent).await;
    assert_eq!(controller.ticket.stage(), LeaseStage::Unheld);
    let mut vm = roaming(&agent, &controller);
    let refused = agent.apply(&vm).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    agent
        .run(&spec("stays", &guest::sleeper(agent.path())))
        .await;

    assert_eq!(controller.renew().await.stage(), LeaseStage::Held);
    agent.apply(&vm).await.unwrap();
    controller
        .keep_until(&mut agent, "roam", VmPhase::Running)
        .await;
    let before = writes(&device(&agent, "roam").await);
    while writes(&device(&agent, "roam").await) == before {
        controller.renew().await;
    }
    let processes = agent.status("roam").await.processes;

    let lost = agent
        .until("roam", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    assert_eq!(lost.stop_reason, "lease-lost");
    for process in processes {
        gone(process.pid as i32).await;
    }
    assert_eq!(agent.status("stays").await.phase(), VmPhase::Running);

    // What was wished before does not start it again; it may run elsewhere.
    let old_session = vm.lease_session.clone();
    let deadline = Instant::now() + PATIENCE;
    while controller.renew().await.stage() != LeaseStage::Held {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    assert_ne!(controller.ticket.session, old_session);
    vm.generation += 1;
    let refused = agent.apply(&vm).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    vm.lease_session = controller.ticket.session.clone();
    agent.apply(&vm).await.unwrap();
    controller
        .keep_until(&mut agent, "roam", VmPhase::Running)
        .await;
}

#[tokio::test]
async fn disk_of_a_frozen_host_stops_by_itself_and_its_vm_goes_at_the_thaw() {
    let mut agent = Agent::start().await;
    let mut controller = Controller::of(&agent).await;
    controller.renew().await;
    let vm = roaming(&agent, &controller);
    agent.apply(&vm).await.unwrap();
    controller
        .keep_until(&mut agent, "roam", VmPhase::Running)
        .await;
    agent.freeze();
    let deadline = Instant::now() + PATIENCE;
    while !device(&agent, "roam").await.io_stopped {
        assert!(Instant::now() < deadline, "the disk is used on");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    // One request may have been under way.
    let stopped = writes(&device(&agent, "roam").await);
    tokio::time::sleep(Duration::from_millis(u64::from(GRACE_MS) + 200)).await;
    assert!(writes(&device(&agent, "roam").await) <= stopped + 1);
    agent.thaw();
    // A renewal that was on its way all the time does not bring it back.
    controller.renew().await;
    let lost = agent
        .until("roam", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    assert_eq!(lost.stop_reason, "lease-lost");
}

/// The VM's tap, which outlives an agent that is killed: it goes before the test and after.
struct Tap(&'static str);

impl Tap {
    fn of_nobody_else(name: &'static str) -> Self {
        let tap = Self(name);
        tap.remove();
        tap
    }

    fn remove(&self) {
        let mut command = std::process::Command::new("ip");
        // It fails when there is none.
        let _ = command.args(["link", "del", self.0]).output();
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.remove();
    }
}

#[tokio::test]
async fn all_of_a_frozen_host_s_vm_stops_by_itself_and_goes_on_with_the_next_lease() {
    let _tap = Tap::of_nobody_else("mt-roam-0");
    let mut agent = Agent::start().await;
    let mut controller = Controller::of(&agent).await;
    // It is not to be lost, however long the thaw takes.
    controller.grace_ms = 10 * 60 * 1000;
    controller.renew().await;
    let mut vm = roaming(&agent, &controller);
    if may_make_taps() {
        vm.nics = vec![NicSpec {
            name: "nic0".into(),
            ..NicSpec::default()
        }];
    }
    let is_stopped = async |agent: &Agent| {
        let vmm = vmm(agent, "roam").await;
        let mut stopped = vec![
            vmm.lease_ended && vmm.state() == VmmState::Paused,
            device(agent, "roam").await.io_stopped,
        ];
        if may_make_taps() {
            let nic = device_of(agent, "roam", "net.sock", "nic0").await;
            stopped.push(nic.io_stopped);
        }
        stopped
    };
    agent.apply(&vm).await.unwrap();
    controller
        .keep_until(&mut agent, "roam", VmPhase::Running)
        .await;
    let running = is_stopped(&agent).await;
    assert!(running.iter().all(|stopped| !stopped), "{running:?}");

    agent.freeze();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let stopped = is_stopped(&agent).await;
        if stopped.iter().all(|stopped| *stopped) {
            break;
        }
        assert!(Instant::now() < deadline, "something goes on: {stopped:?}");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    // The guest leaves its vCPU with each thing that it does.
    let exits = vmm(&agent, "roam").await.exits;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(vmm(&agent, "roam").await.exits, exits);

    agent.thaw();
    while controller.renew().await.stage() != LeaseStage::Held {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    controller
        .keep_until(&mut agent, "roam", VmPhase::Running)
        .await;
    let deadline = Instant::now() + PATIENCE;
    while vmm(&agent, "roam").await.exits < exits + 100 {
        controller.renew().await;
        assert!(Instant::now() < deadline, "the guest does not go on");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    let running = is_stopped(&agent).await;
    assert!(running.iter().all(|stopped| !stopped), "{running:?}");
}

#[tokio::test]
async fn next_agent_goes_on_with_the_lease_and_its_vms() {
    let mut agent = Agent::start().await;
    let mut controller = Controller::of(&agent).await;
    controller.renew().await;
    let vm = roaming(&agent, &controller);
    agent.apply(&vm).await.unwrap();
    controller
        .keep_until(&mut agent, "roam", VmPhase::Running)
        .await;
    let session = controller.ticket.session.clone();
    agent.end(Signal::SIGKILL);
    agent.start_again().await;
    let mut controller = Controller::of(&agent).await;
    assert_eq!(controller.ticket.session, session);
    controller
        .keep_until(&mut agent, "roam", VmPhase::Running)
        .await;
    // A daemon that is started anew may go on, too.
    let adopted = |status: &api::node::VmStatus| !status.processes.is_empty();
    let status = agent.until("roam", "adopted", adopted).await;
    kill_hard(pid(&status, "device-blk"));
    let deadline = Instant::now() + PATIENCE;
    loop {
        controller.renew().await;
        let status = agent.status("roam").await;
        let daemon = status
            .processes
            .iter()
            .find(|process| process.name == "device-blk");
        if daemon.is_some_and(|daemon| daemon.restarts == 1 && daemon.pid != 0) {
            break;
        }
        assert!(Instant::now() < deadline, "{status:#?}");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    let before = writes(&device(&agent, "roam").await);
    while writes(&device(&agent, "roam").await) == before {
        controller.renew().await;
        assert!(Instant::now() < deadline, "the new daemon serves nothing");
    }
}

#[tokio::test]
async fn vm_that_died_is_started_again_by_its_policy_alone() {
    let mut agent = Agent::start().await;
    let kernel = guest::sleeper(agent.path());
    let mut again = spec("again", &kernel);
    again.set_restart_policy(RestartPolicy::SameHost);
    let first = agent.run(&again).await;
    let never = agent.run(&spec("never", &kernel)).await;
    kill_hard(pid(&first, "vmm-core"));
    kill_hard(pid(&never, "vmm-core"));
    agent
        .until("never", "failed", |status| {
            status.phase() == VmPhase::Failed
        })
        .await;
    let dead = pid(&first, "vmm-core");
    agent
        .until("again", "started again", |status| {
            let vmm = status
                .processes
                .iter()
                .find(|process| process.name == "vmm-core");
            status.phase() == VmPhase::Running && vmm.is_some_and(|vmm| vmm.pid as i32 != dead)
        })
        .await;
    // A stop that is wished is no death.
    agent.power(&mut again, Power::OffNow).await;
    agent
        .until("again", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
}

#[tokio::test]
async fn marked_vms_come_back_in_order_after_a_boot() {
    let mut agent = Agent::start().await;
    let kernel = guest::sleeper(agent.path());
    let mut pids = Vec::new();
    for (id, autostart, order) in [
        ("late", true, 9),
        ("early", true, 1),
        ("unmarked", false, 0),
    ] {
        let vm = VmSpec {
            autostart,
            autostart_order: order,
            ..spec(id, &kernel)
        };
        pids.push(pid(&agent.run(&vm).await, "vmm-core"));
    }
    agent.end(Signal::SIGKILL);
    for pid in pids {
        kill_hard(pid);
        gone(pid).await;
    }
    for id in ["late", "early", "unmarked"] {
        let record = fs::read_to_string(agent.record(id)).unwrap();
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        assert!(record.contains(boot_id.trim()));
        fs::write(
            agent.record(id),
            record.replace(boot_id.trim(), "an-earlier-boot"),
        )
        .unwrap();
    }
    agent.start_again().await;
    let late = agent
        .until("late", "back", |status| status.phase() == VmPhase::Running)
        .await;
    let early = agent.status("early").await;
    assert_eq!(early.phase(), VmPhase::Running);
    let since = |status: &api::node::VmStatus| {
        let at = status.started_at.unwrap();
        (at.seconds, at.nanos)
    };
    assert!(since(&early) <= since(&late));
    let unmarked = agent.status("unmarked").await;
    assert_eq!(unmarked.phase(), VmPhase::Stopped);
    assert_eq!(unmarked.stop_reason, "host-reboot");
}

impl Agent {
    fn freeze(&self) {
        kill(Pid::from_raw(self.pid()), Signal::SIGSTOP).unwrap();
    }

    fn thaw(&self) {
        kill(Pid::from_raw(self.pid()), Signal::SIGCONT).unwrap();
    }
}
