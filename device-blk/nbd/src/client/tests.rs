//! The client against servers that are ours, silent, slow or hostile.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::Generation;
use crate::server::{self, Fence, FileExport, Server};

mod outage;

const DEADLINE: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;

/// Hands out connections that a test puts in.
struct Queue(Receiver<UnixStream>);

impl Dial for Queue {
    fn dial(&mut self, deadline: Instant) -> io::Result<OwnedFd> {
        let patience = deadline.saturating_duration_since(Instant::now());
        self.0
            .recv_timeout(patience.min(Duration::from_millis(200)))
            .map(OwnedFd::from)
            .map_err(io::Error::other)
    }
}

fn dialer() -> (Sender<UnixStream>, Box<dyn Dial>) {
    let (sender, receiver) = channel();
    (sender, Box::new(Queue(receiver)))
}

fn options() -> Options {
    Options {
        export: "disk".into(),
        handshake_timeout: Duration::from_secs(5),
        ..Options::default()
    }
}

fn await_true(what: &str, mut condition: impl FnMut() -> bool) {
    let give_up = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < give_up, "not within {DEADLINE:?}: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A server of ours over a file that outlives it.
struct Own {
    server: Arc<Server>,
    address: crate::Address,
    _place: tempfile::TempDir,
}

impl Own {
    fn start(file: &std::fs::File, size_bytes: u64, fence: Option<Fence>) -> Self {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("nbd");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let export = FileExport::new(file.try_clone().unwrap(), size_bytes, false);
        let options = server::Options {
            name: "disk".into(),
            tls: None,
            fence,
            max_connections: 16,
            disk_threads: 2,
            boot_id: [7; 16],
        };
        let server = Arc::new(Server::new(Arc::new(export), options).unwrap());
        let running = Arc::clone(&server);
        thread::spawn(move || running.run(listener.into()).unwrap());
        let address = crate::Address::Unix(path);
        Self {
            server,
            address,
            _place: place,
        }
    }

    fn link(&self) -> UnixStream {
        self.address
            .connect(Instant::now() + DEADLINE)
            .unwrap()
            .into()
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        assert!(self.server.stop(DEADLINE));
    }
}

fn image(size_bytes: u64) -> std::fs::File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size_bytes).unwrap();
    file
}

#[test]
fn data_comes_back_and_lands_in_the_file() {
    let file = image(8 * MIB);
    let own = Own::start(&file, 8 * MIB, None);
    let (links, dialer) = dialer();
    for _ in 0..3 {
        links.send(own.link()).unwrap();
    }
    let connections = 3;
    let client = connect(
        dialer,
        Options {
            connections,
            ..options()
        },
    )
    .unwrap()
    .start("t")
    .unwrap();
    assert_eq!(client.size_bytes(), 8 * MIB);
    assert_eq!(client.status().connections, 3);
    let data: Vec<u8> = (0..3 * MIB).map(|at| (at % 251) as u8).collect();
    client.write_at(512, data.clone()).unwrap();
    assert_eq!(client.read_at(512, data.len() as u32).unwrap(), data);
    let zeroes = Command::WriteZeroes {
        offset_bytes: 4096,
        len_bytes: 8192,
        may_unmap: true,
        fua: true,
    };
    client.perform(zeroes).unwrap();
    client.perform(Command::Flush).unwrap();
    let trim = Command::Trim {
        offset_bytes: MIB,
        len_bytes: 4096,
    };
    client.perform(trim).unwrap();
    assert_eq!(client.read_at(4096, 8192).unwrap(), vec![0; 8192]);
    let mut found = vec![0; 3584];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut found, 512).unwrap();
    assert_eq!(found, data[..3584]);
}

#[test]
fn requests_outside_of_the_disk_are_refused_at_once() {
    let file = image(MIB);
    let own = Own::start(&file, MIB, None);
    let (links, dialer) = dialer();
    links.send(own.link()).unwrap();
    let client = connect(dialer, options()).unwrap().start("t").unwrap();
    assert_eq!(client.read_at(MIB - 512, 1024), Err(libc::EINVAL));
    assert_eq!(client.read_at(u64::MAX - 1, 512), Err(libc::EINVAL));
    assert_eq!(client.read_at(0, 0), Err(libc::EINVAL));
    assert_eq!(
        client.read_at(0, client.max_payload_bytes() + 512),
        Err(libc::EINVAL)
    );
    assert_eq!(client.read_at(0, 512).unwrap(), vec![0; 512]);
}

/// Forwards a connection until told to cut it, by a pair of threads.
fn cut_after(server: UnixStream, bytes_to_client: usize) -> UnixStream {
    let (ours, client) = UnixStream::pair().unwrap();
    server.set_nonblocking(false).unwrap();
    let (mut up_from, mut up_to) = (ours.try_clone().unwrap(), server.try_clone().unwrap());
    thread::spawn(move || {
        let _ = io::copy(&mut up_from, &mut up_to);
        let _ = up_to.shutdown(std::net::Shutdown::Write);
    });
    thread::spawn(move || {
        let mut limited = server.take(bytes_to_client as u64);
        let mut to = ours;
        let _ = io::copy(&mut limited, &mut to);
        let _ = to.shutdown(std::net::Shutdown::Both);
        let _ = limited.into_inner().shutdown(std::net::Shutdown::Both);
    });
    client
}

#[test]
fn connections_cut_anywhere_cost_no_request() {
    let file = image(MIB);
    /// Lets the handshake pass, then less than one answer more each time.
    struct Cutting(crate::Address, usize);
    impl Dial for Cutting {
        fn dial(&mut self, deadline: Instant) -> io::Result<OwnedFd> {
            let link = UnixStream::from(self.0.connect(deadline)?);
            self.1 += 1;
            Ok(cut_after(link, 400 + self.1 * 517).into())
        }
    }
    let own = Own::start(&file, MIB, None);
    let dialer = Box::new(Cutting(own.address.clone(), 0));
    let client = connect(dialer, options()).unwrap().start("t").unwrap();
    for round in 0..64_u64 {
        let data = vec![round as u8 + 1; 8192];
        client.write_at(round * 8192, data.clone()).unwrap();
        assert_eq!(client.read_at(round * 8192, 8192).unwrap(), data);
    }
    assert!(client.status().reconnects >= 10, "{:?}", client.status());
}

#[test]
fn stale_owner_fails_and_newer_one_goes_on() {
    let file = image(MIB);
    let fence = Fence::open(tempfile::tempfile().unwrap()).unwrap();
    let own = Own::start(&file, MIB, Some(fence));
    let owner = |generation| {
        let (links, dialer) = dialer();
        links.send(own.link()).unwrap();
        links.send(own.link()).unwrap();
        let generation = Some(Generation(generation));
        let options = Options {
            generation,
            ..options()
        };
        connect(dialer, options).map(|connected| connected.start("t").unwrap())
    };
    let old = owner(4).unwrap();
    old.write_at(0, vec![1; 512]).unwrap();
    let new = owner(5).unwrap();
    assert_eq!(old.write_at(0, vec![2; 512]), Err(libc::EIO));
    assert!(matches!(old.status().state, State::Failed { .. }));
    assert_eq!(old.read_at(0, 512), Err(libc::EIO));
    assert_eq!(new.read_at(0, 512).unwrap(), vec![1; 512]);
    let error = owner(4).unwrap_err();
    assert!(error.is_final());
    assert!(error.describe().contains("stale"), "{}", error.describe());
    new.write_at(0, vec![3; 512]).unwrap();
}

#[test]
fn generation_is_not_presented_in_vain() {
    let file = image(MIB);
    let own = Own::start(&file, MIB, None);
    let (links, dialer) = dialer();
    links.send(own.link()).unwrap();
    let options = Options {
        generation: Some(Generation(1)),
        ..options()
    };
    let error = connect(dialer, options).unwrap_err();
    assert!(
        error.describe().contains("does not check generations"),
        "{}",
        error.describe()
    );
}

#[test]
fn shrunken_export_is_not_used_until_it_is_restored() {
    let file = image(2 * MIB);
    let (links, dialer) = dialer();
    let own = Own::start(&file, 2 * MIB, None);
    links.send(own.link()).unwrap();
    let client = connect(dialer, options()).unwrap().start("t").unwrap();
    drop(own);
    let small = Own::start(&file, MIB, None);
    links.send(small.link()).unwrap();
    await_true("the size is complained about", || {
        matches!(client.status().state, State::Reconnecting { reason }
            if reason.contains("2097152") && reason.contains("1048576"))
    });
    let own = Own::start(&file, 3 * MIB, None);
    links.send(own.link()).unwrap();
    assert_eq!(client.read_at(MIB, 512).unwrap(), vec![0; 512]);
    assert_eq!(client.size_bytes(), 3 * MIB);
}

/// Shakes hands as a server, with structured replies, and lets `then` go on.
fn fake(then: impl FnOnce(UnixStream) + Send + 'static) -> UnixStream {
    let (client, mut server) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        server.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut out = Vec::new();
        out.extend_from_slice(&crate::wire::NBD_MAGIC.to_be_bytes());
        out.extend_from_slice(&crate::wire::OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&3_u16.to_be_bytes());
        server.write_all(&out).unwrap();
        server.read_exact(&mut [0; 4]).unwrap();
        loop {
            let mut header = [0; 16];
            if server.read_exact(&mut header).is_err() {
                return;
            }
            let option = crate::wire::be32(&header, 8);
            let mut payload = vec![0; crate::wire::be32(&header, 12) as usize];
            server.read_exact(&mut payload).unwrap();
            if option == crate::wire::option::CLAIM {
                let claimed = crate::wire::reply::CLAIMED;
                server.write_all(&reply(option, claimed, &[7; 16])).unwrap();
            }
            if option == crate::wire::option::GO {
                let mut export = vec![0, 0];
                export.extend_from_slice(&MIB.to_be_bytes());
                export.extend_from_slice(&0x6d_u16.to_be_bytes());
                server.write_all(&reply(option, 3, &export)).unwrap();
            }
            server.write_all(&reply(option, 1, &[])).unwrap();
            if option == crate::wire::option::GO {
                return then(server);
            }
        }
    });
    client
}

fn reply(option: u32, kind: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = crate::wire::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    for number in [option, kind, payload.len() as u32] {
        out.extend_from_slice(&number.to_be_bytes());
    }
    out.extend_from_slice(payload);
    out
}

fn read_request(server: &mut UnixStream) -> crate::wire::RequestHeader {
    let mut bytes = [0; crate::wire::RequestHeader::BYTES];
    server.read_exact(&mut bytes).unwrap();
    crate::wire::RequestHeader::decode(&bytes).unwrap()
}

fn chunk(kind: u16, flags: u16, cookie: u64, body: &[u8]) -> Vec<u8> {
    let head = crate::wire::ChunkHeader {
        flags,
        kind,
        cookie,
        len_bytes: body.len() as u32,
    };
    let mut out = head.encode().to_vec();
    out.extend_from_slice(body);
    out
}

/// Each answers a 4096-byte read at 4096 in its own wrong way; the client drops the connection
/// and gets the data from the next server.
#[test]
fn wrong_answers_end_the_connection_and_no_request() {
    type Answer = fn(u64) -> Vec<u8>;
    let answers: &[(&str, Answer)] = &[
        ("wrong cookie", |cookie| chunk(0, 1, cookie + 128, &[])),
        ("slot that is free", |cookie| chunk(0, 1, cookie + 1, &[])),
        ("wrong magic", |_| vec![0x55; 64]),
        ("simple reply", |cookie| {
            crate::wire::encode_simple_reply(0, cookie).to_vec()
        }),
        ("unknown kind", |cookie| chunk(77, 1, cookie, &[])),
        ("block status", |cookie| chunk(5, 1, cookie, &[0; 12])),
        ("data before the range", |cookie| {
            let mut body = 0_u64.to_be_bytes().to_vec();
            body.extend_from_slice(&[1; 512]);
            chunk(1, 1, cookie, &body)
        }),
        ("data beyond the range", |cookie| {
            let mut body = 4608_u64.to_be_bytes().to_vec();
            body.extend_from_slice(&[1; 4096]);
            chunk(1, 1, cookie, &body)
        }),
        ("offset that overflows", |cookie| {
            let mut body = u64::MAX.to_be_bytes().to_vec();
            body.extend_from_slice(&[1; 512]);
            chunk(1, 1, cookie, &body)
        }),
        ("data twice", |cookie| {
            let mut body = 4096_u64.to_be_bytes().to_vec();
            body.extend_from_slice(&[1; 512]);
            [chunk(1, 0, cookie, &body), chunk(1, 1, cookie, &body)].concat()
        }),
        ("overlong hole", |cookie| {
            let mut body = 4096_u64.to_be_bytes().to_vec();
            body.extend_from_slice(&u32::MAX.to_be_bytes());
            chunk(2, 1, cookie, &body)
        }),
        ("overlong error", |cookie| {
            chunk(0x8001, 1, cookie, &[0; 5000])
        }),
        ("short error", |cookie| chunk(0x8001, 1, cookie, &[0; 3])),
        ("chunk without end", |cookie| chunk(0, 0, cookie, &[])),
        ("half an answer", |cookie| {
            chunk(1, 1, cookie, &[0; 300])[..100].to_vec()
        }),
    ];
    let file = image(MIB);
    let own = Own::start(&file, MIB, None);
    for (what, answer) in answers {
        let (links, dialer) = dialer();
        let answer = *answer;
        let link = fake(move |mut server| {
            let request = read_request(&mut server);
            server.write_all(&answer(request.cookie)).unwrap();
            let _ = server.shutdown(std::net::Shutdown::Write);
            let _ = server.read(&mut [0; 1]);
        });
        links.send(link).unwrap();
        links.send(own.link()).unwrap();
        let client = connect(dialer, options()).unwrap().start("t").unwrap();
        assert_eq!(
            client.read_at(4096, 4096).as_deref(),
            Ok(&[0; 4096][..]),
            "{what}"
        );
        assert_eq!(client.status().reconnects, 1, "{what}");
    }
}

#[test]
fn read_with_a_gap_is_an_error() {
    let (links, dialer) = dialer();
    let link = fake(|mut server| {
        let request = read_request(&mut server);
        let mut body = request.offset_bytes.to_be_bytes().to_vec();
        body.extend_from_slice(&[1; 512]);
        server
            .write_all(&chunk(1, 1, request.cookie, &body))
            .unwrap();
        let request = read_request(&mut server);
        let hole = |offset: u64, len: u32| {
            let mut body = offset.to_be_bytes().to_vec();
            body.extend_from_slice(&len.to_be_bytes());
            body
        };
        let mut answer = chunk(2, 0, request.cookie, &hole(512, 512));
        answer.extend(chunk(2, 0, request.cookie, &hole(0, 512)));
        answer.extend(chunk(0, 1, request.cookie, &[]));
        server.write_all(&answer).unwrap();
        let _ = server.read(&mut [0; 1]);
    });
    links.send(link).unwrap();
    let client = connect(dialer, options()).unwrap().start("t").unwrap();
    assert_eq!(client.read_at(0, 1024), Err(libc::EIO));
    assert_eq!(client.read_at(0, 1024).unwrap(), vec![0; 1024]);
}

#[test]
fn silent_server_is_waited_for() {
    let (links, dialer) = dialer();
    let (go_on, may_go_on) = channel();
    let link = fake(move |mut server| {
        let request = read_request(&mut server);
        may_go_on.recv_timeout(DEADLINE).unwrap();
        server.write_all(&chunk(0, 1, request.cookie, &[])).unwrap();
        let _ = server.read(&mut [0; 1]);
    });
    links.send(link).unwrap();
    let options = Options {
        stall_timeout: Duration::from_millis(50),
        ..options()
    };
    let client = Arc::new(connect(dialer, options).unwrap().start("t").unwrap());
    let caller = Arc::clone(&client);
    let flush = thread::spawn(move || caller.perform(Command::Flush));
    await_true("the silence is noticed", || {
        client.status().state == State::Stalled
    });
    go_on.send(()).unwrap();
    assert_eq!(flush.join().unwrap(), Ok(()));
    assert_eq!(client.status().state, State::Serving);
    assert_eq!(client.status().reconnects, 0);
}

/// Where the server orders sessions.
#[test]
fn silent_connection_is_given_up_for_another() {
    let file = image(MIB);
    let fence = Fence::open(tempfile::tempfile().unwrap()).unwrap();
    let own = Own::start(&file, MIB, Some(fence));
    let (links, dialer) = dialer();
    let (closed, is_closed) = channel();
    let link = fake(move |mut server| {
        read_request(&mut server);
        // The end of the client's half is the sign that it has lost patience.
        assert_eq!(server.read(&mut [0; 1]).unwrap(), 0);
        closed.send(server).unwrap();
    });
    links.send(link).unwrap();
    let options = Options {
        generation: Some(Generation(1)),
        stall_timeout: Duration::from_millis(50),
        ..options()
    };
    let client = connect(dialer, options).unwrap().start("t").unwrap();
    links.send(own.link()).unwrap();
    assert_eq!(client.read_at(0, 512).unwrap(), vec![0; 512]);
    // Which was kept open all the time.
    is_closed.recv_timeout(DEADLINE).unwrap();
}

#[test]
fn greetings_of_all_kinds_end_in_time() {
    let greetings: &[&[u8]] = &[
        b"",
        b"NBDMAGIC",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        &[0xff; 4096],
        b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00\x00\x00\x00\x10\x00\x00",
        b"NBDMAGICIHAVEOPT\x00\x00",
        b"NBDMAGICIHAVEOPT\x00\x03\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x08\x00\x00\x00\x01\xff\xff\xff\xff",
    ];
    for greeting in greetings {
        let (links, dialer) = dialer();
        let (client, mut server) = UnixStream::pair().unwrap();
        server.write_all(greeting).unwrap();
        links.send(client).unwrap();
        let options = Options {
            handshake_timeout: Duration::from_millis(100),
            ..options()
        };
        let began = Instant::now();
        assert!(matches!(
            connect(dialer, options),
            Err(ConnectError::Handshake(_))
        ));
        assert!(began.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn random_bytes_never_end_the_client() {
    for seed in 0..50_u64 {
        let (links, dialer) = dialer();
        let link = fake(move |mut server| {
            let request = read_request(&mut server);
            let mut state = seed * 0x9e37_79b9_7f4a_7c15 + 1;
            let mut bytes = chunk(1, 0, request.cookie, &[]);
            bytes.extend((0..2000).map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state as u8
            }));
            bytes[(seed % 20) as usize] ^= seed as u8;
            let _ = server.write_all(&bytes);
        });
        links.send(link).unwrap();
        let client = connect(dialer, options()).unwrap().start("t").unwrap();
        let (done, answer) = mpsc::sync_channel(1);
        client.submit(Box::new(Awaited {
            command: Command::Read {
                offset_bytes: 0,
                len_bytes: 512,
            },
            data: vec![0; 512],
            done,
        }));
        await_true("the connection is given up", || {
            client.status().reconnects > 0 || answer.try_recv().is_ok()
        });
        drop(client);
    }
}

#[test]
fn dropped_client_answers_what_waits() {
    let (links, dialer) = dialer();
    let link = fake(|mut server| {
        read_request(&mut server);
        let _ = server.read(&mut [0; 1]);
    });
    links.send(link).unwrap();
    let client = connect(dialer, options()).unwrap().start("t").unwrap();
    let (done, answer) = mpsc::sync_channel(1);
    client.submit(Box::new(Awaited {
        command: Command::Flush,
        data: Vec::new(),
        done,
    }));
    drop(client);
    assert_eq!(answer.recv_timeout(DEADLINE).unwrap(), Err(libc::ESHUTDOWN));
}
