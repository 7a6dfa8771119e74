//! NICs with connected guests that do nothing: they let the machine sleep.

use std::time::Instant;

use anyhow::Result;

use super::super::report::{Better, Row, Series};
use super::super::rounds::{RowSpec, Verdict};
use super::super::{Effort, Session, interrupt, process};
use super::serving::{self, Bay};
use crate::progress::step;

const NICS: usize = 100;
/// DPDK bounds a process's ports.
const PORTS_OF_A_FRONTEND: usize = 25;

/// What is at the host's end.
#[derive(Clone, Copy)]
enum OtherEnd {
    Taps,
    Switch,
}

pub(super) fn run(session: &mut Session) -> Result<()> {
    for other_end in [OtherEnd::Taps, OtherEnd::Switch] {
        let spec = RowSpec {
            case: format!("idle/{NICS}-{}/wake-ups", other_end.name()),
            unit: "context switches/s",
            better: Better::Lower,
            verdict: Verdict::Target {
                value: 0.0,
                peer: None,
            },
            ..RowSpec::default()
        };
        if !session.wants(std::slice::from_ref(&spec)) {
            continue;
        }
        step(format_args!("{NICS} idle {}", other_end.name()));
        let bay = Bay::open(session)?;
        let found = wakeups_per_second(&bay, &session.effort, other_end);
        interrupt::check()?;
        let row = match found {
            Ok(value) => Row::new(&spec, &[value], &[] as &[Series], &[0.0]),
            Err(error) => Row::failed(&spec, &format!("{error:#}")),
        };
        session.add_row(row);
    }
    Ok(())
}

impl OtherEnd {
    fn name(self) -> &'static str {
        match self {
            Self::Taps => "taps",
            Self::Switch => "switch-ports",
        }
    }

    fn key(self, nic: usize) -> String {
        match self {
            Self::Taps => format!("tap=idle{nic}"),
            Self::Switch => "switch=lan".to_owned(),
        }
    }
}

fn wakeups_per_second(bay: &Bay, effort: &Effort, other_end: OtherEnd) -> Result<f64> {
    let name = format!("idle-{}", other_end.name());
    let sockets: Vec<_> = (0..NICS)
        .map(|nic| bay.socket(&format!("{name}-{nic}")))
        .collect();
    let nics: Vec<String> = sockets
        .iter()
        .enumerate()
        .map(|(nic, socket)| {
            let (key, mac) = (other_end.key(nic), serving::mac(nic));
            format!("id=nic{nic},{key},mac={mac},socket={}", socket.display())
        })
        .collect();
    let daemon = bay.device_net(&name, &nics, &sockets)?;
    let frontends = sockets
        .chunks(PORTS_OF_A_FRONTEND)
        .enumerate()
        .map(|(index, sockets)| {
            let frontend = bay.frontend(&format!("{name}-front{index}"), sockets, &[])?;
            frontend.await_ports(sockets.len())?;
            Ok(frontend)
        })
        .collect::<Result<Vec<_>>>()?;
    process::await_idle(daemon.pid())?;
    let (before, began) = (process::context_switches(daemon.pid())?, Instant::now());
    std::thread::sleep(effort.idle);
    let after = process::context_switches(daemon.pid())?;
    drop(frontends);
    Ok((after - before) as f64 / began.elapsed().as_secs_f64())
}
