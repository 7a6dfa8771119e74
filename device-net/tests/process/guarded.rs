//! Policies, limits, flows and captures of a NIC that is in use.

use std::time::{Duration, Instant};

use api::device::nics_client::NicsClient;
use api::device::security_rule::Remote;
use api::device::{
    AntiSpoofing, CaptureChunk, CaptureRequest, CapturedFrames, Direction, GetNicRequest,
    ListFlowsRequest, NetLimit, NetLimits, Nic, Policy, PortRange, Security, SecurityRule,
    SetLinkRequest, SetNetLimitsRequest, SetPolicyRequest,
};
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use virtio_bindings::virtio_net::VIRTIO_NET_HDR_F_NEEDS_CSUM;

use crate::daemon::{DEADLINE, await_true};
use crate::frame::{self, Parsed};
use crate::guest::HEADER_LEN;
use crate::host::{GUEST_IP, HOST_IP, is_running};
use crate::scene;
use crate::traffic::{datagram, guest_address, host_socket};

const GUEST_PORT: u16 = 4000;

/// Where a frame of IPv4 has its source address.
const SOURCE_AT: usize = 26;

/// With who looks after NICs.
type Scene = scene::Scene<NicsClient<Channel>>;

impl Scene {
    /// None where there are no namespaces.
    fn new() -> Option<Self> {
        Self::set(&[], NicsClient::new)
    }

    fn nic(&mut self) -> Nic {
        let asking = self.client.get_nic(GetNicRequest { id: "net0".into() });
        self.runtime.block_on(asking).unwrap().into_inner()
    }

    fn set_policy(&mut self, policy: Policy) -> Result<Nic, Status> {
        let asking = self.client.set_policy(SetPolicyRequest {
            id: "net0".into(),
            policy: Some(policy),
        });
        self.runtime
            .block_on(asking)
            .map(tonic::Response::into_inner)
    }

    fn set_limits(&mut self, limits: NetLimits) {
        let asking = self.client.set_limits(SetNetLimitsRequest {
            id: "net0".into(),
            limits: Some(limits),
        });
        self.runtime.block_on(asking).unwrap();
    }

    fn capture(&mut self, request: CaptureRequest) -> Result<Streaming<CaptureChunk>, Status> {
        let asking = self.client.capture(CaptureRequest {
            id: "net0".into(),
            ..request
        });
        self.runtime
            .block_on(asking)
            .map(tonic::Response::into_inner)
    }

    /// All of a capture that ends by itself.
    fn read(&self, mut stream: Streaming<CaptureChunk>) -> (Vec<u8>, u64, u64) {
        let (mut file, mut packets, mut missed) = (Vec::new(), 0, 0);
        let reading = async {
            while let Some(mut chunk) = stream.message().await.unwrap() {
                file.append(&mut chunk.data);
                (packets, missed) = (chunk.packets, chunk.missed);
            }
        };
        let reading = async { tokio::time::timeout(DEADLINE, reading).await };
        self.runtime.block_on(reading).expect("the capture ends");
        (file, packets, missed)
    }

    /// A datagram of the guest's for the host's socket.
    fn to_host(&self, payload: &[u8]) -> Vec<u8> {
        let port = self.host.local_addr().unwrap().port();
        frame::udp(self.host_mac, (GUEST_PORT, port), payload)
    }

    #[track_caller]
    fn host_receives(&self, payload: &[u8]) {
        let mut buffer = [0; 2000];
        let (len, _) = self.host.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], payload);
    }

    #[track_caller]
    fn guest_receives(&mut self, payload: &[u8]) {
        let (_, received) = self.guest.receive(datagram);
        assert_eq!(received, payload);
    }

    #[track_caller]
    fn await_drops(&mut self, direction: Direction, reason: &str, count: u64) {
        await_true(&format!("{count} drops for {reason}"), || {
            let stats = self.nic().stats.unwrap();
            let drops = match direction {
                Direction::Ingress => stats.rx_drops_by_reason,
                _ => stats.tx_drops_by_reason,
            };
            drops.get(reason) == Some(&count)
        });
    }
}

fn identity() -> Option<AntiSpoofing> {
    Some(AntiSpoofing {
        addresses: vec![GUEST_IP.to_string()],
        ..AntiSpoofing::default()
    })
}

fn out() -> SecurityRule {
    SecurityRule {
        direction: Direction::Egress.into(),
        ..SecurityRule::default()
    }
}

fn secured(rules: &[SecurityRule]) -> Policy {
    Policy {
        anti_spoofing: identity(),
        security: Some(Security {
            rules: rules.to_vec(),
            ..Security::default()
        }),
        ..Policy::default()
    }
}

#[test]
fn guest_cannot_pose_as_somebody_else() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let policy = Policy {
        anti_spoofing: identity(),
        ..Policy::default()
    };
    let nic = scene.set_policy(policy.clone()).unwrap();
    assert_eq!(nic.policy, Some(policy));

    let mut wrong_ip = scene.to_host(b"wrong address");
    wrong_ip[SOURCE_AT + 3] += 1;
    let mut wrong_mac = scene.to_host(b"wrong MAC");
    wrong_mac[11] ^= 1;
    let mut wrong_arp = frame::arp_request();
    wrong_arp[31] += 1;
    for frame in [&wrong_ip, &wrong_mac, &wrong_arp] {
        scene.guest.send(0, frame);
    }
    // The header asks for a checksum to be written over the source address.
    let mut header = [0; HEADER_LEN];
    header[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    header[6..8].copy_from_slice(&(SOURCE_AT as u16).to_le_bytes());
    let frame = scene.to_host(b"wrong later");
    scene.guest.send_with(0, header, &frame);
    let honest = scene.to_host(b"honest");
    scene.guest.send(0, &honest);
    scene.host_receives(b"honest");
    for reason in ["address_spoofed", "mac_spoofed", "arp_spoofed", "malformed"] {
        scene.await_drops(Direction::Egress, reason, 1);
    }
    let stats = scene.nic().stats.unwrap();
    assert_eq!((stats.tx_drops, stats.rx_drops), (4, 0), "{stats:?}");
}

#[test]
fn security_rules_hold_from_the_next_frame_on() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let nic = scene.set_policy(secured(&[out()])).unwrap();
    assert_eq!(nic.flows, 0);
    // Nobody asked for this.
    scene.host.send_to(b"unasked", guest_address()).unwrap();
    scene.await_drops(Direction::Ingress, "not_permitted", 1);
    // The guest opens a flow, and the answer passes.
    let question = scene.to_host(b"question");
    scene.guest.send(0, &question);
    scene.host_receives(b"question");
    scene.host.send_to(b"answer", guest_address()).unwrap();
    scene.guest_receives(b"answer");
    let ping = frame::ping(scene.host_mac, b"echo");
    scene.guest.send(0, &ping);
    scene.guest.receive(|_, parsed| {
        (parsed
            == Parsed::EchoReply {
                payload: b"echo".into(),
            })
        .then_some(())
    });

    let asking = scene.client.list_flows(ListFlowsRequest {
        id: "net0".into(),
        filter: "udp and host 10.99.0.1".into(),
        max_flows: 0,
    });
    let listed = scene.runtime.block_on(asking).unwrap().into_inner();
    assert!(!listed.truncated);
    let [flow] = &listed.flows[..] else {
        panic!("one flow: {listed:?}");
    };
    assert_eq!(
        (flow.local_address.as_str(), flow.local_port),
        ("10.99.0.2", 4000)
    );
    assert_eq!(flow.remote_address, HOST_IP.to_string());
    assert_eq!(
        (flow.direction(), flow.state.as_str()),
        (Direction::Egress, "replied")
    );
    assert_eq!((flow.egress_packets, flow.ingress_packets), (1, 1));
    assert_eq!(scene.nic().flows, 2);

    // A rule for the port; another socket of the host's begins.
    let port = SecurityRule {
        direction: Direction::Ingress.into(),
        protocol: 17,
        ports: Some(PortRange {
            first: GUEST_PORT.into(),
            last: GUEST_PORT.into(),
        }),
        remote: Some(Remote::Cidr("10.99.0.0/24".into())),
        ..SecurityRule::default()
    };
    scene
        .set_policy(secured(std::slice::from_ref(&port)))
        .unwrap();
    let other = host_socket();
    other.send_to(b"permitted now", guest_address()).unwrap();
    scene.guest_receives(b"permitted now");
    // And what the guest may send no more ends.
    let more = scene.to_host(b"more");
    scene.guest.send(0, &more);
    scene.await_drops(Direction::Egress, "not_permitted", 1);

    let wrong = SecurityRule {
        remote: Some(Remote::Cidr("10.99.0.1/24".into())),
        ..port
    };
    let refused = scene.set_policy(secured(&[wrong])).unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(
        refused.message().contains("did you mean 10.99.0.0/24"),
        "{refused}"
    );
}

#[test]
fn limits_hold_frames_back_and_lose_none() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    const FRAMES: u32 = 40;
    let limit = Some(NetLimit {
        packets_per_second: 100,
        burst_packets: 10,
        ..NetLimit::default()
    });
    scene.set_limits(NetLimits {
        ingress: limit,
        egress: limit,
    });
    // A new limit has no burst: 40 frames take 0.4 s, less the last one and what a hundredth of a
    // second holds.
    let least = Duration::from_millis(360);
    let began = Instant::now();
    for number in 0..FRAMES {
        let payload = number.to_be_bytes();
        let frame = scene.to_host(&payload);
        scene.guest.send(0, &frame);
        scene.host_receives(&payload);
    }
    assert!(began.elapsed() >= least, "{:?}", began.elapsed());

    let began = Instant::now();
    for number in 0..FRAMES {
        scene
            .host
            .send_to(&number.to_be_bytes(), guest_address())
            .unwrap();
    }
    for number in 0..FRAMES {
        scene.guest_receives(&number.to_be_bytes());
    }
    // The lane to the guest had time to fill its burst meanwhile.
    assert!(
        began.elapsed() >= least - Duration::from_millis(100),
        "{:?}",
        began.elapsed()
    );
    let nic = scene.nic();
    assert!(
        nic.ingress_throttled > 0 && nic.egress_throttled > 0,
        "{nic:?}"
    );
    let stats = nic.stats.unwrap();
    assert_eq!((stats.rx_drops, stats.tx_drops), (0, 0), "{stats:?}");

    // Lifted while a frame waits, which then goes at once.
    scene.set_limits(NetLimits {
        egress: Some(NetLimit {
            bits_per_second: 1000,
            ..NetLimit::default()
        }),
        ingress: None,
    });
    let began = Instant::now();
    let frame = scene.to_host(b"waits for seconds");
    scene.guest.send(0, &frame);
    scene.set_limits(NetLimits::default());
    scene.host_receives(b"waits for seconds");
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn capture_has_what_passed_and_what_was_dropped() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let refused = scene.capture(CaptureRequest {
        filter: "udp prot 53".into(),
        ..CaptureRequest::default()
    });
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(
        refused.message().contains("\"prot\" (character 5)"),
        "{refused}"
    );

    let wanted = CaptureRequest {
        filter: format!("udp port {GUEST_PORT}"),
        max_packets: 2,
        ..CaptureRequest::default()
    };
    let both = scene.capture(wanted.clone()).unwrap();
    let egress = scene
        .capture(CaptureRequest {
            direction: Direction::Egress.into(),
            max_packets: 1,
            ..wanted.clone()
        })
        .unwrap();
    let dropped = scene
        .capture(CaptureRequest {
            frames: CapturedFrames::Dropped.into(),
            max_packets: 1,
            ..wanted.clone()
        })
        .unwrap();
    assert_eq!(scene.nic().captures, 3);
    // Larger than what a policy looks at.
    let payload = vec![0x5a; 1400];
    let sent = scene.to_host(&payload);
    scene.guest.send(0, &sent);
    scene.host_receives(&payload);
    let port = scene.host.local_addr().unwrap();
    scene.host.send_to(&payload, guest_address()).unwrap();
    scene.guest_receives(&payload);
    scene.set_policy(secured(&[])).unwrap();
    scene.guest.send(0, &sent);

    let (file, packets, missed) = scene.read(both);
    assert_eq!((packets, missed), (2, 0));
    let contains = |file: &[u8]| file.windows(sent.len()).any(|bytes| bytes == sent);
    assert!(
        contains(&file),
        "the guest's frame is there, to the last byte, from {port}"
    );
    assert_eq!(file.len(), 24 + 2 * (16 + sent.len()));
    for stream in [egress, dropped] {
        let (file, packets, _) = scene.read(stream);
        assert_eq!((packets, file.len()), (1, 24 + 16 + sent.len()));
        assert!(contains(&file));
    }

    // One that nobody reads any more ends as well.
    let forgotten = scene.capture(CaptureRequest::default()).unwrap();
    let timed = scene
        .capture(CaptureRequest {
            max_duration_ms: 1,
            // The host's own multicast would be captured without.
            ..wanted
        })
        .unwrap();
    let (file, packets, _) = scene.read(timed);
    assert_eq!((file.len(), packets), (24, 0));
    drop(forgotten);
    await_true("no capture is left", || scene.nic().captures == 0);
}

#[test]
fn link_that_is_down_carries_nothing() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let set_link = |scene: &mut Scene, up| {
        let asking = scene.client.set_link(SetLinkRequest {
            id: "net0".into(),
            up,
        });
        scene.runtime.block_on(asking).unwrap().into_inner()
    };
    await_true("the host sees the link", || is_running("tap0"));
    assert!(!set_link(&mut scene, false).stats.unwrap().link_up);
    await_true("the host sees that the link is down", || {
        !is_running("tap0")
    });
    let lost = scene.to_host(b"lost");
    scene.guest.send(0, &lost);
    scene.await_drops(Direction::Egress, "link_down", 1);
    assert!(set_link(&mut scene, true).stats.unwrap().link_up);
    await_true("the host sees the link again", || is_running("tap0"));
    let again = scene.to_host(b"again");
    scene.guest.send(0, &again);
    scene.host_receives(b"again");

    let nobody = scene.client.get_nic(GetNicRequest { id: "net9".into() });
    let status = scene.runtime.block_on(nobody).unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let untracked = scene.client.list_flows(ListFlowsRequest {
        id: "net0".into(),
        ..ListFlowsRequest::default()
    });
    let status = scene.runtime.block_on(untracked).unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("track_flows"), "{status}");
}
