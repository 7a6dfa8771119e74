//! What waits while the server is away, when nobody wants it any more.

use std::sync::atomic::AtomicBool;

use super::*;

/// A request that holds its client, as disks' requests do.
struct Holding {
    _client: Arc<Client>,
    command: Command,
    is_abandoned: Arc<AtomicBool>,
    done: mpsc::Sender<Result<(), i32>>,
}

impl Request for Holding {
    fn command(&self) -> Command {
        self.command
    }

    fn payload(&mut self, _: usize, into: &mut [u8]) {
        into.fill(9);
    }

    fn store(&mut self, _: usize, _: &[u8]) {}

    fn is_abandoned(&self) -> bool {
        self.is_abandoned.load(Ordering::Acquire)
    }

    fn complete(self: Box<Self>, result: Result<(), i32>) {
        let _ = self.done.send(result);
    }
}

/// A client that lost its server with a write under way.
struct Outage {
    client: Arc<Client>,
    links: Sender<UnixStream>,
    is_abandoned: Arc<AtomicBool>,
    answer: Receiver<Result<(), i32>>,
}

impl Outage {
    fn new() -> Self {
        let (links, dialer) = dialer();
        let link = fake(|mut server| {
            read_request(&mut server);
        });
        links.send(link).unwrap();
        let client = Arc::new(connect(dialer, options()).unwrap().start("t").unwrap());
        let (done, answer) = mpsc::channel();
        let is_abandoned = Arc::new(AtomicBool::new(false));
        client.submit(Box::new(Holding {
            _client: Arc::clone(&client),
            command: Command::Write {
                offset_bytes: 0,
                len_bytes: 512,
                fua: false,
            },
            is_abandoned: Arc::clone(&is_abandoned),
            done,
        }));
        await_true("the outage is noticed", || {
            matches!(client.status().state, State::Reconnecting { .. })
        });
        assert!(answer.try_recv().is_err(), "an outage is no answer");
        Self {
            client,
            links,
            is_abandoned,
            answer,
        }
    }
}

#[test]
fn abandoned_client_ends_in_an_outage_and_replays_nothing() {
    let file = image(MIB);
    let own = Own::start(&file, MIB, None);
    let outage = Outage::new();
    outage.client.abandon();
    assert_eq!(
        outage.answer.recv_timeout(DEADLINE).unwrap(),
        Err(libc::ESHUTDOWN)
    );
    let shared = Arc::downgrade(&outage.client.shared);
    assert!(outage.client.perform(Command::Flush).is_err());
    // The server is back.
    let _ = outage.links.send(own.link());
    drop(outage);
    await_true("the client's thread ends", || shared.strong_count() == 0);
    let mut found = [0; 512];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut found, 0).unwrap();
    assert_eq!(found, [0; 512], "a write of a client that was let go");
}

#[test]
fn request_that_nobody_awaits_ends_in_an_outage_and_is_not_sent_again() {
    let file = image(MIB);
    let own = Own::start(&file, MIB, None);
    let outage = Outage::new();
    outage.client.release_abandoned();
    assert!(outage.answer.try_recv().is_err(), "it is awaited");
    outage.is_abandoned.store(true, Ordering::Release);
    outage.client.release_abandoned();
    assert_eq!(
        outage.answer.recv_timeout(DEADLINE).unwrap(),
        Err(libc::ECANCELED)
    );
    outage.links.send(own.link()).unwrap();
    assert_eq!(outage.client.read_at(0, 512).unwrap(), vec![0; 512]);
}
