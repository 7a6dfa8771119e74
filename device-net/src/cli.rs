//! The command line, and opening what it names while that is still possible.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, bail};
use api::daemon::Parts;
use api::device::attach_request::{Device as DeviceConfig, Listener as ListenerConfig};
use api::device::{AttachRequest, FdRef, NetConfig, Polling, SwitchPort};
use api::listen::{self, SocketFile};
use api::names;
use clap::Parser;
use vhost_user::backend;

use crate::kernel::{Interface, PacketSockets, Tap};
use crate::nic::{MAX_QUEUE_PAIRS, MacAddress};

/// Serves virtio-net devices over vhost-user, each backed by a tap.
#[derive(Debug, Parser)]
#[command(name = "device-net", version)]
pub(crate) struct Args {
    /// Unix socket to answer gRPC requests on (service mortise.device.v1.DeviceDaemon)
    #[arg(long, value_name = "PATH")]
    pub(crate) control_socket: PathBuf,
    /// Unix socket that takes the descriptors which attach requests name
    #[arg(long, value_name = "PATH")]
    pub(crate) fd_socket: Option<PathBuf>,
    /// A NIC to serve from the start; may be repeated
    ///
    /// id=ID,tap=NAME,socket=PATH[,mac=aa:bb:cc:dd:ee:ff][,queue-pairs=N][,mtu=N]
    /// [,polling=never|adaptive|always].
    /// Packet sockets on an interface of the host instead of a tap: packet=NAME.
    /// A port of a switch inside the process instead of a tap: switch=NAME[,vlan=N][,trunk=N], trunk
    /// repeated for each VLAN that comes and goes tagged; vlan=0 for a port that is in none where others
    /// are in some.
    /// Inherited descriptors instead of names: fd=N for a tap's, packet-fd=N (repeated for each queue
    /// pair), socket-fd=N.
    #[arg(long = "nic", value_name = "SPEC")]
    pub(crate) nics: Vec<Nic>,
    /// A tap or an interface of the host that is a port of a switch: the way out; may be repeated
    ///
    /// switch=NAME,tap=NAME[,vlan=N][,trunk=N]; packet=NAME instead of tap for an interface of the
    /// host, beside the host; fd=N or packet-fd=N for either as an inherited descriptor. Without
    /// VLANs, tags pass as they are; vlan=0,trunk=all carries all of them, and untagged what is in none.
    #[arg(long = "uplink", value_name = "SPEC")]
    pub(crate) uplinks: Vec<Uplink>,
    /// Lets faults be armed over the control socket (service mortise.device.v1.Faults). For
    /// experiments: whoever reaches the socket can then spoil what guests send and receive
    #[arg(long)]
    pub(crate) allow_faults: bool,
    /// Address to answer GET /metrics on
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) metrics_listen: Option<String>,
}

impl Args {
    /// The descriptors that NICs are made of, each named once.
    ///
    /// # Errors
    /// One of them is given twice.
    pub(crate) fn inherited_fds(&self) -> anyhow::Result<Vec<RawFd>> {
        let uplinks = self.uplinks.iter().filter_map(Uplink::inherited);
        let nics = self.nics.iter().flat_map(Nic::inherited);
        let mut fds: Vec<RawFd> = nics.chain(uplinks).collect();
        fds.sort_unstable();
        if let Some(pair) = fds.windows(2).find(|pair| pair[0] == pair[1]) {
            bail!("descriptor {} is given twice", pair[0]);
        }
        Ok(fds)
    }

    /// Opens what the NICs are made of.
    ///
    /// # Errors
    /// What cannot be had, and the remedy.
    pub(crate) fn open_nics(&self) -> anyhow::Result<Vec<OpenNic>> {
        self.nics
            .iter()
            .map(|nic| nic.open().with_context(|| format!("NIC {:?}", nic.id)))
            .collect()
    }
}

/// One `--uplink`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Uplink {
    pub(crate) port: SwitchPort,
    other_end: OtherEnd,
}

impl Uplink {
    fn inherited(&self) -> Option<RawFd> {
        match &self.other_end {
            OtherEnd::Fds(fds) | OtherEnd::PacketFds(fds) => fds.first().copied(),
            _ => None,
        }
    }

    /// Opens the tap or the packet socket.
    ///
    /// # Errors
    /// It cannot be had, and the remedy.
    pub(crate) fn open(&self) -> anyhow::Result<Interface> {
        let fds = match (&self.other_end, self.inherited()) {
            (OtherEnd::Name(name), _) => Tap::open(name, 1)?,
            (OtherEnd::Packet(name), _) => PacketSockets::open(name, 1)?,
            (_, Some(fd)) => vec![inherited(fd)],
            (_, None) => bail!("an uplink has an interface or a descriptor"),
        };
        Ok(match &self.other_end {
            OtherEnd::Packet(_) | OtherEnd::PacketFds(_) => {
                Interface::Packet(PacketSockets::from_fds(fds)?)
            }
            _ => Interface::Tap(Tap::from_fds(fds)?),
        })
    }
}

impl FromStr for Uplink {
    type Err = NicError;

    fn from_str(text: &str) -> Result<Self, NicError> {
        let (mut switch, mut end, mut vlan) = (None, None, None);
        let (mut trunk_vlans, mut all_vlans) = (Vec::new(), None);
        for field in text.split(',') {
            let (key, value) = field
                .split_once('=')
                .ok_or_else(|| NicError::NoValue(field.to_owned()))?;
            match key {
                "switch" if !names::is_id(value) => return Err(bad(key, value, ID_SHAPE)),
                "switch" => set(&mut switch, key, value.to_owned())?,
                "tap" => set(&mut end, key, OtherEnd::Name(value.to_owned()))?,
                "packet" => set(&mut end, key, OtherEnd::Packet(value.to_owned()))?,
                "fd" => set(&mut end, key, OtherEnd::Fds(vec![descriptor(key, value)?]))?,
                "packet-fd" => {
                    let fds = vec![descriptor(key, value)?];
                    set(&mut end, key, OtherEnd::PacketFds(fds))?;
                }
                "vlan" => set(&mut vlan, key, native_vlan(key, value)?)?,
                "trunk" if value == "all" => set(&mut all_vlans, key, ())?,
                "trunk" => trunk_vlans.push(vlan_number(key, value)?),
                _ => return Err(NicError::UnknownUplinkKey(key.to_owned())),
            }
        }
        if all_vlans.is_some() && !trunk_vlans.is_empty() {
            return Err(NicError::Twice("trunk".to_owned()));
        }
        Ok(Self {
            port: SwitchPort {
                switch: switch.ok_or(NicError::Missing("switch"))?,
                vlan: vlan.unwrap_or(0),
                trunk_vlans,
                vlan_aware: vlan.is_some(),
                all_vlans: all_vlans.is_some(),
            },
            other_end: end.ok_or(NicError::Missing("tap= or packet"))?,
        })
    }
}

/// One `--nic`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Nic {
    id: String,
    other_end: OtherEnd,
    socket: SocketSource,
    mac: String,
    queue_pairs: u16,
    mtu: u32,
    polling: Polling,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum OtherEnd {
    Name(String),
    Fds(Vec<RawFd>),
    Packet(String),
    PacketFds(Vec<RawFd>),
    Switch(SwitchPort),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum SocketSource {
    Path(PathBuf),
    Fd(RawFd),
}

impl Nic {
    fn inherited(&self) -> Vec<RawFd> {
        let mut fds = match &self.other_end {
            OtherEnd::Name(_) | OtherEnd::Packet(_) | OtherEnd::Switch(_) => Vec::new(),
            OtherEnd::Fds(fds) | OtherEnd::PacketFds(fds) => fds.clone(),
        };
        if let SocketSource::Fd(fd) = self.socket {
            fds.push(fd);
        }
        fds
    }

    /// Opens the tap or the packet sockets, and binds the socket.
    fn open(&self) -> anyhow::Result<OpenNic> {
        let (tap_name, fds) = match &self.other_end {
            OtherEnd::Name(name) => (name.clone(), Tap::open(name, self.queue_pairs)?),
            OtherEnd::Packet(name) => {
                let sockets = PacketSockets::open(name, self.queue_pairs)?;
                (name.clone(), sockets)
            }
            OtherEnd::Fds(fds) | OtherEnd::PacketFds(fds) => {
                (String::new(), fds.iter().copied().map(inherited).collect())
            }
            OtherEnd::Switch(_) => (String::new(), Vec::new()),
        };
        let (switch_port, queue_pairs) = match &self.other_end {
            OtherEnd::Switch(port) => (Some(port.clone()), u32::from(self.queue_pairs)),
            _ => (None, 0),
        };
        let is_packet = matches!(self.other_end, OtherEnd::Packet(_) | OtherEnd::PacketFds(_));
        let references = vec![FdRef::default(); fds.len()];
        let (tap_fds, packet_fds) = match is_packet {
            true => (Vec::new(), references),
            false => (references, Vec::new()),
        };
        let (listener, socket_file, socket_path) = match &self.socket {
            SocketSource::Path(path) => {
                let (listener, file) = listen::unix_socket(path)?;
                (listener, Some(file), path.display().to_string())
            }
            SocketSource::Fd(fd) => {
                let listener = backend::listener_from_fd(inherited(*fd))?;
                (listener, None, format!("fd {fd}"))
            }
        };
        let parts = Parts {
            request: AttachRequest {
                id: self.id.clone(),
                listener: Some(ListenerConfig::SocketPath(socket_path)),
                device: Some(DeviceConfig::Net(NetConfig {
                    tap_fds,
                    packet_fds,
                    mac: self.mac.clone(),
                    mtu: self.mtu,
                    tap_name,
                    switch_port,
                    queue_pairs,
                    polling: self.polling.into(),
                    ..NetConfig::default()
                })),
            },
            listener,
            fds,
        };
        Ok(OpenNic { parts, socket_file })
    }
}

/// A NIC that is ready to be attached.
#[derive(Debug)]
pub(crate) struct OpenNic {
    pub(crate) parts: Parts,
    /// Removes the socket when start-up fails.
    pub(crate) socket_file: Option<SocketFile>,
}

fn inherited(fd: RawFd) -> OwnedFd {
    // SAFETY: the command line gives this descriptor to us; the standard three are refused when
    // it is parsed, repetitions in `inherited_fds`, which runs first.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

impl FromStr for Nic {
    type Err = NicError;

    fn from_str(text: &str) -> Result<Self, NicError> {
        let (mut id, mut tap, mut socket) = (None, None, None);
        let (mut mac, mut queue_pairs, mut mtu) = (None, None, None);
        let (mut switch, mut vlan, mut polling) = (None, None, None);
        let (mut packet, mut packet_fds) = (None, Vec::new());
        let (mut tap_fds, mut trunk_vlans) = (Vec::new(), Vec::new());
        for field in text.split(',') {
            let (key, value) = field
                .split_once('=')
                .ok_or_else(|| NicError::NoValue(field.to_owned()))?;
            match key {
                "id" if !names::is_id(value) => return Err(bad(key, value, ID_SHAPE)),
                "id" => set(&mut id, key, value.to_owned())?,
                "tap" => set(&mut tap, key, value.to_owned())?,
                "fd" => tap_fds.push(descriptor(key, value)?),
                "packet" => set(&mut packet, key, value.to_owned())?,
                "packet-fd" => packet_fds.push(descriptor(key, value)?),
                "socket" => set(&mut socket, key, SocketSource::Path(value.into()))?,
                "socket-fd" => {
                    set(&mut socket, key, SocketSource::Fd(descriptor(key, value)?))?;
                }
                "mac" => {
                    let _: MacAddress = value.parse().map_err(|_| bad(key, value, MAC_SHAPE))?;
                    set(&mut mac, key, value.to_owned())?;
                }
                "queue-pairs" => {
                    let pairs = value
                        .parse()
                        .ok()
                        .filter(|pairs| (1..=MAX_QUEUE_PAIRS).contains(pairs))
                        .ok_or_else(|| bad(key, value, "a number from 1 to 16"))?;
                    set(&mut queue_pairs, key, pairs)?;
                }
                "mtu" => {
                    let bytes = value
                        .parse()
                        .ok()
                        .filter(|mtu| (68..=65521).contains(mtu))
                        .ok_or_else(|| bad(key, value, "a number from 68 to 65521"))?;
                    set(&mut mtu, key, bytes)?;
                }
                "switch" if !names::is_id(value) => return Err(bad(key, value, ID_SHAPE)),
                "switch" => set(&mut switch, key, value.to_owned())?,
                "vlan" => set(&mut vlan, key, native_vlan(key, value)?)?,
                "trunk" => trunk_vlans.push(vlan_number(key, value)?),
                "polling" => {
                    let mode = match value {
                        "never" => Polling::Never,
                        "adaptive" => Polling::Adaptive,
                        "always" => Polling::Always,
                        _ => return Err(bad(key, value, "never, adaptive or always")),
                    };
                    set(&mut polling, key, mode)?;
                }
                _ => return Err(NicError::UnknownKey(key.to_owned())),
            }
        }
        let is_vlan_port = vlan.is_some() || !trunk_vlans.is_empty();
        let ends = [
            tap.map(OtherEnd::Name),
            (!tap_fds.is_empty()).then_some(OtherEnd::Fds(tap_fds)),
            packet.map(OtherEnd::Packet),
            (!packet_fds.is_empty()).then_some(OtherEnd::PacketFds(packet_fds)),
            switch.map(|switch| {
                OtherEnd::Switch(SwitchPort {
                    switch,
                    vlan: vlan.unwrap_or(0),
                    trunk_vlans,
                    vlan_aware: vlan.is_some(),
                    all_vlans: false,
                })
            }),
        ];
        let mut ends = ends.into_iter().flatten();
        let (Some(other_end), None) = (ends.next(), ends.next()) else {
            return Err(NicError::OneOtherEnd);
        };
        match other_end {
            OtherEnd::Switch(_) => {}
            _ if is_vlan_port => return Err(NicError::VlanWithoutSwitch),
            OtherEnd::Fds(_) | OtherEnd::PacketFds(_) if queue_pairs.is_some() => {
                return Err(NicError::PairsWithFds);
            }
            _ => {}
        }
        Ok(Self {
            id: id.ok_or(NicError::Missing("id"))?,
            other_end,
            socket: socket.ok_or(NicError::Missing("socket"))?,
            mac: mac.unwrap_or_default(),
            queue_pairs: queue_pairs.unwrap_or(1),
            mtu: mtu.unwrap_or(0),
            polling: polling.unwrap_or_default(),
        })
    }
}

const ID_SHAPE: &str = "an identifier: a lower-case letter, then at most 62 letters, digits and -";
const MAC_SHAPE: &str = "a unicast address like 52:54:00:12:34:56";

fn set<T>(slot: &mut Option<T>, key: &str, value: T) -> Result<(), NicError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(NicError::Twice(key.to_owned())),
    }
}

fn descriptor(key: &str, value: &str) -> Result<RawFd, NicError> {
    value
        .parse()
        .ok()
        .filter(|&fd| fd > 2)
        .ok_or_else(|| bad(key, value, "an inherited descriptor's number, above 2"))
}

/// Of frames without a tag: in none, but tags are read, for 0.
fn native_vlan(key: &str, value: &str) -> Result<u32, NicError> {
    match value {
        "0" => Ok(0),
        _ => vlan_number(key, value),
    }
}

fn vlan_number(key: &str, value: &str) -> Result<u32, NicError> {
    value
        .parse()
        .ok()
        .filter(|vlan| (1..=4094).contains(vlan))
        .ok_or_else(|| bad(key, value, "a number from 1 to 4094"))
}

fn bad(key: &str, value: &str, wanted: &'static str) -> NicError {
    NicError::BadValue {
        key: key.to_owned(),
        value: value.to_owned(),
        wanted,
    }
}

/// A `--nic` that cannot be understood.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NicError {
    #[error("{0:?} has no value; write key=value")]
    NoValue(String),
    #[error(
        "unknown key {0:?}; known are id, tap, fd, packet, packet-fd, switch, vlan, trunk, socket, socket-fd, mac, queue-pairs, mtu, polling"
    )]
    UnknownKey(String),
    #[error("unknown key {0:?}; known are switch, tap, packet, fd, packet-fd, vlan, trunk")]
    UnknownUplinkKey(String),
    #[error("{0} is given twice")]
    Twice(String),
    #[error("{0}= is missing")]
    Missing(&'static str),
    #[error(
        "give one of tap=NAME, packet=NAME, switch=NAME, or fd=N or packet-fd=N for each queue pair"
    )]
    OneOtherEnd,
    #[error("vlan= and trunk= are for ports of a switch; give switch=NAME with them")]
    VlanWithoutSwitch,
    #[error("queue-pairs= cannot be given with fd=; give as many fd=N as there are queue pairs")]
    PairsWithFds,
    #[error("{key}={value} is not {wanted}")]
    BadValue {
        key: String,
        value: String,
        wanted: &'static str,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_spec_is_understood() {
        let nic: Nic =
            "id=net0,tap=tap7,socket=/run/x.vu,mac=52:54:00:00:00:07,queue-pairs=2,mtu=9000"
                .parse()
                .unwrap();
        assert_eq!(
            nic,
            Nic {
                id: "net0".into(),
                other_end: OtherEnd::Name("tap7".into()),
                socket: SocketSource::Path("/run/x.vu".into()),
                mac: "52:54:00:00:00:07".into(),
                queue_pairs: 2,
                mtu: 9000,
                polling: Polling::Unspecified,
            }
        );
    }

    #[test]
    fn inherited_descriptors_replace_names() {
        let nic: Nic = "id=n,fd=5,fd=6,socket-fd=7".parse().unwrap();
        assert_eq!(nic.other_end, OtherEnd::Fds(vec![5, 6]));
        assert_eq!(nic.socket, SocketSource::Fd(7));
    }

    #[test]
    fn port_of_a_switch_replaces_a_tap() {
        let nic: Nic =
            "id=n,switch=s0,vlan=5,trunk=6,trunk=7,socket=/x,queue-pairs=2,polling=always"
                .parse()
                .unwrap();
        let port = SwitchPort {
            switch: "s0".into(),
            vlan: 5,
            trunk_vlans: vec![6, 7],
            vlan_aware: true,
            all_vlans: false,
        };
        assert_eq!(nic.other_end, OtherEnd::Switch(port));
        assert_eq!((nic.queue_pairs, nic.polling), (2, Polling::Always));
    }

    #[test]
    fn uplink_is_a_switch_and_an_interface() {
        let uplink: Uplink = "switch=s0,tap=t0,trunk=5".parse().unwrap();
        assert_eq!(uplink.other_end, OtherEnd::Name("t0".into()));
        assert_eq!(uplink.port.trunk_vlans, [5]);
        let uplink: Uplink = "switch=s0,fd=7".parse().unwrap();
        assert_eq!(uplink.inherited(), Some(7));
        let uplink: Uplink = "switch=s0,packet=eth0,vlan=3".parse().unwrap();
        assert_eq!(uplink.other_end, OtherEnd::Packet("eth0".into()));
        let uplink: Uplink = "switch=s0,packet=eth0,vlan=0,trunk=all".parse().unwrap();
        let SwitchPort {
            vlan_aware,
            all_vlans,
            vlan,
            ..
        } = uplink.port;
        assert_eq!((vlan, vlan_aware, all_vlans), (0, true, true));
        let uplink: Uplink = "switch=s0,packet-fd=8".parse().unwrap();
        assert_eq!(uplink.inherited(), Some(8));
        for (spec, named) in [
            ("tap=t0", "switch= is missing"),
            ("switch=s0", "tap= or packet= is missing"),
            ("switch=s0,tap=t0,fd=7", "given twice"),
            ("switch=s0,tap=t0,packet=eth0", "given twice"),
            ("switch=s0,tap=t0,mac=x", "\"mac\""),
            ("switch=s0,tap=t0,trunk=all,trunk=5", "given twice"),
        ] {
            let error = spec.parse::<Uplink>().unwrap_err().to_string();
            assert!(error.contains(named), "{spec}: {error}");
        }
    }

    #[test]
    fn each_mistake_is_named() {
        for (spec, named) in [
            ("id=n,socket=/x", "tap=NAME"),
            ("id=n,tap=t,fd=5,socket=/x", "one of tap=NAME"),
            ("id=n,tap=t,switch=s,socket=/x", "one of tap=NAME"),
            ("id=n,tap=t,vlan=5,socket=/x", "switch=NAME"),
            ("id=n,switch=s,vlan=4095,socket=/x", "1 to 4094"),
            ("id=n,switch=s,socket=/x,polling=often", "adaptive"),
            ("tap=t,socket=/x", "id= is missing"),
            ("id=n,tap=t", "socket= is missing"),
            ("id=N/0,tap=t,socket=/x", "an identifier"),
            ("id=n,tap=t,socket=/x,color=red", "\"color\""),
            ("id=n,id=m,tap=t,socket=/x", "id is given twice"),
            ("id=n,tap=t,socket=/x,queue-pairs=17", "1 to 16"),
            ("id=n,tap=t,socket=/x,mac=01:00:00:00:00:00", "unicast"),
            ("id=n,tap=t,socket=/x,mtu=12", "68 to 65521"),
            ("id=n,fd=1,socket=/x", "above 2"),
            ("id", "key=value"),
        ] {
            let error = spec.parse::<Nic>().unwrap_err().to_string();
            assert!(error.contains(named), "{spec}: {error}");
        }
    }
}
