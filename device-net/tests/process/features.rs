//! What a driver negotiates and sets: the control queue's commands, the configuration space.

use std::cell::RefCell;

use api::device::SetLinkRequest;
use api::device::nics_client::NicsClient;
use tokio::runtime::Runtime;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI,
    VIRTIO_NET_CTRL_RX_NOBCAST, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_CTRL_VLAN,
    VIRTIO_NET_CTRL_VLAN_ADD, VIRTIO_NET_CTRL_VLAN_DEL, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MTU, VIRTIO_NET_OK, VIRTIO_NET_S_ANNOUNCE,
    VIRTIO_NET_S_LINK_UP,
};

use crate::daemon::{DEADLINE, Daemon};
use crate::guest::{Guest, USUAL};
use crate::host::{Wire, create_tap, enter_namespace};

const TWO_PAIRS: &str = "tap=tap0,mac=52:54:00:12:34:56,queue-pairs=2";
const SIXTEEN_PAIRS: &str = "tap=tap0,mac=52:54:00:12:34:56,queue-pairs=16,mtu=9000";
const OWN: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const OTHER: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];
const GROUP: [u8; 6] = [0x01, 0, 0x5e, 1, 2, 3];
const BROADCAST: [u8; 6] = [0xff; 6];

const COMMANDS: &[u32] = &[
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
];

/// Of local experiments (IEEE 802).
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const MARKER: &[u8] = b"marker";

fn frame(to: [u8; 6], tag: Option<u16>, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&to[..], &OTHER].concat();
    if let Some(vlan) = tag {
        frame.extend([0x81, 0]);
        frame.extend(vlan.to_be_bytes());
    }
    frame.extend(ETHERTYPE);
    frame.extend(payload);
    frame.resize(frame.len().max(60), 0);
    frame
}

/// Whether a frame comes through. A marker for the guest itself follows it.
fn passes(guest: &mut Guest, wire: &Wire, to: [u8; 6], tag: Option<u16>) -> bool {
    wire.send(&frame(to, tag, b"question"));
    wire.send(&frame(OWN, None, MARKER));
    let has_come = RefCell::new(false);
    guest.receive(|received, _| {
        if received.frame[14..].starts_with(MARKER) {
            return Some(());
        }
        let at = if tag.is_some() { 18 } else { 14 };
        *has_come.borrow_mut() |= received.frame[at..].starts_with(b"question");
        None
    });
    has_come.into_inner()
}

fn set_mode(guest: &mut Guest, mode: u32, on: bool) {
    let command = [VIRTIO_NET_CTRL_RX as u8, mode as u8, u8::from(on)];
    assert_eq!(u32::from(guest.command(&command)), VIRTIO_NET_OK);
}

#[test]
fn driver_receives_what_its_filter_lets_pass() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 2, 1500);
    let daemon = Daemon::with_nic(TWO_PAIRS);
    let mut guest = Guest::connect_with(&daemon.socket(), 2, &[USUAL, COMMANDS].concat());
    guest.supply(0, 64, 1536);
    let wire = Wire::new("tap0");
    let all = [OWN, OTHER, GROUP, BROADCAST];
    let of_all = |guest: &mut Guest| all.map(|to| passes(guest, &wire, to, None));
    assert_eq!(of_all(&mut guest), [true; 4], "no filter was asked for");

    set_mode(&mut guest, VIRTIO_NET_CTRL_RX_PROMISC, false);
    assert_eq!(of_all(&mut guest), [true, false, false, true]);
    set_mode(&mut guest, VIRTIO_NET_CTRL_RX_ALLMULTI, true);
    set_mode(&mut guest, VIRTIO_NET_CTRL_RX_NOBCAST, true);
    assert_eq!(of_all(&mut guest), [true, false, true, false]);
    // A table with one address of each kind.
    let tables = [
        &[VIRTIO_NET_CTRL_MAC as u8, 0, 1, 0, 0, 0],
        &OTHER[..],
        &[1, 0, 0, 0],
        &GROUP,
    ];
    set_mode(&mut guest, VIRTIO_NET_CTRL_RX_ALLMULTI, false);
    assert_eq!(u32::from(guest.command(&tables.concat())), VIRTIO_NET_OK);
    assert_eq!(of_all(&mut guest), [true, true, true, false]);

    // VLANs, of which a new driver names those that it wants.
    let set_vlan = |guest: &mut Guest, command: u32, vlan: u16| {
        let [low, high] = vlan.to_le_bytes();
        guest.command(&[VIRTIO_NET_CTRL_VLAN as u8, command as u8, low, high])
    };
    assert!(!passes(&mut guest, &wire, OWN, Some(7)));
    let ack = set_vlan(&mut guest, VIRTIO_NET_CTRL_VLAN_ADD, 7);
    assert_eq!(u32::from(ack), VIRTIO_NET_OK);
    assert!(passes(&mut guest, &wire, OWN, Some(7)));
    assert!(!passes(&mut guest, &wire, OWN, Some(8)));
    set_vlan(&mut guest, VIRTIO_NET_CTRL_VLAN_DEL, 7);
    assert!(!passes(&mut guest, &wire, OWN, Some(7)));
    let ack = set_vlan(&mut guest, VIRTIO_NET_CTRL_VLAN_ADD, 4096);
    assert_eq!(u32::from(ack), VIRTIO_NET_ERR);

    // A successor does not hear of any of this, and withholds nothing.
    let daemon = daemon.crash_and_restart(TWO_PAIRS);
    let mut guest = guest.reconnect(&daemon.socket(), 2);
    assert_eq!(of_all(&mut guest), [true; 4]);
    assert!(passes(&mut guest, &wire, OWN, Some(7)));
}

fn status(guest: &mut Guest) -> u32 {
    let (_, bytes) = guest
        .frontend
        .get_config(6, 2, VhostUserConfigFlags::WRITABLE, &[0; 2])
        .unwrap();
    u32::from(u16::from_le_bytes([bytes[0], bytes[1]]))
}

#[test]
fn driver_whose_link_comes_up_is_asked_to_announce_itself() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 2, 1500);
    let daemon = Daemon::with_nic(TWO_PAIRS);
    let mut guest = Guest::connect_with(&daemon.socket(), 2, &[USUAL, COMMANDS].concat());
    let runtime = Runtime::new().unwrap();
    let control = daemon.control();
    let channel = runtime.block_on(api::connect::unix(&control, DEADLINE));
    let mut nics = NicsClient::new(channel.unwrap());
    let mut set_link = |up| {
        let id = "net0".to_owned();
        let asking = nics.set_link(SetLinkRequest { id, up });
        runtime.block_on(asking).unwrap();
    };
    // The control ring is served once it has answered.
    set_mode(&mut guest, VIRTIO_NET_CTRL_RX_PROMISC, true);
    assert_eq!(status(&mut guest), VIRTIO_NET_S_LINK_UP);
    set_link(false);
    assert_eq!(status(&mut guest), 0);
    set_link(true);
    assert_eq!(
        status(&mut guest),
        VIRTIO_NET_S_LINK_UP | VIRTIO_NET_S_ANNOUNCE
    );
    let acknowledge = [VIRTIO_NET_CTRL_ANNOUNCE as u8, 0];
    assert_eq!(u32::from(guest.command(&acknowledge)), VIRTIO_NET_OK);
    assert_eq!(status(&mut guest), VIRTIO_NET_S_LINK_UP);
}

#[test]
fn sixteen_pairs_are_offered_and_described() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 16, 9000);
    let daemon = Daemon::with_nic(SIXTEEN_PAIRS);
    let mut guest = Guest::negotiate(&daemon.socket(), USUAL);
    assert_ne!(guest.offered & 1 << VIRTIO_NET_F_MTU, 0);
    // Pairs and the control queue.
    assert_eq!(guest.frontend.get_queue_num().unwrap(), 33);
    let (_, config) = guest
        .frontend
        .get_config(0, 12, VhostUserConfigFlags::WRITABLE, &[0; 12])
        .unwrap();
    assert_eq!(config[..6], OWN);
    assert_eq!(config[8..10], 16_u16.to_le_bytes());
    assert_eq!(config[10..12], 9000_u16.to_le_bytes());
}
