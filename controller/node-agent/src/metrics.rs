//! What Prometheus gets: the agent's own figures, and those of all VMs' daemons with the VM's name
//! added to their labels.

use std::{collections::BTreeMap, fmt::Write, sync::Arc};

use api::node::{DeviceStatus, NetworkStatus, ProcessStatus, VmPhase, VmStatus};

use crate::{agent::Agent, vm};

/// Metric families in the text format, merged from several sources.
#[derive(Debug, Default)]
struct Exposition {
    families: BTreeMap<String, Family>,
}

#[derive(Debug, Default)]
struct Family {
    /// The HELP, TYPE and UNIT lines.
    head: Vec<String>,
    samples: Vec<String>,
}

/// All metrics of this host's VMs, in Prometheus' text format.
pub(crate) async fn collect(agent: &Arc<Agent>) -> String {
    let mut exposition = Exposition::default();
    let vms = agent.all().await;
    let statuses: Vec<VmStatus> = vms.iter().map(vm::Vm::status).collect();
    exposition.add_text(None, &own_metrics(&statuses));
    let networks = &agent.env.networks;
    exposition.add_text(None, &network_metrics(&networks.list()));
    for (network, text) in networks.switch_metrics().await {
        exposition.add_text(Some(("network", &network)), &text);
    }
    let asking: Vec<_> = statuses
        .iter()
        .filter(|status| !status.processes.is_empty())
        .map(|status| {
            let dir = agent.env.vm_dir(&status.id);
            let id = status.id.clone();
            tokio::spawn(async move { (id, vm::daemon_metrics(&dir).await) })
        })
        .collect();
    for answer in asking {
        if let Ok((id, texts)) = answer.await {
            for text in texts {
                exposition.add_text(Some(("vm", &id)), &text);
            }
        }
    }
    exposition.to_string()
}

fn own_metrics(statuses: &[VmStatus]) -> String {
    let mut text = String::from(
        "# HELP mortise_vms VMs that the agent knows, by phase.\n# TYPE mortise_vms gauge\n",
    );
    for phase in [
        VmPhase::Starting,
        VmPhase::Running,
        VmPhase::Paused,
        VmPhase::Stopping,
        VmPhase::Stopped,
        VmPhase::Failed,
    ] {
        let count = statuses
            .iter()
            .filter(|status| status.phase() == phase)
            .count();
        let name = phase
            .as_str_name()
            .trim_start_matches("VM_PHASE_")
            .to_ascii_lowercase();
        let _ = writeln!(text, "mortise_vms{{phase=\"{name}\"}} {count}");
    }
    text.push_str(
        "# HELP mortise_process_restarts Times a VM's process was restarted.\n\
         # TYPE mortise_process_restarts counter\n",
    );
    for status in statuses {
        let own = |process: &&ProcessStatus| process.network.is_empty();
        for process in status.processes.iter().filter(own) {
            let _ = writeln!(
                text,
                "mortise_process_restarts_total{{vm=\"{}\",process=\"{}\"}} {}",
                status.id, process.name, process.restarts
            );
        }
    }
    text.push_str(
        "# HELP mortise_process_hangs Times a VM's daemon was killed because it hung.\n\
         # TYPE mortise_process_hangs counter\n",
    );
    for status in statuses {
        for process in status
            .processes
            .iter()
            .filter(|process| process.name != "vmm-core")
        {
            let _ = writeln!(
                text,
                "mortise_process_hangs_total{{vm=\"{}\",process=\"{}\"}} {}",
                status.id, process.name, process.hangs
            );
        }
    }
    device_metrics(&mut text, statuses);
    text
}

fn network_metrics(networks: &[NetworkStatus]) -> String {
    let mut text = String::from(
        "# HELP mortise_network_process_restarts Times a network's process was restarted.\n\
         # TYPE mortise_network_process_restarts counter\n",
    );
    for network in networks {
        for process in &network.processes {
            let _ = writeln!(
                text,
                "mortise_network_process_restarts_total{{network=\"{}\",process=\"{}\"}} {}",
                network.id, process.name, process.restarts
            );
        }
    }
    text
}

type Figure = fn(&DeviceStatus) -> Option<f64>;

/// Name, type, help and value of what is told of each device.
const DEVICE_FAMILIES: [(&str, &str, &str, Figure); 6] = [
    (
        "connected",
        "gauge",
        "Whether a daemon serves the device.",
        |device| Some(f64::from(u8::from(device.connected))),
    ),
    (
        "stalled_since_seconds",
        "gauge",
        "Unix time since which no daemon serves the device.",
        |device| device.stalled_since.as_ref().map(seconds),
    ),
    (
        "storage_wait_since_seconds",
        "gauge",
        "Unix time since which requests wait for storage, the daemon being well.",
        |device| device.storage_wait_since.as_ref().map(seconds),
    ),
    (
        "failing_requests",
        "gauge",
        "Whether requests fail by the outage policy.",
        |device| Some(f64::from(u8::from(device.failing_requests))),
    ),
    (
        "last_recovery_seconds",
        "gauge",
        "From the last loss of the daemon to the first completion after it.",
        |device| (device.last_recovery_us > 0).then(|| device.last_recovery_us as f64 / 1e6),
    ),
    (
        "outages",
        "counter",
        "Losses of the daemon since the VM started.",
        |device| Some(device.outages_total as f64),
    ),
];

fn device_metrics(text: &mut String, statuses: &[VmStatus]) {
    for (name, kind, help, figure) in DEVICE_FAMILIES {
        let total = if kind == "counter" { "_total" } else { "" };
        let _ = writeln!(
            text,
            "# HELP mortise_device_{name} {help}\n# TYPE mortise_device_{name} {kind}"
        );
        for status in statuses {
            for device in &status.devices {
                if let Some(value) = figure(device) {
                    let _ = writeln!(
                        text,
                        "mortise_device_{name}{total}{{vm=\"{}\",device=\"{}\",type=\"{}\"}} {value}",
                        status.id, device.name, device.r#type
                    );
                }
            }
        }
    }
}

fn seconds(time: &prost_types::Timestamp) -> f64 {
    time.seconds as f64 + f64::from(time.nanos) / 1e9
}

impl Exposition {
    /// Adds a source's text. Its samples get a label if one is given.
    fn add_text(&mut self, label: Option<(&str, &str)>, text: &str) {
        let mut current = String::new();
        for line in text
            .lines()
            .filter(|line| !line.is_empty() && *line != "# EOF")
        {
            if let Some(comment) = line.strip_prefix("# ") {
                let Some(name) = comment.split(' ').nth(1) else {
                    continue;
                };
                current = name.to_owned();
                let family = self.families.entry(current.clone()).or_default();
                if !family.head.iter().any(|known| known == line) {
                    family.head.push(line.to_owned());
                }
            } else {
                let family = self.families.entry(current.clone()).or_default();
                family.samples.push(labelled(label, line));
            }
        }
    }
}

impl std::fmt::Display for Exposition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for family in self
            .families
            .values()
            .filter(|family| !family.samples.is_empty())
        {
            for line in family.head.iter().chain(&family.samples) {
                writeln!(f, "{line}")?;
            }
        }
        Ok(())
    }
}

/// Names need no escaping: they are letters, digits and hyphens.
fn labelled(label: Option<(&str, &str)>, sample: &str) -> String {
    let Some((label, value)) = label else {
        return sample.to_owned();
    };
    let end = sample.find(['{', ' ']).unwrap_or(sample.len());
    let (name, rest) = sample.split_at(end);
    match rest.strip_prefix('{') {
        Some(labels) => format!("{name}{{{label}=\"{value}\",{labels}"),
        None => format!("{name}{{{label}=\"{value}\"}}{rest}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_family_of_two_vms_is_one_family() {
        let text =
            "# HELP reads Reads.\n# TYPE reads counter\nreads_total{disk=\"a b\"} 1\n# EOF\n";
        let mut exposition = Exposition::default();
        exposition.add_text(Some(("vm", "web")), text);
        exposition.add_text(Some(("vm", "db")), text);
        exposition.add_text(
            Some(("vm", "db")),
            "# HELP idle Nothing.\n# TYPE idle gauge\n# EOF\n",
        );
        assert_eq!(
            exposition.to_string(),
            "# HELP reads Reads.\n# TYPE reads counter\n\
             reads_total{vm=\"web\",disk=\"a b\"} 1\nreads_total{vm=\"db\",disk=\"a b\"} 1\n"
        );
    }

    #[test]
    fn sample_without_labels_gets_one() {
        assert_eq!(labelled(Some(("vm", "web")), "up 1"), "up{vm=\"web\"} 1");
    }
}
