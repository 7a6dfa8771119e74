//! A guest's console as lines with the time of their arrival.

use std::io::{BufRead, BufReader, Read};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::time::{ClockId, clock_gettime};

/// Enough for the most talkative kernel; more means nobody reads.
const MAX_LINES: usize = 65536;

pub(super) struct Line {
    pub(super) text: String,
    /// On the clock of process start times.
    pub(super) since_boot: Duration,
}

pub(super) struct Console {
    lines: Receiver<Line>,
    /// The last lines, for errors.
    tail: Vec<String>,
}

impl Console {
    /// Reads until the stream ends.
    pub(super) fn follow(stream: impl Read + Send + 'static) -> Self {
        let (sender, lines) = mpsc::sync_channel(MAX_LINES);
        thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut bytes = Vec::new();
            while matches!(stream.read_until(b'\n', &mut bytes), Ok(1..)) {
                let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
                bytes.clear();
                if sender
                    .send(Line {
                        text,
                        since_boot: since_boot(),
                    })
                    .is_err()
                {
                    return;
                }
            }
        });
        Self {
            lines,
            tail: Vec::new(),
        }
    }

    /// The next line.
    pub(super) fn next(&mut self, deadline: Instant) -> Result<Line> {
        match self
            .lines
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            Ok(line) => {
                if self.tail.len() == 5 {
                    self.tail.remove(0);
                }
                self.tail.push(line.text.clone());
                Ok(line)
            }
            Err(RecvTimeoutError::Timeout) => {
                bail!("the console fell silent after: {}", self.tail.join(" | "))
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the console ended after: {}", self.tail.join(" | "))
            }
        }
    }

    /// The next line that contains `text`.
    pub(super) fn wait_for(&mut self, text: &str, limit: Duration) -> Result<Line> {
        let deadline = Instant::now() + limit;
        loop {
            let line = self.next(deadline)?;
            if line.text.contains(text) {
                return Ok(line);
            }
        }
    }
}

fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}
