//! From a fresh connection to the transmission phase, as the client.
//!
//! Fixed newstyle only: greeting, optionally `STARTTLS`, `STRUCTURED_REPLY`, optionally
//! [`Claim`], `GO`. Every wait ends at one deadline; every length is checked before it is
//! believed.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use crate::channel::Channel;
use crate::tls::TlsClient;
use crate::wire::{
    self, BootId, Claim, DEFAULT_MAX_PAYLOAD_BYTES, MAX_OPTION_BYTES, MAX_STRING_BYTES, be16, be32,
    be64, info, option, reply, transmission,
};

/// Replies to one option that a server may send before it must have come to an end.
const MAX_REPLIES: usize = 64;

/// Why a server cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection broke, ended or was too slow.
    #[error("the connection failed while {action}")]
    Io {
        /// What was waited for.
        action: &'static str,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// No NBD server, or one from before 2011.
    #[error(
        "the server does not speak the fixed newstyle protocol; is it an NBD server, version 3 or \
         newer?"
    )]
    NotNbd,
    /// Something that no server may send.
    #[error("the server broke the protocol: {0}")]
    Protocol(&'static str),
    /// TLS was wanted from one side only.
    #[error("the server offers no TLS; set up its certificate, or attach without TLS")]
    NoTls,
    /// See [`Self::NoTls`].
    #[error("the server demands TLS; attach with the CA's certificate (tls)")]
    TlsRequired,
    /// The certificates do not fit.
    #[error("TLS with the server failed")]
    Tls(#[source] io::Error),
    /// No such export.
    #[error("the server has no export {export:?}: {message}")]
    NoExport {
        /// The name asked for.
        export: String,
        /// The server's words.
        message: String,
    },
    /// By generation, most likely.
    #[error("the server refuses us: {message}")]
    Refused {
        /// The server's words.
        message: String,
    },
    /// A generation was to be presented.
    #[error(
        "the server does not check generations; serve the disk by device-blk nbd-serve, or attach \
         without a generation"
    )]
    NoClaims,
    /// The server answered an option with an error that nothing can be made of.
    #[error("the server answered {option} with error {code:#x}: {message}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// `NBD_REP_ERR_*`
        code: u32,
        /// The server's words.
        message: String,
    },
}

/// What to ask for.
#[derive(Clone, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) export: &'a str,
    pub(crate) tls: Option<&'a TlsClient>,
    pub(crate) claim: Option<Claim>,
}

/// What the server exports, as it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Export {
    pub(crate) size_bytes: u64,
    /// `NBD_FLAG_*`
    pub(crate) flags: u16,
    /// Offsets and lengths must be multiples of this.
    pub(crate) min_block_bytes: u32,
    pub(crate) preferred_block_bytes: u32,
    pub(crate) max_payload_bytes: u32,
}

/// A connection that takes requests.
#[derive(Debug)]
pub(crate) struct Established {
    pub(crate) channel: Channel,
    pub(crate) export: Export,
    pub(crate) structured_replies: bool,
    /// Of a server that took our claim.
    pub(crate) boot_id: Option<BootId>,
}

/// Shakes hands over `socket`.
///
/// # Errors
/// See [`HandshakeError`].
pub(crate) fn shake_hands(
    socket: OwnedFd,
    wanted: &Wanted<'_>,
    deadline: Instant,
) -> Result<Established, HandshakeError> {
    let channel = Channel::new(socket).map_err(while_("preparing the socket"))?;
    let mut handshake = Handshake { channel, deadline };
    handshake.greet()?;
    if let Some(tls) = wanted.tls {
        handshake.start_tls(tls)?;
    }
    let structured_replies = handshake.ask_structured_replies()?;
    let boot_id = match wanted.claim {
        Some(claim) => Some(handshake.claim(claim)?),
        None => None,
    };
    let export = handshake.go(wanted.export)?;
    Ok(Established {
        channel: handshake.channel,
        export,
        structured_replies,
        boot_id,
    })
}

struct Handshake {
    channel: Channel,
    deadline: Instant,
}

/// One reply to an option.
struct Reply {
    kind: u32,
    payload: Vec<u8>,
}

impl Reply {
    /// The server's words, for people.
    fn message(&self) -> String {
        let text = String::from_utf8_lossy(&self.payload);
        let printable = |c: char| if c.is_control() { ' ' } else { c };
        let message: String = text.chars().take(300).map(printable).collect();
        if message.is_empty() {
            "(no reason given)".to_owned()
        } else {
            message
        }
    }
}

impl Handshake {
    fn greet(&mut self) -> Result<(), HandshakeError> {
        let greeting: [u8; 18] = self.read("waiting for the server's greeting")?;
        if be64(&greeting, 0) != wire::NBD_MAGIC || be64(&greeting, 8) != wire::OPTION_MAGIC {
            return Err(HandshakeError::NotNbd);
        }
        let server_flags = be16(&greeting, 16);
        if server_flags & wire::FIXED_NEWSTYLE == 0 {
            return Err(HandshakeError::NotNbd);
        }
        let ours = server_flags & (wire::FIXED_NEWSTYLE | wire::NO_ZEROES);
        self.channel.put(&u32::from(ours).to_be_bytes());
        Ok(())
    }

    fn start_tls(&mut self, tls: &TlsClient) -> Result<(), HandshakeError> {
        self.send_option(option::STARTTLS, &[])?;
        let answer = self.reply(option::STARTTLS)?;
        match answer.kind {
            reply::ACK => (),
            reply::ERR_UNSUP | reply::ERR_POLICY => return Err(HandshakeError::NoTls),
            _ => return Err(unexpected("STARTTLS", &answer)),
        }
        let connection = tls
            .connection()
            .map_err(|error| HandshakeError::Tls(io::Error::other(error)))?;
        self.channel
            .start_tls(connection.into(), self.deadline)
            .map_err(HandshakeError::Tls)
    }

    fn ask_structured_replies(&mut self) -> Result<bool, HandshakeError> {
        self.send_option(option::STRUCTURED_REPLY, &[])?;
        let answer = self.reply(option::STRUCTURED_REPLY)?;
        match answer.kind {
            reply::ACK => Ok(true),
            reply::ERR_TLS_REQD => Err(HandshakeError::TlsRequired),
            kind if kind & reply::IS_ERROR != 0 => Ok(false),
            _ => Err(unexpected("STRUCTURED_REPLY", &answer)),
        }
    }

    fn claim(&mut self, claim: Claim) -> Result<BootId, HandshakeError> {
        self.send_option(option::CLAIM, &claim.encode())?;
        let claimed = self.reply(option::CLAIM)?;
        match claimed.kind {
            reply::CLAIMED => (),
            reply::ERR_POLICY => {
                return Err(HandshakeError::Refused {
                    message: claimed.message(),
                });
            }
            reply::ERR_UNSUP => return Err(HandshakeError::NoClaims),
            _ => return Err(unexpected("CLAIM", &claimed)),
        }
        let boot_id = BootId::try_from(claimed.payload.as_slice())
            .map_err(|_| HandshakeError::Protocol("a claim's answer of wrong length"))?;
        match self.reply(option::CLAIM)? {
            Reply {
                kind: reply::ACK, ..
            } => Ok(boot_id),
            other => Err(unexpected("CLAIM", &other)),
        }
    }

    fn go(&mut self, name: &str) -> Result<Export, HandshakeError> {
        let mut payload = Vec::with_capacity(name.len() + 8);
        payload.extend_from_slice(&(name.len() as u32).to_be_bytes());
        payload.extend_from_slice(name.as_bytes());
        payload.extend_from_slice(&1u16.to_be_bytes());
        payload.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
        self.send_option(option::GO, &payload)?;
        let mut told = Told::default();
        for _ in 0..MAX_REPLIES {
            let answer = self.reply(option::GO)?;
            match answer.kind {
                reply::INFO => told.take(&answer.payload)?,
                reply::ACK => return told.finish(),
                reply::ERR_TLS_REQD => return Err(HandshakeError::TlsRequired),
                reply::ERR_UNKNOWN => {
                    return Err(HandshakeError::NoExport {
                        export: name.to_owned(),
                        message: answer.message(),
                    });
                }
                reply::ERR_POLICY => {
                    return Err(HandshakeError::Refused {
                        message: answer.message(),
                    });
                }
                _ => return Err(unexpected("GO", &answer)),
            }
        }
        Err(HandshakeError::Protocol("no end of replies to GO"))
    }

    fn send_option(&mut self, option: u32, payload: &[u8]) -> Result<(), HandshakeError> {
        self.channel.put(&wire::OPTION_MAGIC.to_be_bytes());
        self.channel.put(&option.to_be_bytes());
        self.channel.put(&(payload.len() as u32).to_be_bytes());
        self.channel.put(payload);
        self.channel
            .flush(self.deadline)
            .map_err(while_("sending an option"))
    }

    fn reply(&mut self, to: u32) -> Result<Reply, HandshakeError> {
        let header: [u8; 20] = self.read("waiting for the answer to an option")?;
        if be64(&header, 0) != wire::OPTION_REPLY_MAGIC {
            return Err(HandshakeError::Protocol("a reply without its magic"));
        }
        if be32(&header, 8) != to {
            return Err(HandshakeError::Protocol("a reply to something not asked"));
        }
        let len_bytes = be32(&header, 16) as usize;
        if len_bytes > MAX_OPTION_BYTES {
            return Err(HandshakeError::Protocol("an overlong reply"));
        }
        let mut payload = vec![0; len_bytes];
        self.channel
            .read_exact(&mut payload, self.deadline)
            .map_err(while_("waiting for the rest of an answer"))?;
        let kind = be32(&header, 12);
        Ok(Reply { kind, payload })
    }

    fn read<const N: usize>(&mut self, action: &'static str) -> Result<[u8; N], HandshakeError> {
        self.channel
            .read_array(self.deadline)
            .map_err(while_(action))
    }
}

/// What came with `NBD_REP_INFO`.
#[derive(Default)]
struct Told {
    export: Option<(u64, u16)>,
    blocks: Option<(u32, u32, u32)>,
}

impl Told {
    fn take(&mut self, payload: &[u8]) -> Result<(), HandshakeError> {
        let broken = Err(HandshakeError::Protocol("an information of wrong length"));
        if payload.len() < 2 {
            return broken;
        }
        match (be16(payload, 0), payload.len()) {
            (info::EXPORT, 12) => self.export = Some((be64(payload, 2), be16(payload, 10))),
            (info::BLOCK_SIZE, 14) => {
                self.blocks = Some((be32(payload, 2), be32(payload, 6), be32(payload, 10)));
            }
            (info::EXPORT | info::BLOCK_SIZE, _) => return broken,
            // Names and descriptions, unasked.
            _ => (),
        }
        Ok(())
    }

    fn finish(self) -> Result<Export, HandshakeError> {
        let (size_bytes, flags) = self
            .export
            .ok_or(HandshakeError::Protocol("GO without the export's size"))?;
        if flags & transmission::HAS_FLAGS == 0 {
            return Err(HandshakeError::Protocol("flags that are none"));
        }
        if i64::try_from(size_bytes).is_err() {
            return Err(HandshakeError::Protocol(
                "an export of more than 2^63 bytes",
            ));
        }
        let (min, preferred, max) = self.blocks.unwrap_or((1, 4096, DEFAULT_MAX_PAYLOAD_BYTES));
        let is_sound = min.is_power_of_two()
            && min <= 64 << 10
            && preferred.is_power_of_two()
            && preferred >= min
            && max >= min;
        if !is_sound {
            return Err(HandshakeError::Protocol("block sizes that make no sense"));
        }
        Ok(Export {
            size_bytes,
            flags,
            min_block_bytes: min,
            preferred_block_bytes: preferred,
            max_payload_bytes: max.min(DEFAULT_MAX_PAYLOAD_BYTES),
        })
    }
}

/// Whether a name can be asked for.
pub(crate) fn is_export_name(name: &str) -> bool {
    name.len() <= MAX_STRING_BYTES && !name.contains('\0')
}

fn while_(action: &'static str) -> impl FnOnce(io::Error) -> HandshakeError {
    move |source| HandshakeError::Io { action, source }
}

fn unexpected(option: &'static str, answer: &Reply) -> HandshakeError {
    match answer.kind {
        reply::ERR_TLS_REQD => HandshakeError::TlsRequired,
        code if code & reply::IS_ERROR != 0 => HandshakeError::Option {
            option,
            code,
            message: answer.message(),
        },
        _ => HandshakeError::Protocol("an answer that does not fit the option"),
    }
}
