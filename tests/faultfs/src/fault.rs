//! What can go wrong with a request.

use std::ops::Range;
use std::time::Duration;

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Reading data.
    Read,
    /// Writing data.
    Write,
    /// `fsync` and `fdatasync`.
    Sync,
    /// `fallocate`: holes, zeroes, space.
    Allocate,
}

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It fails with this error number, and nothing is done.
    Fail(i32),
    /// A write is carried out, and answered with this error number; what else fails as by `Fail`.
    Lie(i32),
    /// Success is answered, and nothing is done. Reads are carried out.
    Skip,
    /// It is carried out and answered when [`FaultFs::release`](crate::FaultFs::release) is called.
    Hold,
    /// It is carried out and answered so much later; others are not kept waiting.
    Delay(Duration),
    /// Of a read or write only so many bytes are moved, and success is answered. Linux 6.18
    /// continues a short direct write through the page cache, and a write that stays short there
    /// with the wrong bytes: let writes stay short at 4 KiB or more.
    Short(usize),
}

/// Requests, and what happens to them.
#[derive(Clone, Debug)]
pub struct Fault {
    op: Op,
    effect: Effect,
    name: Option<String>,
    range: Range<u64>,
    times: u64,
}

impl Fault {
    /// All requests of a kind.
    pub fn new(op: Op, effect: Effect) -> Self {
        Self {
            op,
            effect,
            name: None,
            range: 0..u64::MAX,
            times: u64::MAX,
        }
    }

    /// Only of the file that has this name when the fault is injected or later.
    #[must_use]
    pub fn of(self, name: &str) -> Self {
        Self {
            name: Some(name.to_owned()),
            ..self
        }
    }

    /// Only requests that touch these bytes. A sync touches no bytes and is not limited.
    #[must_use]
    pub fn within(self, range: Range<u64>) -> Self {
        Self { range, ..self }
    }

    /// Only the first `times`.
    #[must_use]
    pub fn times(self, times: u64) -> Self {
        Self { times, ..self }
    }
}

/// Names a [`Fault`] that was injected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultId(usize);

/// A request, as far as faults look at it.
#[derive(Clone, Debug)]
pub(crate) struct Request<'a> {
    pub(crate) op: Op,
    pub(crate) names: &'a [String],
    pub(crate) offset_bytes: u64,
    pub(crate) len_bytes: u64,
}

/// Faults that were injected, lifted ones included.
#[derive(Debug, Default)]
pub(crate) struct Faults(Vec<Injected>);

#[derive(Debug)]
struct Injected {
    fault: Fault,
    hits: u64,
}

impl Faults {
    pub(crate) fn inject(&mut self, fault: Fault) -> FaultId {
        self.0.push(Injected { fault, hits: 0 });
        FaultId(self.0.len() - 1)
    }

    pub(crate) fn lift(&mut self, FaultId(index): FaultId) {
        self.0[index].fault.times = 0;
    }

    pub(crate) fn hits(&self, FaultId(index): FaultId) -> u64 {
        self.0[index].hits
    }

    /// What is to happen to a request, if anything.
    pub(crate) fn apply(&mut self, request: &Request<'_>) -> Option<Effect> {
        let injected = self
            .0
            .iter_mut()
            .find(|injected| injected.fault.applies_to(request))?;
        injected.hits += 1;
        injected.fault.times -= 1;
        Some(injected.fault.effect)
    }
}

impl Fault {
    fn applies_to(&self, request: &Request<'_>) -> bool {
        let end = request.offset_bytes.saturating_add(request.len_bytes);
        let touches = request.op == Op::Sync
            || (request.offset_bytes < self.range.end && end > self.range.start);
        self.op == request.op
            && self.times > 0
            && touches
            && self
                .name
                .as_ref()
                .is_none_or(|name| request.names.contains(name))
    }
}
