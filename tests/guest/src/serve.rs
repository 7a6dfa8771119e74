//! The other end of [`Job::Net`](guest::plan::Job::Net) and [`Job::Udp`](guest::plan::Job::Udp), in
//! the background.

use std::net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use guest::datagrams;
use guest::exchange::as_host;
use guest::report::Report;

use crate::stall::Watch;

/// A peer that says nothing for so long is given up.
const LIMIT: Duration = Duration::from_secs(60);

/// Listens on all addresses, of both families, until the guest ends.
pub(crate) fn start(port: u16, seed: u64, bytes: u64) -> Report {
    let any = (Ipv6Addr::UNSPECIFIED, port);
    let sockets = TcpListener::bind(any).and_then(|tcp| Ok((tcp, UdpSocket::bind(any)?)));
    let error = match sockets {
        Ok((tcp, udp)) => {
            thread::spawn(move || serve(&tcp, seed, bytes));
            thread::spawn(move || {
                if let Err(error) = datagrams::answer(&udp) {
                    guest::report::print_line(&format!("UDP port {port}: {error}"));
                }
            });
            None
        }
        Err(error) => Some(format!("cannot listen on port {port}: {error}")),
    };
    Report::Serve { port, error }
}

fn serve(listener: &TcpListener, seed: u64, bytes: u64) {
    for stream in listener.incoming().flatten() {
        thread::spawn(move || {
            if let Some(report) = one(stream, seed, bytes) {
                report.print();
            }
        });
    }
}

/// `None` for a connection on which nothing was said: somebody looked whether there is one.
fn one(stream: TcpStream, seed: u64, bytes: u64) -> Option<Report> {
    let deadlines = stream
        .set_read_timeout(Some(LIMIT))
        .and_then(|()| stream.set_write_timeout(Some(LIMIT)));
    if matches!(stream.peek(&mut [0]), Ok(0)) {
        return None;
    }
    let _watch = Watch::over(&stream);
    let error = deadlines
        .map_err(|error| format!("socket: {error}"))
        .and_then(|()| as_host(stream, seed, bytes))
        .err();
    Some(Report::Served { bytes, error })
}
