//! What a VM's task is asked to do, and why it may refuse.

use tokio::sync::{mpsc, oneshot};
use tonic::Code;

use super::{upgrade, vmm};
use crate::{
    epoch::{Leader, Superseded},
    record::RecordError,
    spec::Spec,
};

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
    /// A newer leader was heard meanwhile.
    #[error(transparent)]
    Superseded(#[from] Superseded),
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
            // Not final: whoever leads by right asks again.
            Self::Superseded(_) => Code::Unavailable,
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

/// A command, and who gave it.
#[derive(Debug)]
pub(super) struct Order {
    command: Command,
    leader: Option<Leader>,
}

impl Order {
    /// Of whom this task works for.
    pub(super) fn new(command: Command) -> Self {
        Self {
            command,
            leader: Leader::of_this_task(),
        }
    }
}

/// A VM's commands in the order in which they came.
#[derive(Debug)]
pub(super) struct Commands(mpsc::Receiver<Order>);

impl Commands {
    /// Of a queue.
    pub(super) fn of(queue: mpsc::Receiver<Order>) -> Self {
        Self(queue)
    }

    /// The next one. Those whose leader was followed by another one while they waited are refused: what the
    /// newer one says may have been carried out before.
    pub(super) async fn recv(&mut self) -> Option<Command> {
        loop {
            let Order { command, leader } = self.0.recv().await?;
            match leader.map_or(Ok(()), |leader| leader.still_leads()) {
                Ok(()) => return Some(command),
                Err(superseded) => command.refuse(superseded),
            }
        }
    }
}

impl Command {
    fn refuse(self, superseded: Superseded) {
        match self {
            Self::Apply(_, answer) | Self::Reset(answer) | Self::Delete(answer) => {
                reply(answer, Err(superseded.into()));
            }
            Self::Upgrade(_, answer) => {
                // Whoever asked may have given up.
                let _ = answer.send(Err(superseded.into()));
            }
        }
    }
}

/// Tells the outcome.
pub(super) fn reply(answer: Answer, result: Result<(), Refusal>) {
    // Whoever asked may have given up; the outcome is in the status.
    let _ = answer.send(result);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoch::{Epochs, tests::leader};

    #[tokio::test]
    async fn command_of_an_older_leader_is_refused_when_its_turn_comes() {
        let dir = tempfile::tempdir().unwrap();
        let epochs = Epochs::open(dir.path()).unwrap();
        let (queue, commands) = mpsc::channel(8);
        let mut commands = Commands::of(commands);
        let give = |leader: Option<Leader>| {
            let (answer, answered) = oneshot::channel();
            let command = Command::Reset(answer);
            queue.try_send(Order { command, leader }).unwrap();
            answered
        };
        let older = give(Some(leader(&epochs, 7)));
        let by_itself = give(None);
        // Heard while these wait.
        let newer = give(Some(leader(&epochs, 8)));
        drop(queue);
        let mut carried_out = 0;
        while let Some(command) = commands.recv().await {
            let Command::Reset(answer) = command else {
                unreachable!("only resets were asked for");
            };
            carried_out += 1;
            reply(answer, Ok(()));
        }
        assert_eq!(carried_out, 2);
        let refusal = older.await.unwrap().unwrap_err();
        assert_eq!(refusal.code(), Code::Unavailable);
        assert!(refusal.to_string().contains("epoch 8"), "{refusal}");
        by_itself.await.unwrap().unwrap();
        newer.await.unwrap().unwrap();
    }
}
