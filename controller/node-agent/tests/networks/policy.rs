//! A real VM's NIC in a network: where its tap goes, and what its daemon is told to let pass.

use api::{
    device::{GetNicRequest, Nic, nics_client::NicsClient},
    node::{
        DeleteVmRequest, GetVmRequest, NetworkKind, NicSpec, Power, SecurityRule, VmPhase, VmSpec,
    },
};
use nix::{sys::signal::Signal, unistd::Pid};

use crate::{
    agent::{Agent, WEB_MAC, network},
    guest,
    namespace::{Namespace, PATIENCE, poll},
};

fn vm(agent: &Agent) -> VmSpec {
    VmSpec {
        id: "web".into(),
        generation: 1,
        power: Power::On as i32,
        vcpus: 1,
        memory_bytes: 16 << 20,
        kernel: guest::sleeper(agent.path()).to_str().unwrap().into(),
        nics: vec![NicSpec {
            name: "nic0".into(),
            mac: WEB_MAC.into(),
            network: "front".into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

impl Agent {
    fn settled(&mut self) -> (VmPhase, String) {
        poll("the VM", || {
            let mut client = self.client();
            let status = self.block_on(client.get_vm(GetVmRequest { id: "web".into() }));
            let status = status.unwrap().into_inner();
            let moves = matches!(status.phase(), VmPhase::Starting | VmPhase::Stopping);
            (!moves).then(|| (status.phase(), status.error.clone()))
        })
    }

    /// As its daemon has it; `None` while there is none.
    fn nic(&self) -> Option<Nic> {
        let socket = self.path().join("run/vms/web/net.sock");
        let channel = self.block_on(api::connect::unix(&socket, PATIENCE)).ok()?;
        let request = GetNicRequest { id: "nic0".into() };
        let answer = self
            .block_on(NicsClient::new(channel).get_nic(request))
            .ok()?;
        Some(answer.into_inner())
    }
}

#[test]
fn nic_joins_its_network_and_its_policy_follows_the_network() {
    let mut agent = Agent::start(Namespace::new());
    let machine = vm(&agent);
    agent.apply_vm(&machine);
    let (phase, error) = agent.settled();
    assert_eq!(phase, VmPhase::Failed);
    assert!(
        error.contains("network \"front\" does not exist"),
        "{error}"
    );

    let mut spec = network("front", NetworkKind::Nat);
    agent.apply(&spec).unwrap();
    agent.apply_vm(&VmSpec {
        generation: 2,
        ..machine.clone()
    });
    let (phase, error) = agent.settled();
    assert_eq!(phase, VmPhase::Running, "{error}");
    let tap = agent.host.run("ip -o link show mt-web-0");
    assert!(tap.contains("master mb-front"), "{tap}");
    let policy = agent.nic().unwrap().policy.unwrap();
    let own = policy.anti_spoofing.unwrap();
    assert_eq!(own.macs, [WEB_MAC]);
    assert!(
        own.addresses
            .iter()
            .any(|address| address.starts_with("10.20.0.5")),
        "{own:?}"
    );
    assert_eq!(policy.security, None);

    // A rule reaches the running NIC, and its daemon's successor.
    spec.revision = "2".into();
    spec.endpoints[0].filtered = true;
    spec.endpoints[0].rules = vec![SecurityRule {
        ingress: true,
        protocol: 6,
        first_port: 22,
        cidr: "10.0.0.0/8".into(),
        ..Default::default()
    }];
    agent.apply(&spec).unwrap();
    let rules = |nic: &Nic| {
        let security = nic.policy.clone().unwrap().security;
        security.map_or(0, |security| security.rules.len())
    };
    assert_eq!(rules(&agent.nic().unwrap()), 1);
    let daemon = || {
        let mut client = agent.client();
        let status = agent.block_on(client.get_vm(GetVmRequest { id: "web".into() }));
        let processes = status.unwrap().into_inner().processes.into_iter();
        let mut pids = processes.filter(|process| process.name == "device-net");
        pids.find_map(|process| (process.pid != 0).then_some(process.pid as i32))
    };
    let first = daemon().unwrap();
    // Somebody holds the tap throughout: frames wait in it, and nobody sees a cable pulled out.
    let carrier_changes = || {
        agent
            .host
            .run("cat /sys/class/net/mt-web-0/carrier_changes")
    };
    let before = carrier_changes();
    nix::sys::signal::kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    poll("the successor's rule", || {
        daemon().filter(|pid| *pid != first)?;
        (rules(&agent.nic()?) == 1).then_some(())
    });
    assert_eq!(carrier_changes(), before);

    let refused = agent.delete("front").unwrap_err();
    assert!(
        refused.message().contains("mt-web-0"),
        "{}",
        refused.message()
    );
    agent.apply_vm(&VmSpec {
        generation: 3,
        power: Power::OffNow as i32,
        ..machine
    });
    assert_eq!(agent.settled().0, VmPhase::Stopped);
    let mut client = agent.client();
    agent
        .block_on(client.delete_vm(DeleteVmRequest {
            id: "web".into(),
            ..Default::default()
        }))
        .unwrap();
    agent.delete("front").unwrap();
    agent.assert_clean();
}
