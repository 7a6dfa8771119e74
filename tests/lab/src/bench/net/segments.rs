//! TCP segments of 64 KiB that whoever takes them is to cut, from a guest to a tap of the host and back: with all
//! offloads on.
//!
//! No generator of testpmd makes such packets. To send, the frontend reads one from a file again and again, and its
//! mode `csum` hands it to the virtio driver as a segment. To receive, sender and frontend share a CPU: after each
//! few segments the sender sleeps, which is when the frontend takes them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::bench::packet::{self, SEGMENT_SIZE, Stations};
use anyhow::Result;

use super::super::Session;
use super::super::report::Better;
use super::super::rounds::{Contender, Metric, RowSpec, Samples};
use super::rig::{Count, Rig};
use super::serving::Bay;
use super::{OURS, namespace, turns};
use crate::progress::step;

/// One thread that writes to a tap, or reads from it, and does nothing else.
const WRITE: &str = "writev-64k";
const READ: &str = "readv-64k";

/// Between two calls of the sender, in seconds: the frontend's time for what they sent.
const PAUSE: &str = "0.00005";
/// Weighs a third of what the sender does, which comes first when it has slept.
const FRONTEND_NICE: i32 = 5;

/// DPDK's bits for checksums of UDP and TCP, segments, and packets in several buffers.
const RECEIVE_OFFLOADS: u32 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 13;
/// Descriptors of the frontend that sends: each names a whole segment.
const SEND_QUEUE_SIZE: usize = 256;
/// Before anything counts: all memory is touched for the first time.
const REHEARSAL: Duration = Duration::from_secs(1);

/// Of a pcap file with microseconds, Ethernet, and packets of any length.
const PCAP_MAGIC: u32 = 0xa1b2_c3d4;
const PCAP_VERSION: [u16; 2] = [2, 4];
const PCAP_SNAPLEN: u32 = 262_144;
const PCAP_ETHERNET: u32 = 1;

pub(super) fn run(session: &mut Session) -> Result<()> {
    let send = rows("tap/tx-64k", WRITE);
    if session.wants(&send) {
        step(format_args!("guest to tap, segments of 64 KiB"));
        let bay = Bay::open(session)?;
        let samples = compare_sending(&bay, session);
        session.add(&send, samples)?;
    }
    let receive = rows("tap/rx-64k", READ);
    if session.wants(&receive) {
        step(format_args!("tap to guest, segments of 64 KiB"));
        let bay = Bay::open(session)?;
        let samples = compare_receiving(&bay, session);
        session.add(&receive, samples)?;
    }
    Ok(())
}

fn rows(case: &str, limit: &'static str) -> Vec<RowSpec> {
    let speed = RowSpec {
        case: case.to_owned(),
        unit: "segments/s",
        peers: vec![limit],
        ..RowSpec::default()
    };
    let cost = RowSpec {
        case: format!("{case}/daemon-cpu"),
        unit: "CPU s per million segments",
        better: Better::Lower,
        metric: Metric::CpuPerMillion,
        ..speed.clone()
    };
    vec![speed, cost]
}

fn compare_sending(bay: &Bay, session: &Session) -> Result<Samples> {
    let effort = &session.effort;
    let ours = sending(bay)?;
    let daemon = bay.load(
        "tap-write-64k",
        bay.cpus.daemon,
        &["tap-write", "--tap", WRITE, "--segments"],
    )?;
    let mut limit = Rig::new(daemon, Count::AtTap(WRITE));
    limit.begin("")?;
    let contenders = [
        Contender::new(OURS, || ours.measure(effort)),
        Contender::new(WRITE, || limit.measure(effort)),
    ];
    Samples::take(&contenders, effort.rounds)
}

fn sending(bay: &Bay) -> Result<Rig> {
    let (daemon, sockets) = ours(bay, "tx64k")?;
    let file = bay.ground.run_dir().join("segment.pcap");
    write_pcap(&file, &packet::segment(Stations::default()))?;
    let source = format!("net_pcap0,rx_pcap={},infinite_rx=1", file.display());
    // Each segment in one buffer.
    let options = [
        "--forward-mode=csum",
        "--mbuf-size=65535",
        "--total-num-mbufs=2048",
        "--mbcache=64",
        "--burst=8",
    ];
    let options = options.map(str::to_owned);
    let size = SEND_QUEUE_SIZE;
    let mut frontend = bay.frontend_with("tx64k-front", &sockets, size, &[source], &options)?;
    frontend.await_ports(1)?;
    frontend.tell("port stop all")?;
    frontend.tell("csum set tcp hw 0")?;
    frontend.tell(&format!("tso set {SEGMENT_SIZE} 0"))?;
    frontend.tell("port start all")?;
    let mut rig = Rig {
        daemons_rest: true,
        frontend: Some(frontend),
        ..Rig::new(daemon, Count::AtTap("tx64k"))
    };
    rig.begin("start")?;
    rig.rehearse(REHEARSAL)?;
    Ok(rig)
}

fn compare_receiving(bay: &Bay, session: &Session) -> Result<Samples> {
    let effort = &session.effort;
    let ours = receiving(bay)?;
    let daemon = bay.load(
        "tap-read-64k",
        bay.cpus.daemon,
        &["tap-read", "--tap", READ, "--segments"],
    )?;
    namespace::await_tap(READ)?;
    let sender = ["flood", "--interface", READ, "--segments"];
    let mut limit = Rig {
        generators: vec![bay.load("sender-readv-64k", bay.cpus.frontend, &sender)?],
        ..Rig::new(daemon, Count::FromTap(READ))
    };
    limit.begin("")?;
    let contenders = [
        Contender::new(OURS, || ours.measure(effort)),
        Contender::new(READ, || limit.measure(effort)),
    ];
    Samples::take(&contenders, effort.rounds)
}

fn receiving(bay: &Bay) -> Result<Rig> {
    let (daemon, sockets) = ours(bay, "rx64k")?;
    // Buffers of usual size, which are merged.
    let options = [
        "--forward-mode=rxonly".to_owned(),
        format!("--rx-offloads={RECEIVE_OFFLOADS:#x}"),
    ];
    let frontend = bay.frontend("rx64k-front", &sockets, &options)?;
    // The tap passes segments on whole once the driver has said that it takes them.
    frontend.await_ports(1)?;
    let sender = [
        "flood",
        "--interface",
        "rx64k",
        "--segments",
        "--pause",
        PAUSE,
    ];
    let sender = bay.load("sender-rx64k", bay.cpus.frontend, &sender)?;
    turns::make_short(frontend.process.pid(), FRONTEND_NICE)?;
    turns::make_short(sender.pid(), 0)?;
    let mut rig = Rig {
        daemons_rest: true,
        frontend: Some(frontend),
        generators: vec![sender],
        ..Rig::new(daemon, Count::AtFrontend { ports: 1 })
    };
    rig.begin("start")?;
    rig.rehearse(REHEARSAL)?;
    Ok(rig)
}

/// A process of ours with one NIC on a tap of that name.
fn ours(bay: &Bay, tap: &str) -> Result<(super::super::process::Daemon, [PathBuf; 1])> {
    let sockets = [bay.socket(tap)];
    let nic = format!("id=nic,tap={tap},socket={}", sockets[0].display());
    Ok((bay.device_net(tap, &[nic], &sockets)?, sockets))
}

/// A file with one packet.
fn write_pcap(file: &Path, packet: &[u8]) -> Result<()> {
    let len = packet.len() as u32;
    let mut bytes = Vec::from(PCAP_MAGIC.to_le_bytes());
    bytes.extend(PCAP_VERSION.iter().flat_map(|part| part.to_le_bytes()));
    let fields = [0, 0, PCAP_SNAPLEN, PCAP_ETHERNET, 0, 0, len, len];
    bytes.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
    bytes.extend(packet);
    fs::write(file, bytes)?;
    Ok(())
}
