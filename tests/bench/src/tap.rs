//! The limit of a tap: its descriptor written to or read from as fast as one thread can, with
//! nothing else to do.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::thread;
use std::time::Duration;

use io_uring::{IoUring, opcode, types};

use crate::packet::{self, Stations, VNET_HEADER_BYTES};

/// Of an offloaded segment.
const LARGEST_PACKET_BYTES: usize = 65_550;
/// Packets that one call sends.
const BATCH: usize = 64;
/// Segments that one call sends: less than what a ring holds.
const SEGMENTS_BATCH: usize = 16;
/// Of a packet socket's header: virtio-net's without `num_buffers`.
const SOCKET_HEADER_BYTES: usize = VNET_HEADER_BYTES - 2;

/// A tap of our own, up, whose packets have a virtio-net header.
#[derive(Debug)]
pub struct Tap(File);

/// What is sent again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// A packet of that length.
    Packet(usize),
    /// [`packet::segment`].
    Segment,
}

impl Load {
    /// Header and packet.
    fn parts(self) -> ([u8; VNET_HEADER_BYTES], Vec<u8>) {
        match self {
            Self::Packet(len) => (
                [0; VNET_HEADER_BYTES],
                packet::udp(Stations::default(), len),
            ),
            Self::Segment => (
                packet::segment_header(),
                packet::segment(Stations::default()),
            ),
        }
    }
}

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

    /// Lets segments come out of the tap that are yet to be cut.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn take_segments(&self) -> io::Result<()> {
        let offloads = libc::c_ulong::from(libc::TUN_F_CSUM | libc::TUN_F_TSO4);
        // SAFETY: TUNSETOFFLOAD takes an integer.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) })
    }

    /// Writes the same packet until something fails, one with each call.
    ///
    /// # Errors
    /// What failed.
    pub fn write_forever(mut self, load: Load) -> io::Result<()> {
        let (header, packet) = load.parts();
        let parts = [IoSlice::new(&header), IoSlice::new(&packet)];
        loop {
            let _ = self.0.write_vectored(&parts)?;
        }
    }

    /// Writes the same packet until something fails, many with each call, in the way that costs the kernel least:
    /// from registered memory, and without waiting.
    ///
    /// # Errors
    /// What failed; or there is no io_uring.
    pub fn write_batches_forever(self, load: Load) -> io::Result<()> {
        let (header, packet) = load.parts();
        let bytes = [&header[..], &packet].concat();
        let mut ring: IoUring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(BATCH as u32)?;
        let buffer = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: the bytes live until the ring is gone.
        unsafe { ring.submitter().register_buffers(&[buffer]) }?;
        let fd = types::Fd(self.0.as_raw_fd());
        let write = opcode::WriteFixed::new(fd, bytes.as_ptr(), bytes.len() as u32, 0)
            .rw_flags(libc::RWF_NOWAIT)
            .build();
        loop {
            for _ in 0..BATCH {
                // SAFETY: the bytes outlive the call, which writes to the tap alone.
                unsafe { ring.submission().push(&write) }.map_err(io::Error::other)?;
            }
            ring.submit_and_wait(BATCH)?;
            for done in ring.completion() {
                if done.result() < 0 {
                    return Err(io::Error::from_raw_os_error(-done.result()));
                }
            }
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

/// How a [`flood`] goes on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Course {
    /// Packets after which it ends; none for never.
    pub count: Option<u64>,
    /// Between two calls, for whoever shares the CPU.
    pub pause: Duration,
}

/// Sends the same packet out through an interface until it was enough or something fails, many with one call
/// and past the queueing discipline: what a fast sender on the host does.
///
/// # Errors
/// What failed.
pub fn flood(interface: &str, load: Load, course: Course) -> io::Result<()> {
    // SAFETY: PR_SET_TIMERSLACK takes an integer.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
    let socket = packet_socket(interface, load)?;
    let (header, packet) = load.parts();
    let part = |bytes: &[u8]| libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // Only of what is yet to be cut the socket wants a header.
    let mut parts = [part(&header[..SOCKET_HEADER_BYTES]), part(&packet)];
    let parts = match load {
        Load::Packet(_) => &mut parts[1..],
        Load::Segment => &mut parts[..],
    };
    // SAFETY: all zeroes is a message without anything.
    let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
    message.msg_hdr.msg_iov = parts.as_mut_ptr();
    message.msg_hdr.msg_iovlen = parts.len();
    let batch_len = match load {
        Load::Packet(_) => BATCH,
        Load::Segment => SEGMENTS_BATCH,
    };
    let mut batch = vec![message; batch_len];
    let mut left = course.count.unwrap_or(u64::MAX);
    while left > 0 {
        let count = left.min(batch_len as u64);
        // SAFETY: each message names `parts`, which name `header` and `packet`; all outlive the call,
        // and sending writes to none of them.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                batch.as_mut_ptr(),
                count as libc::c_uint,
                0,
            )
        };
        match check(sent) {
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                if course.count.is_some() {
                    // As many as there is room for.
                    break;
                }
            }
            // Until the daemon has brought it up.
            Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => thread::yield_now(),
            other => {
                other?;
                left -= u64::try_from(sent).unwrap_or(0).min(left);
            }
        }
        if !course.pause.is_zero() {
            thread::sleep(course.pause);
        }
    }
    Ok(())
}

fn packet_socket(interface: &str, load: Load) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers. Protocol 0: nothing is received.
    let socket = unsafe { libc::socket(libc::AF_PACKET, flags, 0) };
    check(socket)?;
    // SAFETY: the kernel just gave this descriptor to us.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    switch_on(&socket, libc::PACKET_QDISC_BYPASS)?;
    if load == Load::Segment {
        switch_on(&socket, libc::PACKET_VNET_HDR)?;
    }
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

fn switch_on(socket: &OwnedFd, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option's value is a live int of the stated size.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            option,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    })
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
