//! What travels: numbers, flags and fixed-size messages. All integers are big-endian.
//!
//! Names are those of the protocol's document (`doc/proto.md` of the NBD project). Parsing takes
//! arrays of the exact size, so that a length is checked once, by whoever cut the array out.

/// Opens the server's greeting: `NBDMAGIC`.
pub(crate) const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Opens the newstyle part of the greeting and every option: `IHAVEOPT`.
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// `NBD_FLAG_FIXED_NEWSTYLE` and `NBD_FLAG_NO_ZEROES`, the same bits on both sides.
pub(crate) const FIXED_NEWSTYLE: u16 = 1 << 0;
pub(crate) const NO_ZEROES: u16 = 1 << 1;

/// `NBD_OPT_*`
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    /// Ours, `mort`: see [`super::Claim`]. Servers that do not know it answer `UNSUP`.
    pub(crate) const CLAIM: u32 = 0x6d6f_7274;
}

/// `NBD_REP_*`
pub(crate) mod reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    /// Ours: the server understood a [`super::Claim`] and tells its [`super::BootId`].
    pub(crate) const CLAIMED: u32 = 0x6d6f_7274;

    pub(crate) const IS_ERROR: u32 = 1 << 31;
    pub(crate) const ERR_UNSUP: u32 = IS_ERROR | 1;
    pub(crate) const ERR_POLICY: u32 = IS_ERROR | 2;
    pub(crate) const ERR_INVALID: u32 = IS_ERROR | 3;
    pub(crate) const ERR_TLS_REQD: u32 = IS_ERROR | 5;
    pub(crate) const ERR_UNKNOWN: u32 = IS_ERROR | 6;
    pub(crate) const ERR_SHUTDOWN: u32 = IS_ERROR | 7;
    pub(crate) const ERR_BLOCK_SIZE_REQD: u32 = IS_ERROR | 8;
    pub(crate) const ERR_TOO_BIG: u32 = IS_ERROR | 9;
}

/// `NBD_INFO_*`
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// `NBD_FLAG_*` of the transmission phase
pub(crate) mod transmission {
    pub(crate) const HAS_FLAGS: u16 = 1 << 0;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
    pub(crate) const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// `NBD_CMD_*`
pub(crate) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISC: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;

    pub(crate) const FLAG_FUA: u16 = 1 << 0;
    pub(crate) const FLAG_NO_HOLE: u16 = 1 << 1;
    pub(crate) const FLAG_DF: u16 = 1 << 2;
    pub(crate) const FLAG_REQ_ONE: u16 = 1 << 3;
    pub(crate) const FLAG_FAST_ZERO: u16 = 1 << 4;
}

/// `NBD_REPLY_TYPE_*` of structured replies
pub(crate) mod chunk {
    pub(crate) const FLAG_DONE: u16 = 1 << 0;

    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const OFFSET_HOLE: u16 = 2;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const IS_ERROR: u16 = 1 << 15;
    pub(crate) const ERROR: u16 = IS_ERROR | 1;
}

/// `NBD_E*`: the numbers that may travel, whatever they are called on a side.
pub(crate) mod errno {
    pub(crate) const EPERM: u32 = 1;
    pub(crate) const EIO: u32 = 5;
    pub(crate) const ENOMEM: u32 = 12;
    pub(crate) const EINVAL: u32 = 22;
    pub(crate) const ENOSPC: u32 = 28;
    pub(crate) const EOVERFLOW: u32 = 75;
    pub(crate) const ENOTSUP: u32 = 95;
    pub(crate) const ESHUTDOWN: u32 = 108;
}

/// The one metadata context served, and its flags.
pub(crate) const BASE_ALLOCATION: &str = "base:allocation";
pub(crate) const STATE_HOLE: u32 = 1 << 0;
pub(crate) const STATE_ZERO: u32 = 1 << 1;

/// The longest string the protocol allows, export names among them.
pub(crate) const MAX_STRING_BYTES: usize = 4096;
/// An option or reply to one that is longer is no honest one: two strings and some numbers.
pub(crate) const MAX_OPTION_BYTES: usize = 2 * MAX_STRING_BYTES + 1024;
/// What every server must take in one request unless it says otherwise.
pub(crate) const DEFAULT_MAX_PAYLOAD_BYTES: u32 = 32 << 20;

/// A request of the transmission phase, before its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestHeader {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset_bytes: u64,
    pub(crate) len_bytes: u32,
}

impl RequestHeader {
    pub(crate) const BYTES: usize = 28;

    pub(crate) fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset_bytes.to_be_bytes());
        bytes[24..28].copy_from_slice(&self.len_bytes.to_be_bytes());
        bytes
    }

    /// `None` for a wrong magic.
    pub(crate) fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        (be32(bytes, 0) == REQUEST_MAGIC).then(|| Self {
            flags: be16(bytes, 4),
            command: be16(bytes, 6),
            cookie: be64(bytes, 8),
            offset_bytes: be64(bytes, 16),
            len_bytes: be32(bytes, 24),
        })
    }
}

/// `error` is 0 for success.
pub(crate) fn encode_simple_reply(error: u32, cookie: u64) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut bytes = [0; SIMPLE_REPLY_BYTES];
    bytes[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

pub(crate) const SIMPLE_REPLY_BYTES: usize = 16;

/// The head of one chunk of a structured reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkHeader {
    pub(crate) flags: u16,
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    pub(crate) len_bytes: u32,
}

impl ChunkHeader {
    pub(crate) const BYTES: usize = 20;

    pub(crate) fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..20].copy_from_slice(&self.len_bytes.to_be_bytes());
        bytes
    }

    /// The magic was looked at already.
    pub(crate) fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        Self {
            flags: be16(bytes, 4),
            kind: be16(bytes, 6),
            cookie: be64(bytes, 8),
            len_bytes: be32(bytes, 16),
        }
    }
}

/// Who wants to write, so that a server can refuse everybody who is not the latest owner.
///
/// Payload of the option [`option::CLAIM`]; it holds for the `GO` that follows on the same
/// connection. Claims are ordered: see [`crate::server::Fence`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    /// Of the volume: goes up each time its owner changes.
    pub(crate) generation: u64,
    /// A random number of the client, for its life; 0 for a client that has none.
    pub(crate) instance: u128,
    /// Counts the sessions of this instance from 0. Connections of one session are siblings.
    pub(crate) epoch: u64,
}

impl Claim {
    pub(crate) const BYTES: usize = 32;

    pub(crate) fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0..8].copy_from_slice(&self.generation.to_be_bytes());
        bytes[8..24].copy_from_slice(&self.instance.to_be_bytes());
        bytes[24..32].copy_from_slice(&self.epoch.to_be_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        Self {
            generation: be64(bytes, 0),
            instance: u128::from(be64(bytes, 8)) << 64 | u128::from(be64(bytes, 16)),
            epoch: be64(bytes, 24),
        }
    }
}

/// Changes when the server's host starts anew: writes that were not flushed are lost then.
pub(crate) type BootId = [u8; 16];

/// Reads a big-endian integer at `at`.
///
/// # Panics
/// If `bytes` ends before: callers cut out what they checked.
pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// See [`be16`].
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from(be16(bytes, at)) << 16 | u32::from(be16(bytes, at + 2))
}

/// See [`be16`].
pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_way() {
        let request = RequestHeader {
            flags: 1,
            command: command::WRITE_ZEROES,
            cookie: 0x0102_0304_0506_0708,
            offset_bytes: u64::MAX - 1,
            len_bytes: 0xfedc_ba98,
        };
        assert_eq!(RequestHeader::decode(&request.encode()), Some(request));
        let mut wrong = request.encode();
        wrong[3] ^= 1;
        assert_eq!(RequestHeader::decode(&wrong), None);

        let chunk = ChunkHeader {
            flags: chunk::FLAG_DONE,
            kind: chunk::ERROR,
            cookie: 7,
            len_bytes: 6,
        };
        assert_eq!(ChunkHeader::decode(&chunk.encode()), chunk);

        let claim = Claim {
            generation: 3,
            instance: u128::MAX - 5,
            epoch: 9,
        };
        assert_eq!(Claim::decode(&claim.encode()), claim);
    }
}
