//! What can be typed about networks and security groups.

use std::net::IpAddr;
use std::str::FromStr;

use api::controller as pb;
use clap::{Args, Subcommand, ValueEnum};

use super::WaitArgs;
use crate::security_rule::RuleArg;

/// `vmctl network ...`
#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// Create a network and wait until the host has it
    #[command(after_help = "Examples:
  vmctl network create front --kind nat
  vmctl network create front --kind nat --subnet 10.20.0.0/24 --ipv6-prefix fd00:20::/64
  vmctl network create lan --kind bridged --bridge br0
  vmctl network create fast --kind nat --datapath switch
  vmctl network create wide --kind host-only --subnet 10.30.0.0/24 --pool 10.30.0.10-10.30.0.99 \\
        --vni 4711 --underlay 192.0.2.1 --peer 192.0.2.2
  vmctl run --kernel vmlinuz --disk root.raw --net front,port-forward=tcp:8080:80")]
    Create(Box<NetworkCreateArgs>),
    /// List networks
    List {
        /// Of all projects
        #[arg(long)]
        all_projects: bool,
    },
    /// Show everything about a network, its DHCP leases among it
    Show {
        /// The network
        name: String,
    },
    /// Change a network while VMs use it
    #[command(after_help = "Examples:
  vmctl network update front --dns-server 9.9.9.9 --dns-server 149.112.112.112
  vmctl network update wide --peer 192.0.2.2,52:54:00:12:34:05 --peer 192.0.2.3")]
    Update(NetworkUpdateArgs),
    /// Delete a network that no VM is in
    Delete {
        /// The network
        name: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

/// `vmctl network create`
#[derive(Debug, Args)]
pub(crate) struct NetworkCreateArgs {
    /// Name of the network: a-z, 0-9 and hyphen
    pub(crate) name: String,
    /// Whom its VMs reach
    #[arg(long, value_enum)]
    pub(crate) kind: NetworkKind,
    /// IPv4 subnet, such as 10.20.0.0/24 [default of nat and host-only: a free /24 of 10.64.0.0/10]
    #[arg(long, value_name = "CIDR")]
    pub(crate) subnet: Option<String>,
    /// The host's address in it [default: the first]
    #[arg(long, value_name = "IP")]
    pub(crate) gateway: Option<IpAddr>,
    /// Addresses that are given to VMs [default: all]
    #[arg(long, value_name = "FIRST-LAST", value_parser = parse_pool)]
    pub(crate) pool: Option<(String, String)>,
    /// IPv6 prefix of 64 bits, such as fd00:20::/64
    #[arg(long, value_name = "CIDR")]
    pub(crate) ipv6_prefix: Option<String>,
    /// Serve no addresses
    #[arg(long)]
    pub(crate) no_dhcp: bool,
    /// Serve no names
    #[arg(long)]
    pub(crate) no_dns: bool,
    /// Server that other names are asked of; may be repeated [default: those of the host]
    #[arg(long = "dns-server", value_name = "IP")]
    pub(crate) dns_servers: Vec<IpAddr>,
    /// Domain of the VMs' names [default: NAME.internal]
    #[arg(long)]
    pub(crate) domain: Option<String>,
    /// Largest packet [default: 1500, or 1450 with --vni]
    #[arg(long, value_name = "BYTES")]
    pub(crate) mtu: Option<u32>,
    /// Existing bridge of the host, of bridged networks
    #[arg(long, value_name = "INTERFACE")]
    pub(crate) bridge: Option<String>,
    /// Interface of the host that nat goes out by [default: as its routes say], or that a bridged network
    /// with --datapath switch is part of, instead of --bridge
    #[arg(long, value_name = "INTERFACE")]
    pub(crate) uplink: Option<String>,
    /// Carry it between hosts in the VXLAN of this number
    #[arg(long, value_name = "N")]
    pub(crate) vni: Option<u32>,
    /// The host's address that others send to [default: that of its agent's command line]
    #[arg(long, value_name = "IP", requires = "vni")]
    pub(crate) underlay: Option<IpAddr>,
    /// UDP port of the VXLAN [default: 4789]
    #[arg(long, value_name = "PORT", requires = "vni")]
    pub(crate) vxlan_port: Option<u16>,
    /// Another host that has the network, and MACs of NICs there; may be repeated
    #[arg(long = "peer", value_name = "IP[,MAC..]", requires = "vni")]
    pub(crate) peers: Vec<PeerArg>,
    /// How frames travel between VMs of one host
    #[arg(long, value_enum, default_value_t = Datapath::Kernel)]
    pub(crate) datapath: Datapath,
    /// NICs may be in VLANs; of isolated and bridged networks with --datapath switch
    #[arg(long)]
    pub(crate) vlan_aware: bool,
    /// The same id again creates nothing twice [default: a random one]
    #[arg(long, value_name = "ID")]
    pub(crate) request_id: Option<String>,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

/// `vmctl network update`
#[derive(Debug, Args)]
pub(crate) struct NetworkUpdateArgs {
    /// The network
    pub(crate) name: String,
    /// Whether addresses are served
    #[arg(long, value_enum)]
    pub(crate) dhcp: Option<Switch>,
    /// Whether names are served
    #[arg(long, value_enum)]
    pub(crate) dns: Option<Switch>,
    /// Servers that other names are asked of, all of them
    #[arg(long = "dns-server", value_name = "IP")]
    pub(crate) dns_servers: Vec<IpAddr>,
    /// Largest packet; 0 for the default
    #[arg(long, value_name = "BYTES")]
    pub(crate) mtu: Option<u32>,
    /// Other hosts that have the network, all of them
    #[arg(long = "peer", value_name = "IP[,MAC..]")]
    pub(crate) peers: Vec<PeerArg>,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    /// Yes
    On,
    /// No
    Off,
}

/// Whom a network's VMs reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum NetworkKind {
    /// The host and, by its addresses, what it reaches; they are reached by port forwards
    Nat,
    /// A network that the host has a bridge into
    Bridged,
    /// The host
    HostOnly,
    /// One another only
    Isolated,
}

/// How frames travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Datapath {
    /// By a Linux bridge
    Kernel,
    /// By a switch in one device-net process, from guest to guest without the kernel
    Switch,
}

/// `--peer`
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PeerArg(pub(crate) pb::OverlayPeer);

impl FromStr for PeerArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',').map(str::to_owned);
        let underlay_address = words.next().unwrap_or_default();
        if underlay_address.parse::<IpAddr>().is_err() {
            return Err(format!(
                "{underlay_address:?} is no IP address; give IP[,MAC..]"
            ));
        }
        Ok(Self(pb::OverlayPeer {
            underlay_address,
            macs: words.collect(),
        }))
    }
}

fn parse_pool(text: &str) -> Result<(String, String), String> {
    let (first, last) = text
        .split_once('-')
        .ok_or("give FIRST-LAST, such as 10.20.0.10-10.20.0.99")?;
    Ok((first.trim().to_owned(), last.trim().to_owned()))
}

/// `vmctl port-forward ...`
#[derive(Debug, Subcommand)]
pub(crate) enum PortForwardCommand {
    /// List the host's ports that lead to VMs
    List {
        /// Of all projects
        #[arg(long)]
        all_projects: bool,
    },
    /// Have a port of the host lead to a VM in a nat network, running or not
    #[command(after_help = "Examples:
  vmctl port-forward add web tcp:8080:80
  vmctl port-forward add web udp:192.0.2.1:5353:53 --nic nic1")]
    Add {
        /// The VM
        vm: String,
        /// What leads where
        #[arg(value_name = "tcp|udp:[ADDRESS:]HOST-PORT[:GUEST-PORT]", value_parser = crate::port_forward::parse)]
        forward: pb::PortForward,
        /// Its NIC [default: the first that is in a network]
        #[arg(long)]
        nic: Option<String>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Take a port of the host back
    Remove {
        /// The VM
        vm: String,
        /// Which one
        #[arg(value_name = "tcp|udp:HOST-PORT", value_parser = crate::port_forward::parse)]
        forward: pb::PortForward,
        /// Its NIC [default: the first that is in a network]
        #[arg(long)]
        nic: Option<String>,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

/// `vmctl security-group ...`
#[derive(Debug, Subcommand)]
pub(crate) enum SecurityGroupCommand {
    /// Create a security group; what none of its rules permits is dropped, both ways
    #[command(after_help = "Examples:
  vmctl security-group create web --rule ingress,tcp:80 --rule ingress,tcp:22,from=admins --rule egress
  vmctl run --kernel vmlinuz --disk root.raw --net front,sg=web")]
    Create {
        /// Name of the group: a-z, 0-9 and hyphen
        name: String,
        /// For people
        #[arg(long, value_name = "TEXT")]
        description: Option<String>,
        /// ingress|egress[,PROTOCOL[:PORT[-PORT]]][,from=PREFIX|GROUP][,to=PREFIX|GROUP][,ipv4|ipv6]
        /// [,icmp-type=N][,icmp-code=N]; may be repeated
        #[arg(long = "rule", value_name = "RULE")]
        rules: Vec<RuleArg>,
    },
    /// List security groups
    List {
        /// Of all projects
        #[arg(long)]
        all_projects: bool,
    },
    /// Show a security group's rules and members
    Show {
        /// The group
        name: String,
    },
    /// Replace a security group's rules, for running VMs too
    Update {
        /// The group
        name: String,
        /// For people
        #[arg(long, value_name = "TEXT")]
        description: Option<String>,
        /// As of create: all rules that it is to have
        #[arg(
            long = "rule",
            value_name = "RULE",
            required_unless_present = "no_rules"
        )]
        rules: Vec<RuleArg>,
        /// Have none: nothing passes
        #[arg(long, conflicts_with = "rules")]
        no_rules: bool,
    },
    /// Delete a security group that nobody names
    Delete {
        /// The group
        name: String,
    },
}
