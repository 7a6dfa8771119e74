//! One session: its connections to one export, which see each other's writes.

use std::fmt;
use std::time::Instant;

use super::error::ConnectError;
use super::handshake::{Established, Export, Wanted, shake_hands};
use super::options::{Dial, Options};
use super::random::random_bytes;
use crate::Generation;
use crate::wire::{BootId, Claim, transmission};

/// Who connects, and as what.
pub(super) struct Owner {
    dialer: Box<dyn Dial>,
    options: Options,
    instance: u128,
    epoch: u64,
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Owner")
            .field("options", &self.options)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

/// Connections that stand, all to the same export.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) links: Vec<Established>,
    pub(super) export: Export,
    pub(super) boot_id: Option<BootId>,
}

impl Owner {
    pub(super) fn new(dialer: Box<dyn Dial>, options: Options) -> Self {
        Self {
            dialer,
            options,
            instance: u128::from_ne_bytes(random_bytes()),
            epoch: 0,
        }
    }

    pub(super) fn options(&self) -> &Options {
        &self.options
    }

    /// The sessions that follow take the place of those before.
    pub(super) fn next_epoch(&mut self) {
        self.epoch += 1;
    }

    pub(super) fn open_session(&mut self) -> Result<Session, ConnectError> {
        let first = self.open_link()?;
        let (export, boot_id) = (first.export, first.boot_id);
        let has = |flag| export.flags & flag != 0;
        if has(transmission::READ_ONLY) && !self.options.read_only {
            return Err(ConnectError::ReadOnly);
        }
        if self.options.every_write_durable
            && !self.options.read_only
            && !has(transmission::SEND_FUA)
        {
            return Err(ConnectError::NoFua);
        }
        let mut links = vec![first];
        if has(transmission::CAN_MULTI_CONN) {
            while links.len() < self.options.connections {
                match self.open_link() {
                    Ok(link) if link.export == export => links.push(link),
                    Ok(_) => return Err(ConnectError::Changed("one disk on all connections")),
                    // A server may limit them; one is enough.
                    Err(error) => {
                        tracing::debug!("no further connection: {}", error.describe());
                        break;
                    }
                }
            }
        }
        Ok(Session {
            links,
            export,
            boot_id,
        })
    }

    fn open_link(&mut self) -> Result<Established, ConnectError> {
        let deadline = Instant::now() + self.options.handshake_timeout;
        let socket = self.dialer.dial(deadline).map_err(ConnectError::Dial)?;
        let wanted = Wanted {
            export: &self.options.export,
            tls: self.options.tls.as_ref(),
            claim: self.options.generation.map(|Generation(generation)| Claim {
                generation,
                instance: self.instance,
                epoch: self.epoch,
            }),
        };
        shake_hands(socket, &wanted, deadline).map_err(ConnectError::Handshake)
    }
}
