//! What is asked of the controller: many VMs at once, and then requests of all kinds at a steady rate,
//! each with the time that it took.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use api::controller::vms_client::VmsClient;
use api::controller::*;
use tokio::task::JoinSet;
use tonic::transport::Channel;

/// Requests under way at one time while VMs are made.
const WORKERS: usize = 128;
/// Connections that these share.
pub(crate) const CONNECTIONS: usize = 4;

/// The name of a VM.
pub(crate) fn vm_id(number: usize) -> String {
    format!("vm{number:06}")
}

/// It may restart anywhere: one of those that [`create`] makes.
pub(crate) fn roams(name: &str) -> bool {
    name.starts_with("projects/default/vms/vm")
}

/// Makes VMs `first..last`; answers when all are there.
pub(crate) async fn create(channels: &[Channel], first: usize, last: usize) -> Result<Duration> {
    let begun = Instant::now();
    each(channels, first, last, |mut client, number| async move {
        let spec = VmSpec {
            kernel: "/boot/vmlinuz".into(),
            vcpus: 1,
            memory_bytes: 1 << 30,
            restart_policy: RestartPolicy::Anywhere as i32,
            ..Default::default()
        };
        let request = CreateVmRequest {
            parent: "projects/default".into(),
            vm_id: vm_id(number),
            vm: Some(Vm {
                spec: Some(spec),
                ..Default::default()
            }),
            ..Default::default()
        };
        client.create_vm(request).await.map(drop)
    })
    .await?;
    Ok(begun.elapsed())
}

/// Starts VMs `first..last`.
pub(crate) async fn start(channels: &[Channel], first: usize, last: usize) -> Result<Duration> {
    let begun = Instant::now();
    each(channels, first, last, |mut client, number| async move {
        let request = StartVmRequest {
            name: format!("projects/default/vms/{}", vm_id(number)),
            ..Default::default()
        };
        client.start_vm(request).await.map(drop)
    })
    .await?;
    Ok(begun.elapsed())
}

async fn each<F>(
    channels: &[Channel],
    first: usize,
    last: usize,
    ask: impl Fn(VmsClient<Channel>, usize) -> F + Clone + Send + 'static,
) -> Result<()>
where
    F: Future<Output = Result<(), tonic::Status>> + Send + 'static,
{
    let next = Arc::new(AtomicUsize::new(first));
    let mut workers = JoinSet::new();
    for worker in 0..WORKERS {
        let client = VmsClient::new(channels[worker % channels.len()].clone());
        let (next, ask) = (next.clone(), ask.clone());
        workers.spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= last {
                    return Ok(());
                }
                if let Err(status) = ask(client.clone(), number).await {
                    bail!("{}: {status}", vm_id(number));
                }
            }
        });
    }
    while let Some(worker) = workers.join_next().await {
        worker??;
    }
    Ok(())
}

/// All VMs, page by page.
pub(crate) async fn list(channel: &Channel, filter: &str) -> Result<Vec<Vm>> {
    // Names, hosts and phases are enough.
    let read_mask = mask(&["name", "status.host", "status.phase"]);
    let mut client = VmsClient::new(channel.clone()).max_decoding_message_size(64 << 20);
    let mut vms = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = ListVmsRequest {
            parent: "projects/default".into(),
            page_size: 1000,
            page_token,
            filter: filter.to_owned(),
            read_mask: read_mask.clone(),
            ..Default::default()
        };
        let page = client.list_vms(request).await?.into_inner();
        vms.extend(page.vms);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(vms);
        }
    }
}

fn mask(paths: &[&str]) -> Option<prost_types::FieldMask> {
    Some(prost_types::FieldMask {
        paths: paths.iter().map(|path| (*path).to_owned()).collect(),
    })
}

/// Requests `per_second` times a second for `length`: of ten, six look at a VM, one lists a page, two
/// start one that runs or stop one that is off, one makes a VM. Sorted times.
pub(crate) async fn steady(
    channels: &[Channel],
    vms: usize,
    per_second: u32,
    length: Duration,
) -> Result<Vec<Duration>> {
    let mut times = Vec::new();
    let mut asked = JoinSet::new();
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
    let begun = Instant::now();
    let mut number = 0;
    while begun.elapsed() < length {
        ticks.tick().await;
        let channel = channels[number % channels.len()].clone();
        asked.spawn(one(channel, number, vms));
        number += 1;
        while let Some(done) = asked.try_join_next() {
            times.push(done??);
        }
    }
    while let Some(done) = asked.join_next().await {
        times.push(done??);
    }
    times.sort();
    Ok(times)
}

async fn one(channel: Channel, number: usize, vms: usize) -> Result<Duration> {
    let mut client = VmsClient::new(channel);
    let name = format!(
        "projects/default/vms/{}",
        vm_id(number.wrapping_mul(7919) % vms)
    );
    let begun = Instant::now();
    let done = match number % 10 {
        0..6 => client.get_vm(GetVmRequest { name }).await.map(drop),
        6 => {
            let request = ListVmsRequest {
                parent: "projects/default".into(),
                page_size: 50,
                page_token: format!("vms/default/{}", vm_id(number % vms)),
                ..Default::default()
            };
            client.list_vms(request).await.map(drop)
        }
        7 | 8 => {
            let request = StartVmRequest {
                name,
                ..Default::default()
            };
            client.start_vm(request).await.map(drop)
        }
        _ => {
            let request = CreateVmRequest {
                parent: "projects/default".into(),
                vm_id: format!("more{number:06}"),
                vm: Some(Vm {
                    spec: Some(VmSpec {
                        kernel: "/boot/vmlinuz".into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            };
            client.create_vm(request).await.map(drop)
        }
    };
    done.with_context(|| format!("request {number}"))?;
    Ok(begun.elapsed())
}

/// The share's quantile of sorted times.
pub(crate) fn quantile(sorted: &[Duration], share: f64) -> Duration {
    let index = (sorted.len() as f64 * share) as usize;
    let last = sorted.len().saturating_sub(1);
    sorted.get(index.min(last)).copied().unwrap_or_default()
}
