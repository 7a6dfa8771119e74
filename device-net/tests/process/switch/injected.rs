//! What happens on purpose to frames of a switch's ports: at the sender's and at the receiver's.

use std::time::Duration;

use api::device::fault_rule::Action;
use api::device::faults_client::FaultsClient;
use api::device::{
    ArmFaultsRequest, CorruptFault, DisarmFaultsRequest, DuplicateFault, FaultOp, FaultRule,
    FaultSelector, FaultTrigger, LatencyFault, ListFaultsRequest, PartitionFault, ReorderFault,
};
use tokio::runtime::Runtime;
use tonic::transport::Channel;

use super::*;

/// Two guests, and who arms faults of the first one's port (transmit) and of the second one's (receive).
struct Scene {
    runtime: Runtime,
    client: FaultsClient<Channel>,
    guests: Vec<Guest>,
    _ports: Ports,
}

/// Where the same happens to the same frame.
const PLACES: [(&str, FaultOp); 2] = [("port0", FaultOp::Transmit), ("port1", FaultOp::Receive)];

impl Scene {
    fn new() -> Self {
        let ports = Ports::with(&["", ""], &["--allow-faults"]);
        let runtime = Runtime::new().unwrap();
        let control = ports.daemon.control();
        let connecting = api::connect::unix(&control, DEADLINE);
        let client = FaultsClient::new(runtime.block_on(connecting).unwrap());
        Self {
            runtime,
            client,
            guests: ports.guests(),
            _ports: ports,
        }
    }

    fn arm(&mut self, (device, op): (&str, FaultOp), max_hits: u64, action: Action) {
        let request = ArmFaultsRequest {
            id: "x".to_owned(),
            rules: vec![FaultRule {
                selector: Some(FaultSelector {
                    device: device.to_owned(),
                    ops: vec![op.into()],
                    ..FaultSelector::default()
                }),
                trigger: Some(FaultTrigger {
                    max_hits,
                    ..FaultTrigger::default()
                }),
                action: Some(action),
                ..FaultRule::default()
            }],
            ttl_ms: 600_000,
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

    fn send(&mut self, text: &[u8]) -> Vec<u8> {
        let frame = ethernet(mac(1), mac(0), text);
        self.guests[0].send(0, &frame);
        frame
    }

    #[track_caller]
    fn receives(&mut self, text: &[u8]) {
        assert_eq!(self.next(), ethernet(mac(1), mac(0), text));
    }

    #[track_caller]
    fn next(&mut self) -> Vec<u8> {
        next(&mut self.guests[1]).frame
    }
}

#[test]
fn frames_between_ports_are_doubled() {
    let mut scene = Scene::new();
    for place in PLACES {
        scene.arm(place, 1, Action::Duplicate(DuplicateFault { copies: 2 }));
        scene.send(b"thrice");
        for _ in 0..3 {
            scene.receives(b"thrice");
        }
        scene.send(b"once");
        scene.receives(b"once");
        assert_eq!(scene.disarm(), 1, "{place:?}");
    }
}

#[test]
fn frame_between_ports_goes_behind_the_next() {
    let mut scene = Scene::new();
    let behind = ReorderFault {
        window: 1,
        max_delay_ms: 60_000,
    };
    scene.arm(PLACES[0], 1, Action::Reorder(behind));
    scene.send(b"first");
    await_true("it is hit", || scene.hits() == 1);
    scene.send(b"second");
    scene.receives(b"second");
    scene.receives(b"first");
    assert_eq!(scene.disarm(), 1);
}

#[test]
fn spoilt_frame_between_ports_differs_in_one_bit() {
    let mut scene = Scene::new();
    for place in PLACES {
        scene.arm(place, 1, Action::Corrupt(CorruptFault { bytes: 1 }));
        let sent = scene.send(&[0; 1000]);
        let received = scene.next();
        assert_eq!(received.len(), sent.len());
        let differences = sent.iter().zip(&received);
        let ones: u32 = differences.map(|(a, b)| (a ^ b).count_ones()).sum();
        assert_eq!(ones, 1, "{place:?}");
        assert_eq!(scene.disarm(), 1);
    }
}

#[test]
fn late_frames_between_ports_arrive_in_order_and_go_at_once_when_disarmed() {
    let mut scene = Scene::new();
    for place in PLACES {
        let late = |latency_us| {
            Action::Latency(LatencyFault {
                latency_us,
                jitter_us: 0,
            })
        };
        scene.arm(place, 0, late(50_000));
        let began = Instant::now();
        scene.send(b"late");
        scene.send(b"later");
        scene.receives(b"late");
        assert!(began.elapsed() >= Duration::from_millis(50), "{place:?}");
        scene.receives(b"later");
        assert_eq!(scene.disarm(), 2);
        scene.arm(place, 0, late(60_000_000));
        scene.send(b"for a minute");
        await_true("it is hit", || scene.hits() == 1);
        scene.disarm();
        scene.receives(b"for a minute");
    }
}

#[test]
fn ports_are_cut_off_from_one_another() {
    let mut scene = Scene::new();
    for place in PLACES {
        let peers = vec![text(mac(0))];
        scene.arm(place, 0, Action::Partition(PartitionFault { peers }));
        scene.send(b"lost");
        await_true("it is hit", || scene.hits() == 1);
        scene.disarm();
        scene.send(b"healed");
        scene.receives(b"healed");
    }
}
