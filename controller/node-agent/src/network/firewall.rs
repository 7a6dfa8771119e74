//! What nftables does for a network: NAT, port forwards, and who may reach whom. Each network has
//! tables of its own, which are replaced as a whole in one transaction.

use std::{fmt::Write as _, net::IpAddr, process::Stdio, time::Duration};

use api::node::{NetworkKind, NetworkSpec};
use ipnet::IpNet;
use tokio::io::AsyncWriteExt as _;

use super::{error::NetworkError, programs};

/// nft talks to the kernel only.
const NFT_WITHIN: Duration = Duration::from_secs(10);

/// What the rules are made of.
pub(super) struct Ruleset<'a> {
    pub(super) spec: &'a NetworkSpec,
    /// The network's bridge.
    pub(super) bridge: &'a str,
    /// Its VXLAN device.
    pub(super) vxlan: Option<&'a str>,
}

/// Puts the network's tables in force.
pub(super) async fn apply(ruleset: &Ruleset<'_>) -> Result<(), NetworkError> {
    run(&ruleset.spec.id, &ruleset.render()).await
}

/// Removes the network's tables. Some that are not there are no error.
pub(super) async fn remove(id: &str) -> Result<(), NetworkError> {
    let mut script = String::new();
    for family in ["inet", "bridge"] {
        // Deleting needs one that is there.
        let table = table(id);
        let _ = writeln!(
            script,
            "table {family} {table}\ndelete table {family} {table}"
        );
    }
    run(id, &script).await
}

fn table(id: &str) -> String {
    format!("mortise-{id}")
}

async fn run(id: &str, script: &str) -> Result<(), NetworkError> {
    let program = programs::find(id, programs::NFT)?;
    let failed = |message: String| NetworkError::Firewall {
        id: id.to_owned(),
        message,
    };
    let mut child = tokio::process::Command::new(program)
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(format!("cannot be started: {error}")))?;
    let mut input = child.stdin.take().expect("piped");
    let talk = async {
        input.write_all(script.as_bytes()).await?;
        drop(input);
        child.wait_with_output().await
    };
    let output = match tokio::time::timeout(NFT_WITHIN, talk).await {
        Ok(done) => done.map_err(|error| failed(error.to_string()))?,
        Err(_) => return Err(failed(format!("did not end within {NFT_WITHIN:?}"))),
    };
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("Operation not permitted") {
        return Err(NetworkError::NotPermitted {
            id: id.to_owned(),
            action: "setting its nftables rules",
        });
    }
    if blames_bridge_family(script, &said) {
        return Err(NetworkError::NoBridgeRules { id: id.to_owned() });
    }
    let first = said.lines().find(|line| !line.trim().is_empty());
    Err(failed(first.unwrap_or("failed without a word").to_owned()))
}

/// Whether nft says of a line of the bridge's table that the kernel does not know what it asks for: the module for
/// it is not there, or may not be loaded.
fn blames_bridge_family(script: &str, said: &str) -> bool {
    let opens_table = |line: &str| line.starts_with("table bridge ") && line.ends_with('{');
    let Some(table_line) = script.lines().position(opens_table) else {
        return false;
    };
    // FILE:LINE:COLUMNS: Error: ...
    said.lines().any(|complaint| {
        let line = complaint.split(':').nth(1);
        let line = line.and_then(|line| line.parse::<usize>().ok());
        line.is_some_and(|line| line > table_line)
            && ["No such file or directory", "not supported"]
                .iter()
                .any(|reason| complaint.contains(reason))
    })
}

impl Ruleset<'_> {
    fn kind(&self) -> NetworkKind {
        self.spec.kind()
    }

    /// The script for nft.
    fn render(&self) -> String {
        let table = table(&self.spec.id);
        let mut text = String::new();
        for family in ["inet", "bridge"] {
            let _ = writeln!(
                text,
                "table {family} {table}\ndelete table {family} {table}"
            );
        }
        let _ = writeln!(text, "table inet {table} {{");
        self.forward(&mut text);
        self.input(&mut text);
        if self.kind() == NetworkKind::Nat {
            self.nat(&mut text);
        }
        text.push_str("}\n");
        if let Some(vxlan) = self.vxlan {
            self.overlay(&mut text, vxlan);
        }
        text
    }

    /// What the host passes on between interfaces.
    fn forward(&self, text: &mut String) {
        let bridge = self.bridge;
        text.push_str(
            "  chain forward {\n    type filter hook forward priority filter; policy accept;\n",
        );
        // Seen here only where br_netfilter shows bridged frames.
        let _ = writeln!(text, "    iifname \"{bridge}\" oifname \"{bridge}\" accept");
        if self.kind() == NetworkKind::Nat {
            for net in self.networks() {
                let _ = writeln!(
                    text,
                    "    iifname \"{bridge}\" {} saddr {} {}accept",
                    family(net.addr()),
                    net.trunc(),
                    self.uplink("oifname")
                );
            }
            let _ = writeln!(
                text,
                "    oifname \"{bridge}\" ct state established,related accept"
            );
            let _ = writeln!(text, "    oifname \"{bridge}\" ct status dnat accept");
        }
        let _ = writeln!(text, "    iifname \"{bridge}\" drop");
        let _ = writeln!(text, "    oifname \"{bridge}\" drop\n  }}");
    }

    /// What reaches the host itself.
    fn input(&self, text: &mut String) {
        let bridge = self.bridge;
        if self.kind() == NetworkKind::Isolated {
            text.push_str(
                "  chain input {\n    type filter hook input priority filter; policy accept;\n",
            );
            let _ = writeln!(text, "    iifname \"{bridge}\" drop\n  }}");
            text.push_str(
                "  chain output {\n    type filter hook output priority filter; policy accept;\n",
            );
            let _ = writeln!(text, "    oifname \"{bridge}\" drop\n  }}");
            return;
        }
        // The loopback is reachable by way of port forwards (route_localnet), but never from here.
        text.push_str(
            "  chain early {\n    type filter hook prerouting priority raw; policy accept;\n",
        );
        let _ = writeln!(text, "    iifname \"{bridge}\" ip daddr 127.0.0.0/8 drop");
        let _ = writeln!(
            text,
            "    iifname \"{bridge}\" ip saddr 127.0.0.0/8 drop\n  }}"
        );
    }

    fn nat(&self, text: &mut String) {
        let bridge = self.bridge;
        text.push_str("  chain postrouting {\n    type nat hook postrouting priority srcnat; policy accept;\n");
        for net in self.networks() {
            let (family, subnet) = (family(net.addr()), net.trunc());
            // Also what a forward leads back into the network: the answer must come through here.
            let _ = writeln!(
                text,
                "    oifname \"{bridge}\" ct status dnat {family} saddr {subnet} masquerade"
            );
            let _ = writeln!(
                text,
                "    oifname != \"{bridge}\" {}{family} saddr {subnet} {family} daddr != {subnet} masquerade",
                self.uplink("oifname")
            );
        }
        let _ = writeln!(
            text,
            "    oifname \"{bridge}\" ip saddr 127.0.0.0/8 masquerade\n  }}"
        );
        let forwards = self.forwards();
        for (chain, hook) in [("prerouting", "prerouting"), ("local", "output")] {
            let _ = writeln!(
                text,
                "  chain {chain} {{\n    type nat hook {hook} priority -100; policy accept;"
            );
            text.push_str(&forwards);
            text.push_str("  }\n");
        }
    }

    fn forwards(&self) -> String {
        let mut text = String::new();
        for endpoint in &self.spec.endpoints {
            for forward in &endpoint.port_forwards {
                let host: Option<IpAddr> = forward.host_address.parse().ok();
                for address in [&endpoint.ipv4_address, &endpoint.ipv6_address] {
                    let Ok(guest) = address.parse::<IpAddr>() else {
                        continue;
                    };
                    let at = match host {
                        Some(host) if host.is_ipv4() != guest.is_ipv4() => continue,
                        Some(host) => format!("{} daddr {host}", family(host)),
                        None => "fib daddr type local".to_owned(),
                    };
                    let (to, nfproto) = match guest {
                        IpAddr::V4(guest) => (format!("ip to {guest}"), "ipv4"),
                        IpAddr::V6(guest) => (format!("ip6 to [{guest}]"), "ipv6"),
                    };
                    let _ = writeln!(
                        text,
                        "    meta nfproto {nfproto} {at} {} dport {} dnat {to}:{}",
                        forward.protocol, forward.host_port, forward.guest_port
                    );
                }
            }
        }
        text
    }

    /// The host's own address, DHCP and router advertisements stay on this side of an overlay: the
    /// network's other hosts have the same.
    fn overlay(&self, text: &mut String, vxlan: &str) {
        let _ = writeln!(text, "table bridge {} {{", table(&self.spec.id));
        text.push_str("  chain own {\n");
        for net in self.networks() {
            match net.addr() {
                IpAddr::V4(gateway) => {
                    let _ = writeln!(text, "    arp daddr ip {gateway} drop");
                    let _ = writeln!(text, "    arp saddr ip {gateway} drop");
                    text.push_str("    udp dport { 67, 68 } drop\n");
                }
                IpAddr::V6(gateway) => {
                    let _ = writeln!(
                        text,
                        "    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} @th,64,128 {:#x} drop",
                        u128::from(gateway)
                    );
                    text.push_str("    icmpv6 type { nd-router-solicit, nd-router-advert } drop\n");
                    text.push_str("    udp dport { 546, 547 } drop\n");
                }
            }
        }
        text.push_str("  }\n");
        for (hook, direction) in [
            ("input", "iifname"),
            ("forward", "iifname"),
            ("forward", "oifname"),
            ("output", "oifname"),
        ] {
            let _ = writeln!(
                text,
                "  chain {hook}-{direction} {{\n    type filter hook {hook} priority filter; policy accept;\n    {direction} \"{vxlan}\" jump own\n  }}"
            );
        }
        text.push_str("}\n");
    }

    fn uplink(&self, direction: &str) -> String {
        match self.spec.uplink.as_str() {
            "" => String::new(),
            uplink => format!("{direction} \"{uplink}\" "),
        }
    }

    fn networks(&self) -> Vec<IpNet> {
        [&self.spec.ipv4_gateway, &self.spec.ipv6_gateway]
            .into_iter()
            .filter_map(|text| text.parse().ok())
            .collect()
    }
}

fn family(address: IpAddr) -> &'static str {
    match address {
        IpAddr::V4(_) => "ip",
        IpAddr::V6(_) => "ip6",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::node::{Endpoint, PortForward};

    #[test]
    fn kernel_that_cannot_filter_frames_is_told_from_other_mistakes() {
        let script = "table inet a {\n}\ntable bridge a {\n  chain c {\n    iifname \"x\" drop\n";
        let says = |line: usize, reason: &str| {
            format!("/dev/stdin:{line}:5-20: Error: Could not process rule: {reason}\n    ^^^^\n")
        };
        let missing = "No such file or directory";
        assert!(blames_bridge_family(script, &says(5, missing)));
        assert!(blames_bridge_family(
            script,
            &says(3, "Operation not supported")
        ));
        assert!(!blames_bridge_family(script, &says(1, missing)));
        assert!(!blames_bridge_family(script, &says(5, "File exists")));
        assert!(!blames_bridge_family(
            "table inet a {\n}\n",
            &says(5, missing)
        ));
    }

    fn spec(kind: NetworkKind) -> NetworkSpec {
        NetworkSpec {
            id: "front".into(),
            kind: kind as i32,
            ipv4_gateway: "10.20.0.1/24".into(),
            ipv6_gateway: "fd00:20::1/64".into(),
            endpoints: vec![Endpoint {
                ipv4_address: "10.20.0.5".into(),
                ipv6_address: "fd00:20::5".into(),
                port_forwards: vec![PortForward {
                    protocol: "tcp".into(),
                    host_address: String::new(),
                    host_port: 8080,
                    guest_port: 80,
                }],
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    fn render(spec: &NetworkSpec) -> String {
        let ruleset = Ruleset {
            spec,
            bridge: "mb-front",
            vxlan: None,
        };
        ruleset.render()
    }

    #[test]
    fn forwards_lead_to_the_guest_by_both_families() {
        let text = render(&spec(NetworkKind::Nat));
        assert!(
            text.contains(
                "meta nfproto ipv4 fib daddr type local tcp dport 8080 dnat ip to 10.20.0.5:80"
            ),
            "{text}"
        );
        assert!(text.contains("dnat ip6 to [fd00:20::5]:80"), "{text}");
        let mut bound = spec(NetworkKind::Nat);
        bound.endpoints[0].port_forwards[0].host_address = "192.0.2.1".into();
        let text = render(&bound);
        assert!(text.contains("ip daddr 192.0.2.1 tcp dport 8080"), "{text}");
        assert!(!text.contains("dnat ip6 to"), "{text}");
    }

    #[test]
    fn only_nat_networks_translate_and_only_isolated_ones_keep_the_host_out() {
        assert!(render(&spec(NetworkKind::Nat)).contains("masquerade"));
        let host_only = render(&spec(NetworkKind::HostOnly));
        assert!(!host_only.contains("masquerade") && !host_only.contains("hook input"));
        let isolated = render(&spec(NetworkKind::Isolated));
        assert!(isolated.contains("hook input"), "{isolated}");
    }
}
