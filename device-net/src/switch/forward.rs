//! Frames from one transmit ring to wherever they go.
//!
//! A batch at a time: what is needed of each frame is copied and looked up, then each receiver's ring
//! is locked once for all frames that it gets, and then the batch goes back to its driver. Whoever
//! has no buffers loses frames; nobody waits.

use std::sync::Arc;
use std::time::Instant;

use vhost_user::backend::{Polling, QueueHandler, Wake};
use vhost_user::ring::{Batch, Ring, RingError};

use super::deliver::{Body, Delivery};
use super::flow::{LOOKED_AT_BYTES, flow_hash};
use super::frame::{Destination, Frame};
use super::mac_table::{Key, PortNumber};
use super::offload;
use super::port::{Port, RingReceiver};
use super::storm::{Storm, StormLimits};
use super::vlan::Vlans;
use super::{Outlet, Switch, View, ViewPort};
use crate::nic::header::{Header, Offloads, header_len_bytes};
use crate::nic::state::NicState;
use crate::nic::stats::{Direction, DropReason};

/// Frames taken at once. Their beginnings and the buffers for them stay in the first-level cache.
const BATCH: usize = 64;

const BROADCAST: [u8; 6] = [0xff; 6];

/// One transmit ring.
pub(super) struct TxQueue {
    nic: Arc<NicState>,
    pair: u16,
    polling: Polling,
    header_len_bytes: usize,
    offloads: Offloads,
    batch: Batch,
    frames: Vec<Incoming>,
    sender: Sender,
}

/// A frame and its chain's place in the batch.
struct Incoming {
    frame: Frame,
    chain: usize,
}

/// Who sends, and what is at hand to do so.
struct Sender {
    switch: Arc<Switch>,
    number: PortNumber,
    vlans: Arc<Vlans>,
    view: Arc<View>,
    storm: StormLimits,
    /// The receivers' buffers; empty between frames of one receiver and the next.
    buffers: Batch,
    /// Frames that are finished in software.
    scratch: Vec<u8>,
    segment: Vec<u8>,
}

impl TxQueue {
    pub(super) fn new(port: &Port, nic: &Arc<NicState>, pair: u16, features: u64) -> Self {
        Self {
            nic: Arc::clone(nic),
            pair,
            polling: port.polling,
            header_len_bytes: header_len_bytes(features),
            offloads: Offloads::to_device(features),
            batch: Batch::new(),
            frames: Vec::with_capacity(BATCH),
            sender: Sender {
                switch: Arc::clone(&port.switch),
                number: port.number,
                vlans: Arc::clone(&port.vlans),
                view: port.switch.view(),
                storm: StormLimits::new(Instant::now()),
                buffers: Batch::new(),
                scratch: Vec::new(),
                segment: Vec::new(),
            },
        }
    }

    /// Looks at the frames of the batch.
    fn read_frames(&mut self) {
        let counters = &self.nic.stats[usize::from(self.pair)].tx.0;
        let is_link_up = self.nic.is_link_up();
        let now = Instant::now();
        let mut last = None;
        let (mut frames, mut bytes) = (0, 0);
        for chain in 0..self.batch.len() {
            if !is_link_up {
                counters.count_drop(DropReason::LinkDown);
                continue;
            }
            let sender = &mut self.sender;
            let frame = Frame::of(
                self.batch.chain(chain),
                self.header_len_bytes,
                self.offloads,
                &sender.vlans,
            );
            let frame = frame.and_then(|frame| sender.route(frame, &mut last, now));
            match frame {
                Ok(frame) => {
                    frames += 1;
                    bytes += u64::from(frame.len_bytes);
                    self.frames.push(Incoming { frame, chain });
                }
                Err(reason) => counters.count_drop(reason),
            }
        }
        counters.count_many(frames, bytes);
    }

    fn counters(&self) -> &Direction {
        &self.nic.stats[usize::from(self.pair)].tx.0
    }

    /// Delivers what was read.
    fn send_frames(&mut self) {
        let view = Arc::clone(&self.sender.view);
        let floods = |incoming: &Incoming| incoming.frame.destination == Destination::Flood;
        if self.frames.iter().any(floods) {
            for (number, port) in (0..).zip(&view.ports) {
                if let Some(port) = port.as_ref().filter(|_| number != self.sender.number) {
                    self.send_to(number, port);
                }
            }
        }
        // Usually one port gets all.
        while let Some(Destination::Port(number)) = self
            .frames
            .iter()
            .map(|incoming| incoming.frame.destination)
            .find(|destination| matches!(destination, Destination::Port(_)))
        {
            match view.ports.get(usize::from(number)) {
                Some(Some(port)) => self.send_to(number, port),
                _ => self.drop_for(number),
            }
        }
        self.frames.clear();
    }

    /// Delivers what goes to one port.
    fn send_to(&mut self, number: PortNumber, port: &ViewPort) {
        let [outlet] = &port.outlets[..] else {
            return self.send_spread(number, port);
        };
        let is_meant = |incoming: &Incoming| incoming.frame.destination.includes(number);
        let count = self.frames.iter().filter(|frame| is_meant(frame)).count();
        if count == 0 {
            return;
        }
        let (frames, batch) = (&mut self.frames, &self.batch);
        let skip = self.header_len_bytes;
        let lost = self.sender.send(
            outlet,
            &port.vlans,
            count,
            frames.iter().filter(|frame| is_meant(frame)),
            |incoming| Body::Chain {
                chain: batch.chain(incoming.chain),
                skip_bytes: skip + incoming.frame.head_len_bytes(),
            },
        );
        self.count_foreign(lost);
        self.settle(number);
    }

    /// As [`TxQueue::send_to`], to a port with several receive rings, or none.
    fn send_spread(&mut self, number: PortNumber, port: &ViewPort) {
        if port.outlets.is_empty() {
            return self.drop_for(number);
        }
        let mut lost = 0;
        for (ring, outlet) in port.outlets.iter().enumerate() {
            let (frames, batch) = (&self.frames, &self.batch);
            let skip = self.header_len_bytes;
            let is_meant = |incoming: &&Incoming| {
                incoming.frame.destination.includes(number) && {
                    let mut start = [0; LOOKED_AT_BYTES];
                    let len = batch.chain(incoming.chain).read_up_to(skip, &mut start);
                    flow_hash(&start[..len]) as usize % port.outlets.len() == ring
                }
            };
            let meant: Vec<&Incoming> = frames.iter().filter(is_meant).collect();
            if meant.is_empty() {
                continue;
            }
            lost += self.sender.send(
                outlet,
                &port.vlans,
                meant.len(),
                meant.iter().copied(),
                |incoming| Body::Chain {
                    chain: batch.chain(incoming.chain),
                    skip_bytes: skip + incoming.frame.head_len_bytes(),
                },
            );
        }
        self.count_foreign(lost);
        self.settle(number);
    }

    /// The port has no ring that runs.
    fn drop_for(&mut self, number: PortNumber) {
        for incoming in &self.frames {
            if incoming.frame.destination == Destination::Port(number) {
                self.counters().count_drop(DropReason::NoPort);
            }
        }
        self.settle(number);
    }

    /// What goes to this port alone was delivered.
    fn settle(&mut self, number: PortNumber) {
        for incoming in &mut self.frames {
            if incoming.frame.destination == Destination::Port(number) {
                incoming.frame.destination = Destination::Nowhere;
            }
        }
    }

    fn count_foreign(&self, frames: usize) {
        for _ in 0..frames {
            self.counters().count_drop(DropReason::Vlan);
        }
    }
}

impl QueueHandler for TxQueue {
    fn process(&mut self, ring: &mut Ring, _wake: Wake) -> Result<(), RingError> {
        let popped = ring.pop_batch(&mut self.batch, BATCH);
        if !self.batch.is_empty() {
            self.sender.refresh();
            self.read_frames();
            self.send_frames();
            ring.complete_all(&mut self.batch);
        }
        popped.map(|_| ())
    }

    fn polling(&self) -> Polling {
        self.polling
    }
}

impl Destination {
    #[inline]
    fn includes(self, number: PortNumber) -> bool {
        match self {
            Self::Port(port) => port == number,
            Self::Flood => true,
            Self::Nowhere => false,
        }
    }
}

impl Sender {
    /// Hears of ports that came and went.
    #[inline]
    fn refresh(&mut self) {
        if self.view.generation != self.switch.generation() {
            self.view = self.switch.view();
        }
    }

    /// Finds out where a frame goes. `last` is what was found out for the previous one.
    #[inline]
    fn route(
        &mut self,
        mut frame: Frame,
        last: &mut Option<Frame>,
        now: Instant,
    ) -> Result<Frame, DropReason> {
        if let Some(last) = last
            && last.vlan == frame.vlan
            && last.source() == frame.source()
            && last.destination_mac() == frame.destination_mac()
            && matches!(last.destination, Destination::Port(_))
        {
            frame.destination = last.destination;
            return Ok(frame);
        }
        let macs = &self.switch.macs;
        let now_s = self.switch.seconds(now);
        if !macs.learn(Key::new(frame.source(), frame.vlan), self.number, now_s) {
            return Err(DropReason::TakenAddress);
        }
        let target = frame.destination_mac();
        let storm = match target {
            BROADCAST => Storm::Broadcast,
            [first, ..] if first & 1 != 0 => Storm::Multicast,
            _ => match macs.port_of(Key::new(target, frame.vlan), now_s) {
                Some(number) if number == self.number => return Err(DropReason::NoPort),
                Some(number) => {
                    frame.destination = Destination::Port(number);
                    *last = Some(frame);
                    return Ok(frame);
                }
                None => Storm::UnknownUnicast,
            },
        };
        if !self.storm.admit(storm, now) {
            return Err(DropReason::Storm);
        }
        frame.destination = Destination::Flood;
        Ok(frame)
    }

    /// Puts frames into one ring. Returns how many were meant for this port alone, which is not in
    /// their VLAN.
    #[inline]
    fn send<'f, 'b>(
        &mut self,
        outlet: &Outlet,
        vlans: &Vlans,
        expected: usize,
        frames: impl Iterator<Item = &'f Incoming>,
        body_of: impl Fn(&Incoming) -> Body<'b>,
    ) -> usize {
        let Outlet::Ring(receiver) = outlet;
        let counters = receiver.counters();
        let drop_all = |frames: &mut dyn Iterator<Item = &'f Incoming>, reason| {
            frames.for_each(|_| counters.count_drop(reason));
        };
        let mut frames = frames;
        if !receiver.nic.is_link_up() {
            drop_all(&mut frames, DropReason::LinkDown);
            return 0;
        }
        let Some(mut ring) = receiver.ring.lock() else {
            drop_all(&mut frames, DropReason::NoBuffers);
            return 0;
        };
        let mut delivery = Delivery::begin(receiver, &mut ring, &mut self.buffers, expected);
        let mut foreign = 0;
        for incoming in frames {
            let frame = &incoming.frame;
            let Some(egress) = vlans.egress(frame.vlan, frame.looks_tagged()) else {
                foreign += usize::from(frame.destination != Destination::Flood);
                continue;
            };
            let (head, head_len) = frame.head_for(egress);
            let head = &head[..head_len];
            let body = body_of(incoming);
            let put = match &frame.header {
                None => delivery.put(None, head, body),
                Some(header) => {
                    let shift = head_len as isize - frame.head_len_bytes() as isize;
                    let (scratch, segment) = (&mut self.scratch, &mut self.segment);
                    put_unfinished(
                        &mut delivery,
                        receiver,
                        header,
                        shift,
                        head,
                        body,
                        scratch,
                        segment,
                    )
                }
            };
            if let Err(reason) = put {
                counters.count_drop(reason);
            }
        }
        let delivered = delivery.end();
        drop(ring);
        counters.count_many(delivered.packets, delivered.bytes);
        if let Some(error) = delivered.error {
            receiver.ring.report(error);
        }
        foreign
    }
}

/// A frame that leaves something to be finished: by the receiver's driver if it can, else here.
#[expect(
    clippy::too_many_arguments,
    reason = "all of a frame, and storage to finish it in"
)]
fn put_unfinished(
    delivery: &mut Delivery<'_>,
    receiver: &RingReceiver,
    header: &Header,
    shift: isize,
    head: &[u8],
    body: Body<'_>,
    scratch: &mut Vec<u8>,
    segment: &mut Vec<u8>,
) -> Result<(), DropReason> {
    let frame_len_bytes = head.len() + body.len();
    let header = offload::shifted(header, shift, frame_len_bytes).ok_or(DropReason::Malformed)?;
    if let Ok(header) = Header::checked(header.as_bytes(), frame_len_bytes, receiver.offloads) {
        return delivery.put(Some(&header), head, body);
    }
    scratch.clear();
    scratch.extend_from_slice(head);
    body.copy_into(scratch);
    offload::finish(&header, scratch, segment, |frame| {
        let (head, rest) = frame.split_at(frame.len().min(super::frame::ETHERNET_LEN_BYTES));
        delivery.put(None, head, Body::Own(rest))
    })
}
