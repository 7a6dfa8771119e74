//! What a client, its supervisor and its links know together.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::handshake::Export;
use super::ledger::Ledger;
use super::options::Options;
use super::request::Request;
use super::session::Session;
use crate::inbox::Inbox;

/// The state of one client, over all its sessions.
pub(super) struct Shared {
    /// One for each connection there may be.
    pub(super) inboxes: Vec<Inbox<Box<dyn Request>>>,
    /// How many of them have a connection in this session.
    pub(super) active_inboxes: AtomicUsize,
    pub(super) next_inbox: AtomicUsize,
    pub(super) ledger: Ledger,
    pub(super) size_bytes: AtomicU64,
    /// As it was at first.
    pub(super) export: Export,
    pub(super) options: Options,
    /// The links of the session are to end.
    pub(super) stop_session: AtomicBool,
    pub(super) is_closing: AtomicBool,
    /// Nothing will be served any more.
    pub(super) is_failed: AtomicBool,
    pub(super) is_stalled: AtomicBool,
    pub(super) reconnects: AtomicU64,
    situation: Mutex<Situation>,
    /// Ends pauses, and tells of the last session's end, with `situation`.
    pub(super) closing: Condvar,
}

pub(super) enum Situation {
    Serving { connections: usize },
    Reconnecting { reason: String },
    Failed { reason: String },
}

impl Shared {
    /// For `session`, which is served next.
    pub(super) fn new(session: &Session, options: &Options) -> io::Result<Self> {
        let inboxes = (0..options.connections)
            .map(|_| Inbox::new())
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            inboxes,
            active_inboxes: AtomicUsize::new(session.links.len()),
            next_inbox: AtomicUsize::new(0),
            ledger: Ledger::default(),
            size_bytes: AtomicU64::new(session.export.size_bytes),
            export: session.export,
            options: options.clone(),
            stop_session: AtomicBool::new(false),
            is_closing: AtomicBool::new(false),
            is_failed: AtomicBool::new(false),
            is_stalled: AtomicBool::new(false),
            reconnects: AtomicU64::new(0),
            situation: Mutex::new(Situation::Serving {
                connections: session.links.len(),
            }),
            closing: Condvar::new(),
        })
    }

    pub(super) fn has(&self, flag: u16) -> bool {
        self.export.flags & flag != 0
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Situation> {
        self.situation
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_closing(&self) -> bool {
        self.is_closing.load(Ordering::Acquire)
    }

    /// False when the client is closed instead.
    pub(super) fn pause(&self, duration: Duration) -> bool {
        let situation = self.lock();
        let waited = self
            .closing
            .wait_timeout_while(situation, duration, |_| !self.is_closing());
        drop(waited);
        !self.is_closing()
    }

    /// Requests of connections that this session does not have go to one that it has.
    pub(super) fn gather(&self, active: usize) {
        self.active_inboxes.store(active, Ordering::Release);
        for inbox in &self.inboxes[active..] {
            for request in inbox.take_all() {
                self.inboxes[0].push(request);
            }
        }
    }

    /// Answers what waits for a connection and is awaited by nobody.
    pub(super) fn release_abandoned(&self) {
        for inbox in &self.inboxes {
            for request in inbox.take_where(|request| request.is_abandoned()) {
                request.complete(Err(libc::ECANCELED));
            }
        }
    }

    /// Lets no session begin any more, and ends the one there is.
    pub(super) fn close(&self) {
        let situation = self.lock();
        self.is_closing.store(true, Ordering::SeqCst);
        self.stop_session.store(true, Ordering::SeqCst);
        self.closing.notify_all();
        drop(situation);
        for inbox in &self.inboxes {
            inbox.wake();
        }
    }

    /// Answers what waits, and lets `submit` answer what comes.
    pub(super) fn fail_for_good(&self, errno: i32) {
        self.is_failed.store(true, Ordering::SeqCst);
        self.fail_waiting(errno);
    }

    /// Waits until no connection is served.
    pub(super) fn await_disconnected(&self, patience: Duration) {
        let situation = self.lock();
        drop(
            self.closing
                .wait_timeout_while(situation, patience, |situation| {
                    matches!(situation, Situation::Serving { .. })
                }),
        );
    }

    pub(super) fn fail_waiting(&self, errno: i32) {
        for inbox in &self.inboxes {
            for request in inbox.take_all() {
                request.complete(Err(errno));
            }
        }
    }
}
