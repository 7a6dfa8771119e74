//! An agent on a machine of its own.

use std::{
    path::Path,
    process::{Child, Stdio},
};

use api::node::{
    ApplyNetworkRequest, ApplyVmRequest, DeleteNetworkRequest, Endpoint, ListNetworksRequest,
    NetworkKind, NetworkSpec, NetworkStatus, VmSpec, node_agent_client::NodeAgentClient,
};
use nix::{sys::signal::Signal, unistd::Pid};
use tokio::runtime::Runtime;
use tonic::{Status, transport::Channel};

use crate::namespace::{Namespace, PATIENCE, busybox, poll};

/// See the module.
pub(crate) struct Agent {
    pub(crate) host: Namespace,
    dir: tempfile::TempDir,
    args: Vec<String>,
    child: Child,
    runtime: Runtime,
    client: NodeAgentClient<Channel>,
}

impl Agent {
    pub(crate) fn start(host: Namespace) -> Self {
        Self::start_with(host, &[])
    }

    pub(crate) fn start_with(host: Namespace, args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let child = spawn(&host, dir.path(), args);
        let client = connect(&runtime, dir.path());
        Self {
            host,
            dir,
            args: args.iter().map(ToString::to_string).collect(),
            child,
            runtime,
            client,
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn client(&self) -> NodeAgentClient<Channel> {
        self.client.clone()
    }

    pub(crate) fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// Kills the agent and starts another.
    pub(crate) fn replace(&mut self) {
        self.end(Signal::SIGKILL);
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        self.child = spawn(&self.host, self.dir.path(), &args);
        self.client = connect(&self.runtime, self.dir.path());
    }

    pub(crate) fn apply_vm(&mut self, spec: &VmSpec) {
        let spec = Some(spec.clone());
        let call = self.client.apply_vm(ApplyVmRequest { spec });
        self.runtime.block_on(call).unwrap();
    }

    pub(crate) fn apply(&mut self, spec: &NetworkSpec) -> Result<NetworkStatus, Status> {
        let spec = Some(spec.clone());
        let call = self.client.apply_network(ApplyNetworkRequest { spec });
        self.runtime.block_on(call).map(tonic::Response::into_inner)
    }

    pub(crate) fn delete(&mut self, id: &str) -> Result<(), Status> {
        let call = self
            .client
            .delete_network(DeleteNetworkRequest { id: id.into() });
        self.runtime.block_on(call).map(drop)
    }

    pub(crate) fn network(&mut self, id: &str) -> Option<NetworkStatus> {
        let call = self.client.list_networks(ListNetworksRequest {});
        let listed = self.runtime.block_on(call).unwrap().into_inner().networks;
        listed.into_iter().find(|network| network.id == id)
    }

    /// Another machine whose only interface, eth0, is in the network's bridge.
    pub(crate) fn guest(&self, bridge: &str, port: &str, mac: &str) -> Namespace {
        let guest = Namespace::new();
        self.host.run(&format!(
            "ip link add {port} type veth peer name eth0 netns {}",
            guest.pid()
        ));
        self.host
            .run(&format!("ip link set {port} master {bridge} up"));
        guest.run(&format!("ip link set eth0 address {mac} up"));
        guest
    }

    /// Nothing of any network is left.
    pub(crate) fn assert_clean(&self) {
        let links = self.host.run("ip -o link");
        let own = |name: &&str| links.contains(*name);
        let left: Vec<&str> = ["mb-", "mx-", "mu-", "mt-"]
            .into_iter()
            .filter(own)
            .collect();
        assert!(left.is_empty(), "{left:?} in {links}");
        assert_eq!(self.host.run("nft list tables"), "");
        for dir in ["run/networks", "state/networks"] {
            let entries = std::fs::read_dir(self.dir.path().join(dir)).unwrap();
            let left: Vec<_> = entries
                .map(|entry| entry.unwrap().file_name())
                .filter(|name| name != "forwarding")
                .collect();
            assert!(left.is_empty(), "{dir}: {left:?}");
        }
        let own = self.dir.path().to_str().unwrap().to_owned();
        let serving = |cmdline: &[u8]| {
            let text = String::from_utf8_lossy(cmdline);
            (text.contains("dnsmasq") || text.contains("device-net")) && text.contains(&own)
        };
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let cmdline = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            assert!(!serving(&cmdline), "{:?} is left", entry.file_name());
        }
    }

    fn end(&mut self, signal: Signal) {
        nix::sys::signal::kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
        poll("the agent's end", || self.child.try_wait().unwrap());
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.path().join("agent.log"));
            eprintln!("the agent said:\n{}", log.unwrap_or_default());
        }
        let ids: Vec<String> = {
            let call = self.client.list_networks(ListNetworksRequest {});
            let listed = self.runtime.block_on(call);
            listed
                .map(|answer| answer.into_inner().networks)
                .unwrap_or_default()
        }
        .into_iter()
        .map(|network| network.id)
        .collect();
        for id in ids {
            let _ = self.delete(&id);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(host: &Namespace, dir: &Path, args: &[&str]) -> Child {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(dir.join("agent.log"))
        .unwrap();
    host.command(env!("CARGO_BIN_EXE_node-agent"))
        .arg("--listen")
        .arg(format!("unix:{}", dir.join("agent.sock").display()))
        .arg("--state-dir")
        .arg(dir.join("state"))
        .arg("--run-dir")
        .arg(dir.join("run"))
        .args(args)
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

fn connect(runtime: &Runtime, dir: &Path) -> NodeAgentClient<Channel> {
    let socket = dir.join("agent.sock");
    poll("the agent", || api::listen::answers(&socket).then_some(()));
    let channel = runtime
        .block_on(api::connect::unix(&socket, PATIENCE))
        .unwrap();
    NodeAgentClient::new(channel)
}

/// 10.20.0.0/24 and fd00:20::/64 with one guest, `web`, at .5.
pub(crate) fn network(id: &str, kind: NetworkKind) -> NetworkSpec {
    let has_host = matches!(kind, NetworkKind::Nat | NetworkKind::HostOnly);
    let gateway = |text: &str| {
        if has_host {
            text.to_owned()
        } else {
            String::new()
        }
    };
    NetworkSpec {
        id: id.into(),
        revision: "1".into(),
        kind: kind as i32,
        ipv4_gateway: gateway("10.20.0.1/24"),
        ipv6_gateway: gateway("fd00:20::1/64"),
        dhcp: has_host,
        dns: has_host,
        dns_domain: format!("{id}.internal"),
        endpoints: vec![Endpoint {
            vm_id: "web".into(),
            nic: "nic0".into(),
            mac: WEB_MAC.into(),
            ipv4_address: "10.20.0.5".into(),
            ipv6_address: WEB_IPV6.into(),
            hostname: "web".into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

pub(crate) const WEB_MAC: &str = "52:54:00:12:34:05";
/// EUI-64 of [`WEB_MAC`].
pub(crate) const WEB_IPV6: &str = "fd00:20::5054:ff:fe12:3405";

/// Runs busybox's DHCP client until it has a lease: address, router, DNS server, host name.
pub(crate) fn dhcp(guest: &Namespace) -> [String; 4] {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("script");
    let out = dir.path().join("lease");
    let text = format!(
        "#!/bin/sh\n[ \"$1\" = bound ] || exit 0\nip addr add $ip/$mask dev $interface\n\
         [ -z \"$router\" ] || ip route add default via $router\n\
         echo \"$ip;$router;$dns;$hostname\" > {}\n",
        out.display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let output = guest
        .command(busybox())
        .args([
            "udhcpc", "-i", "eth0", "-n", "-q", "-f", "-t", "20", "-T", "1", "-O", "hostname",
        ])
        .arg("-s")
        .arg(&script)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "no lease: {said}");
    let lease = std::fs::read_to_string(&out).unwrap();
    let fields: Vec<String> = lease.trim().split(';').map(str::to_owned).collect();
    fields.try_into().unwrap()
}
