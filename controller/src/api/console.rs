//! Consoles: bytes between a user and the VM's host, nothing kept.

use std::pin::Pin;
use std::time::Duration;

use api::controller::{ConsoleInput, ConsoleOutput};
use api::node;
use api::validate;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Status, Streaming};

use super::{Api, command_status};
use crate::commands;

/// A console's output, as the API streams it.
pub(super) type Output = Pin<Box<dyn Stream<Item = Result<ConsoleOutput, Status>> + Send>>;

/// Somebody who opens a console names the VM at once.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Keystrokes waiting for the host; a paste larger than this waits in the user's stream.
const INPUT_QUEUE: usize = 16;

/// Reads the first message and connects the two ends.
///
/// # Errors
/// When the first message does not come or names no VM that a host knows.
pub(super) async fn open(api: &Api, mut input: Streaming<ConsoleInput>) -> Result<Output, Status> {
    let first = tokio::time::timeout(FIRST_MESSAGE_TIMEOUT, input.message())
        .await
        .map_err(|_| Status::deadline_exceeded("the first message, naming the VM, did not come"))??
        .ok_or_else(|| Status::invalid_argument("the first message, naming the VM, is missing"))?;
    let name = validate::vm_request(&first.name, "")?;
    let vm = commands::get_vm(&api.store, &name)
        .await
        .map_err(command_status)?;
    let (sender, receiver) = mpsc::channel(INPUT_QUEUE);
    let hello = node::ConsoleInput {
        vm_id: vm.record.node_id,
        data: first.data,
        from_offset: first.from_offset,
    };
    // There is room: the queue is new.
    let _ = sender.try_send(hello);
    tokio::spawn(forward(input, sender));
    let host = api.hosts.reach(&vm.record.host)?;
    let output = host.console(ReceiverStream::new(receiver)).await?;
    Ok(Box::pin(output.map(|message| {
        message.map(|message| ConsoleOutput {
            offset: message.offset,
            data: message.data,
        })
    })))
}

/// Ends when either side does.
async fn forward(mut input: Streaming<ConsoleInput>, host: mpsc::Sender<node::ConsoleInput>) {
    loop {
        let message = tokio::select! {
            message = input.message() => message,
            () = host.closed() => return,
        };
        let Ok(Some(message)) = message else { return };
        let message = node::ConsoleInput {
            data: message.data,
            ..Default::default()
        };
        if host.send(message).await.is_err() {
            return;
        }
    }
}
