//! What can be done to an event, and where in a process that is decided.

use std::sync::Arc;
use std::time::Duration;

use crate::event::{Op, Selector};
use crate::process::Kind;

/// What is done to events that are hit. The messages of the API say what each means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Begins so much later, and up to `jitter` more.
    Latency {
        /// At least.
        latency: Duration,
        /// A random part of this is added.
        jitter: Duration,
    },
    /// Not done, and answered as if it were; a frame is lost.
    Drop,
    /// A bit is flipped in so many bytes.
    Corrupt {
        /// At least 1.
        bytes: u32,
    },
    /// Others that come later go first.
    Reorder {
        /// How many.
        window: u32,
        /// Then it goes in any case.
        max_delay: Duration,
    },
    /// The queue takes nothing for so long.
    Pause(Duration),
    /// Fails with an error number.
    Error {
        /// `errno`
        errno: i32,
    },
    /// One operation moves no more than so many bytes.
    Short {
        /// Whole sectors.
        bytes: u64,
    },
    /// Only the first bytes of a write are written.
    Torn {
        /// Whole sectors.
        bytes: u64,
        /// What follows.
        end: TornEnd,
    },
    /// Goes to another place.
    Misdirect {
        /// Further on, or back.
        sectors: i64,
    },
    /// A frame goes more than once.
    Duplicate {
        /// How often beyond once.
        copies: u32,
    },
    /// Frames go no faster.
    Rate {
        /// Not 0.
        bytes_per_second: u64,
    },
    /// The cable is out and in by turns.
    LinkFlap {
        /// Out for so long,
        down: Duration,
        /// in for so long.
        up: Duration,
    },
    /// Frames from and to these addresses are lost.
    Partition {
        /// MAC addresses.
        peers: Arc<[[u8; 6]]>,
    },
    /// A kick is not heard.
    LostKick,
    /// A kick is heard so much later.
    LateKick(Duration),
    /// The driver is not told.
    LostCall,
    /// A message is handled so much later.
    LateReply(Duration),
    /// Completions are not shown for so long.
    UsedStall(Duration),
    /// A request counts as one whose descriptors make no sense.
    BadDescriptor,
    /// A completion is shown after later ones.
    OutOfOrder {
        /// How many.
        window: u32,
    },
    /// The connection is closed instead.
    Disconnect,
    /// A backend that is lost is looked for so much later.
    LateReconnect(Duration),
    /// Feature bits are not offered.
    RefuseFeatures(u64),
    /// A pause in the middle of a change of the memory table.
    MemoryRace(Duration),
    /// The in-flight region is lost.
    LostInflight,
    /// The process dies.
    Crash,
    /// The thread stops for so long.
    Hang(Duration),
}

/// What follows a torn write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TornEnd {
    /// The guest is told of an error.
    Error,
    /// The guest is told that all is well.
    Success,
    /// The process dies.
    Crash,
}

/// Where a process asks whether something is to go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Point {
    /// A disk's request or a NIC's frame, before anything is done.
    Request = 1 << 0,
    /// The state of a NIC's cable.
    Link = 1 << 1,
    /// A kick was taken.
    Kick = 1 << 2,
    /// The driver is about to be told of completions.
    Call = 1 << 3,
    /// A vhost-user message is about to be handled.
    Message = 1 << 4,
    /// Completions are about to be shown.
    Publish = 1 << 5,
    /// A request is taken off a ring.
    Pop = 1 << 6,
    /// A request is given back to a ring.
    Complete = 1 << 7,
    /// Features are about to be offered.
    Features = 1 << 8,
    /// The memory table is being changed.
    Memory = 1 << 9,
    /// An in-flight region is about to be taken.
    Inflight = 1 << 10,
    /// A backend is about to be looked for.
    Connect = 1 << 11,
}

impl Point {
    /// Its bit in a set of points.
    pub fn bit(self) -> u32 {
        self as u32
    }
}

impl Action {
    /// Where a rule with this action is asked for.
    pub(crate) fn point(&self, selector: &Selector) -> Point {
        match self {
            Self::Latency { .. }
            | Self::Drop
            | Self::Corrupt { .. }
            | Self::Reorder { .. }
            | Self::Pause(_)
            | Self::Error { .. }
            | Self::Short { .. }
            | Self::Torn { .. }
            | Self::Misdirect { .. }
            | Self::Duplicate { .. }
            | Self::Rate { .. }
            | Self::Partition { .. } => Point::Request,
            Self::LinkFlap { .. } => Point::Link,
            Self::LostKick | Self::LateKick(_) => Point::Kick,
            Self::LostCall => Point::Call,
            Self::LateReply(_) => Point::Message,
            Self::UsedStall(_) => Point::Publish,
            Self::BadDescriptor => Point::Pop,
            Self::OutOfOrder { .. } => Point::Complete,
            Self::RefuseFeatures(_) => Point::Features,
            Self::MemoryRace(_) => Point::Memory,
            Self::LostInflight => Point::Inflight,
            Self::LateReconnect(_) => Point::Connect,
            Self::Disconnect if selector.ops.is_empty() => Point::Message,
            Self::Disconnect => Point::Request,
            Self::Crash | Self::Hang(_) if selector.messages.is_empty() => Point::Request,
            Self::Crash | Self::Hang(_) => Point::Message,
        }
    }

    /// Whether it means something for such a request or frame.
    pub(crate) fn can_be_done_to(&self, op: Op) -> bool {
        match self {
            // A read must answer something.
            Self::Drop => op != Op::Read,
            Self::Corrupt { .. } => {
                matches!(op, Op::Read | Op::Write | Op::Receive | Op::Transmit)
            }
            Self::Short { .. } | Self::Misdirect { .. } => matches!(op, Op::Read | Op::Write),
            Self::Torn { .. } => op == Op::Write,
            // What the kernel has received is in order.
            Self::Reorder { .. } => op != Op::Receive,
            _ => true,
        }
    }

    /// Its name in the API.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Latency { .. } => "latency",
            Self::Drop => "drop",
            Self::Corrupt { .. } => "corrupt",
            Self::Reorder { .. } => "reorder",
            Self::Pause(_) => "pause",
            Self::Error { .. } => "error",
            Self::Short { .. } => "short",
            Self::Torn { .. } => "torn",
            Self::Misdirect { .. } => "misdirect",
            Self::Duplicate { .. } => "duplicate",
            Self::Rate { .. } => "rate",
            Self::LinkFlap { .. } => "link_flap",
            Self::Partition { .. } => "partition",
            Self::LostKick => "lost_kick",
            Self::LateKick(_) => "late_kick",
            Self::LostCall => "lost_call",
            Self::LateReply(_) => "late_reply",
            Self::UsedStall(_) => "used_stall",
            Self::BadDescriptor => "bad_descriptor",
            Self::OutOfOrder { .. } => "out_of_order",
            Self::Disconnect => "disconnect",
            Self::LateReconnect(_) => "late_reconnect",
            Self::RefuseFeatures(_) => "refuse_features",
            Self::MemoryRace(_) => "memory_race",
            Self::LostInflight => "lost_inflight",
            Self::Crash => "crash",
            Self::Hang(_) => "hang",
        }
    }

    /// Whether a process of this kind can do it.
    pub(crate) fn is_for(&self, kind: Kind) -> bool {
        match self {
            Self::Pause(_)
            | Self::Error { .. }
            | Self::Short { .. }
            | Self::Torn { .. }
            | Self::Misdirect { .. } => kind == Kind::Block,
            Self::Duplicate { .. }
            | Self::Rate { .. }
            | Self::LinkFlap { .. }
            | Self::Partition { .. } => kind == Kind::Net,
            Self::LateKick(_) | Self::LateReconnect(_) => kind == Kind::Frontend,
            Self::LostKick | Self::LateReply(_) | Self::Disconnect => true,
            _ => kind != Kind::Frontend,
        }
    }
}
