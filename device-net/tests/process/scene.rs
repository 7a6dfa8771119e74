//! A guest on a tap, its host, and who talks to the daemon's control socket.

use std::net::UdpSocket;

use tokio::runtime::Runtime;
use tonic::transport::Channel;

use crate::daemon::{DEADLINE, Daemon, await_true};
use crate::guest::Guest;
use crate::host::{configure, enter_namespace, is_up};
use crate::traffic::host_socket;

/// See the module. `C` is a client of one of the daemon's services.
pub(crate) struct Scene<C> {
    pub(crate) runtime: Runtime,
    pub(crate) client: C,
    pub(crate) guest: Guest,
    pub(crate) host_mac: [u8; 6],
    pub(crate) host: UdpSocket,
    _daemon: Daemon,
}

impl<C> Scene<C> {
    /// With further options of the daemon. None where there are no namespaces.
    pub(crate) fn set(options: &[&str], client: impl FnOnce(Channel) -> C) -> Option<Self> {
        if !enter_namespace() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let nic = format!(
            "id=net0,socket={},tap=tap0,mac=52:54:00:12:34:56",
            dir.path().join("net0.vu").display()
        );
        let daemon = Daemon::start(dir, &[&["--nic", &nic], options].concat());
        await_true("the daemon has opened its tap", || is_up("tap0"));
        configure("tap0", 1500);
        let runtime = Runtime::new().unwrap();
        let control = daemon.control();
        let connecting = api::connect::unix(&control, DEADLINE);
        let client = client(runtime.block_on(connecting).unwrap());
        let mut guest = Guest::connect(&daemon.socket(), 1);
        guest.supply(0, 64, 1536);
        let host_mac = guest.find_host();
        Some(Self {
            runtime,
            client,
            guest,
            host_mac,
            host: host_socket(),
            _daemon: daemon,
        })
    }
}
