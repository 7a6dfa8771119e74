//! Daemons that hang, stay away or wait for storage, under a guest that writes to its disk all the time and
//! prints what became of each request.

use std::{fs, path::PathBuf, time::Duration};

use api::node::{
    CreateVolumeRequest, DeviceDetails, GetDevicesRequest, OutageAction, OutagePolicy, Power,
    VmPhase, VmSpec, VmStatus, devices_client::DevicesClient,
};
use faultfs::{Effect, Fault, FaultFs, Op};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    guest,
    harness::{Agent, built, disk, kill_hard, pid, poll, spec},
};

/// A VM that writes, and where its console has been read to.
struct Rig {
    agent: Agent,
    vm: VmSpec,
    offset: u64,
}

impl Rig {
    /// The device-blk processes that are started second and later than `tardy` may say take that many seconds.
    async fn start(tardy_seconds: u32) -> Self {
        Self::start_on(tardy_seconds, None).await
    }

    /// The same, with the disk on a file system whose requests can be held.
    async fn start_on(tardy_seconds: u32, storage: Option<&FaultFs>) -> Self {
        // The first process after the first one is late: what comes up meanwhile is a stand-in.
        // Who asks for the version starts no daemon.
        let script = format!(
            "cd $(dirname $0)\nif [ \"$1\" != --version ]; then\n\
             [ -e away ] && exit 1\necho x >> starts\n\
             [ $(wc -l < starts) = 2 ] && sleep {tardy_seconds}\nfi\nexec {} \"$@\"",
            built("device-blk").display()
        );
        let mut agent = Agent::start_with_args("device-blk", &script, "--hang-after\n2\n").await;
        let mut vm = spec("web", &guest::disk_writer(agent.path()));
        let image = match storage {
            Some(storage) => storage.path("root.raw"),
            None => agent.path().join("root.raw"),
        };
        fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
        vm.disks = vec![disk("root", &image)];
        agent.run(&vm).await;
        let mut rig = Self {
            agent,
            vm,
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

    /// What was printed since it was read last.
    async fn printed(&mut self) -> String {
        let (end, text) = self.agent.console("web", self.offset).await;
        self.offset = end;
        text
    }

    async fn until(&mut self, what: &str, wanted: impl Fn(&VmStatus) -> bool) -> VmStatus {
        self.agent.until("web", what, wanted).await
    }

    async fn blk(&mut self) -> i32 {
        pid(&self.agent.status("web").await, "device-blk")
    }

    async fn set_policy(&mut self, action: OutageAction, error_after_ms: u32) {
        self.vm.generation += 1;
        self.vm.outage_policies = vec![OutagePolicy {
            device: "root".into(),
            action: action.into(),
            error_after_ms,
        }];
        self.agent.apply(&self.vm).await.unwrap();
    }

    async fn device(&mut self) -> DeviceDetails {
        device(self.agent.path().join("agent.sock")).await
    }
}

async fn device(agent: PathBuf) -> DeviceDetails {
    let channel = api::connect::unix(&agent, Duration::from_secs(5)).await;
    let mut client = DevicesClient::new(channel.unwrap());
    let request = GetDevicesRequest {
        vm_id: "web".into(),
        max_outages: 8,
    };
    let mut answer = client.get_devices(request).await.unwrap().into_inner();
    answer.devices.remove(0)
}

/// None where this test cannot mount: that takes root and /dev/fuse.
fn mounted() -> Option<FaultFs> {
    let storage = FaultFs::mount();
    if let Err(error) = &storage {
        eprintln!("skipped: no file system that holds requests: {error}");
    }
    storage.ok()
}

fn restarts(status: &VmStatus) -> (u64, u64) {
    let blk = status
        .processes
        .iter()
        .find(|process| process.name == "device-blk")
        .unwrap();
    match blk.pid {
        0 => (0, 0),
        _ => (blk.restarts, blk.hangs),
    }
}

#[tokio::test]
async fn killed_daemon_is_told_with_its_recovery_and_no_request_fails() {
    let mut rig = Rig::start(0).await;
    let before = rig.device().await;
    assert_eq!((before.incarnation, before.restarts), (1, 0));
    kill_hard(rig.blk().await);
    rig.until("restarted", |status| restarts(status) == (1, 0))
        .await;
    rig.prints("00").await;
    let socket = rig.agent.path().join("agent.sock");
    let health = poll("the whole outage", || {
        let socket = socket.clone();
        async {
            let health = device(socket).await.health?;
            health.outages.first()?.first_completion_us?;
            Some(health)
        }
    })
    .await;
    let outage = &health.outages[0];
    assert_eq!((health.outages_total, outage.number), (1, 1));
    assert_eq!(health.last_recovery_us, outage.first_completion_us.unwrap());
    assert_eq!(health.not_guaranteed, Vec::<String>::new());
    assert!(health.stalled_since.is_none());
    assert!(!rig.printed().await.contains('1'), "a request failed");
    let text = rig.agent.scrape();
    for sample in [
        "mortise_device_connected{vm=\"web\",device=\"root\",type=\"blk\"} 1",
        "mortise_device_outages_total{vm=\"web\",device=\"root\",type=\"blk\"} 1",
        "mortise_process_hangs_total{vm=\"web\",process=\"device-blk\"} 0",
    ] {
        assert!(text.contains(sample), "{sample} is not in {text}");
    }
}

#[tokio::test]
async fn daemon_that_hangs_is_killed_and_the_guest_goes_on() {
    let mut rig = Rig::start(0).await;
    let hung = rig.blk().await;
    kill(Pid::from_raw(hung), Signal::SIGSTOP).unwrap();
    let status = rig
        .until("killed and restarted", |status| restarts(status) == (1, 1))
        .await;
    assert_ne!(pid(&status, "device-blk"), hung);
    let why = &rig.device().await.last_error;
    assert!(
        why.contains("hung") && why.contains("control socket"),
        "{why}"
    );
    rig.prints("00").await;
    assert!(!rig.printed().await.contains('1'), "a request failed");
}

#[tokio::test]
async fn requests_fail_after_the_policys_time_and_are_served_again() {
    let mut rig = Rig::start(6).await;
    rig.set_policy(OutageAction::ErrorAfter, 1000).await;
    kill_hard(rig.blk().await);
    rig.prints("11").await;
    let status = rig
        .until("failing", |status| status.devices[0].failing_requests)
        .await;
    assert_eq!(status.phase(), VmPhase::Running);
    assert!(rig.device().await.failing_requests);
    rig.until("served again", |status| {
        restarts(status) == (1, 0) && !status.devices[0].failing_requests
    })
    .await;
    rig.prints("00").await;
    rig.printed().await;
    assert!(
        !rig.printed().await.contains('1'),
        "a request failed with the daemon there"
    );
    // Both of its processes' starts, and the stand-in's.
    let starts = fs::read_to_string(rig.agent.path().join("bin/starts")).unwrap();
    assert_eq!(starts.lines().count(), 3);
}

#[tokio::test]
#[ignore = "long: more than a minute without a daemon"]
async fn daemon_that_was_away_for_more_than_a_minute_heals_its_device() {
    let mut rig = Rig::start(0).await;
    let away = rig.agent.path().join("bin/away");
    fs::write(&away, "").unwrap();
    kill_hard(rig.blk().await);
    rig.until("out", |status| !status.devices[0].connected)
        .await;
    let back = std::time::Instant::now() + Duration::from_secs(61);
    while std::time::Instant::now() < back {
        assert!(!rig.printed().await.contains('1'), "a request failed");
        assert_eq!(restarts(&rig.agent.status("web").await), (0, 0));
    }
    fs::remove_file(&away).unwrap();
    rig.until("restarted", |status| restarts(status) == (1, 0))
        .await;
    rig.prints("00").await;
    let outage = &rig.device().await.health.unwrap().outages[0];
    assert!(outage.first_completion_us > Some(60_000_000), "{outage:?}");
}

/// Others answered that the device was removed, and kept its slot for ever.
#[tokio::test]
async fn vm_can_be_stopped_and_its_disk_used_again_while_the_daemon_is_away() {
    let mut rig = Rig::start(600).await;
    kill_hard(rig.blk().await);
    rig.until("out", |status| !status.devices[0].connected)
        .await;
    let (image, mut vm) = (rig.vm.disks[0].clone(), rig.vm.clone());
    rig.agent.power(&mut vm, Power::OffNow).await;
    rig.until("stopped", |status| status.phase() == VmPhase::Stopped)
        .await;
    rig.agent.delete("web").await.unwrap();
    assert_eq!(rig.agent.processes(), [0; 0]);
    // The same name, and the same disk in the same place.
    let mut again = spec("web", &guest::disk_writer(rig.agent.path()));
    again.disks = vec![image];
    rig.agent.run(&again).await;
    rig.offset = 0;
    rig.prints("00").await;
}

#[tokio::test]
async fn policy_that_changes_in_the_outage_holds_at_once() {
    let mut rig = Rig::start(8).await;
    kill_hard(rig.blk().await);
    rig.until("out", |status| !status.devices[0].connected)
        .await;
    assert!(
        !rig.printed().await.contains('1'),
        "requests stall by default"
    );
    rig.set_policy(OutageAction::ErrorAfter, 1000).await;
    rig.prints("11").await;
    rig.set_policy(OutageAction::Stall, 0).await;
    rig.until("stalling again", |status| {
        !status.devices[0].failing_requests
    })
    .await;
    rig.until("served again", |status| restarts(status) == (1, 0))
        .await;
    rig.prints("00").await;
}

#[tokio::test]
async fn vm_pauses_while_its_device_is_out() {
    let mut rig = Rig::start(3).await;
    rig.set_policy(OutageAction::PauseVm, 0).await;
    kill_hard(rig.blk().await);
    rig.until("paused", |status| status.phase() == VmPhase::Paused)
        .await;
    rig.printed().await;
    assert_eq!(
        rig.printed().await,
        "",
        "a guest that stands still prints nothing"
    );
    rig.until("running again", |status| {
        status.phase() == VmPhase::Running && restarts(status) == (1, 0)
    })
    .await;
    rig.prints("00").await;
    assert!(!rig.printed().await.contains('1'), "a request failed");
}

#[tokio::test]
async fn next_agent_lets_a_vm_go_on_that_was_paused_for_an_outage() {
    let mut rig = Rig::start(3).await;
    rig.set_policy(OutageAction::PauseVm, 0).await;
    kill_hard(rig.blk().await);
    rig.until("paused", |status| status.phase() == VmPhase::Paused)
        .await;
    rig.agent.end(Signal::SIGKILL);
    rig.agent.start_again().await;
    rig.until("running again", |status| {
        status.phase() == VmPhase::Running && status.devices.iter().all(|device| device.connected)
    })
    .await;
    rig.prints("00").await;
}

#[tokio::test]
async fn slow_storage_is_no_hang() {
    let Some(storage) = mounted() else { return };
    let mut rig = Rig::start_on(0, Some(&storage)).await;
    let serving = rig.blk().await;
    let slow = storage.inject(Fault::new(Op::Write, Effect::Hold));
    storage.await_held(1);
    rig.until("waiting for storage", |status| {
        status.devices[0].storage_wait_since.is_some()
    })
    .await;
    // Several times as long as a hung daemon has.
    let deadline = std::time::Instant::now() + Duration::from_secs(8);
    while std::time::Instant::now() < deadline {
        let status = rig.agent.status("web").await;
        assert_eq!(
            (restarts(&status), pid(&status, "device-blk")),
            ((0, 0), serving)
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(rig.device().await.storage_wait_ms > 5000);
    storage.lift(slow);
    storage.release();
    rig.prints("00").await;
    rig.until("no longer waiting", |status| {
        status.devices[0].storage_wait_since.is_none()
    })
    .await;
    assert!(!rig.printed().await.contains('1'), "a request failed");
}

#[tokio::test]
async fn no_request_fails_before_the_dead_daemons_own_is_over() {
    let Some(storage) = mounted() else { return };
    let mut rig = Rig::start_on(10, Some(&storage)).await;
    rig.set_policy(OutageAction::ErrorAfter, 1000).await;
    let slow = storage.inject(Fault::new(Op::Write, Effect::Hold));
    storage.await_held(1);
    rig.printed().await;
    kill_hard(rig.blk().await);
    rig.until("out", |status| !status.devices[0].connected)
        .await;
    let deadline = std::time::Instant::now() + Duration::from_secs(4);
    while std::time::Instant::now() < deadline {
        assert_eq!(rig.printed().await, "", "the ghost's request was answered");
        assert!(!rig.agent.status("web").await.devices[0].failing_requests);
    }
    assert_eq!(storage.held(), 1);
    storage.lift(slow);
    storage.release();
    rig.prints("1").await;
    rig.until("served again", |status| restarts(status) == (1, 0))
        .await;
    rig.prints("00").await;
}

#[tokio::test]
async fn agent_ends_while_storage_holds_up_one_of_its_threads() {
    let Some(storage) = mounted() else { return };
    let mut agent = Agent::start().await;
    let source = storage.path("source.raw");
    fs::write(&source, vec![7; 1 << 20]).unwrap();
    let held = storage.inject(Fault::new(Op::Read, Effect::Hold));
    let mut client = agent.client.clone();
    let copying = tokio::spawn(async move {
        let request = CreateVolumeRequest {
            id: "copy".into(),
            source_path: source.display().to_string(),
            ..Default::default()
        };
        client.create_volume(request).await
    });
    let reading = tokio::task::spawn_blocking(move || {
        storage.await_held(1);
        storage
    });
    let storage = reading.await.unwrap();
    let ended = agent.end(Signal::SIGTERM);
    assert!(ended.success(), "{ended}");
    assert_eq!(storage.held(), 1, "its storage has not answered");
    copying.await.unwrap().unwrap_err();
    storage.lift(held);
    storage.release();
    agent.start_again().await;
}
