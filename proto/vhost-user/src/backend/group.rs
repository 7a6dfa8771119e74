//! A bounded set of threads that serve the rings of many devices.
//!
//! A device that names a [`Seat`] has all its rings served by the seat's thread. The thread knows
//! two kinds of members: those it looks at by itself, one round after another, and those that are
//! asleep, whose driver kicks. A kick makes a member one of the former, and it stays one until the
//! whole thread runs out of work and goes to sleep: so busy rings need no kicks, and an idle ring
//! costs nothing. A thread that may poll does not look all the time: see [`pace`].
//!
//! ```text
//!             kick, event                        the thread finds nothing anywhere
//!   asleep -----------------> awake: looked at  ----------------------------------> asleep
//!                             every round         (unless it may poll)
//! ```

mod epoll;
mod pace;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::poller::{Look, Poller};
use super::serving::{Serving, event_fds};
use super::shared::Waker;
use super::{Device, Polling, QueueHandler, Wake};
use epoll::{Epoll, Happening, Trigger};
use pace::Pace;

/// Rounds between two looks at descriptors while there is work in rings.
const BUSY_ROUNDS: u32 = 64;

/// Looks at rings between two looks at descriptors, for a thread that never sleeps.
const LOOKS: u32 = 1024;

/// How long drivers are left alone once there is nothing to do: some ten small packets' time.
const LULL: Duration = Duration::from_micros(1);

/// The threads. They end when nobody holds the group or a seat in it any more, and all rings have
/// ended.
#[derive(Debug)]
pub struct WorkerGroup {
    seats: Vec<Seat>,
    next: AtomicUsize,
}

/// A place on one thread of a group.
#[derive(Clone, Debug)]
pub struct Seat {
    waker: Arc<Waker>,
    newcomers: Arc<Mutex<Sender<Newcomer>>>,
    /// Rings the thread after the last seat is gone, so that it ends.
    _farewell: Arc<Farewell>,
}

#[derive(Debug)]
struct Farewell(Arc<Waker>);

impl Drop for Farewell {
    fn drop(&mut self) {
        self.0.wake();
    }
}

/// A ring that is to be served.
struct Newcomer {
    serving: Serving,
    device: Arc<dyn Device>,
    alive: SyncSender<()>,
}

impl WorkerGroup {
    /// A group of `threads` threads, at least one. `name` appears in thread names.
    ///
    /// # Errors
    /// No thread or descriptor to be had.
    pub fn spawn(name: &str, threads: usize) -> io::Result<WorkerGroup> {
        let short_name: String = name.chars().take(11).collect();
        let seats = (0..threads.max(1))
            .map(|number| {
                let waker = Arc::new(Waker::new()?);
                let (newcomers, arrivals) = channel();
                let epoll = Epoll::new()?;
                epoll.add(waker.event.as_raw_fd(), Happening::News, Trigger::Level)?;
                let its_waker = Arc::clone(&waker);
                thread::Builder::new()
                    .name(format!("{short_name}/{number}"))
                    .spawn(move || GroupThread::new(its_waker, arrivals, epoll).run())?;
                Ok(Seat {
                    _farewell: Arc::new(Farewell(Arc::clone(&waker))),
                    waker,
                    newcomers: Arc::new(Mutex::new(newcomers)),
                })
            })
            .collect::<io::Result<_>>()?;
        Ok(WorkerGroup {
            seats,
            next: AtomicUsize::new(0),
        })
    }

    /// A place on one of the threads, in turn.
    pub fn seat(&self) -> Seat {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        self.seats[turn % self.seats.len()].clone()
    }
}

impl Seat {
    pub(super) fn waker(&self) -> &Arc<Waker> {
        &self.waker
    }

    pub(super) fn admit(
        &self,
        serving: Serving,
        device: Arc<dyn Device>,
        alive: SyncSender<()>,
    ) -> io::Result<()> {
        let newcomers = self
            .newcomers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        newcomers
            .send(Newcomer {
                serving,
                device,
                alive,
            })
            .map_err(|_| io::Error::other("the group's thread is gone"))?;
        drop(newcomers);
        self.waker.wake();
        Ok(())
    }
}

/// One ring on a group's thread.
struct Member {
    serving: Serving,
    handler: Option<Box<dyn QueueHandler>>,
    events: Vec<Event>,
    /// There is something to do, as far as is known.
    again: bool,
    is_awake: bool,
    /// Dropped when the ring has ended.
    _alive: SyncSender<()>,
}

struct Event {
    fd: i32,
    is_polled: bool,
}

/// One thread.
struct GroupThread {
    waker: Arc<Waker>,
    arrivals: Receiver<Newcomer>,
    epoll: Epoll,
    /// Positions are what the epoll tells; a place that was left is taken again.
    members: Vec<Option<Member>>,
    /// Positions of members that are awake.
    awake: Vec<usize>,
    poller: Poller,
    pace: Pace,
}

impl GroupThread {
    fn new(waker: Arc<Waker>, arrivals: Receiver<Newcomer>, epoll: Epoll) -> GroupThread {
        GroupThread {
            waker,
            arrivals,
            epoll,
            members: Vec::new(),
            awake: Vec::new(),
            poller: Poller::default(),
            pace: Pace::new(Instant::now()),
        }
    }

    fn run(mut self) {
        wake_in_time();
        let mut rounds = 0;
        loop {
            if self.waker.has_news() && self.waker.take_news() && !self.hear_news() {
                return;
            }
            let mut is_busy = self.serve_awake();
            if is_busy {
                rounds += 1;
                if rounds >= BUSY_ROUNDS {
                    rounds = 0;
                    self.look_at_descriptors(true);
                }
                continue;
            }
            rounds = 0;
            let idle_since = Instant::now();
            if self.nap(idle_since) {
                continue;
            }
            is_busy = self.look(idle_since);
            if !is_busy {
                let again = self.go_to_sleep();
                self.look_at_descriptors(again || self.waker.has_news());
            }
            self.poller.note_gap(idle_since, Instant::now());
        }
    }

    /// One round over the members that are awake; whether any of them had something to do.
    fn serve_awake(&mut self) -> bool {
        let mut is_busy = false;
        for position in 0..self.awake.len() {
            let Some(member) = &mut self.members[self.awake[position]] else {
                continue;
            };
            if !member.again {
                member.again = member.serving.has_new();
            }
            if member.again {
                let served = member.serve(Wake::Kick);
                self.pace.served(served);
                is_busy = true;
            }
        }
        is_busy
    }

    /// Lets packets gather for a moment if that pays; true when it did.
    fn nap(&mut self, now: Instant) -> bool {
        let Some(nap) = self.pace.nap(now) else {
            return false;
        };
        if self.waker.has_news() || self.polling() != Polling::Adaptive {
            return false;
        }
        thread::sleep(nap);
        self.pace.woke(nap, now.elapsed());
        true
    }

    /// The most that a member who is awake asks for.
    fn polling(&self) -> Polling {
        let awake = self.awake.iter();
        let polling = awake
            .filter_map(|&position| self.members[position].as_ref()?.handler.as_deref())
            .map(QueueHandler::polling);
        let most = polling.max_by_key(|polling| match polling {
            Polling::Never => 0,
            Polling::Adaptive => 1,
            Polling::Always => 2,
        });
        most.unwrap_or(Polling::Never)
    }

    /// Looks for work for a while, if that may pay; true when there is some, or news.
    fn look(&mut self, idle_since: Instant) -> bool {
        let polling = self.polling();
        if polling == Polling::Never {
            return false;
        }
        let GroupThread {
            waker,
            members,
            awake,
            poller,
            ..
        } = self;
        // Looking at once would find the first of what is coming, and take the cache lines away from
        // the driver that is writing the rest.
        while idle_since.elapsed() < LULL && !waker.has_news() {
            std::hint::spin_loop();
        }
        let mut looks = 0;
        let look = poller.look(polling, idle_since, || {
            looks += 1;
            // An adaptive look ends by itself.
            let mut found = waker.has_news() || (polling == Polling::Always && looks > LOOKS);
            for &position in awake.iter() {
                let Some(member) = &mut members[position] else {
                    continue;
                };
                if member.has_work() {
                    member.again = true;
                    found = true;
                }
            }
            found
        });
        if looks > LOOKS {
            self.look_at_descriptors(true);
        }
        look == Look::Found
    }

    /// Puts all members to sleep; true when one of them is not to be.
    fn go_to_sleep(&mut self) -> bool {
        let mut again = false;
        let GroupThread { members, awake, .. } = self;
        awake.retain(|&position| {
            let Some(member) = &mut members[position] else {
                return false;
            };
            if member.prepare_sleep() {
                again = true;
            } else {
                member.is_awake = false;
            }
            member.is_awake
        });
        again
    }

    /// Looks at kicks and events, and waits for some unless it is told not to.
    fn look_at_descriptors(&mut self, at_once: bool) {
        let GroupThread {
            epoll,
            members,
            awake,
            waker,
            ..
        } = self;
        epoll.wait(at_once, |epoll, happening| {
            let (position, wake) = match happening {
                Happening::News => {
                    let _ = waker.event.take();
                    // Written between the last look at the flag and the wait.
                    return;
                }
                Happening::Kick(position) => (position, Wake::Kick),
                Happening::Event(position, index) => (position, Wake::Event(index)),
            };
            let Some(member) = members.get_mut(position).and_then(Option::as_mut) else {
                return;
            };
            match wake {
                Wake::Kick => member.again |= member.serving.hears_kick(),
                Wake::Event(_) => drop(member.serve(wake)),
            }
            member.update_events(epoll, position);
            if member.wake_up() {
                awake.push(position);
            }
        });
    }

    /// Newcomers and commands; false when nobody is left and nobody can come any more.
    fn hear_news(&mut self) -> bool {
        let may_come = loop {
            match self.arrivals.try_recv() {
                Ok(newcomer) => self.admit(newcomer),
                Err(error) => break error == TryRecvError::Empty,
            }
        };
        for position in 0..self.members.len() {
            let Some(member) = &mut self.members[position] else {
                continue;
            };
            if !member.serving.mail.take() {
                continue;
            }
            // A command may replace the descriptor, and closing it does not take it out: the
            // frontend holds it as well.
            member.remove_kick(&self.epoll);
            match member.serving.obey() {
                None => {
                    member.add_kick(&self.epoll, position);
                    member.again = member.takes_kicks();
                    member.update_events(&self.epoll, position);
                    if member.wake_up() {
                        self.awake.push(position);
                    }
                }
                Some(stop) => {
                    member.remove_events(&self.epoll);
                    self.awake.retain(|&awake| awake != position);
                    if let Some(member) = self.members[position].take() {
                        member.serving.stop(member.handler, stop);
                    }
                }
            }
        }
        may_come || self.members.iter().any(Option::is_some)
    }

    fn admit(&mut self, newcomer: Newcomer) {
        let Newcomer {
            mut serving,
            device,
            alive,
        } = newcomer;
        let handler = serving.start(&*device);
        let events = handler.as_deref().map_or_else(Vec::new, event_fds);
        let member = Member {
            serving,
            handler,
            events: events
                .into_iter()
                .map(|fd| Event {
                    fd,
                    is_polled: false,
                })
                .collect(),
            again: false,
            is_awake: false,
            _alive: alive,
        };
        // Commands are heard next, which adds the descriptors.
        match self.members.iter_mut().find(|place| place.is_none()) {
            Some(place) => *place = Some(member),
            None => self.members.push(Some(member)),
        }
    }
}

impl Member {
    /// Returns how many requests it was.
    #[inline]
    fn serve(&mut self, wake: Wake) -> u64 {
        let before = self.serving.completed_total();
        self.again = match &mut self.handler {
            Some(handler) => self.serving.serve(handler.as_mut(), wake, 0),
            None => false,
        };
        self.serving.completed_total() - before
    }

    #[inline]
    fn has_work(&mut self) -> bool {
        let has_events = |handler: &mut Box<dyn QueueHandler>| handler.has_events();
        self.again || self.serving.has_new() || self.handler.as_mut().is_some_and(has_events)
    }

    /// True when it is to be looked at from now on, and was not.
    fn wake_up(&mut self) -> bool {
        let wakes = self.again && self.takes_kicks();
        wakes && !std::mem::replace(&mut self.is_awake, true)
    }

    fn takes_kicks(&self) -> bool {
        self.handler
            .as_deref()
            .is_some_and(QueueHandler::takes_kicks)
    }

    fn prepare_sleep(&mut self) -> bool {
        self.again = match &mut self.handler {
            Some(handler) => self.serving.prepare_sleep(handler.as_mut()),
            None => false,
        };
        self.again
    }

    fn add_kick(&mut self, epoll: &Epoll, position: usize) {
        if self.serving.is_broken {
            return;
        }
        if !self.takes_kicks() {
            return self.serving.refuse_kicks();
        }
        if let Some(kick) = &self.serving.kick
            && let Err(error) =
                epoll.add(kick.as_raw_fd(), Happening::Kick(position), Trigger::Edge)
        {
            tracing::warn!(%error, "no kick can come by such a descriptor");
        }
    }

    fn remove_kick(&self, epoll: &Epoll) {
        if let Some(kick) = &self.serving.kick {
            epoll.remove(kick.as_raw_fd());
        }
    }

    fn update_events(&mut self, epoll: &Epoll, position: usize) {
        let Some(handler) = &self.handler else {
            return;
        };
        for (index, event) in self.events.iter_mut().enumerate() {
            let wanted = self.serving.events_polled && handler.wants_event(index);
            if wanted == event.is_polled {
                continue;
            }
            event.is_polled = wanted;
            if !wanted {
                epoll.remove(event.fd);
            } else if let Err(error) =
                epoll.add(event.fd, Happening::Event(position, index), Trigger::Level)
            {
                tracing::error!(%error, "an event of the device goes unnoticed");
            }
        }
    }

    fn remove_events(&mut self, epoll: &Epoll) {
        for event in self.events.iter().filter(|event| event.is_polled) {
            epoll.remove(event.fd);
        }
    }
}

/// Asks the kernel not to delay this thread's timers to save wake-ups: naps are shorter than that.
fn wake_in_time() {
    // SAFETY: PR_SET_TIMERSLACK takes an integer. Where it is refused, naps are found to be late.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
}
