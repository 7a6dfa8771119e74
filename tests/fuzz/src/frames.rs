//! A frame of a guest, judged by a policy, and somebody's idea of a capture filter.

use filter::Direction;
use filter::address::Mac;
use filter::expression::Expression;
use filter::gate::Gate;
use filter::packet::Packet;
use filter::policy::{AntiSpoofing, Policy, Protocol, Remote, Rule, Security};

use crate::input::Input;

/// What rings copy of a frame.
const HEAD_BYTES: usize = 256;
const MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);

thread_local! {
    static GATE: Gate = gate_with_rules();
}

/// How much longer the frame is than its beginning, the filter's length, the filter, the beginning.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let more = usize::from(input.half());
    let len = usize::from(input.byte());
    let expression = std::str::from_utf8(input.bytes(len)).ok();
    let expression = expression.and_then(|text| text.parse::<Expression>().ok());
    let head = input.bytes(HEAD_BYTES);
    // What is longer than the copy has a whole copy.
    let more = if head.len() == HEAD_BYTES { more } else { 0 };
    let Some(packet) = Packet::parse(head, head.len() + more) else {
        return;
    };
    if let Some(expression) = expression {
        let _ = expression.matches(&packet);
    }
    GATE.with(|gate| {
        for (now_ns, direction) in [Direction::Egress, Direction::Ingress]
            .into_iter()
            .enumerate()
        {
            let _ = gate.check(&packet, direction, now_ns as u64);
        }
    });
}

fn gate_with_rules() -> Gate {
    let gate = Gate::new(64);
    gate.set_policy(&Policy {
        anti_spoofing: Some(AntiSpoofing {
            macs: vec![MAC],
            ..AntiSpoofing::default()
        }),
        security: Some(Security {
            rules: vec![Rule {
                direction: Direction::Egress,
                family: None,
                protocol: Protocol::Any,
                remote: Remote::Any,
                is_stateless: false,
            }],
            ethertypes: Vec::new(),
        }),
        track_flows: true,
    });
    gate
}
