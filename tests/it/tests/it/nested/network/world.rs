//! A machine that knows of the host only, as servers in the world do: a network namespace behind a
//! cable.

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::Command;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Duration;

use guest::{datagrams, exchange};

/// The host's interface.
pub(super) const CABLE: &str = "cable0";
/// The host's end of the cable (RFC 5737: for documentation).
pub(super) const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
pub(super) const WORLD: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);

type Errand = Box<dyn FnOnce() + Send>;

/// A thread in that namespace. The cable goes with it.
pub(super) struct World {
    errands: Sender<Errand>,
}

impl World {
    pub(super) fn start() -> Self {
        let (errands, inbox) = mpsc::channel::<Errand>();
        let (sender, thread_id) = mpsc::channel();
        thread::spawn(move || {
            // SAFETY: gives this thread an empty network namespace; no memory is involved.
            let own_network = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
            assert!(own_network, "a network namespace needs root");
            // SAFETY: has no preconditions.
            let _ = sender.send(unsafe { libc::gettid() });
            inbox.into_iter().for_each(|errand| errand());
        });
        let world = Self { errands };
        let thread_id = thread_id.recv().expect("the thread lives");
        ip(&format!(
            "link add {CABLE} type veth peer name cable1 netns {thread_id}"
        ));
        ip(&format!("addr add {HOST}/24 dev {CABLE}"));
        ip(&format!("link set {CABLE} up"));
        world.inside(|| {
            ip(&format!("addr add {WORLD}/24 dev cable1"));
            ip("link set cable1 up");
        });
        world
    }

    /// Does something there. Sockets that are made there stay there.
    pub(super) fn inside<T: Send + 'static>(
        &self,
        errand: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let (sender, answer) = mpsc::channel();
        let errand: Errand = Box::new(move || drop(sender.send(errand())));
        self.errands.send(errand).expect("the world's thread lives");
        answer.recv().expect("the errand does not panic")
    }
}

/// One exchange by TCP, and datagrams for as long as the test runs, on the port of the current thread's
/// network.
pub(super) fn serve(port: u16, seed: u64, bytes: u64) -> thread::JoinHandle<SocketAddr> {
    let any = (Ipv4Addr::UNSPECIFIED, port);
    let listener = TcpListener::bind(any).expect("a port");
    let datagrams = UdpSocket::bind(any).expect("a port");
    thread::spawn(move || drop(datagrams::answer(&datagrams)));
    thread::spawn(move || {
        let (stream, peer) = listener.accept().expect("somebody connects");
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .expect("a socket");
        exchange::as_host(stream, seed, bytes).expect("both payloads arrived");
        peer
    })
}

pub(super) fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("iproute2 is there");
    let _ = std::io::stderr().write_all(&output.stderr);
    assert!(output.status.success(), "ip {arguments}");
}
