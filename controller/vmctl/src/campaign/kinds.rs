//! The kinds of faults: their names, parameters and what they are in the API.

use api::controller::UpgradeAction;
use api::controller::fault_injection::Action;
use api::device::fault_rule::Action as Rule;
use api::device::*;
use api::node::host_fault::Action as Host;
use api::node::process_fault::Action as Process;
use api::node::*;

use super::problems::Problems;
use super::schema::Fault;
use super::words;

/// A kind of fault.
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    /// block, net, vhost-user, process or host
    pub(crate) group: &'static str,
    /// That have to be given.
    pub(crate) required: &'static [&'static str],
    pub(crate) optional: &'static [&'static str],
    pub(crate) about: &'static str,
}

const fn kind(
    name: &'static str,
    group: &'static str,
    required: &'static [&'static str],
    optional: &'static [&'static str],
    about: &'static str,
) -> Kind {
    Kind {
        name,
        group,
        required,
        optional,
        about,
    }
}

/// All of them.
#[rustfmt::skip]
pub(crate) const KINDS: &[Kind] = &[
    kind("latency", "block, net", &["delay"], &["jitter"], "requests or frames begin later"),
    kind("drop", "block, net", &[], &[], "writes and flushes are answered and not done; frames are lost"),
    kind("corrupt", "block, net", &[], &["bytes"], "bits are flipped in data"),
    kind("reorder", "block, net", &[], &["window", "delay"], "waits until others, which came later, have gone ahead"),
    kind("pause", "block, net", &["length"], &[], "a queue takes no requests for a while"),
    kind("error", "block", &[], &["errno"], "requests fail in the guest"),
    kind("short-io", "block", &["bytes"], &[], "the file moves fewer bytes than asked; the guest must not notice"),
    kind("torn-write", "block", &["bytes"], &["end"], "only the first bytes are written; end: error, success or crash"),
    kind("misdirect", "block", &["sectors"], &[], "requests go to another place"),
    kind("duplicate", "net", &[], &["copies"], "frames come more than once"),
    kind("rate", "net", &["bytes-per-second"], &[], "a bottleneck"),
    kind("link-flap", "net", &[], &["down", "up"], "the cable is taken out and put back in"),
    kind("partition", "net", &["peers"], &[], "frames from and to these MACs are lost"),
    kind("lost-kick", "vhost-user", &[], &[], "a kick of the driver is not heard"),
    kind("late-kick", "vhost-user", &["delay"], &[], "a kick of the driver comes later (process: vmm)"),
    kind("late-reconnect", "vhost-user", &["delay"], &[], "a lost daemon is looked for later (process: vmm)"),
    kind("lost-call", "vhost-user", &[], &[], "the driver is not told of completions"),
    kind("late-reply", "vhost-user", &["delay"], &[], "messages are handled late"),
    kind("used-stall", "vhost-user", &["length"], &[], "what was done is not shown to the driver for a while"),
    kind("bad-descriptor", "vhost-user", &[], &[], "a request is taken for one whose descriptors make no sense"),
    kind("out-of-order", "vhost-user", &[], &["window"], "completions are shown after later ones"),
    kind("disconnect", "vhost-user", &[], &[], "the connection is closed in the middle"),
    kind("refuse-features", "vhost-user", &["features"], &[], "feature bits are not offered, or not accepted"),
    kind("memory-race", "vhost-user", &["delay"], &[], "the memory table changes while rings run"),
    kind("lost-inflight", "vhost-user", &[], &[], "the in-flight region is lost"),
    kind("crash", "process", &[], &[], "the daemon dies at a request that the target chooses"),
    kind("hang", "process", &["length"], &[], "the thread that serves a queue stops for a while"),
    kind("kill", "process", &[], &["signal"], "the process is killed"),
    kind("freeze", "process", &["length"], &[], "SIGSTOP, later SIGCONT"),
    kind("out-of-memory", "process", &[], &["limit"], "the process runs out of memory"),
    kind("fd-exhaustion", "process", &["length"], &[], "the process can open no more descriptors"),
    kind("slow-start", "process", &["delay"], &[], "the next incarnations begin later"),
    kind("version-skew", "process", &["binary"], &[], "the next incarnations are of this program"),
    kind("upgrade", "process", &[], &["binary"], "the daemon is replaced while it serves; no binary: by itself"),
    kind("controller-partition", "host", &["length"], &[], "the host's agent answers nobody for a while"),
    kind("store-loss", "host", &["length"], &[], "the host's agent cannot write what it keeps for a while"),
    kind("clock-step", "host", &["offset"], &["length"], "the host's wall clock jumps"),
];

/// The kind of that name.
pub(super) fn find(name: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|kind| kind.name == name)
}

/// The fault in the API's words; problems are noted, and the answer is of no use then.
pub(super) fn action(fault: &Fault, at: &str, problems: &mut Problems) -> Option<Action> {
    let name = fault.kind.value.as_str();
    let Some(kind) = find(name) else {
        let nearest = words::nearest(name, KINDS.iter().map(|kind| kind.name));
        let remedy = match nearest {
            Some(nearest) => format!("did you mean {nearest}?"),
            None => "see `vmctl fault kinds`".to_owned(),
        };
        let words = format!("{name:?} is no kind of fault; {remedy}");
        problems.add(&fault.kind, &format!("{at}.kind"), words);
        return None;
    };
    check_parameters(fault, kind, at, problems);
    let mut figures = Figures {
        fault,
        at,
        problems,
    };
    Some(translate(kind.name, &mut figures))
}

fn translate(name: &str, f: &mut Figures) -> Action {
    let rule = match name {
        "latency" => Rule::Latency(LatencyFault {
            latency_us: f.us("delay"),
            jitter_us: f.us("jitter"),
        }),
        "drop" => Rule::Drop(DropFault {}),
        "corrupt" => Rule::Corrupt(CorruptFault {
            bytes: f.fault.bytes.as_ref().map_or(0, |bytes| bytes.value as u32),
        }),
        "reorder" => Rule::Reorder(ReorderFault {
            window: f.window(),
            max_delay_ms: f.ms("delay") as u32,
        }),
        "pause" => Rule::Pause(PauseFault {
            duration_ms: f.ms("length"),
        }),
        "error" => Rule::Error(ErrorFault {
            errno: text(&f.fault.errno),
        }),
        "short-io" => Rule::Short(ShortFault { bytes: f.bytes() }),
        "torn-write" => Rule::Torn(TornFault {
            bytes: f.bytes(),
            end: f.torn_end() as i32,
        }),
        "misdirect" => Rule::Misdirect(MisdirectFault {
            sectors: f.fault.sectors.as_ref().map_or(0, |sectors| sectors.value),
        }),
        "duplicate" => Rule::Duplicate(DuplicateFault {
            copies: f.fault.copies.as_ref().map_or(0, |copies| copies.value),
        }),
        "rate" => Rule::Rate(RateFault {
            bytes_per_second: f.size("bytes-per-second"),
        }),
        "link-flap" => Rule::LinkFlap(LinkFlapFault {
            down_ms: f.ms("down") as u32,
            up_ms: f.ms("up") as u32,
        }),
        "partition" => Rule::Partition(PartitionFault {
            peers: f
                .fault
                .peers
                .as_ref()
                .map_or(Vec::new(), |p| p.value.clone()),
        }),
        "lost-kick" => Rule::LostKick(LostKickFault {}),
        "late-kick" => Rule::LateKick(LateKickFault {
            delay_ms: f.ms("delay"),
        }),
        "late-reconnect" => Rule::LateReconnect(LateReconnectFault {
            delay_ms: f.ms("delay"),
        }),
        "lost-call" => Rule::LostCall(LostCallFault {}),
        "late-reply" => Rule::LateReply(LateReplyFault {
            delay_ms: f.ms("delay"),
        }),
        "used-stall" => Rule::UsedStall(UsedStallFault {
            duration_ms: f.ms("length"),
        }),
        "bad-descriptor" => Rule::BadDescriptor(BadDescriptorFault {}),
        "out-of-order" => Rule::OutOfOrder(OutOfOrderFault { window: f.window() }),
        "disconnect" => Rule::Disconnect(DisconnectFault {}),
        "refuse-features" => Rule::RefuseFeatures(RefuseFeaturesFault {
            features: f.fault.features.as_ref().map_or(0, |bits| bits.value),
        }),
        "memory-race" => Rule::MemoryRace(MemoryRaceFault {
            delay_ms: f.ms("delay"),
        }),
        "lost-inflight" => Rule::LostInflight(LostInflightFault {}),
        "crash" => Rule::Crash(CrashFault {}),
        "hang" => Rule::Hang(HangFault {
            duration_ms: f.ms("length"),
        }),
        _ => return translate_others(name, f),
    };
    Action::Rule(FaultRule {
        action: Some(rule),
        ..Default::default()
    })
}

/// What no daemon does by itself.
fn translate_others(name: &str, f: &mut Figures) -> Action {
    let process = |action| {
        Action::Process(ProcessFault {
            action: Some(action),
        })
    };
    let host = |action| {
        Action::Host(HostFault {
            action: Some(action),
        })
    };
    match name {
        "kill" => process(Process::Kill(KillFault {
            signal: f.fault.signal.as_ref().map_or(0, |signal| signal.value),
        })),
        "freeze" => process(Process::Freeze(FreezeFault {
            duration_ms: f.ms("length"),
        })),
        "out-of-memory" => process(Process::OutOfMemory(OutOfMemoryFault {
            limit_bytes: f.size("limit"),
        })),
        "fd-exhaustion" => process(Process::FdExhaustion(FdExhaustionFault {
            duration_ms: f.ms("length"),
        })),
        "slow-start" => process(Process::SlowStart(SlowStartFault {
            delay_ms: f.ms("delay"),
        })),
        "version-skew" => process(Process::VersionSkew(VersionSkewFault {
            binary: text(&f.fault.binary),
        })),
        "controller-partition" => host(Host::ControllerPartition(ControllerPartitionFault {
            duration_ms: f.ms("length"),
        })),
        "store-loss" => host(Host::StoreLoss(StoreLossFault {
            duration_ms: f.ms("length"),
        })),
        "clock-step" => host(Host::ClockStep(ClockStepFault {
            offset_ms: f.offset_ms(),
            duration_ms: f.ms("length"),
        })),
        _ => Action::Upgrade(UpgradeAction {
            binary: text(&f.fault.binary),
        }),
    }
}

fn text(value: &Option<serde_saphyr::Spanned<String>>) -> String {
    value
        .as_ref()
        .map_or(String::new(), |value| value.value.clone())
}

fn check_parameters(fault: &Fault, kind: &Kind, at: &str, problems: &mut Problems) {
    let given = given(fault);
    for name in kind.required {
        if !given.contains(name) {
            let words = format!("{} needs {name}", kind.name);
            problems.add(&fault.kind, &format!("{at}.{name}"), words);
        }
    }
    for name in given {
        if !kind.required.contains(&name) && !kind.optional.contains(&name) {
            let has: Vec<&str> = kind.required.iter().chain(kind.optional).copied().collect();
            let has = match has.is_empty() {
                true => "none".to_owned(),
                false => has.join(", "),
            };
            let words = format!("{} has no {name}; its parameters: {has}", kind.name);
            problems.add(&fault.kind, &format!("{at}.{name}"), words);
        }
    }
}

fn given(fault: &Fault) -> Vec<&'static str> {
    let all = [
        ("delay", fault.delay.is_some()),
        ("jitter", fault.jitter.is_some()),
        ("length", fault.length.is_some()),
        ("errno", fault.errno.is_some()),
        ("bytes", fault.bytes.is_some()),
        ("end", fault.end.is_some()),
        ("sectors", fault.sectors.is_some()),
        ("window", fault.window.is_some()),
        ("copies", fault.copies.is_some()),
        ("bytes-per-second", fault.bytes_per_second.is_some()),
        ("down", fault.down.is_some()),
        ("up", fault.up.is_some()),
        ("peers", fault.peers.is_some()),
        ("features", fault.features.is_some()),
        ("signal", fault.signal.is_some()),
        ("limit", fault.limit.is_some()),
        ("binary", fault.binary.is_some()),
        ("offset", fault.offset.is_some()),
    ];
    all.into_iter()
        .filter(|(_, given)| *given)
        .map(|(name, _)| name)
        .collect()
}

/// Parameters of one fault, as numbers.
struct Figures<'a, 'p> {
    fault: &'a Fault,
    at: &'a str,
    problems: &'p mut Problems,
}

impl Figures<'_, '_> {
    fn us(&mut self, name: &str) -> u64 {
        let value = match name {
            "delay" => &self.fault.delay,
            "jitter" => &self.fault.jitter,
            "down" => &self.fault.down,
            "up" => &self.fault.up,
            _ => &self.fault.length,
        };
        let Some(value) = value else { return 0 };
        let field = format!("{}.{name}", self.at);
        self.problems
            .take(value, &field, words::duration_us(&value.value))
    }

    fn ms(&mut self, name: &str) -> u64 {
        self.us(name) / 1000
    }

    fn size(&mut self, name: &str) -> u64 {
        let value = match name {
            "limit" => &self.fault.limit,
            _ => &self.fault.bytes_per_second,
        };
        let Some(value) = value else { return 0 };
        let field = format!("{}.{name}", self.at);
        self.problems
            .take(value, &field, crate::spec::parse_size(&value.value))
    }

    fn offset_ms(&mut self) -> i64 {
        let Some(value) = &self.fault.offset else {
            return 0;
        };
        let (sign, text) = match value.value.strip_prefix('-') {
            Some(rest) => (-1, rest),
            None => (1, value.value.trim_start_matches('+')),
        };
        let field = format!("{}.offset", self.at);
        let us = self.problems.take(value, &field, words::duration_us(text));
        sign * (us / 1000) as i64
    }

    fn torn_end(&mut self) -> TornEnd {
        let Some(end) = &self.fault.end else {
            return TornEnd::Unspecified;
        };
        match end.value.as_str() {
            "error" => TornEnd::Error,
            "success" => TornEnd::Success,
            "crash" => TornEnd::Crash,
            other => {
                let words = format!("{other:?} must be error, success or crash");
                self.problems.add(end, &format!("{}.end", self.at), words);
                TornEnd::Unspecified
            }
        }
    }

    fn bytes(&self) -> u64 {
        self.fault.bytes.as_ref().map_or(0, |bytes| bytes.value)
    }

    fn window(&self) -> u32 {
        self.fault.window.as_ref().map_or(0, |window| window.value)
    }
}
