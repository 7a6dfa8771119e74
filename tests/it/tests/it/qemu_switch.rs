//! Two QEMUs on ports of one `device-net`: guests of a VMM that is not ours talk through our switch,
//! from one's memory to the other's, and no kernel has seen a frame.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use guest::plan::{End, Job, Plan};
use guest::report::Report;

use crate::guest_run;
use crate::process::Process;
use crate::qemu::Qemu;
use crate::site;

const SEED: u64 = 0x5eed_0003;
const NET_BYTES: u64 = 4 << 20;
const DATAGRAMS: u64 = 100;
const PORT: u16 = 5000;
/// RFC 2544's benchmarking range; only the two guests ever see it.
const SERVER: &str = "198.18.0.1";
const CLIENT: &str = "198.18.0.2";

#[test]
fn two_guests_of_qemu_exchange_payloads_through_our_switch() {
    let dir = tempfile::tempdir().expect("a folder");
    let dir = dir.path();
    let (server_socket, client_socket) = (dir.join("server.vu"), dir.join("client.vu"));
    let port = |id: &str, socket: &Path| format!("id={id},switch=lan,socket={}", socket.display());
    let mut net = Process::spawn(
        dir,
        "device-net",
        Command::new(site::program("device-net"))
            .arg("--control-socket")
            .arg(dir.join("net.sock"))
            .args(["--nic", &port("server", &server_socket)])
            .args(["--nic", &port("client", &client_socket)]),
    );
    net.wait_for_socket(&dir.join("net.sock"));

    let serve = Plan {
        jobs: vec![
            Job::Address(format!("{SERVER}/24")),
            Job::Serve {
                port: PORT,
                seed: SEED,
                bytes: NET_BYTES,
            },
        ],
        // Until it is killed: the client's end is the test's.
        end: End::Wait,
        ..Plan::default()
    };
    let address = |port| format!("{SERVER}:{port}").parse().expect("an address");
    let ask = Plan {
        jobs: vec![
            Job::Address(format!("{CLIENT}/24")),
            Job::Net {
                peer: address(PORT),
                seed: SEED,
                bytes: NET_BYTES,
            },
            Job::Udp {
                peer: address(PORT),
                seed: SEED,
                datagrams: DATAGRAMS,
            },
            Job::Ping {
                peer: SERVER.parse().expect("an address"),
            },
        ],
        end: End::PowerOff,
        ..Plan::default()
    };
    // One with split rings, one with packed ones.
    let mut server = Qemu::new(&serve)
        .nic_with(&server_socket, "mac=52:54:00:00:00:01")
        .start_as(dir, "server");
    let mut client = Qemu::new(&ask)
        .nic_with(&client_socket, "mac=52:54:00:00:00:02,packed=on")
        .start_as(dir, "client");
    let asked = guest_run::finish(&mut client);
    assert!(asked.iter().any(|report| matches!(
        report,
        Report::Net {
            bytes: NET_BYTES,
            ..
        }
    )));
    assert!(asked.iter().any(|report| matches!(
        report,
        Report::Udp {
            answered: DATAGRAMS,
            ..
        }
    )));
    assert!(
        asked
            .iter()
            .any(|report| matches!(report, Report::Ping { echoes: 3, .. })),
        "{asked:?}"
    );
    guest_run::wait_for_line(&mut server, "\"job\":\"served\"", 1);
    let served = guest_run::reports(&server.output());
    assert!(
        served.contains(&Report::Served {
            bytes: NET_BYTES,
            error: None
        }),
        "the server's half of the exchange: {served:?}"
    );
    server.kill();
    net.terminate(Duration::from_secs(10));
}
