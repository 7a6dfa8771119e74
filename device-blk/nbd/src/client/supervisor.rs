//! Session after session: serves requests over one until it is lost, and opens the next.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::MAX_PAYLOAD_BYTES;
use super::error::ConnectError;
use super::handshake::Established;
use super::link::{self, Outcome};
use super::random::random_bytes;
use super::session::{Owner, Session};
use super::shared::{Shared, Situation};
use crate::wire::{BootId, transmission};

/// First pause before connecting again, doubled up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// Opens session after session.
pub(super) struct Supervisor {
    shared: Arc<Shared>,
    owner: Owner,
    boot_id: Option<BootId>,
    name: String,
}

impl Supervisor {
    /// Serves `first` and what follows it, on a thread of its own that is named after the disk.
    pub(super) fn start(
        shared: Arc<Shared>,
        owner: Owner,
        first: Session,
        name: &str,
    ) -> io::Result<()> {
        let supervisor = Self {
            shared,
            owner,
            boot_id: first.boot_id,
            name: name.to_owned(),
        };
        std::thread::Builder::new()
            .name(thread_name(name))
            .spawn(move || supervisor.run(first))
            .map(drop)
    }

    fn run(mut self, first: Session) {
        let mut session = first;
        loop {
            let lost = match self.shared.serve(session, &self.name) {
                Outcome::Stopped => return self.end(),
                Outcome::Fenced => {
                    return self.fail("the server says that another owner has taken over".into());
                }
                Outcome::Lost(error) => error,
            };
            self.shared.reconnects.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(
                disk = self.name,
                "NBD connection lost: {lost}; connecting again"
            );
            session = match self.reconnect(lost.to_string()) {
                Some(session) => session,
                None => return,
            };
            tracing::info!(
                disk = self.name,
                connections = session.links.len(),
                "NBD connection restored"
            );
        }
    }

    /// `None` when there will be no further session.
    fn reconnect(&mut self, mut reason: String) -> Option<Session> {
        let shared = Arc::clone(&self.shared);
        self.owner.next_epoch();
        let mut pause = FIRST_PAUSE;
        loop {
            *shared.lock() = Situation::Reconnecting {
                reason: reason.clone(),
            };
            if shared.is_closing() {
                self.end();
                return None;
            }
            // Nothing of theirs is carried out later: that connection is gone.
            shared.release_abandoned();
            shared.stop_session.store(false, Ordering::SeqCst);
            let attempt = self
                .owner
                .open_session()
                .and_then(|session| self.accept(session));
            let error = match attempt {
                Ok(session) => {
                    // Closing may have come between.
                    if shared.is_closing() {
                        shared.stop_session.store(true, Ordering::SeqCst);
                    }
                    return Some(session);
                }
                Err(error) => error,
            };
            if error.is_final() {
                self.fail(error.describe());
                return None;
            }
            if error.describe() != reason {
                reason = error.describe();
                tracing::warn!(disk = self.name, "{reason}; trying again");
            }
            // Many disks of one server do not come back in step.
            let [random] = random_bytes();
            let jitter = 0.75 + f64::from(random) / 512.0;
            if !shared.pause(pause.mul_f64(jitter)) {
                self.end();
                return None;
            }
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// Looks whether it is still the disk that the guest knows.
    fn accept(&mut self, session: Session) -> Result<Session, ConnectError> {
        let (was, is) = (&self.shared.export, &session.export);
        let was_bytes = self.shared.size_bytes.load(Ordering::Acquire);
        if is.size_bytes < was_bytes {
            return Err(ConnectError::Shrunk {
                was_bytes,
                is_bytes: is.size_bytes,
            });
        }
        let relied_on = transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::SEND_TRIM
            | transmission::SEND_WRITE_ZEROES;
        if was.flags & relied_on & !is.flags != 0 {
            return Err(ConnectError::Changed("flush, FUA, trim or write zeroes"));
        }
        if is.min_block_bytes > was.min_block_bytes
            || is.max_payload_bytes < was.max_payload_bytes.min(MAX_PAYLOAD_BYTES)
        {
            return Err(ConnectError::Changed("requests as small or as large"));
        }
        self.shared
            .size_bytes
            .store(is.size_bytes, Ordering::Release);
        if session.boot_id != self.boot_id && self.shared.ledger.host_restarted() {
            tracing::error!(
                disk = self.name,
                "the NBD server's host restarted and lost writes that were answered but not \
                 flushed; flushes fail from now on: check the file system and attach the disk \
                 again"
            );
        }
        self.boot_id = session.boot_id;
        Ok(session)
    }

    /// The client was closed.
    fn end(&self) {
        *self.shared.lock() = Situation::Failed {
            reason: "the disk was detached".into(),
        };
        self.shared.closing.notify_all();
        self.shared.fail_for_good(libc::ESHUTDOWN);
    }

    fn fail(&self, reason: String) {
        tracing::error!(disk = self.name, "NBD disk failed for good: {reason}");
        *self.shared.lock() = Situation::Failed { reason };
        self.shared.fail_for_good(libc::EIO);
    }
}

impl Shared {
    /// Serves requests until a connection of the session ends, and ends the others.
    fn serve(&self, session: Session, name: &str) -> Outcome {
        self.gather(session.links.len());
        *self.lock() = Situation::Serving {
            connections: session.links.len(),
        };
        let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
            let mut links = session.links.into_iter().enumerate();
            let first = links.next();
            let others: Vec<_> = links
                .map(|(index, link)| {
                    std::thread::Builder::new()
                        .name(thread_name(name))
                        .spawn_scoped(scope, move || self.serve_link(index, link))
                })
                .collect();
            let mut outcomes: Vec<_> = first
                .map(|(index, link)| self.serve_link(index, link))
                .into_iter()
                .collect();
            for other in others {
                outcomes.push(match other.map(|thread| thread.join()) {
                    Ok(Ok(outcome)) => outcome,
                    Ok(Err(_)) => Outcome::Lost(io::Error::other("a thread panicked")),
                    Err(error) => Outcome::Lost(error),
                });
            }
            outcomes
        });
        if self.is_closing() {
            return Outcome::Stopped;
        }
        let rank = |outcome: &Outcome| match outcome {
            Outcome::Fenced => 2,
            Outcome::Lost(_) => 1,
            Outcome::Stopped => 0,
        };
        match outcomes.into_iter().max_by_key(rank) {
            Some(Outcome::Stopped) | None => {
                Outcome::Lost(io::Error::other("the session ended by itself"))
            }
            Some(outcome) => outcome,
        }
    }

    fn serve_link(&self, index: usize, link: Established) -> Outcome {
        let terms = link::Terms {
            inbox: &self.inboxes[index],
            ledger: &self.ledger,
            stop: &self.stop_session,
            is_closing: &self.is_closing,
            is_stalled: &self.is_stalled,
            flags: link.export.flags,
            structured_replies: link.structured_replies,
            is_claimed: link.boot_id.is_some(),
            every_write_durable: self.options.every_write_durable,
            stall_timeout: self.options.stall_timeout,
        };
        let outcome = link::run(link.channel, &terms);
        self.stop_session.store(true, Ordering::SeqCst);
        for inbox in &self.inboxes {
            inbox.wake();
        }
        outcome
    }
}

/// The kernel keeps 15 bytes.
fn thread_name(name: &str) -> String {
    format!("nbd-{name}").chars().take(15).collect()
}
