//! The serial console on standard input and output.

use std::io::{self, IsTerminal, Read, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::Duration;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use tracing::error;

use crate::console::Console;
use crate::lifecycle::Handle;
use crate::machine::Confine;
use crate::seccomp::ThreadKind;
use crate::serial::SerialPort;

/// Ctrl-], which telnet and others use to leave.
const ESCAPE: u8 = 0x1d;
/// How often the writer looks whether output has ended; it wakes for output by itself.
const WAIT: Duration = Duration::from_secs(1);
/// How long the last output may take to be written once the machine is off.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);

/// Threads that copy between the guest and this process's terminal or pipes.
pub struct StdioConsole {
    flushed: Receiver<()>,
    _raw_mode: Option<RawMode>,
}

impl StdioConsole {
    /// Starts copying. On a terminal Ctrl-] stops the machine.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn start(
        console: Arc<Console>,
        serial: Arc<SerialPort>,
        handle: Handle,
        confine: Confine,
    ) -> io::Result<Self> {
        let raw_mode = RawMode::enter();
        let escape = raw_mode.is_some();
        let (done, flushed) = sync_channel(1);
        let confine_input = confine.clone();
        thread::Builder::new()
            .name("stdout".into())
            .spawn(move || {
                match confine(ThreadKind::Stdio) {
                    Ok(()) => copy_out(&console),
                    Err(err) => error!("no console on standard output: {err}"),
                }
                // Nobody waits any more if this took too long.
                let _ = done.try_send(());
            })?;
        thread::Builder::new().name("stdin".into()).spawn(move || {
            match confine_input(ThreadKind::Stdio) {
                Ok(()) => copy_in(&serial, &handle, escape),
                Err(err) => error!("no console on standard input: {err}"),
            }
        })?;
        Ok(Self {
            flushed,
            _raw_mode: raw_mode,
        })
    }

    /// Waits until the console's last bytes are written, but not for a reader that has stopped.
    pub fn finish(self) {
        let _ = self.flushed.recv_timeout(FLUSH_PATIENCE);
    }
}

fn copy_out(console: &Console) {
    let mut stdout = io::stdout().lock();
    let mut offset = 0;
    while let Some(chunk) = console.wait_and_read(offset, WAIT) {
        offset = chunk.end();
        if stdout
            .write_all(&chunk.data)
            .and_then(|()| stdout.flush())
            .is_err()
        {
            return;
        }
    }
}

fn copy_in(serial: &SerialPort, handle: &Handle, escape: bool) {
    let mut bytes = [0; 1024];
    let mut stdin = io::stdin().lock();
    loop {
        let typed = match stdin.read(&mut bytes) {
            Ok(0) | Err(_) => return,
            Ok(len) => &bytes[..len],
        };
        if escape && typed.contains(&ESCAPE) {
            handle.stop();
            return;
        }
        serial.type_in(typed);
    }
}

/// The terminal passes keys on as they are, until this is dropped.
struct RawMode(Termios);

impl RawMode {
    /// `None` if standard input is no terminal.
    fn enter() -> Option<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}
