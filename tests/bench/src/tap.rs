//! The limit of a tap: its descriptor written to or read from as fast as one thread can, with
//! nothing else to do.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::packet::{self, Stations, VNET_HEADER_BYTES};

/// Of an offloaded segment.
const LARGEST_PACKET_BYTES: usize = 65_550;
/// Packets that one call sends.
const BATCH: usize = 64;

/// A tap of our own, up, whose packets have a virtio-net header.
#[derive(Debug)]
pub struct Tap(File);

impl Tap {
    /// Creates it, or takes it if it is there and nobody has it.
    ///
    /// # Errors
    /// When the name is too long, or the kernel refuses.
    pub fn open(name: &str) -> io::Result<Self> {
        let mut request = request_for(name)?;
        let file = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one live ifreq.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        let header_len = VNET_HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one live int.
        check(unsafe {
            libc::ioctl(
                file.as_raw_fd(),
                libc::TUNSETVNETHDRSZ,
                &raw const header_len,
            )
        })?;
        bring_up(name)?;
        Ok(Self(file))
    }

    /// Writes the same packet until something fails.
    ///
    /// # Errors
    /// What failed.
    pub fn write_forever(mut self, len: usize) -> io::Result<()> {
        let packet = packet::udp(Stations::default(), len);
        let header = [0; VNET_HEADER_BYTES];
        let parts = [IoSlice::new(&header), IoSlice::new(&packet)];
        loop {
            let _ = self.0.write_vectored(&parts)?;
        }
    }

    /// Reads packets until something fails.
    ///
    /// # Errors
    /// What failed.
    pub fn read_forever(mut self) -> io::Result<()> {
        let mut header = [0; VNET_HEADER_BYTES];
        let mut packet = vec![0; LARGEST_PACKET_BYTES];
        loop {
            let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(&mut packet)];
            let _ = self.0.read_vectored(&mut parts)?;
        }
    }
}

/// Sends the same packet out through an interface until something fails, many with one call and
/// past the queueing discipline: what a fast sender on the host does.
///
/// # Errors
/// What failed.
pub fn flood(interface: &str, len: usize) -> io::Result<()> {
    let socket = packet_socket(interface)?;
    let packet = packet::udp(Stations::default(), len);
    let mut part = libc::iovec {
        iov_base: packet.as_ptr().cast_mut().cast(),
        iov_len: packet.len(),
    };
    // SAFETY: all zeroes is a message without anything.
    let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
    message.msg_hdr.msg_iov = &raw mut part;
    message.msg_hdr.msg_iovlen = 1;
    let mut batch = [message; BATCH];
    loop {
        // SAFETY: each message names `part`, which names `packet`; both outlive the call, and
        // sending writes to neither.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                batch.as_mut_ptr(),
                BATCH as libc::c_uint,
                0,
            )
        };
        match check(sent) {
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            // Until the daemon has brought it up.
            Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => std::thread::yield_now(),
            other => other?,
        }
    }
}

fn packet_socket(interface: &str) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers. Protocol 0: nothing is received.
    let socket = unsafe { libc::socket(libc::AF_PACKET, flags, 0) };
    check(socket)?;
    // SAFETY: the kernel just gave this descriptor to us.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let on: libc::c_int = 1;
    // SAFETY: the option's value is a live int of the stated size.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_QDISC_BYPASS,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    })?;
    let index = nix::net::if_::if_nametoindex(interface)?;
    // SAFETY: all zeroes is a valid address structure.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as libc::c_ushort;
    address.sll_ifindex = index.cast_signed();
    // SAFETY: the address is live and of the stated size.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    })?;
    Ok(socket)
}

fn bring_up(name: &str) -> io::Result<()> {
    let mut request = request_for(name)?;
    let socket = UdpSocket::bind("127.0.0.1:0").or_else(|_| UdpSocket::bind("0.0.0.0:0"))?;
    let fd: RawFd = socket.as_raw_fd();
    // SAFETY: SIOCGIFFLAGS reads and writes one live ifreq.
    check(unsafe { libc::ioctl(fd, libc::SIOCGIFFLAGS, &raw mut request) })?;
    // SAFETY: SIOCGIFFLAGS filled in the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one live ifreq.
    check(unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw const request) })
}

fn request_for(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all zeroes is a request without a name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{name:?} is no name of an interface"),
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_interfaces_are_bounded() {
        assert!(request_for("").is_err());
        assert!(request_for("sixteen-letters-").is_err());
        let request = request_for("tap0").unwrap();
        assert_eq!(
            request.ifr_name[..5]
                .iter()
                .map(|&c| c as u8)
                .collect::<Vec<_>>(),
            b"tap0\0"
        );
    }
}
