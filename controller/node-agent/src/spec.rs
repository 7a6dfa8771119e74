//! What a VM is made of, as this agent keeps it: the parsed and serialisable form of the API's
//! `VmSpec`. It is made from requests that `api::validate` let through only, so everything behind
//! it may rely on names being safe as file names and on counts being in range.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

use api::node::{OutageAction, RestartPolicy};
use lease::Restart;
use serde::{Deserialize, Serialize};

use crate::cloud_init::CloudInit;

/// How long a guest may take to answer the power button when the spec names no time.
pub(crate) const DEFAULT_SHUTDOWN_GRACE_MS: u32 = 30_000;
/// A VM as desired.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Spec {
    /// Unique on the host.
    pub(crate) id: String,
    /// Rises with every change.
    pub(crate) generation: u64,
    /// Whether it should run.
    pub(crate) power: Power,
    /// 1 to 32.
    pub(crate) vcpus: u32,
    /// Guest RAM.
    pub(crate) memory_bytes: u64,
    /// Kernel image on this host.
    pub(crate) kernel: PathBuf,
    /// Initial RAM disk on this host.
    pub(crate) initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub(crate) cmdline: String,
    /// Served by this VM's device-blk.
    pub(crate) disks: Vec<Disk>,
    /// Served by this VM's device-net.
    pub(crate) nics: Vec<Nic>,
    /// Served by somebody else.
    pub(crate) vhost_user: Vec<VhostUser>,
    /// Time for the guest to answer the power button.
    pub(crate) shutdown_grace_ms: u32,
    /// On a disk of its own.
    #[serde(default)]
    pub(crate) cloud_init: Option<CloudInit>,
    /// Processes stand by for its daemons.
    #[serde(default)]
    pub(crate) warm_spare: bool,
    /// By device, where they are not the default.
    #[serde(default)]
    pub(crate) outage_policies: BTreeMap<String, OutagePolicy>,
    /// When it does not run although it should.
    #[serde(default)]
    pub(crate) restart: Restart,
    /// After a boot of the host.
    #[serde(default)]
    pub(crate) autostart: bool,
    /// Then, lower ones come first.
    #[serde(default)]
    pub(crate) autostart_order: u32,
}

/// What is done while no daemon serves a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum OutagePolicy {
    /// Requests wait.
    #[default]
    Stall,
    /// Requests wait that long and fail then.
    ErrorAfter(Duration),
    /// The vCPUs stand still.
    PauseVm,
}

/// Whether a VM should run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Power {
    /// It should run.
    On,
    /// It should not; the guest is asked first.
    Off,
    /// It should not, at once.
    OffNow,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Disk {
    /// Unique among the VM's devices.
    pub(crate) name: String,
    /// Where its bytes are.
    pub(crate) source: DiskSource,
    /// The guest cannot write.
    pub(crate) read_only: bool,
    /// 1 to 64.
    pub(crate) num_queues: u32,
    /// At most 20 bytes; empty for the name.
    pub(crate) serial: String,
    /// Of an image at a path; a volume knows its own.
    #[serde(default)]
    pub(crate) format: Format,
    /// 512 or 4096; 0 for the default.
    #[serde(default)]
    pub(crate) block_size: u32,
    /// CPUs of the queues' threads; empty for any.
    #[serde(default)]
    pub(crate) cpus: Vec<u32>,
    /// Through the page cache even where O_DIRECT works.
    #[serde(default)]
    pub(crate) page_cache: bool,
    /// 0 for the default.
    #[serde(default)]
    pub(crate) slow_request_ms: u32,
    /// What may change while the VM runs.
    #[serde(default)]
    pub(crate) tuning: Tuning,
    /// Of a volume's attachment; 0 is not compared.
    #[serde(default)]
    pub(crate) generation: u64,
}

/// What may change of a disk while its VM runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tuning {
    /// Of reads.
    pub(crate) read: Rate,
    /// Of writes.
    pub(crate) write: Rate,
    /// How queues wait.
    pub(crate) polling: Polling,
}

/// A limit of one direction; 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rate {
    /// Requests a second.
    pub(crate) iops: u64,
    /// Bytes a second.
    pub(crate) bytes_per_second: u64,
    /// Requests at once after a pause.
    pub(crate) burst_ios: u64,
    /// Bytes at once after a pause.
    pub(crate) burst_bytes: u64,
}

/// Whether queues look for work a while before they sleep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Polling {
    /// For as long as it pays.
    #[default]
    Adaptive,
    /// They sleep at once.
    Never,
    /// They never sleep.
    Always,
}

/// How an image's file is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Format {
    /// Byte for byte.
    #[default]
    Raw,
    /// QEMU's.
    Qcow2,
}

/// Where a disk's bytes are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum DiskSource {
    /// An image somewhere on this host.
    Path(PathBuf),
    /// A volume of this host's pool.
    Volume(String),
    /// An export of another host.
    Nbd(Nbd),
}

/// An export of an NBD server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Nbd {
    /// HOST:PORT or unix:PATH.
    pub(crate) address: String,
    /// Its name there.
    pub(crate) export: String,
    /// Presented to the server.
    pub(crate) generation: u64,
    /// PEM on this host.
    pub(crate) tls_file: Option<PathBuf>,
    /// Name of the server's certificate; empty for the host of the address.
    pub(crate) tls_hostname: String,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Nic {
    /// Unique among the VM's devices.
    pub(crate) name: String,
    /// An existing tap; without one the agent creates its own.
    pub(crate) tap: Option<String>,
    /// Empty: derived from the VM's and the NIC's names, so that it survives restarts.
    pub(crate) mac: String,
    /// 1 to 16.
    pub(crate) queue_pairs: u32,
    /// Address of the host's end of a created tap.
    pub(crate) host_cidr: Option<Cidr>,
    /// Bridge that a created tap joins.
    pub(crate) bridge: Option<String>,
    /// 0 for the default.
    pub(crate) mtu: u32,
    /// Instead of a tap.
    #[serde(default)]
    pub(crate) user: Option<UserNetwork>,
    /// Id of the network that it is in, which then knows the bridge.
    #[serde(default)]
    pub(crate) network: Option<String>,
    /// A port of its network's switch, without a tap: as the network says when the VM starts.
    #[serde(skip)]
    pub(crate) switched: bool,
    /// Keep a table of flows, whatever the policy says.
    #[serde(default)]
    pub(crate) track_flows: bool,
    /// In a network with VLANs: that of frames without a tag, 0 for none.
    #[serde(default)]
    pub(crate) vlan: u32,
    /// Those that come and go tagged.
    #[serde(default)]
    pub(crate) trunk_vlans: Vec<u32>,
    /// What may change while the VM runs.
    #[serde(default)]
    pub(crate) tuning: NicTuning,
}

/// What may change of a NIC while its VM runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NicTuning {
    /// Of what the guest receives.
    pub(crate) ingress: NicRate,
    /// Of what it sends.
    pub(crate) egress: NicRate,
    /// The cable is out.
    pub(crate) link_down: bool,
}

/// A limit of one direction; 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NicRate {
    /// Bits a second.
    pub(crate) bits_per_second: u64,
    /// Packets a second.
    pub(crate) packets_per_second: u64,
    /// Bits at once after a pause.
    pub(crate) burst_bits: u64,
    /// Packets at once after a pause.
    pub(crate) burst_packets: u64,
}

/// A network without privileges.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UserNetwork {
    /// What reaches the guest.
    pub(crate) port_forwards: Vec<PortForward>,
    /// Where the guest finds the host's loopback.
    pub(crate) host_loopback: Option<IpAddr>,
}

/// A port of the host that is the guest's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PortForward {
    /// Else TCP.
    pub(crate) udp: bool,
    /// `None` for all.
    pub(crate) host_address: Option<IpAddr>,
    /// Not 0.
    pub(crate) host_port: u16,
    /// Not 0.
    pub(crate) guest_port: u16,
}

/// An address with its prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cidr {
    /// The host's own address.
    pub(crate) address: std::net::IpAddr,
    /// Bits of the network.
    pub(crate) prefix_len: u8,
}

/// A third-party vhost-user device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VhostUser {
    /// Unique among the VM's devices.
    pub(crate) name: String,
    /// blk, net, fs, vsock, rng or a virtio device number.
    pub(crate) kind: String,
    /// Where the daemon listens.
    pub(crate) socket: PathBuf,
    /// 0 for the type's default.
    pub(crate) num_queues: u32,
    /// 0 for the default.
    pub(crate) queue_size: u32,
    /// Configuration space in the daemon's stead, at most 256 bytes; empty: the daemon's own.
    #[serde(default)]
    pub(crate) config: Vec<u8>,
}

impl Spec {
    /// Of a spec that `api::validate` accepted.
    ///
    /// # Panics
    /// If it did not.
    pub(crate) fn from_validated(api: &api::node::VmSpec) -> Self {
        Self {
            id: api.id.clone(),
            generation: api.generation,
            power: Power::from_api(api.power()),
            vcpus: api.vcpus,
            memory_bytes: api.memory_bytes,
            kernel: PathBuf::from(&api.kernel),
            initramfs: not_empty(&api.initramfs).map(PathBuf::from),
            cmdline: api.cmdline.clone(),
            disks: api.disks.iter().map(Disk::from_api).collect(),
            nics: api.nics.iter().map(Nic::from_api).collect(),
            vhost_user: api.vhost_user.iter().map(VhostUser::from_api).collect(),
            shutdown_grace_ms: match api.shutdown_grace_ms {
                0 => DEFAULT_SHUTDOWN_GRACE_MS,
                given => given,
            },
            cloud_init: api.cloud_init.as_ref().map(CloudInit::from_api),
            warm_spare: api.warm_spare,
            outage_policies: api
                .outage_policies
                .iter()
                .map(|policy| (policy.device.clone(), OutagePolicy::from_api(policy)))
                .collect(),
            restart: match api.restart_policy() {
                RestartPolicy::Unspecified | RestartPolicy::Never => Restart::Never,
                RestartPolicy::SameHost => Restart::SameHost,
                RestartPolicy::Anywhere => Restart::Anywhere,
            },
            autostart: api.autostart,
            autostart_order: api.autostart_order,
        }
    }

    /// Whether a boot of the host starts it again by itself.
    pub(crate) fn comes_back(&self) -> bool {
        self.autostart && self.power == Power::On && self.restart != Restart::Anywhere
    }

    /// What is done in an outage of `device`.
    pub(crate) fn outage_policy(&self, device: &str) -> OutagePolicy {
        self.outage_policies
            .get(device)
            .copied()
            .unwrap_or_default()
    }

    /// Whether `other` is the same machine, apart from what may change while it runs.
    pub(crate) fn same_machine(&self, other: &Self) -> bool {
        let mut other = other.clone();
        other.generation = self.generation;
        other.power = self.power;
        other.shutdown_grace_ms = self.shutdown_grace_ms;
        other.warm_spare = self.warm_spare;
        other.outage_policies.clone_from(&self.outage_policies);
        other.autostart = self.autostart;
        other.autostart_order = self.autostart_order;
        for (other, own) in other.disks.iter_mut().zip(&self.disks) {
            other.tuning = own.tuning;
        }
        for (other, own) in other.nics.iter_mut().zip(&self.nics) {
            other.tuning = own.tuning;
        }
        *self == other
    }
}

impl OutagePolicy {
    fn from_api(api: &api::node::OutagePolicy) -> Self {
        match api.action() {
            OutageAction::Unspecified | OutageAction::Stall => Self::Stall,
            OutageAction::ErrorAfter => {
                Self::ErrorAfter(Duration::from_millis(api.error_after_ms.into()))
            }
            OutageAction::PauseVm => Self::PauseVm,
        }
    }

    /// As the API says it of `device`.
    pub(crate) fn to_api(self, device: &str) -> api::node::OutagePolicy {
        let (action, after) = match self {
            Self::Stall => (OutageAction::Stall, Duration::ZERO),
            Self::ErrorAfter(after) => (OutageAction::ErrorAfter, after),
            Self::PauseVm => (OutageAction::PauseVm, Duration::ZERO),
        };
        api::node::OutagePolicy {
            device: device.to_owned(),
            action: action.into(),
            // It came as so many milliseconds.
            error_after_ms: after.as_millis() as u32,
        }
    }
}

impl Power {
    fn from_api(api: api::node::Power) -> Self {
        match api {
            api::node::Power::On => Self::On,
            api::node::Power::Off => Self::Off,
            api::node::Power::OffNow => Self::OffNow,
            api::node::Power::Unspecified => panic!("a power wish was validated"),
        }
    }
}

impl Disk {
    fn from_api(api: &api::node::DiskSpec) -> Self {
        use api::node::disk_spec::Source;
        let source = match (&api.source, &api.nbd) {
            (Some(Source::Path(path)), _) => DiskSource::Path(PathBuf::from(path)),
            (Some(Source::Volume(id)), _) => DiskSource::Volume(id.clone()),
            (None, Some(nbd)) => DiskSource::Nbd(Nbd {
                address: nbd.address.clone(),
                export: nbd.export.clone(),
                generation: nbd.generation,
                tls_file: not_empty(&nbd.tls_file).map(PathBuf::from),
                tls_hostname: nbd.tls_hostname.clone(),
            }),
            (None, None) => panic!("a source was validated"),
        };
        let limits = api.limits.unwrap_or_default();
        Self {
            name: api.name.clone(),
            source,
            read_only: api.read_only,
            num_queues: api.num_queues.max(1),
            serial: api.serial.clone(),
            format: Format::from_validated(&api.format),
            block_size: api.block_size,
            cpus: api.cpus.clone(),
            page_cache: api.page_cache,
            slow_request_ms: api.slow_request_ms,
            tuning: Tuning {
                read: Rate::from_api(limits.read),
                write: Rate::from_api(limits.write),
                polling: match api.polling() {
                    api::node::Polling::Unspecified | api::node::Polling::Adaptive => {
                        Polling::Adaptive
                    }
                    api::node::Polling::Never => Polling::Never,
                    api::node::Polling::Always => Polling::Always,
                },
            },
            generation: api.generation,
        }
    }
}

impl Rate {
    fn from_api(api: Option<api::node::RateLimit>) -> Self {
        let api = api.unwrap_or_default();
        Self {
            iops: api.iops,
            bytes_per_second: api.bytes_per_second,
            burst_ios: api.burst_ios,
            burst_bytes: api.burst_bytes,
        }
    }

    fn to_device(self) -> api::device::RateLimit {
        api::device::RateLimit {
            iops: self.iops,
            bytes_per_second: self.bytes_per_second,
            burst_ios: self.burst_ios,
            burst_bytes: self.burst_bytes,
        }
    }
}

impl Tuning {
    /// For the daemon.
    pub(crate) fn limits(&self) -> api::device::RateLimits {
        api::device::RateLimits {
            read: Some(self.read.to_device()),
            write: Some(self.write.to_device()),
        }
    }

    /// For the daemon.
    pub(crate) fn polling(&self) -> api::device::Polling {
        match self.polling {
            Polling::Adaptive => api::device::Polling::Adaptive,
            Polling::Never => api::device::Polling::Never,
            Polling::Always => api::device::Polling::Always,
        }
    }
}

impl Format {
    /// Of a validated request: raw, qcow2, or empty for raw.
    pub(crate) fn from_validated(name: &str) -> Self {
        match name {
            "qcow2" => Self::Qcow2,
            _ => Self::Raw,
        }
    }

    /// As daemons, tools and people call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl Nic {
    fn from_api(api: &api::node::NicSpec) -> Self {
        Self {
            name: api.name.clone(),
            tap: not_empty(&api.tap).map(str::to_owned),
            mac: api.mac.clone(),
            queue_pairs: api.queue_pairs.max(1),
            host_cidr: not_empty(&api.host_cidr)
                .map(|text| parse_cidr(text).expect("an address was validated")),
            bridge: not_empty(&api.bridge).map(str::to_owned),
            mtu: api.mtu,
            user: api.user.as_ref().map(UserNetwork::from_api),
            network: not_empty(&api.network).map(str::to_owned),
            switched: false,
            track_flows: api.track_flows,
            vlan: api.vlan,
            trunk_vlans: api.trunk_vlans.clone(),
            tuning: NicTuning::from_api(api),
        }
    }
}

impl NicTuning {
    fn from_api(api: &api::node::NicSpec) -> Self {
        let limits = api.limits.unwrap_or_default();
        Self {
            ingress: NicRate::from_api(limits.ingress),
            egress: NicRate::from_api(limits.egress),
            link_down: api.link_down,
        }
    }

    /// For the daemon.
    pub(crate) fn limits(&self) -> api::device::NetLimits {
        api::device::NetLimits {
            ingress: Some(self.ingress.to_device()),
            egress: Some(self.egress.to_device()),
        }
    }
}

impl NicRate {
    fn from_api(api: Option<api::device::NetLimit>) -> Self {
        let api = api.unwrap_or_default();
        Self {
            bits_per_second: api.bits_per_second,
            packets_per_second: api.packets_per_second,
            burst_bits: api.burst_bits,
            burst_packets: api.burst_packets,
        }
    }

    fn to_device(self) -> api::device::NetLimit {
        api::device::NetLimit {
            bits_per_second: self.bits_per_second,
            packets_per_second: self.packets_per_second,
            burst_bits: self.burst_bits,
            burst_packets: self.burst_packets,
        }
    }
}

impl UserNetwork {
    fn from_api(api: &api::node::UserNetwork) -> Self {
        let address = |text: &str| {
            not_empty(text).map(|text| text.parse().expect("addresses were validated"))
        };
        let port = |number: u32| u16::try_from(number).expect("ports were validated");
        let forward = |forward: &api::node::PortForward| PortForward {
            udp: forward.protocol == "udp",
            host_address: address(&forward.host_address),
            host_port: port(forward.host_port),
            guest_port: port(forward.guest_port),
        };
        Self {
            port_forwards: api.port_forwards.iter().map(forward).collect(),
            host_loopback: address(&api.host_loopback),
        }
    }
}

impl VhostUser {
    fn from_api(api: &api::node::VhostUserSpec) -> Self {
        Self {
            name: api.name.clone(),
            kind: api.r#type.clone(),
            socket: PathBuf::from(&api.socket),
            num_queues: api.num_queues,
            queue_size: api.queue_size,
            config: api.config.clone(),
        }
    }
}

fn not_empty(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

fn parse_cidr(text: &str) -> Option<Cidr> {
    let (address, prefix_len) = text.split_once('/')?;
    Some(Cidr {
        address: address.parse().ok()?,
        prefix_len: prefix_len.parse().ok()?,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    //! Parsing, and an example that other modules' tests use too.

    use super::*;

    pub(crate) fn api_spec(id: &str) -> api::node::VmSpec {
        api::node::VmSpec {
            id: id.into(),
            generation: 1,
            power: api::node::Power::On.into(),
            vcpus: 1,
            memory_bytes: 128 << 20,
            kernel: "/boot/vmlinuz".into(),
            disks: vec![api::node::DiskSpec {
                name: "root".into(),
                source: Some(api::node::disk_spec::Source::Path(
                    "/images/root.raw".into(),
                )),
                ..Default::default()
            }],
            nics: vec![api::node::NicSpec {
                name: "eth0".into(),
                host_cidr: "10.0.0.1/24".into(),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn plain_spec_gets_its_defaults() {
        let request = api::node::ApplyVmRequest {
            spec: Some(api_spec("web")),
        };
        api::validate::apply_vm_request(&request).unwrap();
        let spec = Spec::from_validated(&api_spec("web"));
        assert_eq!(spec.disks[0].num_queues, 1);
        assert_eq!(spec.nics[0].queue_pairs, 1);
        assert_eq!(spec.nics[0].host_cidr.unwrap().prefix_len, 24);
        assert_eq!(spec.shutdown_grace_ms, DEFAULT_SHUTDOWN_GRACE_MS);
        assert_eq!(spec.initramfs, None);
    }

    #[test]
    fn disk_of_an_older_record_has_defaults() {
        let disk: Disk = serde_json::from_str(
            r#"{"name":"root","source":{"Path":"/a"},"read_only":false,"num_queues":1,"serial":""}"#,
        )
        .unwrap();
        assert_eq!((disk.format, disk.tuning), (Format::Raw, Tuning::default()));
    }

    #[test]
    fn power_generation_and_limits_are_no_change_of_the_machine() {
        let spec = Spec::from_validated(&api_spec("web"));
        let mut off = spec.clone();
        off.generation = 2;
        off.power = Power::Off;
        off.disks[0].tuning.read.iops = 100;
        off.nics[0].tuning.link_down = true;
        off.outage_policies
            .insert("root".into(), OutagePolicy::PauseVm);
        assert!(spec.same_machine(&off));
        off.vcpus = 2;
        assert!(!spec.same_machine(&off));
    }
}
