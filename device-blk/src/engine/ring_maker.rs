//! The one thread that sets up io_urings.
//!
//! What goes through a ring is not seen by system call filters, so a hijacked thread that could
//! set one up would be free of its filter. Once the process serves guests, only this thread may;
//! it talks to nobody, and hands out rings that are restricted to disk operations already. Where
//! it was not started (tests), whoever wants a ring sets it up.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use io_uring::IoUring;
use vhost_user::eventfd::EventFd;

use super::uring::{UringError, prepare};
use crate::confinement;

/// Setting up a ring takes a millisecond; for its memory the thread may wait some seconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// Queues that start at the same time.
const MAX_ORDERS: usize = 64;

static ORDERS: OnceLock<SyncSender<Order>> = OnceLock::new();

struct Order {
    entries: u16,
    completed: Arc<EventFd>,
    answer: SyncSender<Result<IoUring, UringError>>,
}

/// Starts the thread; it ends with the process.
///
/// # Errors
/// No thread to be had.
pub(crate) fn start() -> io::Result<()> {
    let (orders, inbox) = sync_channel(MAX_ORDERS);
    thread::Builder::new()
        .name("ring-maker".to_owned())
        .spawn(move || serve(&inbox))?;
    // A second one would wait for orders that never come, and end.
    let _ = ORDERS.set(orders);
    Ok(())
}

/// A ring that is restricted, signals `completed`, and is not enabled yet: the thread that
/// enables it is the one that may submit to it.
pub(super) fn make(entries: u16, completed: &Arc<EventFd>) -> Result<IoUring, UringError> {
    let Some(orders) = ORDERS.get() else {
        return prepare(entries, completed);
    };
    let (answer, made) = sync_channel(1);
    let order = Order {
        entries,
        completed: Arc::clone(completed),
        answer,
    };
    let gone = |kind: io::ErrorKind| UringError::Maker(kind.into());
    orders
        .send(order)
        .map_err(|_| gone(io::ErrorKind::BrokenPipe))?;
    made.recv_timeout(PATIENCE).map_err(|error| match error {
        RecvTimeoutError::Timeout => gone(io::ErrorKind::TimedOut),
        RecvTimeoutError::Disconnected => gone(io::ErrorKind::BrokenPipe),
    })?
}

fn serve(inbox: &Receiver<Order>) {
    if let Err(error) = confinement::confine_ring_maker() {
        tracing::error!(%error, "the thread that sets up rings cannot be confined; no disk starts");
        return;
    }
    for order in inbox {
        // Who gave up waiting does not want it any more.
        let _ = order.answer.send(prepare(order.entries, &order.completed));
    }
}
