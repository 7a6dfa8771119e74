//! Requests of a block driver (Virtio 1.2 section 5.2.6), checked before anything is done.
//!
//! A request is a chain of readable bytes (16 bytes of header, then data of a write) followed
//! by writable ones (data of a read, then the status byte). How these bytes are spread over
//! descriptors is the driver's business (section 5.2.6, no framing assumptions), so everything here
//! works on copies and lengths: [`parse`] takes the copied header, [`parse_ranges`] the copied
//! payload of a discard. The I/O itself is the engine's.

/// Bytes of a sector, the unit of every request (section 5.2.2).
pub const SECTOR_BYTES: u64 = 512;

/// `struct virtio_blk_req` up to its data.
pub const HEADER_BYTES: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`.
pub const RANGE_BYTES: usize = 16;
/// `VIRTIO_BLK_ID_BYTES`.
pub const ID_BYTES: usize = 20;
/// `struct virtio_blk_lifetime`.
pub const LIFETIME_BYTES: usize = 6;
/// Ranges in one discard or write-zeroes request; `max_discard_seg` in the configuration.
pub const MAX_RANGES: usize = 32;
/// Sectors in one such range (2 GiB); `max_discard_sectors` in the configuration.
pub const MAX_RANGE_SECTORS: u32 = 1 << 22;

const VIRTIO_BLK_T_IN: u32 = 0;
const VIRTIO_BLK_T_OUT: u32 = 1;
const VIRTIO_BLK_T_FLUSH: u32 = 4;
const VIRTIO_BLK_T_GET_ID: u32 = 8;
const VIRTIO_BLK_T_GET_LIFETIME: u32 = 10;
const VIRTIO_BLK_T_DISCARD: u32 = 11;
const VIRTIO_BLK_T_WRITE_ZEROES: u32 = 13;
/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`.
const FLAG_UNMAP: u32 = 1;

/// The last byte that the device writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`
    IoErr = 1,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupp = 2,
}

/// What kind of request; one line each in the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// `VIRTIO_BLK_T_IN`
    Read,
    /// `VIRTIO_BLK_T_OUT`
    Write,
    /// `VIRTIO_BLK_T_FLUSH`
    Flush,
    /// `VIRTIO_BLK_T_DISCARD`
    Discard,
    /// `VIRTIO_BLK_T_WRITE_ZEROES`
    WriteZeroes,
    /// `VIRTIO_BLK_T_GET_ID`
    GetId,
    /// `VIRTIO_BLK_T_GET_LIFETIME`
    GetLifetime,
    /// A type that is not known, or a request too broken to have one.
    Unknown,
}

impl OpKind {
    /// Each of them once.
    pub const ALL: [Self; 8] = [
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Discard,
        Self::WriteZeroes,
        Self::GetId,
        Self::GetLifetime,
        Self::Unknown,
    ];

    /// The type a header names.
    pub fn of(header: &[u8; HEADER_BYTES]) -> Self {
        match le_u32(header, 0) {
            VIRTIO_BLK_T_IN => Self::Read,
            VIRTIO_BLK_T_OUT => Self::Write,
            VIRTIO_BLK_T_FLUSH => Self::Flush,
            VIRTIO_BLK_T_GET_ID => Self::GetId,
            VIRTIO_BLK_T_GET_LIFETIME => Self::GetLifetime,
            VIRTIO_BLK_T_DISCARD => Self::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Self::WriteZeroes,
            _ => Self::Unknown,
        }
    }

    /// As in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write_zeroes",
            Self::GetId => "get_id",
            Self::GetLifetime => "get_lifetime",
            Self::Unknown => "unknown",
        }
    }
}

/// A checked request. Byte ranges lie inside the disk and are whole blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Into the writable bytes from the first on.
    Read {
        /// Of the image.
        offset_bytes: u64,
        /// Of the data.
        len_bytes: u32,
    },
    /// From the readable bytes behind the header.
    Write {
        /// Of the image.
        offset_bytes: u64,
        /// Of the data.
        len_bytes: u32,
    },
    /// What was completed before is to be durable.
    Flush,
    /// Ranges are in the readable bytes behind the header: see [`parse_ranges`].
    Discard {
        /// A multiple of [`RANGE_BYTES`], at most [`MAX_RANGES`] of them.
        payload_bytes: usize,
    },
    /// As for a discard.
    WriteZeroes {
        /// A multiple of [`RANGE_BYTES`], at most [`MAX_RANGES`] of them.
        payload_bytes: usize,
    },
    /// The serial number, into the writable bytes from the first on.
    GetId,
    /// What is known of the medium's wear, into the writable bytes from the first on.
    GetLifetime,
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The disk's size.
    pub capacity_sectors: u64,
    /// What offsets and lengths are multiples of; a power of two.
    pub block_sectors: u64,
    /// Nothing may change the disk.
    pub read_only: bool,
    /// `VIRTIO_BLK_F_DISCARD` is offered.
    pub discard: bool,
}

/// Checks a request whose data is `data_out_bytes` for the device and `data_in_bytes` for the
/// driver, header and status byte not counted.
///
/// # Errors
/// The status to answer with.
pub fn parse(
    header: &[u8; HEADER_BYTES],
    data_out_bytes: u32,
    data_in_bytes: u32,
    limits: &Limits,
) -> Result<Request, Status> {
    let sector = le_u64(header, 8);
    match OpKind::of(header) {
        OpKind::Read => Ok(Request::Read {
            offset_bytes: data_offset(sector, data_in_bytes, limits)?,
            len_bytes: data_in_bytes,
        }),
        OpKind::Write => {
            refuse_if_read_only(limits)?;
            Ok(Request::Write {
                offset_bytes: data_offset(sector, data_out_bytes, limits)?,
                len_bytes: data_out_bytes,
            })
        }
        OpKind::Flush => Ok(Request::Flush),
        OpKind::Discard => {
            refuse_if_read_only(limits)?;
            if !limits.discard {
                return Err(Status::Unsupp);
            }
            Ok(Request::Discard {
                payload_bytes: ranges_payload(data_out_bytes)?,
            })
        }
        OpKind::WriteZeroes => {
            refuse_if_read_only(limits)?;
            Ok(Request::WriteZeroes {
                payload_bytes: ranges_payload(data_out_bytes)?,
            })
        }
        OpKind::GetId if data_in_bytes == 0 => Err(Status::IoErr),
        OpKind::GetId => Ok(Request::GetId),
        OpKind::GetLifetime if (data_in_bytes as usize) < LIFETIME_BYTES => Err(Status::IoErr),
        OpKind::GetLifetime => Ok(Request::GetLifetime),
        OpKind::Unknown => Err(Status::Unsupp),
    }
}

/// Section 5.2.6.2: a read-only device fails writes and changes nothing.
fn refuse_if_read_only(limits: &Limits) -> Result<(), Status> {
    if limits.read_only {
        Err(Status::IoErr)
    } else {
        Ok(())
    }
}

/// Where data of a read or write starts in the image.
fn data_offset(sector: u64, len_bytes: u32, limits: &Limits) -> Result<u64, Status> {
    let len_bytes = u64::from(len_bytes);
    if len_bytes == 0 || !len_bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(Status::IoErr);
    }
    sectors_offset(sector, len_bytes / SECTOR_BYTES, limits)
}

fn sectors_offset(sector: u64, num_sectors: u64, limits: &Limits) -> Result<u64, Status> {
    let end = sector.checked_add(num_sectors).ok_or(Status::IoErr)?;
    if (sector | num_sectors) & (limits.block_sectors - 1) != 0 {
        return Err(Status::IoErr);
    }
    if end > limits.capacity_sectors {
        return Err(Status::IoErr);
    }
    Ok(sector * SECTOR_BYTES)
}

fn ranges_payload(data_out_bytes: u32) -> Result<usize, Status> {
    let payload_bytes = data_out_bytes as usize;
    let whole = payload_bytes.is_multiple_of(RANGE_BYTES);
    if payload_bytes == 0 || !whole || payload_bytes > MAX_RANGES * RANGE_BYTES {
        return Err(Status::IoErr);
    }
    Ok(payload_bytes)
}

/// What a discard or write-zeroes does to its ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeOp {
    /// The content no longer matters.
    Discard,
    /// Reads zeroes from now on.
    WriteZeroes,
}

/// Bytes of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRange {
    /// Where it begins.
    pub offset_bytes: u64,
    /// How long it is; may be 0.
    pub len_bytes: u64,
    /// The driver allows blocks to be given back.
    pub unmap: bool,
}

/// Checks the ranges of a discard or write-zeroes (section 5.2.6.2). All are checked before
/// the first is carried out.
///
/// # Errors
/// The status to answer with.
pub fn parse_ranges(
    op: RangeOp,
    payload: &[u8],
    limits: &Limits,
) -> Result<Vec<ByteRange>, Status> {
    payload
        .chunks_exact(RANGE_BYTES)
        .map(|range| parse_range(op, range, limits))
        .collect()
}

fn parse_range(op: RangeOp, range: &[u8], limits: &Limits) -> Result<ByteRange, Status> {
    let (sector, num_sectors, flags) = (le_u64(range, 0), le_u32(range, 8), le_u32(range, 12));
    let known_flags = match op {
        RangeOp::Discard => 0,
        RangeOp::WriteZeroes => FLAG_UNMAP,
    };
    if flags & !known_flags != 0 {
        return Err(Status::Unsupp);
    }
    if num_sectors > MAX_RANGE_SECTORS {
        return Err(Status::IoErr);
    }
    let num_sectors = u64::from(num_sectors);
    Ok(ByteRange {
        offset_bytes: sectors_offset(sector, num_sectors, limits)?,
        len_bytes: num_sectors * SECTOR_BYTES,
        unmap: op == RangeOp::Discard || flags & FLAG_UNMAP != 0,
    })
}

fn le_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn le_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests;
