//! A network's interfaces: its bridge, the bridge's addresses, and the VXLAN device with its
//! forwarding entries. Everything here makes what is there match what is wanted, and nothing else.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use ipnet::IpNet;
use rtnetlink::{
    Handle, LinkBridge, LinkUnspec, LinkVxlan,
    packet_core::{
        NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    },
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressMessage},
        link::LinkAttribute,
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
        },
    },
};
use tokio_stream::StreamExt;

use super::error::NetworkError;

/// IANA's port of VXLAN.
const VXLAN_PORT: u16 = 4789;
/// Where frames go whose destination no entry names.
const FLOOD_MAC: [u8; 6] = [0; 6];

/// A netlink socket for the changes of one network.
pub(super) struct Links {
    id: String,
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Links {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// A VXLAN device as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Vxlan {
    pub(super) name: String,
    pub(super) vni: u32,
    pub(super) local: IpAddr,
    /// 0 for the usual one.
    pub(super) port: u16,
    /// Where frames go: each address to a host, and all others to every host.
    pub(super) entries: BTreeSet<([u8; 6], IpAddr)>,
}

impl Vxlan {
    /// An entry for whatever no other entry names.
    pub(super) fn flood_to(host: IpAddr) -> ([u8; 6], IpAddr) {
        (FLOOD_MAC, host)
    }
}

/// Whether the interface exists.
pub(super) fn exists(name: &str) -> bool {
    Path::new("/sys/class/net").join(name).exists()
}

/// Whether the interface is a bridge.
pub(super) fn is_bridge(name: &str) -> bool {
    Path::new("/sys/class/net")
        .join(name)
        .join("bridge")
        .exists()
}

/// The interfaces that are in a bridge.
pub(super) fn ports(bridge: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(Path::new("/sys/class/net").join(bridge).join("brif"))
    else {
        return Vec::new();
    };
    let mut ports: Vec<String> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    ports.sort();
    ports
}

impl Links {
    /// Opens a socket.
    pub(super) fn open(id: &str) -> Result<Self, NetworkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::io(
            id,
            "opening a netlink socket for",
            Path::new("networks"),
        ))?;
        Ok(Self {
            id: id.to_owned(),
            handle,
            connection: tokio::spawn(connection),
        })
    }

    /// Makes the bridge if it is not there.
    pub(super) async fn ensure_bridge(
        &self,
        name: &str,
        mac: [u8; 6],
        mtu: u32,
    ) -> Result<(), NetworkError> {
        if !exists(name) {
            // An address of its own: else it changes with the taps that come and go.
            let link = LinkBridge::new(name).address(mac.to_vec()).build();
            self.handle
                .link()
                .add(link)
                .execute()
                .await
                .map_err(NetworkError::netlink(&self.id, "making its bridge"))?;
        }
        let index = self.index_of(name)?;
        let mut link = LinkUnspec::new_with_index(index).up();
        if mtu != 0 {
            link = link.append_extra_attribute(LinkAttribute::Mtu(mtu));
        }
        self.handle
            .link()
            .set(link.build())
            .execute()
            .await
            .map_err(NetworkError::netlink(&self.id, "setting its bridge up"))
    }

    /// Gives the interface these addresses and takes others away; link-local ones are the kernel's.
    pub(super) async fn ensure_addresses(
        &self,
        name: &str,
        wanted: &[IpNet],
    ) -> Result<(), NetworkError> {
        let index = self.index_of(name)?;
        let mut present = Vec::new();
        for message in self.addresses().await? {
            if message.header.index == index
                && let Some(net) = net_of(&message)
                && !is_link_local(net.addr())
            {
                present.push((net, message));
            }
        }
        for (net, message) in &present {
            if !wanted.contains(net) {
                self.handle
                    .address()
                    .del(message.clone())
                    .execute()
                    .await
                    .map_err(NetworkError::netlink(&self.id, "taking an address away"))?;
            }
        }
        for net in wanted {
            if present.iter().any(|(there, _)| there == net) {
                continue;
            }
            self.handle
                .address()
                .add(index, net.addr(), net.prefix_len())
                .execute()
                .await
                .map_err(NetworkError::netlink(
                    &self.id,
                    "giving its bridge an address",
                ))?;
        }
        Ok(())
    }

    /// An interface besides `own` whose network has addresses of `net` too: the name and what it has.
    pub(super) async fn overlapping(
        &self,
        own: &str,
        net: IpNet,
    ) -> Result<Option<(String, IpNet)>, NetworkError> {
        for message in self.addresses().await? {
            let Some(other) = net_of(&message) else {
                continue;
            };
            if is_link_local(other.addr())
                || !(net.contains(&other.network()) || other.contains(&net.network()))
            {
                continue;
            }
            let name = nix::net::if_::if_indextoname(message.header.index)
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default();
            if name != own {
                return Ok(Some((name, other)));
            }
        }
        Ok(None)
    }

    /// Makes the VXLAN device in `bridge` and its forwarding entries.
    pub(super) async fn ensure_vxlan(
        &self,
        vxlan: &Vxlan,
        bridge: &str,
        mtu: u32,
    ) -> Result<(), NetworkError> {
        if !exists(&vxlan.name) {
            // Entries come from the controller: a guest must not draw others' frames to itself by
            // what it sends.
            let link =
                LinkVxlan::new(&vxlan.name, vxlan.vni)
                    .learning(false)
                    .port(match vxlan.port {
                        0 => VXLAN_PORT,
                        port => port,
                    });
            let link = match vxlan.local {
                IpAddr::V4(local) => link.local(local),
                IpAddr::V6(local) => link.local6(local),
            };
            self.handle
                .link()
                .add(link.build())
                .execute()
                .await
                .map_err(NetworkError::netlink(&self.id, "making its VXLAN device"))?;
        }
        let index = self.index_of(&vxlan.name)?;
        let mut link = LinkUnspec::new_with_index(index)
            .controller(self.index_of(bridge)?)
            .up();
        if mtu != 0 {
            link = link.append_extra_attribute(LinkAttribute::Mtu(mtu));
        }
        self.handle
            .link()
            .set(link.build())
            .execute()
            .await
            .map_err(NetworkError::netlink(
                &self.id,
                "putting its VXLAN device into its bridge",
            ))?;
        self.ensure_entries(index, &vxlan.entries).await
    }

    /// Removes an interface. One that is not there is no error.
    pub(super) async fn remove(&self, name: &str) -> Result<(), NetworkError> {
        let Ok(index) = nix::net::if_::if_nametoindex(name) else {
            return Ok(());
        };
        let removed = self.handle.link().del(index).execute().await;
        match removed {
            Err(source) if exists(name) => Err(NetworkError::netlink(
                &self.id,
                "removing an interface",
            )(source)),
            _ => Ok(()),
        }
    }

    async fn ensure_entries(
        &self,
        index: u32,
        wanted: &BTreeSet<([u8; 6], IpAddr)>,
    ) -> Result<(), NetworkError> {
        let failed = || NetworkError::netlink(&self.id, "setting its forwarding entries");
        let mut present = BTreeSet::new();
        let request = self
            .handle
            .neighbours()
            .get()
            .set_address_family(AddressFamily::Bridge);
        let mut entries = std::pin::pin!(request.execute());
        while let Some(entry) = entries.next().await {
            let entry = entry.map_err(failed())?;
            let Some(key) = entry_of(&entry).filter(|_| entry.header.ifindex == index) else {
                continue;
            };
            if wanted.contains(&key) {
                present.insert(key);
                continue;
            }
            let deleted = self.handle.neighbours().del(entry_message(index, key));
            deleted.execute().await.map_err(failed())?;
        }
        for key in wanted.difference(&present) {
            self.append_entry(entry_message(index, *key))
                .await
                .map_err(failed())?;
        }
        Ok(())
    }

    /// Several hosts may have one address, that of floods: so it is appended, not replaced.
    async fn append_entry(&self, entry: NeighbourMessage) -> Result<(), rtnetlink::Error> {
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewNeighbour(entry));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND;
        let mut handle = self.handle.clone();
        let mut answers = std::pin::pin!(handle.request(request)?);
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload
                && error.code.is_some()
            {
                return Err(rtnetlink::Error::NetlinkError(error));
            }
        }
        Ok(())
    }

    async fn addresses(&self) -> Result<Vec<AddressMessage>, NetworkError> {
        let mut listed = Vec::new();
        let mut messages = std::pin::pin!(self.handle.address().get().execute());
        while let Some(message) = messages.next().await {
            let failed = NetworkError::netlink(&self.id, "listing addresses");
            listed.push(message.map_err(failed)?);
        }
        Ok(listed)
    }

    fn index_of(&self, name: &str) -> Result<u32, NetworkError> {
        nix::net::if_::if_nametoindex(name).map_err(|errno| {
            NetworkError::io(&self.id, "looking for interface", Path::new(name))(errno.into())
        })
    }
}

fn net_of(message: &AddressMessage) -> Option<IpNet> {
    let own = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        });
    let other = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        });
    IpNet::new(own.or(other)?, message.header.prefix_len).ok()
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

fn entry_of(message: &NeighbourMessage) -> Option<([u8; 6], IpAddr)> {
    let mut mac = None;
    let mut host = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok();
            }
            NeighbourAttribute::Destination(destination) => {
                host = match destination {
                    NeighbourAddress::Inet(address) => Some(IpAddr::V4(*address)),
                    NeighbourAddress::Inet6(address) => Some(IpAddr::V6(*address)),
                    // The family of the message is the bridge's, so the crate leaves the bytes.
                    NeighbourAddress::Other(bytes) => address_of(bytes),
                    _ => None,
                };
            }
            _ => {}
        }
    }
    Some((mac?, host?))
}

fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        _ => None,
    }
}

fn entry_message(index: u32, (mac, host): ([u8; 6], IpAddr)) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    message
        .attributes
        .push(NeighbourAttribute::Destination(match host {
            IpAddr::V4(address) => NeighbourAddress::Inet(address),
            IpAddr::V6(address) => NeighbourAddress::Inet6(address),
        }));
    message
}
