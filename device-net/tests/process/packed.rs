//! Packed rings with mergeable buffers: frames in parts, both ways, on a tap.

use std::collections::HashMap;

use vhost_user::driver::{Buffer, PackedDriverRing};
use virtio_bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CSUM, VIRTIO_NET_F_MRG_RXBUF};

use crate::control::Manager;
use crate::daemon::{Daemon, await_true};
use crate::guest::{Guest, HEADER_LEN, RING_SIZE};
use crate::host::{Wire, create_tap, enter_namespace};
use crate::traffic::payload;

const FEATURES: &[u32] = &[
    VIRTIO_F_VERSION_1,
    VIRTIO_F_RING_PACKED,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_MRG_RXBUF,
];
/// Behind all that the guest of the other tests uses.
const RINGS_GPA: u64 = 0x40_0000;
const RING_STEP: u64 = 0x1_0000;
const RX_GPA: u64 = 8 << 20;
const TX_GPA: u64 = 24 << 20;
const BUFFER_LEN: u32 = 1536;
/// Available from the first descriptor on, with the wrap counter set.
const BASE: u16 = 1 << 15;
/// Of local experiments (IEEE 802).
const TO_ALL: [u8; 14] = [
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 9, 0x88, 0xb5,
];

#[test]
fn packed_rings_with_mergeable_buffers_carry_frames_of_any_length() {
    if !enter_namespace() {
        return;
    }
    create_tap("tap0", 1, 65521);
    let daemon = Daemon::with_nic("tap=tap0,mac=52:54:00:12:34:56");
    let mut guest = Guest::negotiate(&daemon.socket(), FEATURES);
    assert!(guest.has(VIRTIO_F_RING_PACKED) && guest.has(VIRTIO_NET_F_MRG_RXBUF));
    let memory = guest.machine.memory.clone();
    let mut rings: Vec<PackedDriverRing> = (0..2)
        .map(|queue| PackedDriverRing::new(&memory, RINGS_GPA + queue * RING_STEP, RING_SIZE, 0))
        .collect();
    let mut posted = HashMap::new();
    for number in 0..u64::from(RING_SIZE) {
        let buffer = (RX_GPA + number * u64::from(BUFFER_LEN), BUFFER_LEN);
        let id = rings[0].add(&[], &[buffer]).unwrap();
        posted.insert(id, buffer);
    }
    for (queue, ring) in rings.iter().enumerate() {
        guest.start_ring(queue, ring.addresses(), BASE);
    }
    guest.kick_now(0);

    let wire = Wire::new("tap0");
    for (round, len) in [46, 1500, 1524, 1525, 9000, 65_000, 3, 40_000]
        .into_iter()
        .cycle()
        .take(40)
        .enumerate()
    {
        let frame = [&TO_ALL[..], &payload(round as u8, len)].concat();
        wire.send(&frame);
        let received = loop {
            let received = receive(&mut guest, &mut rings[0], &mut posted);
            // The host has its own multicast.
            if received[..14] == TO_ALL {
                break received;
            }
        };
        assert_eq!(received, frame, "round {round}, {len} bytes");
    }
    // In three parts each, more of them than the ring has descriptors.
    let frame = payload(1, 3000);
    memory.write(TX_GPA, &[0; HEADER_LEN]);
    memory.write(TX_GPA + HEADER_LEN as u64, &frame);
    let at = TX_GPA + HEADER_LEN as u64;
    for _ in 0..300 {
        let parts = [(TX_GPA, HEADER_LEN as u32), (at, 100), (at + 100, 2900)];
        let id = rings[1].add(&parts, &[]).unwrap();
        guest.kick_now(1);
        let mut used = None;
        await_true("the device is done with a frame", || {
            used = rings[1].pop_used();
            used.is_some()
        });
        assert_eq!(used.unwrap().0, id);
    }
    let stats = Manager::of(&daemon).list().remove(0).net.unwrap();
    assert_eq!((stats.tx_packets, stats.tx_drops), (300, 0), "{stats:?}");
    assert_eq!(stats.tx_bytes, 300 * 3000);
    let latencies = [stats.rx_latency, stats.tx_latency].map(|latency| latency.unwrap());
    assert_eq!(
        latencies.each_ref().map(|latency| latency.count),
        [stats.rx_packets, stats.tx_packets]
    );
    assert!(
        latencies
            .iter()
            .all(|latency| latency.p50_us > 0.0 && latency.max_us < 1e7)
    );
}

/// The next frame; its buffers are supplied again.
fn receive(
    guest: &mut Guest,
    ring: &mut PackedDriverRing,
    posted: &mut HashMap<u16, Buffer>,
) -> Vec<u8> {
    let memory = guest.machine.memory.clone();
    let mut frame = Vec::new();
    let mut left = 1;
    while left > 0 {
        let mut used = None;
        await_true("a frame comes", || {
            used = ring.pop_used();
            used.is_some()
        });
        let (id, len) = used.unwrap();
        let buffer = posted.remove(&id).expect("an identifier that was supplied");
        let bytes = memory.read(buffer.0, len as usize);
        if frame.is_empty() {
            left = u16::from_le_bytes([bytes[10], bytes[11]]);
        }
        frame.extend(bytes);
        left -= 1;
        let id = ring.add(&[], &[buffer]).unwrap();
        posted.insert(id, buffer);
    }
    guest.kick_now(0);
    frame.split_off(HEADER_LEN)
}
