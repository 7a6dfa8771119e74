//! The serial console, passed through between a client of the agent and the VM's `vmm-core`.

use std::{path::Path, time::Duration};

use api::{
    connect,
    node::{ConsoleInput, ConsoleOutput, VmPhase},
    vmm::{self, vmm_client::VmmClient},
};
use tokio::sync::mpsc;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Code, Streaming};

use crate::vm::{Vm, vmm_socket};

/// Messages under way in each direction; a reader that is slower skips ahead in `vmm-core`.
const QUEUE: usize = 16;
/// A client may open the console of a VM that is just starting.
const START_WITHIN: Duration = Duration::from_secs(60);
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// The outgoing half.
pub(crate) type Output = ReceiverStream<Result<ConsoleOutput, tonic::Status>>;

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConsoleError {
    /// The VM does not run.
    #[error("VM {id} does not run, so it has no console; start it first")]
    NotRunning {
        /// The VM.
        id: String,
    },
    /// `vmm-core` does not answer.
    #[error("VM {id}: vmm-core does not answer")]
    Connect {
        /// The VM.
        id: String,
        /// Why.
        #[source]
        source: connect::ConnectError,
    },
    /// `vmm-core` refused.
    #[error("VM {id}: vmm-core refused the console: {message}")]
    Refused {
        /// The VM.
        id: String,
        /// Its answer.
        code: Code,
        /// Its answer.
        message: String,
    },
}

impl ConsoleError {
    /// What the API answers.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::NotRunning { .. } => Code::FailedPrecondition,
            Self::Connect { .. } => Code::Unavailable,
            Self::Refused { code, .. } => *code,
        }
    }
}

/// Connects `input`, whose first message was `first`, to the VM's console.
///
/// # Errors
/// When the VM does not run.
pub(crate) async fn open(
    vm: &Vm,
    dir: &Path,
    first: ConsoleInput,
    input: Streaming<ConsoleInput>,
) -> Result<Output, ConsoleError> {
    let id = vm.spec().id.clone();
    running(vm)
        .await
        .ok_or_else(|| ConsoleError::NotRunning { id: id.clone() })?;
    let channel = connect::unix(&vmm_socket(dir), CONNECT_WITHIN)
        .await
        .map_err(|source| ConsoleError::Connect {
            id: id.clone(),
            source,
        })?;
    let (to_vmm, from_client) = mpsc::channel(QUEUE);
    // Fits: the queue is empty.
    let _ = to_vmm.try_send(vmm::ConsoleInput {
        data: first.data,
        from_offset: first.from_offset,
    });
    let mut output = VmmClient::new(channel)
        .console(ReceiverStream::new(from_client))
        .await
        .map_err(|status| ConsoleError::Refused {
            id,
            code: status.code(),
            message: status.message().to_owned(),
        })?
        .into_inner();
    let (to_client, client_output) = mpsc::channel(QUEUE);
    let pump = tokio::spawn(pump_input(input, to_vmm));
    tokio::spawn(async move {
        loop {
            let message = tokio::select! {
                message = output.next() => message,
                () = to_client.closed() => break,
            };
            let Some(message) = message else { break };
            let message = message.map(|out| ConsoleOutput {
                offset: out.offset,
                data: out.data,
            });
            let failed = message.is_err();
            if to_client.send(message).await.is_err() || failed {
                break;
            }
        }
        pump.abort();
    });
    Ok(ReceiverStream::new(client_output))
}

/// Forwards the client's input. When the client has said all, the console stays open for reading:
/// the sender must outlive the input.
async fn pump_input(mut input: Streaming<ConsoleInput>, to_vmm: mpsc::Sender<vmm::ConsoleInput>) {
    while let Some(Ok(message)) = input.next().await {
        let forwarded = vmm::ConsoleInput {
            data: message.data,
            from_offset: 0,
        };
        if to_vmm.send(forwarded).await.is_err() {
            return;
        }
    }
    to_vmm.closed().await;
}

/// Waits for a VM that is starting.
async fn running(vm: &Vm) -> Option<()> {
    let mut status = vm.watch();
    let settled = status.wait_for(|status| status.phase() != VmPhase::Starting);
    let settled = tokio::time::timeout(START_WITHIN, settled)
        .await
        .ok()?
        .ok()?;
    matches!(
        settled.phase(),
        VmPhase::Running | VmPhase::Paused | VmPhase::Stopping
    )
    .then_some(())
}
