//! What guards are shown: copies of frames' beginnings. A guard's verdict is about a copy, and the copy is
//! what receivers get.

use std::ops::Range;

use filter::Direction as Way;
use filter::capture::FrameBytes;

use super::deliver::Body;
use super::frame::Frame;
use super::vlan::TAG_LEN_BYTES;
use crate::guard::{self, Guard, HEAD_LEN_BYTES, Mishap};

/// What guards look at, and a tag that may be taken off.
const SHOWN_LEN_BYTES: usize = HEAD_LEN_BYTES + TAG_LEN_BYTES;

/// Beginnings of the frames of a batch as they came, in one buffer that is used again.
#[derive(Default)]
pub(super) struct Shown(Vec<u8>);

/// The place of a frame's beginning; empty if no guard looked at it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ShownAt {
    start: u32,
    len_bytes: u32,
}

impl ShownAt {
    pub(super) fn is_empty(self) -> bool {
        self.len_bytes == 0
    }

    fn range(self) -> Range<usize> {
        let start = self.start as usize;
        start..start + self.len_bytes as usize
    }
}

impl Shown {
    /// A batch begins.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Copies the beginning of `frame`, of which `body` is all.
    pub(super) fn add(&mut self, frame: &Frame, body: Body<'_>) -> ShownAt {
        let start = self.0.len();
        append_beginning(&mut self.0, body);
        frame.overlay(&mut self.0[start..]);
        ShownAt {
            start: start as u32,
            len_bytes: (self.0.len() - start) as u32,
        }
    }

    pub(super) fn get(&self, at: ShownAt) -> &[u8] {
        &self.0[at.range()]
    }

    /// What comes behind addresses, tag and ethertype of a frame that came with `head_len_bytes` of these.
    pub(super) fn after_head(&self, at: ShownAt, head_len_bytes: usize) -> &[u8] {
        self.get(at).get(head_len_bytes..).unwrap_or_default()
    }
}

/// Appends as much of `body` as guards look at.
pub(super) fn append_beginning(target: &mut Vec<u8>, body: Body<'_>) {
    let start = target.len();
    target.resize(start + SHOWN_LEN_BYTES.min(body.len()), 0);
    body.read_at(0, &mut target[start..]);
}

/// Where a checksum is left to be put, in a frame whose beginning became `shift` bytes longer.
pub(super) fn checksum_at(frame: &Frame, shift: isize) -> Option<usize> {
    let at = frame.header.as_ref()?.checksum_at()?;
    Some(at.saturating_add_signed(shift))
}

/// What becomes of a frame that a guard was asked about.
pub(super) enum Judged {
    Passes,
    Dropped,
    /// Something happens to it on purpose; it goes on then at the earliest.
    Detours(Mishap, u64),
}

/// Asks a guard about a frame that is `head` and `body`.
pub(super) fn judge(
    guard: &Guard,
    way: Way,
    head: &[u8],
    body: Body<'_>,
    checksum_at: Option<usize>,
    now_ns: u64,
) -> Judged {
    let len_bytes = head.len() + body.len();
    let frame = guard::Frame {
        head: &head[..head.len().min(HEAD_LEN_BYTES)],
        bytes: &Whole { head, body },
        len_bytes,
        checksum_at,
    };
    if guard.check(way, &frame, now_ns).is_err() {
        return Judged::Dropped;
    }
    let mishap = guard.mishap(way, frame.head, len_bytes, now_ns);
    if mishap.is_lost {
        return Judged::Dropped;
    }
    let held_until_ns = guard.held_until_ns(way, now_ns);
    if mishap != Mishap::default() || held_until_ns.is_some() {
        return Judged::Detours(mishap, held_until_ns.unwrap_or(now_ns));
    }
    match guard.police(way, len_bytes, now_ns) {
        Ok(()) => Judged::Passes,
        Err(_) => Judged::Dropped,
    }
}

/// A frame of which the switch has the beginning.
struct Whole<'a> {
    head: &'a [u8],
    body: Body<'a>,
}

impl FrameBytes for Whole<'_> {
    fn read_at(&self, offset: usize, target: &mut [u8]) -> usize {
        let own = self.head.get(offset..).unwrap_or_default();
        let (first, rest) = target.split_at_mut(own.len().min(target.len()));
        first.copy_from_slice(&own[..first.len()]);
        let body_offset = (offset + first.len()).saturating_sub(self.head.len());
        first.len() + self.body.read_at(body_offset, rest)
    }
}
