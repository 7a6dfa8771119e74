//! What happens in a process, and which of it a rule is about.

use crate::action::{Action, Point};

/// Kind of request, or direction of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// `VIRTIO_BLK_T_IN`
    Read,
    /// `VIRTIO_BLK_T_OUT`
    Write,
    /// `VIRTIO_BLK_T_FLUSH`
    Flush,
    /// `VIRTIO_BLK_T_DISCARD`
    Discard,
    /// `VIRTIO_BLK_T_WRITE_ZEROES`
    WriteZeroes,
    /// To the guest.
    Receive,
    /// From the guest.
    Transmit,
}

/// Something that could go wrong. What a point does not know is `None`.
#[derive(Clone, Copy, Debug)]
pub struct Event<'a> {
    /// Where it happens.
    pub point: Point,
    /// Queue of the device.
    pub queue: Option<u16>,
    /// What it is about to do.
    pub op: Option<Op>,
    /// First sector and number of sectors.
    pub sectors: Option<(u64, u64)>,
    /// Name of a vhost-user request.
    pub message: Option<&'a str>,
    /// Destination and source of a frame.
    pub addresses: Option<([u8; 6], [u8; 6])>,
}

impl Event<'_> {
    /// An event of which nothing is known but the place.
    pub fn at(point: Point) -> Self {
        Self {
            point,
            queue: None,
            op: None,
            sectors: None,
            message: None,
            addresses: None,
        }
    }

    /// An event of a queue.
    pub fn of_queue(point: Point, queue: u16) -> Self {
        Self {
            queue: Some(queue),
            ..Self::at(point)
        }
    }
}

/// Which events a rule is about; what is empty matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// Id of a device of the process.
    pub device: String,
    /// Queues of the device.
    pub queues: Vec<u16>,
    /// Kinds of requests.
    pub ops: Vec<Op>,
    /// First sector and number of sectors.
    pub sectors: Option<(u64, u64)>,
    /// Names of vhost-user requests.
    pub messages: Vec<String>,
}

impl Selector {
    pub(crate) fn is_about_device(&self, id: &str) -> bool {
        self.device.is_empty() || self.device == id
    }

    /// Whether the event is one of those, for this action. What the event does not know does not
    /// match what was asked for.
    pub(crate) fn matches(&self, event: &Event<'_>, action: &Action) -> bool {
        if !self.queues.is_empty()
            && !event
                .queue
                .is_some_and(|queue| self.queues.contains(&queue))
        {
            return false;
        }
        if !self.ops.is_empty() && !event.op.is_some_and(|op| self.ops.contains(&op)) {
            return false;
        }
        if let Some(wanted) = self.sectors
            && !event
                .sectors
                .is_some_and(|sectors| overlap(wanted, sectors))
        {
            return false;
        }
        if !self.messages.is_empty()
            && !event
                .message
                .is_some_and(|name| self.messages.iter().any(|wanted| wanted == name))
        {
            return false;
        }
        if event.op.is_some_and(|op| !action.can_be_done_to(op)) {
            return false;
        }
        match action {
            Action::Partition { peers } => event
                .addresses
                .is_some_and(|(to, from)| peers.contains(&to) || peers.contains(&from)),
            _ => true,
        }
    }
}

fn overlap((first, count): (u64, u64), (other, other_count): (u64, u64)) -> bool {
    first < other.saturating_add(other_count) && other < first.saturating_add(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_at(first: u64, count: u64) -> Event<'static> {
        Event {
            op: Some(Op::Write),
            sectors: Some((first, count)),
            ..Event::of_queue(Point::Request, 1)
        }
    }

    #[test]
    fn empty_selector_matches_everything() {
        let selector = Selector::default();
        assert!(selector.is_about_device("anything"));
        assert!(selector.matches(&write_at(0, 1), &Action::Drop));
        assert!(selector.matches(&Event::at(Point::Message), &Action::Disconnect));
    }

    #[test]
    fn sectors_match_when_they_touch() {
        let selector = Selector {
            sectors: Some((100, 10)),
            ..Selector::default()
        };
        let matches = |first, count| selector.matches(&write_at(first, count), &Action::Drop);
        assert!(matches(100, 1) && matches(109, 1) && matches(0, 101) && matches(50, 1000));
        assert!(!matches(99, 1) && !matches(110, 1) && !matches(0, 100));
        assert!(!matches(u64::MAX, u64::MAX), "no overflow");
        let flush = Event {
            sectors: None,
            ..write_at(0, 0)
        };
        assert!(!selector.matches(&flush, &Action::Drop), "it has no place");
    }

    #[test]
    fn each_field_excludes() {
        let event = write_at(0, 8);
        let by_queue = |queue| Selector {
            queues: vec![queue],
            ..Selector::default()
        };
        assert!(by_queue(1).matches(&event, &Action::Drop));
        assert!(!by_queue(0).matches(&event, &Action::Drop));
        let by_op = |op| Selector {
            ops: vec![op],
            ..Selector::default()
        };
        assert!(by_op(Op::Write).matches(&event, &Action::Drop));
        assert!(!by_op(Op::Read).matches(&event, &Action::Drop));
        let by_message = Selector {
            messages: vec!["SET_MEM_TABLE".to_owned()],
            ..Selector::default()
        };
        let message = |name| Event {
            message: Some(name),
            ..Event::at(Point::Message)
        };
        assert!(by_message.matches(&message("SET_MEM_TABLE"), &Action::Disconnect));
        assert!(!by_message.matches(&message("GET_CONFIG"), &Action::Disconnect));
        let by_device = Selector {
            device: "root".to_owned(),
            ..Selector::default()
        };
        assert!(by_device.is_about_device("root") && !by_device.is_about_device("data"));
    }

    #[test]
    fn partition_is_about_frames_of_its_peers() {
        let peer = [2, 0, 0, 0, 0, 7];
        let action = Action::Partition {
            peers: [peer].into(),
        };
        let frame = |to, from| Event {
            addresses: Some((to, from)),
            ..Event::at(Point::Request)
        };
        let selector = Selector::default();
        assert!(selector.matches(&frame(peer, [1; 6]), &action));
        assert!(selector.matches(&frame([0xff; 6], peer), &action));
        assert!(!selector.matches(&frame([0xff; 6], [1; 6]), &action));
    }
}
