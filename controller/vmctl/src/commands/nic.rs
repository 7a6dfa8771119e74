//! `vmctl nic`

use std::fs::File;
use std::io::{IsTerminal as _, Write};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use api::controller as pb;
use api::controller::nics_client::NicsClient;
use prost_types::FieldMask;
use tokio::signal::unix::{SignalKind, signal};

use super::conclude;
use crate::cli::nic::{CaptureArgs, LinkState, NicCommand, NicLimitsArgs};
use crate::cli::{Format, Global, WaitArgs};
use crate::{client, json, output, port_forward, spec};

/// Runs one command.
pub(crate) async fn run(global: &Global, command: NicCommand) -> anyhow::Result<ExitCode> {
    match command {
        NicCommand::List { vm } => list(global, &vm).await?,
        NicCommand::Show { vm, nic } => show(global, &vm, &nic).await?,
        NicCommand::Capture(args) => capture(global, args).await?,
        NicCommand::Flows {
            vm,
            nic,
            filter,
            max,
        } => flows(global, &vm, &nic, filter, max).await?,
        NicCommand::Link {
            vm,
            nic,
            state,
            wait,
        } => {
            let wanted = pb::Nic {
                link_down: state == LinkState::Down,
                ..Default::default()
            };
            let mask = vec!["spec.link_down".to_owned()];
            update(global, &vm, &nic, wanted, mask, wait).await?;
        }
        NicCommand::SetLimits(args) => set_limits(global, args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(global: &Global, vm: &str) -> anyhow::Result<()> {
    let request = pb::ListNicsRequest {
        parent: spec::vm_name(vm, &global.project)?.to_string(),
    };
    let mut client = NicsClient::new(client::connect(global).await?);
    let answer = client.list_nics(request).await.map_err(client::failed)?;
    let nics = answer.into_inner().nics;
    if global.output == Format::Json {
        let nics: anyhow::Result<Vec<_>> =
            nics.iter().map(|nic| json::value("VmNic", nic)).collect();
        json::print(&nics?.into());
        return Ok(());
    }
    let rows: Vec<Vec<String>> = nics.iter().map(row).collect();
    output::table(
        &[
            "NAME",
            "LINK",
            "MAC",
            "BACKEND",
            "RX PACKETS",
            "RX",
            "RX DROPS",
            "TX PACKETS",
            "TX",
            "TX DROPS",
            "FLOWS",
            "LIMITS",
        ],
        &rows,
    );
    Ok(())
}

fn row(nic: &pb::VmNic) -> Vec<String> {
    let status = nic.status.clone().unwrap_or_default();
    let figure = |text: String| match status.served {
        true => text,
        false => "-".to_owned(),
    };
    vec![
        output::id(&nic.name),
        link(&status).to_owned(),
        output::or_dash(&status.mac),
        backend(&status),
        figure(status.rx_packets.to_string()),
        figure(output::size(status.rx_bytes)),
        figure(status.rx_drops.to_string()),
        figure(status.tx_packets.to_string()),
        figure(output::size(status.tx_bytes)),
        figure(status.tx_drops.to_string()),
        figure(status.flows.to_string()),
        output::or_dash(&limits(nic)),
    ]
}

fn link(status: &pb::NicStatus) -> &'static str {
    match (status.served, status.link_up) {
        (false, _) => "-",
        (true, true) => "up",
        (true, false) => "down",
    }
}

fn backend(status: &pb::NicStatus) -> String {
    match status.backend.as_str() {
        "" => output::or_dash(&status.daemon),
        backend => backend.to_owned(),
    }
}

/// As wanted: `ingress 100 Mbit/s, egress 1000 packets/s`.
fn limits(nic: &pb::VmNic) -> String {
    let limits = nic.spec.as_ref().and_then(|spec| spec.limits);
    let limits = limits.unwrap_or_default();
    let mut words = Vec::new();
    for (direction, limit) in [("ingress", limits.ingress), ("egress", limits.egress)] {
        let limit = limit.unwrap_or_default();
        if limit.bits_per_second > 0 {
            words.push(format!(
                "{direction} {}bit/s",
                scaled(limit.bits_per_second)
            ));
        }
        if limit.packets_per_second > 0 {
            words.push(format!(
                "{direction} {} packets/s",
                limit.packets_per_second
            ));
        }
    }
    words.join(", ")
}

/// In the largest unit that leaves it whole.
fn scaled(number: u64) -> String {
    for (factor, unit) in [(1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")] {
        if number.is_multiple_of(factor) {
            return format!("{} {unit}", number / factor);
        }
    }
    format!("{number} ")
}

async fn show(global: &Global, vm: &str, nic: &str) -> anyhow::Result<()> {
    let request = pb::GetNicRequest {
        name: nic_name(global, vm, nic)?,
    };
    let mut client = NicsClient::new(client::connect(global).await?);
    let nic = client.get_nic(request).await.map_err(client::failed)?;
    let nic = nic.into_inner();
    if global.output == Format::Json {
        json::print(&json::value("VmNic", &nic)?);
        return Ok(());
    }
    let spec = nic.spec.clone().unwrap_or_default();
    let status = nic.status.clone().unwrap_or_default();
    let ports: Vec<String> = spec.port_forwards.iter().map(port_forward::shown).collect();
    let wanted = match spec.link_down {
        true => "down",
        false => "up",
    };
    let traffic = |packets: u64, bytes: u64, drops: u64, throttled: u64| {
        format!(
            "{packets} packets, {}, {drops} dropped, held up {throttled} times",
            output::size(bytes)
        )
    };
    let mut fields = vec![
        ("Name", nic.name.clone()),
        ("MAC", status.mac.clone()),
        ("Backend", backend(&status)),
        ("Link", link(&status).to_owned()),
        ("Link wanted", wanted.to_owned()),
        ("Network", spec.network.clone()),
        ("Address", spec.ipv4_address.clone()),
        ("IPv6 address", spec.ipv6_address.clone()),
        ("Ports", ports.join(", ")),
        ("Limits", limits(&nic)),
    ];
    if status.served {
        let (rx, tx) = (
            traffic(
                status.rx_packets,
                status.rx_bytes,
                status.rx_drops,
                status.ingress_throttled,
            ),
            traffic(
                status.tx_packets,
                status.tx_bytes,
                status.tx_drops,
                status.egress_throttled,
            ),
        );
        fields.extend([
            ("Received", rx),
            ("Sent", tx),
            ("Flows", status.flows.to_string()),
            ("Captures", status.captures.to_string()),
        ]);
    }
    output::fields(&fields);
    show_drops(&status);
    Ok(())
}

fn show_drops(status: &pb::NicStatus) {
    let of = |way: &'static str, drops: &std::collections::BTreeMap<String, u64>| {
        let mut rows: Vec<Vec<String>> = drops
            .iter()
            .filter(|(_, count)| **count > 0)
            .map(|(reason, count)| vec![way.to_owned(), reason.clone(), count.to_string()])
            .collect();
        rows.sort();
        rows
    };
    let mut rows = of("ingress", &status.rx_drops_by_reason);
    rows.extend(of("egress", &status.tx_drops_by_reason));
    if !rows.is_empty() {
        println!();
        output::table(&["DROPPED", "REASON", "FRAMES"], &rows);
    }
}

async fn flows(
    global: &Global,
    vm: &str,
    nic: &str,
    filter: String,
    max_flows: u32,
) -> anyhow::Result<()> {
    let request = pb::ListFlowsRequest {
        name: nic_name(global, vm, nic)?,
        filter,
        max_flows,
    };
    let mut client = NicsClient::new(client::connect(global).await?);
    let listed = client.list_flows(request).await.map_err(client::failed)?;
    let listed = listed.into_inner();
    if global.output == Format::Json {
        json::print(&json::value("ListFlowsResponse", &listed)?);
        return Ok(());
    }
    let rows: Vec<Vec<String>> = listed.flows.iter().map(flow_row).collect();
    output::table(
        &[
            "PROTOCOL",
            "GUEST",
            "",
            "OTHER END",
            "STATE",
            "RX",
            "TX",
            "AGE",
            "IDLE",
        ],
        &rows,
    );
    if listed.truncated && !global.quiet {
        eprintln!("there are more; --max {max_flows} were asked for");
    }
    Ok(())
}

fn flow_row(flow: &pb::Flow) -> Vec<String> {
    let protocol = match flow.protocol {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        58 => "icmp6".to_owned(),
        132 => "sctp".to_owned(),
        number => number.to_string(),
    };
    let end = |address: &str, port: u32| match (address.contains(':'), port) {
        (_, 0) => address.to_owned(),
        (true, port) => format!("[{address}]:{port}"),
        (false, port) => format!("{address}:{port}"),
    };
    let seconds = |ms: u64| format!("{}s", ms / 1000);
    vec![
        protocol,
        end(&flow.local_address, flow.local_port),
        if flow.outgoing { "->" } else { "<-" }.to_owned(),
        end(&flow.remote_address, flow.remote_port),
        flow.state.clone(),
        output::size(flow.rx_bytes),
        output::size(flow.tx_bytes),
        seconds(flow.age_ms),
        seconds(flow.idle_ms),
    ]
}

async fn set_limits(global: &Global, args: NicLimitsArgs) -> anyhow::Result<()> {
    let (mut ingress, mut egress) = (pb::NicLimit::default(), pb::NicLimit::default());
    let mut mask = Vec::new();
    let mut set = |path: &str, own: &mut u64, given: Option<u64>| {
        if let Some(number) = given {
            *own = number;
            mask.push(format!("spec.limits.{path}"));
        }
    };
    for (direction, limit, rates) in [
        (
            "ingress",
            &mut ingress,
            [
                args.ingress_bps,
                args.ingress_pps,
                args.ingress_bps_burst,
                args.ingress_pps_burst,
            ],
        ),
        (
            "egress",
            &mut egress,
            [
                args.egress_bps,
                args.egress_pps,
                args.egress_bps_burst,
                args.egress_pps_burst,
            ],
        ),
    ] {
        let [bits, packets, burst_bits, burst_packets] = rates;
        let path = |figure: &str| format!("{direction}.{figure}");
        set(&path("bits_per_second"), &mut limit.bits_per_second, bits);
        set(
            &path("packets_per_second"),
            &mut limit.packets_per_second,
            packets,
        );
        set(&path("burst_bits"), &mut limit.burst_bits, burst_bits);
        set(
            &path("burst_packets"),
            &mut limit.burst_packets,
            burst_packets,
        );
    }
    if mask.is_empty() {
        bail!("give at least one limit, such as --egress-bps 100M; --help lists them");
    }
    let wanted = pb::Nic {
        limits: Some(pb::NicLimits {
            ingress: Some(ingress),
            egress: Some(egress),
        }),
        ..Default::default()
    };
    update(global, &args.vm, &args.nic, wanted, mask, args.wait).await
}

async fn update(
    global: &Global,
    vm: &str,
    nic: &str,
    wanted: pb::Nic,
    paths: Vec<String>,
    wait: WaitArgs,
) -> anyhow::Result<()> {
    let channel = client::connect(global).await?;
    let request = pb::UpdateNicRequest {
        nic: Some(pb::VmNic {
            name: nic_name(global, vm, nic)?,
            spec: Some(wanted),
            ..Default::default()
        }),
        update_mask: Some(FieldMask { paths }),
        request_id: client::request_id(None),
        validate_only: false,
    };
    let answer = NicsClient::new(channel.clone()).update_nic(request).await;
    let operation = answer.map_err(client::failed)?.into_inner();
    let doing = format!("changing NIC {nic}");
    let done = format!("NIC {nic} of vm {vm} is changed");
    conclude(global, &channel, operation, wait, &doing, &done).await
}

/// Chunks hold whole frames, so the file can be read wherever this ends.
async fn capture(global: &Global, args: CaptureArgs) -> anyhow::Result<()> {
    let to_stdout = args.file.as_os_str() == "-";
    if to_stdout && std::io::stdout().is_terminal() {
        bail!(
            "a capture is no text; pipe it (vmctl nic capture ... -w - | tcpdump -r -), or name a file"
        );
    }
    let request = pb::CaptureNicRequest {
        name: nic_name(global, &args.vm, &args.nic)?,
        filter: args.filter,
        snaplen: args.snaplen,
        direction: args.direction.direction() as i32,
        frames: args.frames.captured() as i32,
        max_packets: args.count,
        max_bytes: args.max_size,
        max_duration_ms: u64::from(args.seconds) * 1000,
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut client = NicsClient::new(client::connect(global).await?);
    let mut chunks = client
        .capture_nic(request)
        .await
        .map_err(client::failed)?
        .into_inner();
    // Opened once it is clear that there is something to write.
    let cannot = || format!("cannot write {}", args.file.display());
    let mut file: Box<dyn Write + Send> = match to_stdout {
        true => Box::new(std::io::stdout()),
        false => Box::new(File::create(&args.file).with_context(cannot)?),
    };
    let (mut packets, mut missed, mut begun) = (0, 0, false);
    let ended = loop {
        let chunk = tokio::select! {
            chunk = chunks.message() => chunk,
            // Not before the file's header, which comes at once.
            _ = interrupt.recv(), if begun => break Ok(()),
            _ = terminate.recv(), if begun => break Ok(()),
        };
        match chunk {
            Ok(Some(chunk)) => {
                file.write_all(&chunk.data)
                    .and_then(|()| file.flush())
                    .with_context(cannot)?;
                (packets, missed, begun) = (chunk.packets, chunk.missed, true);
            }
            Ok(None) => break Ok(()),
            Err(status) => break Err(client::failed(status)),
        }
    };
    if !global.quiet {
        let lost = match missed {
            0 => String::new(),
            missed => format!(", {missed} came too fast and are not in it"),
        };
        eprintln!("{packets} frames captured{lost}");
    }
    ended.map_err(|error| error.context("the capture ended early; what was written is whole"))
}

fn nic_name(global: &Global, vm: &str, nic: &str) -> anyhow::Result<String> {
    let vm = spec::vm_name(vm, &global.project)?;
    Ok(format!("{vm}/nics/{nic}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_in_their_units() {
        let nic = pb::VmNic {
            spec: Some(pb::Nic {
                limits: Some(pb::NicLimits {
                    ingress: Some(pb::NicLimit {
                        bits_per_second: 100_000_000,
                        ..Default::default()
                    }),
                    egress: Some(pb::NicLimit {
                        bits_per_second: 1500,
                        packets_per_second: 10,
                        ..Default::default()
                    }),
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(
            limits(&nic),
            "ingress 100 Mbit/s, egress 1500 bit/s, egress 10 packets/s"
        );
    }

    #[test]
    fn flow_shows_who_began() {
        let row = flow_row(&pb::Flow {
            protocol: 6,
            local_address: "fd00::2".into(),
            local_port: 22,
            remote_address: "fd00::1".into(),
            remote_port: 4000,
            state: "established".into(),
            ..Default::default()
        });
        assert_eq!(
            row[..5],
            ["tcp", "[fd00::2]:22", "<-", "[fd00::1]:4000", "established"]
        );
    }
}
