//! Exchanging device-blk under verified load: whatever the new version does, no request fails and no
//! byte is lost.

mod turning_away;

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, time::Duration};

use api::node::{
    CancelJobRequest, Job, JobState, ListJobsRequest, NicSpec, Power, ProcessStatus,
    StartJobRequest, UpgradeDaemons, VmPhase, VmSpec, start_job_request::Work,
};
use nix::sys::signal::Signal;
use recovery::guest::{Guest, Habits, verify_image};
use tokio::task::JoinHandle;
use tonic::Code;

use crate::{
    guest,
    harness::{Agent, built, disk, gone, is_alive, kill_hard, may_make_taps, pid, poll, spec},
    stand_in,
};

/// A VM whose disk this test uses as its guest.
struct Rig {
    agent: Agent,
    vm: VmSpec,
    image: PathBuf,
    guest: Option<Guest>,
    _vmm: JoinHandle<()>,
}

impl Rig {
    async fn start() -> Self {
        let mut agent = Agent::start_with("vmm-core", stand_in::SCRIPT).await;
        let image = agent.image("root.raw");
        let mut vm = spec("web", &guest::sleeper(agent.path()));
        vm.disks = vec![disk("root", &image)];
        vm.disks[0].num_queues = 2;
        let vmm = stand_in::answer_for(&agent, "web");
        agent.run(&vm).await;
        let habits = Habits {
            queues: 2,
            depth: 16,
            memory_bytes: 32 << 20,
            blocks: 2048,
            ..Habits::default()
        };
        let socket = agent.vm_dir("web").join("root.vu");
        let guest = tokio::task::spawn_blocking(move || Guest::boot(&socket, &habits))
            .await
            .unwrap()
            .unwrap();
        let mut rig = Self {
            agent,
            vm,
            image,
            guest: Some(guest),
            _vmm: vmm,
        };
        rig.goes_on().await;
        rig
    }

    /// Asserts that requests are being completed.
    async fn goes_on(&mut self) {
        let display = self.guest.as_ref().unwrap().display().clone();
        let completed = || display.completed.load(std::sync::atomic::Ordering::SeqCst);
        let before = completed();
        poll("more completions", || async {
            (display.has_failed() || completed() > before + 500).then_some(())
        })
        .await;
        if display.has_failed() {
            let guest = self.guest.take().unwrap();
            let failure = guest.progress().last_failure();
            let ledger = tokio::task::spawn_blocking(|| guest.end()).await.unwrap();
            let log = fs::read_to_string(self.agent.vm_dir("web").join("blk.log"));
            panic!("{failure}\n{:#?}\n{}", ledger.summary(), log.unwrap());
        }
    }

    /// A program of the agent's host, which says it is device-blk 9.9.9 and then does as `script` says.
    fn program(&self, name: &str, script: &str) -> String {
        self.executable(
            name,
            &format!("[ \"$1\" = --version ] && {{ echo device-blk 9.9.9; exit; }}\n{script}"),
        )
    }

    fn executable(&self, name: &str, script: &str) -> String {
        let path = self.agent.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.display().to_string()
    }

    /// Another build of device-blk that works: its content differs, so it is another version.
    fn good_build(&self, name: &str) -> String {
        let path = self.agent.path().join(name);
        fs::copy(built("device-blk"), &path).unwrap();
        let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
        std::io::Write::write_all(&mut file, name.as_bytes()).unwrap();
        path.display().to_string()
    }

    async fn begin(&mut self, job_id: &str, work: UpgradeDaemons) {
        let request = StartJobRequest {
            job_id: job_id.into(),
            work: Some(Work::Upgrade(work)),
        };
        self.agent.client.start_job(request).await.unwrap();
    }

    async fn job(&mut self, job_id: &str) -> Job {
        let listed = self.agent.client.list_jobs(ListJobsRequest {}).await;
        let jobs = listed.unwrap().into_inner().jobs;
        jobs.into_iter().find(|job| job.job_id == job_id).unwrap()
    }

    /// Carries an upgrade out and answers what came of it.
    async fn upgrade(&mut self, job_id: &str, work: UpgradeDaemons) -> Job {
        self.begin(job_id, work).await;
        self.upgrade_over(job_id).await
    }

    async fn blk(&mut self) -> ProcessStatus {
        let status = self
            .agent
            .until("web", "served", |status| {
                let blk = status.processes.iter().find(|p| p.name == "device-blk");
                blk.is_some_and(|blk| blk.pid != 0)
            })
            .await;
        let mut processes = status.processes.into_iter();
        processes
            .find(|process| process.name == "device-blk")
            .unwrap()
    }

    /// Frontends that any process of the daemon has accepted so far.
    fn connections(&self) -> usize {
        let log = fs::read_to_string(self.agent.vm_dir("web").join("blk.log")).unwrap();
        log.matches("frontend connected").count()
    }

    async fn upgrade_over(&mut self, job_id: &str) -> Job {
        loop {
            let job = self.job(job_id).await;
            if job.state() != JobState::Running {
                return job;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends the load; every promise was kept.
    async fn end(mut self) -> Agent {
        self.goes_on().await;
        let guest = self.guest.take().unwrap();
        let image = self.image.clone();
        let summary = tokio::task::spawn_blocking(move || {
            let mut ledger = guest.end();
            verify_image(&image, &mut ledger).unwrap()
        })
        .await
        .unwrap();
        assert!(summary.is_clean(), "{summary:#?}");
        assert!(summary.writes > 100, "{summary:#?}");
        self.agent
    }
}

fn to(binary: &str) -> UpgradeDaemons {
    UpgradeDaemons {
        vm_ids: vec!["web".into()],
        binary: binary.into(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_version_takes_over_under_load_and_is_kept() {
    let mut rig = Rig::start().await;
    let before = rig.blk().await;
    assert_eq!(before.build, "", "the installed one");
    let binary = rig.good_build("device-blk-2");
    let job = rig.upgrade("up", to(&binary)).await;
    assert_eq!(job.state(), JobState::Done, "{}", job.error);
    println!("{:?}", job.findings);
    let after = rig.blk().await;
    assert_ne!(after.pid, before.pid);
    assert_eq!((after.build.len(), after.restarts), (12, 0));
    assert!(!is_alive(before.pid as i32), "the old process has ended");
    let slowest = rig.guest.as_ref().unwrap().display().take_latencies();
    println!("slowest request {:?}", slowest.iter().max().unwrap());

    // The copy counts, not the original: a crash, then an agent's.
    fs::remove_file(&binary).unwrap();
    kill_hard(after.pid as i32);
    rig.agent
        .until("web", "restarted", |status| {
            let blk = status.processes.iter().find(|p| p.name == "device-blk");
            blk.is_some_and(|blk| blk.restarts == 1 && blk.pid != 0)
        })
        .await;
    let restarted = rig.blk().await;
    assert_eq!(restarted.build, after.build);
    rig.agent.end(Signal::SIGKILL);
    rig.agent.start_again().await;
    assert_eq!(rig.blk().await.build, after.build);
    rig.goes_on().await;

    // The same work again has nothing to do; back to the installed one has.
    let again = rig.good_build("device-blk-2");
    let job = rig.upgrade("again", to(&again)).await;
    assert_eq!(job.state(), JobState::Done, "{}", job.error);
    assert_eq!(rig.blk().await.pid, restarted.pid);
    let installed = rig.agent.path().join("bin/device-blk");
    let job = rig
        .upgrade("back", to(&installed.display().to_string()))
        .await;
    assert_eq!(job.state(), JobState::Done, "{}", job.error);
    assert_eq!(rig.blk().await.build, "");
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn version_that_does_not_come_up_touches_nothing() {
    let mut rig = Rig::start().await;
    let before = rig.blk().await;
    let real = built("device-blk");
    let cases = [
        ("quits", "echo 'no luck today' >&2; exit 3", "no luck today"),
        ("hangs", "exec sleep 1000", "did not answer its start"),
        (
            "lies",
            &format!("exec {} \"$@\"", real.display()),
            "not device-blk 9.9.9",
        ),
    ];
    for (name, script, problem) in cases {
        let binary = rig.program(name, script);
        let job = rig
            .upgrade(
                name,
                UpgradeDaemons {
                    gate_ms: 1000,
                    ..to(&binary)
                },
            )
            .await;
        assert_eq!(job.state(), JobState::Failed);
        assert!(job.error.contains(problem), "{}", job.error);
        assert!(job.error.contains("the old one serves on"), "{}", job.error);
        rig.goes_on().await;
    }
    let after = rig.blk().await;
    assert_eq!((after.pid, after.restarts), (before.pid, 0));
    let agent = rig.end().await;
    assert_eq!(agent.processes().len(), 2, "vmm-core and device-blk");
    let versions = agent.path().join("state/versions");
    assert_eq!(
        fs::read_dir(versions).unwrap().count(),
        0,
        "no copy is kept"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn version_that_dies_in_service_is_rolled_back() {
    let mut rig = Rig::start().await;
    let before = rig.blk().await;
    let dir = rig.agent.path().display().to_string();
    let script = format!(
        "{} \"$@\" 2> {dir}/own.log & child=$!\n\
         until grep -q 'frontend connected' {dir}/own.log; do sleep 0.01; done\n\
         sleep 0.05; kill -9 $child; wait; exit 4",
        built("device-blk").display()
    );
    let binary = rig.executable(
        "dies",
        &format!(
            "[ \"$1\" = --version ] && exec {} --version\n{script}",
            built("device-blk").display()
        ),
    );
    let job = rig.upgrade("dies", to(&binary)).await;
    assert_eq!(job.state(), JobState::Failed);
    assert!(job.error.contains("rolled back"), "{}", job.error);
    let after = rig.blk().await;
    assert_eq!(
        (after.pid, after.restarts),
        (before.pid, 0),
        "the old process has its disk back"
    );
    let slowest = rig.guest.as_ref().unwrap().display().take_latencies();
    println!(
        "{}; slowest request {:?}",
        job.error,
        slowest.iter().max().unwrap()
    );
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn version_that_hangs_in_service_is_rolled_back() {
    let mut rig = Rig::start().await;
    let before = rig.blk().await;
    let binary = rig.good_build("device-blk-hung");
    let old = before.pid as i32;
    let connections = rig.connections();
    rig.begin(
        "hangs",
        UpgradeDaemons {
            watch_ms: 5000,
            ..to(&binary)
        },
    )
    .await;
    let new = poll("the new process", || {
        let found = rig.agent.processes().into_iter().find(|pid| {
            let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            *pid != old && exe.starts_with(rig.agent.path().join("state/versions"))
        });
        async move { found }
    })
    .await;
    poll("the hand-over", || {
        let connected = rig.connections() > connections;
        async move { connected.then_some(()) }
    })
    .await;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(new), Signal::SIGSTOP).unwrap();
    let job = rig.upgrade_over("hangs").await;
    assert_eq!(job.state(), JobState::Failed);
    assert!(job.error.contains("rolled back"), "{}", job.error);
    assert_eq!(rig.blk().await.pid as i32, old);
    gone(new).await;
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn version_that_turns_frontends_away_is_rolled_back() {
    let mut rig = Rig::start().await;
    let before = rig.blk().await;
    let this = std::env::current_exe().unwrap();
    let script = format!(
        "{}=\"$*\" exec {} --exact upgrade::turning_away::daemon --ignored --nocapture",
        turning_away::ARGS,
        this.display()
    );
    let name = "turns-away";
    let version = env!("CARGO_PKG_VERSION");
    let binary = rig.executable(
        name,
        &format!("[ \"$1\" = --version ] && {{ echo device-blk {version}; exit; }}\n{script}"),
    );
    let job = rig.upgrade(name, to(&binary)).await;
    assert_eq!(job.state(), JobState::Failed);
    for part in ["rolled back", "root is not connected"] {
        assert!(job.error.contains(part), "{}", job.error);
    }
    assert_eq!(rig.blk().await.pid, before.pid);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn device_net_is_exchanged_under_a_real_machine() {
    let mut agent = Agent::start().await;
    let mut vm = spec("exchanged", &guest::sleeper(agent.path()));
    vm.disks = vec![disk("root", &agent.image("root.raw"))];
    if may_make_taps() {
        vm.nics = vec![NicSpec {
            name: "eth0".into(),
            ..NicSpec::default()
        }];
    }
    let before = agent.run(&vm).await;
    // Both kinds, fresh processes of what runs: a hand-over to itself.
    let request = StartJobRequest {
        job_id: "fresh".into(),
        work: Some(Work::Upgrade(UpgradeDaemons::default())),
    };
    agent.client.start_job(request).await.unwrap();
    let job = poll("the job's end", || {
        let mut client = agent.client.clone();
        async move {
            let listed = client.list_jobs(ListJobsRequest {}).await.unwrap();
            let job = listed.into_inner().jobs.remove(0);
            (job.state() != JobState::Running).then_some(job)
        }
    })
    .await;
    assert_eq!(job.state(), JobState::Done, "{}", job.error);
    println!("{:?}", job.findings);
    let after = agent
        .until("exchanged", "connected again", |status| {
            let mut devices = status.devices.iter();
            devices.all(|device| device.connected && device.incarnations == 2)
        })
        .await;
    let daemons = before.processes.iter().filter(|p| p.name != "vmm-core");
    assert_eq!(daemons.clone().count(), job.findings.len());
    for daemon in daemons {
        assert_ne!(pid(&after, &daemon.name), daemon.pid as i32);
        assert!(!is_alive(daemon.pid as i32), "{} has ended", daemon.name);
    }
    // Its tap goes with it.
    agent.power(&mut vm, Power::OffNow).await;
    agent
        .until("exchanged", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_device_blk_gets_one_clear_error() {
    let mut rig = Rig::start().await;
    let before = rig.blk().await;
    let missing = rig.agent.path().join("no-such-file").display().to_string();
    let plain = rig.agent.path().join("plain");
    fs::write(&plain, "text").unwrap();
    let net = built("device-net").display().to_string();
    let cases = [
        (missing, "", Code::NotFound, "does not exist"),
        (
            plain.display().to_string(),
            "",
            Code::InvalidArgument,
            "chmod +x",
        ),
        (
            "/bin/ls".to_owned(),
            "",
            Code::InvalidArgument,
            "is not device-blk or device-net",
        ),
        (
            net.clone(),
            "root",
            Code::InvalidArgument,
            "is not device-blk",
        ),
        (
            net,
            "",
            Code::FailedPrecondition,
            "no daemon that is to be upgraded",
        ),
        (
            String::new(),
            "nothing",
            Code::FailedPrecondition,
            "does not exist",
        ),
    ];
    for (index, (binary, device, code, problem)) in cases.into_iter().enumerate() {
        let work = UpgradeDaemons {
            device: device.into(),
            ..to(&binary)
        };
        let job = rig.upgrade(&format!("wrong-{index}"), work).await;
        assert_eq!(job.state(), JobState::Failed, "{binary}");
        assert_eq!(Code::from_i32(job.error_code), code, "{}", job.error);
        assert!(job.error.contains(problem), "{}", job.error);
        assert!(!job.error.contains('\n'), "{}", job.error);
    }
    assert_eq!(rig.blk().await.pid, before.pid);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agent_that_is_killed_during_an_upgrade_costs_nothing() {
    let mut rig = Rig::start().await;
    let binary = rig.good_build("device-blk-3");
    let old = rig.blk().await.pid as i32;
    let connections = rig.connections();
    rig.begin(
        "long",
        UpgradeDaemons {
            watch_ms: 60_000,
            gate_ms: 60_000,
            ..to(&binary)
        },
    )
    .await;
    poll("the hand-over", || {
        let connected = rig.connections() > connections;
        async move { connected.then_some(()) }
    })
    .await;
    rig.agent.end(Signal::SIGKILL);
    rig.agent.start_again().await;
    rig.agent
        .until("web", "served again", |status| {
            let blk = status.processes.iter().find(|p| p.name == "device-blk");
            blk.is_some_and(|blk| blk.pid != 0)
        })
        .await;
    gone(old).await;
    assert_eq!(rig.blk().await.build, "", "the upgrade was not complete");
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spare_serves_when_the_daemon_dies() {
    let mut rig = Rig::start().await;
    rig.vm.generation += 1;
    rig.vm.warm_spare = true;
    let vm = rig.vm.clone();
    rig.agent.apply(&vm).await.unwrap();
    let with_spare = |status: &api::node::VmStatus| {
        let blk = status.processes.iter().find(|p| p.name == "device-blk");
        blk.is_some_and(|blk| blk.spare_pid != 0 && blk.pid != 0)
    };
    let mut expected = Vec::new();
    for _ in 0..3 {
        let status = rig.agent.until("web", "with a spare", with_spare).await;
        let served_by = pid(&status, "device-blk");
        if let Some(expected) = expected.last() {
            assert_eq!(served_by, *expected, "the spare took over");
        }
        let blk = rig.blk().await;
        expected.push(blk.spare_pid as i32);
        kill_hard(served_by);
        gone(served_by).await;
        rig.agent
            .until("web", "served by the spare", |status| {
                status
                    .processes
                    .iter()
                    .any(|process| process.pid == blk.spare_pid)
            })
            .await;
        rig.goes_on().await;
    }
    // Nobody stands by any more once that is not wished.
    rig.vm.generation += 1;
    rig.vm.warm_spare = false;
    let vm = rig.vm.clone();
    rig.agent.until("web", "with a spare", with_spare).await;
    rig.agent.apply(&vm).await.unwrap();
    let blk = rig.blk().await;
    assert_eq!(blk.spare_pid, 0);
    let agent = rig.end().await;
    poll("the spare's end", || {
        let left = agent.processes().len();
        async move { (left == 2).then_some(()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_upgrade_begins_no_further_wave() {
    let mut rig = Rig::start().await;
    let mut second = rig.vm.clone();
    second.id = "db".into();
    second.disks = vec![disk("root", &rig.agent.image("db.raw"))];
    let _vmm = stand_in::answer_for(&rig.agent, "db");
    rig.agent.run(&second).await;
    // Nobody is the guest of the second one's disk: the gate of whoever is first holds the others up.
    let binary = rig.good_build("device-blk-4");
    rig.begin(
        "waves",
        UpgradeDaemons {
            vm_ids: vec!["web".into(), "db".into()],
            watch_ms: 1500,
            ..to(&binary)
        },
    )
    .await;
    poll("the first wave", || {
        let mut client = rig.agent.client.clone();
        async move {
            let listed = client.list_jobs(ListJobsRequest {}).await.unwrap();
            let jobs = listed.into_inner().jobs;
            jobs.iter()
                .any(|job| job.stage.contains("wave 1 of 2: device-blk of web"))
                .then_some(())
        }
    })
    .await;
    let request = CancelJobRequest {
        job_id: "waves".into(),
    };
    rig.agent.client.cancel_job(request).await.unwrap();
    let job = rig.upgrade_over("waves").await;
    assert_eq!(job.state(), JobState::Cancelled, "{}", job.error);
    for part in ["upgraded: device-blk of web", "not begun: device-blk of db"] {
        assert!(job.error.contains(part), "{}", job.error);
    }
    rig.end().await;
}
