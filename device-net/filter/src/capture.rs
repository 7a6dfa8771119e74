//! Frames that match a filter, as a pcap file in pieces.
//!
//! The threads that serve queues put frames in; whoever asked for the capture takes pieces of the
//! file out. In between is a bounded buffer: frames that come faster than they are taken are
//! counted and left out.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::expression::Expression;
use crate::packet::Packet;
use crate::verdict::{Direction, Verdict};

/// The largest snaplen, and what 0 stands for: more than any frame.
pub const MAX_SNAPLEN_BYTES: u32 = 262_144;

/// A piece ends with the frame that makes it this long.
const PIECE_LEN_BYTES: usize = 256 << 10;

/// Pieces that wait at most; 4 MiB.
const MAX_PIECES: usize = 16;

/// pcap with nanoseconds.
const MAGIC: u32 = 0xa1b2_3c4d;
const LINKTYPE_ETHERNET: u32 = 1;
const FILE_HEADER_LEN_BYTES: u64 = 24;
const RECORD_HEADER_LEN_BYTES: usize = 16;

/// What is captured.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Which frames.
    pub filter: Expression,
    /// Bytes of each frame that are kept, up to [`MAX_SNAPLEN_BYTES`]; 0 for all.
    pub snaplen_bytes: u32,
    /// `None` for both.
    pub direction: Option<Direction>,
    /// Dropped (true) or passed (false) alone.
    pub is_dropped: Option<bool>,
    /// The capture ends after as many frames; 0 for no limit.
    pub max_packets: u64,
    /// The capture ends before the file is longer; 0 for no limit.
    pub max_bytes: u64,
}

/// A frame's bytes, wherever they are.
pub trait FrameBytes {
    /// Copies bytes from `offset` on; returns how many.
    fn read_at(&self, offset: usize, target: &mut [u8]) -> usize;
}

impl FrameBytes for &[u8] {
    fn read_at(&self, offset: usize, target: &mut [u8]) -> usize {
        let source = self.get(offset..).unwrap_or_default();
        let len = source.len().min(target.len());
        target[..len].copy_from_slice(&source[..len]);
        len
    }
}

/// One capture that is running, or has ended and still has pieces.
pub struct Capture {
    request: Request,
    snaplen_bytes: usize,
    file: Mutex<File>,
    /// Called when there is something to take.
    wake: Box<dyn Fn() + Send + Sync>,
}

struct File {
    /// All but the last one are full.
    pieces: VecDeque<Vec<u8>>,
    len_bytes: u64,
    packets: u64,
    missed: u64,
    has_ended: bool,
}

/// The next bytes of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Whole records; the file's header comes first. Empty when there is nothing new.
    pub data: Vec<u8>,
    /// Frames in the file so far.
    pub packets: u64,
    /// Frames that matched and found no room, so far.
    pub missed: u64,
    /// Nothing comes after this.
    pub is_last: bool,
}

/// A frame that may be captured.
#[derive(Clone, Copy)]
pub struct Frame<'a> {
    /// Its headers.
    pub packet: &'a Packet,
    /// Its first bytes.
    pub head: &'a [u8],
    /// All of it, for what comes after the head.
    pub bytes: &'a dyn FrameBytes,
    /// Of the frame.
    pub len_bytes: usize,
    /// Which way it goes.
    pub direction: Direction,
    /// What becomes of it.
    pub verdict: Verdict,
    /// Since 1970.
    pub time_ns: u64,
}

impl Capture {
    /// Begins a file. `wake` is called from threads that serve queues and must not block.
    pub fn new(request: Request, wake: impl Fn() + Send + Sync + 'static) -> Self {
        let snaplen = match request.snaplen_bytes {
            0 => MAX_SNAPLEN_BYTES,
            bytes => bytes.min(MAX_SNAPLEN_BYTES),
        };
        let mut first = Vec::with_capacity(PIECE_LEN_BYTES);
        first.extend(MAGIC.to_le_bytes());
        // Version 2.4, times in UTC, of unknown accuracy.
        first.extend(2_u16.to_le_bytes());
        first.extend(4_u16.to_le_bytes());
        first.extend([0; 8]);
        first.extend(snaplen.to_le_bytes());
        first.extend(LINKTYPE_ETHERNET.to_le_bytes());
        Self {
            request,
            snaplen_bytes: snaplen as usize,
            file: Mutex::new(File {
                pieces: VecDeque::from([first]),
                len_bytes: FILE_HEADER_LEN_BYTES,
                packets: 0,
                missed: 0,
                has_ended: false,
            }),
            wake: Box::new(wake),
        }
    }

    /// Keeps the frame if it is asked for.
    pub fn offer(&self, frame: &Frame<'_>) {
        if self.wants(frame) {
            let has_news = self.file().record(frame, self.snaplen_bytes, &self.request);
            if has_news {
                (self.wake)();
            }
        }
    }

    /// What has been captured since the last call: at most one piece.
    pub fn take(&self) -> Piece {
        let mut file = self.file();
        let data = file.pieces.pop_front().unwrap_or_default();
        Piece {
            data,
            packets: file.packets,
            missed: file.missed,
            is_last: file.has_ended && file.pieces.is_empty(),
        }
    }

    /// Ends it; what was captured can still be taken.
    pub fn end(&self) {
        self.file().has_ended = true;
        (self.wake)();
    }

    fn wants(&self, frame: &Frame<'_>) -> bool {
        let request = &self.request;
        let is_dropped = frame.verdict != Verdict::Pass;
        request
            .direction
            .is_none_or(|wanted| wanted == frame.direction)
            && request.is_dropped.is_none_or(|wanted| wanted == is_dropped)
            && request.filter.matches(frame.packet)
    }

    fn file(&self) -> MutexGuard<'_, File> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl File {
    /// Returns whether somebody should know.
    fn record(&mut self, frame: &Frame<'_>, snaplen_bytes: usize, request: &Request) -> bool {
        if self.has_ended {
            return false;
        }
        let kept_bytes = frame.len_bytes.min(snaplen_bytes);
        let record_bytes = RECORD_HEADER_LEN_BYTES + kept_bytes;
        if request.max_bytes != 0 && self.len_bytes + record_bytes as u64 > request.max_bytes {
            self.has_ended = true;
            return true;
        }
        let was_empty = self.pieces.is_empty();
        let is_full = self
            .pieces
            .back()
            .is_none_or(|last| last.len() >= PIECE_LEN_BYTES);
        if is_full {
            if self.pieces.len() == MAX_PIECES {
                self.missed += 1;
                return false;
            }
            self.pieces.push_back(Vec::with_capacity(PIECE_LEN_BYTES));
        }
        let Some(piece) = self.pieces.back_mut() else {
            return false;
        };
        append(piece, frame, kept_bytes);
        self.len_bytes += record_bytes as u64;
        self.packets += 1;
        self.has_ended = self.packets == request.max_packets;
        was_empty || is_full || self.has_ended
    }
}

fn append(piece: &mut Vec<u8>, frame: &Frame<'_>, kept_bytes: usize) {
    const SECOND_NS: u64 = 1_000_000_000;
    let header = [
        // Until 2106.
        (frame.time_ns / SECOND_NS) as u32,
        (frame.time_ns % SECOND_NS) as u32,
        kept_bytes as u32,
        frame.len_bytes as u32,
    ];
    piece.extend(header.into_iter().flat_map(u32::to_le_bytes));
    let begin = piece.len();
    let head = &frame.head[..frame.head.len().min(kept_bytes)];
    piece.extend_from_slice(head);
    piece.resize(begin + kept_bytes, 0);
    frame
        .bytes
        .read_at(head.len(), &mut piece[begin + head.len()..]);
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture")
            .field("request", &self.request)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
