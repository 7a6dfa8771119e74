//! How far a flow is. Sequence numbers are not followed: whoever can forge addresses can at most
//! make a flow be forgotten, and the next segment of the side that opened it brings it back.
//!
//! ```text
//!                 answer SYN ACK             ACK               FIN                   FIN of the other
//! TCP   SynSent -----------------> SynReceived --> Established --> HalfClosed --------> Closing
//!          `------- answer (a connection older than the table) ---^      RST in any state: Closed
//!
//! other Unreplied -- answer --> Replied
//!
//! any state -- the policy does not permit it any more --> Revoked
//! ```

use super::Event;
use crate::packet::TcpFlags;

const SECOND_NS: u64 = 1_000_000_000;

/// How far a flow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// TCP without an answer.
    SynSent,
    /// TCP whose opener has not confirmed the answer.
    SynReceived,
    /// TCP that transfers.
    Established,
    /// TCP of which one side has finished.
    HalfClosed,
    /// TCP of which both sides have finished.
    Closing,
    /// TCP that was reset.
    Closed,
    /// Another protocol, one way so far.
    Unreplied,
    /// Another protocol, both ways.
    Replied,
    /// A change of the policy ended it. It is remembered while somebody tries to go on: else the
    /// next frame of the side that may open flows would open it anew.
    Revoked,
}

impl State {
    pub(super) const ALL: [Self; 9] = [
        Self::SynSent,
        Self::SynReceived,
        Self::Established,
        Self::HalfClosed,
        Self::Closing,
        Self::Closed,
        Self::Unreplied,
        Self::Replied,
        Self::Revoked,
    ];

    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::SynSent => "syn-sent",
            Self::SynReceived => "syn-received",
            Self::Established => "established",
            Self::HalfClosed => "half-closed",
            Self::Closing => "closing",
            Self::Closed => "closed",
            Self::Unreplied => "unreplied",
            Self::Replied => "replied",
            Self::Revoked => "revoked",
        }
    }

    /// For how long a flow without frames is remembered; the figures are Linux's.
    pub(super) fn timeout_ns(self) -> u64 {
        SECOND_NS
            * match self {
                Self::SynSent | Self::SynReceived => 60,
                Self::Established => 5 * 24 * 3600,
                Self::HalfClosed | Self::Closing => 120,
                Self::Closed => 10,
                Self::Unreplied => 30,
                Self::Replied | Self::Revoked => 180,
            }
    }

    /// Who must make room first: what has ended, then what is half open, then what transfers.
    pub(super) fn eviction_tier(self) -> u8 {
        match self {
            Self::Closing | Self::Closed => 0,
            Self::SynSent | Self::SynReceived | Self::Unreplied => 1,
            Self::Established | Self::HalfClosed | Self::Replied | Self::Revoked => 2,
        }
    }

    /// Whether a new connection may take the place of this one.
    pub(crate) fn has_ended(self) -> bool {
        matches!(self, Self::Closing | Self::Closed | Self::Revoked)
    }

    /// Of a flow whose first frame is this.
    pub(super) fn first(event: Event) -> Self {
        match event {
            Event::Tcp(flags) if flags.rst() => Self::Closed,
            Event::Tcp(_) => Self::SynSent,
            Event::Datagram => Self::Unreplied,
        }
    }

    /// After one more frame, an answer to the first one or not. `finished` are the sides that sent
    /// FIN: of the opener and of the other.
    pub(super) fn next(self, event: Event, is_answer: bool, finished: &mut [bool; 2]) -> Self {
        match event {
            Event::Datagram if is_answer => Self::Replied,
            Event::Datagram => self,
            Event::Tcp(flags) => self.next_tcp(flags, is_answer, finished),
        }
    }

    fn next_tcp(self, flags: TcpFlags, is_answer: bool, finished: &mut [bool; 2]) -> Self {
        if flags.rst() {
            return Self::Closed;
        }
        finished[usize::from(is_answer)] |= flags.fin();
        let state = match (self, is_answer) {
            (Self::SynSent, true) if flags.syn() => Self::SynReceived,
            // The beginning was not seen; or a reset that was not meant.
            (Self::SynSent, true) | (Self::Closed, _) => Self::Established,
            (Self::SynReceived, false) if !flags.syn() && flags.ack() => Self::Established,
            (state, _) => state,
        };
        match (state, *finished) {
            (Self::Established | Self::HalfClosed, [true, true]) => Self::Closing,
            (Self::Established, [true, false] | [false, true]) => Self::HalfClosed,
            (state, _) => state,
        }
    }
}
