//! Requests on their way to the server.

use std::time::Instant;

use super::Link;
use super::coverage::Coverage;
use super::inflight::{Inflight, cookie};
use crate::client::request::{Command, Request};
use crate::wire::{RequestHeader, command, transmission};

impl Link<'_> {
    pub(super) fn frame_requests(&mut self) {
        while self.takes_requests() {
            let Some(request) = self.terms.inbox.pop() else {
                return;
            };
            if request.is_abandoned() {
                request.complete(Err(libc::ECANCELED));
            } else {
                self.frame(request);
            }
        }
    }

    fn frame(&mut self, mut request: Box<dyn Request>) {
        let asked = request.command();
        let can = |flag: u16| self.terms.flags & flag != 0;
        let fua_flag = |fua: bool| {
            if (fua || self.terms.every_write_durable) && can(transmission::SEND_FUA) {
                command::FLAG_FUA
            } else {
                0
            }
        };
        let (code, flags) = match asked {
            Command::Read { .. } => (command::READ, 0),
            Command::Write { fua, .. } => (command::WRITE, fua_flag(fua)),
            Command::WriteZeroes { fua, may_unmap, .. } => {
                let no_hole = if may_unmap { 0 } else { command::FLAG_NO_HOLE };
                (command::WRITE_ZEROES, fua_flag(fua) | no_hole)
            }
            // Advice that cannot be followed is no failure.
            Command::Trim { .. } if !can(transmission::SEND_TRIM) => {
                return request.complete(Ok(()));
            }
            Command::Trim { .. } => (command::TRIM, 0),
            // Nothing is cached by a server without this flag.
            Command::Flush if !can(transmission::SEND_FLUSH) => {
                return request.complete(self.terms.ledger.may_flush());
            }
            Command::Flush => match self.terms.ledger.may_flush() {
                Ok(()) => (command::FLUSH, 0),
                refused => return request.complete(refused),
            },
        };
        let (offset_bytes, len_bytes) = asked.range().unwrap_or((0, 0));
        let slot = self
            .free
            .pop_front()
            .expect("takes_requests looked for a free slot");
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        if self.inflight() == 1 {
            self.last_progress = Instant::now();
        }
        let header = RequestHeader {
            flags,
            command: code,
            cookie: cookie(sequence, slot),
            offset_bytes,
            len_bytes,
        };
        self.channel.put(&header.encode());
        if matches!(asked, Command::Write { .. }) {
            self.channel
                .put_with(len_bytes as usize, |into| request.payload(0, into));
        }
        self.slots[slot] = Some(Inflight {
            request,
            command: asked,
            sequence,
            received: Coverage::default(),
            error: None,
            mark: self.terms.ledger.mark(),
        });
    }
}
