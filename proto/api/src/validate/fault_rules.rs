//! Rules of fault injection, from the messages to what decides by them.

use std::time::Duration;

use faults::{Action, MAX_RULES, Op, Rule, Selector, TornEnd, Trigger};
use tonic::Status;

use super::SECTOR_BYTES;
use crate::device::{self, fault_rule::Action as Asked};
use crate::errors::Violations;

/// Longest time to live of what is armed: it can be renewed.
pub const MAX_FAULT_TTL_MS: u64 = 3_600_000;
/// Longest delay of one request, frame or message.
const MAX_DELAY_MS: u64 = 60_000;
/// Longest time for which a queue or a thread does nothing.
const MAX_STOP_MS: u64 = 600_000;
/// Frames or completions that may go ahead of one that waits.
const MAX_WINDOW: u32 = 256;
/// Copies of one frame, and bytes of one request or frame that are spoiled.
const MAX_AT_ONCE: u32 = 64;
/// NICs of one partition.
const MAX_PEERS: usize = 256;
/// Entries of a list in a selector.
const MAX_SELECTED: usize = 64;

/// Checks what a process is asked to arm, and makes rules of it.
///
/// # Errors
/// As [`super::attach_request`].
pub fn arm_faults_request(request: &device::ArmFaultsRequest) -> Result<Vec<Rule>, Status> {
    let mut found = Violations::new();
    fault_id(&mut found, "id", &request.id);
    fault_ttl(&mut found, "ttl_ms", request.ttl_ms);
    let count = request.rules.len();
    found.require((1..=MAX_RULES).contains(&count), "rules", || {
        format!("must be 1 to {MAX_RULES}, not {count}")
    });
    let rules: Vec<_> = request
        .rules
        .iter()
        .take(MAX_RULES)
        .enumerate()
        .filter_map(|(index, rule)| {
            let name = match rule.name.as_str() {
                "" => index.to_string(),
                name => name.to_owned(),
            };
            let rule = fault_rule(&mut found, &format!("rules[{index}]"), rule)?;
            Some(Rule { name, ..rule })
        })
        .collect();
    let mut names: Vec<_> = rules.iter().map(|rule| rule.name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        found.add("rules", format!("two rules have the name {:?}", twice[0]));
    }
    found.into_result().map(|()| rules)
}

/// Checks how long faults may last.
pub fn fault_ttl(found: &mut Violations, field: &str, ttl_ms: u64) {
    found.require((1..=MAX_FAULT_TTL_MS).contains(&ttl_ms), field, || {
        format!("must be 1 to {MAX_FAULT_TTL_MS}, not {ttl_ms}")
    });
}

/// Checks what faults are called.
pub fn fault_id(found: &mut Violations, field: &str, id: &str) {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let fits = id.len() <= 63
        && id.bytes().next().is_some_and(is_plain)
        && id
            .bytes()
            .all(|byte| is_plain(byte) || matches!(byte, b'.' | b'-'));
    found.require(fits, field, || {
        format!(
            "{id:?} must be at most 63 of a-z, 0-9, '.' and '-', and begin with a letter or digit"
        )
    });
}

/// Checks one rule at `field`; `None` when something is wrong with it.
pub fn fault_rule(found: &mut Violations, field: &str, rule: &device::FaultRule) -> Option<Rule> {
    if !rule.name.is_empty() {
        fault_id(found, &format!("{field}.name"), &rule.name);
    }
    let selector = selector(found, &format!("{field}.selector"), rule.selector.as_ref());
    let trigger = trigger(found, &format!("{field}.trigger"), rule.trigger.as_ref());
    at_most_ms(
        found,
        &format!("{field}.start_after_ms"),
        rule.start_after_ms,
        MAX_FAULT_TTL_MS,
    );
    at_most_ms(
        found,
        &format!("{field}.duration_ms"),
        rule.duration_ms,
        MAX_FAULT_TTL_MS,
    );
    let action = match &rule.action {
        Some(asked) => action(found, field, asked),
        None => {
            found.add(field, "has no action");
            None
        }
    };
    Some(Rule {
        name: rule.name.clone(),
        selector: selector?,
        trigger,
        start_after: Duration::from_millis(rule.start_after_ms),
        duration: (rule.duration_ms > 0).then(|| Duration::from_millis(rule.duration_ms)),
        action: action?,
    })
}

fn selector(
    found: &mut Violations,
    field: &str,
    selector: Option<&device::FaultSelector>,
) -> Option<Selector> {
    let Some(asked) = selector else {
        return Some(Selector::default());
    };
    for (list, len) in [
        ("queues", asked.queues.len()),
        ("ops", asked.ops.len()),
        ("messages", asked.messages.len()),
    ] {
        found.require(len <= MAX_SELECTED, &format!("{field}.{list}"), || {
            format!("must be at most {MAX_SELECTED}, not {len}")
        });
    }
    let queues: Option<Vec<u16>> = asked
        .queues
        .iter()
        .map(|&queue| u16::try_from(queue).ok())
        .collect();
    found.require(queues.is_some(), &format!("{field}.queues"), || {
        "has a number that no queue has".into()
    });
    let ops: Option<Vec<Op>> = asked.ops.iter().map(|&number| op(number)).collect();
    found.require(ops.is_some(), &format!("{field}.ops"), || {
        "has a value that is unknown or unspecified".into()
    });
    for (index, message) in asked.messages.iter().enumerate() {
        let fits = (1..=32).contains(&message.len())
            && message
                .bytes()
                .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_');
        found.require(fits, &format!("{field}.messages[{index}]"), || {
            format!("{message:?} must be a request as the specification writes it: SET_MEM_TABLE")
        });
    }
    Some(Selector {
        device: asked.device.clone(),
        queues: queues?,
        ops: ops?,
        sectors: (asked.num_sectors > 0).then_some((asked.first_sector, asked.num_sectors)),
        messages: asked.messages.clone(),
    })
}

fn op(number: i32) -> Option<Op> {
    match device::FaultOp::try_from(number).ok()? {
        device::FaultOp::Unspecified => None,
        device::FaultOp::Read => Some(Op::Read),
        device::FaultOp::Write => Some(Op::Write),
        device::FaultOp::Flush => Some(Op::Flush),
        device::FaultOp::Discard => Some(Op::Discard),
        device::FaultOp::WriteZeroes => Some(Op::WriteZeroes),
        device::FaultOp::Receive => Some(Op::Receive),
        device::FaultOp::Transmit => Some(Op::Transmit),
    }
}

fn trigger(found: &mut Violations, field: &str, trigger: Option<&device::FaultTrigger>) -> Trigger {
    let asked = trigger.copied().unwrap_or_default();
    let is_part = (0.0..=1.0).contains(&asked.probability);
    found.require(is_part, &format!("{field}.probability"), || {
        format!("must be from 0 to 1, not {}", asked.probability)
    });
    Trigger {
        nth: asked.nth.max(1),
        every: asked.every.max(1),
        probability: match asked.probability {
            0.0 => 1.0,
            probability => probability,
        },
        max_hits: (asked.max_hits > 0).then_some(asked.max_hits),
    }
}

/// Collects what is wrong below `field`.
fn action(found: &mut Violations, field: &str, asked: &Asked) -> Option<Action> {
    let at = |name: &str| format!("{field}.{name}");
    let millis = Duration::from_millis;
    Some(match asked {
        Asked::Latency(fault) => {
            let sum_us = fault.latency_us.saturating_add(fault.jitter_us);
            at_most_ms(found, &at("latency"), sum_us.div_ceil(1000), MAX_DELAY_MS);
            Action::Latency {
                latency: Duration::from_micros(fault.latency_us),
                jitter: Duration::from_micros(fault.jitter_us),
            }
        }
        Asked::Drop(_) => Action::Drop,
        Asked::Corrupt(fault) => Action::Corrupt {
            bytes: at_once(found, &at("corrupt.bytes"), fault.bytes),
        },
        Asked::Reorder(fault) => {
            let max_delay_ms = u64::from(fault.max_delay_ms);
            at_most_ms(
                found,
                &at("reorder.max_delay_ms"),
                max_delay_ms,
                MAX_DELAY_MS,
            );
            Action::Reorder {
                window: window(found, &at("reorder.window"), fault.window),
                max_delay: millis(if max_delay_ms == 0 { 100 } else { max_delay_ms }),
            }
        }
        Asked::Pause(fault) => {
            Action::Pause(stop(found, &at("pause.duration_ms"), fault.duration_ms))
        }
        Asked::Error(fault) => match errno(&fault.errno) {
            Some(errno) => Action::Error { errno },
            None => {
                found.add(
                    at("error.errno"),
                    format!("{:?} is none of {}", fault.errno, errno_names()),
                );
                return None;
            }
        },
        Asked::Short(fault) => Action::Short {
            bytes: whole_sectors(found, &at("short.bytes"), fault.bytes, SECTOR_BYTES),
        },
        Asked::Torn(fault) => Action::Torn {
            bytes: whole_sectors(found, &at("torn.bytes"), fault.bytes, 0),
            end: match device::TornEnd::try_from(fault.end) {
                Ok(device::TornEnd::Success) => TornEnd::Success,
                Ok(device::TornEnd::Crash) => TornEnd::Crash,
                Ok(device::TornEnd::Error | device::TornEnd::Unspecified) => TornEnd::Error,
                Err(_) => {
                    found.add(at("torn.end"), format!("unknown value {}", fault.end));
                    return None;
                }
            },
        },
        Asked::Misdirect(fault) => {
            found.require(fault.sectors != 0, &at("misdirect.sectors"), || {
                "must not be 0".into()
            });
            Action::Misdirect {
                sectors: fault.sectors,
            }
        }
        Asked::Duplicate(fault) => Action::Duplicate {
            copies: at_once(found, &at("duplicate.copies"), fault.copies),
        },
        Asked::Rate(fault) => {
            found.require(
                fault.bytes_per_second > 0,
                &at("rate.bytes_per_second"),
                || "must not be 0; use drop for nothing at all".into(),
            );
            Action::Rate {
                bytes_per_second: fault.bytes_per_second.max(1),
            }
        }
        Asked::LinkFlap(fault) => {
            let mut part = |name: &str, asked_ms: u32| {
                at_most_ms(found, &at(name), u64::from(asked_ms), MAX_STOP_MS);
                millis(if asked_ms == 0 {
                    1000
                } else {
                    u64::from(asked_ms)
                })
            };
            Action::LinkFlap {
                down: part("link_flap.down_ms", fault.down_ms),
                up: part("link_flap.up_ms", fault.up_ms),
            }
        }
        Asked::Partition(fault) => {
            let count = fault.peers.len();
            found.require(
                (1..=MAX_PEERS).contains(&count),
                &at("partition.peers"),
                || format!("must be 1 to {MAX_PEERS} addresses, not {count}"),
            );
            let peers: Option<Vec<[u8; 6]>> = fault.peers.iter().map(|text| mac(text)).collect();
            let Some(peers) = peers else {
                found.add(
                    at("partition.peers"),
                    "has something that is no address as 52:54:00:12:34:56",
                );
                return None;
            };
            Action::Partition {
                peers: peers.into(),
            }
        }
        Asked::LostKick(_) => Action::LostKick,
        Asked::LateKick(fault) => {
            at_most_ms(
                found,
                &at("late_kick.delay_ms"),
                fault.delay_ms,
                MAX_DELAY_MS,
            );
            Action::LateKick(millis(fault.delay_ms))
        }
        Asked::LateReconnect(fault) => {
            Action::LateReconnect(stop(found, &at("late_reconnect.delay_ms"), fault.delay_ms))
        }
        Asked::LostCall(_) => Action::LostCall,
        Asked::LateReply(fault) => {
            at_most_ms(
                found,
                &at("late_reply.delay_ms"),
                fault.delay_ms,
                MAX_DELAY_MS,
            );
            Action::LateReply(millis(fault.delay_ms))
        }
        Asked::UsedStall(fault) => Action::UsedStall(stop(
            found,
            &at("used_stall.duration_ms"),
            fault.duration_ms,
        )),
        Asked::BadDescriptor(_) => Action::BadDescriptor,
        Asked::OutOfOrder(fault) => Action::OutOfOrder {
            window: window(found, &at("out_of_order.window"), fault.window),
        },
        Asked::Disconnect(_) => Action::Disconnect,
        Asked::RefuseFeatures(fault) => {
            found.require(fault.features != 0, &at("refuse_features.features"), || {
                "must name a feature bit".into()
            });
            Action::RefuseFeatures(fault.features)
        }
        Asked::MemoryRace(fault) => {
            at_most_ms(
                found,
                &at("memory_race.delay_ms"),
                fault.delay_ms,
                MAX_DELAY_MS,
            );
            Action::MemoryRace(millis(fault.delay_ms))
        }
        Asked::LostInflight(_) => Action::LostInflight,
        Asked::Crash(_) => Action::Crash,
        Asked::Hang(fault) => Action::Hang(stop(found, &at("hang.duration_ms"), fault.duration_ms)),
    })
}

fn at_most_ms(found: &mut Violations, field: &str, value_ms: u64, max_ms: u64) {
    found.require(value_ms <= max_ms, field, || {
        format!("must be at most {max_ms} ms, not {value_ms}")
    });
}

fn stop(found: &mut Violations, field: &str, duration_ms: u64) -> Duration {
    found.require((1..=MAX_STOP_MS).contains(&duration_ms), field, || {
        format!("must be 1 to {MAX_STOP_MS}, not {duration_ms}")
    });
    Duration::from_millis(duration_ms)
}

fn window(found: &mut Violations, field: &str, window: u32) -> u32 {
    found.require(window <= MAX_WINDOW, field, || {
        format!("must be at most {MAX_WINDOW}, not {window}")
    });
    window.max(1)
}

fn at_once(found: &mut Violations, field: &str, count: u32) -> u32 {
    found.require(count <= MAX_AT_ONCE, field, || {
        format!("must be at most {MAX_AT_ONCE}, not {count}")
    });
    count.max(1)
}

fn whole_sectors(found: &mut Violations, field: &str, bytes: u64, min_bytes: u64) -> u64 {
    found.require(bytes.is_multiple_of(SECTOR_BYTES), field, || {
        format!("must be whole sectors of {SECTOR_BYTES} bytes, not {bytes}")
    });
    found.require(bytes >= min_bytes, field, || {
        format!("must be at least {min_bytes}")
    });
    bytes
}

/// What an image may answer.
const ERRNOS: &[(&str, i32)] = &[
    ("EIO", libc::EIO),
    ("ENOSPC", libc::ENOSPC),
    ("EDQUOT", libc::EDQUOT),
    ("EROFS", libc::EROFS),
    ("ENOMEM", libc::ENOMEM),
    ("ETIMEDOUT", libc::ETIMEDOUT),
    ("ENODEV", libc::ENODEV),
    ("ENXIO", libc::ENXIO),
    ("ENOLINK", libc::ENOLINK),
    ("EREMOTEIO", libc::EREMOTEIO),
    ("ENODATA", libc::ENODATA),
    ("EILSEQ", libc::EILSEQ),
    ("EBADE", libc::EBADE),
    ("EBUSY", libc::EBUSY),
    ("EOPNOTSUPP", libc::EOPNOTSUPP),
];

fn errno(name: &str) -> Option<i32> {
    let name = if name.is_empty() { "EIO" } else { name };
    let (_, errno) = ERRNOS.iter().find(|(known, _)| *known == name)?;
    Some(*errno)
}

fn errno_names() -> String {
    let names: Vec<_> = ERRNOS.iter().map(|(name, _)| *name).collect();
    names.join(", ")
}

fn mac(text: &str) -> Option<[u8; 6]> {
    let octets: Vec<u8> = text
        .split(':')
        .map(|octet| match octet.len() {
            // from_str_radix alone would take a sign.
            2 if octet.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                u8::from_str_radix(octet, 16).ok()
            }
            _ => None,
        })
        .collect::<Option<_>>()?;
    octets.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{
        ArmFaultsRequest, DropFault, ErrorFault, FaultRule, FaultSelector, FaultTrigger,
        LatencyFault, PartitionFault, ShortFault,
    };

    fn request(action: Asked) -> ArmFaultsRequest {
        ArmFaultsRequest {
            id: "run-1.a".to_owned(),
            rules: vec![FaultRule {
                action: Some(action),
                ..FaultRule::default()
            }],
            ttl_ms: 1000,
            seed: 1,
        }
    }

    fn complaint(request: &ArmFaultsRequest) -> String {
        arm_faults_request(request)
            .unwrap_err()
            .message()
            .to_owned()
    }

    #[test]
    fn what_is_left_out_means_everything_always() {
        let rules = arm_faults_request(&request(Asked::Drop(DropFault {}))).unwrap();
        assert_eq!(rules[0].name, "0");
        assert_eq!(rules[0].selector, Selector::default());
        assert_eq!(rules[0].trigger, Trigger::default());
        assert_eq!((rules[0].duration, &rules[0].action), (None, &Action::Drop));
    }

    #[test]
    fn every_field_of_selector_and_trigger_arrives() {
        let mut request = request(Asked::Error(ErrorFault {
            errno: "ENOSPC".to_owned(),
        }));
        request.rules[0].selector = Some(FaultSelector {
            device: "root".to_owned(),
            queues: vec![3],
            ops: vec![device::FaultOp::Write as i32],
            first_sector: 8,
            num_sectors: 16,
            messages: vec!["SET_MEM_TABLE".to_owned()],
        });
        request.rules[0].trigger = Some(FaultTrigger {
            nth: 2,
            every: 3,
            probability: 0.5,
            max_hits: 7,
        });
        let rule = &arm_faults_request(&request).unwrap()[0];
        assert_eq!(rule.selector.queues, [3]);
        assert_eq!(rule.selector.ops, [Op::Write]);
        assert_eq!(rule.selector.sectors, Some((8, 16)));
        assert_eq!(rule.trigger.nth, 2);
        assert_eq!(rule.trigger.max_hits, Some(7));
        let errno = libc::ENOSPC;
        assert_eq!(rule.action, Action::Error { errno });
    }

    #[test]
    fn what_makes_no_sense_is_named_with_its_path() {
        let mut none = request(Asked::Drop(DropFault {}));
        none.rules[0].action = None;
        assert_eq!(complaint(&none), "rules[0]: has no action");
        let late = request(Asked::Latency(LatencyFault {
            latency_us: 60_000_000,
            jitter_us: 1,
        }));
        assert!(complaint(&late).starts_with("rules[0].latency: must be at most 60000 ms"));
        let odd = request(Asked::Short(ShortFault { bytes: 100 }));
        assert!(complaint(&odd).starts_with("rules[0].short.bytes: must be whole sectors"));
        let errno = request(Asked::Error(ErrorFault {
            errno: "EWHAT".to_owned(),
        }));
        assert!(complaint(&errno).contains("\"EWHAT\" is none of EIO, ENOSPC"));
        let peers = request(Asked::Partition(PartitionFault {
            peers: vec!["52:54".to_owned()],
        }));
        assert!(complaint(&peers).starts_with("rules[0].partition.peers: has something"));
        let mut endless = request(Asked::Drop(DropFault {}));
        endless.ttl_ms = 0;
        assert!(complaint(&endless).starts_with("ttl_ms: must be 1 to"));
        let mut probable = request(Asked::Drop(DropFault {}));
        probable.rules[0].trigger = Some(FaultTrigger {
            probability: 1.5,
            ..FaultTrigger::default()
        });
        assert!(complaint(&probable).starts_with("rules[0].trigger.probability"));
    }

    #[test]
    fn rules_of_one_name_are_refused() {
        let mut twice = request(Asked::Drop(DropFault {}));
        twice.rules[0].name = "1".to_owned();
        twice.rules.push(FaultRule {
            name: String::new(),
            ..twice.rules[0].clone()
        });
        assert_eq!(complaint(&twice), "rules: two rules have the name \"1\"");
    }
}
