//! The host's end of the guest's TCP exchange.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use guest::exchange::{Hash, as_host};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, getsockname, listen, setsockopt,
    socket, sockopt,
};

/// Boot and exchange of a slow guest.
const LIMIT: Duration = Duration::from_secs(240);

/// A server for one guest.
pub(super) struct Peer {
    address: SocketAddrV4,
    server: JoinHandle<Result<Hash>>,
}

impl Peer {
    /// Listens on an address that need not exist yet: the NIC brings it.
    pub(super) fn listen(host: &str, seed: u64, bytes: u64) -> Result<Self> {
        let host: Ipv4Addr = host.parse()?;
        let (listener, port) = free_bind(host).context("cannot listen for the guest")?;
        let address = SocketAddrV4::new(host, port);
        let server = thread::spawn(move || {
            as_host(accept(&listener)?, seed, bytes).map_err(anyhow::Error::msg)
        });
        Ok(Self { address, server })
    }

    pub(super) fn address(&self) -> SocketAddrV4 {
        self.address
    }

    /// Hash of what was received: it was what the seed gives, and the guest's hash
    /// of what was sent is right too.
    pub(super) fn outcome(self) -> Result<Hash> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.server.is_finished() {
            ensure!(
                Instant::now() < deadline,
                "the exchange did not come to its end"
            );
            thread::sleep(Duration::from_millis(10));
        }
        self.server
            .join()
            .unwrap_or_else(|_| bail!("the server panicked"))
    }
}

fn free_bind(host: Ipv4Addr) -> Result<(TcpListener, u16)> {
    let fd = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    setsockopt(&fd, sockopt::IpFreebind, &true)?;
    let [a, b, c, d] = host.octets();
    bind(fd.as_raw_fd(), &SockaddrIn::new(a, b, c, d, 0))?;
    listen(&fd, Backlog::new(1)?)?;
    let port = getsockname::<SockaddrIn>(fd.as_raw_fd())?.port();
    // SAFETY: the descriptor is a listening TCP socket, and it is given away here.
    let listener = unsafe { TcpListener::from_raw_fd(fd.into_raw_fd()) };
    Ok((listener, port))
}

fn accept(listener: &TcpListener) -> Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + LIMIT;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(Duration::from_secs(60)))?;
                stream.set_write_timeout(Some(Duration::from_secs(60)))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                ensure!(Instant::now() < deadline, "the guest never connected");
                thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error.into()),
        }
    }
}
