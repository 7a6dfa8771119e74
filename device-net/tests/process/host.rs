//! The host's side: a network namespace, taps in it, the tap's address.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::daemon::await_true;

/// The host's address on the tap; the guest has [`GUEST_IP`].
pub(crate) const HOST_IP: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
/// Where frames for the guest go.
pub(crate) const GUEST_IP: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);

/// Moves this test's thread, and the daemons it starts, into a new network namespace. False when
/// that is not permitted; the reason is printed.
pub(crate) fn enter_namespace() -> bool {
    // SAFETY: unshare takes no pointers.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
        eprintln!(
            "skipped: no network namespace: {}",
            io::Error::last_os_error()
        );
        return false;
    }
    if let Err(error) = open_tun() {
        eprintln!("skipped: no taps here: /dev/net/tun: {error}");
        return false;
    }
    true
}

/// A tap that outlives the processes that open it (but not the namespace), with [`HOST_IP`].
pub(crate) fn create_tap(name: &str, queue_pairs: u16, mtu: u32) {
    let fds = open_tap(name, queue_pairs);
    // SAFETY: TUNSETPERSIST takes an integer.
    check(unsafe { libc::ioctl(fds[0].as_raw_fd(), libc::TUNSETPERSIST, 1) });
    configure(name, mtu);
}

/// Opens a tap as a manager does for a daemon.
pub(crate) fn open_tap(name: &str, queue_pairs: u16) -> Vec<OwnedFd> {
    let mut request = request(name);
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let multi_queue = if queue_pairs > 1 {
        libc::IFF_MULTI_QUEUE
    } else {
        0
    };
    request.ifr_ifru.ifru_flags = (flags | multi_queue) as libc::c_short;
    (0..queue_pairs)
        .map(|_| {
            let tun = open_tun().unwrap();
            // A child that another test is just forking holds what this process has open.
            await_true("the tap is free", || {
                // SAFETY: TUNSETIFF reads and writes one live ifreq.
                let answer = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &mut request) };
                let is_busy = io::Error::last_os_error().raw_os_error() == Some(libc::EBUSY);
                if !is_busy || answer >= 0 {
                    check(answer);
                }
                answer >= 0
            });
            tun.into()
        })
        .collect()
}

/// Gives the tap its address and MTU and brings it up.
pub(crate) fn configure(name: &str, mtu: u32) {
    let socket = control_socket();
    let mut set = request(name);
    set.ifr_ifru.ifru_mtu = mtu as libc::c_int;
    // SAFETY: each of these reads one live ifreq with the union member it expects.
    unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFMTU, &set));
        set.ifr_ifru.ifru_addr = address(HOST_IP);
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &set));
        set.ifr_ifru.ifru_addr = address(Ipv4Addr::new(255, 255, 255, 0));
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFNETMASK, &set));
        set.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &set));
    }
}

/// Whether the interface exists and is up.
pub(crate) fn is_up(name: &str) -> bool {
    let mut get = request(name);
    // SAFETY: SIOCGIFFLAGS writes one live ifreq, whose flags are read only if it succeeded.
    unsafe {
        libc::ioctl(control_socket().as_raw_fd(), libc::SIOCGIFFLAGS, &mut get) == 0
            && libc::c_int::from(get.ifr_ifru.ifru_flags) & libc::IFF_UP != 0
    }
}

/// Whether the interface is up and has a carrier.
pub(crate) fn is_running(name: &str) -> bool {
    let mut get = request(name);
    // SAFETY: SIOCGIFFLAGS writes one live ifreq, whose flags are read only if it succeeded.
    unsafe {
        libc::ioctl(control_socket().as_raw_fd(), libc::SIOCGIFFLAGS, &mut get) == 0
            && libc::c_int::from(get.ifr_ifru.ifru_flags) & libc::IFF_RUNNING != 0
    }
}

/// Sends raw frames over an interface, as the host.
pub(crate) struct Wire {
    socket: OwnedFd,
    address: libc::sockaddr_ll,
}

impl Wire {
    pub(crate) fn new(name: &str) -> Wire {
        // SAFETY: socket takes no pointers. With protocol 0 it receives nothing.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        check(fd);
        // SAFETY: `fd` was just returned by the kernel and is owned by nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut get = request(name);
        // SAFETY: plain data, valid when all zero.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        // SAFETY: each writes one live ifreq, whose union member is read as it was written.
        unsafe {
            check(libc::ioctl(
                socket.as_raw_fd(),
                libc::SIOCGIFINDEX,
                &mut get,
            ));
            address.sll_ifindex = get.ifr_ifru.ifru_ifindex;
            check(libc::ioctl(
                socket.as_raw_fd(),
                libc::SIOCGIFHWADDR,
                &mut get,
            ));
            for (target, byte) in address
                .sll_addr
                .iter_mut()
                .zip(get.ifr_ifru.ifru_hwaddr.sa_data)
            {
                *target = byte as u8;
            }
        }
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_halen = 6;
        Wire { socket, address }
    }

    /// The interface's own address.
    pub(crate) fn mac(&self) -> [u8; 6] {
        self.address.sll_addr[..6].try_into().unwrap()
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        // SAFETY: frame and address are live and of those lengths.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const self.address).cast(),
                size_of_val(&self.address) as libc::socklen_t,
            )
        };
        check(sent as libc::c_int);
    }
}

fn open_tun() -> io::Result<File> {
    File::options().read(true).write(true).open("/dev/net/tun")
}

fn control_socket() -> OwnedFd {
    // SAFETY: socket takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(fd);
    // SAFETY: `fd` was just returned by the kernel and is owned by nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn address(ip: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (target, octet) in data[2..].iter_mut().zip(ip.octets()) {
        *target = octet as libc::c_char;
    }
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: data,
    }
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data, valid when all zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = byte as libc::c_char;
    }
    request
}

#[track_caller]
fn check(answer: libc::c_int) {
    assert!(answer >= 0, "{}", io::Error::last_os_error());
}
