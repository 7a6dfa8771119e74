//! A thread that serves one ring.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Instant;

use super::poller::{Look, Poller};
use super::serving::{Serving, event_fds};
use super::worker::Stop;
use super::{Device, Polling, QueueHandler, Wake};

/// Rounds of processing without a look at commands and events, while the driver keeps adding.
const BUSY_ROUNDS: u32 = 16;

/// Positions in the poll set; the handler's events follow.
const POLL_WAKE: usize = 0;
const POLL_KICK: usize = 1;
const POLL_EVENTS: usize = 2;

/// Serves a ring until its session stops it.
pub(super) fn run(mut serving: Serving, device: &dyn Device) {
    let mut handler = serving.start(device);
    let stop = serve_until_stopped(&mut serving, &mut handler);
    serving.stop(handler, stop);
}

fn serve_until_stopped(serving: &mut Serving, handler: &mut Option<Box<dyn QueueHandler>>) -> Stop {
    let mut poller = Poller::default();
    let event_fds = handler.as_deref().map_or_else(Vec::new, event_fds);
    // What was made available before this ring was served had its kick long ago.
    let mut again = true;
    // A kick was lost on purpose: nothing is looked at until something else happens.
    let mut is_deaf = false;
    let mut polls = Vec::with_capacity(POLL_EVENTS + event_fds.len());
    loop {
        if again && let Some(handler) = handler {
            again = serving.serve(handler.as_mut(), Wake::Kick, BUSY_ROUNDS);
        } else {
            again = false;
        }
        let idle_since = (!again).then(Instant::now);
        let found = match (&idle_since, &mut *handler) {
            (Some(idle_since), Some(handler)) if !is_deaf => {
                look(serving, &mut poller, handler.as_mut(), *idle_since)
            }
            _ => false,
        };
        if !again
            && !found
            && !is_deaf
            && let Some(handler) = handler
        {
            again = serving.prepare_sleep(handler.as_mut());
        }
        is_deaf = false;
        let has_commands = serving.mail.waker.take_news();
        polls.clear();
        if !found {
            fill_poll_set(serving, &mut polls, handler.as_deref(), &event_fds);
            poll(&mut polls, again || has_commands);
        }
        again |= found;
        if let Some(idle_since) = idle_since {
            poller.note_gap(idle_since, Instant::now());
        }
        if has_commands || polls.get(POLL_WAKE).is_some_and(is_readable) {
            let _ = serving.mail.waker.event.take();
            match serving.obey() {
                Some(stop) => return stop,
                None => again = true,
            }
        }
        if polls.get(POLL_KICK).is_some_and(is_readable) {
            serving.take_kick();
            let is_heard = serving.hears_kick();
            again |= is_heard;
            is_deaf = !again;
        }
        let Some(handler) = handler else { continue };
        for (index, event) in polls.iter().skip(POLL_EVENTS).enumerate() {
            if is_readable(event) {
                again |= serving.serve(handler.as_mut(), Wake::Event(index), BUSY_ROUNDS);
            }
        }
    }
}

/// Looks for work for a while, if that may pay; true when there is some.
fn look(
    serving: &mut Serving,
    poller: &mut Poller,
    handler: &mut dyn QueueHandler,
    idle_since: Instant,
) -> bool {
    let polling = handler.polling();
    if polling == Polling::Never || serving.is_broken {
        return false;
    }
    let look = poller.look(polling, idle_since, || {
        serving.has_new() || handler.has_events() || serving.mail.waker.has_news()
    });
    look == Look::Found
}

fn fill_poll_set(
    serving: &Serving,
    polls: &mut Vec<libc::pollfd>,
    handler: Option<&dyn QueueHandler>,
    event_fds: &[RawFd],
) {
    // poll ignores negative descriptors, which keeps positions fixed.
    let entry = |fd: RawFd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let kick = serving.kick.as_ref().filter(|_| !serving.is_broken);
    polls.clear();
    polls.push(entry(serving.mail.waker.event.as_fd().as_raw_fd()));
    polls.push(entry(kick.map_or(-1, |kick| kick.as_fd().as_raw_fd())));
    for (index, &fd) in event_fds.iter().enumerate() {
        let wanted =
            serving.events_polled && handler.is_some_and(|handler| handler.wants_event(index));
        polls.push(entry(if wanted { fd } else { -1 }));
    }
}

fn is_readable(entry: &libc::pollfd) -> bool {
    entry.revents != 0
}

/// Waits until something is readable. The wait has no time limit of its own: the session's
/// commands and its end always ring the wake descriptor.
fn poll(polls: &mut [libc::pollfd], at_once: bool) {
    let timeout_ms = if at_once { 0 } else { -1 };
    // SAFETY: a valid slice of pollfds; descriptors are kept open by worker and handler.
    let ready = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout_ms) };
    if ready < 0 {
        // EINTR: the entries' revents are unspecified.
        polls.iter_mut().for_each(|entry| entry.revents = 0);
    }
}
