//! Taps: an Ethernet interface of the kernel in this thread's network namespace, with a descriptor as its
//! other end.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};

const NETMASK: [u8; 4] = [255, 255, 255, 0];

/// Whether frames have a virtio-net header before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// As `device-net` wants it.
    VnetHdr,
    /// Nothing but the frame.
    Bare,
}

/// A tap that is up and has an address; gone with its descriptors.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Makes a tap, non-blocking, with `address` in a network of 24 bits, and the hardware address `mac` if
    /// there is one.
    ///
    /// # Errors
    /// It is not permitted, or the name is in use.
    pub fn make(
        name: &str,
        framing: Framing,
        address: Ipv4Addr,
        mac: Option<[u8; 6]>,
    ) -> Result<Self> {
        let made = open(name, framing).and_then(|file| {
            configure(name, address, mac)?;
            Ok(Self { file })
        });
        made.with_context(|| format!("no tap {name}; be root"))
    }

    /// Its other end. Copies of the descriptor are the same queue.
    pub fn file(&self) -> &File {
        &self.file
    }
}

fn open(name: &str, framing: Framing) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    let mut request = request(name);
    let header = match framing {
        Framing::VnetHdr => libc::IFF_VNET_HDR,
        Framing::Bare => 0,
    };
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | header) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one live ifreq.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    Ok(file)
}

fn configure(name: &str, address: Ipv4Addr, mac: Option<[u8; 6]>) -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let set = |call, request: &libc::ifreq| {
        // SAFETY: these calls read one live ifreq.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), call, &raw const *request) })
    };
    let mut request = request(name);
    if let Some(mac) = mac {
        // SAFETY: all zeroes is an address of no family.
        let mut hardware: libc::sockaddr = unsafe { std::mem::zeroed() };
        hardware.sa_family = libc::ARPHRD_ETHER;
        for (place, byte) in hardware.sa_data.iter_mut().zip(mac) {
            *place = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_hwaddr = hardware;
        set(libc::SIOCSIFHWADDR, &request)?;
    }
    for (call, octets) in [
        (libc::SIOCSIFADDR, address.octets()),
        (libc::SIOCSIFNETMASK, NETMASK),
    ] {
        // SAFETY: all zeroes is an address of no family.
        let mut internet: libc::sockaddr_in = unsafe { std::mem::zeroed() };
        internet.sin_family = libc::AF_INET as libc::sa_family_t;
        internet.sin_addr.s_addr = u32::from_ne_bytes(octets);
        // SAFETY: a sockaddr_in is as long as a sockaddr, and both are plain data.
        request.ifr_ifru.ifru_addr =
            unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(internet) };
        set(call, &request)?;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    set(libc::SIOCSIFFLAGS, &request)
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: all zeroes is a request without name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
