//! From an accepted connection to the transmission phase, as the server.
//!
//! Fixed newstyle only. A peer has one deadline for all of it, a bounded number of options and
//! bounded lengths; what is wrong but well framed is answered with an error, anything else ends
//! the connection.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use super::Served;
use super::fence::Lease;
use crate::channel::Channel;
use crate::wire::{
    self, Claim, DEFAULT_MAX_PAYLOAD_BYTES, MAX_OPTION_BYTES, MAX_STRING_BYTES, be16, be32, be64,
    info, option, reply, transmission,
};

/// Options before a peer must have come to the point.
const MAX_OPTIONS: usize = 128;
/// Metadata contexts that one option may ask for.
const MAX_QUERIES: usize = 32;
/// The number that our one metadata context gets.
pub(super) const ALLOCATION_CONTEXT_ID: u32 = 1;

/// Why there will be no transmission phase.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error("TLS failed")]
    Tls(#[source] io::Error),
    #[error("the client broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("the client asked for nothing")]
    Aborted,
    #[error("the client was refused: {0}")]
    Refused(String),
}

/// A connection that sends requests.
pub(super) struct Agreed {
    pub(super) channel: Channel,
    pub(super) structured_replies: bool,
    /// `base:allocation` may be asked for.
    pub(super) has_allocation_context: bool,
    /// `None` where owners are not ordered.
    pub(super) lease: Option<Lease>,
}

pub(super) fn shake_hands(
    socket: OwnedFd,
    served: &Served,
    deadline: Instant,
) -> Result<Agreed, Ended> {
    let mut handshake = Handshake {
        channel: Channel::new(socket)?,
        served,
        deadline,
        no_zeroes: false,
        terms: Terms::default(),
    };
    handshake.greet()?;
    for _ in 0..MAX_OPTIONS {
        if let Some(lease) = handshake.option()? {
            return Ok(Agreed {
                channel: handshake.channel,
                structured_replies: handshake.terms.structured_replies,
                has_allocation_context: handshake.terms.has_allocation_context,
                lease: lease.0,
            });
        }
    }
    Err(Ended::Protocol("no end of options"))
}

struct Handshake<'a> {
    channel: Channel,
    served: &'a Served,
    deadline: Instant,
    no_zeroes: bool,
    terms: Terms,
}

/// What was agreed on; void when TLS begins.
#[derive(Default)]
struct Terms {
    structured_replies: bool,
    has_allocation_context: bool,
    claim: Option<Claim>,
}

/// The transmission phase begins.
struct Enter(Option<Lease>);

impl Handshake<'_> {
    fn greet(&mut self) -> Result<(), Ended> {
        self.channel.put(&wire::NBD_MAGIC.to_be_bytes());
        self.channel.put(&wire::OPTION_MAGIC.to_be_bytes());
        let flags = wire::FIXED_NEWSTYLE | wire::NO_ZEROES;
        self.channel.put(&flags.to_be_bytes());
        self.channel.flush(self.deadline)?;
        let answer = u32::from_be_bytes(self.channel.read_array(self.deadline)?);
        if answer & !u32::from(flags) != 0 {
            return Err(Ended::Protocol("unknown flags"));
        }
        if answer & u32::from(wire::FIXED_NEWSTYLE) == 0 {
            return Err(Ended::Protocol("a client from before the fixed newstyle"));
        }
        self.no_zeroes = answer & u32::from(wire::NO_ZEROES) != 0;
        Ok(())
    }

    /// Answers one option.
    fn option(&mut self) -> Result<Option<Enter>, Ended> {
        let header: [u8; 16] = self.channel.read_array(self.deadline)?;
        if be64(&header, 0) != wire::OPTION_MAGIC {
            return Err(Ended::Protocol("an option without its magic"));
        }
        let (code, len_bytes) = (be32(&header, 8), be32(&header, 12) as usize);
        if len_bytes > MAX_OPTION_BYTES {
            self.answer(code, reply::ERR_TOO_BIG, b"the option is too long")?;
            return Err(Ended::Protocol("an overlong option"));
        }
        let mut payload = vec![0; len_bytes];
        self.channel.read_exact(&mut payload, self.deadline)?;
        let lacks_tls = self.served.options.tls.is_some() && !self.channel.is_encrypted();
        match code {
            option::ABORT => {
                // The peer may be gone already.
                let _ = self.answer(code, reply::ACK, &[]);
                return Err(Ended::Aborted);
            }
            option::STARTTLS => self.start_tls(&payload)?,
            option::EXPORT_NAME if lacks_tls => {
                return Err(Ended::Refused("TLS is required".to_owned()));
            }
            _ if lacks_tls => {
                self.answer(code, reply::ERR_TLS_REQD, b"this server requires TLS")?;
            }
            option::EXPORT_NAME => return self.export_name(&payload).map(Some),
            option::LIST => self.list(&payload)?,
            option::INFO | option::GO => return self.info_or_go(code, &payload),
            option::STRUCTURED_REPLY if payload.is_empty() => {
                self.terms.structured_replies = true;
                self.answer(code, reply::ACK, &[])?;
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(code, &payload)?;
            }
            option::CLAIM if self.served.options.fence.is_some() => self.claim(&payload)?,
            option::STRUCTURED_REPLY => {
                self.answer(code, reply::ERR_INVALID, b"data where none belongs")?;
            }
            _ => self.answer(
                code,
                reply::ERR_UNSUP,
                b"this server does not know the option",
            )?,
        }
        Ok(None)
    }

    fn start_tls(&mut self, payload: &[u8]) -> Result<(), Ended> {
        let code = option::STARTTLS;
        if !payload.is_empty() || self.channel.is_encrypted() {
            return self.answer(code, reply::ERR_INVALID, b"TLS cannot start here");
        }
        let Some(tls) = &self.served.options.tls else {
            return self.answer(code, reply::ERR_POLICY, b"this server has no TLS");
        };
        self.answer(code, reply::ACK, &[])?;
        let connection = tls
            .connection()
            .map_err(|error| Ended::Tls(io::Error::other(error)))?;
        self.terms = Terms::default();
        self.channel
            .start_tls(connection.into(), self.deadline)
            .map_err(Ended::Tls)
    }

    fn list(&mut self, payload: &[u8]) -> Result<(), Ended> {
        if !payload.is_empty() {
            return self.answer(option::LIST, reply::ERR_INVALID, b"data where none belongs");
        }
        let name = self.served.options.name.as_bytes();
        let mut entry = (name.len() as u32).to_be_bytes().to_vec();
        entry.extend_from_slice(name);
        self.answer(option::LIST, reply::SERVER, &entry)?;
        self.answer(option::LIST, reply::ACK, &[])
    }

    fn claim(&mut self, payload: &[u8]) -> Result<(), Ended> {
        let Some(bytes) = payload
            .first_chunk::<{ Claim::BYTES }>()
            .filter(|_| payload.len() == Claim::BYTES)
        else {
            let words = b"a claim of wrong length";
            return self.answer(option::CLAIM, reply::ERR_INVALID, words);
        };
        self.terms.claim = Some(Claim::decode(bytes));
        let boot_id = self.served.options.boot_id;
        self.answer(option::CLAIM, reply::CLAIMED, &boot_id)?;
        self.answer(option::CLAIM, reply::ACK, &[])
    }

    fn meta_context(&mut self, code: u32, payload: &[u8]) -> Result<(), Ended> {
        if !self.terms.structured_replies {
            let words = b"agree on structured replies first";
            return self.answer(code, reply::ERR_INVALID, words);
        }
        let Some((name, queries)) = parse_queries(payload) else {
            return self.answer(code, reply::ERR_INVALID, b"broken queries");
        };
        if let Err(words) = self.look_up(name) {
            return self.answer(code, reply::ERR_UNKNOWN, words.as_bytes());
        }
        let asks_for_all =
            code == option::LIST_META_CONTEXT && (queries.is_empty() || queries.contains(&"base:"));
        let is_asked_for = asks_for_all || queries.contains(&wire::BASE_ALLOCATION);
        if code == option::SET_META_CONTEXT {
            self.terms.has_allocation_context = is_asked_for;
        }
        if is_asked_for {
            let mut context = ALLOCATION_CONTEXT_ID.to_be_bytes().to_vec();
            context.extend_from_slice(wire::BASE_ALLOCATION.as_bytes());
            self.answer(code, reply::META_CONTEXT, &context)?;
        }
        self.answer(code, reply::ACK, &[])
    }

    fn info_or_go(&mut self, code: u32, payload: &[u8]) -> Result<Option<Enter>, Ended> {
        let Some((name, wanted)) = parse_go(payload) else {
            self.answer(code, reply::ERR_INVALID, b"a broken request for an export")?;
            return Ok(None);
        };
        let claimed = match self.look_up(name) {
            Ok(claimed) => claimed,
            Err(words) => {
                self.answer(code, reply::ERR_UNKNOWN, words.as_bytes())?;
                return Ok(None);
            }
        };
        let (min_block, best_block) = self.served.export.block_bytes();
        if min_block > 1 && !wanted.contains(&info::BLOCK_SIZE) && code == option::GO {
            let words = b"this export has blocks larger than a byte";
            self.answer(code, reply::ERR_BLOCK_SIZE_REQD, words)?;
            return Ok(None);
        }
        let lease = if code == option::GO {
            match self.admit(claimed) {
                Ok(lease) => lease,
                Err((kind, words)) => {
                    self.answer(code, kind, words.as_bytes())?;
                    return Err(Ended::Refused(words));
                }
            }
        } else {
            None
        };
        let mut export = info::EXPORT.to_be_bytes().to_vec();
        export.extend_from_slice(&self.served.export.size_bytes().to_be_bytes());
        export.extend_from_slice(&self.transmission_flags().to_be_bytes());
        self.answer(code, reply::INFO, &export)?;
        if wanted.contains(&info::BLOCK_SIZE) {
            let mut blocks = info::BLOCK_SIZE.to_be_bytes().to_vec();
            for bytes in [min_block, best_block, DEFAULT_MAX_PAYLOAD_BYTES] {
                blocks.extend_from_slice(&bytes.to_be_bytes());
            }
            self.answer(code, reply::INFO, &blocks)?;
        }
        self.answer(code, reply::ACK, &[])?;
        Ok((code == option::GO).then_some(Enter(lease)))
    }

    /// The way of old clients, which cannot be told what is wrong.
    fn export_name(&mut self, payload: &[u8]) -> Result<Enter, Ended> {
        let name = str::from_utf8(payload)
            .map_err(|_| Ended::Protocol("an export name that is no UTF-8"))?;
        let claimed = self.look_up(name).map_err(Ended::Refused)?;
        let lease = self
            .admit(claimed)
            .map_err(|(_, words)| Ended::Refused(words))?;
        self.channel
            .put(&self.served.export.size_bytes().to_be_bytes());
        self.channel.put(&self.transmission_flags().to_be_bytes());
        if !self.no_zeroes {
            self.channel.put(&[0; 124]);
        }
        self.channel.flush(self.deadline)?;
        Ok(Enter(lease))
    }

    /// The generation that is part of a name which means our export; our own name, or none at
    /// all, means it as well.
    fn look_up(&self, name: &str) -> Result<Option<u64>, String> {
        let ours = self.served.options.name.as_str();
        if name.is_empty() || name == ours {
            return Ok(None);
        }
        name.strip_prefix(ours)
            .and_then(|rest| rest.strip_prefix('@'))
            .and_then(|generation| generation.parse().ok())
            .map(Some)
            .ok_or_else(|| {
                format!(
                    "the export here is {ours:?}, or {ours}@GENERATION where owners are ordered"
                )
            })
    }

    /// The lease of an owner, or the answer that a stale one gets.
    fn admit(&self, generation_in_name: Option<u64>) -> Result<Option<Lease>, (u32, String)> {
        let Some(fence) = &self.served.options.fence else {
            return match generation_in_name {
                None => Ok(None),
                Some(_) => Err((
                    reply::ERR_POLICY,
                    "this server does not order owners; leave the generation out".to_owned(),
                )),
            };
        };
        let by_name = generation_in_name.map(|generation| Claim {
            generation,
            instance: 0,
            epoch: 0,
        });
        let claim = match (self.terms.claim, by_name) {
            (Some(claim), None) | (None, Some(claim)) => claim,
            (Some(claim), Some(name)) if claim.generation == name.generation => claim,
            (Some(_), Some(_)) => {
                let words = "the generation in the name is another than the one claimed";
                return Err((reply::ERR_POLICY, words.to_owned()));
            }
            (None, None) => {
                let words = format!(
                    "owners are ordered here: connect to {}@GENERATION",
                    self.served.options.name
                );
                return Err((reply::ERR_POLICY, words));
            }
        };
        fence.admit(claim).map(Some).map_err(|refusal| {
            let kind = if refusal.is_final() {
                reply::ERR_POLICY
            } else {
                reply::ERR_SHUTDOWN
            };
            (kind, refusal.to_string())
        })
    }

    fn transmission_flags(&self) -> u16 {
        let mut flags = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::CAN_MULTI_CONN;
        if self.terms.structured_replies {
            flags |= transmission::SEND_DF;
        }
        if self.served.export.is_read_only() {
            flags | transmission::READ_ONLY
        } else {
            flags
                | transmission::SEND_TRIM
                | transmission::SEND_WRITE_ZEROES
                | transmission::SEND_FAST_ZERO
        }
    }

    fn answer(&mut self, to: u32, kind: u32, payload: &[u8]) -> Result<(), Ended> {
        self.channel.put(&wire::OPTION_REPLY_MAGIC.to_be_bytes());
        self.channel.put(&to.to_be_bytes());
        self.channel.put(&kind.to_be_bytes());
        self.channel.put(&(payload.len() as u32).to_be_bytes());
        self.channel.put(payload);
        Ok(self.channel.flush(self.deadline)?)
    }
}

/// A length and a string, and what follows.
fn split_string(payload: &[u8]) -> Option<(&str, &[u8])> {
    let len_bytes = be32(payload.get(..4)?, 0) as usize;
    if len_bytes > MAX_STRING_BYTES {
        return None;
    }
    let (text, rest) = payload[4..].split_at_checked(len_bytes)?;
    Some((str::from_utf8(text).ok()?, rest))
}

/// An export's name and the informations wanted of it.
fn parse_go(payload: &[u8]) -> Option<(&str, Vec<u16>)> {
    let (name, rest) = split_string(payload)?;
    let count = usize::from(be16(rest.get(..2)?, 0));
    let wanted = &rest[2..];
    (wanted.len() == count * 2).then(|| {
        let infos = wanted.chunks_exact(2).map(|chunk| be16(chunk, 0));
        (name, infos.collect())
    })
}

/// An export's name and metadata contexts.
fn parse_queries(payload: &[u8]) -> Option<(&str, Vec<&str>)> {
    let (name, rest) = split_string(payload)?;
    let count = be32(rest.get(..4)?, 0) as usize;
    if count > MAX_QUERIES {
        return None;
    }
    let mut rest = &rest[4..];
    let mut queries = Vec::with_capacity(count);
    for _ in 0..count {
        let (query, after) = split_string(rest)?;
        queries.push(query);
        rest = after;
    }
    rest.is_empty().then_some((name, queries))
}
