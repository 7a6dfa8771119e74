//! A terminal on a VM's serial port. On a terminal, keys go to the guest as they are typed until
//! Ctrl-]; otherwise stdin is passed on as it comes, and output is printed until the VM stops.
//!
//! When the connection breaks while the VM runs on (the controller or the agent restarts), it is made
//! again from the offset reached, so nothing is printed twice.

use std::io::{IsTerminal as _, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use crate::client::Channel;
use api::controller as pb;
use api::controller::vms_client::VmsClient;
use api::names::Name;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

use crate::cli::Global;
use crate::client;

/// Ctrl-]
const ESCAPE: u8 = 0x1d;
/// Pieces of input waiting for the controller.
const INPUT_QUEUE: usize = 16;
/// How long the controller or the host's agent may be away.
const AWAY_TIMEOUT: Duration = Duration::from_secs(60);
const RETRY_INTERVAL: Duration = Duration::from_millis(300);

/// How it ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum End {
    /// The person left; the VM runs on.
    Left,
    /// The VM does not run any more.
    Stopped(Box<pb::VmStatus>),
}

/// Attaches this terminal to a VM's console.
///
/// # Errors
/// When the VM does not run, or the controller is gone for good.
pub(crate) async fn attach(
    global: &Global,
    channel: &Channel,
    name: &Name,
    from_offset: u64,
) -> anyhow::Result<End> {
    let interactive = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let raw = interactive.then(RawMode::enter).transpose()?;
    if interactive && !global.quiet {
        eprint!("console of vm {}; Ctrl-] leaves it\r\n", name.id);
    }
    let mut input = Keyboard::start(interactive);
    let result = follow(channel, name, from_offset, &mut input).await;
    drop(raw);
    if interactive && !global.quiet {
        match &result {
            Ok(End::Left) => eprintln!("\nvm {0} runs on; vmctl vm console {0}", name.id),
            _ => eprintln!(),
        }
    }
    result
}

async fn follow(
    channel: &Channel,
    name: &Name,
    from_offset: u64,
    input: &mut Keyboard,
) -> anyhow::Result<End> {
    let mut offset = from_offset;
    let mut heard = Instant::now();
    loop {
        match once(channel, name, &mut offset, input, &mut heard).await {
            Ok(true) => return Ok(End::Left),
            Ok(false) => {}
            Err(status) if client::is_away(&status) => {}
            Err(status) => {
                // It may have stopped before there was a console to speak of.
                return match stopped(channel, name).await {
                    Ok(Some(status)) if heard_something(offset, from_offset) => {
                        Ok(End::Stopped(Box::new(status)))
                    }
                    _ => Err(client::failed(status)),
                };
            }
        }
        match stopped(channel, name).await {
            Ok(Some(status)) => return Ok(End::Stopped(Box::new(status))),
            Ok(None) => {}
            Err(status) if client::is_away(&status) && heard.elapsed() < AWAY_TIMEOUT => {}
            Err(status) => return Err(client::failed(status)),
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

fn heard_something(offset: u64, from_offset: u64) -> bool {
    offset != from_offset
}

/// The VM's status, if it does not run any more.
async fn stopped(channel: &Channel, name: &Name) -> Result<Option<pb::VmStatus>, tonic::Status> {
    let vm = client::get_vm(channel, &name.to_string()).await?;
    let status = vm.status.unwrap_or_default();
    let over = matches!(status.phase(), pb::VmPhase::Stopped | pb::VmPhase::Failed);
    Ok(over.then_some(status))
}

/// One connection. `true` when the person left, `false` when it ended.
async fn once(
    channel: &Channel,
    name: &Name,
    offset: &mut u64,
    input: &mut Keyboard,
    heard: &mut Instant,
) -> Result<bool, tonic::Status> {
    let (sender, receiver) = mpsc::channel(INPUT_QUEUE);
    let hello = pb::ConsoleInput {
        name: name.to_string(),
        data: vec![],
        from_offset: *offset,
    };
    // There is room: the queue is new.
    let _ = sender.try_send(hello);
    let mut client = VmsClient::new(channel.clone());
    let answer = tokio::select! {
        answer = client.console_vm(ReceiverStream::new(receiver)) => answer?,
        () = input.left() => return Ok(true),
    };
    let mut output = answer.into_inner();
    let mut stdout = std::io::stdout();
    loop {
        tokio::select! {
            message = output.next() => {
                let Some(message) = message.transpose()? else { return Ok(false) };
                *heard = Instant::now();
                *offset = message.offset + message.data.len() as u64;
                if stdout.write_all(&message.data).and_then(|()| stdout.flush()).is_err() {
                    // Whoever read this is gone.
                    return Ok(true);
                }
            }
            keys = input.next() => match keys {
                Keys::Typed(data) => {
                    let message = pb::ConsoleInput { data, ..Default::default() };
                    if sender.send(message).await.is_err() {
                        return Ok(false);
                    }
                }
                Keys::Left => return Ok(true),
            },
        }
    }
}

enum Keys {
    Typed(Vec<u8>),
    Left,
}

/// Reads stdin on a thread of its own, because a read of a terminal cannot be cancelled.
struct Keyboard {
    typed: mpsc::Receiver<Vec<u8>>,
    left: Option<oneshot::Receiver<()>>,
}

impl Keyboard {
    fn start(interactive: bool) -> Self {
        let (typed_sender, typed) = mpsc::channel(INPUT_QUEUE);
        let (left_sender, left) = oneshot::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 1024];
            while let Ok(len @ 1..) = std::io::stdin().read(&mut buffer) {
                let data = &buffer[..len];
                let escape = data.iter().position(|byte| interactive && *byte == ESCAPE);
                let data = &data[..escape.unwrap_or(len)];
                if !data.is_empty() && typed_sender.blocking_send(data.to_vec()).is_err() {
                    return;
                }
                if escape.is_some() {
                    let _ = left_sender.send(());
                    return;
                }
            }
        });
        Self {
            typed,
            left: Some(left),
        }
    }

    /// What was typed. The end of stdin is no reason to leave.
    async fn next(&mut self) -> Keys {
        tokio::select! {
            biased;
            data = self.typed.recv() => {
                if let Some(data) = data {
                    return Keys::Typed(data);
                }
            }
            () = left(&mut self.left) => return Keys::Left,
        }
        left(&mut self.left).await;
        Keys::Left
    }

    async fn left(&mut self) {
        left(&mut self.left).await;
    }
}

/// Completes when the person left; never when stdin ended.
async fn left(receiver: &mut Option<oneshot::Receiver<()>>) {
    if let Some(waiting) = receiver {
        if waiting.await.is_ok() {
            // Whoever asks again gets the same answer.
            let (sender, again) = oneshot::channel();
            let _ = sender.send(());
            *receiver = Some(again);
            return;
        }
        *receiver = None;
    }
    std::future::pending::<()>().await;
}

/// The terminal without echo, line editing and signals, until this is dropped.
struct RawMode {
    before: libc::termios,
}

impl RawMode {
    fn enter() -> std::io::Result<Self> {
        let mut before = MaybeUninit::uninit();
        // SAFETY: `before` is large enough for what tcgetattr writes.
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, before.as_mut_ptr()) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: tcgetattr succeeded, so it filled the whole structure.
        let before = unsafe { before.assume_init() };
        let mut raw = before;
        // SAFETY: both point to whole, initialised structures.
        let done = unsafe {
            libc::cfmakeraw(&mut raw);
            libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw)
        };
        if done != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // SAFETY: `before` is what tcgetattr filled in.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &self.before) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn leaving_is_remembered_and_the_end_of_input_is_not_leaving() {
        let (sender, receiver) = oneshot::channel();
        let mut receiver = Some(receiver);
        sender.send(()).unwrap();
        left(&mut receiver).await;
        left(&mut receiver).await;

        let (sender, receiver) = oneshot::channel::<()>();
        let mut receiver = Some(receiver);
        drop(sender);
        let ended = tokio::time::timeout(Duration::from_millis(20), left(&mut receiver)).await;
        assert!(ended.is_err(), "the end of stdin must not detach");
    }
}
