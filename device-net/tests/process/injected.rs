//! Faults that are armed over the control socket: what each does to a NIC's frames, and that nothing of it
//! is left afterwards.

use std::time::{Duration, Instant};

use api::device::fault_rule::Action;
use api::device::faults_client::FaultsClient;
use api::device::{
    ArmFaultsRequest, CorruptFault, DisarmFaultsRequest, DropFault, DuplicateFault, FaultOp,
    FaultRule, FaultSelector, FaultTrigger, LatencyFault, LinkFlapFault, ListFaultsRequest,
    PartitionFault, RateFault, ReorderFault,
};
use tonic::transport::Channel;

use crate::daemon::await_true;
use crate::frame;
use crate::scene;
use crate::traffic::{datagram, guest_address};

const GUEST_PORT: u16 = 4000;

/// With who arms faults.
type Scene = scene::Scene<FaultsClient<Channel>>;

impl Scene {
    /// None where there are no namespaces.
    fn new() -> Option<Self> {
        Self::set(&["--allow-faults"], FaultsClient::new)
    }

    fn arm(&mut self, op: FaultOp, max_hits: u64, action: Action) {
        let request = ArmFaultsRequest {
            id: "x".to_owned(),
            rules: vec![FaultRule {
                selector: Some(FaultSelector {
                    device: "net0".to_owned(),
                    ops: match op {
                        FaultOp::Unspecified => Vec::new(),
                        op => vec![op.into()],
                    },
                    ..FaultSelector::default()
                }),
                trigger: Some(FaultTrigger {
                    max_hits,
                    ..FaultTrigger::default()
                }),
                action: Some(action),
                ..FaultRule::default()
            }],
            ttl_ms: 60_000,
            seed: 7,
        };
        let armed = self.runtime.block_on(self.client.arm_faults(request));
        armed.unwrap();
    }

    fn hits(&mut self) -> u64 {
        let listed = self.client.list_faults(ListFaultsRequest::default());
        let listed = self.runtime.block_on(listed).unwrap().into_inner();
        listed.armings.last().unwrap().rules[0].hits
    }

    fn disarm(&mut self) -> u64 {
        let ended = self.client.disarm_faults(DisarmFaultsRequest::default());
        let ended = self.runtime.block_on(ended).unwrap().into_inner();
        ended.armings[0].rules[0].hits
    }

    /// The guest sends a datagram to the host.
    fn send(&mut self, payload: &[u8]) {
        let port = self.host.local_addr().unwrap().port();
        let frame = frame::udp(self.host_mac, (GUEST_PORT, port), payload);
        self.guest.send(0, &frame);
    }

    #[track_caller]
    fn host_receives(&self, payload: &[u8]) {
        let mut buffer = [0; 2000];
        let (len, _) = self.host.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], payload);
    }

    /// The host sends a datagram to the guest.
    fn send_to_guest(&self, payload: &[u8]) {
        self.host.send_to(payload, guest_address()).unwrap();
    }

    #[track_caller]
    fn guest_receives(&mut self, payload: &[u8]) {
        let (_, received) = self.guest.receive(datagram);
        assert_eq!(received, payload);
    }
}

#[test]
fn lost_frames_are_counted_and_others_arrive() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.arm(FaultOp::Transmit, 1, Action::Drop(DropFault {}));
    scene.send(b"lost");
    scene.send(b"found");
    scene.host_receives(b"found");
    scene.send_to_guest(b"answer");
    scene.guest_receives(b"answer");
    assert_eq!(scene.disarm(), 1);
    scene.arm(FaultOp::Receive, 1, Action::Drop(DropFault {}));
    scene.send_to_guest(b"lost");
    await_true("a frame is lost", || scene.hits() == 1);
    scene.send_to_guest(b"found");
    scene.guest_receives(b"found");
    assert_eq!(scene.disarm(), 1);
}

#[test]
fn partition_is_about_its_peers_alone() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let partition = |peer: &str| {
        Action::Partition(PartitionFault {
            peers: vec![peer.to_owned()],
        })
    };
    scene.arm(FaultOp::Unspecified, 0, partition("02:00:00:00:00:99"));
    scene.send(b"not meant");
    scene.host_receives(b"not meant");
    assert_eq!(scene.disarm(), 0);
    let host: Vec<_> = scene
        .host_mac
        .iter()
        .map(|octet| format!("{octet:02x}"))
        .collect();
    scene.arm(FaultOp::Unspecified, 0, partition(&host.join(":")));
    scene.send(b"lost");
    await_true("it is lost", || scene.hits() >= 1);
    assert!(scene.disarm() >= 1);
    scene.send(b"healed");
    scene.host_receives(b"healed");
}

#[test]
fn frames_are_doubled_both_ways() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let twice = || Action::Duplicate(DuplicateFault { copies: 1 });
    scene.arm(FaultOp::Transmit, 1, twice());
    scene.send(b"twice");
    scene.host_receives(b"twice");
    scene.host_receives(b"twice");
    scene.disarm();
    scene.arm(FaultOp::Receive, 0, twice());
    scene.send_to_guest(b"twice");
    scene.guest_receives(b"twice");
    scene.guest_receives(b"twice");
    scene.disarm();
    scene.send_to_guest(b"once");
    scene.guest_receives(b"once");
}

#[test]
fn spoilt_frame_differs_in_one_bit() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.arm(
        FaultOp::Receive,
        0,
        Action::Corrupt(CorruptFault { bytes: 1 }),
    );
    scene.send_to_guest(&[0; 1000]);
    await_true("a frame is hit", || scene.hits() >= 1);
    scene.disarm();
    scene.send_to_guest(b"sound");
    scene.guest_receives_sound();
}

impl Scene {
    /// What was spoilt may be no datagram any more, or have a wrong sum; the sound one comes after it.
    #[track_caller]
    fn guest_receives_sound(&mut self) {
        loop {
            let (_, received) = self.guest.receive(datagram);
            if received == b"sound" {
                return;
            }
            let ones: u32 = received.iter().map(|byte| byte.count_ones()).sum();
            assert!(ones <= 1, "{ones} bits");
        }
    }
}

#[test]
fn late_frames_arrive_and_go_at_once_when_disarmed() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let latency = |latency_us| {
        Action::Latency(LatencyFault {
            latency_us,
            jitter_us: 0,
        })
    };
    scene.arm(FaultOp::Transmit, 1, latency(100_000));
    let began = Instant::now();
    scene.send(b"late");
    scene.host_receives(b"late");
    assert!(
        began.elapsed() >= Duration::from_millis(95),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(scene.disarm(), 1);
    // A busy machine may hold up one frame or another, but not all of them.
    let at_once = (0..10).any(|_| {
        let began = Instant::now();
        scene.send(b"soon");
        scene.host_receives(b"soon");
        began.elapsed() < Duration::from_millis(95)
    });
    assert!(at_once, "frames still wait");
}

#[test]
fn frame_goes_behind_the_next() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.arm(
        FaultOp::Transmit,
        1,
        Action::Reorder(ReorderFault {
            window: 1,
            max_delay_ms: 20_000,
        }),
    );
    scene.send(b"first");
    await_true("it is hit", || scene.hits() == 1);
    scene.send(b"second");
    scene.host_receives(b"second");
    scene.host_receives(b"first");
    scene.disarm();
}

#[test]
fn bottleneck_slows_down_and_loses_what_does_not_fit() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.arm(
        FaultOp::Transmit,
        0,
        Action::Rate(RateFault {
            bytes_per_second: 20_000,
        }),
    );
    let began = Instant::now();
    for _ in 0..8 {
        scene.send(&[1; 500]);
        scene.host_receives(&[1; 500]);
    }
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(100), "{took:?}");
    assert_eq!(scene.disarm(), 8);
}

#[test]
fn cable_is_out_and_in_by_turns() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.arm(
        FaultOp::Unspecified,
        0,
        Action::LinkFlap(LinkFlapFault {
            down_ms: 50,
            up_ms: 50,
        }),
    );
    await_true("it flaps", || scene.hits() >= 2);
    scene.disarm();
    scene.send(b"in again");
    scene.host_receives(b"in again");
}
