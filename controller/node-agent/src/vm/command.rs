//! What a VM's task is asked to do, and why it may refuse.

use tokio::sync::oneshot;
use tonic::Code;

use super::{upgrade, vmm};
use crate::{record::RecordError, spec::Spec};

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// An older wish.
    #[error(
        "VM {id}: generation {given} is older than {seen}, which was applied already; read the VM and apply again"
    )]
    StaleGeneration {
        /// The VM.
        id: String,
        /// As given.
        given: u64,
        /// As known.
        seen: u64,
    },
    /// A different wish of the same age.
    #[error(
        "VM {id}: generation {generation} was applied already with another spec; every change needs a higher generation"
    )]
    GenerationTaken {
        /// The VM.
        id: String,
        /// As given.
        generation: u64,
    },
    /// A change that a running machine cannot take.
    #[error(
        "VM {id} runs; its vcpus, memory, kernel and devices can be changed once it is stopped"
    )]
    Fixed {
        /// The VM.
        id: String,
    },
    /// The command needs a running VM.
    #[error("VM {id} does not run; start it first")]
    NotRunning {
        /// The VM.
        id: String,
    },
    /// The command needs a stopped VM.
    #[error("VM {id} runs; stop it first")]
    Running {
        /// The VM.
        id: String,
    },
    /// It was deleted meanwhile.
    #[error("VM {id} does not exist on this host")]
    Gone {
        /// The VM.
        id: String,
    },
    /// It has more to do than it can.
    #[error("VM {id} has too many commands waiting; try again")]
    Busy {
        /// The VM.
        id: String,
    },
    /// The wish cannot be kept.
    #[error("VM {id}: keeping its state")]
    Record {
        /// The VM.
        id: String,
        /// Why not.
        #[source]
        source: RecordError,
    },
    /// vmm-core refused.
    #[error(transparent)]
    Vmm(#[from] vmm::VmmError),
}

impl Refusal {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::StaleGeneration { .. } => Code::Aborted,
            Self::GenerationTaken { .. }
            | Self::Fixed { .. }
            | Self::NotRunning { .. }
            | Self::Running { .. } => Code::FailedPrecondition,
            Self::Gone { .. } => Code::NotFound,
            Self::Busy { .. } => Code::ResourceExhausted,
            Self::Record { .. } => Code::Internal,
            Self::Vmm(error) => error.code(),
        }
    }
}

/// Where the outcome of a command goes.
pub(super) type Answer = oneshot::Sender<Result<(), Refusal>>;

/// What a VM's task is asked to do.
#[derive(Debug)]
pub(super) enum Command {
    /// Make this the wish.
    Apply(Box<Spec>, Answer),
    /// Hard-reset the machine.
    Reset(Answer),
    /// Forget a stopped VM.
    Delete(Answer),
    /// Exchange a daemon for another version.
    Upgrade(Box<upgrade::Wish>, upgrade::Answer),
}

/// Tells the outcome.
pub(super) fn reply(answer: Answer, result: Result<(), Refusal>) {
    // Whoever asked may have given up; the outcome is in the status.
    let _ = answer.send(result);
}
