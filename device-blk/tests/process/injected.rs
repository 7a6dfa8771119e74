//! Faults that are armed over the control socket: what each does to a frontend, and that nothing of it is
//! left afterwards.

use std::time::{Duration, Instant};

use api::device::fault_rule::Action;
use api::device::faults_client::FaultsClient;
use api::device::{
    ArmFaultsRequest, BadDescriptorFault, CorruptFault, CrashFault, DisarmFaultsRequest,
    DisconnectFault, DropFault, ErrorFault, FaultArming, FaultArmingState, FaultOp, FaultRule,
    FaultSelector, FaultTrigger, HangFault, LateReplyFault, LatencyFault, ListFaultsRequest,
    LostCallFault, LostInflightFault, LostKickFault, MemoryRaceFault, MisdirectFault,
    OutOfOrderFault, PauseFault, RefuseFeaturesFault, ReorderFault, ShortFault, TornEnd, TornFault,
    UsedStallFault,
};
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::daemon::{DEADLINE, Daemon, Place, await_some, await_true, read_image};
use crate::driver::{Client, MoreMemory, all_features};
use crate::io::pattern;

const SECTORS: u64 = 64 << 10;
const EIO: i32 = -libc::EIO;
/// `VIRTIO_BLK_F_FLUSH`
const FLUSH: u64 = 1 << 9;

/// A daemon that serves disk `a`, and who arms faults there.
struct Bench {
    daemon: Daemon,
    place: Place,
    runtime: Runtime,
    faults: FaultsClient<Channel>,
}

impl Bench {
    fn new() -> Self {
        Self::with(&["--allow-faults"], "")
    }

    fn with(more: &[&str], options: &str) -> Self {
        let place = Place::new();
        place.image("a.img", SECTORS);
        let disk = format!("{}{options}", place.disk("a"));
        let daemon = Daemon::start_with(&place, &[&disk], more);
        let runtime = Runtime::new().unwrap();
        let channel = runtime
            .block_on(api::connect::unix(&place.control(), DEADLINE))
            .unwrap();
        Self {
            daemon,
            place,
            runtime,
            faults: FaultsClient::new(channel),
        }
    }

    fn client(&self) -> Client {
        Client::connect(&self.place.socket("a"))
    }

    fn arm(&mut self, rule: FaultRule) {
        self.try_arm(rule, 60_000).unwrap();
    }

    fn try_arm(&mut self, rule: FaultRule, ttl_ms: u64) -> Result<(), Status> {
        let request = ArmFaultsRequest {
            id: "x".to_owned(),
            rules: vec![rule],
            ttl_ms,
            seed: 7,
        };
        let armed = self.runtime.block_on(self.faults.arm_faults(request));
        armed.map(drop)
    }

    /// Ends what is armed; what it saw and hit.
    fn disarm(&mut self) -> (u64, u64) {
        let request = DisarmFaultsRequest::default();
        let ended = self.runtime.block_on(self.faults.disarm_faults(request));
        let ended = ended.unwrap().into_inner().armings;
        let rule = &ended[0].rules[0];
        assert_eq!(rule.last_hits.len() as u64, rule.hits.min(256));
        (rule.seen, rule.hits)
    }

    fn list(&mut self) -> Vec<FaultArming> {
        let request = ListFaultsRequest::default();
        let listed = self.runtime.block_on(self.faults.list_faults(request));
        listed.unwrap().into_inner().armings
    }

    fn image(&self, offset: u64, len: usize) -> Vec<u8> {
        read_image(&self.place.path("a.img"), offset, len)
    }
}

fn rule(action: Action) -> FaultRule {
    FaultRule {
        action: Some(action),
        ..FaultRule::default()
    }
}

fn on(op: FaultOp, action: Action) -> FaultRule {
    FaultRule {
        selector: Some(FaultSelector {
            ops: vec![op.into()],
            ..FaultSelector::default()
        }),
        ..rule(action)
    }
}

fn at_most(max_hits: u64, rule: FaultRule) -> FaultRule {
    FaultRule {
        trigger: Some(FaultTrigger {
            max_hits,
            ..FaultTrigger::default()
        }),
        ..rule
    }
}

fn error() -> Action {
    Action::Error(ErrorFault::default())
}

#[test]
fn nothing_can_be_armed_unless_the_process_allows_it() {
    let mut bench = Bench::with(&[], "");
    let status = bench.try_arm(rule(error()), 1000).unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("--allow-faults"));
    assert_eq!(bench.client().write(0, &pattern(1, 4096)), 0);
}

#[test]
fn error_hits_the_selected_sectors_the_nth_time_and_is_over_when_disarmed() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    let mut selected = on(FaultOp::Write, error());
    selected.selector.as_mut().unwrap().first_sector = 8;
    selected.selector.as_mut().unwrap().num_sectors = 8;
    selected.trigger = Some(FaultTrigger {
        nth: 2,
        ..FaultTrigger::default()
    });
    bench.arm(selected);
    let data = pattern(1, 4096);
    assert_eq!(client.write(0, &data), 0, "another place");
    assert_eq!(client.write(4096, &data), 0, "the first time");
    assert_eq!(client.write(4096, &data), EIO);
    assert_eq!(client.read(4096, 4096), data, "reads are not selected");
    assert_eq!(bench.disarm(), (2, 1));
    assert_eq!(client.write(4096, &data), 0);
    let hit = &bench.list()[0].rules[0].last_hits[0];
    assert_eq!((hit.sector, hit.op()), (8, FaultOp::Write));
}

#[test]
fn rule_that_matches_nothing_has_no_hits() {
    let mut bench = Bench::new();
    bench.arm(on(FaultOp::Discard, error()));
    assert_eq!(bench.client().write(0, &pattern(1, 4096)), 0);
    assert_eq!(bench.disarm(), (0, 0));
}

#[test]
fn time_to_live_ends_faults_without_anybody() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    bench.try_arm(rule(error()), 300).unwrap();
    assert_eq!(client.write(0, &pattern(1, 512)), EIO);
    await_true("the fault is over", || {
        client.write(0, &pattern(1, 512)) == 0
    });
    let listed = bench.list();
    assert_eq!(listed[0].state(), FaultArmingState::Expired);
    assert!(listed[0].rules[0].hits >= 1);
}

#[test]
fn requests_wait_and_go_on_early_when_disarmed() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    let latency = |latency_us, jitter_us| {
        Action::Latency(LatencyFault {
            latency_us,
            jitter_us,
        })
    };
    bench.arm(on(FaultOp::Read, latency(50_000, 1000)));
    let began = Instant::now();
    client.read(0, 4096);
    assert!(began.elapsed() >= Duration::from_millis(50));
    assert_eq!(bench.disarm().1, 1);
    bench.arm(on(FaultOp::Read, latency(60_000_000, 0)));
    assert_eq!(
        client.write(0, &pattern(1, 512)),
        0,
        "writes do not wait for a minute"
    );
    bench.disarm();
    bench.arm(rule(latency(60_000_000, 0)));
    client.submit_read(0, 0, 0, 4096, 1);
    client.kick(0);
    await_true("the read is held", || {
        bench
            .list()
            .iter()
            .any(|arming| arming.state() == FaultArmingState::Armed && arming.rules[0].hits == 1)
    });
    bench.disarm();
    assert_eq!(client.completion(0), (1, 0));
}

#[test]
fn pause_takes_nothing_for_a_while() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    let pause = Action::Pause(PauseFault { duration_ms: 100 });
    bench.arm(at_most(1, rule(pause)));
    let began = Instant::now();
    for id in 0..4 {
        client.submit_read(0, 0, id * 4096, 4096, id);
    }
    client.kick(0);
    for _ in 0..4 {
        assert_eq!(client.completion(0).1, 0);
    }
    assert!(began.elapsed() >= Duration::from_millis(100));
    assert_eq!(bench.disarm().1, 1);
}

#[test]
fn lost_flushes_and_writes_are_acknowledged_and_not_done() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    let before = bench.image(0, 4096);
    bench.arm(rule(Action::Drop(DropFault {})));
    assert_eq!(client.write(0, &pattern(9, 4096)), 0);
    assert_eq!(client.flush(), 0);
    assert_eq!(client.read(0, 4096), before, "a read is not lost");
    assert_eq!(bench.disarm(), (2, 2));
    assert_eq!(bench.image(0, 4096), before);
}

#[test]
fn short_operations_are_gone_on_with() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    bench.arm(rule(Action::Short(ShortFault { bytes: 512 })));
    let data = pattern(3, 16 << 10);
    assert_eq!(client.write(0, &data), 0);
    assert_eq!(client.read(0, data.len()), data);
    assert_eq!(bench.disarm(), (2, 2));
    assert_eq!(bench.image(0, data.len()), data);
}

#[test]
fn torn_write_leaves_its_beginning_with_an_error_or_a_lie() {
    for (end, answer) in [(TornEnd::Error, EIO), (TornEnd::Success, 0)] {
        let mut bench = Bench::new();
        let mut client = bench.client();
        let before = bench.image(0, 16 << 10);
        let torn = TornFault {
            bytes: 4096,
            end: end.into(),
        };
        bench.arm(rule(Action::Torn(torn)));
        let data = pattern(5, 16 << 10);
        assert_eq!(client.write(0, &data), answer);
        let after = bench.image(0, 16 << 10);
        assert_eq!(after[..4096], data[..4096]);
        assert_eq!(after[4096..], before[4096..]);
        assert_eq!(bench.disarm(), (1, 1));
    }
}

#[test]
fn misdirected_write_lands_elsewhere() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    let before = bench.image(0, 4096);
    bench.arm(on(
        FaultOp::Write,
        Action::Misdirect(MisdirectFault { sectors: 16 }),
    ));
    let data = pattern(6, 4096);
    assert_eq!(client.write(0, &data), 0);
    assert_eq!(bench.image(0, 4096), before);
    assert_eq!(bench.image(16 * 512, 4096), data);
    bench.disarm();
}

#[test]
fn corruption_flips_bits_of_what_is_read_or_stored() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    let flipped = |one: &[u8], other: &[u8]| -> u32 {
        let bits = one.iter().zip(other).map(|(a, b)| (a ^ b).count_ones());
        bits.sum()
    };
    let stored = bench.image(8192, 4096);
    let corrupt = || Action::Corrupt(CorruptFault { bytes: 1 });
    bench.arm(on(FaultOp::Read, corrupt()));
    assert_eq!(flipped(&client.read(8192, 4096), &stored), 1);
    bench.disarm();
    assert_eq!(client.read(8192, 4096), stored, "the image is as it was");
    bench.arm(on(FaultOp::Write, corrupt()));
    let data = pattern(4, 4096);
    assert_eq!(client.write(8192, &data), 0);
    bench.disarm();
    assert_eq!(flipped(&bench.image(8192, 4096), &data), 1);
    assert_eq!(
        client.buffer()[..4096],
        data,
        "the guest's memory is untouched"
    );
}

#[test]
fn reordered_request_goes_after_those_behind_it() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    let reorder = Action::Reorder(ReorderFault {
        window: 2,
        max_delay_ms: 30_000,
    });
    bench.arm(at_most(1, rule(reorder)));
    for id in 0..2 {
        client.submit_write(0, 0, id * 4096, 4096, id);
        client.kick(0);
    }
    assert_eq!(client.completion(0), (1, 0), "the first waits for two");
    client.submit_write(0, 0, 8192, 4096, 2);
    client.kick(0);
    let mut rest: Vec<_> = (0..2).map(|_| client.completion(0).0).collect();
    rest.sort_unstable();
    assert_eq!(rest, [0, 2]);
    assert_eq!(bench.disarm().1, 1);
}

#[test]
fn crash_ends_the_process_at_the_very_request() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    let crash = Action::Crash(CrashFault {});
    bench.arm(FaultRule {
        trigger: Some(FaultTrigger {
            nth: 3,
            ..FaultTrigger::default()
        }),
        ..on(FaultOp::Write, crash)
    });
    for place in 0..2 {
        assert_eq!(client.write(place * 4096, &pattern(place, 4096)), 0);
    }
    client.submit_write(0, 8192, 0, 4096, 1);
    client.kick(0);
    let status = bench.daemon.ended();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(libc::SIGKILL)
    );
}

#[test]
fn hang_stops_a_queue_and_ends_when_disarmed() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    let hang = Action::Hang(HangFault {
        duration_ms: 60_000,
    });
    bench.arm(at_most(1, rule(hang)));
    client.submit_read(0, 0, 0, 4096, 1);
    client.kick(0);
    await_true("it hangs", || bench.list()[0].rules[0].hits == 1);
    assert_eq!(bench.disarm(), (1, 1));
    assert_eq!(client.completion(0), (1, 0));
}

#[test]
fn request_treated_as_broken_fails() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    bench.arm(at_most(
        1,
        rule(Action::BadDescriptor(BadDescriptorFault {})),
    ));
    assert_eq!(client.write(0, &pattern(1, 4096)), EIO);
    assert_eq!(client.write(0, &pattern(1, 4096)), 0);
    assert_eq!(bench.disarm(), (2, 1));
}

#[test]
fn lost_call_is_made_up_for_when_the_fault_is_over() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    bench.arm(rule(Action::LostCall(LostCallFault {})));
    client.submit_write(0, 0, 0, 4096, 1);
    client.kick(0);
    await_true("the call is lost", || bench.list()[0].rules[0].hits == 1);
    bench.disarm();
    // By the signal, which comes late.
    assert_eq!(client.completion(0), (1, 0));
}

#[test]
fn lost_kick_leaves_a_queue_asleep_until_the_fault_is_over() {
    let mut bench = Bench::with(&["--allow-faults"], ",polling=never");
    let mut client = bench.client();
    assert_eq!(client.write(0, &pattern(1, 512)), 0);
    bench.arm(at_most(1, rule(Action::LostKick(LostKickFault {}))));
    client.submit_write(0, 0, 0, 4096, 1);
    client.kick(0);
    await_true("the kick is lost", || bench.list()[0].rules[0].hits == 1);
    bench.disarm();
    assert_eq!(client.completion(0), (1, 0));
}

#[test]
fn completions_are_not_shown_for_a_while() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    let stall = Action::UsedStall(UsedStallFault { duration_ms: 100 });
    bench.arm(at_most(1, rule(stall)));
    let began = Instant::now();
    let data = pattern(8, 4096);
    assert_eq!(client.write(0, &data), 0);
    assert!(began.elapsed() >= Duration::from_millis(100));
    assert_eq!(bench.disarm().1, 1);
    assert_eq!(bench.image(0, 4096), data);
}

#[test]
fn completion_is_shown_after_a_later_one() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    let late = Action::OutOfOrder(OutOfOrderFault { window: 1 });
    bench.arm(at_most(1, rule(late)));
    client.submit_read(0, 0, 0, 4096, 1);
    client.submit_read(0, 4096, 4096, 4096, 2);
    client.kick(0);
    let mut order: Vec<_> = (0..2).map(|_| client.completion(0).0).collect();
    order.sort_unstable();
    assert_eq!(order, [1, 2], "none is lost");
    assert_eq!(bench.disarm().1, 1);
}

#[test]
fn messages_are_handled_late() {
    let mut bench = Bench::new();
    let mut late = rule(Action::LateReply(LateReplyFault { delay_ms: 200 }));
    late.selector = Some(FaultSelector {
        messages: vec!["GET_FEATURES".to_owned()],
        ..FaultSelector::default()
    });
    bench.arm(at_most(1, late));
    let began = Instant::now();
    let mut client = bench.client();
    assert!(began.elapsed() >= Duration::from_millis(200));
    assert_eq!(client.write(0, &pattern(1, 512)), 0);
    let hit = bench.list()[0].rules[0].last_hits[0].clone();
    assert_eq!(hit.message, "GET_FEATURES");
    bench.disarm();
}

#[test]
fn features_are_refused() {
    let mut bench = Bench::new();
    bench.arm(rule(Action::RefuseFeatures(RefuseFeaturesFault {
        features: FLUSH,
    })));
    let offered = bench.client().features().bits();
    assert_eq!(offered & FLUSH, 0);
    assert!(bench.disarm().1 > 0);
    let offered = bench.client().features().bits();
    assert_eq!(offered & FLUSH, all_features() & FLUSH);
}

#[test]
fn session_ends_amid_a_request_and_another_one_works() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    bench.arm(at_most(
        1,
        on(FaultOp::Write, Action::Disconnect(DisconnectFault {})),
    ));
    client.submit_write(0, 0, 0, 4096, 1);
    client.kick(0);
    await_true("the session ends", || {
        bench
            .daemon
            .log()
            .contains("a fault was armed that ends it")
    });
    assert_eq!(bench.disarm(), (1, 1));
    drop(client);
    let mut again = bench.client();
    assert_eq!(again.write(0, &pattern(2, 4096)), 0);
}

#[test]
fn session_ends_instead_of_an_answer() {
    let mut bench = Bench::new();
    let mut disconnect = rule(Action::Disconnect(DisconnectFault {}));
    disconnect.selector = Some(FaultSelector {
        messages: vec!["SET_MEM_TABLE".to_owned(), "ADD_MEM_REG".to_owned()],
        ..FaultSelector::default()
    });
    bench.arm(at_most(1, disconnect));
    let socket = bench.place.socket("a");
    let refused = std::panic::catch_unwind(|| Client::connect(&socket));
    assert!(refused.is_err(), "the connection was cut");
    assert_eq!(bench.disarm().1, 1);
    assert_eq!(bench.client().write(0, &pattern(2, 4096)), 0);
}

#[test]
fn requests_go_on_while_the_memory_table_changes_ring_by_ring() {
    const COUNT: usize = 16;
    const LEN: usize = 4096;
    let mut bench = Bench::with(&["--allow-faults"], ",queues=2");
    let socket = bench.place.socket("a");
    let mut client = Client::connect_with(&socket, 2, all_features());
    bench.arm(rule(Action::MemoryRace(MemoryRaceFault { delay_ms: 50 })));
    for (id, data) in (0..COUNT).map(|id| (id, pattern(id as u64, LEN))) {
        client.buffer()[id * LEN..(id + 1) * LEN].copy_from_slice(&data);
    }
    let more: Vec<MoreMemory> = (0..3).map(|_| MoreMemory::new()).collect();
    for (turn, more) in more.iter().enumerate() {
        for id in 0..COUNT {
            let at = (turn * COUNT + id) * LEN;
            client.submit_write(id % 2, at as u64, id * LEN, LEN, id);
        }
        client.kick(0);
        client.kick(1);
        client.share_more(more);
        for id in 0..COUNT {
            assert_eq!(client.completion(id % 2).1, 0);
        }
    }
    let (_, hits) = bench.disarm();
    assert!(hits >= 3, "{hits}");
    for at in 0..3 * COUNT {
        let found = bench.image((at * LEN) as u64, LEN);
        assert!(found == pattern((at % COUNT) as u64, LEN), "block {at}");
    }
}

#[test]
fn in_flight_region_is_lost() {
    let mut bench = Bench::new();
    bench.arm(rule(Action::LostInflight(LostInflightFault {})));
    let mut guest = crate::crash::Guest::boot(&bench.place);
    let hits = await_some("the region is given", || {
        let hits = bench.list()[0].rules[0].hits;
        (hits > 0).then_some(hits)
    });
    assert!(hits > 0);
    guest.submit(0, &pattern(1, crate::crash::BLOCK_BYTES as usize));
    await_true("the disk is served all the same", || {
        guest.reap();
        guest.pending == 0
    });
    bench.disarm();
}

#[test]
fn faults_end_with_the_last_of_them() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    bench.arm(rule(error()));
    let other = ArmFaultsRequest {
        id: "y".to_owned(),
        rules: vec![rule(error())],
        ttl_ms: 60_000,
        seed: 0,
    };
    bench
        .runtime
        .block_on(bench.faults.arm_faults(other))
        .unwrap();
    // The off switch.
    let all = DisarmFaultsRequest::default();
    let ended = bench.runtime.block_on(bench.faults.disarm_faults(all));
    assert_eq!(ended.unwrap().into_inner().armings.len(), 2);
    assert_eq!(client.write(0, &pattern(1, 512)), 0);
}
