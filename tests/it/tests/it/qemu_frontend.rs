//! QEMU as the frontend: our daemons serve a VMM that is not ours.

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use guest::exchange;
use guest::pattern::{BLOCK_LEN, first_mismatch};
use guest::plan::{End, Job, Plan};
use guest::report::Report;

use crate::guest_run;
use crate::process::Process;
use crate::qemu::Qemu;
use crate::site;

const DISK_BYTES: u64 = 4 << 20;
const NET_BYTES: u64 = 1 << 20;
const DISK_SEED: u64 = 0x5eed_0001;
const NET_SEED: u64 = 0x5eed_0002;
/// RFC 2544's benchmarking range, in a network namespace of this test.
const HOST: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);

#[test]
fn qemu_boots_debian_from_our_disk_and_reaches_the_network_through_our_nic() {
    // Children inherit the thread's network namespace.
    thread::spawn(|| {
        // SAFETY: gives this thread an empty network namespace; no memory is involved.
        let own_network = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
        assert!(
            own_network,
            "no network namespace of its own: run this as root"
        );
        run();
    })
    .join()
    .expect("see above");
}

fn run() {
    let dir = tempfile::tempdir().expect("a folder");
    let dir = dir.path();
    let (root, data) = (dir.join("root.raw"), dir.join("data.raw"));
    std::fs::copy(site::path("GUEST_ROOTFS"), &root).expect("the root file system can be copied");
    let image = std::fs::File::create(&data).expect("an image can be created");
    image.set_len(16 << 20).expect("an image can be extended");
    let (root_socket, data_socket, nic_socket) =
        (dir.join("root.vu"), dir.join("data.vu"), dir.join("nic.vu"));

    ip("tuntap add dev qtap mode tap vnet_hdr");
    ip(&format!("addr add {HOST}/24 dev qtap"));
    ip("link set qtap up");
    let mut blk = Process::spawn(
        dir,
        "device-blk",
        Command::new(site::program("device-blk"))
            .arg("--control-socket")
            .arg(dir.join("blk.sock"))
            .args(["--disk", &disk_argument("root", &root, &root_socket)])
            .args(["--disk", &disk_argument("data", &data, &data_socket)]),
    );
    let mut net = Process::spawn(
        dir,
        "device-net",
        Command::new(site::program("device-net"))
            .arg("--control-socket")
            .arg(dir.join("net.sock"))
            .args([
                "--nic",
                &format!("id=nic,tap=qtap,socket={}", nic_socket.display()),
            ]),
    );
    blk.wait_for_socket(&dir.join("blk.sock"));
    net.wait_for_socket(&dir.join("net.sock"));

    let listener = TcpListener::bind((HOST, 0)).expect("the tap's address is ours");
    let peer = match listener.local_addr().expect("an address") {
        std::net::SocketAddr::V4(address) => address,
        std::net::SocketAddr::V6(_) => unreachable!("bound to IPv4"),
    };
    let host_side = thread::spawn(move || {
        let (stream, _) = listener.accept().map_err(|error| error.to_string())?;
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .map_err(|error| error.to_string())?;
        exchange::as_host(stream, NET_SEED, NET_BYTES)
    });
    let plan = Plan {
        root: Some("vda".into()),
        jobs: vec![
            Job::Address("198.18.0.2/24".into()),
            Job::Net {
                peer: peer.into(),
                seed: NET_SEED,
                bytes: NET_BYTES,
            },
            Job::Disk {
                device: "vdb".into(),
                seed: DISK_SEED,
                bytes: DISK_BYTES,
            },
        ],
        end: End::PowerOff,
    };
    let mut qemu = Qemu::new(&plan)
        .disk(&root_socket)
        .disk_with(&data_socket, "num-queues=1,packed=on")
        .nic(&nic_socket)
        .start(dir);
    let reports = guest_run::finish(&mut qemu);
    assert!(reports.iter().any(|report| matches!(
        report,
        Report::Net {
            bytes: NET_BYTES,
            ..
        }
    )));
    assert!(reports.iter().any(|report| matches!(
        report,
        Report::Disk {
            bytes: DISK_BYTES,
            ..
        }
    )));
    host_side
        .join()
        .expect("no panic")
        .expect("the host's half of the exchange is right");

    blk.terminate(Duration::from_secs(10));
    net.terminate(Duration::from_secs(10));
    expect_pattern(&data, DISK_SEED, DISK_BYTES);
}

/// Reads an image and compares it with what the guest was to write.
pub(crate) fn expect_pattern(image: &Path, seed: u64, len_bytes: u64) {
    let file = std::fs::File::open(image).expect("the image is there");
    let mut content = vec![0; len_bytes as usize];
    file.read_exact_at(&mut content, 0)
        .expect("the image is long enough");
    let mismatch = first_mismatch(seed, 0, &content);
    assert_eq!(
        mismatch,
        None,
        "first wrong block of {BLOCK_LEN} bytes in {}",
        image.display()
    );
}

fn disk_argument(id: &str, image: &Path, socket: &Path) -> String {
    format!(
        "id={id},path={},socket={}",
        image.display(),
        socket.display()
    )
}

fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("iproute2 is installed");
    let _ = std::io::stderr().write_all(&output.stderr);
    assert!(output.status.success(), "ip {arguments}");
}
