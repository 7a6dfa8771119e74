//! Networks whose datapath is a switch: one device-net for the NICs of all VMs. The VMs' machines are real
//! ones without their NICs, which machines of these tests are cabled to instead.

mod leased;
mod vlans;

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use api::{
    device::{NetLimit, NetLimits},
    node::{
        Datapath, DeleteVmRequest, Endpoint, GetNicsRequest, GetVmRequest, Job, JobState,
        ListJobsRequest, NetworkKind, NetworkProcess, NetworkSpec, NicSpec, NicStatus, Power,
        ProcessStatus, SecurityRule, StartJobRequest, UpgradeDaemons, VmPhase, VmSpec, VmStatus,
        nics_client::NicsClient, start_job_request::Work,
    },
};
use nix::{sys::signal::Signal, unistd::Pid};
use tonic::Code;

use crate::{
    agent::{Agent, WEB_MAC, dhcp, network},
    cable::Cable,
    guest,
    namespace::{Namespace, PATIENCE, poll},
};

const DB_MAC: &str = "52:54:00:12:34:06";
const LOG_MAC: &str = "52:54:00:12:34:07";

/// 10.20.0.0/24 with two guests, `web` at .5 and `db` at .6.
fn switched(kind: NetworkKind) -> NetworkSpec {
    let mut spec = network("front", kind);
    spec.datapath = Datapath::Switch as i32;
    spec.endpoints.push(Endpoint {
        vm_id: "db".into(),
        nic: "nic0".into(),
        mac: DB_MAC.into(),
        ipv4_address: "10.20.0.6".into(),
        hostname: "db".into(),
        ..Default::default()
    });
    spec
}

/// A host with an agent whose VMs' machines have no NICs.
struct Host {
    agent: Agent,
    programs: tempfile::TempDir,
}

impl Host {
    fn start() -> Self {
        Self::start_with(&[])
    }

    fn start_with(args: &[&str]) -> Self {
        let programs = programs();
        let dir = programs.path().to_str().unwrap().to_owned();
        let args = [&["--bin-dir", &dir], args].concat();
        let agent = Agent::start_with(Namespace::new(), &args);
        Self { agent, programs }
    }

    /// An isolated network with two guests at .5 and .6, the second of which serves.
    fn with_two_guests(args: &[&str]) -> (Self, [(Namespace, Cable); 2]) {
        let mut host = Self::start_with(args);
        let status = host.agent.apply(&switched(NetworkKind::Isolated)).unwrap();
        assert!(status.ready, "{}", status.error);
        let guests = [("web", WEB_MAC, 5), ("db", DB_MAC, 6)].map(|(id, mac, number)| {
            host.run(id, mac);
            let (machine, cable) = host.guest(id, mac);
            machine.run(&format!("ip addr add 10.20.0.{number}/24 dev eth0"));
            (machine, cable)
        });
        (host, guests)
    }

    /// Has the switch that serves web's NIC exchanged; what came of it.
    fn upgrade(&self, job_id: &str, binary: &Path) -> Job {
        let mut client = self.agent.client();
        let work = UpgradeDaemons {
            vm_ids: vec!["web".into()],
            device: "nic0".into(),
            binary: binary.to_str().unwrap().into(),
            gate_ms: 10_000,
            ..Default::default()
        };
        let request = StartJobRequest {
            job_id: job_id.into(),
            work: Some(Work::Upgrade(work)),
        };
        self.agent.block_on(client.start_job(request)).unwrap();
        poll("the upgrade", || {
            let listed = self
                .agent
                .block_on(client.list_jobs(ListJobsRequest {}))
                .unwrap();
            let mut jobs = listed.into_inner().jobs.into_iter();
            let job = jobs.find(|job| job.job_id == job_id).unwrap();
            (job.state() != JobState::Running).then_some(job)
        })
    }

    fn vm(&self, id: &str, mac: &str, generation: u64, power: Power) -> VmSpec {
        VmSpec {
            id: id.into(),
            generation,
            power: power as i32,
            vcpus: 1,
            memory_bytes: 16 << 20,
            kernel: guest::sleeper(self.agent.path()).to_str().unwrap().into(),
            nics: vec![NicSpec {
                name: "nic0".into(),
                mac: mac.into(),
                network: "front".into(),
                limits: Some(NetLimits {
                    ingress: Some(NetLimit {
                        packets_per_second: 100_000,
                        ..Default::default()
                    }),
                    egress: None,
                }),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    fn run(&mut self, id: &str, mac: &str) {
        let spec = self.vm(id, mac, 1, Power::On);
        self.agent.apply_vm(&spec);
        let status = self.settled(id);
        assert_eq!(status.phase(), VmPhase::Running, "{}", status.error);
    }

    fn remove(&mut self, id: &str, mac: &str) {
        let spec = self.vm(id, mac, 9, Power::OffNow);
        self.agent.apply_vm(&spec);
        assert_eq!(self.settled(id).phase(), VmPhase::Stopped);
        let mut client = self.agent.client();
        let request = DeleteVmRequest {
            id: id.into(),
            ..Default::default()
        };
        self.agent.block_on(client.delete_vm(request)).unwrap();
    }

    fn status(&self, id: &str) -> VmStatus {
        let mut client = self.agent.client();
        let request = GetVmRequest { id: id.into() };
        let status = self.agent.block_on(client.get_vm(request)).unwrap();
        status.into_inner()
    }

    fn settled(&self, id: &str) -> VmStatus {
        poll("the VM", || {
            let status = self.status(id);
            let moves = matches!(status.phase(), VmPhase::Starting | VmPhase::Stopping);
            (!moves).then_some(status)
        })
    }

    /// A machine at the other end of a VM's NIC.
    fn guest(&self, id: &str, mac: &str) -> (Namespace, Cable) {
        let machine = Namespace::new();
        let socket = self.agent.path().join(format!("run/vms/{id}/nic0.vu"));
        let cable = Cable::plug(&machine, mac, socket);
        (machine, cable)
    }

    /// As `vmctl nic show` has it.
    fn nic(&self, id: &str) -> NicStatus {
        let socket = self.agent.path().join("agent.sock");
        let answer = self.agent.block_on(async {
            let channel = api::connect::unix(&socket, PATIENCE).await.unwrap();
            let request = GetNicsRequest { vm_id: id.into() };
            NicsClient::new(channel).get_nics(request).await.unwrap()
        });
        answer.into_inner().nics.remove(0)
    }

    fn switch(&mut self) -> NetworkProcess {
        let network = self.agent.network("front").unwrap();
        let switch = network.processes.into_iter().next().unwrap();
        assert_eq!(switch.name, "device-net");
        switch
    }

    /// Kills the switch as a crash would, and waits for the next one.
    fn kill_switch(&mut self) {
        let before = self.switch();
        nix::sys::signal::kill(Pid::from_raw(before.pid as i32), Signal::SIGKILL).unwrap();
        poll("the next switch", || {
            let switch = self.switch();
            (switch.restarts == before.restarts + 1 && switch.pid != 0).then_some(())
        });
    }
}

/// The daemons, and a vmm-core whose machine has no NIC: so that others may be connected to its NICs' sockets.
fn programs() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let built = Path::new(env!("CARGO_BIN_EXE_node-agent"))
        .parent()
        .unwrap();
    for program in ["device-net", "device-blk"] {
        std::os::unix::fs::symlink(built.join(program), dir.path().join(program)).unwrap();
    }
    let script = format!(
        "#!/bin/sh\n\
         left=$#\n\
         while [ $left -gt 0 ]; do\n\
           word=$1; shift; left=$((left - 1))\n\
           case \"$1\" in tag=*,type=net,*) shift; left=$((left - 1)); continue;; esac\n\
           set -- \"$@\" \"$word\"\n\
         done\n\
         exec {} \"$@\"\n",
        built.join("vmm-core").display()
    );
    let path = dir.path().join("vmm-core");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

#[test]
fn guests_are_served_by_one_switch_and_its_successors() {
    let mut host = Host::start();
    let mut spec = switched(NetworkKind::Nat);
    let status = host.agent.apply(&spec).unwrap();
    assert!(status.ready, "{}", status.error);
    host.run("web", WEB_MAC);
    host.run("db", DB_MAC);
    let links = host.agent.host.run("ip -o link");
    assert!(!links.contains("mt-"), "no tap of any VM: {links}");
    assert!(links.contains("mu-front") && links.contains("master mb-front"));
    let switch = host.switch();
    assert_eq!(switch.nics, ["db/nic0", "web/nic0"]);
    let confined = switch
        .sandbox
        .iter()
        .any(|name| name.starts_with("seccomp"));
    assert!(confined, "{switch:?}");
    let shared = |status: VmStatus| -> Vec<ProcessStatus> {
        let processes = status.processes.into_iter();
        processes
            .filter(|process| process.network == "front")
            .collect()
    };
    let seen = poll("the switch in a VM's status", || {
        shared(host.status("web")).pop()
    });
    assert_eq!(
        (seen.pid, seen.devices),
        (switch.pid, vec!["nic0".to_owned()])
    );

    let (web, web_cable) = host.guest("web", WEB_MAC);
    let (db, db_cable) = host.guest("db", DB_MAC);
    let [address, router, dns, hostname] = dhcp(&web);
    assert_eq!(
        [&*address, &*router, &*dns, &*hostname],
        ["10.20.0.5", "10.20.0.1", "10.20.0.1", "web"]
    );
    assert_eq!(dhcp(&db)[0], "10.20.0.6");
    let _on_db = db.serve("10.20.0.6:7000");
    let _on_host = host.agent.host.serve("10.20.0.1:7000");
    let web_reaches = |address: &str| web.ask(address).as_deref() == Some("10.20.0.5");
    assert!(web_reaches("10.20.0.6:7000"), "from guest to guest");
    assert!(web_reaches("10.20.0.1:7000"), "the host");

    // What is set for one NIC holds for it alone, and for each next switch.
    spec.revision = "2".into();
    spec.endpoints[1].filtered = true;
    spec.endpoints[1].rules = vec![SecurityRule {
        ingress: true,
        protocol: 6,
        first_port: 7000,
        last_port: 7000,
        cidr: "10.20.0.0/24".into(),
        ..Default::default()
    }];
    host.agent.apply(&spec).unwrap();
    let _elsewhere = db.serve("10.20.0.6:7001");
    let holds = |host: &Host| {
        let nic = host.nic("db").nic.expect("served");
        assert_eq!(nic.id, "nic0");
        let rules = nic.policy.unwrap().security.unwrap().rules.len();
        let limits = nic.limits.unwrap().ingress.unwrap();
        assert_eq!((rules, limits.packets_per_second), (1, 100_000));
        assert!(web_reaches("10.20.0.6:7000"), "permitted");
        assert_eq!(web.ask("10.20.0.6:7001"), None, "not permitted");
        assert!(web_reaches("10.20.0.1:7000"), "the host");
    };
    holds(&host);
    host.kill_switch();
    web_cable.await_connections(2);
    db_cable.await_connections(2);
    holds(&host);

    let before = host.switch();
    host.agent.replace();
    poll("the adopted network", || {
        host.agent.network("front").filter(|network| network.ready)
    });
    let adopted = host.switch();
    assert_eq!(adopted.pid, before.pid, "kept, not started again");
    poll("its NICs", || (host.switch().nics.len() == 2).then_some(()));
    holds(&host);
    host.kill_switch();
    web_cable.await_connections(3);
    db_cable.await_connections(3);
    holds(&host);

    let refused = host.agent.delete("front").unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(
        refused.message().contains("web/nic0"),
        "{}",
        refused.message()
    );
    host.remove("web", WEB_MAC);
    host.remove("db", DB_MAC);
    assert!(host.switch().nics.is_empty());
    host.agent.delete("front").unwrap();
    host.agent.assert_clean();
}

#[test]
fn isolated_switch_has_nothing_in_the_kernel() {
    let mut host = Host::start();
    let mut spec = switched(NetworkKind::Isolated);
    let status = host.agent.apply(&spec).unwrap();
    assert!(status.ready && status.bridge.is_empty(), "{status:?}");
    host.run("web", WEB_MAC);
    host.run("db", DB_MAC);
    let links = host.agent.host.run("ip -o link");
    assert_eq!(links.lines().count(), 1, "a loopback: {links}");
    assert_eq!(host.agent.host.run("nft list tables"), "");
    let (web, _web_cable) = host.guest("web", WEB_MAC);
    let (db, _db_cable) = host.guest("db", DB_MAC);
    web.run("ip addr add 10.20.0.5/24 dev eth0");
    db.run("ip addr add 10.20.0.6/24 dev eth0");
    let _on_db = db.serve("10.20.0.6:7000");
    assert_eq!(web.ask("10.20.0.6:7000").as_deref(), Some("10.20.0.5"));
    spec.datapath = Datapath::Kernel as i32;
    let refused = host.agent.apply(&spec).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(
        refused.message().contains("spec.datapath"),
        "{}",
        refused.message()
    );
    host.remove("web", WEB_MAC);
    host.remove("db", DB_MAC);
    host.agent.delete("front").unwrap();
    host.agent.assert_clean();
}

#[test]
fn each_obstacle_has_its_error_and_leaves_nothing() {
    let mut host = Host::start();
    let spec = switched(NetworkKind::Nat);
    host.agent
        .host
        .run("ip link add mu-front type veth peer name mu0");
    let refused = host.agent.apply(&spec).unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists);
    assert!(
        refused.message().contains("ip link del mu-front"),
        "{}",
        refused.message()
    );
    host.agent.host.run("ip link del mu-front");
    let program = host.programs.path().join("device-net");
    let built = fs::read_link(&program).unwrap();
    fs::remove_file(&program).unwrap();
    let refused = host.agent.apply(&spec).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(
        refused.message().contains("--bin-dir"),
        "{}",
        refused.message()
    );
    host.agent.delete("front").unwrap();
    host.agent.assert_clean();

    std::os::unix::fs::symlink(built, &program).unwrap();
    host.agent.apply(&spec).unwrap();
    host.run("web", WEB_MAC);
    let twin = host.vm("db", WEB_MAC, 1, Power::On);
    host.agent.apply_vm(&twin);
    let failed = host.settled("db");
    assert_eq!(failed.phase(), VmPhase::Failed);
    assert_eq!(
        failed.error_code,
        Code::AlreadyExists as i32,
        "{}",
        failed.error
    );
    assert!(
        failed.error.contains("NIC nic0") && failed.error.contains(WEB_MAC),
        "{}",
        failed.error
    );
    assert_eq!(
        host.switch().nics,
        ["web/nic0"],
        "nothing of the other stays"
    );
    host.remove("web", WEB_MAC);
    host.agent.delete("front").unwrap();
    host.agent.assert_clean();
}

#[test]
fn bridged_switch_is_part_of_the_network_of_an_interface_without_a_bridge() {
    let mut host = Host::start();
    let world = Namespace::new();
    host.agent.host.connect("up0", &world, "eth0");
    world.run("ip addr add 192.0.2.2/24 dev eth0");
    let mut spec = switched(NetworkKind::Bridged);
    spec.uplink = "up0".into();
    spec.endpoints[0].ipv4_address = "192.0.2.5".into();
    spec.endpoints[0].ipv6_address.clear();
    let status = host.agent.apply(&spec).unwrap();
    assert!(status.ready && status.bridge.is_empty(), "{status:?}");
    host.run("web", WEB_MAC);
    let (web, cable) = host.guest("web", WEB_MAC);
    web.run("ip addr add 192.0.2.5/24 dev eth0");
    let _server = world.serve("192.0.2.2:7000");
    assert_eq!(web.ask("192.0.2.2:7000").as_deref(), Some("192.0.2.5"));
    host.kill_switch();
    cable.await_connections(2);
    assert_eq!(web.ask("192.0.2.2:7000").as_deref(), Some("192.0.2.5"));
    host.remove("web", WEB_MAC);
    host.agent.delete("front").unwrap();
    host.agent.host.run("ip link show up0");
    host.agent.assert_clean();

    spec.uplink = "up7".into();
    let refused = host.agent.apply(&spec).unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert!(refused.message().contains("up7"), "{}", refused.message());
}

#[test]
fn switch_that_hangs_is_killed_and_its_guests_are_served_again() {
    let (mut host, [(web, web_cable), (db, db_cable)]) =
        Host::with_two_guests(&["--hang-after", "3"]);
    let _on_db = db.serve("10.20.0.6:7000");
    assert_eq!(web.ask("10.20.0.6:7000").as_deref(), Some("10.20.0.5"));
    let before = host.switch();
    nix::sys::signal::kill(Pid::from_raw(before.pid as i32), Signal::SIGSTOP).unwrap();
    let next = poll("the next switch", || {
        let switch = host.switch();
        (switch.pid != before.pid && switch.pid != 0).then_some(switch)
    });
    assert_eq!(next.restarts, before.restarts + 1);
    assert!(next.last_error.contains("hung and was killed"), "{next:?}");
    web_cable.await_connections(2);
    db_cable.await_connections(2);
    assert_eq!(web.ask("10.20.0.6:7000").as_deref(), Some("10.20.0.5"));
}

#[test]
fn switch_is_exchanged_for_another_version_and_back_when_that_is_no_good() {
    let (mut host, [(web, web_cable), (db, db_cable)]) = Host::with_two_guests(&[]);
    let _on_db = db.serve("10.20.0.6:7000");
    let before = host.switch();
    let real = host.programs.path().join("device-net");
    let good = host.programs.path().join("device-net-2");
    let mut build = fs::read(&real).unwrap();
    build.extend(b"another build");
    fs::write(&good, build).unwrap();
    fs::set_permissions(&good, fs::Permissions::from_mode(0o755)).unwrap();
    let job = host.upgrade("good", &good);
    assert_eq!(job.state(), JobState::Done, "{}", job.error);
    assert!(
        job.findings[0].starts_with("device-net of network front: device-net "),
        "{:?}",
        job.findings
    );
    let serving = |host: &mut Host| {
        let pid = host.switch().pid;
        poll("it in the VM's status", || {
            let mut processes = host.status("web").processes.into_iter();
            processes.find(|process| process.network == "front" && process.pid == pid)
        })
    };
    let after = serving(&mut host);
    assert_ne!(after.pid, before.pid);
    assert_eq!((after.build.len(), after.restarts), (12, 0));
    web_cable.await_connections(2);
    db_cable.await_connections(2);
    assert_eq!(web.ask("10.20.0.6:7000").as_deref(), Some("10.20.0.5"));

    // The next agent, and the switch's next process, are of that version, too.
    host.agent.replace();
    poll("the adopted network", || {
        host.agent.network("front").filter(|network| network.ready)
    });
    poll("its NICs", || (host.switch().nics.len() == 2).then_some(()));
    assert_eq!(serving(&mut host).pid, after.pid, "kept, not started again");
    host.kill_switch();
    assert_eq!(serving(&mut host).build, after.build);
    web_cable.await_connections(3);

    let bad = host.programs.path().join("device-net-bad");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --version ] && exec {} --version\nexit 3\n",
        real.display()
    );
    fs::write(&bad, script).unwrap();
    fs::set_permissions(&bad, fs::Permissions::from_mode(0o755)).unwrap();
    let job = host.upgrade("bad", &bad);
    assert_eq!(job.state(), JobState::Failed);
    assert!(job.error.contains("rolled back"), "{}", job.error);
    assert_eq!(serving(&mut host).build, after.build);
    web_cable.await_connections(4);
    db_cable.await_connections(4);
    assert_eq!(web.ask("10.20.0.6:7000").as_deref(), Some("10.20.0.5"));
    let kept = fs::read_dir(host.agent.path().join("state/versions")).unwrap();
    assert_eq!(kept.count(), 1, "the good one");
}
