//! Says what TCP knows of a connection on which nothing moves.

use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use guest::report::print_line;

/// A healthy connection never rests for so long, unless its cable is out.
const STALL: Duration = Duration::from_secs(10);

/// Watches until it is dropped.
pub(crate) struct Watch {
    _end: Sender<()>,
}

impl Watch {
    /// Prints a line for each time that passed without a byte.
    pub(crate) fn over(stream: &TcpStream) -> Self {
        let (end, ended) = channel::<()>();
        if let Ok(stream) = stream.try_clone() {
            let socket = OwnedFd::from(stream);
            thread::spawn(move || {
                let mut moved = 0;
                while ended.recv_timeout(STALL) == Err(RecvTimeoutError::Timeout) {
                    let Some(info) = tcp_info(&socket) else {
                        return;
                    };
                    let now = info.tcpi_bytes_acked + info.tcpi_bytes_received;
                    if now == moved {
                        print_line(&stalled(&info));
                    }
                    moved = now;
                }
            });
        }
        Self { _end: end }
    }
}

fn stalled(info: &libc::tcp_info) -> String {
    format!(
        "nothing moved for {} s: state {}, acknowledged {}, received {}, unacknowledged {} segments, \
         lost {}, retransmitted {}, back-off {}, timeout {} ms, window {}, last sent {} ms ago, \
         last heard {} ms ago",
        STALL.as_secs(),
        info.tcpi_state,
        info.tcpi_bytes_acked,
        info.tcpi_bytes_received,
        info.tcpi_unacked,
        info.tcpi_lost,
        info.tcpi_total_retrans,
        info.tcpi_backoff,
        info.tcpi_rto / 1000,
        info.tcpi_snd_cwnd,
        info.tcpi_last_data_sent,
        info.tcpi_last_ack_recv,
    )
}

fn tcp_info(socket: &OwnedFd) -> Option<libc::tcp_info> {
    // SAFETY: all zeroes is a value of this plain structure.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `info`, which is that large.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    (result == 0).then_some(info)
}
