//! Packet sockets (AF_PACKET) on an interface of the host: the guest is on its wire, beside the
//! host.
//!
//! Plain sockets with virtio-net headers (PACKET_VNET_HDR), written in batches by io_uring and read in
//! batches by recvmmsg, which says what tag the kernel took off a frame: it is put back. Rejected were AF_XDP, which knows no offloads (a guest's 64 KiB segments would be cut
//! here, one by one) and needs the interface's whole driver queue and a loaded program; and mapped
//! rings (TPACKET_V3), whose fixed slots such frames do not fit into.
//!
//! The first pair's socket receives: a queue that a driver does not use cannot be left out of a
//! fanout group, and frames that it gets would be lost. All of them send.
//!
//! What the host itself sends over the interface, the guest does not see, nor what is for the
//! host's address; guest and host reach each other by way of the wire alone.

use std::ffi::CString;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::slots::Slots;
use crate::nic::MAX_QUEUE_PAIRS;

/// The header before each frame: `struct virtio_net_hdr`.
pub(super) const HEADER_LEN_BYTES: usize = 10;

/// Of bursts, what the usual limit (net.core.rmem_max) holds is too little.
const RECEIVE_BUFFER_BYTES: libc::c_int = 4 << 20;

const MAC_BYTES: usize = 6;

/// A tag (IEEE 802.1Q), which the kernel takes off a frame before sockets see it.
pub(crate) const TAG_ROOM_BYTES: usize = 4;

/// Where a tag is in a frame: behind both addresses.
pub(super) const TAG_AT: usize = 2 * MAC_BYTES;

/// One socket for each queue pair.
#[derive(Debug)]
pub(crate) struct PacketSockets {
    queues: Vec<OwnedFd>,
}

impl PacketSockets {
    /// Opens a socket for each queue pair on the interface `name`.
    ///
    /// # Errors
    /// [`PacketError`], with the remedy.
    pub(crate) fn open(name: &str, queue_pairs: u16) -> Result<Vec<OwnedFd>, PacketError> {
        let c_name = CString::new(name).map_err(|_| PacketError::NoInterface(name.to_owned()))?;
        // SAFETY: a string that ends with NUL.
        let index = unsafe { libc::if_nametoindex(c_name.as_ptr()) };
        if index == 0 {
            return Err(PacketError::NoInterface(name.to_owned()));
        }
        (0..queue_pairs)
            .map(|pair| {
                let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
                // SAFETY: socket takes no pointers. With protocol 0 it receives nothing yet.
                let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
                if fd < 0 {
                    let source = io::Error::last_os_error();
                    return Err(match source.raw_os_error() {
                        Some(libc::EPERM | libc::EACCES) => PacketError::NotPermitted(source),
                        _ => PacketError::Open(source),
                    });
                }
                // SAFETY: `fd` was just returned by the kernel and is owned by nobody else.
                let socket = unsafe { OwnedFd::from_raw_fd(fd) };
                // Before the first frame comes; without permission the usual limit holds.
                let size = RECEIVE_BUFFER_BYTES;
                let _ = set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &size)
                    .or_else(|_| set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, &size));
                if pair > 0 {
                    receive_nothing(&socket).map_err(PacketError::Option)?;
                }
                bind(&socket, index).map_err(PacketError::Open)?;
                Ok(socket)
            })
            .collect()
    }

    /// Takes sockets that are bound to one interface, one for each queue pair.
    ///
    /// # Errors
    /// [`PacketError`] when they are something else.
    pub(crate) fn from_fds(queues: Vec<OwnedFd>) -> Result<Self, PacketError> {
        if queues.is_empty() || queues.len() > usize::from(MAX_QUEUE_PAIRS) {
            return Err(PacketError::BadCount(queues.len()));
        }
        let mut first: Option<libc::sockaddr_ll> = None;
        for (pair, socket) in queues.iter().enumerate() {
            let bound = bound_to(socket)?;
            let index = first.get_or_insert(bound).sll_ifindex;
            if bound.sll_ifindex != index {
                return Err(PacketError::SeveralInterfaces);
            }
            prepare(socket).map_err(PacketError::Option)?;
            let filtered = match pair {
                0 => ignore_address(socket, &bound),
                _ => receive_nothing(socket),
            };
            filtered.map_err(PacketError::Option)?;
        }
        if let Some(bound) = first {
            join_all(&queues[0], bound.sll_ifindex).map_err(PacketError::Option)?;
        }
        Ok(Self { queues })
    }

    /// One for each queue pair.
    pub(super) fn num_queues(&self) -> u16 {
        self.queues.len() as u16
    }

    /// The socket of one queue pair.
    pub(super) fn queue(&self, pair: u16) -> &OwnedFd {
        &self.queues[usize::from(pair)]
    }
}

fn bind(socket: &OwnedFd, index: libc::c_uint) -> io::Result<()> {
    // SAFETY: plain data, valid when all zero.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index as libc::c_int;
    // SAFETY: the address is live and of that length.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    })
}

/// The interface that a packet socket is bound to.
fn bound_to(socket: &OwnedFd) -> Result<libc::sockaddr_ll, PacketError> {
    // SAFETY: plain data, valid when all zero.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    let mut len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: address and length are live, and the length is the address's.
    let answer =
        unsafe { libc::getsockname(socket.as_raw_fd(), (&raw mut address).cast(), &raw mut len) };
    if check(answer).is_err() || libc::c_int::from(address.sll_family) != libc::AF_PACKET {
        return Err(PacketError::NoPacketSocket);
    }
    let mut kind: libc::c_int = 0;
    let mut len = size_of_val(&kind) as libc::socklen_t;
    // SAFETY: value and length are live, and the length is the value's.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_TYPE,
            (&raw mut kind).cast(),
            &raw mut len,
        )
    };
    if check(answer).is_err() || kind != libc::SOCK_RAW {
        return Err(PacketError::NoPacketSocket);
    }
    if address.sll_ifindex == 0 {
        return Err(PacketError::NotBound);
    }
    Ok(address)
}

/// Frames come and go behind virtio-net headers, without waiting, and not those that the host
/// sends.
fn prepare(socket: &OwnedFd) -> io::Result<()> {
    let yes: libc::c_int = 1;
    set(socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &yes)?;
    set(socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &yes)?;
    set(socket, libc::SOL_PACKET, libc::PACKET_AUXDATA, &yes)?;
    // SAFETY: F_GETFL and F_SETFL take and return integers.
    check(unsafe {
        let status = libc::fcntl(socket.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(socket.as_raw_fd(), libc::F_SETFL, status | libc::O_NONBLOCK)
    })
}

/// Reads one frame behind its header into `slot`, with the tag that the kernel took off it.
///
/// # Errors
/// `WouldBlock` when there is none.
pub(super) fn receive(socket: &OwnedFd, slot: &mut [u8]) -> io::Result<usize> {
    let iovec = libc::iovec {
        iov_base: slot.as_mut_ptr().cast(),
        iov_len: slot.len() - TAG_ROOM_BYTES,
    };
    // SAFETY: a buffer of ours and its length.
    let (len, tag) = unsafe { receive_scattered(socket, &[iovec]) }?;
    Ok(put_tag_back(slot, len, tag))
}

/// Reads one frame behind its header; returns the length of both, and the tag that the kernel took off.
///
/// # Errors
/// `WouldBlock` when there is none.
///
/// # Safety
/// Each of `iovecs` must be memory that may be written and that no reference covers.
pub(super) unsafe fn receive_scattered(
    socket: &OwnedFd,
    iovecs: &[libc::iovec],
) -> io::Result<(usize, Option<Tag>)> {
    let mut control = Control([0; CONTROL_BYTES]);
    let mut message = message(iovecs, &mut control);
    // SAFETY: the message names live buffers with their lengths, as the caller vouches for.
    let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel filled the message in.
    Ok((len, unsafe { tag(&message) }))
}

/// Reads up to `count` frames, each behind its header into a slot of its own, with the tags that the kernel
/// took off them. Returns how many came; `lens_bytes` has the length of each with its header.
///
/// # Errors
/// `WouldBlock` when there is none.
pub(super) fn receive_many(
    socket: &OwnedFd,
    slots: &mut Slots,
    count: usize,
    lens_bytes: &mut [u32],
) -> io::Result<usize> {
    let count = count.min(MAX_AT_ONCE).min(lens_bytes.len());
    let iovecs: [libc::iovec; MAX_AT_ONCE] = std::array::from_fn(|index| libc::iovec {
        iov_base: slots.as_ptr(index.min(count - 1)).cast(),
        iov_len: slots.slot_bytes() - TAG_ROOM_BYTES,
    });
    let mut controls = [const { Control([0; CONTROL_BYTES]) }; MAX_AT_ONCE];
    let mut messages: [libc::mmsghdr; MAX_AT_ONCE] = {
        let mut controls = controls.iter_mut();
        std::array::from_fn(|index| libc::mmsghdr {
            msg_hdr: message(
                std::slice::from_ref(&iovecs[index]),
                controls.next().expect("one for each message"),
            ),
            msg_len: 0,
        })
    };
    // SAFETY: as many messages as are named, each with live buffers of ours and their lengths.
    let came = unsafe {
        libc::recvmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            count as libc::c_uint,
            libc::MSG_DONTWAIT,
            std::ptr::null_mut(),
        )
    };
    let came = usize::try_from(came).map_err(|_| io::Error::last_os_error())?;
    for (index, message) in messages[..came].iter().enumerate() {
        // SAFETY: the kernel filled the message in.
        let tag = unsafe { tag(&message.msg_hdr) };
        let slot = slots.slot_mut(index);
        lens_bytes[index] = put_tag_back(slot, message.msg_len as usize, tag) as u32;
    }
    Ok(came)
}

/// Frames received with one call at most.
const MAX_AT_ONCE: usize = 32;

/// A message with these buffers, and room for what the kernel says beside it.
fn message(iovecs: &[libc::iovec], control: &mut Control) -> libc::msghdr {
    // SAFETY: plain data, valid when all zero.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = iovecs.as_ptr().cast_mut();
    message.msg_iovlen = iovecs.len();
    message.msg_control = (&raw mut *control).cast();
    message.msg_controllen = CONTROL_BYTES;
    message
}

/// A tag that the kernel took off a frame: its ethertype and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag([u16; 2]);

impl Tag {
    /// As it is in a frame.
    pub(super) fn bytes(self) -> [u8; TAG_ROOM_BYTES] {
        let [[a, b], [c, d]] = self.0.map(u16::to_be_bytes);
        [a, b, c, d]
    }
}

/// Room for one `tpacket_auxdata` behind its header.
const CONTROL_BYTES: usize = 64;

#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

/// # Safety
/// The kernel filled `message` in.
unsafe fn tag(message: &libc::msghdr) -> Option<Tag> {
    // SAFETY: as the caller says.
    let header = unsafe { libc::CMSG_FIRSTHDR(message).as_ref() }?;
    if (header.cmsg_level, header.cmsg_type) != (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
        return None;
    }
    // SAFETY: the kernel wrote this kind of data there, aligned or not.
    let data = unsafe {
        libc::CMSG_DATA(header)
            .cast::<libc::tpacket_auxdata>()
            .read_unaligned()
    };
    let has = |flag: libc::__u32| data.tp_status & flag != 0;
    let ethertype = match has(libc::TP_STATUS_VLAN_TPID_VALID) {
        true => data.tp_vlan_tpid,
        false => libc::ETH_P_8021Q as u16,
    };
    has(libc::TP_STATUS_VLAN_VALID).then_some(Tag([ethertype, data.tp_vlan_tci]))
}

/// Puts a tag back into header and frame in the first `len` bytes of `slot`, if there is one; how long they are
/// then.
fn put_tag_back(slot: &mut [u8], len: usize, tag: Option<Tag>) -> usize {
    let at = HEADER_LEN_BYTES + TAG_AT;
    let Some(tag) = tag.filter(|_| len >= at) else {
        return len;
    };
    slot.copy_within(at..len, at + TAG_ROOM_BYTES);
    slot[at..at + TAG_ROOM_BYTES].copy_from_slice(&tag.bytes());
    lengthen(&mut slot[..HEADER_LEN_BYTES]);
    len + TAG_ROOM_BYTES
}

/// Makes `header` that of a frame which has got a tag.
pub(super) fn lengthen(header: &mut [u8]) {
    // hdr_len and csum_start.
    for at in [2, 6] {
        let value = u16::from_le_bytes([header[at], header[at + 1]]);
        if value != 0 {
            let value = value.saturating_add(TAG_ROOM_BYTES as u16);
            header[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// The guest's addresses are not the interface's.
fn join_all(socket: &OwnedFd, index: libc::c_int) -> io::Result<()> {
    let membership = libc::packet_mreq {
        mr_ifindex: index,
        mr_type: libc::PACKET_MR_PROMISC as u16,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    let name = libc::PACKET_ADD_MEMBERSHIP;
    set(socket, libc::SOL_PACKET, name, &membership)
}

/// Passes everything but what is for the interface's own address.
fn ignore_address(socket: &OwnedFd, bound: &libc::sockaddr_ll) -> io::Result<()> {
    if usize::from(bound.sll_halen) != MAC_BYTES {
        return Ok(());
    }
    let [a, b, c, d, e, f, ..] = bound.sll_addr;
    let high = u32::from_be_bytes([a, b, c, d]);
    let low = u32::from(u16::from_be_bytes([e, f]));
    attach(
        socket,
        &[
            statement(LOAD_WORD, 0),
            jump_unless_equal(high, 3),
            statement(LOAD_HALF, 4),
            jump_unless_equal(low, 1),
            statement(RETURN, 0),
            statement(RETURN, u32::MAX),
        ],
    )
}

fn receive_nothing(socket: &OwnedFd) -> io::Result<()> {
    attach(socket, &[statement(RETURN, 0)])
}

fn attach(socket: &OwnedFd, program: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

const LOAD_WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const LOAD_HALF: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

fn jump_unless_equal(k: u32, skip: u8) -> libc::sock_filter {
    libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt: 0,
        jf: skip,
        k,
    }
}

fn set<T>(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the value is live and of that length; what it points to is, for the call.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    })
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Packet sockets that cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PacketError {
    #[error("there is no interface {0:?}; ip link lists them")]
    NoInterface(String),
    #[error(
        "not permitted to open packet sockets; give the program the capability (setcap \
         cap_net_raw+ep) or pass it sockets that are open"
    )]
    NotPermitted(#[source] io::Error),
    #[error("cannot open a packet socket on the interface")]
    Open(#[source] io::Error),
    #[error("{0} descriptors; give one for each queue pair, {MAX_QUEUE_PAIRS} at most")]
    BadCount(usize),
    #[error("the descriptor is no packet socket (AF_PACKET, SOCK_RAW)")]
    NoPacketSocket,
    #[error("the packet socket is not bound to an interface")]
    NotBound,
    #[error("the packet sockets are bound to different interfaces")]
    SeveralInterfaces,
    #[error("the kernel refuses to set up the packet socket; Linux 4.20 or newer is needed")]
    Option(#[source] io::Error),
    #[error("no descriptors left to tell queues of changes")]
    Event(#[source] io::Error),
}
