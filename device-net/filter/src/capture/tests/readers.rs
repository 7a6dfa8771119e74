//! tcpdump and tshark read our files, and tcpdump's filters are the measure of ours.

use std::process::{Command, Stdio};

use super::*;

fn has_tool(name: &str) -> bool {
    let runs = Command::new(name)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !runs {
        eprintln!("skipped: {name} is not installed");
    }
    runs
}

/// One that keeps its user, if it is root: Debian's would become a user that its package makes.
fn tcpdump(args: &[&str]) -> Command {
    let mut command = Command::new("tcpdump");
    command.args(["-Z", "root"]).args(args);
    command
}

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    output.stdout
}

/// Of each kind some, all different.
fn corpus() -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for (guest, peer) in [(GUEST, PEER), (GUEST_V6, PEER_V6)] {
        for port in [22, 53, 80, 8080] {
            frames.push(tcp(peer, 1024, guest, port, SYN));
            frames.push(udp(guest, port, peer, 1024));
        }
        frames.push(echo(guest, peer, false, 1));
        frames.push(echo(peer, guest, true, 1));
        frames.push(unreachable(peer, guest, &udp(guest, 53, peer, 1024)));
        frames.push(ip(guest, peer, 47, &[0; 8]));
        frames.push(ip(guest, peer, 132, &[0, 80, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
    }
    frames.push(ip(GUEST, "224.0.0.22", 2, &[0x22, 0, 0, 0, 0, 0, 0, 0]));
    frames.push(ip(GUEST, "239.1.2.3", 17, &udp_datagram(5353, 5353)));
    frames.push(neighbour(GUEST_V6, 136, GUEST_V6, Some(GUEST_MAC)));
    frames.push(fragment(udp(PEER, 1024, GUEST, 53), 1, 0, true));
    frames.push(fragment(
        ip(PEER, GUEST, 17, &[0, 53, 0, 53, 0, 0]),
        1,
        1480,
        false,
    ));
    frames.push(arp(PEER_MAC, 1, PEER_MAC, PEER, GUEST));
    frames.push(arp(GUEST_MAC, 2, GUEST_MAC, GUEST, PEER));
    frames.push(ethernet(GUEST_MAC, "01:80:c2:00:00:0e", 0x88cc, &[0; 46]));
    frames.push([udp(GUEST, 9, PEER, 9), vec![7; 1200]].concat());
    frames
}

/// Filters whose meaning is tcpdump's to the letter, for frames without tags.
const FILTERS: &[&str] = &[
    "ip",
    "ip6",
    "arp",
    "tcp",
    "udp",
    "sctp",
    "icmp",
    "icmp6",
    "igmp",
    "ip proto 47",
    "ip6 proto 47",
    "proto 47",
    "ether proto 0x88cc",
    "ether proto \\arp",
    "host 10.0.0.9",
    "src host 10.0.0.9",
    "dst host 10.0.0.9",
    "src or dst host 10.0.0.5",
    "src and dst net 10.0.0.0/24",
    "ip host 10.0.0.5",
    "arp host 10.0.0.5",
    "ip6 host 2001:db8::9",
    "dst net 2001:db8::/64",
    "net 224.0.0.0/4",
    "port 53",
    "src port 53",
    "dst port 53",
    "tcp port 80",
    "sctp port 80",
    "udp src port 8080",
    "portrange 50-80",
    "tcp dst portrange 20-60",
    "ether host 52:54:00:00:00:01",
    "ether src 52:54:00:00:00:02",
    "ether dst ff:ff:ff:ff:ff:ff",
    "broadcast",
    "multicast",
    "ip multicast",
    "ip6 multicast",
    "less 60",
    "greater 1000",
    "not ip",
    "tcp or udp and port 53",
    "tcp or (udp and port 53)",
    "port 22 or 80 and not ip6",
    "not (host 10.0.0.9 or ip6)",
    "! tcp && ! udp || arp",
    "dst port 22 or 53",
];

#[test]
fn tcpdump_selects_the_same_frames() {
    if !has_tool("tcpdump") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let all = dir.path().join("all.pcap");
    let frames = corpus();
    let capture = Capture::new(Request::default(), || {});
    frames.iter().for_each(|frame| offer(&capture, frame));
    std::fs::write(&all, drain(&capture).0).unwrap();
    for filter in FILTERS {
        let request = Request {
            filter: filter.parse().unwrap(),
            ..Request::default()
        };
        let capture = Capture::new(request, || {});
        frames.iter().for_each(|frame| offer(&capture, frame));
        let ours = records(&drain(&capture).0);
        let mut tcpdump = tcpdump(&["--time-stamp-precision=nano", "-w", "-", "-r"]);
        tcpdump.arg(&all);
        let theirs = records(&run(tcpdump.arg(filter)));
        assert_eq!(ours, theirs, "{filter}");
        assert!(!ours.is_empty() && ours.len() < frames.len(), "{filter}");
    }
}

#[test]
fn tshark_and_tcpdump_read_tagged_and_cut_frames() {
    let frames = [
        tagged(&udp(GUEST, 1024, PEER, 53), 7),
        tagged(&tagged(&tcp(GUEST_V6, 1024, PEER_V6, 80, SYN), 20), 10),
        [udp(GUEST, 9, PEER, 9), vec![7; 1200]].concat(),
    ];
    let request = Request {
        snaplen_bytes: 96,
        ..Request::default()
    };
    let capture = Capture::new(request, || {});
    for (number, frame) in (0..).zip(&frames) {
        offer_at(
            &capture,
            frame,
            Verdict::Pass,
            1_700_000_000_000_000_001 + number * 1_000_000_000,
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("some.pcap");
    std::fs::write(&file, drain(&capture).0).unwrap();
    if has_tool("tshark") {
        let fields = [
            "frame.time_epoch",
            "frame.len",
            "frame.cap_len",
            "vlan.id",
            "udp.dstport",
            "tcp.dstport",
        ];
        let mut tshark = Command::new("tshark");
        tshark.arg("-r").arg(&file).args(["-T", "fields"]);
        for field in fields {
            tshark.args(["-e", field]);
        }
        let text = String::from_utf8(run(&mut tshark)).unwrap();
        assert_eq!(
            text.lines().collect::<Vec<_>>(),
            [
                "1700000000.000000001\t50\t50\t7\t53\t",
                "1700000001.000000001\t82\t82\t10,20\t\t80",
                "1700000002.000000001\t1246\t96\t\t9\t",
            ]
        );
    }
    if has_tool("tcpdump") {
        let text = run(tcpdump(&["-nne", "-r"]).arg(&file));
        let text = String::from_utf8(text).unwrap();
        for (line, named) in
            text.lines()
                .zip(["vlan 7, p 0", "vlan 10, p 0", "10.0.0.5.9 > 10.0.0.9.9"])
        {
            assert!(line.contains(named), "{line}");
        }
        assert_eq!(text.lines().count(), frames.len());
    }
}
