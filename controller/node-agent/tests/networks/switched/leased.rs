//! The NIC of a VM that may run elsewhere, at a switch that others' NICs are at, too.

use std::{
    path::PathBuf,
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::JoinHandle,
    time::Duration,
};

use api::node::{
    LeaseStage, RenewLeaseRequest, RenewLeaseResponse, RestartPolicy, leases_client::LeasesClient,
};

use super::*;

/// Long enough for a loaded machine to come back to renewing it.
const LEASE_MS: u32 = 8_000;
/// Nothing is lost, however long the thaw takes.
const GRACE_MS: u32 = 600_000;
const RENEW_INTERVAL: Duration = Duration::from_millis(250);

/// Renews an agent's lease until it is dropped.
struct Keeper {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Of the agent that answers at `socket`; with the lease's session once it is held.
    fn start(socket: PathBuf) -> (Self, String) {
        let (stop, stopped) = channel();
        let (held, is_held) = channel();
        let keep = move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let channel = api::connect::unix(&socket, PATIENCE);
            let mut client = LeasesClient::new(runtime.block_on(channel).unwrap());
            let mut ticket = RenewLeaseResponse::default();
            while stopped.recv_timeout(RENEW_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                let request = RenewLeaseRequest {
                    session: ticket.session.clone(),
                    ticket_boottime_ns: ticket.ticket_boottime_ns,
                    lease_ms: LEASE_MS,
                    grace_ms: GRACE_MS,
                    settle_ms: 5_000,
                };
                let answer = runtime.block_on(client.renew_lease(request)).unwrap();
                ticket = answer.into_inner();
                if ticket.stage() == LeaseStage::Held {
                    // It is waited for once.
                    let _ = held.send(ticket.session.clone());
                }
            }
        };
        let keeper = Self {
            stop: Some(stop),
            thread: Some(std::thread::spawn(keep)),
        };
        let session = is_held.recv_timeout(PATIENCE).expect("the lease is held");
        (keeper, session)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A process that stands still until this is dropped.
struct Frozen(Pid);

impl Frozen {
    fn new(pid: Pid) -> Self {
        nix::sys::signal::kill(pid, Signal::SIGSTOP).unwrap();
        Self(pid)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(self.0, Signal::SIGCONT);
    }
}

#[test]
fn frozen_host_takes_its_leased_vm_off_the_network_and_no_other() {
    let mut host = Host::start();
    let mut spec = switched(NetworkKind::Isolated);
    spec.endpoints.push(Endpoint {
        vm_id: "log".into(),
        nic: "nic0".into(),
        mac: LOG_MAC.into(),
        ipv4_address: "10.20.0.7".into(),
        hostname: "log".into(),
        ..Default::default()
    });
    let status = host.agent.apply(&spec).unwrap();
    assert!(status.ready, "{}", status.error);
    let socket = host.agent.path().join("agent.sock");
    let (keeper, session) = Keeper::start(socket.clone());
    let mut leased = host.vm("web", WEB_MAC, 1, Power::On);
    leased.set_restart_policy(RestartPolicy::Anywhere);
    leased.lease_session = session;
    host.agent.apply_vm(&leased);
    let status = host.settled("web");
    assert_eq!(status.phase(), VmPhase::Running, "{}", status.error);
    host.run("db", DB_MAC);
    host.run("log", LOG_MAC);
    let guests = [("web", WEB_MAC, 5), ("db", DB_MAC, 6), ("log", LOG_MAC, 7)];
    let [(web, web_cable), (db, _db_cable), (log, _log_cable)] = guests.map(|(id, mac, number)| {
        let (machine, cable) = host.guest(id, mac);
        machine.run(&format!("ip addr add 10.20.0.{number}/24 dev eth0"));
        (machine, cable)
    });
    let _on_db = db.serve("10.20.0.6:7000");
    let reaches = |machine: &Namespace| machine.ask("10.20.0.6:7000").is_some();
    assert!(reaches(&web) && reaches(&log));
    // The next switch lets it pass as long.
    host.kill_switch();
    web_cable.await_connections(2);
    poll("the next switch", || reaches(&web).then_some(()));

    drop(keeper);
    let frozen = Frozen::new(host.agent.pid());
    poll("the lease's end", || (!reaches(&web)).then_some(()));
    assert!(reaches(&log), "its VM needs no lease");
    assert!(!reaches(&web));
    drop(frozen);
    let (_keeper, _) = Keeper::start(socket);
    poll("the VM on its network again", || {
        reaches(&web).then_some(())
    });
    let stats = host.nic("web").nic.and_then(|nic| nic.stats).unwrap();
    let drops = stats.tx_drops_by_reason.get("lease_ended");
    assert!(drops.is_some_and(|drops| *drops > 0), "{stats:?}");
    leased.generation = 2;
    leased.set_power(Power::OffNow);
    host.agent.apply_vm(&leased);
    assert_eq!(host.settled("web").phase(), VmPhase::Stopped);
    for (id, mac, _) in guests {
        host.remove(id, mac);
    }
    host.agent.delete("front").unwrap();
    host.agent.assert_clean();
}
