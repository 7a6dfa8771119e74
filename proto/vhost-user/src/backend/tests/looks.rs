//! Whether the thread of a ring answers: stuck ones do not, and those whose requests wait do.

use super::peers::Honest;
use super::*;

fn unresponsive(served: &Served) -> Duration {
    served.status().queues[0].unresponsive
}

#[test]
fn thread_whose_requests_wait_answers() {
    let served = Served::new();
    served.device.holds.store(true, Ordering::SeqCst);
    let mut honest = Honest::connect(&served);
    honest.set_up();
    honest.start(0);
    honest.guest.offer(0, 0, b"waits");
    honest.guest.kick(0);
    eventually("the request is taken", || {
        let status = served.status();
        status
            .queues
            .first()
            .is_some_and(|queue| queue.inflight == 1)
    });
    for _ in 0..100 {
        served.status();
        eventually("an answer", || unresponsive(&served) == Duration::ZERO);
    }
    assert_eq!(served.status().queues[0].completed, 0);
}

#[test]
fn thread_that_is_stuck_does_not_answer_until_it_is_not() {
    for seat in [None, Some(WorkerGroup::spawn("looks", 1).unwrap())] {
        let served = Served::on(seat.as_ref().map(WorkerGroup::seat), &[]);
        let mut honest = Honest::connect(&served);
        honest.set_up();
        honest.start(0);
        honest.assert_echo(0, b"moves");
        let stuck = served.device.stuck.lock().unwrap();
        honest.guest.offer(0, 1, b"does not");
        honest.guest.kick(0);
        eventually("it has not answered for a while", || {
            unresponsive(&served) > Duration::from_millis(50)
        });
        drop(stuck);
        eventually("it answers again", || {
            unresponsive(&served) == Duration::ZERO
        });
    }
}

#[test]
fn look_makes_up_for_a_lost_kick() {
    let served = Served::new();
    let mut honest = Honest::connect(&served);
    honest.set_up();
    honest.start(0);
    honest.assert_echo(0, b"kicked");
    // The worker sleeps with notification on; this driver says nothing.
    let head = honest.guest.offer(0, 1, b"not kicked");
    let mut used = None;
    eventually("the look found the request", || {
        served.status();
        used = used.or_else(|| honest.guest.rings[0].pop_used());
        used.is_some()
    });
    assert_eq!(used, Some((head, 10)));
}
